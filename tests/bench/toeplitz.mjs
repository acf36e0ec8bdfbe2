// SPDX-License-Identifier: MIT
//
// Times RoPE attention with a bias by distance, forward and backward with dBias, and exactly: a rough one (random, no structure) by
// Fourier transforms; smooth ones, causal, by decaying states (a power law, a logarithm, a small network of the logarithm as in FIRE,
// T5's buckets). Calls in turns; medians of the calls and of the ratios of neighbouring calls. Arguments by ARGS="...":
//
//   --dims 16   --lengths 4096,16384,32768,65536   --masks full,causal   --degree 2   --tolerance 1e-2   --bound 0.5   --calls 3
//   --exact-up-to 65536   --biases rough,power,log,fire,t5
//
// `slope` is that of log time against log N since the row before; `MB` the WebAssembly memory of the backward call.
// The degree is that of both passes, checked on sampled rows as always; `worst gradient` is
// the largest relative error of dq, dk, dv and dBias (s: sampled); `states` how many decays stand for the bias, beyond which distance.
//
// Below, of rough biases: the rate of the transforms in a backward call, 5 n log2 n operations each, over that of the same transforms of
// the same binary alone, with as much memory to write to, and what share of the call they are, by V8's profiler (tools/transforms.mjs).

import { parseArgs } from 'node:util';

import { theory } from '../../dist/index.js';
import { uniform } from './peers/problem.mjs';
import { open } from './tools/peak.mjs';
import { figures, median, relativeError, step } from './tools/step.mjs';
import { ratesOf } from './tools/transforms.mjs';

const { values: given } = parseArgs({
  options: {
    dims: { type: 'string', default: '16' },
    lengths: { type: 'string', default: '4096,16384,32768,65536' },
    masks: { type: 'string', default: 'full,causal' },
    degree: { type: 'string', default: '2' },
    tolerance: { type: 'string', default: '1e-2' },
    bound: { type: 'string', default: '0.5' },
    calls: { type: 'string', default: '3' },
    'exact-up-to': { type: 'string', default: '65536' },
    biases: { type: 'string', default: 'rough,power,log,fire,t5' },
  },
});
const numbers = (text) => text.split(',').map(Number);
const [degree, tolerance, bound, calls, exactUpTo] = ['degree', 'tolerance', 'bound', 'calls', 'exact-up-to'].map((name) => Number(given[name]));

const swish = (x) => x / (1 + Math.exp(-1.7 * x));
const bucket = (t) => (t < 16 ? t : Math.min(31, 16 + Math.floor((Math.log(t / 16) / Math.log(8)) * 16)));
/** Biases by distance. */
const SMOOTH = {
  power: (t) => -0.5 * Math.log1p(t),
  log: (t) => -1.7 * Math.log1p(0.1 * t),
  fire: (t, length) => {
    const x = Math.log1p(0.1 * t) / Math.log1p(0.1 * length);
    return -1.5 * swish(1.3 * x - 0.3) + 1.1 * swish(0.8 - 2.1 * x) - 2 * swish(3 * x - 1.5);
  },
  t5: (t) => 0.4 * Math.sin(2.3 * bucket(t)) - 0.06 * bucket(t),
};

function problem(length, headDim, mask, kind) {
  const [q, k, v, dOutput] = [1, 2, 3, 4].map((stream) => uniform(length * headDim, stream, bound));
  const bias = uniform(2 * length - 1, 5, 1);
  if (kind !== 'rough') bias.forEach((_, n) => (bias[n] = n < length - 1 ? 0 : SMOOTH[kind](n - length + 1, length)));
  return { q, k, v, dOutput, bias, shape: { heads: 1, queryLength: length, headDim }, causal: mask === 'causal', tolerance };
}

const { attention, binary } = (await open('relaxed-simd')) ?? (await open('simd128'));
console.log(`biases, ${attention.simd}, entries in [-${bound}, ${bound}], tolerance ${tolerance}; milliseconds\n`);
const header = ['bias', 'D', 'mask', 'N', 'degree', 'states', 'forward', 'backward', 'slope', 'MB', 'exact forward', 'backward', 'exact / ours', 'worst gradient'];
console.log(`| ${header.join(' | ')} |\n|${' --- |'.repeat(header.length)}`);
const cases = numbers(given.dims).flatMap((headDim) =>
  given.biases.split(',').flatMap((kind) =>
    given.masks
      .split(',')
      .filter((mask) => kind === 'rough' || mask === 'causal')
      .map((mask) => ({ headDim, kind, mask })),
  ),
);
const transforms = [];
for (const { headDim, kind, mask } of cases) {
  let before = null;
  for (const length of numbers(given.lengths)) {
    const args = problem(length, headDim, mask, kind);
    const [fast, exact] = [[], []];
    const forced = { ...args, method: kind === 'rough' ? 'toeplitz' : 'polynomial', degree, onMiss: 'report' };
    if (!before) step(attention, forced); // warm
    for (let n = 0; n < calls; n++) {
      fast.push(step(attention, forced));
      if (length <= exactUpTo && (n === 0 || length < exactUpTo)) exact.push(step(attention, { ...args, method: 'exact' }));
    }
    const of = (runs, pass) => (runs.length > 0 ? figures(median(runs.map((run) => run[pass]))) : '');
    const both = median(fast.map((run) => run.both));
    const slope = before && Math.log(both / before.both) / Math.log(length / before.length);
    const ratio = exact.length > 0 ? `${figures(median(exact.map((run, n) => run.both / fast[n].both)))}x` : '';
    const worst =
      exact.length > 0
        ? Math.max(...['dq', 'dk', 'dv', 'dBias'].map((name) => relativeError(fast[0].gradients[name], exact[0].gradients[name]))).toExponential(1)
        : `${fast[0].gradients.report.errorEstimate.toExponential(1)} s`;
    const megabytes = (fast[0].gradients.report.bytes / 1e6).toFixed(0);
    const states = /(\w+) decaying states? fits? the bias beyond distance (\d+)/.exec(fast[0].report.reason)?.slice(1).join(', ') ?? '';
    const row = [kind, headDim, mask, length, degree, states, of(fast, 'forward'), of(fast, 'backward'), slope?.toFixed(2) ?? '', megabytes];
    console.log(`| ${[...row, of(exact, 'forward'), of(exact, 'backward'), ratio, worst].join(' | ')} |`);
    before = { both, length };
    if (kind !== 'rough') continue;
    const made = theory.transforms({ queryLength: length, headDim, degree, bias: true, pass: 'backward' });
    const { output, lse } = fast[0];
    const rates = await ratesOf(binary, () => attention.backward({ ...forced, output, lse }), { ...made, blocks: Math.ceil(length / made.length) });
    transforms.push([headDim, mask, length, made.count, made.length, ...[rates.inside, rates.apart].map(figures), rates.share, rates.ofCall]);
  }
}
const percent = (x) => `${(100 * x).toFixed(0)} %`;
console.log(`\nFourier transforms, GFLOP/s\n\n| D | mask | N | transforms | of numbers | in the call | alone | share | of the call |\n|${' --- |'.repeat(9)}`);
for (const row of transforms) console.log(`| ${[...row.slice(0, 7), ...row.slice(7).map(percent)].join(' | ')} |`);
attention.dispose();
