// SPDX-License-Identifier: MIT
//
// From which length on `auto` takes a polynomial, and how time grows with length. Run by `make crossover`; ARGS="...":
//
//   --dims 16,32,64   --bounds 0.25,0.5,1   --tolerances 1e-1,1e-2,1e-3,1e-4   --masks full,causal   --passes forward,both
//   --from 256 --to 16384 (lengths, by factors of sqrt 2)   --runs 5
//   --slopes 4096,8192,...,262144 (lengths; "" for none)   --slope-dims 16   --degree 2   --json build/crossover.json
//
// Crossover: the shortest length at which auto takes a polynomial and is faster than exact by 1.05, exact and auto in turns, the fastest
// of each; both passes are a forward and a backward call with its result. Slope: of log time against log length by least squares, for calls
// of `method: 'polynomial'` of the degree, copies and checks included, entries in [-0.5, 0.5).

import { mkdirSync, writeFileSync } from 'node:fs';
import { dirname } from 'node:path';
import { parseArgs } from 'node:util';
import { createRopeAttention } from '../../dist/index.js';
import { instance } from './instances.mjs';

const { values: given } = parseArgs({
  options: {
    dims: { type: 'string', default: '16,32,64' },
    bounds: { type: 'string', default: '0.25,0.5,1' },
    tolerances: { type: 'string', default: '1e-1,1e-2,1e-3,1e-4' },
    masks: { type: 'string', default: 'full,causal' },
    passes: { type: 'string', default: 'forward,both' },
    from: { type: 'string', default: '256' },
    to: { type: 'string', default: '16384' },
    runs: { type: 'string', default: '5' },
    slopes: { type: 'string', default: '4096,8192,16384,32768,65536,131072,262144' },
    'slope-dims': { type: 'string', default: '16' },
    degree: { type: 'string', default: '2' },
    json: { type: 'string', default: 'build/crossover.json' },
  },
});
const list = (text) => (text === '' ? [] : text.split(','));
const numbers = (text) => list(text).map(Number);
const attention = await createRopeAttention();

/** The call, or both calls, with some options: its milliseconds and the report of the last one. */
function timed({ dOutput, ...args }, pass, options) {
  const start = performance.now();
  const saved = attention.forward({ ...args, ...options });
  const { report } = pass === 'forward' ? saved : attention.backward({ ...args, dOutput, saved, ...options });
  return { milliseconds: performance.now() - start, report };
}

function faster(headDim, length, mask, pass, bound, tolerance) {
  const shape = { heads: 1, queryLength: length, headDim };
  const args = instance({ kind: 'uniform', bound, seed: 1, shape, causal: mask === 'causal' });
  const auto = { tolerance };
  const { report } = timed(args, pass, auto);
  if (report.method !== 'polynomial') return null;
  // The fastest of each, in turns: what else the machine does only ever adds.
  let [exactly, automatically] = [Infinity, Infinity];
  for (let n = 0; n < Number(given.runs); n++) {
    exactly = Math.min(exactly, timed(args, pass, { method: 'exact' }).milliseconds);
    automatically = Math.min(automatically, timed(args, pass, auto).milliseconds);
  }
  return { degree: report.degree, ratio: exactly / automatically };
}

/** The first of the lengths that is enough, by halving: what is enough stays so for longer ones. */
function crossover(...setting) {
  const [headDim, mask, pass, bound, tolerance] = setting;
  const steps = Math.round(2 * Math.log2(Number(given.to) / Number(given.from)));
  const lengths = Array.from({ length: steps + 1 }, (_, n) => Math.round((Number(given.from) * 2 ** (n / 2)) / 32) * 32);
  const at = (n) => faster(headDim, lengths[n], mask, pass, bound, tolerance);
  let [low, high] = [0, lengths.length];
  let best = null;
  while (low < high) {
    const middle = (low + high) >> 1;
    const found = at(middle);
    if (found && found.ratio >= 1.05) [high, best] = [middle, { length: lengths[middle], ...found }];
    else low = middle + 1;
  }
  return best;
}

const rows = [];
console.log(`${attention.simd}; the shortest length at which auto takes a polynomial (its degree); > none up to ${given.to}\n`);
const tolerances = numbers(given.tolerances);
const head = ['D', 'entries', 'mask', 'pass', ...tolerances.map((tolerance) => tolerance.toExponential(0))];
if (given.dims) console.log(`| ${head.join(' | ')} |\n|${head.map(() => ' --- |').join('')}`);
for (const headDim of numbers(given.dims)) {
  for (const bound of numbers(given.bounds)) {
    for (const mask of list(given.masks)) {
      for (const pass of list(given.passes)) {
        const cells = tolerances.map((tolerance) => {
          const found = crossover(headDim, mask, pass, bound, tolerance);
          rows.push({ headDim, bound, mask, pass, tolerance, found });
          return found ? `${found.length} (${found.degree})` : '>';
        });
        console.log(`| ${[headDim, bound, mask, pass === 'both' ? 'forward + backward' : pass, ...cells].join(' | ')} |`);
      }
    }
  }
}

const slopes = [];
const lengths = numbers(given.slopes);
if (lengths.length > 1) {
  console.log(`\nmilliseconds of degree ${given.degree}, slope of log time against log length\n`);
  const columns = ['D', 'mask', 'pass', ...lengths, 'slope'];
  console.log(`| ${columns.join(' | ')} |\n|${columns.map(() => ' --- |').join('')}`);
  for (const headDim of numbers(given['slope-dims'])) {
    for (const mask of list(given.masks)) {
      const times = { forward: [], backward: [] };
      for (const length of lengths) {
        const shape = { heads: 1, queryLength: length, headDim };
        const { dOutput, ...args } = instance({ kind: 'uniform', bound: 0.5, seed: 1, shape, causal: mask === 'causal' });
        const forced = { method: 'polynomial', degree: Number(given.degree), onMiss: 'report' };
        const saved = attention.forward({ ...args, ...forced });
        const calls = { forward: () => attention.forward({ ...args, ...forced }), backward: () => attention.backward({ ...args, dOutput, saved, ...forced }) };
        for (const [pass, call] of Object.entries(calls)) {
          const best = Array.from({ length: Number(given.runs) }, () => {
            const start = performance.now();
            call();
            return performance.now() - start;
          });
          times[pass].push(Math.min(...best));
        }
      }
      const x = lengths.map(Math.log2);
      const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
      for (const [pass, own] of Object.entries(times)) {
        const y = own.map(Math.log2);
        const [mx, my] = [mean(x), mean(y)];
        const slope = mean(x.map((value, n) => (value - mx) * (y[n] - my))) / mean(x.map((value) => (value - mx) ** 2));
        slopes.push({ headDim, mask, pass, lengths, times: own, slope });
        console.log(`| ${[headDim, mask, pass, ...own.map((t) => t.toPrecision(3)), slope.toFixed(3)].join(' | ')} |`);
      }
    }
  }
}
mkdirSync(dirname(given.json), { recursive: true });
writeFileSync(given.json, `${JSON.stringify({ simd: attention.simd, rows, slopes }, null, 1)}\n`);
