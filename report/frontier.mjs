// SPDX-License-Identifier: MIT
//
// Experiment 6: the frontier. Over lengths and entry bounds, which degree a tolerance takes and what it gains over exact: the
// dichotomy of Alman, Song (arXiv 2302.13214; with rotation 2505.11892, gradients 2412.17316v3) with constants.
//
//   predicted   degreeFor (proved for the worst entries in [-B, B]) and the ratio of `cost`; `frontier` is where it becomes 1
//   measured    the least degree within the tolerance on uniform entries, and times of both engines at that length
//
// Errors beyond a length are measured on some exact rows; times do not depend on entries and are measured once a length.

import { theory } from '../dist/index.js';
import { uniformInputs } from './inputs.mjs';
import { attempt, operations, operationsGain, polynomial, race, rowsOnly, spreadRows, takeRows } from './measure.mjs';
import { halfRange, outputError } from './statistics.mjs';
import * as words from './words.mjs';

export const title = 'The frontier';
export const about =
  'For each length n and entry bound B the cheapest degree that keeps the tolerance, and how much faster than exact it is. The ' +
  'papers draw one curve ' +
  'through this plane, B = √log n: of smaller order almost linear time is possible, of larger order it is not.';

export const sizes = {
  full: {
    ...{
      headDim: 16,
      lengths: [256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536],
      bounds: [0.25, 0.35, 0.5, 0.71, 1, 1.41, 2, 2.83, 4, 5.66],
      tolerance: 1e-3,
    },
    ...{ maxDegree: 5, rows: 256, allRowsUpTo: 4096, exactUpTo: 16384, seconds: 0.15 },
  },
  quick: {
    ...{ headDim: 16, lengths: [512, 2048, 8192], bounds: [0.5, 1, 2, 4], tolerance: 1e-3 },
    ...{ maxDegree: 4, rows: 64, allRowsUpTo: 1024, exactUpTo: 8192, seconds: 0.03 },
  },
  tiny: {
    ...{ headDim: 4, lengths: [64, 256], bounds: [0.5, 1, 2], tolerance: 1e-2 },
    ...{ maxDegree: 2, rows: 16, allRowsUpTo: 64, exactUpTo: 256, seconds: 0 },
  },
};

const PREDICTED = 'predicted, proved';
const MEASURED = 'measured, uniform entries';

export function run({ attention, sizes: size, progress, seed }) {
  const { headDim, lengths, bounds, tolerance } = size;
  const scale = 1 / headDim;
  const cells = [];
  let lastExact = null;
  lengths.forEach((length, step) => {
    progress(`N = ${words.integer(length)}`, step / lengths.length);
    for (const entryBound of bounds) {
      const scoreBound = theory.scoreBound({ headDim, entryBound, scale });
      const degree = theory.degreeFor({ tolerance, scoreBound });
      const gain = degree === null ? null : operationsGain({ length, headDim, degree });
      cells.push({ panel: PREDICTED, length, entryBound, degree, gain, scaled: false });
    }

    const needed = neededDegrees({ attention, length, ...size, scale, seed });
    const degrees = [...new Set(needed.map(({ degree }) => degree))].filter((degree) => degree !== null);
    const args = callAt({ length, headDim, bound: bounds[0], scale, seed });
    const runs = Object.fromEntries(degrees.map((degree) => [degree, () => attention.forward({ ...args, ...polynomial(degree) })]));
    if (length <= size.exactUpTo) runs.exact = () => attention.forward({ ...args, method: 'exact' });
    const times = race(runs, size.seconds);
    if (times.exact !== undefined) lastExact = { length, milliseconds: times.exact };
    const exact = lastExact.milliseconds * (length / lastExact.length) ** 2;
    for (const { entryBound, degree } of needed) {
      const gain = degree === null ? null : exact / times[degree];
      cells.push({ panel: MEASURED, length, entryBound, degree, gain, scaled: length > size.exactUpTo });
    }
  });
  return [frontierFigure(cells, size), gainFigure(cells, size)];
}

const callAt = ({ length, headDim, bound, scale, seed }) => {
  const { q, k, v } = uniformInputs({ length, headDim, bound, seed });
  return { q, k, v, shape: { heads: 1, queryLength: length, headDim }, scale };
};

/** For each bound, ascending, the least degree that keeps the tolerance; a degree that fails is not tried for larger entries. */
function neededDegrees({ attention, length, headDim, bounds, tolerance, scale, maxDegree, rows: count, allRowsUpTo, seed }) {
  // A degree dearer than twice exact is nothing to wait for
  const limit = 2 * operations({ length, headDim });
  let degree = 0;
  return bounds.map((entryBound) => {
    const args = callAt({ length, headDim, bound: entryBound, scale, seed });
    const rows = spreadRows(length, length <= allRowsUpTo ? length : count);
    const exact = attention.forward({ ...rowsOnly(args, rows), method: 'exact' }).output;
    const range = halfRange(args.v, headDim);
    for (; degree <= maxDegree && operations({ length, headDim, degree }) <= limit; degree++) {
      const got = attempt(() => attention.forward({ ...args, ...polynomial(degree) }));
      if (got && outputError(takeRows(got.output, rows, headDim), exact, range) <= tolerance) return { entryBound, degree };
    }
    degree = maxDegree + 1;
    return { entryBound, degree: null };
  });
}

function frontierFigure(rows, size) {
  const { headDim, lengths, bounds, tolerance, allRowsUpTo, rows: count } = size;
  const of = (panel) => rows.filter((row) => row.panel === panel);
  const won = (panel) => of(panel).filter((row) => row.gain !== null && row.gain > 1);
  const below = (panel) => of(panel).filter((row) => row.entryBound < theory.paperBound(row.length));
  const winsBelow = (panel) => below(panel).filter((row) => row.gain !== null && row.gain > 1).length;
  const above = of(MEASURED).filter((row) => row.entryBound >= theory.paperBound(row.length));
  const winsAbove = above.filter((row) => row.gain !== null && row.gain > 1).length;
  const best = won(MEASURED).reduce((a, b) => (a === null || b.gain > a.gain ? b : a), null);
  const top = best
    ? ` The largest gain is ${words.ratio(best.gain)}, at n = ${words.integer(best.length)}, B = ${best.entryBound} (degree ${best.degree}).`
    : ' Exact wins everywhere.';
  const curve = lengths.map((length) => ({ x: length, y: theory.paperBound(length) }));
  const predicted = lengths.map((length) => ({
    x: length,
    y: theory.frontier({ tolerance, headDim, length, scale: 1 / headDim }).entryBound,
  }));
  return {
    id: 'frontier-plane',
    kind: 'cells',
    title: 'Which degree, and what it gains',
    sentence:
      `Below B = √(ln n) a polynomial that keeps ${tolerance} beats exact in ${winsBelow(PREDICTED)} of ${below(PREDICTED).length} ` +
      `cells by proof and operations and in ` +
      `${winsBelow(MEASURED)} of ${below(MEASURED).length} as measured; from the curve on in ${winsAbove} of ${above.length}.${top}`,
    note:
      `d = ${headDim}, scale 1/d, forward; measured up to degree ${size.maxDegree}. A cell has the least degree and the exact time ` +
      `over its time; “exact” where no degree keeps the tolerance, in grey where one does but is slower. ` +
      `The tolerance is in units of max |v − c|. Solid: B = √(ln n). Dashed: \`theory.frontier\`, ` +
      `up to which a proved polynomial needs fewer operations. ` +
      `Errors beyond n = ${words.integer(allRowsUpTo)} are of ${words.integer(count)} rows; exact times beyond n = ` +
      `${words.integer(size.exactUpTo)} are scaled.`,
    x: { key: 'length', label: 'n', kind: 'integer', values: lengths },
    y: { key: 'entryBound', label: 'B', kind: 'number', values: bounds },
    panel: 'panel',
    overlays: [
      { name: 'B = √(ln n)', points: curve },
      { name: 'theory.frontier', points: predicted.filter(({ y }) => y > 0), dash: true },
    ],
    columns: [
      { key: 'panel', label: 'which' },
      { key: 'length', label: 'n', kind: 'integer' },
      { key: 'entryBound', label: 'B', kind: 'number' },
      { key: 'degree', label: 'degree', kind: 'integer' },
      { key: 'gain', label: 'gain', kind: 'ratio' },
      { key: 'scaled', label: 'exact scaled' },
    ],
    rows,
  };
}

function gainFigure(cells, { headDim }) {
  const measured = cells.filter((row) => row.panel === MEASURED && row.degree !== null && row.degree > 0);
  const seen = new Set();
  const rows = measured.flatMap(({ length, degree, gain, scaled }) => {
    if (seen.has(`${length} ${degree}`)) return [];
    seen.add(`${length} ${degree}`);
    const predicted = operationsGain({ length, headDim, degree });
    return [{ length, degree, series: `degree ${degree}`, gain, predicted, relative: gain / predicted, scaled }];
  });
  rows.sort((a, b) => a.degree - b.degree || a.length - b.length);
  const parts = [...new Set(rows.map((row) => row.degree))].map((degree) => {
    const own = rows.filter((row) => row.degree === degree).map((row) => row.relative);
    return `${words.number(Math.min(...own), 2)} to ${words.number(Math.max(...own), 2)} for degree ${degree}`;
  });
  return {
    id: 'frontier-gain',
    kind: 'lines',
    title: 'Measured gain over predicted gain',
    sentence:
      `The gain measured is ${words.list(parts)} of the gain by counting operations; above 1 the polynomial engine has the ` +
      `higher rate, below 1 what is not counted (features, checks, set-up) shows.`,
    note: `Predicted is the ratio of \`theory.cost\`, which counts products only. d = ${headDim}, forward; hollow: the exact time is scaled.`,
    x: { key: 'length', label: 'n', log: 2, kind: 'integer' },
    y: { key: 'relative', label: 'measured / predicted', log: 10, kind: 'number' },
    series: 'series',
    hollow: 'scaled',
    rules: [{ y: 1, label: 'as predicted' }],
    columns: [
      { key: 'degree', label: 'degree', kind: 'integer' },
      { key: 'length', label: 'n', kind: 'integer' },
      { key: 'gain', label: 'measured', kind: 'ratio' },
      { key: 'predicted', label: 'predicted', kind: 'ratio' },
      { key: 'relative', label: 'measured / predicted', kind: 'number' },
      { key: 'scaled', label: 'exact scaled' },
    ],
    rows,
  };
}

/** The experiment in a sentence or two, from its figures. */
export function finding([{ rows }]) {
  const measured = rows.filter((row) => row.panel === MEASURED);
  const count = (some) => `${some.filter((row) => row.gain !== null && row.gain > 1).length} of ${some.length}`;
  const below = measured.filter((row) => row.entryBound < theory.paperBound(row.length));
  const above = measured.filter((row) => row.entryBound >= theory.paperBound(row.length));
  const best = measured.reduce((a, b) => ((b.gain ?? 0) > (a.gain ?? 0) ? b : a));
  return (
    `A polynomial within the tolerance beats exact in ${count(below)} cells below B = √(ln n) and in ${count(above)} from it ` +
    `on; the best gain is ${words.ratio(best.gain)}, at n = ${words.integer(best.length)} and B = ${best.entryBound}.`
  );
}
