// SPDX-License-Identifier: MIT
//
// Times attentionLoss, one step of the papers' training problem, causal, d = D: exact and by a polynomial, and what share of the
// call the dense products around attention take. Medians; the share is the median of the shares. Arguments by ARGS="...":
//
//   --dims 16,64   --lengths 4096,16384,65536   --degree 2   --bound 0.5   --calls 7   --exact-up-to 16384

import { parseArgs } from 'node:util';

import { createRopeAttention } from '../../dist/index.js';
import { uniform } from './peers/problem.mjs';

const { values: given } = parseArgs({
  options: {
    dims: { type: 'string', default: '16,64' },
    lengths: { type: 'string', default: '4096,16384,65536' },
    degree: { type: 'string', default: '2' },
    bound: { type: 'string', default: '0.5' },
    calls: { type: 'string', default: '7' },
    'exact-up-to': { type: 'string', default: '16384' },
  },
});
const numbers = (text) => text.split(',').map(Number);
const [degree, bound, calls, exactUpTo] = ['degree', 'bound', 'calls', 'exact-up-to'].map((name) => Number(given[name]));
const median = (values) => values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)];

/** Tokens in [-1, 1]; weights are the identity times the bound, so that q and k are within it. */
function problem(length, headDim) {
  const [tokens, weights] = [length * headDim, headDim * headDim];
  const diagonal = Float32Array.from({ length: weights }, (_, n) => (n % (headDim + 1) === 0 ? bound : 0));
  const arrays = { a1: uniform(tokens, 1, 1), a2: uniform(tokens, 1, 2), a3: uniform(tokens, 1, 3), e: uniform(tokens, 1, 4) };
  const shape = { heads: 1, queryLength: length, headDim };
  return { ...arrays, x1: diagonal, x2: diagonal, y: uniform(weights, 1, 5), shape, causal: true };
}

function measure(attention, args) {
  const runs = Array.from({ length: calls + 1 }, () => {
    const start = performance.now();
    const { saved, report } = attention.attentionLoss(args);
    const whole = performance.now() - start;
    return { whole, share: 1 - (saved.report.milliseconds + report.milliseconds) / whole };
  }).slice(1);
  return [median(runs.map(({ whole }) => whole)).toPrecision(3), `${(100 * median(runs.map(({ share }) => share))).toFixed(0)}%`];
}

const attention = await createRopeAttention();
console.log(`attentionLoss, ${attention.simd}, causal, entries of q and k in [-${bound}, ${bound}]\n`);
console.log(`| D | N | exact ms | products | degree ${degree} ms | products |\n|${' --- |'.repeat(6)}`);
for (const headDim of numbers(given.dims)) {
  for (const length of numbers(given.lengths)) {
    const args = problem(length, headDim);
    const exact = length <= exactUpTo ? measure(attention, { ...args, method: 'exact' }) : ['', ''];
    const polynomial = measure(attention, { ...args, method: 'polynomial', degree, onMiss: 'report' });
    console.log(`| ${[headDim, length, ...exact, ...polynomial].join(' | ')} |`);
  }
}
attention.dispose();
