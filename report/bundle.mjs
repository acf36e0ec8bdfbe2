// SPDX-License-Identifier: MIT
//
// What the page carries besides its numbers: the drawing script with Observable Plot in it, as one classic script made by
// Vite, and the demo page's style sheet (colours and type are the same) followed by the report's own.

import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { build } from 'vite';

const path = (name) => fileURLToPath(new URL(name, import.meta.url));

/** @returns {Promise<string>} The script, not yet fit for HTML. */
export async function bundleScript() {
  const [{ output }] = await build({
    configFile: false,
    logLevel: 'warn',
    root: path('page/'),
    build: {
      write: false,
      target: 'es2022',
      lib: { entry: path('page/draw.mjs'), formats: ['iife'], name: 'ropeAttentionReport' },
    },
  });
  return output.find(({ type }) => type === 'chunk').code;
}

export const readStyle = () => ['../demo/style.css', 'page/style.css'].map((name) => readFileSync(path(name), 'utf8')).join('\n');
