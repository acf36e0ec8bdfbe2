// SPDX-License-Identifier: MIT
//
// Experiment 7: what the factorisation of rotations saves. Alman, Song (arXiv 2505.11892) write RoPE's scores as q_i W_{i-j} k_j^T, expand
// a polynomial of them into terms diag(u) T diag(w), T Toeplitz, and multiply by fast Fourier transforms, forward and (arXiv
// 2412.17316v3) backward. But (R_i q).(R_j k) needs no W. Between the papers' route and the factorised one lie two steps:
//
//   W_t            W_{i-j} = R_i^T R_j, 2 d places:  C(2d+g, g) terms, a Toeplitz matrix each
//   complex pairs  z = q conj(k) of pairs of dimensions:  about C(d+g, g) / 2 complex terms, a Toeplitz matrix each
//   one matrix     rotated q and k:  C(d+g, g) terms with one Toeplitz matrix for all
//   states         no matrix at all: sums over keys, C(d+g, g) features
//
// All are the same polynomial of the same scores. exact is the yardstick of errors, and a curve of its own.

import { theory } from '../dist/index.js';
import { uniformInputs } from './inputs.mjs';
import { race } from './measure.mjs';
import { finite, halfRange, outputError, powerLaw, relativeError, takesOver } from './statistics.mjs';
import * as words from './words.mjs';

export const title = 'The papers’ route and the factorised route';
export const about =
  'The same attention with plain RoPE, the same inputs, the same polynomial of degree 2, by four routes: the papers’ literal one (`W_t`: any ' +
  'matrices W of i − j on 2d places, multiplied by Fourier transforms), the same with complex pairs instead of W, rotated rows with one ' +
  'Toeplitz matrix, and rotated rows with states (`method: polynomial`). One head, no mask, entries in [−0.5, 0.5], scale 1/√d; ' +
  'times are of a forward and a backward call.';

export const sizes = {
  full: { dims: [8, 16], lengths: [1024, 2048, 4096, 8192, 16384], degree: 2, work: 2e10, seconds: 0.05 },
  quick: { dims: [8], lengths: [512, 1024, 2048], degree: 2, work: 1e10, seconds: 0.02 },
  tiny: { dims: [4, 6], lengths: [96, 192], degree: 2, work: 1e9, seconds: 0 },
};

const [LITERAL, PAIRS, ONE, STATES, EXACT] = ['W_t', 'complex pairs', 'one matrix', 'states', 'exact'];
const STEPS = [LITERAL, PAIRS, ONE, STATES];
const PASSES = ['forward', 'backward'];
const GRADIENTS = ['dq', 'dk', 'dv'];

/** Options of each route for one length and head size. */
function routesOf({ length, headDim, degree }) {
  const transformed = { method: 'toeplitz', degree, onMiss: 'report' };
  return {
    [LITERAL]: { ...transformed, rotary: false, relative: rotations({ length, headDim }) },
    [PAIRS]: { ...transformed, relativePositions: Float32Array.from({ length: 2 * length - 1 }, (_, n) => n - (length - 1)) },
    [ONE]: transformed,
    [STATES]: { ...transformed, method: 'polynomial' },
    [EXACT]: { method: 'exact' },
  };
}

/** W_{i-j} = R_i^T R_j, rotations as the papers' matrices: four places for each pair of dimensions. */
function rotations({ length, headDim }) {
  const [half, diagonals] = [headDim / 2, 2 * length - 1];
  const support = new Uint32Array(4 * headDim);
  const weights = new Float32Array(2 * headDim * diagonals);
  for (let p = 0; p < half; p++) {
    support.set([p, p, p + half, p + half, p, p + half, p + half, p], 8 * p);
    const rows = [0, 1, 2, 3].map((n) => weights.subarray((4 * p + n) * diagonals, (4 * p + n + 1) * diagonals));
    const frequency = 10000 ** (-p / half);
    for (let n = 0; n < diagonals; n++) {
      const angle = (n - (length - 1)) * frequency;
      rows[0][n] = rows[1][n] = Math.cos(angle);
      rows[2][n] = Math.sin(angle);
      rows[3][n] = -rows[2][n];
    }
  }
  return { support, weights };
}

/** Fourier transforms of a route in a pass; those without any have none. */
function transformsOf(route, { length, headDim, degree }, pass) {
  if (route === STATES || route === EXACT) return 0;
  const map = { [LITERAL]: { places: 2 * headDim }, [PAIRS]: { rotaryDim: headDim }, [ONE]: {} }[route];
  return theory.transforms({ queryLength: length, headDim, degree, pass, ...map }).count;
}

export function run({ attention, sizes: { dims, lengths, degree, work, seconds }, progress, seed }) {
  const rows = [];
  dims.forEach((headDim, outer) => {
    lengths.forEach((length, inner) => {
      progress(`d = ${headDim}, N = ${words.integer(length)}`, (outer + inner / lengths.length) / dims.length);
      rows.push(...measure({ attention, headDim, length, degree, work, seconds, seed }));
    });
  });
  return [timeFigure(rows), stepsFigure(rows), errorFigure(rows)];
}

/** Operations of the transforms alone, both passes: to leave out what would take too long. */
function workOf(route, size) {
  const { length } = theory.transforms({ queryLength: size.length, ...size, pass: 'forward' });
  return PASSES.reduce((sum, pass) => sum + transformsOf(route, size, pass) * 5 * length * Math.log2(length), 0);
}

function measure({ attention, headDim, length, degree, work, seconds, seed }) {
  const size = { length, headDim, degree };
  const { dOutput, ...inputs } = uniformInputs({ length, headDim, bound: 0.5, seed });
  const shape = { heads: 1, queryLength: length, headDim };
  const calls = {};
  for (const [route, options] of Object.entries(routesOf(size))) {
    if (workOf(route, size) <= work) calls[route] = { ...inputs, shape, ...options };
  }
  const [saved, gradients] = [{}, {}];
  const each = (run) => Object.fromEntries(Object.entries(calls).map(([route, call]) => [route, () => run(route, call)]));
  const times = [
    race(each((route, call) => (saved[route] = attention.forward(call))), seconds),
    race(each((route, call) => (gradients[route] = attention.backward({ ...call, dOutput, saved: saved[route] }))), seconds),
  ];
  const range = halfRange(inputs.v, headDim);
  return Object.keys(calls).map((route) => {
    const reports = [saved, gradients].map((results) => results[route].report);
    const [forward, backward] = times.map((time) => time[route]);
    const [{ rank: terms }] = reports;
    const errors = GRADIENTS.map((name) => relativeError(gradients[route][name], gradients[EXACT][name]));
    return {
      ...{ headDim, panel: `d = ${headDim}`, length, route },
      terms,
      matrices: { [LITERAL]: terms, [PAIRS]: terms, [ONE]: 1 }[route] ?? null,
      transforms: route === EXACT ? null : PASSES.reduce((sum, pass) => sum + transformsOf(route, size, pass), 0),
      billions: reports.reduce((sum, { flops }) => sum + flops, 0) / 1e9,
      ...{ forward, backward, milliseconds: forward + backward },
      output: route === EXACT ? null : finite(outputError(saved[route].output, saved[EXACT].output, range)),
      gradient: route === EXACT ? null : finite(Math.max(...errors)),
    };
  });
}

const distinct = (values) => [...new Set(values)];
const curveOf = (rows, headDim, route) =>
  rows
    .filter((row) => row.headDim === headDim && row.route === route)
    .map((row) => ({ ...row, x: row.length, y: row.milliseconds }));

/** The longest length at which every route was measured, for each head size: a row for each route, in order. */
function together(rows) {
  return distinct(rows.map((row) => row.headDim)).map((headDim) => {
    const lengths = distinct(rows.map((row) => row.length)).filter((length) =>
      STEPS.every((route) => curveOf(rows, headDim, route).some((row) => row.length === length)),
    );
    const length = Math.max(...lengths);
    return [...STEPS, EXACT].map((route) => curveOf(rows, headDim, route).find((row) => row.length === length));
  });
}

/** "5.3x as long", of the times of two rows. */
const longer = (row, than) => `${words.ratio(row.milliseconds / than.milliseconds)} as long`;

function timeFigure(rows) {
  const dims = distinct(rows.map((row) => row.headDim));
  const lengths = distinct(rows.map((row) => row.length));
  const places = dims.length * lengths.length;
  const routes = [...STEPS, EXACT];
  const fastest = dims.flatMap((headDim) =>
    lengths.map((length) =>
      rows
        .filter((row) => row.headDim === headDim && row.length === length)
        .reduce((best, row) => (row.milliseconds < best.milliseconds ? row : best)),
    ),
  );
  const wins = routes
    .map((route) => ({ route, count: fastest.filter((row) => row.route === route).length }))
    .filter(({ count }) => count > 0)
    .map(({ route, count }) => `${nameOf(route)} at ${count === places ? 'all of them' : count}`);
  const parts = together(rows).map((group) => {
    const [literal, , , states, exact] = group;
    return (
      `at d = ${literal.headDim}, n = ${words.integer(literal.length)} states take ${words.duration(states.milliseconds)}, exact ` +
      `${longer(exact, states)} and the papers’ literal route ${longer(literal, states)} (${words.duration(literal.milliseconds)})`
    );
  });
  const against = dims.map((headDim) => {
    const exact = curveOf(rows, headDim, EXACT);
    const from = STEPS.map((route) => {
      const own = curveOf(rows, headDim, route);
      const first = takesOver(own, exact);
      return `${nameOf(route)} ${first === null ? 'nowhere' : `from n = ${words.integer(first)}`}`;
    });
    return `at d = ${headDim} ${words.list(from)}`;
  });
  const slopes = routes.flatMap((route) => {
    const slope = powerLaw(curveOf(rows, dims.at(-1), route).slice(-3))?.slope;
    return slope === undefined ? [] : [`${slope.toFixed(2)} for ${nameOf(route)}`];
  });
  return {
    id: 'routes-time',
    kind: 'lines',
    title: 'Time of the routes',
    sentence:
      `Of ${places} sizes measured the fastest is ${words.list(wins)}: ${words.list(parts)}. Ahead of exact, up to the longest ` +
      `length measured, are ${against.join('; ')}.`,
    note:
      `Forward and backward, together. The backward pass of \`W_t\` makes the gradient of W too. At d = ${dims.at(-1)} time grows like n to ` +
      `the power ${words.list(slopes)} over the last lengths measured. Curves end where calls would take too long.`,
    x: { key: 'length', label: 'n', log: 2, kind: 'integer' },
    y: { key: 'milliseconds', label: 'time of both passes', log: 10, kind: 'ms' },
    panel: 'panel',
    series: 'route',
    styles: STYLES,
    columns: COLUMNS,
    rows,
  };
}

const nameOf = (route) => (route === EXACT ? 'exact' : route === LITERAL ? '`W_t`' : route);

const STYLES = {
  [LITERAL]: { colour: 'degree-6' },
  [PAIRS]: { colour: 'degree-3' },
  [ONE]: { colour: 'degree-1' },
  [STATES]: { colour: 'degree-5' },
};

const COLUMNS = [
  { key: 'headDim', label: 'd', kind: 'integer' },
  { key: 'length', label: 'n', kind: 'integer' },
  { key: 'route', label: 'route' },
  { key: 'terms', label: 'terms', kind: 'integer' },
  { key: 'matrices', label: 'Toeplitz matrices', kind: 'integer' },
  { key: 'transforms', label: 'transforms', kind: 'integer' },
  { key: 'billions', label: 'operations, 10⁹', kind: 'number' },
  { key: 'forward', label: 'forward', kind: 'ms' },
  { key: 'backward', label: 'backward', kind: 'ms' },
  { key: 'milliseconds', label: 'both', kind: 'ms' },
  { key: 'output', label: 'output error', kind: 'error' },
  { key: 'gradient', label: 'gradient error', kind: 'error' },
];

/** What a step from one route to the next saves, as time and as what it is made of. */
function stepsFigure(rows) {
  const groups = together(rows);
  const fewer = (from, to, key) => words.ratio(from[key] / to[key]);
  const step = (from, to) => `${fewer(from, to, 'milliseconds')} in time`;
  const parts = groups.map(
    ([literal, pairs, one, states]) =>
      `At d = ${literal.headDim}, n = ${words.integer(literal.length)}, complex pairs for ${nameOf(LITERAL)} leave ${words.integer(pairs.terms)} of ` +
      `${words.integer(literal.terms)} terms and save ${fewer(literal, pairs, 'transforms')} in transforms, ${step(literal, pairs)}; ` +
      `rotated rows instead of pairs, ${words.integer(one.terms)} real terms with one matrix instead of ${words.integer(pairs.terms)} complex ` +
      `ones, save ${fewer(pairs, one, 'transforms')} in transforms, ${step(pairs, one)}; states, with no transform, save ` +
      `${fewer(one, states, 'billions')} in operations, ${step(one, states)}`,
  );
  const [literal, , , states] = groups.at(-1);
  const table = groups.flatMap((group) =>
    group.map((row, n) => ({
      ...row,
      saves: n === 0 || row.route === EXACT ? null : group[n - 1].milliseconds / row.milliseconds,
    })),
  );
  return {
    id: 'routes-steps',
    kind: 'table',
    title: 'What each step saves',
    sentence:
      `${parts.join('. ')}. All steps together save ${words.ratio(literal.milliseconds / states.milliseconds)} at d = ` +
      `${literal.headDim}.`,
    note:
      'Numbers of both passes. A transform is a complex one of S numbers, S the block of this length: each column of ' +
      'values takes one with a complex term, two together take one with a real term. Operations are those of the reports. Saved: time ' +
      'of the row above over that of the row.',
    columns: [...COLUMNS.slice(0, -2), { key: 'saves', label: 'saved', kind: 'ratio' }, ...COLUMNS.slice(-2)],
    rows: table,
  };
}

function errorFigure(rows) {
  const measured = rows.filter((row) => row.route !== EXACT);
  const errors = measured.flatMap((row) =>
    ['output', 'gradient'].map((quantity) => ({
      ...{ headDim: row.headDim, length: row.length, route: row.route, quantity },
      ...{ panel: `${quantity}, d = ${row.headDim}`, error: row[quantity] },
    })),
  );
  const spread = (quantity) => {
    const apart = errors
      .filter((row) => row.quantity === quantity && row.route !== STATES)
      .map((row) => {
        const like = (other) => other.quantity === quantity && other.headDim === row.headDim && other.length === row.length;
        const states = errors.find((other) => like(other) && other.route === STATES);
        return Math.abs(row.error / states.error - 1);
      });
    return words.number(100 * Math.max(...apart), 2);
  };
  const range = (quantity) => {
    const own = errors.filter((row) => row.quantity === quantity).map((row) => row.error);
    return `${words.error(Math.min(...own))} to ${words.error(Math.max(...own))}`;
  };
  return {
    id: 'routes-error',
    kind: 'lines',
    title: 'Errors of the routes',
    sentence:
      `Output errors are ${range('output')}, gradient errors ${range('gradient')}; those of the transformed routes differ from those of ` +
      `states by ${spread('output')} % and ${spread('gradient')} % at most.`,
    note:
      'Of the output in units of half the range of v; of gradients the largest relative error of dq, dk and dv. Against the exact ' +
      'engine. Where rows are rotated the mean key is subtracted first, so that the polynomial is another by a little.',
    x: { key: 'length', label: 'n', log: 2, kind: 'integer' },
    y: { key: 'error', label: 'error', log: 10, kind: 'error' },
    panel: 'panel',
    series: 'route',
    styles: STYLES,
    columns: [
      { key: 'quantity', label: 'of' },
      { key: 'headDim', label: 'd', kind: 'integer' },
      { key: 'length', label: 'n', kind: 'integer' },
      { key: 'route', label: 'route' },
      { key: 'error', label: 'error', kind: 'error' },
    ],
    rows: errors,
  };
}

/** The experiment in a sentence or two, from its figures. */
export function finding([{ rows }]) {
  const [literal, pairs, one, states, exact] = together(rows).at(-1);
  const best = [literal, pairs, one, states, exact].reduce((least, row) => (row.milliseconds < least.milliseconds ? row : least));
  const steps = [
    `complex pairs save ${words.ratio(literal.milliseconds / pairs.milliseconds)}`,
    `rotated rows with one matrix ${words.ratio(pairs.milliseconds / one.milliseconds)}`,
    `states instead of transforms ${words.ratio(one.milliseconds / states.milliseconds)}`,
  ];
  return (
    `For plain RoPE at d = ${literal.headDim}, n = ${words.integer(literal.length)} the fastest is ${nameOf(best.route)} ` +
    `(${words.duration(best.milliseconds)} forward and backward); the papers’ literal route, ${words.integer(literal.terms)} terms and ` +
    `${words.integer(literal.transforms)} Fourier transforms, takes ${words.ratio(literal.milliseconds / best.milliseconds)} as long. ` +
    `Step by step ${words.list(steps)}.`
  );
}
