// SPDX-License-Identifier: MIT
//
// Times the exact engine with relative maps beside the same call with plain rotation: relativePositions (ReRoPE, a window of N / 4;
// and a rough map) and general matrices (2 D places, two in each row and each column). Arguments by ARGS="...":
//
//   --dims 8,16,64   --lengths 2048   --masks full,causal   --binaries simd128,relaxed-simd   --seconds 1
//
// Share of the multiply-add peak, useful operations being those of the report: a map takes |S| + D multiply-adds for the score of
// a pair where a rotation takes D, 3 D for relativePositions. Calls take turns; times and ratios of times are medians.

import { parseArgs } from 'node:util';

import { uniform } from './peers/problem.mjs';
import { open, peakOf } from './tools/peak.mjs';

const { values: given } = parseArgs({
  options: {
    dims: { type: 'string', default: '8,16,64' },
    lengths: { type: 'string', default: '2048' },
    masks: { type: 'string', default: 'full,causal' },
    binaries: { type: 'string', default: 'simd128,relaxed-simd' },
    seconds: { type: 'string', default: '1' },
  },
});
const list = (name) => given[name].split(',');
const median = (values) => values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)];

/** The maps, by name. */
function mapsOf(length, headDim) {
  const diagonals = 2 * length - 1;
  const distance = (n) => n - (length - 1);
  const support = Uint32Array.from({ length: 4 * headDim }, (_, n) => (n % 4 === 3 ? (n >> 2) + 1 : n >> 2) % headDim);
  return {
    plain: {},
    ReRoPE: { relativePositions: Float32Array.from({ length: diagonals }, (_, n) => Math.min(distance(n), length / 4)) },
    rough: { relativePositions: uniform(diagonals, 5, length) },
    'general W': { relative: { support, weights: uniform(2 * headDim * diagonals, 6, 1) } },
  };
}

/** Medians over turns of all calls: milliseconds, and the time over that of the first call of the same turn. */
function race(calls) {
  const names = Object.keys(calls);
  const turns = [];
  const end = performance.now() + 1000 * Number(given.seconds) * names.length;
  for (const name of names) for (let n = 0; n < 2; n++) calls[name]();
  while (turns.length < 3 || performance.now() < end) {
    turns.push(
      names.map((name) => {
        const start = performance.now();
        calls[name]();
        return performance.now() - start;
      }),
    );
  }
  const entry = (n) => ({ time: median(turns.map((turn) => turn[n])), ratio: median(turns.map((turn) => turn[n] / turn[0])) });
  return Object.fromEntries(names.map((name, n) => [name, entry(n)]));
}

async function measure(simd, mask, headDim, length) {
  const { attention, binary } = await open(simd);
  const size = length * headDim;
  const inputs = { q: uniform(size, 1, 0.5), k: uniform(size, 2, 0.5), v: uniform(size, 3, 1) };
  const common = { ...inputs, shape: { heads: 1, queryLength: length, headDim }, causal: mask === 'causal', method: 'exact' };
  const dOutput = uniform(size, 4, 1);
  const reports = {};
  const [forward, backward] = [{}, {}];
  for (const [name, map] of Object.entries(mapsOf(length, headDim))) {
    const call = { ...common, ...map };
    const saved = attention.forward(call);
    reports[name] = [saved.report, attention.backward({ ...call, dOutput, saved }).report];
    forward[name] = () => attention.forward(call);
    backward[name] = () => attention.backward({ ...call, dOutput, saved });
  }
  const before = peakOf(binary);
  const times = [race(forward), race(backward)];
  const peak = Math.max(before, peakOf(binary));
  for (const name of Object.keys(reports)) {
    const cells = times.flatMap((of, pass) => {
      const { time, ratio } = of[name];
      const share = reports[name][pass].flops / time / 1e6 / peak;
      return [time.toPrecision(3), `${(100 * share).toFixed(0)}%`, `${ratio.toFixed(2)}x`];
    });
    console.log(`| ${[simd, headDim, mask, length, name, ...cells].join(' | ')} |`);
  }
  attention.dispose();
}

const pass = ['ms', 'peak', 'of plain'];
const head = ['binary', 'D', 'mask', 'N', 'map', ...pass.map((x) => `fwd ${x}`), ...pass.map((x) => `bwd ${x}`)];
console.log(`| ${head.join(' | ')} |\n|${head.map(() => ' --- |').join('')}`);
for (const simd of list('binaries')) {
  if (!(await open(simd))) console.log(`(${simd}: this engine does not accept the binary)`);
  else
    for (const headDim of list('dims'))
      for (const mask of list('masks')) for (const length of list('lengths')) await measure(simd, mask, Number(headDim), Number(length));
}
