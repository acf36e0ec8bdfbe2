// SPDX-License-Identifier: MIT
//
// The Toeplitz engine: the polynomial engine's function times exp(bias), by Fourier transforms. Against the float64 reference
// where the polynomial is converged, against the polynomial engine at any degree, against its own derivative.

import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';

import { reference, theory } from '../dist/index.js';
import { fitToScores } from '../dist/polynomial.js';
import { readCall } from '../dist/validate.js';
import { createKernel, runEngine } from './engine.js';
import { add, binaries, describeSetting, draw, eachBinary, forwardArgs, fullShape, inner, lazy, lengths } from './support.js';
import { maxAbs, maxDifference, positionsBy, problem, random, relativeFrobenius, relativeMap, rotationMap, slopeError } from './support.js';
import type { Kernel } from '../dist/kernel.js';
import type { Problem, Random, Setting } from './support.js';

const uniform = (entry: number) => (r: Random) => entry * (2 * r.uniform() - 1);
const GRADIENTS = ['dq', 'dk', 'dv', 'dBias', 'dWeights'] as const;

/** Rough: no two entries have anything to do with one another. */
function roughBias({ shape, ofHeads = false, size = 1 }: { shape: Setting['shape']; ofHeads?: boolean; size?: number }) {
  const { heads, queryLength, keyLength } = fullShape(shape);
  const r = random(91);
  return draw((ofHeads ? heads : 1) * (queryLength + keyLength - 1), () => size * (2 * r.uniform() - 1));
}

/** exp about 0 for every key/value head. */
function taylor(degree: number, { shape }: Problem): Float32Array[] {
  const { batch, kvHeads } = fullShape(shape);
  return Array.from({ length: batch * kvHeads }, () => fitToScores([], degree));
}

const float32 = ({ output, lse }: Record<'output' | 'lse', Float64Array>) => ({ output: Float32Array.from(output), lse: Float32Array.from(lse) });

const toeplitz = (args: Problem) => ({ ...args, method: 'toeplitz' as const });

const long = { heads: 1, queryLength: 1500, keyLength: 1300, headDim: 4 };
const middle = { heads: 1, queryLength: 420, keyLength: 390, headDim: 4 };
const grouped = { batch: 2, heads: 4, kvHeads: 2, queryLength: 210, keyLength: 190, headDim: 6, valueDim: 5 };
const settings: Setting[] = [
  { shape: long, bias: roughBias({ shape: long }) },
  { shape: long, causal: true, bias: roughBias({ shape: long }) },
  { shape: long, window: [300, 100], queryOffset: 40, bias: roughBias({ shape: long }) },
  { shape: long, window: [30, 5] },
  { shape: grouped, bias: roughBias({ shape: grouped }) },
  { shape: grouped, bias: roughBias({ shape: grouped, ofHeads: true }), layout: 'bnhd', causal: true, queryOffset: -20 },
  { shape: grouped, rotary: { dim: 4, interleaved: true }, scale: -0.3, layout: 'bnhd' },
  { shape: { ...grouped, keyLength: 1 }, bias: roughBias({ shape: { ...grouped, keyLength: 1 } }) },
  { shape: { ...grouped, queryLength: 1, keyLength: 400 }, rotary: false },
  { shape: middle, relativePositions: positionsBy(middle, (t) => 1e4 * Math.sin(t)) },
  { shape: middle, causal: true, queryOffset: 9, relativePositions: positionsBy(middle, Math.cbrt, 9), bias: roughBias({ shape: middle }) },
  { shape: grouped, rotary: { dim: 4, interleaved: true }, relativePositions: positionsBy(grouped, Math.cbrt), layout: 'bnhd', window: [120, 30] },
  { shape: grouped, rotary: { dim: 2, scaling: { type: 'yarn', factor: 4, originalLength: 40 } }, relativePositions: positionsBy(grouped, Math.sin) },
  { shape: middle, relative: relativeMap(middle, 7, 1), scale: 0.2 },
  { shape: middle, relative: relativeMap(middle, 3, 2), causal: true, scale: -0.3, bias: roughBias({ shape: middle }) },
  { shape: grouped, relative: relativeMap(grouped, 12, 3), layout: 'bnhd', causal: true, queryOffset: -20, scale: 0.1, bias: roughBias({ shape: grouped, ofHeads: true }) },
  { shape: { ...grouped, keyLength: 1 }, relative: relativeMap({ ...grouped, keyLength: 1 }, 5, 4), scale: 0.3 },
];

const instances = settings.map((setting) => {
  const args = lazy(() => problem(setting, 92, uniform(0.2)));
  return { args, exact: lazy(() => ({ ...reference.forward(args()), ...reference.backward(args()) })), name: describeSetting(setting) };
});

describe.each(binaries)('$name', (binary) => {
  let kernel: Kernel;
  beforeAll(async () => {
    kernel = await createKernel(binary);
  });
  afterAll(() => kernel.dispose());

  // |s| <= 0.2^2 D / sqrt(D) = 0.1 at most: degree 3 leaves 4e-6, and rounding 2e-5 of dq, whose terms cancel.
  test.each(instances)('is attention: $name', (instance) => {
    const [args, exact] = [instance.args(), instance.exact()];
    const got = runEngine(kernel, toeplitz(args), taylor(3, args));
    expect(got.positive).toBe(true);
    expect(relativeFrobenius(got.output, exact.output)).toBeLessThan(1e-5);
    const seen = (x: Float32Array | Float64Array) => x.filter((_, i) => exact.lse[i] > -Infinity);
    expect(got.lse.map((x) => Number(x === -Infinity))).toEqual(Float32Array.from(exact.lse, (x) => Number(x === -Infinity)));
    expect(maxDifference(seen(got.lse), seen(exact.lse))).toBeLessThan(1e-5);
    for (const name of GRADIENTS) {
      if (got[name] && inner(exact[name]!, exact[name]!) > 0) expect(relativeFrobenius(got[name], exact[name]!)).toBeLessThan(5e-5);
    }
  });

  test.each([0, 1, 2, 3])('degree %d on plain rotation is the polynomial engine', (degree) => {
    const args = problem({ shape: { heads: 2, kvHeads: 1, queryLength: 300, keyLength: 400, headDim: 6 } }, 93, uniform(1));
    const coefficients = taylor(degree, args);
    const [got, expected] = [runEngine(kernel, toeplitz(args), coefficients), runEngine(kernel, args, coefficients)];
    for (const name of ['output', 'lse', 'dq', 'dk', 'dv'] as const) {
      if (degree === 0 && (name === 'dq' || name === 'dk')) expect(maxAbs(got[name])).toBe(0);
      else expect(relativeFrobenius(got[name], expected[name])).toBeLessThan(5e-6);
    }
  });

  // Of what does not factorise nothing is centred, so with the same coefficients both forms are the same polynomial.
  test.each([false, true])('a rotation as positions, in complex terms, and as matrices, in real ones: interleaved %s', (interleaved) => {
    const positions = positionsBy(grouped, (t) => 3 * Math.sin(t));
    const rotary = { dim: 4, interleaved };
    const args = problem({ shape: grouped, causal: true, queryOffset: 30 }, 106, uniform(0.8));
    const complex = runEngine(kernel, toeplitz({ ...args, rotary, relativePositions: positions }), taylor(2, args));
    const relative = rotationMap(grouped, positions, rotary);
    const real = runEngine(kernel, toeplitz({ ...args, rotary: false, relative }), taylor(2, args));
    for (const name of ['output', 'lse', 'dq', 'dk', 'dv'] as const) expect(relativeFrobenius(complex[name], real[name])).toBeLessThan(1e-5);
  });

  test('W_t = R_t, and positions i - j, are plain rotation', () => {
    const shape = { heads: 2, kvHeads: 1, queryLength: 300, keyLength: 400, headDim: 6 };
    const args = problem({ shape, queryOffset: 50 }, 107, uniform(0.2));
    const plain = runEngine(kernel, toeplitz(args), taylor(3, args));
    const relativePositions = positionsBy(shape, (t) => t, 50);
    const maps = [{ relativePositions }, { rotary: false as const, relative: rotationMap(shape, relativePositions) }];
    for (const map of maps) {
      const got = runEngine(kernel, toeplitz({ ...args, ...map }), taylor(3, args));
      for (const name of ['output', 'lse', 'dq', 'dk', 'dv'] as const) expect(relativeFrobenius(got[name], plain[name])).toBeLessThan(5e-5);
    }
  });

  test('a constant on the bias changes lse by itself and nothing else', () => {
    const bias = roughBias({ shape: grouped });
    const args = problem({ shape: grouped, bias }, 94, uniform(0.5));
    const [got, moved] = [args, { ...args, bias: bias.map((x) => x + 3) }].map((one) =>
      runEngine(kernel, toeplitz(one), taylor(2, args)),
    );
    expect(relativeFrobenius(moved.output, got.output)).toBeLessThan(1e-5);
    expect(relativeFrobenius(moved.lse.map((x) => x - 3), got.lse)).toBeLessThan(1e-5);
    for (const name of GRADIENTS) if (got[name]) expect(relativeFrobenius(moved[name]!, got[name])).toBeLessThan(3e-5);
  });

  test.each([
    ['causal', { causal: true, queryOffset: 10 }, (distance: number) => distance >= 0],
    ['a window', { window: [90, 70] as const, queryOffset: 10 }, (distance: number) => distance <= 90 && distance >= -70],
  ])('a bias of -Infinity is a mask: %s', (_, mask, allows) => {
    const { queryLength, keyLength } = fullShape(grouped);
    const distances = Array.from({ length: queryLength + keyLength - 1 }, (_, n) => n - keyLength + 1 + 10);
    const bias = Float32Array.from(distances, (distance) => (allows(distance) ? 0 : -Infinity));
    const args = problem({ shape: grouped, queryOffset: 10 }, 95, uniform(0.5));
    const got = runEngine(kernel, toeplitz({ ...args, bias }), taylor(2, args));
    const expected = runEngine(kernel, toeplitz({ ...args, ...mask }), taylor(2, args));
    for (const name of ['output', 'lse', 'dq', 'dk', 'dv'] as const) expect(got[name]).toEqual(expected[name]);
    expect(got.dBias!.every((x, n) => allows(distances[n]) || x === 0)).toBe(true);
  });

  describe('backward is the derivative of forward', () => {
    const args = problem({ shape: { ...long, queryLength: 400, keyLength: 300 }, causal: true }, 96, uniform(0.8));
    const full = { ...args, bias: roughBias(args) };
    test.each(['q', 'k', 'v', 'bias'] as const)('along a direction of %s', (name) => {
      const gradient = runEngine(kernel, toeplitz(full), taylor(2, args))[name === 'bias' ? 'dBias' : (`d${name}` as const)]!;
      const direction = draw(full[name].length, random(97).normal);
      const loss = (step: number) => {
        const moved = { ...full, [name]: add(full[name], step, direction) };
        return inner(runEngine(kernel, toeplitz(moved), taylor(2, args)).output, args.dOutput);
      };
      expect(slopeError(loss, gradient, direction, 0.05)).toBeLessThan(2e-3);
    });
  });

  describe('so it is with relative maps', () => {
    const shape = { ...long, queryLength: 400, keyLength: 300 };
    const plain = problem({ shape, causal: true, scale: 0.3 }, 108, uniform(0.8));
    const bias = roughBias({ shape });
    const map = relativeMap(shape, 5, 9);
    const positions = { ...plain, bias, relativePositions: positionsBy(shape, (t) => 40 * Math.sin(t)) };
    const matrices = { ...plain, bias, rotary: false as const, relative: map };
    const slope = (name: 'q' | 'k' | 'v' | 'bias', args: typeof positions | typeof matrices) => {
      const gradient = runEngine(kernel, toeplitz(args), taylor(3, args))[name === 'bias' ? 'dBias' : (`d${name}` as const)]!;
      const direction = draw(args[name].length, random(97).normal);
      const loss = (step: number) =>
        inner(runEngine(kernel, toeplitz({ ...args, [name]: add(args[name], step, direction) }), taylor(3, args)).output, args.dOutput);
      return slopeError(loss, gradient, direction, 0.05);
    };
    test.each(['q', 'k', 'v', 'bias'] as const)('along a direction of %s', (name) => {
      expect(slope(name, positions)).toBeLessThan(2e-3);
      expect(slope(name, matrices)).toBeLessThan(2e-3);
    });

    test('along a direction of the weights', () => {
      const gradient = runEngine(kernel, toeplitz(matrices), taylor(3, matrices)).dWeights!;
      const direction = draw(map.weights.length, random(98).normal);
      const loss = (step: number) => {
        const relative = { ...map, weights: add(map.weights, step, direction) };
        return inner(runEngine(kernel, toeplitz({ ...matrices, relative }), taylor(3, matrices)).output, matrices.dOutput);
      };
      expect(slopeError(loss, gradient, direction, 0.05)).toBeLessThan(2e-3);
    });
  });

  test('rows whose weights are not positive: zeros, lse -Infinity, no gradient', () => {
    const args = problem({ shape: { heads: 1, queryLength: 200, headDim: 4 }, rotary: false }, 98);
    const result = runEngine(kernel, toeplitz(args), [Float32Array.of(-1, 0, 0)]);
    expect(result.positive).toBe(false);
    expect(result.output.every((x) => x === 0) && result.lse.every((x) => x === -Infinity)).toBe(true);
    expect(result.dq.every((x) => x === 0)).toBe(true);
  });

  describe('biases that are far apart', () => {
    /** Entries by distance. */
    const byDistance = (length: number, bias: (t: number) => number) =>
      Float32Array.from({ length: 2 * length - 1 }, (_, n) => bias(n - length + 1));

    // What rows of weights e^-40 give to the gradient at other distances is e^40 times what comes of it in the end.
    test('a distance that outweighs near ones e^40 times: the gradient by its bias is right, and so are rows that do not see it', () => {
      const shape = { heads: 1, queryLength: 200, headDim: 2 };
      const bias = byDistance(200, (t) => (t < 64 ? 0 : t < 133 ? -Infinity : t === 133 ? 40 : 39));
      const args = problem({ shape, causal: true, bias }, 109, uniform(0.05));
      const exact = { ...reference.forward(args), ...reference.backward(args) };
      const got = runEngine(kernel, toeplitz(args), [fitToScores([], 3)]);
      expect(got.positive).toBe(true);
      expect(maxDifference(got.lse, exact.lse)).toBeLessThan(1e-5);
      expect(relativeFrobenius(got.dBias!, exact.dBias!)).toBeLessThan(5e-5);
      expect(relativeFrobenius(got.dBias!.slice(332), exact.dBias!.slice(332))).toBeLessThan(5e-5);
    });

    test('sums of weights of rows that do not see the largest ones are not differences of sums that do', () => {
      const shape = { heads: 1, queryLength: 200, keyLength: 200, headDim: 2 };
      const bias = byDistance(200, (t) => (t < -100 ? 40 : 0));
      const args = { ...problem({ shape, bias }, 110), q: new Float32Array(400) };
      const { lse } = runEngine(kernel, toeplitz(args), [Float32Array.of(1)]);
      expect(lse.slice(99)).toBeAllclose(new Float32Array(101).fill(Math.log(200)), { atol: 1e-6 });
    });

    test('weights below what floats hold are not taken for none', () => {
      const shape = { heads: 1, queryLength: 200, headDim: 2 };
      const args = problem({ shape, causal: true, bias: byDistance(200, (t) => (t < 100 ? 0 : 120)) }, 111, uniform(0.05));
      const got = runEngine(kernel, toeplitz(args), [fitToScores([], 3)]);
      expect(got.positive).toBe(false);
      expect([got.dq, got.dk, got.dv, got.dBias!].every((x) => x.every(Number.isFinite))).toBe(true);
      // nor where lse says what they add up to
      const { problem: own, inputs } = readCall('backward', { ...toeplitz(args), ...float32(reference.forward(args)) });
      const session = kernel.open('test', own, 'toeplitz');
      const bytes = session.workspaceBytes('backward', 3);
      session.load(inputs, 'backward', bytes);
      session.setEngine(3, Float32Array.from(fitToScores([], 3)));
      session.setWorkspace(bytes);
      expect(session.run('backward', 0, session.units('backward'))).toBe(false);
      session.close();
    });
  });

  // 2^17 queries: the first rows sum up a few keys, the last ones all; transforms are as inexact in both. Degree 5 leaves 3e-6 of a weight
  // at |s| <= 0.36; a log of 11.8 has a rounding of 5e-7.
  test.each([
    ['', (_: number) => 0],
    [', rotated by the root of the distance', Math.sqrt],
  ])('the first causal rows of a long sequence are as accurate as the last%s', (name, angle) => {
    const shape = { heads: 1, queryLength: 2 ** 17, headDim: 2, valueDim: 1 };
    const map = name === '' ? { rotary: false as const } : { relativePositions: positionsBy(shape, (t) => (t < 0 ? 0 : angle(t))) };
    const args = problem({ shape, causal: true, ...map }, 99, uniform(0.5));
    const { lse } = runEngine(kernel, toeplitz(args), [fitToScores([], 5)]);
    const angles = Float64Array.from({ length: 2 ** 17 }, (_, t) => Math.fround(angle(t)));
    const [cosines, sines] = [angles.map(Math.cos), angles.map(Math.sin)];
    const exact = (i: number) => {
      const [a, b] = [args.q[2 * i], args.q[2 * i + 1]];
      let sum = 0;
      for (let j = 0; j <= i; j++) {
        const [x, y] = [args.k[2 * j], args.k[2 * j + 1]];
        sum += Math.exp(Math.fround(1 / Math.sqrt(2)) * ((a * x + b * y) * cosines[i - j] + (a * y - b * x) * sines[i - j]));
      }
      return Math.log(sum);
    };
    const worst = (rows: number[]) => Math.max(...rows.map((i) => Math.abs(lse[i] - exact(i))));
    const first = worst(Array.from({ length: 300 }, (_, i) => i));
    const last = worst(Array.from({ length: 30 }, (_, i) => 2 ** 17 - 1 - 61 * i));
    expect(last).toBeLessThan(2e-6);
    expect(first).toBeLessThan(2e-6);
  });

  test('a call repeated gives the same bits', () => {
    const args = problem({ shape: grouped, bias: roughBias({ shape: grouped, ofHeads: true }) }, 100, uniform(0.5));
    expect(runEngine(kernel, toeplitz(args), taylor(1, args))).toEqual(runEngine(kernel, toeplitz(args), taylor(1, args)));
  });
});

const shape = { heads: 2, queryLength: 700, headDim: 8 };
const half = { heads: 2, kvHeads: 1, queryLength: 300, keyLength: 260, headDim: 6, valueDim: 5 };
const single = { heads: 1, queryLength: 400, headDim: 8 };
const clipped = (t: number) => Math.max(-90, Math.min(90, t));
const maps: [string, Setting, number][] = [
  ['clipped positions', { shape: single, causal: true, relativePositions: positionsBy(single, clipped) }, 25],
  ['rough positions of some dimensions', { shape: half, rotary: { dim: 4 }, queryOffset: -30, relativePositions: positionsBy(half, (t) => 1e3 * Math.sin(t)) }, 18],
  ['positions and bias', { shape: half, relativePositions: positionsBy(half, Math.cbrt), bias: roughBias({ shape: half, ofHeads: true }), layout: 'bnhd' }, 16],
  ['matrices', { shape: half, relative: relativeMap(half, 9, 5), scale: 0.2, window: [300, 40] }, 55],
  ['matrices in the causal half', { shape: half, relative: relativeMap(half, 6, 6), scale: 0.2, causal: true, queryOffset: 3 }, 28],
];
const mapped = maps.map(([name, setting, terms]) => {
  const args = lazy(() => problem(setting, 103, uniform(0.4)));
  const exact = lazy(() => ({ ...reference.forward(forwardArgs(args())), ...reference.backward(args()) }));
  return { name, setting, terms, args, exact };
});

const small = { heads: 2, kvHeads: 1, queryLength: 900, keyLength: 800, headDim: 6 };
const certifiable: [string, Setting][] = [
  ['a bias of each head', { shape: small, bias: roughBias({ shape: small, ofHeads: true }) }],
  ['causal', { shape: small, causal: true, queryOffset: -100 }],
  ['a window', { shape: small, window: [200, 300], bias: roughBias({ shape: small, size: 2 }) }],
  ['positions', { shape: small, relativePositions: positionsBy(small, (t) => 99 * Math.sin(t)), rotary: { dim: 4 } }],
  ['matrices', { shape: small, relative: relativeMap(small, 6, 9), scale: 0.2 }],
];
const certified = certifiable.map(([name, setting]) => {
  const args = lazy(() => {
    const made = problem(setting, 106, uniform(0.05));
    return { ...forwardArgs(made), v: made.v.map((x) => x + 1) };
  });
  return { name, args, exact: lazy(() => reference.forward(args()).output) };
});

eachBinary((attention) => {
  const make = lazy(() => {
    const args = problem({ shape, bias: roughBias({ shape }) }, 101, uniform(0.5));
    return { args, exact: { ...reference.forward(args), ...reference.backward(args) } };
  });

  test.each([1e-1, 1e-2, 1e-3, 1e-4])('keeps the tolerance %d, forward and backward', (tolerance) => {
    const { args, exact } = make();
    const { output, report } = attention().forward({ ...forwardArgs(args), method: 'toeplitz', tolerance });
    expect(maxDifference(output, exact.output)).toBeLessThan(tolerance * Math.max(...args.v.map(Math.abs)));
    expect(report).toMatchObject({ method: 'toeplitz', rank: theory.rank(8, report.degree!) });
    expect(report.errorEstimate).toBeLessThanOrEqual(tolerance);
    expect(report.reason).toMatch(/^toeplitz of degree \d \(rank \d+\): as asked, predicted .* than exact, sampled error/);
    const { report: gradients, ...got } = attention().backward({ ...args, method: 'toeplitz', tolerance });
    for (const name of GRADIENTS) if (exact[name]) expect(relativeFrobenius(got[name]!, exact[name])).toBeLessThan(tolerance);
    expect(gradients.method).toBe('toeplitz');
  });

  test.each(mapped)('relative maps keep tolerances, forward and backward: $name', ({ setting, terms, ...instance }) => {
    const [args, exact] = [instance.args(), instance.exact()];
    const complex = setting.relative ? '' : 'complex ';
    for (const tolerance of [1e-1, 1e-2, 1e-3]) {
      const { output, report } = attention().forward({ ...forwardArgs(args), method: 'toeplitz', tolerance });
      expect(maxDifference(output, exact.output)).toBeLessThan(tolerance * Math.max(...args.v.map(Math.abs)));
      expect(report.reason).toContain(`toeplitz of degree ${report.degree} (${report.rank} ${complex}term`);
      const { report: gradients, ...got } = attention().backward({ ...args, method: 'toeplitz', tolerance });
      for (const name of ['dq', 'dk', 'dv'] as const) expect(relativeFrobenius(got[name], exact[name]!)).toBeLessThan(tolerance);
      expect(gradients.errorEstimate).toBeLessThan(tolerance);
      for (const name of ['dBias', 'dWeights'] as const) {
        if (exact[name]) expect(relativeFrobenius(got[name]!, exact[name])).toBeLessThan(2 * tolerance); // not promised
      }
    }
    const planned = attention().plan({ ...args, method: 'toeplitz', degree: 2, onMiss: 'report' });
    expect(planned).toMatchObject({ method: 'toeplitz', degree: 2, rank: terms });
  });

  describe('the certificate', () => {
    // So high a degree that what is left is rounding.
    test.each(certified)('bounds the rounding: $name', (instance) => {
      for (const size of [1e-3, 1, 1e3]) {
        const args = { ...instance.args(), v: instance.args().v.map((x) => size * x) };
        const exact = instance.exact().map((x) => size * x);
        const { output, report } = attention().forward({ ...args, method: 'toeplitz', degree: 4, tolerance: 0.5, guarantee: 'certified' });
        const worst = maxDifference(output, exact) / size;
        expect(report.errorBound).toBeGreaterThan(worst / 2); // L is 2 to 5
        expect(report.errorBound).toBeLessThan(0.02);
        expect(worst).toBeLessThan(1e-5);
      }
    });

    test.each([4096, 65536])('1e-3 can be certified at N = %d, entries up to 0.3', (length) => {
      for (const headDim of length < 1e4 ? [8, 16] : [16]) {
        const shape = { heads: 1, queryLength: length, headDim };
        for (const map of [{ bias: roughBias({ shape }) }, { relativePositions: positionsBy(shape, (t) => 99 * Math.sin(t)) }]) {
          const args = forwardArgs(problem({ shape, ...map }, 107, uniform(0.3)));
          const { errorBound, degree } = attention().plan({ ...args, method: 'toeplitz', guarantee: 'certified' });
          expect(errorBound).toBeLessThanOrEqual(1e-3);
          expect(degree).toBe(2);
        }
      }
    });

    test('there is none where a row sees next to nothing of what its block is about', () => {
      const bias = new Float32Array(1699).map((_, n) => (n < 500 ? 0 : -30));
      const args = forwardArgs(problem({ shape: small, bias }, 108, uniform(0.05)));
      expect(() => attention().forward({ ...args, method: 'toeplitz', guarantee: 'certified' })).toThrow('is certified to');
      expect(attention().plan({ ...args, method: 'toeplitz', degree: 2, onMiss: 'report' }).errorBound).toBeNull();
    });

    test('nor where near keys, which are exact, have weights at the end of float32', () => {
      const bias = new Float32Array(2 * 200 - 1).map((_, n) => (n < 199 + 64 ? -50 : 0));
      const args = forwardArgs(problem({ shape: { heads: 1, queryLength: 200, headDim: 2 }, causal: true, bias }, 112, uniform(0.05)));
      expect(attention().plan({ ...args, method: 'toeplitz', degree: 2, onMiss: 'report' }).errorBound).toBeNull();
    });
  });

  test('`auto` takes relative maps to where they are cheaper, and says how many terms they have', () => {
    const large = { heads: 1, queryLength: 8000, headDim: 4 };
    for (const map of [{ relativePositions: positionsBy(large, (t) => 99 * Math.sin(t)) }, { relative: relativeMap(large, 4, 7), scale: 0.2 }]) {
      const args = forwardArgs(problem({ shape: large, ...map }, 104, uniform(0.5)));
      const exact = attention().forward({ ...args, method: 'exact' });
      const { output, report } = attention().forward({ ...args, tolerance: 1e-2 });
      expect(report.reason).toMatch(/^toeplitz of degree \d \(\d+ (complex )?terms?\): predicted .*x cheaper than exact, sampled error/);
      expect(maxDifference(output, exact.output)).toBeLessThan(1e-2 * Math.max(...args.v.map(Math.abs)));
    }
    const few = positionsBy(large, (t) => Math.min(t, 50)); // constant far away: plain products
    const args = forwardArgs(problem({ shape: large, relativePositions: few, causal: true }, 104, uniform(1.5)));
    expect(attention().plan(args).reason).toMatch(/^relativePositions are 2 straight lines, each a plain rotation/);
    const planned = attention().plan({ ...args, bias: new Float32Array(15999) }); // which is not for pieces
    expect(planned.method).toBe('exact');
  });

  test('a degree with more terms than can be counted is no candidate, and a RangeError where it is forced', () => {
    const wide = { heads: 1, queryLength: 40, headDim: 64 };
    const args = { ...forwardArgs(problem({ shape: wide }, 105, uniform(0.1))), method: 'toeplitz' as const };
    expect(attention().forward({ ...args, tolerance: 1e-1 }).report.method).toBe('toeplitz');
    expect(() => attention().forward({ ...args, degree: 8 })).toThrow(RangeError);
    expect(attention().forward({ ...args, degree: 1, onMiss: 'report' }).report.rank).toBe(65);
    const relative = relativeMap(wide, 1025, 8);
    expect(() => attention().forward({ ...args, relative })).toThrow(
      "forward: method 'toeplitz' has no relative.support of more than 1024 pairs; 'auto' and 'exact' have it",
    );
    expect(attention().plan({ ...args, relative, method: 'auto' }).method).toBe('exact');
  });

  test('`auto` computes a bias exactly where that is cheaper, and where it must', () => {
    const { args } = make();
    expect(attention().forward(forwardArgs(args)).report).toMatchObject({ method: 'exact' });
    const infinite = args.bias!.map((x, n) => (n === 5 ? Infinity : x));
    expect(attention().plan({ ...forwardArgs(args), bias: infinite }).reason).toBe(
      'exact: bias holds NaN or Infinity, which no Fourier transform stands',
    );
  });

  test('`auto` takes Fourier transforms where they are cheaper', () => {
    const large = { heads: 1, queryLength: 6000, headDim: 4 };
    const args = forwardArgs(problem({ shape: large, bias: roughBias({ shape: large }) }, 102, uniform(0.5)));
    const exact = attention().forward({ ...args, method: 'exact' });
    const { output, report } = attention().forward({ ...args, tolerance: 1e-2 });
    expect(report.method).toBe('toeplitz');
    expect(report.reason).toMatch(/^toeplitz of degree \d \(rank \d+\): predicted .*x cheaper than exact/);
    expect(maxDifference(output, exact.output)).toBeLessThan(1e-2 * Math.max(...args.v.map(Math.abs)));
    const planned = attention().plan({ ...args, tolerance: 1e-2 });
    expect(planned).toMatchObject({ method: 'toeplitz', degree: report.degree });
    const certified = attention().plan({ ...args, tolerance: 1e-2, guarantee: 'certified' });
    expect(certified.errorBound).toBeLessThanOrEqual(1e-2);
    expect(certified.reason).toMatch(/^toeplitz of degree \d .*certified error .* within 0.01/);
  });

  test('biases too far apart for float32 transforms are seen', () => {
    const { args } = make();
    const bias = args.bias!.map((_, n) => (n < 3 ? 40 : 0)); // three distances outweigh all others e^40 times
    const wide = { ...forwardArgs(args), bias };
    expect(() => attention().forward({ ...wide, method: 'toeplitz', degree: 3 })).toThrow(RangeError);
    const { output, report } = attention().forward({ ...wide, degree: 0 });
    expect(report.method).toBe('exact');
    expect(maxDifference(output, reference.forward(wide).output)).toBeLessThan(1e-5);
  });

  // Ten rows of 300 do not see the distance that outweighs all others e^20 times: drawn rows hardly ever are among them.
  test.each([0, 1, 2, 3, 4, 5])('rows that a bias leaves next to nothing are looked at: seed %d', (seed) => {
    const bias = new Float32Array(599).map((_, n) => (n === 299 - 10 ? 20 : 0));
    const args = forwardArgs(problem({ shape: { heads: 1, queryLength: 300, headDim: 4 }, bias }, 113, uniform(0.2)));
    const call = { ...args, seed, tolerance: 1e-2 };
    expect(() => attention().forward({ ...call, method: 'toeplitz', degree: 3 })).toThrow('misses the tolerance');
    const { output, report } = attention().forward({ ...call, degree: 3, method: 'toeplitz', onMiss: 'report' });
    const worst = maxDifference(output, reference.forward(args).output);
    expect(worst).toBeGreaterThan(0.1);
    expect(report.errorEstimate).toBeGreaterThan(1e-2);
  });

  test('a miss is an error, or a report; memory that does not suffice is named', () => {
    const { args } = make();
    const forced = { ...forwardArgs(args), method: 'toeplitz', degree: 0, tolerance: 1e-5 } as const;
    expect(() => attention().forward(forced)).toThrow("method 'toeplitz' misses the tolerance 0.00001");
    expect(attention().forward({ ...forced, onMiss: 'report' }).report.errorEstimate).toBeGreaterThan(1e-5);
    expect(attention().forward({ ...forced, degree: 3, tolerance: 1e-2 }).output.length).toBe(lengths(shape).output);
  });
});
