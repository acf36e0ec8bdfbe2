// SPDX-License-Identifier: MIT
//
// Times forward and backward through the public API, exact and polynomial, both binaries, one thread, and prints a table;
// the same as JSON in build/bench.json. Run by `make bench`; arguments by ARGS="...":
//
//   --dims 16,32,64   --lengths 1024,2048,4096,8192,16384,65536   --masks full,causal   --binaries simd128,relaxed-simd
//   --beside 16:65536:window-1024,16:16384:alibi,16:65536:alibi (D:N:mask, rows beside these, causal: so many keys back, for which
//   exact is run whatever the length; or a slope of 0.01)
//   --degree 2   --bound 0.5   --tolerance 1e-2 (of auto)   --seconds 0.6 (of samples for each figure)   --exact-up-to 16384   --json build/bench.json
//
// What is counted: a call, copies in and out included, polynomial with its sampled check of eight rows. Useful operations:
// exact forward 4 D a pair of allowed tokens, backward 10 D; polynomial forward 4 rank (D + 1) a token, backward
// 10 rank (D + 1), without the exact diagonal blocks. `alone` is the engine without copies, planning and checks. `peak` is the multiply-add rate that the same binary reaches in registers
// or in its micro-kernel, measured before and after the row. Exact and polynomial calls take turns; times are medians, the
// spread is (third quartile - first) / median. Beyond --exact-up-to exact is not run: its time at that length is scaled by the
// square of the ratio of lengths, and marked ~.

import { mkdirSync, writeFileSync } from 'node:fs';
import { arch, cpus } from 'node:os';
import { dirname } from 'node:path';
import { parseArgs } from 'node:util';
import { theory } from '../../dist/index.js';
import { uniform } from './peers/problem.mjs';
import { enginesAlone } from './tools/engine.mjs';
import { fileOf, open, peakOf } from './tools/peak.mjs';

const { values: given } = parseArgs({
  options: {
    dims: { type: 'string', default: '16,32,64' },
    lengths: { type: 'string', default: '1024,2048,4096,8192,16384,65536' },
    masks: { type: 'string', default: 'full,causal' },
    beside: { type: 'string', default: '16:65536:window-1024,16:16384:alibi,16:65536:alibi' },
    binaries: { type: 'string', default: 'simd128,relaxed-simd' },
    degree: { type: 'string', default: '2' },
    bound: { type: 'string', default: '0.5' },
    tolerance: { type: 'string', default: '1e-2' },
    seconds: { type: 'string', default: '0.6' },
    'exact-up-to': { type: 'string', default: '16384' },
    json: { type: 'string', default: 'build/bench.json' },
  },
});
const numbers = (text) => text.split(',').map(Number);
const degree = Number(given.degree);
const exactUpTo = Number(given['exact-up-to']);

const quantile = (sorted, share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];

function summarise(times) {
  const sorted = [...times].sort((a, b) => a - b);
  const median = quantile(sorted, 0.5);
  return { median, spread: (quantile(sorted, 0.75) - quantile(sorted, 0.25)) / median, runs: sorted.length };
}

/** Runs the functions in turn until each has its share of seconds (at least 3 runs, 1 when one takes over 5 s). */
function race(runs) {
  const names = Object.keys(runs);
  const times = Object.fromEntries(names.map((name) => [name, []]));
  const first = {};
  for (const name of names) {
    for (let n = 0, start = performance.now(); n < 2 && performance.now() - start < 3000; n++) {
      const t = performance.now();
      runs[name]();
      first[name] = performance.now() - t; // the last warm-up
    }
  }
  const enough = (name) => {
    const spent = times[name].reduce((a, b) => a + b, 0);
    const least = first[name] > 5000 ? 1 : 3;
    return times[name].length >= least && (spent > 1000 * Number(given.seconds) || times[name].length >= 60);
  };
  while (!names.every(enough)) {
    for (const name of names) {
      if (enough(name)) continue;
      const t = performance.now();
      runs[name]();
      times[name].push(performance.now() - t);
    }
  }
  return Object.fromEntries(names.map((name) => [name, summarise(times[name])]));
}

function range(v, columns) {
  let widest = 0;
  for (let d = 0; d < columns; d++) {
    let low = Infinity;
    let high = -Infinity;
    for (let n = d; n < v.length; n += columns) {
      low = Math.min(low, v[n]);
      high = Math.max(high, v[n]);
    }
    widest = Math.max(widest, (high - low) / 2);
  }
  return widest;
}

const largestDifference = (a, b) => a.reduce((worst, x, n) => Math.max(worst, Math.abs(x - b[n])), 0);

function frobenius(a, b) {
  let difference = 0;
  let size = 0;
  for (let n = 0; n < a.length; n++) {
    difference += (a[n] - b[n]) ** 2;
    size += b[n] ** 2;
  }
  return Math.sqrt(difference / size);
}

/** One row of the table: a case, both passes, both engines. */
async function measure(simd, headDim, length, mask, scaleFrom) {
  const { attention, binary } = await open(simd);
  const bound = Number(given.bound);
  const size = length * headDim;
  const inputs = { q: uniform(size, 1, bound), k: uniform(size, 2, bound), v: uniform(size, 3, 1), dOutput: uniform(size, 4, 1) };
  const causal = mask !== 'full';
  const window = mask.startsWith('window-') ? [Number(mask.slice(7)), -1] : [-1, -1];
  const shape = { heads: 1, queryLength: length, headDim };
  const call = { ...inputs, shape, causal, window, ...(mask === 'alibi' && { alibi: Float32Array.of(0.01) }) };
  const { dOutput: _, ...forwardCall } = call;
  const engines = { polynomial: { method: 'polynomial', degree, onMiss: 'report' }, auto: { tolerance: Number(given.tolerance) } };
  if (length <= exactUpTo || window[0] >= 0) engines.exact = { method: 'exact' };

  const runs = {};
  const results = {};
  for (const [name, options] of Object.entries(engines)) {
    const forward = attention.forward({ ...forwardCall, ...options });
    results[name] = { forward };
    runs[`${name} forward`] = () => attention.forward({ ...forwardCall, ...options });
    runs[`${name} backward`] = () => (results[name].backward = attention.backward({ ...call, saved: forward, ...options }));
  }
  const { output, lse } = results.polynomial.forward;
  const alone = await enginesAlone(fileOf(simd), { ...call, output, lse }, degree);
  for (const pass of ['forward', 'backward']) runs[`alone ${pass}`] = alone[pass];
  const before = peakOf(binary);
  const times = race(runs);
  const peak = Math.max(before, peakOf(binary));

  const pairs = theory.pairs({ queryLength: length, causal, window });
  const rank = theory.rank(headDim, degree);
  const flops = {
    'exact forward': 4 * headDim * pairs,
    'exact backward': 10 * headDim * pairs,
    'polynomial forward': 4 * rank * (headDim + 1) * length,
    'polynomial backward': 10 * rank * (headDim + 1) * length,
  };
  for (const pass of ['forward', 'backward']) flops[`alone ${pass}`] = flops[`polynomial ${pass}`];
  const row = { simd, headDim, length, mask, degree, rank, peak, passes: {} };
  for (const pass of ['forward', 'backward']) {
    row.passes[pass] = {};
    for (const engine of ['exact', 'polynomial', 'alone', 'auto']) {
      const time = times[`${engine} ${pass}`];
      const work = flops[`${engine} ${pass}`];
      if (time && work) row.passes[pass][engine] = { ...time, gflops: work / time.median / 1e6, ofPeak: work / time.median / 1e6 / peak };
      else if (time) row.passes[pass][engine] = { ...time, degree: results[engine][pass].report.degree };
      else if (scaleFrom) row.passes[pass][engine] = { median: scaleFrom.passes[pass].exact.median * (length / scaleFrom.length) ** 2, scaled: true };
    }
    const { exact, polynomial } = row.passes[pass];
    if (exact) row.passes[pass].ratio = exact.median / polynomial.median;
  }
  const both = (engine) => row.passes.forward[engine].median + row.passes.backward[engine].median;
  row.ratio = row.passes.forward.exact ? both('exact') / both('polynomial') : null;
  row.autoRatio = row.passes.forward.exact ? both('exact') / both('auto') : null;
  const { polynomial, exact } = results;
  row.error = exact
    ? {
        output: largestDifference(polynomial.forward.output, exact.forward.output) / range(inputs.v, headDim),
        gradient: Math.max(...['dq', 'dk', 'dv'].map((name) => frobenius(polynomial.backward[name], exact.backward[name]))),
      }
    : { output: polynomial.forward.report.errorEstimate, gradient: polynomial.backward.report.errorEstimate, sampled: true };
  row.memoryBytes = attention.memoryBytes;
  row.memoryArrays = attention.memoryBytes / (4 * size);
  attention.dispose();
  return row;
}

const time = ({ median, scaled }) => `${scaled ? '~' : ''}${median >= 100 ? median.toFixed(0) : median.toPrecision(3)}`;
const percent = (x) => (x === undefined ? '' : `${(100 * x).toFixed(0)}%`);

function line(row) {
  const cells = [row.simd === 'simd128' ? 'simd128' : 'relaxed', row.headDim, row.mask, row.length];
  for (const pass of ['forward', 'backward']) {
    const { exact, polynomial, alone, ratio } = row.passes[pass];
    cells.push(exact ? time(exact) : '', percent(exact?.ofPeak), percent(exact?.spread));
    cells.push(time(polynomial), percent(polynomial.ofPeak), percent(alone.ofPeak), percent(polynomial.spread), ratio ? `${ratio.toPrecision(3)}x` : '');
  }
  cells.push(row.ratio ? `${row.ratio.toPrecision(3)}x` : '');
  for (const { auto } of [row.passes.forward, row.passes.backward]) cells.push(`${time(auto)} (${auto.degree ?? 'exact'})`);
  cells.push(row.autoRatio ? `${row.autoRatio.toPrecision(3)}x` : '');
  cells.push(`${row.error.output.toExponential(1)}${row.error.sampled ? '*' : ''}`, `${row.error.gradient.toExponential(1)}${row.error.sampled ? '*' : ''}`);
  cells.push((row.memoryBytes / 2 ** 20).toFixed(1), row.memoryArrays.toFixed(1));
  return `| ${cells.join(' | ')} |`;
}

const machine = `${cpus()[0].model.trim()}, ${arch()}, Node ${process.versions.node} (V8 ${process.versions.v8}), one thread`;
console.log(`${machine}; degree ${degree}, entries in [-${given.bound}, ${given.bound})`);
console.log('milliseconds (median), share of the multiply-add peak, spread; times exact/polynomial; ~ scaled, * on sampled rows; auto: (degree)\n');
const pass = ['exact ms', 'peak', '+-', `degree ${degree} ms`, 'peak', 'alone', '+-', 'ratio'];
const head = ['binary', 'D', 'mask', 'N', ...pass.map((x) => `fwd ${x}`), ...pass.map((x) => `bwd ${x}`), 'both ratio', 'auto fwd', 'auto bwd', 'auto ratio', 'out error', 'grad error', 'MiB', 'arrays N x D'];
console.log(`| ${head.join(' | ')} |\n|${head.map(() => ' --- |').join('')}`);

const rows = [];
for (const simd of given.binaries.split(',')) {
  if (!(await open(simd))) {
    console.log(`(${simd}: this engine does not accept the binary)`);
    continue;
  }
  let before = null;
  for (const beside of given.beside.split(',').filter(Boolean)) {
    const [headDim, length, mask] = beside.split(':');
    const row = await measure(simd, Number(headDim), Number(length), mask, before?.mask === mask ? before : null);
    if (!row.passes.forward.exact?.scaled) before = row;
    rows.push(row);
    console.log(line(row));
  }
  for (const headDim of numbers(given.dims)) {
    for (const mask of given.masks.split(',')) {
      let longestExact = null;
      for (const length of numbers(given.lengths)) {
        const row = await measure(simd, headDim, length, mask, longestExact);
        if (length <= exactUpTo) longestExact = row;
        rows.push(row);
        console.log(line(row));
      }
    }
  }
}
const peaks = [...new Set(rows.map((row) => row.simd))].map((simd) => {
  const all = rows.filter((row) => row.simd === simd).map((row) => row.peak);
  return `${simd} ${Math.min(...all).toFixed(1)} to ${Math.max(...all).toFixed(1)}`;
});
console.log(`\npeak of the rows, GFLOP/s: ${peaks.join('; ')}`);
mkdirSync(dirname(given.json), { recursive: true });
writeFileSync(given.json, `${JSON.stringify({ machine, degree, bound: Number(given.bound), rows }, null, 1)}\n`);
console.log(`written: ${given.json}`);
