// SPDX-License-Identifier: MIT
//
// Outliers: `auto` against exact where a few rows have large norms, forward and forward + backward, through the public API, one
// thread. Run by `make bench BENCH=tests/bench/outliers.mjs`; arguments by ARGS="...":
//
//   --dims 16,32,64   --length 16384   --tolerance 1e-2   --masks full,causal   --runs 3
//
// Inputs: `key`, entries uniform in [-0.5, 0.5) and one key a hundred times as large; `tails`, Gaussian vectors with log-normal
// norms (sigma 0.4), scores of standard deviation 0.3. Calls take turns, times are medians after one warm-up, in milliseconds, copies
// and sampled checks included; errors are measured against exact on all rows, in the units of the tolerance.

import { parseArgs } from 'node:util';
import { createRopeAttention } from '../../dist/index.js';
import { uniform } from './peers/problem.mjs';

const { values: given } = parseArgs({
  options: {
    dims: { type: 'string', default: '16,32,64' },
    length: { type: 'string', default: '16384' },
    tolerance: { type: 'string', default: '1e-2' },
    masks: { type: 'string', default: 'full,causal' },
    runs: { type: 'string', default: '3' },
  },
});
const [length, tolerance, runs] = [given.length, given.tolerance, given.runs].map(Number);

/** Box and Muller, from two streams. */
function normal(count, seed) {
  const [u, w] = [uniform(count, seed, 0.5), uniform(count, seed + 1, 0.5)];
  return u.map((x, n) => Math.sqrt(-2 * Math.log(0.5 - x)) * Math.cos(2 * Math.PI * w[n]));
}

const INPUTS = {
  key(headDim) {
    const [q, k] = [1, 2].map((seed) => uniform(length * headDim, seed, 0.5));
    const huge = Math.floor(length / 3) * headDim;
    for (let d = huge; d < huge + headDim; d++) k[d] *= 100;
    return { q, k };
  },
  tails(headDim) {
    const [q, k] = [11, 21].map((seed) => {
      const norms = normal(length, seed + 4);
      const scale = Math.sqrt(0.3 / Math.exp(2 * 0.4 ** 2));
      return normal(length * headDim, seed).map((x, n) => x * scale * Math.exp(0.4 * norms[Math.floor(n / headDim)]));
    });
    return { q, k };
  },
};

function outputError(got, exact, v, headDim) {
  let [difference, widest] = [0, 0];
  for (let d = 0; d < headDim; d++) {
    let [low, high] = [Infinity, -Infinity];
    for (let n = d; n < v.length; n += headDim) {
      low = Math.min(low, v[n]);
      high = Math.max(high, v[n]);
      difference = Math.max(difference, Math.abs(got[n] - exact[n]));
    }
    widest = Math.max(widest, (high - low) / 2);
  }
  return difference / widest;
}

function frobenius(got, exact) {
  let [difference, size] = [0, 0];
  got.forEach((x, n) => {
    difference += (x - exact[n]) ** 2;
    size += exact[n] ** 2;
  });
  return Math.sqrt(difference / size);
}

const median = (times) => times.sort((a, b) => a - b)[times.length >> 1];
const chosen = ({ method, degree, outliers }) =>
  method === 'exact' ? 'exact' : `degree ${degree}, ${outliers.queries} + ${outliers.keys}`;

const attention = await createRopeAttention();
console.log(`N = ${length}, tolerance ${tolerance}, ${attention.simd}, Node ${process.versions.node}\n`);
console.log('| inputs | mask | D | pass | exact ms | auto ms | ratio | degree, queries + keys that are exact | error |');
console.log('| --- | --- | --- | --- | --- | --- | --- | --- | --- |');
for (const [name, make] of Object.entries(INPUTS)) {
  for (const mask of given.masks.split(',')) {
    for (const headDim of given.dims.split(',').map(Number)) {
      const [v, dOutput] = [3, 4].map((seed) => uniform(length * headDim, seed, 1));
      const args = { ...make(headDim), v, shape: { heads: 1, queryLength: length, headDim }, causal: mask === 'causal', tolerance };
      const passes = {
        forward: (options) => attention.forward({ ...args, ...options }),
        'forward + backward': (options) => attention.backward({ ...args, dOutput, ...options }),
      };
      for (const [pass, run] of Object.entries(passes)) {
        const times = { exact: [], auto: [] };
        const result = {};
        for (let n = 0; n <= runs; n++) {
          for (const method of ['exact', 'auto']) {
            const start = performance.now();
            result[method] = run({ method });
            if (n > 0) times[method].push(performance.now() - start);
          }
        }
        const { exact, auto } = result;
        const error =
          pass === 'forward'
            ? outputError(auto.output, exact.output, v, headDim)
            : Math.max(...['dq', 'dk', 'dv'].map((array) => frobenius(auto[array], exact[array])));
        const [a, b] = [median(times.exact), median(times.auto)];
        const cells = [name, mask, headDim, pass, a.toFixed(0), b.toFixed(0), `${(a / b).toPrecision(3)}x`];
        console.log(`| ${cells.join(' | ')} | ${chosen(auto.report)} | ${error.toExponential(1)} |`);
      }
    }
  }
}
attention.dispose();
