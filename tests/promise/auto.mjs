// SPDX-License-Identifier: MIT
//
// What `method: 'auto'` costs: its time over that of `method: 'exact'` on the same arrays, planning, checking and a polynomial
// that misses included, over head sizes, lengths, bounds, masks, tolerances and kinds of input. Run by `make bench-auto`;
// arguments by ARGS="...":
//
//   --dims 16,32,64   --lengths 256,512,1024,2048,4096,8192,16384   --bounds 0.25,0.5,1,2   --masks full,causal (and slope0.05, causal with slopes like that)
//   --tolerances 1e-1,1e-2,1e-3,1e-4   --passes forward,backward,both   --kinds uniform,... (all)   --binary relaxed-simd, simd128
//   --seconds 0.25 (of calls for each figure)   --json build/bench-auto.json
//
// A backward call is given what an exact forward call has saved; both are a forward call and a backward call with its own result.
//
// Exact, auto and exact once more take turns, in changing order; a figure is the median of ratios within such rounds, and the second exact
// one over the first says what of it is the machine's. What comes out above 1.08 is measured again, twice, `AGAIN` times as long, and the
// median of the three counts. The table has one row for each head size, mask, pass and length: the worst ratio and its input, the worst of
// exact over exact, how many of both are above 1.1, how often a polynomial was taken, and its best.

import { mkdirSync, writeFileSync } from 'node:fs';
import { dirname } from 'node:path';
import { parseArgs } from 'node:util';
import { createRopeAttention } from '../../dist/index.js';
import { KINDS, instance } from './instances.mjs';

const { values: given } = parseArgs({
  options: {
    dims: { type: 'string', default: '16,32,64' },
    lengths: { type: 'string', default: '256,512,1024,2048,4096,8192,16384' },
    bounds: { type: 'string', default: '0.25,0.5,1,2' },
    masks: { type: 'string', default: 'full,causal' },
    tolerances: { type: 'string', default: '1e-1,1e-2,1e-3,1e-4' },
    passes: { type: 'string', default: 'forward,backward,both' },
    kinds: { type: 'string', default: Object.keys(KINDS).join(',') },
    binary: { type: 'string', default: 'auto' },
    seconds: { type: 'string', default: '0.25' },
    json: { type: 'string', default: 'build/bench-auto.json' },
  },
});
const list = (text) => text.split(',');
const numbers = (text) => list(text).map(Number);

const attention = await createRopeAttention({ relaxedSimd: given.binary === 'auto' ? 'auto' : given.binary === 'relaxed-simd' });
const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];

const timed = (call) => {
  const start = performance.now();
  const { report } = call();
  return { milliseconds: performance.now() - start, report };
};

/** A call, or both, the backward one with the result of the other; returns its report. */
function run(args, pass) {
  if (pass !== 'both') return attention[pass](args);
  const { dOutput: _, ...forward } = args;
  return attention.backward({ ...args, saved: attention.forward(forward) });
}

/** Figures above this are measured again, so many times as long. */
const [DOUBTFUL, AGAIN] = [1.08, 4];

/** Median ratios of auto's time, and of another exact call's, to exact's. */
function compare(args, pass) {
  const exact = () => run({ ...args, method: 'exact' }, pass);
  const auto = () => run(args, pass);
  timed(exact);
  const { report } = timed(auto);
  const figures = [measure(exact, auto, 1)];
  if (figures[0].ratio > DOUBTFUL) for (const _ of [1, 2]) figures.push(measure(exact, auto, AGAIN));
  const { ratio, milliseconds } = figures.sort((a, b) => a.ratio - b.ratio)[figures.length >> 1];
  const control = median(figures.map((one) => one.control));
  return { ratio, control, milliseconds, method: report.method, degree: report.degree, reason: report.reason };
}

function measure(exact, auto, times) {
  const [ratios, controls, exactTimes] = [[], [], []];
  const start = performance.now();
  for (let n = 0; n < 3 || (performance.now() - start < 1000 * times * Number(given.seconds) && n < 300 * times); n++) {
    const took = [0, 0, 0];
    for (const turn of [0, 1, 2]) {
      const which = (n + turn) % 3;
      took[which] = timed(which === 1 ? auto : exact).milliseconds;
    }
    const [first, automatic, second] = took;
    ratios.push(automatic / first);
    controls.push(second / first);
    exactTimes.push(first);
  }
  return { ratio: median(ratios), control: median(controls), milliseconds: median(exactTimes) };
}

const rows = [];
console.log(`${attention.simd}; time of auto / time of exact, medians of neighbouring calls\n`);
const HEADINGS = ['D', 'mask', 'pass', 'N', 'exact ms', 'cases', 'polynomial', 'best', 'above 1.1', 'exact / exact', 'worst', 'of'];
console.log(`| ${HEADINGS.join(' | ')} |\n|${' --- |'.repeat(HEADINGS.length)}`);
const above = (cases, of) => cases.filter((one) => one[of] > 1.1).length;
for (const headDim of numbers(given.dims)) {
  for (const mask of list(given.masks)) {
    for (const pass of list(given.passes)) {
      for (const length of numbers(given.lengths)) {
        const cases = [];
        for (const kind of list(given.kinds)) {
          for (const bound of numbers(given.bounds)) {
            const slope = /^slope(.+)/.exec(mask)?.[1];
            const setting = {
              shape: { heads: 1, queryLength: length, headDim },
              causal: mask !== 'full',
              ...(slope && { alibi: Float32Array.of(Number(slope)) }),
            };
            const { dOutput, ...args } = instance({ kind, bound, seed: 1, ...setting });
            const saved = pass === 'backward' ? attention.forward({ ...args, method: 'exact' }) : undefined;
            for (const tolerance of numbers(given.tolerances)) {
              const call = { ...args, tolerance, ...(pass !== 'forward' && { dOutput }), ...(saved && { saved }) };
              cases.push({ headDim, mask, pass, length, kind, bound, tolerance, ...compare(call, pass) });
            }
          }
        }
        rows.push(...cases);
        const worst = cases.reduce((a, b) => (b.ratio > a.ratio ? b : a));
        const polynomial = cases.filter(({ method }) => method === 'polynomial');
        const best = polynomial.length > 0 ? Math.min(...polynomial.map(({ ratio }) => ratio)).toFixed(3) : '';
        const where = `${worst.kind}, ${worst.bound}, ${worst.tolerance}: ${worst.reason}`;
        const control = `${Math.max(...cases.map(({ control }) => control)).toFixed(3)} (${above(cases, 'control')})`;
        const cells = [headDim, mask, pass, length, worst.milliseconds.toPrecision(3), cases.length, polynomial.length, best];
        cells.push(above(cases, 'ratio'), control);
        console.log(`| ${cells.join(' | ')} | ${worst.ratio.toFixed(3)} | ${where} |`);
      }
    }
  }
}
const worst = rows.reduce((a, b) => (b.ratio > a.ratio ? b : a));
const counts = `${above(rows, 'ratio')} above 1.1, of exact over exact ${above(rows, 'control')}`;
console.log(`\n${rows.length} cases, ${counts}; the worst is ${worst.ratio.toFixed(3)}`);
mkdirSync(dirname(given.json), { recursive: true });
writeFileSync(given.json, `${JSON.stringify({ simd: attention.simd, rows }, null, 1)}\n`);
