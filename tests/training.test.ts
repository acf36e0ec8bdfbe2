// SPDX-License-Identifier: MIT
//
// The training problem: `attentionLoss` against the float64 reference, the reference against finite differences of its own
// loss, descent, misuse; `gradientParts` against the reference, singular values against another implementation and known cases,
// the polynomial's factors against its engine.

import { Matrix, SVD } from 'ml-matrix';
import { describe, expect, test } from '@jest/globals';

import { createRopeAttention, gradientParts, reference, theory } from '../dist/index.js';
import type { AttentionLossArgs, GradientPartsArgs, LossShape } from '../dist/index.js';
import { numericalRank, singularValues } from '../dist/singular-values.js';
import { TRAINING_ARRAYS, UNIT, add, draw, eachBinary, lazy, maxDifference, random } from './support.js';
import { relativeFrobenius, slopeError, training } from './support.js';
import type { Floats } from './support.js';

type Setting = Omit<AttentionLossArgs, (typeof TRAINING_ARRAYS)[number]>;
const GRADIENTS = { x1: 'dx1', x2: 'dx2', y: 'dy' } as const;
const WEIGHTS = ['x1', 'x2', 'y'] as const;

const bias = (shape: LossShape) => draw(shape.queryLength + (shape.keyLength ?? shape.queryLength) - 1, random(9).normal);
const one = { heads: 1, queryLength: 40, headDim: 8 };
const crossed = { batch: 2, heads: 4, kvHeads: 2, queryLength: 19, keyLength: 33, headDim: 6, valueDim: 5, modelDim: 11 };
const settings: Setting[] = [
  { shape: one, scale: 1 / 8 },
  { shape: { ...one, modelDim: 3, valueDim: 7 }, causal: true },
  { shape: crossed, rotary: { dim: 4, interleaved: true } },
  { shape: crossed, causal: true, queryOffset: 14, rotary: false },
  { shape: crossed, bias: bias(crossed), sinks: Float32Array.of(0, 1, -1, 2), softcap: 3, window: [20, 4] },
  { shape: { heads: 1, queryLength: 260, headDim: 6, modelDim: 1100 }, causal: true }, // products in two slices
  { shape: one, relative: { support: Uint32Array.of(0, 0, 3, 5, 7, 2), weights: draw(3 * 79, random(8).normal) } },
  { shape: one, causal: true, relativePositions: Float32Array.from({ length: 79 }, (_, t) => Math.min(t - 39, 12)) },
  { shape: one, segments: [0, 7, 31], mask: Uint8Array.from({ length: 1600 }, (_, n) => n % 5) },
];
const name = ({ shape, ...options }: Setting) => `${Object.values(shape).join(' ')} ${Object.keys(options).join(' ')}`;

describe('reference.attentionLoss', () => {
  test.each(settings.map((setting) => [name(setting), setting] as const))('has the slopes of its loss: %s', (_, setting) => {
    const args = training(setting, 1);
    const parts = reference.attentionLoss(args);
    for (const weight of WEIGHTS) {
      const { modelDim = 8 } = setting.shape;
      const { normal } = random(2);
      const direction = draw(args[weight].length, () => normal() / Math.sqrt(modelDim));
      const loss = (step: number) => {
        const moved = Float64Array.from(args[weight], (x, n) => x + step * direction[n]);
        return reference.attentionLoss({ ...args, [weight]: moved }).loss;
      };
      expect(slopeError(loss, parts[GRADIENTS[weight]], direction, 1e-3)).toBeLessThan(1e-8);
    }
  });

  test('is half the square of what forward leaves', () => {
    const identity = (n: number) => Float32Array.from({ length: n * n }, (_, at) => Number(at % (n + 1) === 0));
    const args = { ...training(settings[0], 3), x1: identity(8), x2: identity(8), y: identity(8) };
    const { output } = reference.forward({ q: args.a1, k: args.a2, v: args.a3, shape: one, scale: 1 / 8 });
    const { loss, output: same } = reference.attentionLoss(args);
    expect(same).toEqual(output);
    expect(loss).toBeCloseTo(output.reduce((sum, x, n) => sum + (x - args.e[n]) ** 2, 0) / 2, 10);
  });
});

/**
 * Roundings, 2^-24: relative error of the loss, relative Frobenius errors of the gradients. Twice the most seen over settings and
 * binaries.
 */
const TOLERANCE = {
  loss: 1, // 0.5
  gradient: 16, // 7.7; sums over modelDim are plain, and theirs grow with its root (1,100: 26)
};

eachBinary((attention) => {
  describe('attentionLoss', () => {
    describe.each(settings.map((setting, n) => [name(setting), training(setting, n + 10)] as const))('%s', (_, args) => {
      const expected = lazy(() => reference.attentionLoss(args));
      const roundings = TOLERANCE.gradient * Math.sqrt(Math.max(1, (args.shape.modelDim ?? 0) / 128)) * UNIT;

      test('gives the loss and its gradients', () => {
        const found = attention().attentionLoss({ ...args, method: 'exact' });
        expect(Math.abs(found.loss / expected().loss - 1)).toBeLessThan(TOLERANCE.loss * UNIT);
        for (const gradient of ['dx1', 'dx2', 'dy'] as const) {
          expect(found[gradient]).toHaveLength(expected()[gradient].length);
          expect(relativeFrobenius(found[gradient], expected()[gradient])).toBeLessThan(roundings);
        }
        for (const vector of ['dBias', 'dSinks', 'dWeights'] as const) {
          expect(found[vector] === undefined).toBe(expected()[vector] === undefined);
          if (found[vector]) expect(relativeFrobenius(found[vector], expected()[vector]!)).toBeLessThan(roundings);
        }
      });

      test('is forward and backward between products', () => {
        const { saved, report } = attention().attentionLoss(args);
        const { output } = expected();
        expect(relativeFrobenius(saved.output, output)).toBeLessThan(1e-3);
        expect(saved.output).toHaveLength(args.e.length);
        expect([saved.report.method, report.method]).toEqual(['exact', 'exact']);
      });
    });

    const long = lazy(() => training({ shape: { heads: 1, queryLength: 700, headDim: 8, modelDim: 12 }, causal: true }, 20, 0.5));

    test.each([1, 2, 3, 4])('a polynomial of degree %i has the slopes of its own loss', (degree) => {
      const args = { ...long(), method: 'polynomial', degree, onMiss: 'report' } as const;
      const found = attention().attentionLoss(args);
      expect([found.saved.report.degree, found.report.degree]).toEqual([degree, degree]);
      for (const weight of WEIGHTS) {
        const direction = draw(args[weight].length, () => random(degree).normal() / 4);
        const loss = (step: number) => attention().attentionLoss({ ...args, [weight]: add(args[weight], step, direction) }).loss;
        // Its coefficients are fitted anew at every step, which moves the loss a little besides.
        expect(slopeError(loss, found[GRADIENTS[weight]], direction, 0.05)).toBeLessThan([0.2, 0.05, 0.01, 0.01][degree - 1]);
      }
    });

    test.each([1e-1, 1e-2, 1e-3])('keeps the tolerance %f of both passes', (tolerance) => {
      const exact = reference.attentionLoss(long());
      const found = attention().attentionLoss({ ...long(), method: 'polynomial', tolerance });
      expect(found.report.method).toBe('polynomial');
      expect(found.report.errorEstimate).toBeLessThanOrEqual(tolerance);
      // The residual is about as large as the output here: its error and that of the backward pass add up (to 0.8 of one).
      for (const weight of WEIGHTS)
        expect(relativeFrobenius(found[GRADIENTS[weight]], exact[GRADIENTS[weight]])).toBeLessThan(2 * tolerance);
      expect(Math.abs(found.loss / exact.loss - 1)).toBeLessThan(2 * tolerance);
    });

    test.each([
      ['exact', {}],
      ['polynomial', { degree: 2, onMiss: 'report' }],
      ['auto', { tolerance: 0.02 }],
    ] as const)('descends with %s', (method, options) => {
      // A target that the model can reach, by other weights.
      const args = training({ shape: { heads: 1, queryLength: 3000, headDim: 8 }, causal: true }, 30, 0.3);
      const e = attention().attentionLoss({ ...args, y: args.x2, method: 'exact' }).saved.output;
      let weights = { x1: args.x1, x2: args.x2, y: args.y };
      const losses: number[] = [];
      for (let step = 0; step < 12; step++) {
        const found = attention().attentionLoss({ ...args, ...weights, e, method, ...options });
        if (method !== 'auto') expect(found.report.method).toBe(method);
        losses.push(found.loss);
        const rate = 0.004;
        weights = {
          x1: add(weights.x1, -rate, found.dx1),
          x2: add(weights.x2, -rate, found.dx2),
          y: add(weights.y, -rate, found.dy),
        };
      }
      losses.slice(1).forEach((loss, n) => expect(loss).toBeLessThan(losses[n]));
      expect(losses.at(-1)! / losses[0]).toBeLessThan(0.4);
    });

    test('leaves arguments alone, takes views, repeats itself', () => {
      const args = training(settings[2], 40);
      const before = structuredClone(args);
      const first = attention().attentionLoss(args);
      expect(args).toEqual(before);
      const viewed = Object.fromEntries(
        TRAINING_ARRAYS.map((array) => {
          const wide = new Float32Array(args[array].length + 7).fill(NaN);
          wide.set(args[array], 3);
          return [array, wide.subarray(3, 3 + args[array].length)];
        }),
      );
      const second = attention().attentionLoss({ ...args, ...viewed });
      expect(second.loss).toBe(first.loss);
      for (const gradient of ['dx1', 'dx2', 'dy'] as const) expect(second[gradient]).toEqual(first[gradient]);
    });

    describe('refuses', () => {
      const args = training({ shape: one }, 50);
      const refused = (change: object, message: string | RegExp, kind = RangeError) => {
        const call = () => attention().attentionLoss({ ...args, ...change } as AttentionLossArgs);
        expect(call).toThrow(kind);
        expect(call).toThrow(message);
        expect(attention().attentionLoss({ ...args, method: 'exact' }).loss).toBeGreaterThan(0);
      };

      test.each(TRAINING_ARRAYS)('%s of another length or kind', (array) => {
        refused({ [array]: args[array].subarray(1) }, `attentionLoss: ${array} has ${args[array].length - 1} values, shape needs`);
        refused({ [array]: [...args[array]] }, `attentionLoss: ${array} must be a Float32Array, got an array`, TypeError);
        refused({ [array]: undefined }, `attentionLoss: ${array} must be a Float32Array, got undefined`, TypeError);
        const bad = args[array].slice();
        bad[5] = NaN;
        refused({ [array]: bad, checkFinite: true }, `attentionLoss: ${array}[5] must be finite, got NaN`);
      });

      test('sizes that cannot be', () => {
        for (const modelDim of [0, -1, 1.5, NaN, Infinity, 2 ** 31])
          refused({ shape: { ...one, modelDim } }, 'attentionLoss: shape.modelDim must be an integer from 1');
        refused({ shape: { ...one, modelDim: '8' } }, 'attentionLoss: shape.modelDim must be a number', TypeError);
        refused({ shape: { ...one, width: 8 } }, 'attentionLoss: there is no option shape.width', TypeError);
        refused({ shape: { ...one, modelDim: 2 ** 31 - 1 } }, 'attentionLoss: a1 has 320 values, shape needs 85899345880');
        refused({ shape: { ...one, queryLength: 2 ** 30 } }, /^attentionLoss: q would have 8589934592 values/);
      });

      test('options that are not its own', () => {
        refused({ layout: 'bhnd' }, 'attentionLoss: there is no option layout', TypeError);
        refused({ dOutput: args.e }, 'attentionLoss: there is no option dOutput', TypeError);
        refused({ tolerance: 0 }, 'attentionLoss: tolerance must be');
        refused({ method: 'polynomial', softcap: 5 }, "attentionLoss: method 'polynomial' has no softcap");
        expect(() => attention().attentionLoss(undefined as never)).toThrow(TypeError);
      });

      test('a tolerance that a forced polynomial misses, in its own name', () => {
        const far = training({ shape: one }, 51, 4);
        const call = () => attention().attentionLoss({ ...far, method: 'polynomial', degree: 1 });
        expect(call).toThrow(/^attentionLoss: method 'polynomial' misses the tolerance 0.001/);
      });
    });

    test('entries that overflow float32 are not finite results, and no harm', () => {
      const args = training({ shape: one }, 60);
      const { loss } = attention().attentionLoss({ ...args, y: args.y.map((x) => x * 3e38) });
      expect(Number.isFinite(loss)).toBe(false);
      expect(attention().attentionLoss(args).loss).toBeGreaterThan(0);
    });
  });
});

test('after dispose there is no loss', async () => {
  const attention = await createRopeAttention();
  attention.dispose();
  expect(() => attention.attentionLoss(training({ shape: one }, 1))).toThrow('attentionLoss: this instance was disposed');
});

describe('gradientParts', () => {
  const heads = { heads: 1, queryLength: 23, keyLength: 31, headDim: 6, valueDim: 3, modelDim: 5 };
  const cases: Setting[] = [
    { shape: heads, scale: 1 / 6 },
    { shape: heads, causal: true, queryOffset: 8, rotary: { dim: 4, interleaved: true } },
    { shape: heads, rotary: false },
    { shape: heads, causal: true, relativePositions: Float32Array.from({ length: 53 }, (_, t) => Math.min(t - 30, 4)) },
    { shape: heads, relative: { support: Uint32Array.of(0, 5, 2, 2), weights: draw(2 * 53, random(7).normal) } },
    { shape: heads, window: [5, 3], bias: bias(heads), sinks: Float32Array.of(0.5) },
  ];
  const close = { rtol: 1e-12, atol: 1e-12 };

  test.each(cases.map((setting) => [name(setting), setting] as const))('has the gradients of the loss: %s', (_, setting) => {
    const args = training(setting, 70);
    const [parts, expected] = [gradientParts(args), reference.attentionLoss(args)];
    expect(parts.loss).toBeCloseTo(expected.loss, 10);
    for (const gradient of ['dx1', 'dx2', 'dy'] as const) expect(parts[gradient]).toBeAllclose(expected[gradient], close);
    const residual = expected.output.map((x, n) => x - args.e[n]);
    expect(parts.l).toBeAllclose(residual, close);
  });

  test('matrices are what the papers define', () => {
    const args = training(cases[1], 71);
    const { s, l, h, beta, gamma1, gamma2, gamma } = gradientParts(args);
    const [rows, columns, dims] = [23, 31, 3];
    for (let i = 0; i < rows; i++) {
      let [sum, both] = [0, 0];
      for (let j = 0; j < columns; j++) {
        const n = i * columns + j;
        if (j > i + 8) expect(s[n]).toBe(0);
        sum += s[n];
        both += s[n] * beta[n];
        let product = 0;
        for (let c = 0; c < dims; c++) product += l[i * dims + c] * h[j * dims + c];
        expect(beta[n]).toBeCloseTo(product, 12);
        expect(gamma1[n]).toBe(s[n] * beta[n]);
        expect(gamma[n]).toBe(gamma1[n] - gamma2[n]);
      }
      expect(sum).toBeCloseTo(1, 12);
      for (let j = 0; j < columns; j++) expect(gamma2[i * columns + j]).toBeCloseTo(both * s[i * columns + j], 12);
    }
  });

  test('without rotation all goes through X = x1 x2^T: dX = scale a1^T gamma a2, dx1 = dX x2, dx2 = dX^T x1', () => {
    const args = training({ shape: heads, rotary: false, scale: 1 / 6 }, 72);
    const { gamma, dx1, dx2 } = gradientParts(args);
    const at = (x: Floats, rows: number) => new Matrix(Array.from({ length: rows }, (_, r) => Array.from(x.subarray((r * x.length) / rows, ((r + 1) * x.length) / rows))));
    const dX = at(args.a1, 23).transpose().mmul(at(gamma, 23)).mmul(at(args.a2, 31)).mul(1 / 6);
    expect(Float64Array.from(dX.mmul(at(args.x2, 5)).to1DArray())).toBeAllclose(dx1, close);
    expect(Float64Array.from(dX.transpose().mmul(at(args.x1, 5)).to1DArray())).toBeAllclose(dx2, close);
  });

  test('ranks of known cases', () => {
    // All scores 0: every row of s is 1/n, and gamma has the rank of a centred l h^T.
    const args = training({ shape: { ...one, valueDim: 3 } }, 73);
    const flat = gradientParts({ ...args, x1: new Float32Array(args.x1.length) });
    expect(flat.ranks).toEqual({ s: 1, l: 3, beta: 3, gamma1: 3, gamma2: 1, gamma: 3 });
    expect(flat.singularValues.s[0]).toBeCloseTo(1, 12);
    // Huge scores without rotation, every query at its own key: s is the identity.
    const identity = Float32Array.from({ length: 64 }, (_, n) => Number(n % 9 === 0));
    const own = { shape: { heads: 1, queryLength: 8, headDim: 8 }, rotary: false as const, scale: 1000 };
    const sharp = gradientParts({ ...own, a1: identity, a2: identity, a3: identity, x1: identity, x2: identity, y: identity, e: new Float32Array(64) });
    expect(sharp.ranks.s).toBe(8);
    for (const value of sharp.singularValues.s) expect(value).toBeCloseTo(1, 12);
    expect(gradientParts({ ...args, rankTolerance: 0.5 }).ranks.s).toBeLessThan(gradientParts(args).ranks.s);
  });

  describe('lowRank', () => {
    const shape = { heads: 1, queryLength: 60, keyLength: 70, headDim: 4, valueDim: 3 };
    const args = training({ shape }, 74, 0.5);

    test.each([0, 1, 2, 3])('degree %i: factors of the stated rank, within the bounds', (degree) => {
      const { lowRank, ...exact } = gradientParts({ ...args, degree });
      const { rank, u, v, rankBounds, errors } = lowRank!;
      expect(rank).toBe(theory.rank(4, degree));
      expect([u.length, v.length]).toEqual([60 * rank, 70 * rank]);
      const s = Float64Array.from({ length: 60 * 70 }, (_, n) => {
        const [i, j] = [Math.floor(n / 70), n % 70];
        let sum = 0;
        for (let r = 0; r < rank; r++) sum += u[i * rank + r] * v[j * rank + r];
        return sum;
      });
      expect(relativeFrobenius(s, exact.s)).toBeCloseTo(errors.s, 12);
      for (let i = 0; i < 60; i++) expect(s.subarray(i * 70, (i + 1) * 70).reduce((sum, x) => sum + x, 0)).toBeCloseTo(1, 12);
      // Generic coefficients: no monomial is spare.
      expect(numericalRank(singularValues(s, 60, 70), 1e-12)).toBe(Math.min(rank, 60));
      expect(rankBounds).toEqual({ s: rank, l: 3, beta: 3, gamma1: 3 * rank, gamma2: rank, gamma: 4 * rank });
    });

    test('errors fall with the degree, of every matrix', () => {
      const errors = [1, 2, 3, 4].map((degree) => gradientParts({ ...args, degree }).lowRank!.errors);
      for (const matrix of ['s', 'l', 'beta', 'gamma1', 'gamma2', 'gamma'] as const) {
        errors.slice(1).forEach((found, n) => expect(found[matrix]).toBeLessThan(errors[n][matrix] / 2));
      }
    });

    test('is what the engine computes, to the error of either', async () => {
      const attention = await createRopeAttention();
      for (const degree of [1, 2, 3]) {
        const { lowRank, l } = gradientParts({ ...args, degree });
        const { saved } = attention.attentionLoss({ ...args, method: 'polynomial', degree, onMiss: 'report' });
        const residual = saved.output.map((x, n) => x - args.e[n]);
        const error = relativeFrobenius(residual, l);
        expect(error / lowRank!.errors.l).toBeGreaterThan(0.5);
        expect(error / lowRank!.errors.l).toBeLessThan(2);
      }
      attention.dispose();
    });

    test('with a mask on the allowed pairs only', () => {
      const causal = { ...args, causal: true, queryOffset: 10, degree: 3 };
      const { lowRank, s } = gradientParts(causal);
      expect(lowRank!.errors.s).toBeLessThan(0.02);
      expect(s[69]).toBe(0);
    });
  });

  test.each([
    [{ shape: { ...heads, heads: 2 } }, 'gradientParts: is for one head'],
    [{ shape: { ...heads, batch: 2 } }, 'gradientParts: is for one head'],
    [{ shape: { ...heads, queryLength: 2 ** 20, keyLength: 2 ** 20 } }, 'gradientParts: matrices are queryLength x keyLength, at most'],
    [{ softcap: 5 }, 'gradientParts: has no softcap, got 5'],
    [{ degree: 9 }, 'gradientParts: degree must be an integer from 0 to 8, got 9'],
    [{ degree: 1.5 }, 'gradientParts: degree must be'],
    [{ degree: 8, shape: { heads: 1, queryLength: 4, headDim: 64 } }, 'gradientParts: the factors of degree 8 have'],
    [{ degree: 1, sinks: Float32Array.of(1) }, 'gradientParts: the factors have no sinks'],
    [{ degree: 1, relativePositions: new Float32Array(53) }, 'gradientParts: the factors have no relativePositions'],
    [{ rankTolerance: 1 }, 'gradientParts: rankTolerance must be'],
    [{ rankTolerance: NaN }, 'gradientParts: rankTolerance must be'],
    [{ a1: new Float32Array(3) }, 'gradientParts: a1 has 3 values, shape needs 115'],
    [{ e: new Float32Array(3) }, 'gradientParts: e has 3 values, shape needs 69'],
  ])('refuses %p', (change, message) => {
    const call = () => gradientParts({ ...training({ shape: heads }, 75), ...change } as GradientPartsArgs);
    expect(call).toThrow(RangeError);
    expect(call).toThrow(message);
  });
});

describe('singularValues', () => {
  test.each([
    [1, 1],
    [5, 5],
    [7, 3],
    [3, 7],
    [40, 40],
    [33, 64],
  ])('of random %i x %i matrices, as ml-matrix finds them', (rows, columns) => {
    const { normal } = random(rows);
    const a = Float64Array.from({ length: rows * columns }, normal);
    const copy = a.slice();
    const found = singularValues(a, rows, columns);
    expect(a).toEqual(copy);
    const other = new SVD(new Matrix(Array.from({ length: rows }, (_, r) => Array.from(a.subarray(r * columns, (r + 1) * columns)))), { autoTranspose: true });
    const expected = other.diagonal.slice(0, Math.min(rows, columns));
    expect(found).toBeAllclose(expected, { atol: 1e-13 * expected[0] });
  });

  test('of matrices that are known', () => {
    expect(singularValues(new Float64Array(12), 3, 4)).toEqual(new Float64Array(3));
    expect(singularValues(Float64Array.of(0, 2, 0, -3, 0, 0, 0, 0, 1e-9), 3, 3)).toBeAllclose([3, 2, 1e-9], { atol: 3e-15 });
    // All ones: rank 1, sqrt(rows columns)
    const ones = singularValues(new Float64Array(30).fill(1), 6, 5);
    expect(ones[0]).toBeCloseTo(Math.sqrt(30), 13);
    expect(numericalRank(ones, 1e-14)).toBe(1);
    expect(numericalRank(singularValues(new Float64Array(4), 2, 2), 1e-6)).toBe(0);
  });

  test('of a product of thin matrices: its rank, whatever the size', () => {
    for (const rank of [1, 4, 9]) {
      const { normal } = random(rank);
      const [x, y] = [Array.from({ length: 50 * rank }, normal), Array.from({ length: 60 * rank }, normal)];
      const a = Float64Array.from({ length: 50 * 60 }, (_, n) => {
        let sum = 0;
        for (let r = 0; r < rank; r++) sum += x[Math.floor(n / 60) * rank + r] * y[(n % 60) * rank + r];
        return sum;
      });
      expect(numericalRank(singularValues(a, 50, 60), 1e-12)).toBe(rank);
      expect(maxDifference(singularValues(a.map((v) => -3 * v), 50, 60), singularValues(a, 50, 60).map((v) => 3 * v))).toBeLessThan(1e-12 * 3 * singularValues(a, 50, 60)[0]);
    }
  });
});
