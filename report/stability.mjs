// SPDX-License-Identifier: MIT
//
// Experiment 5: where it might break. Float32 sums over very long sequences, large head sizes, entries at the threshold
// sqrt(log n) of Alman, Song (arXiv 2302.13214, 2505.11892) and past it, where no almost linear algorithm exists unless SETH fails.
//
//   length      to 2^18: output and dq on some rows against float64, the exact engine's own rounding beside it
//   head size   rank C(d+2, 2) grows like d^2 / 2: the gain over exact, predicted and measured
//   threshold   what `auto` does as B grows, by proof and by sample: method, degree, error, and its own sentence about it

import { reference, theory } from '../dist/index.js';
import { uniformInputs } from './inputs.mjs';
import { attempt, operationsGain, polynomial, race, rowsOnly, spreadRows, takeRows } from './measure.mjs';
import { finite, halfRange, outputError, relativeError } from './statistics.mjs';
import * as words from './words.mjs';

export const title = 'Stability and limits';
export const about =
  'Very long sequences, large heads, and entries at the threshold and past it. A call that cannot keep its promise has to say so; ' +
  'what `auto` said is quoted.';

export const sizes = {
  full: {
    ...{ lengths: [4096, 16384, 65536, 131072, 262144], degrees: [2, 3], rows: 8, headDim: 16 },
    ...{ dims: [8, 16, 32, 64, 128, 256], dimLength: 2048, seconds: 0.2 },
    ...{ thresholdLength: 16384, bounds: [0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4.5, 6, 8, 16, 64], tolerance: 1e-2 },
  },
  quick: {
    ...{ lengths: [1024, 4096, 16384], degrees: [2, 3], rows: 4, headDim: 16 },
    ...{ dims: [8, 16, 32, 64], dimLength: 1024, seconds: 0.03 },
    ...{ thresholdLength: 4096, bounds: [0.25, 0.5, 1, 2, 3, 4, 8], tolerance: 1e-2 },
  },
  tiny: {
    ...{ lengths: [64, 128], degrees: [1, 2], rows: 2, headDim: 4 },
    ...{ dims: [4, 8], dimLength: 64, seconds: 0 },
    ...{ thresholdLength: 512, bounds: [0.25, 1, 4], tolerance: 1e-2 },
  },
};

export function run({ attention, sizes: size, progress, seed }) {
  const long = [];
  size.lengths.forEach((length, step) => {
    progress(`N = ${words.integer(length)}`, (0.5 * step) / size.lengths.length);
    long.push(...longSequence({ attention, length, ...size, seed }));
  });
  const heads = [];
  size.dims.forEach((headDim, step) => {
    progress(`head size ${headDim}`, 0.5 + (0.2 * step) / size.dims.length);
    heads.push(...headSize({ attention, headDim, length: size.dimLength, seconds: size.seconds, seed }));
  });
  const choices = [];
  size.bounds.forEach((entryBound, step) => {
    progress(`threshold, B = ${entryBound}`, 0.7 + (0.25 * step) / size.bounds.length);
    choices.push(...choiceAt({ attention, entryBound, ...size, seed }));
  });
  const gradients = [0, 0.4, 0.8].flatMap((share) => {
    const entryBound = size.bounds[Math.floor(share * (size.bounds.length - 1))];
    progress(`gradients, B = ${entryBound}`, 0.95 + share / 20);
    return gradientsAt({ attention, entryBound, ...size, seed });
  });
  return [longFigure(long, size), headFigure(heads, size), choiceFigure(choices, gradients, size)];
}

function longSequence({ attention, length, degrees, rows: count, headDim, seed }) {
  const inputs = uniformInputs({ length, headDim, bound: 0.5, seed });
  const call = { ...inputs, shape: { heads: 1, queryLength: length, headDim } };
  const { dOutput: _, ...forwardCall } = call;
  const rows = spreadRows(length, count);
  const few = rowsOnly(call, rows);
  const { dOutput: __, ...fewForward } = few;
  const truth = { output: reference.forward(fewForward).output, dq: reference.backward(few).dq };
  const range = halfRange(inputs.v, headDim);
  const compare = (series, output, dq, milliseconds) => [
    { quantity: 'output', length, series, error: finite(outputError(output, truth.output, range)), milliseconds },
    { quantity: 'dq', length, series, error: finite(relativeError(dq, truth.dq)), milliseconds: null },
  ];
  const exact = attention.forward({ ...fewForward, method: 'exact' });
  const found = compare('exact, rounding', exact.output, attention.backward({ ...few, saved: exact, method: 'exact' }).dq, null);
  for (const degree of degrees) {
    const got = attention.forward({ ...forwardCall, ...polynomial(degree) });
    const { dq } = attention.backward({ ...call, saved: got, ...polynomial(degree) });
    found.push(
      ...compare(`degree ${degree}`, takeRows(got.output, rows, headDim), takeRows(dq, rows, headDim), got.report.milliseconds),
    );
  }
  return found;
}

function headSize({ attention, headDim, length, seconds, seed }) {
  const { q, k, v } = uniformInputs({ length, headDim, bound: 0.5, seed });
  const args = { q, k, v, shape: { heads: 1, queryLength: length, headDim } };
  const times = race(
    {
      exact: () => attention.forward({ ...args, method: 'exact' }),
      polynomial: () => attention.forward({ ...args, ...polynomial(2) }),
    },
    seconds,
  );
  const exact = attention.forward({ ...args, method: 'exact' });
  const got = attention.forward({ ...args, ...polynomial(2) });
  const auto = attention.plan({ ...args, tolerance: 1e-2 });
  const base = {
    headDim,
    rank: theory.rank(headDim, 2),
    crossover: theory.crossover({ headDim, degree: 2, pass: 'forward' }),
    error: finite(outputError(got.output, exact.output, halfRange(v, headDim))),
    auto: auto.degree === null ? 'exact' : `degree ${auto.degree}`,
  };
  return [
    { ...base, series: 'measured', gain: times.exact / times.polynomial },
    { ...base, series: 'by operations', gain: operationsGain({ length, headDim, degree: 2 }) },
  ];
}

function choiceAt({ attention, entryBound, thresholdLength: length, headDim, tolerance, seed }) {
  const { q, k, v } = uniformInputs({ length, headDim, bound: entryBound, seed });
  const args = { q, k, v, shape: { heads: 1, queryLength: length, headDim }, scale: 1 / headDim, tolerance };
  const exact = attention.forward({ ...args, method: 'exact' });
  const range = halfRange(v, headDim);
  // A degree that is forced, to see what the promise would be worth
  const forced = attempt(() => attention.forward({ ...args, ...polynomial(4) }));
  const forcedError = finite(forced ? outputError(forced.output, exact.output, range) : Infinity);
  return ['certified', 'sampled'].flatMap((guarantee) => {
    const { output, report } = attention.forward({ ...args, guarantee });
    const base = {
      guarantee,
      panel: guarantee,
      entryBound,
      method: report.method,
      degree: report.degree,
      scoreBound: finite(report.scoreBound),
      relative: null,
      reason: report.reason,
    };
    const measured = report.method === 'exact' ? null : finite(outputError(output, exact.output, range));
    const relative = report.method === 'exact' ? null : finite(relativeError(output, exact.output));
    const claims =
      guarantee === 'certified'
        ? { series: 'proved', error: report.errorBound }
        : { series: 'sampled', error: report.errorEstimate ?? report.errorBound };
    return [
      { ...base, ...claims },
      { ...base, series: 'measured', error: measured, relative },
      ...(guarantee === 'sampled'
        ? [{ ...base, method: 'polynomial', degree: 4, reason: null, series: 'degree 4, forced', error: forcedError }]
        : []),
    ];
  });
}

/** What `auto` says about gradients. */
function gradientsAt({ attention, entryBound, thresholdLength: length, headDim, tolerance, seed }) {
  const inputs = uniformInputs({ length, headDim, bound: entryBound, seed });
  const args = { ...inputs, shape: { heads: 1, queryLength: length, headDim }, scale: 1 / headDim, tolerance };
  return ['certified', 'sampled'].map((guarantee) => {
    const { report } = attention.backward({ ...args, guarantee });
    return { label: `gradients ${guarantee}, B = ${entryBound}`, text: report.reason };
  });
}

function longFigure(rows, { degrees, headDim, rows: count }) {
  const longest = Math.max(...rows.map((row) => row.length));
  const shortest = Math.min(...rows.map((row) => row.length));
  const at = (series, length, quantity) =>
    rows.find((row) => row.series === series && row.length === length && row.quantity === quantity);
  const growth = ['output', 'dq'].map((quantity) => {
    const parts = [...degrees.map((degree) => `degree ${degree}`), 'exact, rounding'].map((series) => {
      const [start, end] = [at(series, shortest, quantity), at(series, longest, quantity)];
      return `${words.error(start.error)} to ${words.error(end.error)} for ${series === 'exact, rounding' ? 'the exact engine' : series}`;
    });
    return `the error of ${quantity === 'output' ? 'the output' : 'dq'} goes from ${words.list(parts)}`;
  });
  const speed = degrees.map((degree) => {
    const { milliseconds, length } = at(`degree ${degree}`, longest, 'output');
    return `${words.duration(milliseconds)} for degree ${degree} (${words.number((1000 * length) / milliseconds)} tokens a second)`;
  });
  return {
    id: 'stability-length',
    kind: 'lines',
    title: 'Very long sequences',
    sentence:
      `From n = ${words.integer(shortest)} to ${words.integer(longest)} ${growth.join('; ')}. The forward pass takes ` +
      `${words.list(speed)} at the end.`,
    note: `d = ${headDim}, entries in [−0.5, 0.5], scale 1/√d; ${count} rows against float64.`,
    x: { key: 'length', label: 'n', log: 2, kind: 'integer' },
    y: { key: 'error', label: 'error', log: 10, kind: 'error' },
    panel: 'quantity',
    series: 'series',
    styles: { 'exact, rounding': { colour: 'exact', dash: true } },
    columns: [
      { key: 'quantity', label: 'of' },
      { key: 'series', label: 'method' },
      { key: 'length', label: 'n', kind: 'integer' },
      { key: 'error', label: 'error', kind: 'error' },
      { key: 'milliseconds', label: 'forward', kind: 'ms' },
    ],
    rows,
  };
}

function headFigure(rows, { dimLength }) {
  const measured = rows.filter((row) => row.series === 'measured');
  const wins = measured.filter((row) => row.gain > 1);
  const loses = measured.filter((row) => row.gain <= 1);
  const list = (some) => words.list(some.map((row) => `${words.ratio(row.gain)} at d = ${row.headDim}`));
  const first = wins.length > 0 ? `degree 2 gains ${list(wins)}` : 'degree 2 gains nothing';
  const second =
    loses.length > 0 ? `exact is the faster one elsewhere (degree 2 has ${list(loses)})` : 'exact is faster at no head size tried';
  const last = measured.at(-1);
  return {
    id: 'stability-heads',
    kind: 'lines',
    title: 'Large heads',
    sentence:
      `At n = ${words.integer(dimLength)} ${first}, and ${second}; at d = ${last.headDim} degree 2 has ` +
      `${words.integer(last.rank)} features, and by operations it wins from n = ${words.integer(last.crossover)} on.`,
    note: 'Forward, entries in [−0.5, 0.5], scale 1/√d. The table has the error and what `auto` plans at tolerance 0.01.',
    x: { key: 'headDim', label: 'head size d', log: 2, kind: 'integer' },
    y: { key: 'gain', label: 'exact time / polynomial time', log: 10, kind: 'ratio' },
    series: 'series',
    styles: { measured: { colour: 'degree-2' }, 'by operations': { colour: 'ink', dash: true, dots: false } },
    rules: [{ y: 1, label: 'as fast as exact' }],
    columns: [
      { key: 'headDim', label: 'd', kind: 'integer' },
      { key: 'rank', label: 'rank', kind: 'integer' },
      { key: 'series', label: 'which' },
      { key: 'gain', label: 'gain', kind: 'ratio' },
      { key: 'crossover', label: 'wins from n', kind: 'integer' },
      { key: 'error', label: 'error', kind: 'error' },
      { key: 'auto', label: 'auto' },
    ],
    rows,
  };
}

function choiceFigure(rows, gradients, { thresholdLength, headDim, tolerance }) {
  const threshold = theory.paperBound(thresholdLength);
  const chosen = (guarantee) =>
    rows.filter((row) => row.guarantee === guarantee && row.series !== 'measured' && !row.series.endsWith('forced'));
  const limit = (guarantee) => {
    const good = chosen(guarantee).filter((row) => row.method === 'polynomial');
    if (good.length === 0) return 'nowhere';
    const last = good.at(-1);
    return `up to B = ${last.entryBound} (degree ${last.degree})`;
  };
  const past = chosen('sampled').filter((row) => row.entryBound > threshold);
  const exact = past.filter((row) => row.method === 'exact').length;
  const ran = rows.filter((row) => row.series === 'measured' && row.error !== null);
  const kept = ran.filter((row) => row.error <= tolerance).length;
  const relative = ran.map((row) => row.relative).filter((value) => value !== null);
  const own =
    relative.length > 0
      ? ` Relative to the output itself, in the Frobenius norm, they are off by ${words.error(Math.min(...relative))} to ` +
        `${words.error(Math.max(...relative))}: where values average out, a tolerance in units of max |v − c| asks little.`
      : '';
  const forced = rows.filter((row) => row.series.endsWith('forced'));
  const lost = forced.find((row) => row.error === null || row.error > tolerance);
  const fall = lost ? ` Forced, degree 4 misses from B = ${lost.entryBound} on (error ${words.error(lost.error)}).` : '';
  return {
    id: 'stability-threshold',
    kind: 'lines',
    title: 'At the threshold and past it',
    sentence:
      `Asked for ${tolerance}, \`auto\` runs a polynomial ${limit('certified')} when the error has to be proved and ` +
      `${limit('sampled')} when it is sampled; ` +
      `of ${past.length} bounds past √(ln n) = ${words.number(threshold)} it is exact at ${exact}. Of the ${ran.length} polynomial ` +
      `results ${kept} kept the tolerance when all rows were measured.${own}${fall}`,
    note:
      `d = ${headDim}, n = ${words.integer(thresholdLength)}, scale 1/d as in the papers. Curves end where \`auto\` computes ` +
      `exactly. Triangles: beyond the axis, or no number at all.`,
    x: { key: 'entryBound', label: 'B', log: 10, kind: 'number' },
    y: { key: 'error', label: 'output error', log: 10, kind: 'error', top: 10 },
    panel: 'panel',
    series: 'series',
    styles: {
      proved: { colour: 'ink', dash: true },
      sampled: { colour: 'ink', dash: true },
      measured: { colour: 'degree-5' },
      'degree 4, forced': { colour: 'degree-4' },
    },
    lost: 'degree 4, forced',
    rules: [
      { x: threshold, label: '√(ln n)' },
      { y: tolerance, label: 'tolerance' },
    ],
    columns: [
      { key: 'guarantee', label: 'guarantee' },
      { key: 'entryBound', label: 'B', kind: 'number' },
      { key: 'method', label: 'method' },
      { key: 'degree', label: 'degree', kind: 'integer' },
      { key: 'scoreBound', label: 'bound of |score|', kind: 'number' },
      { key: 'series', label: 'error which' },
      { key: 'error', label: 'error', kind: 'error' },
      { key: 'relative', label: 'relative (Frobenius)', kind: 'error' },
      { key: 'reason', label: 'reason' },
    ],
    rows,
    quotes: [...chosen('certified'), ...chosen('sampled')]
      .map((row) => ({ label: `output ${row.guarantee}, B = ${row.entryBound}`, text: row.reason }))
      .concat(gradients),
  };
}

/** The experiment in a sentence or two, from its figures. */
export function finding([{ rows: long }, { rows: heads }, { rows: choices }]) {
  const longest = Math.max(...long.map((row) => row.length));
  const ends = long.filter((row) => row.length === longest && row.series.startsWith('degree'));
  const end = ends.filter((row) => row.series === ends[0].series);
  const loses = heads.filter((row) => row.series === 'measured' && row.gain <= 1);
  const limit = (guarantee) =>
    choices.findLast((row) => row.guarantee === guarantee && row.method === 'polynomial' && !row.series.endsWith('forced'));
  const limits = ['certified', 'sampled'].map((guarantee) => {
    const last = limit(guarantee);
    return last ? `B = ${last.entryBound} ${guarantee}` : `no B ${guarantee}`;
  });
  const losing = loses.length > 0 ? `head size ${words.list(loses.map((row) => row.headDim))}` : 'no head size';
  return (
    `At n = ${words.integer(longest)} ${end[0].series} is off by ` +
    `${words.list(end.map((row) => `${words.error(row.error)} in ${row.quantity === 'output' ? 'the output' : row.quantity}`))}. ` +
    `Exact beats degree 2 at ${losing} at the length tried. ` +
    `\`auto\` runs polynomials up to ${words.list(limits)}, and computes exactly beyond.`
  );
}
