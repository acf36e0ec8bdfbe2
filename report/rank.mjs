// SPDX-License-Identifier: MIT
//
// Experiment 2: what a rank buys. The polynomial method writes the softmax matrix s(x) as a product of thin matrices of rank
// C(d+g, g) (Alman, Song, arXiv 2302.13214, Lemma 3.4); the gradient needs beta = dout v^T and gamma = s o beta - diag(rowsum(s o
// beta)) s of low rank too (arXiv 2412.17316v3).
//
//   error       output, dq, dk, dv of each degree against float64, by rank; beside it what float32 alone costs
//   best rank   the polynomial's error of s, in the Frobenius norm, against the best there is at this rank (Eckart, Young 1936)
//   spectra     singular values of s, beta and gamma, by gradientParts. O(N^3)

import { gradientParts, reference, theory } from '../dist/index.js';
import { uniformInputs } from './inputs.mjs';
import { attempt, polynomial } from './measure.mjs';
import { finite, halfRange, outputError, relativeError } from './statistics.mjs';
import * as words from './words.mjs';

export const title = 'Degree and rank against error';
export const about =
  'A polynomial of degree g makes the n × n matrix s of softmax weights a product of thin matrices, C(d+g, g) wide. Entries of q and k are ' +
  'uniform in [−B, B], the scale is 1/√d. Errors are against float64.';

export const sizes = {
  full: {
    length: 512,
    headDim: 16,
    degrees: [0, 1, 2, 3, 4, 5, 6, 7],
    bounds: [0.5, 1, 1.5],
    matrix: 384,
    matrixDim: 8,
    spectra: [0.5, 1, 2, 4],
  },
  quick: { length: 256, headDim: 16, degrees: [0, 1, 2, 3, 4], bounds: [0.5, 1], matrix: 160, matrixDim: 8, spectra: [0.5, 2] },
  tiny: { length: 48, headDim: 4, degrees: [0, 1, 2], bounds: [0.5, 1], matrix: 24, matrixDim: 4, spectra: [0.5, 1] },
};

/** Singular values below this share of the largest are rounding of the decomposition in double precision. */
const FLOOR = 1e-15;

export function run({ attention, sizes: size, progress, seed }) {
  const errors = [];
  size.bounds.forEach((entryBound, step) => {
    progress(`errors at B = ${entryBound}`, (0.4 * step) / size.bounds.length);
    errors.push(...errorsAt({ attention, ...size, entryBound, seed }));
  });
  const best = [];
  const spectra = [];
  size.spectra.forEach((entryBound, step) => {
    progress(`singular values at B = ${entryBound}`, 0.4 + (0.6 * step) / size.spectra.length);
    const found = matricesAt({ attention, ...size, entryBound, seed });
    best.push(...found.best);
    spectra.push(...found.spectra);
  });
  return [errorFigure(errors, size), bestFigure(best, size), spectrumFigure(spectra, size)];
}

const QUANTITIES = ['output', 'dq', 'dk', 'dv'];

function errorsAt({ attention, length, headDim, degrees, entryBound, seed }) {
  const inputs = uniformInputs({ length, headDim, bound: entryBound, seed });
  const call = { ...inputs, shape: { heads: 1, queryLength: length, headDim } };
  const { dOutput: _, ...forwardCall } = call;
  const truth = { ...reference.forward(forwardCall), ...reference.backward(call) };
  const range = halfRange(inputs.v, headDim);
  const engines = [
    { degree: null, options: { method: 'exact' } },
    ...degrees.map((degree) => ({ degree, options: polynomial(degree) })),
  ];
  return engines.flatMap(({ degree, options }) => {
    const got = attempt(() => {
      const saved = attention.forward({ ...forwardCall, ...options });
      return { ...saved, ...attention.backward({ ...call, ...options, saved }) };
    });
    return QUANTITIES.map((quantity) => {
      const compare = quantity === 'output' ? (a, b) => outputError(a, b, range) : relativeError;
      const value = got ? compare(got[quantity], truth[quantity]) : Infinity;
      const rank = degree === null ? null : theory.rank(headDim, degree);
      return { quantity, entryBound, series: `B = ${entryBound}`, degree, rank, error: finite(value) };
    });
  });
}

/** s, beta and gamma in float64, for the residual dOutput. */
function matricesAt({ attention, matrix: length, matrixDim: headDim, entryBound, seed }) {
  const { q, k, v, dOutput } = uniformInputs({ length, headDim, bound: entryBound, seed });
  const shape = { heads: 1, queryLength: length, headDim };
  const e = reference.forward({ q, k, v, shape }).output.map((value, n) => value - dOutput[n]);
  const weights = identity(headDim);
  const parts = gradientParts({ a1: q, a2: k, a3: v, x1: weights, x2: weights, y: weights, e, shape });
  const { s, singularValues } = parts;
  const values = { s: singularValues.s, beta: singularValues.beta, gamma: singularValues.gamma };
  const spectra = Object.entries(values).flatMap(([name, sigma]) =>
    Array.from(sigma).flatMap((value, n) =>
      value >= FLOOR * sigma[0]
        ? [{ matrix: name, entryBound, series: `B = ${entryBound}`, index: n + 1, relative: value / sigma[0] }]
        : [],
    ),
  );

  const size = Math.hypot(...values.s);
  const base = { entryBound, panel: `B = ${entryBound}` };
  const tail = (rank) => Math.hypot(...values.s.slice(rank)) / size;
  const optimum = Array.from(values.s, (_, n) => ({
    ...base,
    series: 'best of this rank',
    degree: null,
    rank: n + 1,
    error: finite(tail(n + 1)),
  }));
  const best = optimum.filter((row) => row.error > FLOOR);
  // The engine's output for v = identity is its s.
  const call = { q, k, v: identity(length), shape: { ...shape, valueDim: length } };
  for (let degree = 0; theory.rank(headDim, degree) < length; degree++) {
    const got = attempt(() => attention.forward({ ...call, ...polynomial(degree) }));
    const error = got ? finite(relativeError(got.output, s)) : null;
    best.push({ ...base, series: 'polynomial', degree, rank: theory.rank(headDim, degree), error });
  }
  return { spectra, best };
}

function identity(size) {
  return Float32Array.from({ length: size * size }, (_, n) => Number(n % (size + 1) === 0));
}

function errorFigure(rows, { headDim, length }) {
  const bounds = [...new Set(rows.map((row) => row.entryBound))];
  const falls = bounds.map((entryBound) => {
    const of = (quantity, degree) =>
      rows.find((row) => row.entryBound === entryBound && row.quantity === quantity && row.degree === degree);
    const degrees = [...new Set(rows.map((row) => row.degree))].filter((degree) => degree >= 1 && degree !== null);
    const steps = (quantity) => {
      const usable = degrees.map((degree) => of(quantity, degree).error).filter((value) => value > 1e-6);
      return usable.length > 1 ? (usable[0] / usable.at(-1)) ** (1 / (usable.length - 1)) : null;
    };
    const gradients = ['dq', 'dk', 'dv'].map((name) => steps(name)).filter((factor) => factor !== null);
    const range =
      gradients.length > 0
        ? `${words.number(Math.min(...gradients), 2)} to ` + `${words.number(Math.max(...gradients), 2)}`
        : 'nothing measurable';
    const output = steps('output');
    return (
      `that of the output by ${output === null ? 'nothing measurable' : words.number(output, 2)} and those of the gradients by ` +
      `${range} at B = ${entryBound}`
    );
  });
  const target = 1e-3;
  const needed = (quantity, entryBound) => {
    const good = rows.filter(
      (row) =>
        row.quantity === quantity &&
        row.entryBound === entryBound &&
        row.degree !== null &&
        row.error <= target &&
        row.error !== null,
    );
    return good.length > 0 ? Math.min(...good.map((row) => row.degree)) : null;
  };
  const widest = bounds.at(-1);
  const name = (degree) =>
    degree === null ? 'no degree tried' : `degree ${degree} (rank ${words.integer(theory.rank(headDim, degree))})`;
  const each = QUANTITIES.map(
    (quantity) => `${name(needed(quantity, widest))} for ${quantity === 'output' ? 'the output' : quantity}`,
  );
  const floor = Math.max(...rows.filter((row) => row.degree === null).map((row) => row.error));
  return {
    id: 'rank-error',
    kind: 'lines',
    title: 'Output and gradients against rank',
    sentence:
      `One degree more divides errors, on average: ${falls.join('; ')}. An error of ${words.error(target)} at B = ${widest} ` +
      `takes ${words.list(each)}.`,
    note:
      `d = ${headDim}, n = ${words.integer(length)}; each dot is a degree, from ` +
      `${Math.min(...rows.filter((row) => row.degree !== null).map((row) => row.degree))} on. The exact engine, in float32, is off ` +
      `by ${words.error(floor)} at most.`,
    x: { key: 'rank', label: 'rank', log: 10, kind: 'integer' },
    y: { key: 'error', label: 'error', log: 10, kind: 'error' },
    panel: 'quantity',
    series: 'series',
    columns: [
      { key: 'quantity', label: 'of' },
      { key: 'entryBound', label: 'B', kind: 'number' },
      { key: 'degree', label: 'degree (– is exact)', kind: 'integer' },
      { key: 'rank', label: 'rank', kind: 'integer' },
      { key: 'error', label: 'error', kind: 'error' },
    ],
    rows,
  };
}

function bestFigure(rows, { matrix, matrixDim }) {
  const points = rows.filter((row) => row.series === 'polynomial' && row.degree >= 1);
  const parts = points.flatMap((point) => {
    const best = rows.find((row) => row.series !== 'polynomial' && row.entryBound === point.entryBound && row.rank === point.rank);
    return best && best.error > 1e-7 && point.error !== null ? [{ ...point, factor: point.error / best.error }] : [];
  });
  const extreme = parts.reduce((a, b) => (b.factor > a.factor ? b : a), parts[0]);
  const least = parts.reduce((a, b) => (b.factor < a.factor ? b : a), parts[0]);
  const say = ({ entryBound, degree, rank, error, factor }) =>
    `${words.number(factor, 2)} times that (at B = ${entryBound}, degree ${degree}, rank ${words.integer(rank)}: ${words.error(error)})`;
  return {
    id: 'rank-best',
    kind: 'lines',
    title: 'The softmax matrix: the polynomial and the best of its rank',
    sentence: extreme
      ? `The best matrix of a polynomial’s rank has the least error of s; the polynomial has between ${say(least)} and ` +
        `${say(extreme)}, the price of features that do not look at the data.`
      : `At these ${rows.length} points the best matrix of the polynomial’s rank is exact to rounding.`,
    note:
      `Relative errors in the Frobenius norm, d = ${matrixDim}, n = ${matrix}. No matrix of rank r is nearer to s than its ` +
      `first r singular triples.`,
    x: { key: 'rank', label: 'rank', log: 10, kind: 'integer' },
    y: { key: 'error', label: 'error of s', log: 10, kind: 'error', floor: 1e-9 },
    panel: 'panel',
    series: 'series',
    styles: { 'best of this rank': { colour: 'ink', dots: false }, polynomial: { colour: 'degree-2' } },
    columns: [
      { key: 'panel', label: 'entries' },
      { key: 'series', label: 'curve' },
      { key: 'degree', label: 'degree', kind: 'integer' },
      { key: 'rank', label: 'rank', kind: 'integer' },
      { key: 'error', label: 'error', kind: 'error' },
    ],
    rows,
  };
}

function spectrumFigure(rows, { matrix, matrixDim }) {
  const bounds = [...new Set(rows.map((row) => row.entryBound))];
  const above = (name, entryBound) =>
    rows.filter((row) => row.matrix === name && row.entryBound === entryBound && row.relative > 1e-3).length;
  const counts = (name) => words.list(bounds.map((entryBound) => `${above(name, entryBound)} at B = ${entryBound}`));
  const falls = ['s', 'gamma'].map((name) => {
    const own = rows.filter((row) => row.matrix === name && row.entryBound === bounds[0]);
    const steps = own
      .slice(1, Math.ceil(0.9 * own.length))
      .map((row, n) => ({ after: n + 1, factor: own[n].relative / row.relative }));
    const steepest = steps
      .filter(({ after }) => after > 1)
      .sort((x, y) => y.factor - x.factor)
      .slice(0, 2)
      .sort((x, y) => x.after - y.after);
    return `${name} at ${words.list(steepest.map(({ after, factor }) => `index ${after} (by ${words.number(factor, 2)})`))}`;
  });
  return {
    id: 'rank-spectra',
    kind: 'lines',
    title: 'Singular values of s, beta and gamma',
    sentence:
      `Of ${matrix} singular values those above a thousandth of the largest are, for s, ${counts('s')}; for beta, whose ` +
      `rank is at most d = ${matrixDim}, ${counts('beta')}; for gamma, ${counts('gamma')}. At B = ${bounds[0]} the steepest falls ` +
      `from one to the next are, past the first, for ${falls.join(', for ')}.`,
    note:
      `n = ${matrix}, d = ${matrixDim}. Vertical lines: the ranks C(d+g, g) of degrees g. A matrix s of rank r makes a gamma of ` +
      `rank r (d + 1) at most. Beta does not depend on B.`,
    x: { key: 'index', label: 'index', log: 10, kind: 'integer' },
    y: { key: 'relative', label: 'singular value / largest', log: 10, kind: 'error', floor: 1e-10 },
    panel: 'matrix',
    series: 'series',
    thin: true,
    rules: [1, 2, 3].map((degree) => ({ x: theory.rank(matrixDim, degree), label: `g = ${degree}` })).filter(({ x }) => x < matrix),
    columns: [
      { key: 'matrix', label: 'matrix' },
      { key: 'entryBound', label: 'B', kind: 'number' },
      { key: 'index', label: 'index', kind: 'integer' },
      { key: 'relative', label: 'singular value / largest', kind: 'error' },
    ],
    rows,
  };
}

/** The experiment in a sentence or two, from its figures. */
export function finding([{ rows: errors }, , { rows: spectra }]) {
  const at = (quantity) => errors.filter((row) => row.quantity === quantity && row.entryBound === 1 && row.degree !== null);
  const parts = QUANTITIES.map((quantity) => {
    const last = at(quantity).findLast((row) => row.degree <= 4);
    return { quantity, ...last };
  });
  const bounds = [...new Set(spectra.map((row) => row.entryBound))];
  const count = (entryBound) =>
    spectra.filter((row) => row.matrix === 's' && row.entryBound === entryBound && row.relative > 1e-3).length;
  const counts = bounds.map((entryBound) => `${count(entryBound)} at B = ${entryBound}`);
  return (
    `At B = 1 degree ${parts[0].degree} (rank ${words.integer(parts[0].rank)}) leaves ` +
    `${words.list(parts.map(({ quantity, error }) => `${words.error(error)} in ${quantity === 'output' ? 'the output' : quantity}`))}. ` +
    `Of the softmax matrix these many singular values are above a thousandth of the largest: ${words.list(counts)}.`
  );
}
