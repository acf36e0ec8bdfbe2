// SPDX-License-Identifier: MIT
//
// Experiment 1: the forward pass in the papers' regime, entries below o(sqrt(log n)) and head size d = O(log n), where
// Alman, Song (arXiv 2505.11892; without rotation 2302.13214) compute attention with error 1/poly(n) in time n^(1+o(1)).
//
//   d = log2 n to the next even number, B = (ln n)^(1/4), scale 1/d: |scores| <= B^2 = sqrt(ln n), larger with n.
//   time       exact and each degree against n, slopes by least squares on the logarithms; a second time with d = 16 fixed
//   error      of each degree against the exact engine, beside 1/n
//   degree     that an error of 1/n takes: measured, proved, and by the growth law of Aggarwal, Alman (arXiv 2205.06249)

import { theory } from '../dist/index.js';
import { uniformInputs } from './inputs.mjs';
import { attempt, operations, polynomial, race } from './measure.mjs';
import { finite, halfRange, outputError, powerLaw, takesOver } from './statistics.mjs';
import * as words from './words.mjs';

export const title = 'Forward with bounded entries';
export const about =
  'Entries of q and k are uniform in [−B, B] with B = ⁴√(ln n), which is o(√log n), the head size d is log₂ n (to the next even ' +
  'number) and the scale ' +
  '1/d, as in the papers. One head, no mask. Times are medians of calls in turn, copies and checks included.';

export const sizes = {
  full: {
    lengths: [256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536],
    ...{ degrees: [1, 2, 3, 4, 5, 6], timed: 4, exactUpTo: 16384, work: 3e10, seconds: 0.25 },
  },
  quick: { lengths: [256, 1024, 4096], degrees: [1, 2, 3, 4], timed: 3, exactUpTo: 4096, work: 2e9, seconds: 0.05 },
  tiny: { lengths: [64, 128, 256], degrees: [1, 2], timed: 2, exactUpTo: 128, work: 1e9, seconds: 0 },
};

/** The papers' regime at length n. */
export function regime(length) {
  return { headDim: Math.max(4, 2 * Math.round(Math.log2(length) / 2)), entryBound: Math.log(length) ** 0.25 };
}

const GROWING = 'd = log₂ n';
const FIXED = 'd = 16';

export function run({ attention, sizes: { lengths, degrees, timed, exactUpTo, work, seconds }, progress, seed }) {
  const times = [];
  const errors = [];
  const needs = [];
  let check = null;
  lengths.forEach((length, step) => {
    progress(`N = ${words.integer(length)}`, step / lengths.length);
    const { headDim: growing, entryBound } = regime(length);
    for (const [setting, headDim] of [
      [GROWING, growing],
      [FIXED, 16],
    ]) {
      const { q, k, v } = uniformInputs({ length, headDim, bound: entryBound, seed });
      const args = { q, k, v, shape: { heads: 1, queryLength: length, headDim }, scale: 1 / headDim };
      const affordable = degrees.filter((degree) => operations({ length, headDim, degree }) <= work);

      const runs = {};
      if (length <= exactUpTo) runs.exact = () => attention.forward({ ...args, method: 'exact' });
      for (const degree of affordable.filter((one) => one <= timed)) {
        runs[degree] = () => attention.forward({ ...args, ...polynomial(degree) });
      }
      const measured = race(runs, seconds);
      const base = { setting, length, headDim, entryBound };
      if (measured.exact === undefined) {
        const last = times.findLast((row) => row.setting === setting && row.method === 'exact' && !row.scaled);
        const milliseconds = last.milliseconds * (length / last.length) ** 2;
        times.push({ ...base, method: 'exact', degree: null, milliseconds, scaled: true });
      }
      for (const [name, milliseconds] of Object.entries(measured)) {
        const degree = name === 'exact' ? null : Number(name);
        times.push({ ...base, method: degree === null ? 'exact' : `degree ${degree}`, degree, milliseconds, scaled: false });
      }
      if (setting === FIXED) continue;

      const start = performance.now();
      const exact = attention.forward({ ...args, method: 'exact' });
      if (length > exactUpTo) {
        const predicted = times.findLast((row) => row.setting === setting && row.method === 'exact').milliseconds;
        check = { length, predicted, once: performance.now() - start };
      }
      const range = halfRange(v, headDim);
      const radius = exact.report.scoreBound;
      for (const degree of affordable) {
        const got = attempt(() => attention.forward({ ...args, ...polynomial(degree) }));
        const worst = got ? outputError(got.output, exact.output, range) : Infinity;
        errors.push({ length, headDim, entryBound, degree, series: `degree ${degree}`, error: finite(worst), target: 1 / length });
      }
      const enough = errors.filter((row) => row.length === length && row.error !== null && row.error <= row.target);
      const proved = theory.degreeFor({ tolerance: 1 / length, scoreBound: radius });
      const law = theory.optimalDegree({ scoreBound: Math.max(1, entryBound ** 2), error: 1 / length });
      const measuredDegree = enough.length > 0 ? Math.min(...enough.map((row) => row.degree)) : null;
      needs.push({ length, series: 'measured', degree: measuredDegree, tried: Math.max(...affordable), scoreBound: radius });
      needs.push({ length, series: 'proved for these norms', degree: proved, tried: null, scoreBound: radius });
      needs.push({ length, series: 'growth law, without its constant', degree: law, tried: null, scoreBound: entryBound ** 2 });
    }
  });
  for (const { length } of needs.filter((row) => row.series === 'measured')) {
    errors.push({ length, ...regime(length), degree: null, series: '1/n', error: 1 / length, target: 1 / length });
  }
  return [timeFigure(times, check), errorFigure(errors), degreeFigure(needs)];
}

const methodsOf = (rows) => [...new Set(rows.map((row) => row.method))];
const curveOf = (rows, setting, method) =>
  rows
    .filter((row) => row.setting === setting && row.method === method)
    .map((row) => ({ ...row, x: row.length, y: row.milliseconds }));

/** Slope of the upper part of a measured curve, its last five points; short calls are set-up. */
function slopeOf(rows, setting, method) {
  const measured = curveOf(rows, setting, method).filter((row) => !row.scaled);
  return powerLaw(measured.slice(-5))?.slope ?? null;
}

function timeFigure(rows, check) {
  const slopes = [GROWING, FIXED].map((setting) => {
    const parts = methodsOf(rows).map((method) => ({ method, slope: slopeOf(rows, setting, method) }));
    const said = parts.filter(({ slope }) => slope !== null).map(({ method, slope }) => `${slope.toFixed(2)} for ${method}`);
    return `With ${setting} time grows like n to the power ${words.list(said)}.`;
  });
  const longest = Math.max(...rows.map((row) => row.length));
  const exact = curveOf(rows, GROWING, 'exact');
  const gains = methodsOf(rows)
    .filter((method) => method !== 'exact')
    .map((method) => {
      const curve = curveOf(rows, GROWING, method);
      const [from, last] = [takesOver(curve, exact), curve.at(-1)];
      const rival = exact.find((row) => row.length === last.length);
      const at = last.length === longest ? '' : ` at n = ${words.integer(last.length)}`;
      if (from === null) return `${method} is still slower than exact (${words.ratio(rival.y / last.y)} as fast${at})`;
      return (
        `${method} is ahead of exact from n = ${words.integer(from)} on (${words.ratio(rival.y / last.y)} as ` +
        `fast${at || ` at n = ${words.integer(longest)}`})`
      );
    });
  const scaled = rows.some((row) => row.scaled) ? ' Hollow: the exact time scaled by the square of the length.' : '';
  const once = check
    ? ` One exact call at n = ${words.integer(check.length)} took ${words.duration(check.once)}; scaling says ` +
      `${words.duration(check.predicted)}.`
    : '';
  return {
    id: 'forward-time',
    kind: 'lines',
    title: 'Time against length',
    sentence: `${slopes.join(' ')} In the papers’ regime ${words.list(gains)}.`,
    note: `Slopes are of the five longest lengths measured.${scaled}${once}`,
    x: { key: 'length', label: 'n', log: 2, kind: 'integer' },
    y: { key: 'milliseconds', label: 'time of a call', log: 10, kind: 'ms' },
    panel: 'setting',
    series: 'method',
    hollow: 'scaled',
    columns: [
      { key: 'setting', label: 'setting' },
      { key: 'method', label: 'method' },
      { key: 'length', label: 'n', kind: 'integer' },
      { key: 'headDim', label: 'd', kind: 'integer' },
      { key: 'entryBound', label: 'B', kind: 'number' },
      { key: 'milliseconds', label: 'time', kind: 'ms' },
      { key: 'scaled', label: 'scaled' },
    ],
    rows,
  };
}

function errorFigure(rows) {
  const degrees = [...new Set(rows.map((row) => row.degree))].filter((degree) => degree !== null);
  const parts = degrees.map((degree) => {
    const own = rows.filter((row) => row.degree === degree);
    const within = own.filter((row) => row.error !== null && row.error <= row.target);
    const last = own.at(-1);
    if (within.length === 0)
      return (
        `degree ${degree} is above 1/n at every n tried (${words.error(last.error)} at n = ` + `${words.integer(last.length)})`
      );
    if (within.length === own.length)
      return `degree ${degree} is below 1/n up to n = ${words.integer(last.length)}, the longest tried`;
    const prefix = within.every((row, n) => row === own[n]);
    if (prefix) return `degree ${degree} is below 1/n up to n = ${words.integer(within.at(-1).length)}, above it beyond`;
    return `degree ${degree} is below 1/n at ${within.length} of ${own.length} lengths`;
  });
  return {
    id: 'forward-error',
    kind: 'lines',
    title: 'Error against length, and 1/n',
    sentence: `Measured against an error of 1/n: ${words.list(parts)}.`,
    note: 'Largest error of the output over half the range of v. Points that would take too many operations are left out.',
    x: { key: 'length', label: 'n', log: 2, kind: 'integer' },
    y: { key: 'error', label: 'output error', log: 10, kind: 'error' },
    series: 'series',
    styles: { '1/n': { colour: 'ink', dash: true, dots: false } },
    columns: [
      { key: 'series', label: 'curve' },
      { key: 'length', label: 'n', kind: 'integer' },
      { key: 'headDim', label: 'd', kind: 'integer' },
      { key: 'entryBound', label: 'B', kind: 'number' },
      { key: 'error', label: 'error', kind: 'error' },
      { key: 'target', label: '1/n', kind: 'error' },
    ],
    rows,
  };
}

function degreeFigure(rows) {
  const of = (series) => rows.filter((row) => row.series === series);
  const [first, ...others] = ['measured', 'proved for these norms', 'growth law, without its constant'];
  const ends = (series) => {
    const [start, end] = [of(series)[0], of(series).at(-1)];
    const degree = (row) =>
      row.degree === null ? (row.tried ? `more than ${row.tried}` : 'more than 8') : words.number(row.degree, 2);
    return {
      text: `${degree(start)} at n = ${words.integer(start.length)} and ${degree(end)} at n = ${words.integer(end.length)}`,
    };
  };
  const [proved, law] = others.map((series) => ends(series).text);
  return {
    id: 'forward-degree',
    kind: 'lines',
    title: 'The degree that an error of 1/n takes',
    sentence: `An error of 1/n takes degree ${ends(first).text} as measured; a proof from the norms needs ${proved}; the growth law gives ${law}.`,
    note:
      'No degree above 8 exists in float32, and fewer where the operations would be too many: there the curve of measured degrees ends. ' +
      'The proof knows no more than the largest norms of q and k; random entries are far from that worst case.',
    x: { key: 'length', label: 'n', log: 2, kind: 'integer' },
    y: { key: 'degree', label: 'degree', kind: 'number', zero: true },
    series: 'series',
    styles: {
      measured: { colour: 'degree-5' },
      'proved for these norms': { colour: 'degree-2' },
      'growth law, without its constant': { colour: 'ink', dash: true, dots: false },
    },
    columns: [
      { key: 'series', label: 'curve' },
      { key: 'length', label: 'n', kind: 'integer' },
      { key: 'degree', label: 'degree', kind: 'number' },
      { key: 'tried', label: 'highest tried', kind: 'integer' },
      { key: 'scoreBound', label: 'bound of |score|', kind: 'number' },
    ],
    rows,
  };
}

/** The experiment in a sentence or two, from its figures. */
export function finding([{ rows: times }, , { rows: needs }]) {
  const degree = Math.min(2, ...needs.map((row) => row.tried ?? Infinity));
  const method = `degree ${degree}`;
  const last = curveOf(times, GROWING, method).at(-1);
  const exact = curveOf(times, GROWING, 'exact').find((row) => row.length === last.length);
  const needed = needs.filter((row) => row.series === 'measured' && row.degree !== null);
  const target =
    needed.length > 0
      ? ` An error of 1/n takes degree ${needed[0].degree} at n = ${words.integer(needed[0].length)} ` +
        `and ${needed.at(-1).degree} at n = ${words.integer(needed.at(-1).length)}.`
      : ' No degree tried has an error of 1/n.';
  return (
    `With entries up to ⁴√(ln n) and d = log₂ n, time grows like n to the power ${words.number(slopeOf(times, GROWING, method), 3)} ` +
    `for degree ${degree} and ` +
    `${words.number(slopeOf(times, GROWING, 'exact'), 3)} for exact; at n = ${words.integer(last.length)} they are ` +
    `${words.ratio(exact.y / last.y)} apart.${target}`
  );
}
