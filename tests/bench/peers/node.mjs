// SPDX-License-Identifier: MIT
//
// node.mjs JOB: runs one job, JSON, in this process. Standard output has one JSON a line: what is being done, then the result.

import { writeSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { failureText, runJob } from './jobs.mjs';

const say = (message) => writeSync(1, `${JSON.stringify(message)}\n`);

const host = {
  libraries: {
    'rope-attention': () => import('../../../dist/index.js'),
    'onnxruntime-web': () => import('onnxruntime-web'),
    '@jax-js/jax': () => import('@jax-js/jax'),
    async '@tensorflow/tfjs'() {
      const { default: tf } = await import('@tensorflow/tfjs');
      await import('@tensorflow/tfjs-backend-wasm');
      return tf;
    },
  },
  binary: (name) => readFile(new URL(`../../../dist/${name}`, import.meta.url)),
  residentBytes: () => process.memoryUsage.rss(),
  note: (note) => say({ note }),
};

// onnxruntime-web makes Node's workers global, and jax-js would take them for those of a page; all have one thread here
Object.defineProperty(globalThis, 'Worker', { get: () => undefined, set() {} });
console.log = console.info = console.warn = () => {}; // greetings of the libraries
try {
  const result = await runJob(host, JSON.parse(process.argv[2]));
  // Linux counts it in KiB
  say({ result: { ...result, peakBytes: process.resourceUsage().maxRSS * 1024 } });
} catch (error) {
  say({ failed: failureText(error) });
}
process.exit(0); // whatever workers and timers there are
