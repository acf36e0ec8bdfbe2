// SPDX-License-Identifier: MIT
//
// Where the time of a call goes, function by function, and what the inner loops of these are made of: `make profile`, which gives
// it a binary with names.
//
//   --cases exact:16:full:2048,...   method:D:mask:N, mask being full or causal; method exact, degree-G or auto
//   --with softcap,mask,bytes,bias,sinks   options beside, of all cases; bytes: a mask of such, half of them 0
//   --passes forward,backward        --seconds 1 (of samples for each row of figures)   --functions 10 (the largest ones)
//   --binary build/relaxed/named.wasm

import { readFileSync } from 'node:fs';
import { parseArgs } from 'node:util';

import { createRopeAttention } from '../../dist/index.js';
import { uniform } from '../bench/peers/problem.mjs';
import { peakOf } from '../bench/tools/peak.mjs';
import { selfTimes } from '../bench/tools/self-times.mjs';
import { KINDS, loopsOf } from './loops.mjs';

const { values: given } = parseArgs({
  options: {
    cases: { type: 'string', default: 'exact:16:full:2048,exact:16:causal:2048,exact:64:full:2048,degree-2:16:causal:16384,degree-2:32:causal:16384' },
    with: { type: 'string', default: '' },
    passes: { type: 'string', default: 'forward,backward' },
    seconds: { type: 'string', default: '1' },
    functions: { type: 'string', default: '10' },
    binary: { type: 'string', default: 'build/relaxed/named.wasm' },
  },
});

const bytes = readFileSync(given.binary);
const peak = peakOf((await WebAssembly.instantiate(bytes)).instance.exports);
const attention = await createRopeAttention({ wasm: bytes });
const loops = loopsOf(bytes);

function argumentsOf(name) {
  const [method, headDim, mask, length] = name.split(':');
  const [D, N] = [Number(headDim), Number(length)];
  const [, degree] = /^degree-(\d)$/.exec(method) ?? [];
  const beside = new Set(given.with.split(',').filter(Boolean));
  const array = (seed, size = N * D) => uniform(size, seed, 0.5);
  return {
    q: array(1),
    k: array(2),
    v: array(3),
    shape: { heads: 1, queryLength: N, headDim: D },
    causal: mask === 'causal',
    ...(degree ? { method: 'polynomial', degree: Number(degree) } : { method }),
    tolerance: 1e-2,
    onMiss: 'report',
    ...(beside.has('softcap') && { softcap: 30 }),
    ...(beside.has('bias') && { bias: array(5, 2 * N - 1) }),
    ...(beside.has('mask') && { mask: array(6, N * N) }),
    ...(beside.has('bytes') && { mask: Uint8Array.from(array(6, N * N), (x) => Number(x < 0)) }),
    ...(beside.has('sinks') && { sinks: Float32Array.of(0.5) }),
  };
}

/** Self times in milliseconds by function, of calls for some seconds, and how many these were. */
async function profile(call) {
  for (let n = 0; n < 10; n++) call();
  let calls = 0;
  const { wasm, javascript } = await selfTimes(() => {
    const end = performance.now() + 1000 * Number(given.seconds);
    for (; performance.now() < end; calls++) call();
  });
  const others = [...javascript].map(([name, ms]) => [`${name || 'anonymous'} (JavaScript)`, ms]);
  return { times: new Map([...wasm, ...others]), calls };
}

const seen = new Set();
console.log(`Node ${process.versions.node}, one thread, entries in [-0.5, 0.5); peak ${peak.toFixed(1)} GFLOP/s${given.with && `; with ${given.with}`}`);
for (const name of given.cases.split(',')) {
  const { q, k, v, ...args } = argumentsOf(name);
  const dOutput = uniform(v.length, 4, 0.5);
  for (const pass of given.passes.split(',')) {
    const saved = pass === 'backward' ? attention.forward({ q, k, v, ...args }) : null;
    const call = saved ? () => attention.backward({ q, k, v, ...args, dOutput, saved }) : () => attention.forward({ q, k, v, ...args });
    const { flops } = call().report;
    const { times, calls } = await profile(call);
    const sum = [...times.values()].reduce((a, b) => a + b, 0);
    const share = flops / ((sum / calls) * 1e6) / peak;
    console.log(`\n${name}, ${pass}: ${(sum / calls).toFixed(2)} ms a call, ${(100 * share).toFixed(0)}% of the peak\n\n| share | ms | function |\n| --- | --- | --- |`);
    const largest = [...times].sort((a, b) => b[1] - a[1]).slice(0, Number(given.functions));
    for (const [of, ms] of largest) {
      console.log(`| ${((100 * ms) / sum).toFixed(1)}% | ${(ms / calls).toFixed(3)} | ${of} |`);
      if (ms > 0.02 * sum) seen.add(of);
    }
  }
}
console.log(`\nInner loops, instructions a turn:\n\n| function | ${KINDS.join(' | ')} |\n| --- | ${KINDS.map(() => '---').join(' | ')} |`);
for (const name of seen)
  for (const counts of loops.get(name) ?? []) console.log(`| ${name} | ${KINDS.map((kind) => counts[kind] ?? 0).join(' | ')} |`);
attention.dispose();
