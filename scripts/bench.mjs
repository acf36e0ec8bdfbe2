// bench.mjs [FILE...] [-- ARGUMENT...]: runs benchmarks (default: tests/bench/*.mjs) one after the other with the newest
// Node there is, which is the one of the package `node` where it could be installed.

import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { relaxedSimdFlags } from './relaxed-simd.mjs';

const given = process.argv.slice(2);
const split = given.indexOf('--');
const files = split < 0 ? given : given.slice(0, split);
const rest = split < 0 ? [] : given.slice(split + 1);

const folder = fileURLToPath(new URL('../tests/bench/', import.meta.url));
if (files.length === 0 && existsSync(folder)) {
  for (const name of readdirSync(folder).sort()) if (name.endsWith('.mjs')) files.push(folder + name);
}
if (files.length === 0) {
  console.error(`no benchmarks in ${folder}`);
  process.exit(1);
}

const packaged = fileURLToPath(new URL('../node_modules/node/bin/node', import.meta.url));
const node = existsSync(packaged) ? packaged : process.execPath;
const flags = relaxedSimdFlags(node);
for (const file of files) {
  const { status } = spawnSync(node, [...flags, file, ...rest], { stdio: 'inherit' });
  if (status !== 0) process.exit(status ?? 1);
}
