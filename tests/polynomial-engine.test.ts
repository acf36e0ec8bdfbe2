// SPDX-License-Identifier: MIT
//
// The polynomial engine against what it promises: a float64 model of the same function (same coefficients), gradients that
// are the derivative of its own forward pass, errors under the certified bound and falling with the degree.

import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';

import { reference, theory } from '../dist/index.js';
import { fitToScores, minimax } from '../dist/polynomial.js';
import { createKernel, runEngine } from './engine.js';
import { polynomialModel } from './polynomial-model.js';
import { UNIT, add, binaries, describeSetting, draw, eachBinary, forwardArgs, fullShape, inner, lazy } from './support.js';
import { maxAbs, maxDifference, problem, random, relativeFrobenius, slopeError } from './support.js';
import { RESULTS } from './yardstick.js';
import type { Kernel, Outliers } from '../dist/kernel.js';
import type { Floats, Problem, Setting } from './support.js';

// --- Settings ---------------------------------------------------------------------------------------------------------

const heads = 1;
type Case = { setting: Setting; degree: number };

const sizes = [1, 3, 4, 5, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300];
const lengthCases: Case[] = sizes.flatMap((queryLength) => [
  { setting: { shape: { heads, queryLength, headDim: 4 } }, degree: 3 },
  { setting: { shape: { heads, queryLength, headDim: 4 }, causal: true }, degree: 3 },
  { setting: { shape: { heads, queryLength: 33, keyLength: queryLength, headDim: 6 } }, degree: 2 },
  { setting: { shape: { heads, queryLength, keyLength: 70, headDim: 6 }, causal: true }, degree: 2 },
]);

/** For each head size, the degrees tried. */
const ranks: [headDim: number, degrees: number[]][] = [
  ...[1, 2, 3].map((dim): [number, number[]] => [dim, [0, 1, 2, 3, 4, 5, 6, 7, 8]]),
  [4, [0, 1, 2, 3, 4, 5, 6]],
  ...[5, 7, 8].map((dim): [number, number[]] => [dim, [4]]),
  ...[10, 20].map((dim): [number, number[]] => [dim, [3]]),
  [16, [1, 2, 3, 4]],
  ...[32, 64].map((dim): [number, number[]] => [dim, [1, 2]]),
  ...[48, 80].map((dim): [number, number[]] => [dim, [2]]),
  [128, [1]],
];
function casesOfRank(headDim: number, degree: number): Case[] {
  const rotary = headDim % 2 ? { rotary: false as const } : {};
  const lengths = { heads, queryLength: 45, keyLength: 70, headDim };
  return [
    { setting: { shape: { ...lengths, valueDim: 8 }, ...rotary }, degree },
    { setting: { shape: lengths, ...rotary, causal: true, queryOffset: 25 }, degree },
  ];
}
const rankCases = ranks.flatMap(([headDim, degrees]) => degrees.flatMap((degree) => casesOfRank(headDim, degree)));

const valueCases: Case[] = [1, 2, 3, 4, 5, 7, 8, 9, 16, 20, 33, 64, 80, 128].map((valueDim, n) => ({
  setting: { shape: { heads, queryLength: 40, headDim: 6, valueDim }, causal: n % 2 === 1 },
  degree: 3,
}));

const shape = { heads, queryLength: 70, headDim: 6 };
const long = { ...shape, queryLength: 330 };
const optionCases: Case[] = ([
  { shape: { ...shape, batch: 3 } },
  { shape: { ...shape, heads: 3 }, causal: true },
  { shape: { ...shape, batch: 2, heads: 6, kvHeads: 2, keyLength: 20, valueDim: 5 } },
  { shape: { ...shape, batch: 2, heads: 4, kvHeads: 1 }, causal: true },
  { shape: { ...shape, heads: 4, kvHeads: 2, keyLength: 100 }, causal: true, queryOffset: 30 },
  ...[1, 20, 31, 32, 33, 1000, -1, -20, -31, -32, -33, -69].map((queryOffset) => ({ shape, causal: true, queryOffset })),
  ...[50, -50].map((queryOffset) => ({ shape: { ...shape, keyLength: 150 }, causal: true, queryOffset })),
  { shape, queryOffset: -7 },
  { shape, rotary: false as const },
  { shape, rotary: { dim: 0 } },
  { shape, rotary: { dim: 4 } },
  { shape, rotary: { dim: 4, interleaved: true }, causal: true },
  { shape, rotary: { interleaved: true }, queryOffset: 5 },
  { shape, rotary: { base: 500 } },
  { shape, rotary: { frequencies: Float32Array.of(1, 0.1, -0.2) } },
  { shape, scale: 0 },
  { shape, scale: -0.5 },
  { shape, scale: 0.8, causal: true },
  { shape, segments: [0] },
  ...[false, true].flatMap((causal) => [
    { shape, segments: [0, 20], causal },
    { shape, segments: [0, 32, 64], causal },
    { shape, segments: Array.from({ length: 70 }, (_, n) => n), causal },
    { shape: { ...shape, queryLength: 600 }, segments: [0, 5, 5, 37, 300, 520, 590, 900], causal },
    { shape: { ...shape, batch: 2, heads: 4, kvHeads: 2, keyLength: 150 }, segments: [0, 31, 100], causal, queryOffset: 60 },
    { shape: { ...shape, keyLength: 40 }, segments: [0, 10, 38, 60], causal, queryOffset: -20 },
  ]),
] as Setting[])
  .concat([
    ...[0, 30, 31, 62, 63, 64, 65, 93, 100, 127, 1000].map((left) => ({ shape: long, causal: true, window: [left, -1] as const })),
    ...[0, 31, 32, 100, 1000].map((right) => ({ shape: long, window: [-1, right] as const })),
    ...[0, 50, 128].map((left) => ({ shape: long, window: [left, -1] as const })),
    { shape: long, window: [0, 0] },
    { shape: long, window: [20, 20] },
    { shape: long, window: [60, 40] },
    { shape: long, window: [0, 200] },
    { shape: long, window: [70, 9], causal: true },
    { shape: { ...long, keyLength: 250 }, window: [100, 30], queryOffset: -40 },
    { shape: { ...long, keyLength: 250 }, window: [100, 30], queryOffset: 70 },
    { shape: { ...long, keyLength: 600 }, window: [150, -1], causal: true, queryOffset: 290 },
    { shape: { ...long, batch: 2, heads: 4, kvHeads: 2, valueDim: 5 }, window: [96, 20] },
    { shape: long, window: [100, 30], segments: [0, 20, 150, 151, 300] },
    { shape: long, window: [100, -1], causal: true, segments: [0, 7, 200] },
    ...[0, 1e-3, 0.05, 0.7, 30].map((m) => ({ shape: long, causal: true, alibi: Float32Array.of(m) })),
    { shape: { ...shape, batch: 2, heads: 4, kvHeads: 2 }, causal: true, alibi: Float32Array.of(0.5, 0, 0.01, 0.1) },
    { shape: { ...long, keyLength: 400 }, causal: true, queryOffset: 71, alibi: Float32Array.of(0.1) },
    { shape: { ...long, keyLength: 250 }, causal: true, queryOffset: -40, alibi: Float32Array.of(0.1) },
    { shape: { ...shape, keyLength: 50 }, causal: true, alibi: Float32Array.of(0.1) },
    { shape: long, causal: true, alibi: Float32Array.of(0.02), window: [100, -1] },
    { shape: long, causal: true, alibi: Float32Array.of(0.02), segments: [0, 7, 200] },
    { shape: { ...long, heads: 2 }, causal: true, alibi: Float32Array.of(0.02, 0.2), layout: 'bhnd' },
  ])
  .map((setting) => ({ setting, degree: 3 }));

const slopes = (
  [
    { setting: { shape: { heads, queryLength: 70, headDim: 6 } }, degree: 3 },
    { setting: { shape: { heads: 2, queryLength: 33, headDim: 16 } }, degree: 2 },
    { setting: { shape: { heads, queryLength: 70, headDim: 6 }, causal: true }, degree: 3 },
    { setting: { shape: { heads, queryLength: 70, headDim: 20 }, causal: true }, degree: 1 },
    { setting: { shape: { heads: 2, kvHeads: 1, queryLength: 300, headDim: 6 }, causal: true, window: [100, -1] }, degree: 3 },
    { setting: { shape: { heads, queryLength: 300, keyLength: 260, headDim: 6 }, window: [40, 90], queryOffset: 20 }, degree: 3 },
    { setting: { shape: { heads, queryLength: 200, headDim: 6 }, causal: true, alibi: Float32Array.of(0.02) }, degree: 3 },
    {
      setting: {
        shape: { heads: 4, kvHeads: 2, queryLength: 40, keyLength: 100, headDim: 3, valueDim: 7 },
        rotary: false,
        causal: true,
        queryOffset: 60,
      },
      degree: 5,
    },
  ] as Case[]
).map((one) => [`degree ${one.degree}, ${describeSetting(one.setting)}`, one] as const);

/** Entries of size 0.6 give scores of deviation 0.36, inside the radius of the polynomials; each head has its own. */
const entries = (r: ReturnType<typeof random>) => 0.6 * r.normal();
function coefficientsFor({ setting, degree }: Case): Float32Array[] {
  const { batch, kvHeads } = fullShape(setting.shape);
  return Array.from({ length: batch * kvHeads }, (_, head) => minimax(degree, 1.5 + 0.1 * head).coefficients);
}

const withModels = (cases: Case[], seed: number) =>
  cases.map((one, n) => {
    const args = lazy(() => problem(one.setting, seed + n, entries));
    const coefficients = lazy(() => coefficientsFor(one));
    const model = lazy(() => polynomialModel(args(), coefficients()));
    return [`degree ${one.degree}, ${describeSetting(one.setting)}`, args, coefficients, model] as const;
  });

/** Every 7th query and 9th key of a key/value head, from a place that differs by head, `factor` times as large, are outliers. */
function withOutliers(args: Problem, factor: number): { args: Problem; outliers: Outliers } {
  const { batch, heads, kvHeads, queryLength, keyLength, headDim } = fullShape(args.shape);
  const [group, keyHeads] = [heads / kvHeads, batch * kvHeads];
  const counts = { queries: Math.floor((group * queryLength) / 7), keys: Math.floor(keyLength / 9) };
  const [q, k] = [args.q.slice(), args.k.slice()];
  const enlarge = (x: Float32Array, row: number) => {
    for (let n = row * headDim; n < (row + 1) * headDim; n++) x[n] *= factor;
  };
  const every = (count: number, step: number, take: (head: number, n: number) => void) =>
    Uint32Array.from({ length: keyHeads * count }, (_, at) => {
      const [head, n] = [Math.floor(at / count), (at % count) * step + (Math.floor(at / count) % step)];
      take(head, n);
      return n;
    });
  const queries = every(counts.queries, 7, (head, n) =>
    enlarge(q, (head * group + (n % group)) * queryLength + Math.floor(n / group)),
  );
  const keys = every(counts.keys, 9, (head, n) => enlarge(k, head * keyLength + n));
  return { args: { ...args, q, k }, outliers: { queries, keys, counts } };
}

const outlierSettings: Setting[] = [
  { shape: { heads, queryLength: 300, headDim: 6 } },
  { shape: { heads, queryLength: 300, headDim: 6 }, causal: true },
  { shape: { heads, queryLength: 45, keyLength: 200, headDim: 16, valueDim: 5 }, causal: true, queryOffset: 150 },
  { shape: { batch: 2, heads: 6, kvHeads: 2, queryLength: 70, keyLength: 90, headDim: 6, valueDim: 5 } },
  { shape: { batch: 2, heads: 4, kvHeads: 2, queryLength: 100, headDim: 6 }, causal: true },
  ...[false, true].map((causal) => ({ shape: { heads, queryLength: 300, headDim: 6 }, segments: [0, 5, 37, 150], causal })),
  { shape: { heads, queryLength: 300, headDim: 6 }, window: [150, 20] as const },
  { shape: { heads, queryLength: 300, headDim: 6 }, rotary: false as const, scale: -0.4, causal: true },
];
const outlierCases = outlierSettings.flatMap((setting, n) =>
  [4, 60].map((factor) => {
    const both = lazy(() => withOutliers(problem(setting, 5000 + n, entries), factor));
    const coefficients = lazy(() => coefficientsFor({ setting, degree: 3 }));
    const model = lazy(() => polynomialModel(both().args, coefficients(), both().outliers));
    return [`${factor} times as large, ${describeSetting(setting)}`, both, coefficients, model] as const;
  }),
);

const groups = [
  ['lengths', withModels(lengthCases, 1000)],
  ['ranks', withModels(rankCases, 2000)],
  ['value sizes', withModels(valueCases, 3000)],
  ['options', withModels(optionCases, 4000)],
] as const;

/**
 * Tokens that repeat, so that late rows are to be what early ones are, and these are in the reach of the model. One key of each
 * period is much larger than the others.
 */
const PERIOD = 512;
const periodic = [true, false].map((causal) => ({
  causal,
  make: lazy(() => {
    const window = causal ? ([300, -1] as const) : ([250, 100] as const);
    const setting = (queryLength: number) => ({ shape: { heads, queryLength, headDim: 2 }, rotary: false as const, causal, window });
    const one = problem(setting(PERIOD), 35, entries);
    one.k.set([3, -3], 200);
    const repeated = (count: number): Problem => {
      const again = (x: Float32Array) => Float32Array.from({ length: x.length * count }, (_, n) => x[n % x.length]);
      return { ...setting(count * PERIOD), q: again(one.q), k: again(one.k), v: again(one.v), dOutput: again(one.dOutput) };
    };
    const coefficients = [minimax(3, 2).coefficients];
    return { args: repeated(2 ** 17 / PERIOD), coefficients, model: polynomialModel(repeated(3), coefficients) };
  }),
}));

/**
 * Roundings, 2^-24, of the largest sum of magnitudes that makes up an entry. The most seen over all cases and both binaries:
 * output 1.2, lse 1.6, dq 0.14, dk 0.16, dv 0.6 (the gradients' sums are the more pessimistic).
 */
const MODEL_TOLERANCE = { output: 2.5, lse: 3, dq: 0.3, dk: 0.3, dv: 1.2, dAlibi: 0.1 };

/** Relative to the largest entry: scores reach thousands, and weights carry their roundings. 5e-5 was the most seen. */
const OUTLIER_TOLERANCE = 1.2e-4;

/** Rounding of the loss over the step, in the units of `slopeError`: 1.7e-5 was the most seen. */
const SLOPE_TOLERANCE = 5e-5;

/** Relative Frobenius errors that are rounding: 3.1e-7 was the most seen from degree 7 on. */
const FLOOR = 6e-7;

// --- The model --------------------------------------------------------------------------------------------------------

describe('the float64 model', () => {
  const wide = (args: Problem) => ({
    ...args,
    q: Float64Array.from(args.q),
    k: Float64Array.from(args.k),
    v: Float64Array.from(args.v),
    dOutput: Float64Array.from(args.dOutput),
  });

  // Two diagonal blocks, keys before them, grouped heads: every path of the gradient carries something.
  test.each([false, true])('has the gradient of its own forward pass, causal %s', (causal) => {
    const shape = { heads: 2, kvHeads: 1, queryLength: 40, keyLength: 50, headDim: 4, valueDim: 3 };
    const setting = { shape, causal, queryOffset: 10 };
    const args = wide(problem(setting, 1, entries));
    const coefficients = [Float64Array.of(1.1, 0.9, 0.6, 0.1)];
    const model = polynomialModel(args, coefficients);
    for (const name of ['q', 'k', 'v'] as const) {
      const direction = Float64Array.from(args[name], random(2).normal);
      const moved = (step: number) => ({ ...args, [name]: args[name].map((x, n) => x + step * direction[n]) });
      const loss = (step: number) => inner(polynomialModel(moved(step), coefficients).output, args.dOutput);
      // Seen: 2.3e-12 and less, the rounding of the loss over the step.
      expect(slopeError(loss, model[`d${name}`], direction, 1e-3)).toBeLessThan(1e-11);
    }
  });

  test.each([false, true])('is attention when the polynomial is exp, causal %s', (causal) => {
    const setting = { shape: { heads: 2, queryLength: 40, headDim: 4 }, causal, queryOffset: 3 };
    const args = wide(problem(setting, 3, entries));
    // Scores are below 3 here: 30 terms are exact.
    const series = Float64Array.from({ length: 30 }, () => 1);
    for (let m = 1; m < 30; m++) series[m] = series[m - 1] / m;
    const model = polynomialModel(args, [series, series]);
    const exact = { ...reference.forward(args), ...reference.backward(args) };
    for (const name of RESULTS) expect(model[name]).toBeAllclose(exact[name], { atol: 1e-13, name });
  });
});

// --- The engine -------------------------------------------------------------------------------------------------------

describe.each(binaries)('the engine, $name', (binary) => {
  let kernel: Kernel;
  beforeAll(async () => {
    kernel = await createKernel(binary);
  });
  afterAll(() => kernel.dispose());

  describe.each(groups)('is its float64 model: %s', (_, cases) => {
    test.each(cases)('%s', (_, args, coefficients, model) => {
      const [result, expected] = [runEngine(kernel, args(), coefficients()), model()];
      expect(result.positive).toBe(true);
      for (const name of RESULTS) {
        expect(result[name]).toBeAllclose(expected[name], { atol: MODEL_TOLERANCE[name] * UNIT * expected.terms[name], name });
      }
      result.dAlibi?.forEach((slope, head) => {
        const atol = MODEL_TOLERANCE.dAlibi * UNIT * expected.dAlibiTerms[head];
        expect(Float32Array.of(slope)).toBeAllclose([expected.dAlibi[head]], { atol, name: 'dAlibi' });
      });
    });
  });

  // Exponents of hundreds, and of thousands for pairs of outliers: exp alone would overflow.
  test.each(outlierCases)('outliers are exact, the rest is the model: %s', (_, both, coefficients, model) => {
    const { args, outliers } = both();
    const [result, expected] = [runEngine(kernel, args, coefficients(), outliers), model()];
    expect(result.positive).toBe(true);
    for (const name of RESULTS) {
      expect(result[name]).toBeAllclose(expected[name], { atol: OUTLIER_TOLERANCE * maxAbs(expected[name]), name });
    }
  });

  // Gaussian vectors with log-normal norms: scores of deviation 0.3, a few of about 7.
  test('heavy tails: the 2 % largest queries and keys, done exactly, make a low degree serve the others', () => {
    const length = 2048;
    const args = problem({ shape: { heads, queryLength: length, headDim: 16 }, rotary: false }, 61);
    const r = random(62);
    const norms = [args.q, args.k].map((x) =>
      Array.from({ length }, (_, row) => {
        const norm = Math.exp(0.4 * r.normal()) * Math.sqrt(0.3 / Math.exp(0.32));
        const own = x.subarray(16 * row, 16 * row + 16);
        own.forEach((value, d) => (own[d] = norm * value));
        return Math.hypot(...own);
      }),
    );
    const count = Math.ceil(0.02 * length);
    const [queries, keys] = norms.map((sizes) =>
      Uint32Array.from([...sizes.keys()].sort((a, b) => sizes[b] - sizes[a]).slice(0, count)).sort(),
    );
    const split = { queries, keys, counts: { queries: count, keys: count } };
    const none = { queries: new Uint32Array(0), keys: new Uint32Array(0), counts: { queries: 0, keys: 0 } };
    const exact = runEngine(kernel, args, null);
    const errors = (degree: number, outliers: Outliers) => {
      const scores: number[] = [];
      for (let i = 0; i < length; i += 8) {
        for (let j = 0; j < length; j += 16) {
          if (outliers.queries.includes(i) || outliers.keys.includes(j)) continue;
          scores.push(inner(args.q.subarray(16 * i, 16 * i + 16), args.k.subarray(16 * j, 16 * j + 16)) / 4);
        }
      }
      const got = runEngine(kernel, args, [fitToScores(scores, degree)], outliers);
      return [
        maxDifference(got.output, exact.output) / maxAbs(exact.output),
        Math.max(...(['dq', 'dk', 'dv'] as const).map((name) => relativeFrobenius(got[name], exact[name]))),
      ];
    };
    // Measured 9.1e-1 / 6.7e-1 without and 5.3e-2 / 9.6e-2 with the split, then 6.6e-1 / 5.9e-1 and 2.7e-2 / 3.8e-2.
    const limits: [degree: number, output: number, gradient: number][] = [
      [2, 7e-2, 1.3e-1],
      [3, 3.6e-2, 5e-2],
    ];
    for (const [degree, output, gradient] of limits) {
      const [alone, beside] = [errors(degree, none), errors(degree, split)];
      expect(Math.min(...alone)).toBeGreaterThan(0.4);
      expect(beside[0]).toBeLessThan(output);
      expect(beside[1]).toBeLessThan(gradient);
    }
  });

  // The derivative itself, without a model: coefficients held fixed, float32 rounding of the loss over the step.
  describe.each(slopes)('backward is the slope of forward: %s', (_, one) => {
    test.each(['q', 'k', 'v'] as const)('along a direction of %s', (name) => {
      const args = problem(one.setting, 31, entries);
      const coefficients = coefficientsFor(one);
      const gradient = runEngine(kernel, args, coefficients)[`d${name}`];
      const direction = draw(args[name].length, random(32).normal);
      const loss = (step: number) => {
        const moved = { ...args, [name]: add(args[name], step, direction) };
        return inner(runEngine(kernel, moved, coefficients).output, args.dOutput);
      };
      expect(slopeError(loss, gradient, direction)).toBeLessThan(SLOPE_TOLERANCE);
    });
  });

  test('rows whose weights are not positive: zeros and lse -Infinity, no gradient, the others right', () => {
    // p(s) = s^2 - 1/10: negative sums for the short queries, positive ones for the long.
    const args = problem({ shape: { heads: 1, queryLength: 70, headDim: 6 }, rotary: false }, 33);
    const short = (i: number) => i % 3 === 0;
    const q = args.q.map((x, n) => (short(Math.floor(n / 6)) ? 0.01 * x : x));
    const coefficients = [Float32Array.of(-0.1, 0, 1)];
    const result = runEngine(kernel, { ...args, q }, coefficients);
    const dOutput = args.dOutput.map((x, n) => (short(Math.floor(n / 6)) ? 0 : x));
    const model = polynomialModel({ ...args, q, dOutput }, coefficients);

    expect(result.positive).toBe(false);
    const expected = {
      ...model,
      output: model.output.map((x, n) => (short(Math.floor(n / 6)) ? 0 : x)),
      lse: model.lse.map((x, i) => (short(i) ? -Infinity : x)),
    };
    expect(maxDifference(expected.lse.filter(Number.isFinite), new Float64Array(46))).toBeLessThan(20);
    for (const name of RESULTS) expect(result[name]).toBeAllclose(expected[name], { atol: 1e-4, name });
    for (let i = 0; i < 70; i += 3) {
      expect(result.output.subarray(6 * i, 6 * i + 6).map(Math.abs)).toEqual(new Float32Array(6));
      expect(result.dq.subarray(6 * i, 6 * i + 6).map(Math.abs)).toEqual(new Float32Array(6));
    }
  });

  // Keys leave the sums as others join: what rounding leaves behind must not grow along the sequence.
  describe('a window is as exact at the end of 2^17 tokens as at their beginning', () => {
    test.each(periodic)('causal $causal', ({ make }) => {
      const { args, coefficients, model } = make();
      const result = runEngine(kernel, args, coefficients);
      expect(result.positive).toBe(true);
      const last = args.shape.queryLength / PERIOD - 2;
      for (const name of RESULTS) {
        const count = (model[name].length / 3) | 0;
        const rows = (of: Floats, n: number) => of.subarray(n * count, (n + 1) * count);
        const atol = MODEL_TOLERANCE[name] * UNIT * model.terms[name];
        expect(rows(result[name], last)).toBeAllclose(rows(result[name], 1), { atol, name });
        // The mean that is taken out of dk is that of all keys: of other ones in the model.
        if (name !== 'dk') expect(rows(result[name], last)).toBeAllclose(rows(model[name], 1), { atol, name });
      }
    });
  });

  test('a call repeated gives the same bits', () => {
    const one = { setting: { shape: { heads: 2, queryLength: 100, headDim: 8 }, causal: true }, degree: 2 };
    const args = problem(one.setting, 34, entries);
    const coefficients = coefficientsFor(one);
    expect(runEngine(kernel, args, coefficients)).toEqual(runEngine(kernel, args, coefficients));
  });
});

// --- Through the API --------------------------------------------------------------------------------------------------

const uniform = (entry: number) => (r: ReturnType<typeof random>) => entry * (2 * r.uniform() - 1);

/** Half the range of the widest value column: an upper limit of max |v - c|. One head. */
function halfRange({ v, shape }: Problem): number {
  const width = fullShape(shape).valueDim;
  const columns = Array.from({ length: width }, (_, d) => Array.from(v).filter((_, n) => n % width === d));
  return Math.max(...columns.map((column) => (Math.max(...column) - Math.min(...column)) / 2));
}

const certifiedGrid = [2, 4, 16, 64].flatMap((headDim) =>
  [40, 300].flatMap((queryLength) =>
    [0.25, 0.5, 1].flatMap((entry) =>
      [false, true].map((causal) => {
        const make = lazy(() => {
          const args = problem({ shape: { heads, queryLength, headDim, valueDim: 8 }, causal }, 41, uniform(entry));
          return { args, exact: reference.forward(args).output, unit: halfRange(args) };
        });
        return { headDim, queryLength, entry, causal, make };
      }),
    ),
  ),
);

eachBinary((attention) => {
  describe('the certified bound holds', () => {
    test.each(certifiedGrid)('D = $headDim, N = $queryLength, entries to $entry, causal $causal', ({ headDim, entry, make }) => {
      const { args, exact, unit } = make();
      const degrees = headDim === 64 ? [0, 1, 2] : headDim === 16 ? [0, 1, 2, 3, 4] : [0, 1, 2, 3, 4, 5, 6];
      let certified = 0;
      for (const degree of degrees) {
        const options = { method: 'polynomial', degree, guarantee: 'certified', tolerance: 1e-6, onMiss: 'report' } as const;
        const { output, report } = attention().forward({ ...forwardArgs(args), ...options });
        expect(report).toMatchObject({ method: 'polynomial', degree, rank: theory.rank(headDim, degree) });
        if (report.errorBound === null) continue;
        certified++;
        expect(maxDifference(output, exact) / unit).toBeLessThanOrEqual(report.errorBound);
        // At most what the theory says for entries of that size, and a float32 term, which is far below 1e-3 here.
        const t = minimax(degree, theory.scoreBound({ headDim, entryBound: entry })).error;
        expect(report.errorBound).toBeLessThanOrEqual(theory.certifiedBound(t) + 1e-3);
      }
      // Entries to 1/4 always have a certificate.
      if (entry === 0.25) expect(certified).toBe(degrees.length);
    });
  });

  test.each([false, true])('errors fall with the degree to the floor of float32, causal %s', (causal) => {
    const args = problem({ shape: { heads: 2, queryLength: 200, headDim: 4 }, causal }, 42, uniform(0.75));
    const exact = { ...reference.forward(args), ...reference.backward(args) };
    let before = { output: Infinity, dq: Infinity, dk: Infinity, dv: Infinity };
    for (const degree of [0, 1, 2, 3, 4, 5, 6, 7, 8]) {
      const options = { method: 'polynomial', degree, onMiss: 'report', tolerance: 1e-6 } as const;
      const { output } = attention().forward({ ...forwardArgs(args), ...options });
      const { dq, dk, dv } = attention().backward({ ...args, ...options });
      const error = {
        output: relativeFrobenius(output, exact.output),
        dq: relativeFrobenius(dq, exact.dq),
        dk: relativeFrobenius(dk, exact.dk),
        dv: relativeFrobenius(dv, exact.dv),
      };
      // By a factor of 4 at least (4.8 seen), until rounding takes over.
      for (const name of ['output', 'dq', 'dk', 'dv'] as const) {
        expect({ name, degree, falls: error[name] < Math.max(before[name] / 4, FLOOR) }).toEqual({ name, degree, falls: true });
      }
      before = error;
    }
  });

  test('backward with a degree is backward of the forward pass of that degree, given or not', () => {
    const args = problem({ shape: { heads: 2, queryLength: 100, headDim: 8 }, causal: true }, 43, entries);
    const options = { method: 'polynomial', degree: 2, onMiss: 'report' } as const;
    const { output, lse } = attention().forward({ ...forwardArgs(args), ...options });
    const without = attention().backward({ ...args, ...options });
    const given = attention().backward({ ...args, ...options, output, lse });
    for (const name of ['dq', 'dk', 'dv'] as const) expect(given[name]).toEqual(without[name]);
  });
});
