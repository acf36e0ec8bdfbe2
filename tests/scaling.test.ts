// SPDX-License-Identifier: MIT
//
// Rotary frequencies for long sequences: against values worked out from the formulas for configurations of real models, in
// their limits, and that attention turns by them.

import { describe, expect, test } from '@jest/globals';

import { reference, rotaryFrequencies } from '../dist/index.js';
import type { RotaryScaling } from '../dist/index.js';
import { eachBinary, forwardArgs, maxAbs, maxDifference, problem } from './support.js';

type Linear = Extract<RotaryScaling, { type: 'linear' }>;
const linear = (factor: number): Linear => ({ type: 'linear', factor });

interface Model {
  model: string;
  dim: number;
  base: number;
  scaling: RotaryScaling;
  length?: number;
  attentionFactor: number;
  /** By pair. */
  frequencies: Record<number, number>;
}

const LISTS = {
  shortFactor: Array.from({ length: 48 }, (_, p) => 1 + p / 100),
  longFactor: Array.from({ length: 48 }, (_, p) => 1 + p * 1.25),
};

/** theta = base^(-2p/dim), L = originalLength, turns over it L theta / 2 pi; each value by the formula beside it. */
const MODELS: Model[] = [
  {
    // theta / 4
    model: 'Vicuna 13B v1.5 16k',
    dim: 128,
    base: 10000,
    scaling: linear(4),
    attentionFactor: 1,
    frequencies: { 0: 0.25, 1: 0.21649108084001634, 63: 2.8869549617236455e-5 },
  },
  {
    model: 'DeepSeek Coder 6.7B',
    dim: 128,
    base: 100000,
    scaling: linear(4),
    attentionFactor: 1,
    frequencies: { 0: 0.25, 1: 0.20884063673945655, 63: 2.992712576239325e-6 },
  },
  {
    // base (2 * 65536 / 32768 - 1)^(128/126) = 1e6 * 3^(64/63) = 3052773.67...
    model: 'InternLM2 7B at twice its length',
    dim: 128,
    base: 1000000,
    scaling: { type: 'dynamic', factor: 2, originalLength: 32768, length: 65536 },
    attentionFactor: 1,
    frequencies: { 0: 1, 1: 0.7919114945129184, 63: 4.136459202505732e-7 },
  },
  {
    // 10000 * 7^(64/63) = 72195.86...; the slowest pair is 7 times slower
    model: 'Llama 2 7B at four times its length',
    dim: 128,
    base: 10000,
    scaling: { type: 'dynamic', factor: 2, originalLength: 4096 },
    length: 16384,
    attentionFactor: 1,
    frequencies: { 0: 1, 1: 0.8396257425643114, 63: 10000 ** (-126 / 128) / 7 },
  },
  {
    // The ramp is from floor(23.596) to ceil(39.651): pair 24 is divided by a seventeenth part, pair 32 by nine
    model: 'Qwen2.5 7B at 131072',
    dim: 128,
    base: 1000000,
    scaling: { type: 'yarn', factor: 4, originalLength: 32768 },
    attentionFactor: 1.138629436111989, // 0.1 ln 4 + 1
    frequencies: {
      0: 1,
      22: 0.008659643233600654,
      23: 0.006978305848598663,
      24: 0.005375321490790102, // theta (16/17 + 1/17/4)
      32: 0.0006029411764705882, // 1e-3 (8/17 + 9/17/4)
      39: 6.490394320837029e-5,
      40: 4.445698525097307e-5, // theta / 4
      63: 3.102344401879299e-7,
    },
  },
  {
    // From floor(10.47) to ceil(22.51); the two magnitudes are equal
    model: 'DeepSeek V3',
    dim: 64,
    base: 10000,
    scaling: { type: 'yarn', factor: 40, originalLength: 4096, betaFast: 32, betaSlow: 1, mscale: 1, mscaleAllDim: 1 },
    attentionFactor: 1,
    frequencies: {
      0: 1,
      9: 0.07498942093324558,
      10: 0.05623413251903491,
      11: 0.03900692656714386,
      16: 0.0055, // 1e-2 (7/13 + 6/13/40)
      22: 0.0001778279410038922,
      23: 3.33380358040831e-5,
      24: 2.5e-5, // 1e-3 / 40
      31: 3.3338035804083097e-6,
    },
  },
  {
    // From 8.0928 to 17.398, not rounded
    model: 'gpt-oss',
    dim: 64,
    base: 150000,
    scaling: { type: 'yarn', factor: 32, originalLength: 4096, truncate: false },
    attentionFactor: 1.3465735902799727, // 0.1 ln 32 + 1
    frequencies: {
      0: 1,
      8: 0.050813274815461475,
      9: 0.03170569618466377,
      12: 0.006794959489732219,
      17: 0.0001293187012450632,
      18: 3.8308812373753384e-5,
      31: 3.0235114281192144e-7,
    },
  },
  {
    // sqrt(1 + ln 32 / ln 4096) = sqrt(1 + 5/12); short lists up to 4096
    model: 'Phi-3 mini 128k, short',
    dim: 96,
    base: 10000,
    scaling: { type: 'longrope', ...LISTS, originalLength: 4096, factor: 32 },
    length: 4096,
    attentionFactor: 1.1902380714238083,
    frequencies: { 0: 1, 1: 0.8254041852680184 / 1.01, 47: 0.00012115276586285888 / 1.47 },
  },
  {
    model: 'Phi-3 mini 128k, long',
    dim: 96,
    base: 10000,
    scaling: { type: 'longrope', ...LISTS, originalLength: 4096, factor: 32 },
    length: 4097,
    attentionFactor: 1.1902380714238083,
    frequencies: { 0: 1, 1: 0.8254041852680184 / 2.25, 47: 0.00012115276586285888 / 59.75 },
  },
  {
    // sqrt(1 + ln 16 / ln 8192) = sqrt(1 + 4/13)
    model: 'Phi-3 small 128k',
    dim: 96,
    base: 10000,
    scaling: { type: 'longrope', ...LISTS, originalLength: 8192, factor: 16, length: 131072 },
    attentionFactor: 1.1435437497937313,
    frequencies: { 0: 1, 1: 0.8254041852680184 / 2.25 },
  },
  {
    // Pair 28 turns 4.19 times over 8192 positions and stays, 29 to 34 are mixtures, 35 turns 0.997 times
    model: 'Llama 3.1 8B',
    dim: 128,
    base: 500000,
    scaling: { type: 'llama3', factor: 8, lowFrequencyFactor: 1, highFrequencyFactor: 4, originalLength: 8192 },
    attentionFactor: 1,
    frequencies: {
      0: 1,
      1: 0.8146172338565447,
      28: 0.003211445994752591,
      29: 0.002166570763503359,
      31: 0.0008567514129196321,
      34: 0.0001785078127679964,
      35: 9.556212353964683e-5, // theta / 8
      63: 3.068925988914511e-7,
    },
  },
  {
    model: 'Llama 3.2 1B',
    dim: 64,
    base: 500000,
    scaling: { type: 'llama3', factor: 32, lowFrequencyFactor: 1, highFrequencyFactor: 4, originalLength: 8192 },
    attentionFactor: 1,
    frequencies: {
      0: 1,
      1: 0.6636012376960885,
      14: 0.003211445994752591,
      15: 0.001290547928209264,
      17: 9.70828780262767e-5,
      18: 1.9461638184831125e-5, // theta / 32
      31: 9.41830672543491e-8,
    },
  },
];

test.each(MODELS)('$model', ({ dim, base, scaling, length, ...expected }) => {
  const { frequencies, attentionFactor } = rotaryFrequencies({ dim, base, scaling, length });
  expect(frequencies).toHaveLength(dim / 2);
  expect(attentionFactor).toBeCloseTo(expected.attentionFactor, 14);
  for (const [pair, frequency] of Object.entries(expected.frequencies)) {
    expect(frequencies[Number(pair)] / frequency).toBeCloseTo(1, 12);
  }
});

describe('limits', () => {
  const [dim, base, originalLength] = [64, 10000, 4096];
  const plain = rotaryFrequencies({ dim, base });

  test('without scaling: base^(-2p/dim), factor 1', () => {
    expect(plain.attentionFactor).toBe(1);
    expect(plain.frequencies).toEqual(Float64Array.from({ length: 32 }, (_, p) => base ** (-p / 32)));
    expect(rotaryFrequencies({ dim })).toEqual(plain);
    expect(rotaryFrequencies({ dim: 0 }).frequencies).toHaveLength(0);
  });

  const ones = new Float32Array(32).fill(1);
  test.each<[RotaryScaling, number]>([
    [linear(1), 1],
    [{ type: 'dynamic', factor: 1, originalLength }, 4096],
    [{ type: 'dynamic', factor: 8, originalLength }, 100],
    [{ type: 'yarn', factor: 1, originalLength }, 1],
    [{ type: 'yarn', factor: 1, originalLength, mscale: 0.7, mscaleAllDim: 0.3, truncate: false }, 1],
    [{ type: 'longrope', factor: 1, originalLength, shortFactor: ones, longFactor: ones }, 5000],
    [{ type: 'llama3', factor: 1, originalLength, lowFrequencyFactor: 1, highFrequencyFactor: 4 }, 1],
  ])('%j, length %d: nothing changes', (scaling, length) => {
    const { frequencies, attentionFactor } = rotaryFrequencies({ dim, base, scaling, length });
    expect(attentionFactor).toBe(1);
    expect(frequencies).toBeAllclose(plain.frequencies, { rtol: 1e-15 });
  });

  test('dynamic with factor 1 is a base that stretches with the length', () => {
    const scaling: RotaryScaling = { type: 'dynamic', factor: 1, originalLength };
    const { frequencies } = rotaryFrequencies({ dim, base, scaling, length: 3 * originalLength });
    expect(frequencies[31] / plain.frequencies[31]).toBeCloseTo(1 / 3, 12);
    expect(frequencies[0]).toBe(1);
  });

  test('yarn and llama3 divide slow pairs by the factor and keep fast ones', () => {
    for (const scaling of [
      { type: 'yarn', factor: 7, originalLength } as const,
      { type: 'llama3', factor: 7, originalLength, lowFrequencyFactor: 2, highFrequencyFactor: 8 } as const,
    ]) {
      const { frequencies } = rotaryFrequencies({ dim, base, scaling });
      const ratios = frequencies.map((theta, p) => plain.frequencies[p] / theta);
      expect(ratios[0]).toBe(1);
      expect(ratios[31]).toBeCloseTo(7, 12);
      ratios.forEach((ratio, p) => expect(ratio).toBeGreaterThanOrEqual((ratios[p - 1] ?? 0) * (1 - 1e-14)));
    }
  });

  test('a length in the scaling goes before that of the call', () => {
    const scaling: RotaryScaling = { type: 'dynamic', factor: 2, originalLength, length: originalLength };
    expect(rotaryFrequencies({ dim, base, scaling, length: 99999 })).toEqual(plain);
  });

  test('an attention factor that is given is taken', () => {
    for (const scaling of [
      { type: 'yarn', factor: 4, originalLength, attentionFactor: 0.9 } as const,
      { type: 'longrope', factor: 4, originalLength, shortFactor: ones, longFactor: ones, attentionFactor: 0.9 } as const,
    ]) {
      expect(rotaryFrequencies({ dim, base, scaling }).attentionFactor).toBe(0.9);
    }
    const scaling: RotaryScaling = { type: 'yarn', factor: 40, originalLength, mscale: 0.707, mscaleAllDim: 1 };
    expect(rotaryFrequencies({ dim, base, scaling }).attentionFactor).toBeCloseTo(1.2608037774058554 / 1.3688879454113936, 14);
  });
});

eachBinary((attention) => {
  const shape = { heads: 2, queryLength: 60, keyLength: 75, headDim: 16 };
  const lists = { shortFactor: [1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], longFactor: [2, 3, 4, 5, 6, 7, 8, 9] };

  // Each of them at a length that it is about: the 75 keys are beyond the original length.
  test.each<RotaryScaling>([
    linear(3),
    { type: 'dynamic', factor: 3, originalLength: 20 },
    { type: 'dynamic', factor: 3, originalLength: 20, length: 30 },
    { type: 'yarn', factor: 5, originalLength: 40 },
    { type: 'yarn', factor: 5, originalLength: 40, attentionFactor: 0.7, truncate: false },
    { type: 'longrope', ...lists, originalLength: 74, factor: 3 },
    { type: 'longrope', ...lists, originalLength: 75, attentionFactor: 1.3 },
    { type: 'llama3', factor: 5, lowFrequencyFactor: 1, highFrequencyFactor: 4, originalLength: 40 },
  ])('attention and rotate turn by %j', (scaling) => {
    const rotary = { base: 100, scaling };
    const args = problem({ shape, rotary, causal: true, queryOffset: 15 }, 1);
    const expected = { ...reference.forward(args), ...reference.backward(args) };
    const options = { method: 'exact' } as const;
    const got = { ...attention().forward({ ...forwardArgs(args), ...options }), ...attention().backward({ ...args, ...options }) };
    for (const name of ['output', 'lse', 'dq', 'dk', 'dv'] as const) {
      // As in api.test.ts: the criterion for accuracy itself is in exact.test.ts.
      expect(maxDifference(got[name], expected[name])).toBeLessThan(1e-5 * maxAbs(expected[name]));
    }
    const unscaled = reference.forward({ ...args, rotary: { base: 100 } }).output;
    expect(maxDifference(unscaled, expected.output)).toBeGreaterThan(1e-3);

    // By hand: what rotaryFrequencies says, at the largest position of this call plus one
    const { frequencies, attentionFactor } = rotaryFrequencies({ dim: 16, base: 100, scaling, length: 75 });
    const x = args.q;
    const turned = reference.rotate({ x, shape, rotary: { frequencies }, queryOffset: 15 });
    const call = { x, shape, rotary, queryOffset: 15 };
    const close = { atol: 1e-6 * maxAbs(x) };
    expect(reference.rotate(call)).toBeAllclose(turned.map((value) => attentionFactor * value), { atol: 1e-12 });
    expect(attention().rotate(call)).toBeAllclose(reference.rotate(call), close);
    expect(attention().rotate({ ...call, x: attention().rotate(call), inverse: true })).toBeAllclose(x, close);
  });

  test('the length is that of the largest position, of queries and of keys', () => {
    const scaling: RotaryScaling = { type: 'dynamic', factor: 2, originalLength: 20 };
    const args = forwardArgs(problem({ shape }, 2));
    const output = (rotary: object, changes: object = {}) =>
      attention().forward({ ...args, ...changes, rotary: { ...rotary, scaling }, method: 'exact' }).output;
    const given = (length: number, rotary: object, changes: object = {}) =>
      attention().forward({ ...args, ...changes, rotary: { ...rotary, scaling: { ...scaling, length } }, method: 'exact' }).output;
    expect(output({})).toEqual(given(75, {}));
    expect(output({}, { queryOffset: 40 })).toEqual(given(100, {}, { queryOffset: 40 }));
    const queryPositions = Array.from({ length: 60 }, (_, n) => (n === 7 ? 499.5 : n));
    expect(output({ queryPositions })).toEqual(given(500.5, { queryPositions }));
    const keyPositions = new Float32Array(75).fill(-3);
    expect(output({ keyPositions })).toEqual(given(60, { keyPositions }));
  });
});

describe('misuse', () => {
  const yarn = { type: 'yarn', factor: 4, originalLength: 4096 };
  const long = { type: 'longrope', shortFactor: [1, 1, 1, 1], longFactor: [2, 2, 2, 2], originalLength: 4096 };
  const llama = { type: 'llama3', factor: 8, lowFrequencyFactor: 1, highFrequencyFactor: 4, originalLength: 8192 };
  const CASES: [object, typeof TypeError | typeof RangeError, string][] = [
    [{ dim: 7 }, RangeError, 'dim must be even, got 7'],
    [{ dim: '8' }, TypeError, "dim must be a number, got '8'"],
    [{ base: -1 }, RangeError, 'base must be positive and finite, got -1'],
    [{ length: 0 }, RangeError, 'length must be positive and finite, got 0'],
    [{ theta: 1 }, TypeError, 'there is no option theta; known are dim, base, scaling, length'],
    [{ scaling: 4 }, TypeError, 'scaling must be an object, got 4'],
    [{ scaling: {} }, TypeError, "scaling.type must be one of 'linear', 'dynamic', 'yarn', 'longrope', 'llama3', got undefined"],
    [{ scaling: { type: 'ntk' } }, RangeError, "scaling.type must be one of 'linear', 'dynamic', 'yarn', 'longrope', 'llama3', got 'ntk'"],
    [{ scaling: { type: 'toString' } }, RangeError, "scaling.type must be one of 'linear'"],
    [{ scaling: { type: 'linear' } }, TypeError, 'scaling.factor must be a number, got undefined'],
    [{ scaling: { type: 'linear', factor: 0.5 } }, RangeError, 'scaling.factor must be at least 1, got 0.5'],
    [{ scaling: { type: 'linear', factor: Infinity } }, RangeError, 'scaling.factor must be positive and finite, got Infinity'],
    [{ scaling: { type: 'linear', factor: 2, length: 9 } }, TypeError, 'there is no option scaling.length; known are type, factor'],
    [{ scaling: { type: 'dynamic', factor: 2 } }, TypeError, 'scaling.originalLength must be a number, got undefined'],
    [{ scaling: { type: 'dynamic', factor: 2, originalLength: 1 } }, RangeError, 'scaling.originalLength must be an integer from 2'],
    [
      { dim: 2, scaling: { type: 'dynamic', factor: 2, originalLength: 9 } },
      RangeError,
      "scaling of type 'dynamic' needs a dim above 2, got 2",
    ],
    [{ scaling: { ...yarn, rope_type: 'yarn' } }, TypeError, 'there is no option scaling.rope_type'],
    [{ base: 1, scaling: yarn }, RangeError, "scaling of type 'yarn' needs a base above 1, got 1"],
    [{ scaling: { ...yarn, betaFast: 0.5 } }, RangeError, 'scaling.betaFast must be at least betaSlow 1, got 0.5'],
    [{ scaling: { ...yarn, mscale: 1 } }, TypeError, 'scaling needs both mscale and mscaleAllDim, or neither'],
    [
      { scaling: { ...yarn, mscale: 1, mscaleAllDim: 1, attentionFactor: 1 } },
      TypeError,
      'scaling has both attentionFactor and mscale; give one of them',
    ],
    [{ scaling: { ...yarn, attentionFactor: 0 } }, RangeError, 'scaling.attentionFactor must be positive and finite, got 0'],
    [{ scaling: { ...yarn, truncate: 1 } }, TypeError, 'scaling.truncate must be true or false, got 1'],
    [{ scaling: long }, TypeError, "scaling of type 'longrope' needs factor or attentionFactor"],
    [{ scaling: { ...long, factor: 2, shortFactor: [1] } }, RangeError, 'scaling.shortFactor has 1 values, dim/2 needs 4'],
    [
      { scaling: { ...long, factor: 2, longFactor: [1, 2, 0, 4] } },
      RangeError,
      'scaling.longFactor[2] must be positive and finite, got 0',
    ],
    [
      { scaling: { ...llama, lowFrequencyFactor: 4 } },
      RangeError,
      'scaling.highFrequencyFactor must be above lowFrequencyFactor 4, got 4',
    ],
  ];
  test.each(CASES)('%j', (changes, kind, message) => {
    const act = () => rotaryFrequencies({ dim: 8, ...changes } as never);
    expect(act).toThrow(kind);
    expect(act).toThrow(`rotaryFrequencies: ${message}`);
  });
});
