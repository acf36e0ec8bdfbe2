// SPDX-License-Identifier: MIT
//
// Experiment 3: the gradient on synthetic data with controlled entries, the claim of arXiv 2412.17316v3 (almost
// linear time where entries are o(sqrt(log n)), and no truly subquadratic time above order sqrt(log n) unless SETH fails).
//
//   error      of dq, dk and dv against B, entries uniform in [-B, B], one curve a degree, beside B = sqrt(ln n)
//   time       of the backward pass given the forward one, exact and each degree, against n
//
// The exact engine is the yardstick at these lengths; at a small one it is compared with float64 itself.

import { reference, theory } from '../dist/index.js';
import { uniformInputs } from './inputs.mjs';
import { attempt, operations, polynomial, race } from './measure.mjs';
import { finite, powerLaw, relativeError, takesOver } from './statistics.mjs';
import * as words from './words.mjs';

export const title = 'Backward on entries of controlled size';
export const about =
  'The gradients by q, k and v for a random gradient of the output, d = 16, scale 1/√d, no mask. Each degree’s gradient is the ' +
  'exact derivative of its ' +
  'own forward pass; errors are relative, in the Frobenius norm, against the exact engine.';

export const sizes = {
  full: {
    ...{ headDim: 16, length: 2048, bounds: [0.25, 0.35, 0.5, 0.7, 1, 1.4, 2, 2.8, 4], degrees: [1, 2, 3, 4, 5, 6], check: 256 },
    ...{
      lengths: [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536],
      timed: [1, 2, 3, 4],
      exactUpTo: 16384,
      work: 7e10,
      seconds: 0.25,
    },
  },
  quick: {
    ...{ headDim: 16, length: 512, bounds: [0.25, 0.5, 1, 2, 4], degrees: [1, 2, 3, 4], check: 128 },
    ...{ lengths: [512, 1024, 2048, 4096], timed: [1, 2, 3], exactUpTo: 2048, work: 5e9, seconds: 0.05 },
  },
  tiny: {
    ...{ headDim: 4, length: 64, bounds: [0.5, 1, 2], degrees: [1, 2], check: 32 },
    ...{ lengths: [64, 128, 256], timed: [1, 2], exactUpTo: 128, work: 1e9, seconds: 0 },
  },
};

const QUANTITIES = ['dq', 'dk', 'dv'];

export function run({ attention, sizes: size, progress, seed }) {
  const { headDim, length } = size;
  const errors = [];
  const problem = (bound, rows) => ({
    ...uniformInputs({ length: rows, headDim, bound, seed }),
    shape: { heads: 1, queryLength: rows, headDim },
  });
  const both = (call, options) => {
    const { dOutput: _, ...forwardCall } = call;
    const saved = attention.forward({ ...forwardCall, ...options });
    return attention.backward({ ...call, ...options, saved });
  };
  size.bounds.forEach((entryBound, step) => {
    progress(`gradients at B = ${entryBound}`, (0.4 * step) / size.bounds.length);
    const call = problem(entryBound, length);
    const exact = both(call, { method: 'exact' });
    for (const degree of size.degrees) {
      const got = attempt(() => both(call, polynomial(degree)));
      for (const quantity of QUANTITIES) {
        const value = got ? relativeError(got[quantity], exact[quantity]) : Infinity;
        errors.push({ quantity, entryBound, degree, series: `degree ${degree}`, error: finite(value) });
      }
    }
  });

  const small = problem(1, size.check);
  const [engine, truth] = [both(small, { method: 'exact' }), reference.backward(small)];
  const rounding = Math.max(...QUANTITIES.map((quantity) => relativeError(engine[quantity], truth[quantity])));

  const times = [];
  size.lengths.forEach((rows, step) => {
    progress(`times at N = ${words.integer(rows)}`, 0.4 + (0.6 * step) / size.lengths.length);
    const call = problem(0.5, rows);
    const { dOutput: _, ...forwardCall } = call;
    const runs = {};
    const add = (name, options) => {
      const saved = attention.forward({ ...forwardCall, ...options });
      runs[name] = () => attention.backward({ ...call, ...options, saved });
    };
    if (rows <= size.exactUpTo) add('exact', { method: 'exact' });
    for (const degree of size.timed) {
      if (operations({ length: rows, headDim, degree, pass: 'backward' }) <= size.work) add(`degree ${degree}`, polynomial(degree));
    }
    const measured = race(runs, size.seconds);
    for (const [method, milliseconds] of Object.entries(measured))
      times.push({ length: rows, method, milliseconds, scaled: false });
    if (measured.exact === undefined) {
      const last = times.findLast((row) => row.method === 'exact' && !row.scaled);
      times.push({ length: rows, method: 'exact', milliseconds: last.milliseconds * (rows / last.length) ** 2, scaled: true });
    }
  });
  return [errorFigure(errors, size, rounding), timeFigure(times, size)];
}

/** Largest B at which all three gradients of a degree are within the limit. */
function reach(rows, degree, limit) {
  const bounds = [...new Set(rows.map((row) => row.entryBound))];
  const holds = (entryBound) =>
    rows.every((row) => row.degree !== degree || row.entryBound !== entryBound || (row.error !== null && row.error <= limit));
  const first = bounds.findIndex((entryBound) => !holds(entryBound));
  return first < 0 ? bounds.at(-1) : first === 0 ? null : bounds[first - 1];
}

function errorFigure(rows, { headDim, length, degrees, check }, rounding) {
  const limit = 0.01;
  const threshold = theory.paperBound(length);
  const parts = degrees.map((degree) => {
    const limitB = reach(rows, degree, limit);
    return limitB === null ? `degree ${degree} nowhere` : `degree ${degree} up to B = ${limitB}`;
  });
  const past = rows.filter((row) => row.entryBound >= threshold);
  const lost = past.filter((row) => row.error === null || row.error > limit).length;
  const end =
    past.length === 0
      ? ''
      : lost === past.length
        ? ` Past B = √(ln n) = ${words.number(threshold)} none of the ${past.length} gradients measured is.`
        : ` Past B = √(ln n) = ${words.number(threshold)}, ${past.length - lost} of ${past.length} gradients measured still are.`;
  return {
    id: 'backward-error',
    kind: 'lines',
    title: 'Gradient error against the size of entries',
    sentence: `All three gradients are within ${words.error(limit)} for ${words.list(parts)}.${end}`,
    note:
      `d = ${headDim}, n = ${words.integer(length)}. Triangles: beyond the axis, or no number at all. The exact engine is ` +
      `within ${words.error(rounding)} of float64 at n = ${check}, B = 1.`,
    x: { key: 'entryBound', label: 'B', log: 10, kind: 'number' },
    y: { key: 'error', label: 'relative error', log: 10, kind: 'error', top: 10 },
    panel: 'quantity',
    series: 'series',
    rules: [{ x: threshold, label: '√(ln n)' }],
    columns: [
      { key: 'quantity', label: 'of' },
      { key: 'degree', label: 'degree', kind: 'integer' },
      { key: 'entryBound', label: 'B', kind: 'number' },
      { key: 'error', label: 'error', kind: 'error' },
    ],
    rows,
  };
}

function timeFigure(rows, { headDim, timed }) {
  const curve = (method) =>
    rows.filter((row) => row.method === method).map((row) => ({ ...row, x: row.length, y: row.milliseconds }));
  const slope = (method) =>
    powerLaw(
      curve(method)
        .filter((row) => !row.scaled)
        .slice(-5),
    )?.slope.toFixed(2);
  const exact = curve('exact');
  const parts = timed.map((degree) => {
    const own = curve(`degree ${degree}`);
    const [from, last] = [takesOver(own, exact), own.at(-1)];
    const predicted = theory.crossover({ headDim, degree, pass: 'backward' });
    const gain = words.ratio(exact.find((row) => row.length === last.length).y / last.y);
    const where =
      from === null ? 'is not ahead of exact at any length tried' : `is ahead of exact from n = ${words.integer(from)} on`;
    return (
      `degree ${degree} (power ${slope(`degree ${degree}`)}) ${where}, by operations from n = ${words.integer(predicted)}, and ` +
      `${gain} as fast at n = ${words.integer(last.length)}`
    );
  });
  const scaled = rows.some((row) => row.scaled) ? ' Hollow: the exact time scaled by the square of the length.' : '';
  return {
    id: 'backward-time',
    kind: 'lines',
    title: 'Time of the backward pass',
    sentence: `Exact grows like n to the power ${slope('exact')}; ${words.list(parts)}.`,
    note:
      `d = ${headDim}, entries in [−0.5, 0.5]; the forward pass is given, not counted. ` +
      `Powers are of the five longest measured lengths.${scaled}`,
    x: { key: 'length', label: 'n', log: 2, kind: 'integer' },
    y: { key: 'milliseconds', label: 'time of a call', log: 10, kind: 'ms' },
    series: 'method',
    hollow: 'scaled',
    columns: [
      { key: 'method', label: 'method' },
      { key: 'length', label: 'n', kind: 'integer' },
      { key: 'milliseconds', label: 'time', kind: 'ms' },
      { key: 'scaled', label: 'scaled' },
    ],
    rows,
  };
}

/** The experiment in a sentence or two, from its figures. */
export function finding([{ rows: errors }, { rows: times }]) {
  const degrees = [...new Set(errors.map((row) => row.degree))];
  const limit = 0.01;
  const parts = [degrees[Math.min(1, degrees.length - 1)], degrees.at(-1)].map((degree) => {
    const bound = reach(errors, degree, limit);
    return bound === null ? `degree ${degree} nowhere` : `degree ${degree} up to B = ${bound}`;
  });
  const polynomials = times.filter((row) => row.method !== 'exact');
  const longest = Math.max(...polynomials.map((row) => row.length));
  const exact = times.find((row) => row.method === 'exact' && row.length === longest).milliseconds;
  const gains = polynomials
    .filter((row) => row.length === longest)
    .map((row) => `${words.ratio(exact / row.milliseconds)} for ${row.method}`);
  return (
    `Gradients are within ${words.percent(limit)} for ${words.list(parts)}; at n = ${words.integer(longest)} the backward pass ` +
    `gains ${words.list(gains)} over exact.`
  );
}
