// SPDX-License-Identifier: MIT
//
// Biases by decaying states: the fit at every distance, then the polynomial engine with a bias against the float64 reference, its
// gradients against differences, and what `auto` makes of biases that decays fit or do not fit.

import { describe, expect, test } from '@jest/globals';

import { reference } from '../dist/index.js';
import { fitDecays } from '../dist/decays.js';
import { DecayFits } from '../dist/states.js';
import { readCall } from '../dist/validate.js';
import { add, describeSetting, eachBinary, forwardArgs, fullShape, inner } from './support.js';
import { maxDifference, problem, random, relativeFrobenius, slopeError } from './support.js';
import { instance } from './promise/instances.mjs';
import type { Random, Setting } from './support.js';

const uniform = (entry: number) => (r: Random) => entry * (2 * r.uniform() - 1);
const GRADIENTS = ['dq', 'dk', 'dv', 'dBias'] as const;

/** T5's buckets with maxDistance 128. */
const bucket = (t: number) => (t < 16 ? t : Math.min(31, 16 + Math.floor((Math.log(t / 16) / Math.log(8)) * 16)));
const swish = (x: number) => x / (1 + Math.exp(-1.7 * x));

/** Biases by distance, of the kinds that are learned. */
const SMOOTH: Record<string, (t: number) => number> = {
  'power law': (t) => -0.5 * Math.log1p(t),
  'logarithmic (KERPLE)': (t) => -1.7 * Math.log1p(0.1 * t),
  'root': (t) => -0.1 * Math.sqrt(t),
  'like FIRE': (t) => {
    const x = Math.log1p(0.1 * t) / Math.log1p(6553.6);
    return -1.5 * swish(1.3 * x - 0.3) + 1.1 * swish(0.8 - 2.1 * x) - 2 * swish(3 * x - 1.5);
  },
  'T5': (t) => 0.4 * Math.sin(2.3 * bucket(t)) - 0.06 * bucket(t),
  'linear': (t) => 2 - 0.003 * t,
  'constant': () => 1.25,
};

const rough = (() => {
  const r = random(111);
  return Array.from({ length: 4096 }, () => 2 * r.uniform() - 1);
})();

/** The bias array of a shape; those of later heads are flatter. */
function biasOf(setting: Setting, f: (t: number) => number, ofHeads = false): Float32Array {
  const { heads, queryLength, keyLength } = fullShape(setting.shape);
  const length = queryLength + keyLength - 1;
  return Float32Array.from({ length: (ofHeads ? heads : 1) * length }, (_, n) => {
    const t = (n % length) - keyLength + 1 + (setting.queryOffset ?? 0);
    return t < 0 ? rough[-t % 4096] : f(t) / (1 + Math.floor(n / length));
  });
}

describe('the fit', () => {
  const LENGTH = 65_536;
  const lags = (f: (t: number) => number) => ({ bias: Float32Array.from({ length: LENGTH }, (_, t) => f(t)), first: 0, from: 0, to: LENGTH - 1 });
  const cost = (count: number, near: number) => count + near / 200;

  test.each(Object.entries(SMOOTH))('%s: within its error at every distance', (_, f) => {
    const own = lags(f);
    const { decays } = fitDecays([own], 1.6e-3, cost, true);
    expect(decays).not.toBeNull();
    const { near, count, rates, weights, tops, error } = decays!;
    expect(error).toBeLessThan(1.6e-3);
    let [worst, sum] = [0, 0];
    for (let t = 0; t < LENGTH; t++) {
      const exact = Math.exp(own.bias[t] - tops[0]);
      sum += exact;
      if (t < near) continue;
      let got = 0;
      for (let n = 0; n < count; n++) got += weights[n] * Math.exp(-rates[n] * (t - near));
      worst = Math.max(worst, Math.abs(got - exact) / Math.max(exact, sum / (8 * (t + 1))));
    }
    expect(worst).toBeLessThanOrEqual(error * (1 + 1e-6));
    expect(worst).toBeGreaterThan(error * (1 - 1e-6) - 1e-9);
  });

  test('one decay for what is linear, constant or in buckets; more for a power law, fewer beyond a wider band', () => {
    const count = (f: (t: number) => number, nears: typeof cost) => fitDecays([lags(f)], 1.6e-3, nears, true).decays!;
    for (const kind of ['linear', 'constant', 'T5']) expect(count(SMOOTH[kind], cost).count).toBe(1);
    expect(count(SMOOTH['T5'], cost).near).toBe(128);
    const wide = count(SMOOTH['power law'], (count) => count);
    const narrow = count(SMOOTH['power law'], (count, near) => near + count / 100);
    expect([wide.near > narrow.near, wide.count < narrow.count]).toEqual([true, true]);
    expect(narrow.count).toBeGreaterThan(3);
  });

  test('heads are padded to as many decays', () => {
    const { decays } = fitDecays([lags(SMOOTH['linear']), lags(SMOOTH['power law'])], 1.6e-3, cost, true);
    const { count, rates, weights } = decays!;
    expect([rates.length, weights.length]).toEqual([2 * count, 2 * count]);
    expect(weights.subarray(0, count).filter((weight) => weight !== 0).length).toBe(1);
  });

  test.each([
    ['rough', (t: number) => rough[t % 4096]],
    ['masked far away', (t: number) => (t > 3000 ? -Infinity : 0)],
    ['NaN', (t: number) => (t === 3001 ? NaN : 0)],
    ['Infinity', (t: number) => (t === 3001 ? Infinity : 0)],
    ['a step', (t: number) => (t > 30_000 ? 1 : 0)],
    ['a wave', (t: number) => Math.sin(t / 500)],
  ])('none: %s', (_, f) => {
    expect(fitDecays([lags(f)], 1.6e-3, cost, true).decays).toBeNull();
  });

  // The tail of a steep power law counts for nothing beside what is near, unless that is masked.
  test('errors are relative to what is in sight', () => {
    const own = lags(SMOOTH['logarithmic (KERPLE)']);
    expect(fitDecays([own], 1.6e-3, cost, true).decays!.floored).toBe(true);
    expect(fitDecays([own], 5e-2, cost, false).decays!.floored).toBe(false);
  });
});

describe('what an instance has found', () => {
  const shape = { heads: 1, queryLength: 300, headDim: 4 };
  const args = { ...problem({ shape, causal: true, bias: biasOf({ shape }, SMOOTH['power law']) }, 121, uniform(0.5)), method: 'polynomial', tolerance: 1e-2 } as const;
  const found = (fits: DecayFits, more: object = {}) => readCall('backward', { ...args, ...more }, fits).problem.decays;

  test('serves the next call with the same bias, of this instance only, until it is disposed of', () => {
    const [one, other] = [new DecayFits(), new DecayFits()];
    const first = found(one);
    expect(first).not.toBeNull();
    expect(readCall('forward', forwardArgs(args), one).problem.decays).toBe(first);
    expect(found(other)).not.toBe(first);
    expect(found(other)).toEqual(first);
    expect(found(one, { tolerance: 2e-2 })).not.toBe(first);
    const again = found(one);
    one.clear();
    expect(found(one)).not.toBe(again);
  });
});

const plain = { heads: 1, queryLength: 700, headDim: 8 };
const grouped = { batch: 2, heads: 4, kvHeads: 2, queryLength: 330, keyLength: 390, headDim: 6, valueDim: 5 };
const settings: (Setting & { kind: string; ofHeads?: boolean })[] = [
  ...Object.keys(SMOOTH).map((kind) => ({ kind, shape: plain })),
  { kind: 'power law', shape: grouped, queryOffset: 60 },
  { kind: 'power law', shape: grouped, queryOffset: 60, ofHeads: true, layout: 'bnhd' },
  { kind: 'like FIRE', shape: grouped, queryOffset: -40, ofHeads: true, scale: -0.3 },
  { kind: 'power law', shape: { ...grouped, keyLength: 200 }, queryOffset: 30 },
  { kind: 'T5', shape: plain, window: [500, 0] },
  { kind: 'root', shape: plain, rotary: { dim: 4, interleaved: true } },
  { kind: 'linear', shape: { heads: 1, queryLength: 30, keyLength: 700, headDim: 8 }, queryOffset: 670 },
  { kind: 'linear', shape: { heads: 2, queryLength: 90, keyLength: 50, headDim: 8 } },
  { kind: 'constant', shape: { heads: 1, queryLength: 1, headDim: 4 } },
  { kind: 'linear', shape: { heads: 1, queryLength: 40, headDim: 4 }, queryOffset: -50 },
];

eachBinary((attention) => {
  test.each(settings.map(({ kind, ofHeads, ...setting }) => ({ kind, ofHeads, setting, name: `${kind}: ${describeSetting(setting)}` })))(
    'keeps the tolerance, $name',
    ({ kind, ofHeads, setting }) => {
      const bias = biasOf(setting, SMOOTH[kind], ofHeads);
      const args = { ...problem({ ...setting, causal: true, bias }, 112, uniform(0.5)), method: 'polynomial', tolerance: 1e-2 } as const;
      const exact = { ...reference.forward(args), ...reference.backward(args) };
      const { output, lse, report } = attention().forward({ ...forwardArgs(args), tolerance: 1e-2 });
      expect(report.method).toBe('polynomial');
      expect(report.reason).toMatch(/decaying states? fits? the bias beyond distance (64|128|256)/);
      expect(maxDifference(output, exact.output)).toBeLessThan(1e-2 * Math.max(...args.v.map(Math.abs)));
      const seen = (x: Float32Array | Float64Array) => x.filter((_, i) => exact.lse[i] > -Infinity);
      expect(maxDifference(seen(lse), seen(exact.lse))).toBeLessThan(2e-2);
      const got = attention().backward(args);
      for (const name of GRADIENTS) {
        if (inner(exact[name]!, exact[name]!) > 1e-12) expect(relativeFrobenius(got[name]!, exact[name]!)).toBeLessThan(1e-2);
      }
    },
  );

  // Near entries are exact; far ones go by one decay, which is the bias itself to rounding.
  test('at high degree a linear bias is attention', () => {
    const args = { ...problem({ shape: plain, causal: true, bias: biasOf({ shape: plain }, SMOOTH['linear']) }, 113, uniform(0.2)), method: 'polynomial', tolerance: 1e-4, degree: 4 } as const;
    const exact = { ...reference.forward(args), ...reference.backward(args) };
    const got = { ...attention().forward(forwardArgs(args)), ...attention().backward(args) };
    expect(relativeFrobenius(got.output, exact.output)).toBeLessThan(1e-5);
    for (const name of ['dq', 'dk', 'dv'] as const) expect(relativeFrobenius(got[name], exact[name])).toBeLessThan(5e-5);
    expect(relativeFrobenius(got.dBias!, exact.dBias!)).toBeLessThan(5e-5); // of degree 2 beyond distance 96
  });

  test('a linear bias is ALiBi, and the sum of its gradient that of the slope', () => {
    const slopes = Float32Array.of(0.01, 0.002);
    const shape = { heads: 2, queryLength: 400, headDim: 8 };
    const bias = Float32Array.from({ length: 2 * 799 }, (_, n) => -slopes[Math.floor(n / 799)] * ((n % 799) - 399));
    const args = { ...problem({ shape, causal: true }, 114, uniform(0.5)), method: 'polynomial', degree: 3, onMiss: 'report' } as const;
    const by = (more: object) => ({ ...attention().forward({ ...forwardArgs(args), ...more }), ...attention().backward({ ...args, ...more }) });
    const [got, alibi] = [by({ bias }), by({ alibi: slopes })];
    for (const name of ['output', 'dq', 'dk', 'dv'] as const) expect(relativeFrobenius(got[name], alibi[name])).toBeLessThan(2e-3);
    const sums = [0, 1].map((head) => {
      let sum = 0;
      for (let t = 0; t < 400; t++) sum -= t * got.dBias![head * 799 + 399 + t];
      return sum;
    });
    expect(maxDifference(Float64Array.from(sums), alibi.dAlibi!)).toBeLessThan(2e-2 * Math.max(...alibi.dAlibi!.map(Math.abs)));
  });

  test('a constant on the bias changes lse by itself and nothing else', () => {
    const bias = biasOf({ shape: plain }, SMOOTH['power law']);
    const args = { ...problem({ shape: plain, causal: true, bias }, 115, uniform(0.5)), method: 'polynomial', degree: 2, tolerance: 1e-2 } as const;
    const by = (bias: Float32Array) => ({ ...attention().forward({ ...forwardArgs(args), bias }), ...attention().backward({ ...args, bias }) });
    const [got, moved] = [by(bias), by(bias.map((x) => x + 3))];
    expect(relativeFrobenius(moved.output, got.output)).toBeLessThan(1e-5);
    expect(maxDifference(moved.lse.map((x) => x - 3), got.lse)).toBeLessThan(1e-5);
    for (const name of GRADIENTS) expect(relativeFrobenius(moved[name]!, got[name]!)).toBeLessThan(1e-4);
  });

  test.each(['power law', 'T5'])('dBias is the derivative along a smooth direction: %s', (kind) => {
    const bias = biasOf({ shape: plain }, SMOOTH[kind]);
    const args = { ...problem({ shape: plain, causal: true, bias }, 116, uniform(0.5)), method: 'polynomial', degree: 3, tolerance: 1e-3, onMiss: 'report' } as const;
    const { dBias } = attention().backward(args);
    const direction = biasOf({ shape: plain }, (t) => (kind === 'T5' ? Math.cos(bucket(t)) : Math.log1p(t)));
    direction.fill(0, 0, 699);
    const loss = (step: number) => inner(attention().forward({ ...forwardArgs(args), bias: add(bias, step, direction) }).output, args.dOutput);
    expect(slopeError(loss, dBias!, direction, 0.05)).toBeLessThan(2e-2);
  });

  test('biases that no decays fit: an error, or another engine', () => {
    const shape = { heads: 1, queryLength: 700, headDim: 4 };
    const args = forwardArgs(problem({ shape, causal: true }, 117, uniform(0.5)));
    const forced = (bias: Float32Array, more: object = {}) => () => attention().forward({ ...args, bias, method: 'polynomial', ...more });
    const smooth = biasOf({ shape }, SMOOTH['power law']);
    expect(forced(biasOf({ shape }, (t) => rough[t]))).toThrow(/^forward: method 'polynomial' needs a bias that is a sum of a few decays far away/);
    const wave = biasOf({ shape }, (t) => -2 * Math.cos(t / 150));
    expect(forced(wave, { tolerance: 1e-4 })).toThrow(/the best of 8 or fewer is off by \d\.\de-\d, above 3\.3e-5$/);
    expect(forced(smooth.map((x, n) => (n > 1200 ? -Infinity : x)))).toThrow(RangeError);
    expect(forced(smooth.map((x, n) => (n === 699 ? -Infinity : x)))).toThrow(RangeError); // distance 0
    expect(forced(smooth, { causal: false })).toThrow("method 'polynomial' has no bias without causal");
    expect(forced(smooth, { alibi: Float32Array.of(1) })).toThrow("method 'polynomial' has no bias beside alibi");
    expect(forced(smooth, { segments: [0, 300] })).toThrow("method 'polynomial' has no bias beside segments");
    expect(forced(smooth, { tolerance: 1e-2 })().report.method).toBe('polynomial'); // the instance still works
    const masked = smooth.map((x, n) => (n > 1200 ? -Infinity : x));
    const { output, report } = attention().forward({ ...args, bias: masked });
    expect(report.method).not.toBe('polynomial');
    expect(maxDifference(output, reference.forward({ ...args, bias: masked }).output)).toBeLessThan(1e-3);
  });

  test('`auto` takes states where the bias is smooth, Fourier transforms where it is rough, and says so', () => {
    const shape = { heads: 1, queryLength: 24_000, headDim: 8 };
    const args = forwardArgs(problem({ shape, causal: true }, 118, uniform(0.5)));
    const auto = (f: (t: number) => number, more: object = {}) => attention().plan({ ...args, bias: biasOf({ shape }, f), tolerance: 1e-2, ...more });
    const states = auto(SMOOTH['power law']);
    expect(states.method).toBe('polynomial');
    expect(states.reason).toMatch(/^polynomial of degree \d \(rank \d+\): [2-8] decaying states fit the bias beyond distance \d+ to \d\.\de-[34], predicted .*x cheaper than exact/);
    expect(auto(SMOOTH['T5']).reason).toMatch(/: one decaying state fits the bias beyond distance 128, predicted/);
    const transforms = auto((t) => rough[t % 4096]);
    expect(transforms.method).not.toBe('polynomial');
    if (transforms.method === 'toeplitz') expect(transforms.reason).toMatch(/: no 8 decaying states fit the bias, predicted/);
    const masked = auto((t) => (t < 5000 ? 0 : -Infinity));
    expect(masked.method).not.toBe('polynomial');
  });

  test('certified: the error of the fit is in the bound', () => {
    const shape = { heads: 1, queryLength: 900, headDim: 4 };
    const args = forwardArgs(problem({ shape, causal: true }, 119, uniform(0.3)));
    const bound = (f: (t: number) => number) => {
      const bias = biasOf({ shape }, f);
      const { output, report } = attention().forward({ ...args, bias, method: 'polynomial', tolerance: 2e-2, guarantee: 'certified', degree: 2 });
      expect(maxDifference(output, reference.forward({ ...args, bias }).output)).toBeLessThan(report.errorBound! * Math.max(...args.v.map(Math.abs)));
      return report.errorBound!;
    };
    const [linear, power] = [bound(SMOOTH['linear']), bound(SMOOTH['power law'])];
    expect(power - linear).toBeGreaterThan(5e-4);
    expect(power).toBeLessThan(2e-2);
  });

  // Most of what degree 2 leaves in dBias is at the few distances between the largest queries and keys: 3.0e-2 of 4.0e-2, where
  // distances drawn blindly show 0.9e-2.
  test('large scores at single distances are seen', () => {
    const shape = { heads: 1, queryLength: 400, headDim: 4 };
    const bias = biasOf({ shape }, (t) => -0.6 * Math.log1p(0.3 * t));
    const args = { ...instance({ kind: 'heavy tails', bound: 1, seed: 8, shape, causal: true }), bias };
    const { dBias, report } = attention().backward({ ...args, method: 'polynomial', degree: 6, tolerance: 1e-2, onMiss: 'report' });
    const error = relativeFrobenius(dBias!, reference.backward(args).dBias!);
    expect(error).toBeGreaterThan(1e-2);
    expect(report.gradientErrorEstimate).toBeGreaterThan(0.5 * error);
    expect(attention().backward({ ...args, tolerance: 1e-2 }).report.method).toBe('exact');
  });

  test('a call repeated gives the same bits', () => {
    const bias = biasOf({ shape: grouped }, SMOOTH['power law'], true);
    const args = { ...problem({ shape: grouped, causal: true, bias, queryOffset: 60 }, 120, uniform(0.5)), method: 'polynomial', tolerance: 1e-2 } as const;
    const [one, other] = [attention().backward(args), attention().backward(args)];
    for (const name of GRADIENTS) expect(other[name]).toEqual(one[name]);
  });
});
