// SPDX-License-Identifier: MIT
//
// Times attention with relative maps, forward and backward, by Fourier transforms, exactly, and as `auto` does it: ReRoPE (rotation by
// min(i - j, 1024), which `auto` does in pieces), rotation by rough positions, and the papers' general form with 2 D places (with dWeights).
// Calls in turns; medians of the calls and of the ratios of neighbouring calls. Arguments by ARGS="...":
//
//   --cases ReRoPE:16:causal,rough:16:full,matrices:8:full   (map, D, mask)
//   --lengths 4096,8192,16384,32768,65536   --degree 2   --tolerance 1e-2   --bound 0.5   --calls 3   --exact-up-to 16384
//
// Longer ones count as the longest exact call times the ratio of pairs (*). `slope` is that of log time against log N since the row
// before; `MB` the WebAssembly memory of the backward call. The degree is that of both passes, checked on sampled rows as always;
// `worst gradient` is the largest relative error of dq, dk, dv and dWeights (s: sampled, of dq, dk and dv). Below each table:
// from which length on Fourier transforms win, on a line between two rows.

import { parseArgs } from 'node:util';

import { createRopeAttention } from '../../dist/index.js';
import { uniform } from './peers/problem.mjs';
import { figures, median, relativeError, step } from './tools/step.mjs';

const { values: given } = parseArgs({
  options: {
    cases: { type: 'string', default: 'ReRoPE:16:causal,rough:16:full,matrices:8:full' },
    lengths: { type: 'string', default: '4096,8192,16384,32768,65536' },
    degree: { type: 'string', default: '2' },
    tolerance: { type: 'string', default: '1e-2' },
    bound: { type: 'string', default: '0.5' },
    calls: { type: 'string', default: '3' },
    'exact-up-to': { type: 'string', default: '16384' },
  },
});
const numbers = (text) => text.split(',').map(Number);
const [degree, tolerance, bound, calls, exactUpTo] = ['degree', 'tolerance', 'bound', 'calls', 'exact-up-to'].map((name) => Number(given[name]));

/** What depends on i - j, by name. */
const MAPS = {
  ReRoPE: (length) => ({ relativePositions: Float32Array.from({ length: 2 * length - 1 }, (_, n) => Math.min(n - length + 1, 1024)) }),
  rough: (length) => ({ relativePositions: uniform(2 * length - 1, 5, length) }),
  matrices: (length, headDim) => ({
    relative: {
      support: Uint32Array.from({ length: 4 * headDim }, (_, n) => (n % 4 === 3 ? (n >> 2) + 1 : n >> 2) % headDim),
      weights: uniform(2 * headDim * (2 * length - 1), 6, 1),
    },
  }),
};

function problem(length, headDim, mask, map) {
  const [q, k, v, dOutput] = [1, 2, 3, 4].map((stream) => uniform(length * headDim, stream, bound));
  const shape = { heads: 1, queryLength: length, headDim };
  return { q, k, v, dOutput, shape, causal: mask === 'causal', tolerance, ...MAPS[map](length, headDim) };
}

/** From which length on the ratio is above 1: on a line of its logarithm against that of the length. */
function crossover(rows) {
  const n = rows.findIndex(({ ratio }) => ratio >= 1);
  if (n < 0) return `exact wins up to N = ${rows.at(-1).length.toLocaleString()}`;
  if (n === 0) return `Fourier transforms win from N = ${rows[0].length.toLocaleString()} on, or before`;
  const [below, above] = [rows[n - 1], rows[n]];
  const share = Math.log(below.ratio) / Math.log(below.ratio / above.ratio);
  const length = below.length * (above.length / below.length) ** share;
  return `exact wins up to N = ${below.length.toLocaleString()}; Fourier transforms from about ${Number(length.toPrecision(2)).toLocaleString()} on`;
}

const attention = await createRopeAttention();
console.log(`${attention.simd}, entries in [-${bound}, ${bound}], tolerance ${tolerance}; milliseconds`);
const header = ['N', 'degree', 'terms', 'forward', 'backward', 'slope', 'MB', 'exact forward', 'backward', 'exact / toeplitz', 'worst gradient', 'auto', 'exact / auto', 'which is'];
for (const [map, headDim, mask] of given.cases.split(',').map((one) => one.split(':'))) {
  console.log(`\n${map}, D = ${headDim}, ${mask}\n\n| ${header.join(' | ')} |\n|${' --- |'.repeat(header.length)}`);
  const rows = [];
  for (const length of numbers(given.lengths)) {
    const args = problem(length, Number(headDim), mask, map);
    const [fast, exact, chosen] = [[], [], []];
    const forced = { ...args, method: 'toeplitz', degree, onMiss: 'report' };
    if (rows.length === 0) step(attention, forced); // warm
    for (let n = 0; n < calls; n++) {
      fast.push(step(attention, forced));
      chosen.push(step(attention, args));
      if (length <= exactUpTo && (n === 0 || length < exactUpTo)) exact.push(step(attention, { ...args, method: 'exact' }));
    }
    const of = (runs, pass) => median(runs.map((run) => run[pass]));
    const before = rows.at(-1);
    const both = of(fast, 'both');
    const slope = before && Math.log(both / before.both) / Math.log(length / before.length);
    const known = exact.length > 0;
    const scaled = (pass) => (known ? of(exact, pass) : before.exact[pass] * (length / before.length) ** 2);
    const times = { forward: scaled('forward'), backward: scaled('backward') };
    const ratio = known ? median(exact.map((run, n) => run.both / fast[n].both)) : (times.forward + times.backward) / both;
    const gradients = fast[0].gradients;
    const names = ['dq', 'dk', 'dv', 'dWeights'].filter((name) => gradients[name]);
    const worst = known
      ? Math.max(...names.map((name) => relativeError(gradients[name], exact[0].gradients[name]))).toExponential(1)
      : `${gradients.report.errorEstimate.toExponential(1)} s`;
    const megabytes = (gradients.report.bytes / 1e6).toFixed(0);
    const star = known ? '' : '*';
    const cells = [length, degree, fast[0].report.rank, figures(of(fast, 'forward')), figures(of(fast, 'backward')), slope?.toFixed(2) ?? '', megabytes];
    cells.push(figures(times.forward) + star, figures(times.backward) + star, `${figures(ratio)}x${star}`, worst);
    const auto = of(chosen, 'both');
    cells.push(figures(auto), `${figures((times.forward + times.backward) / auto)}x${star}`, chosen[0].gradients.report.method);
    console.log(`| ${cells.join(' | ')} |`);
    rows.push({ both, length, ratio, exact: times });
  }
  console.log(`\n${crossover(rows)}`);
}
attention.dispose();
