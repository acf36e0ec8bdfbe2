// SPDX-License-Identifier: MIT
//
// The exact engine against float64: sizes around every tile, all shape options, scores that overflow a careless softmax.
// The measure is plain float32 arithmetic (`yardstick`): at most twice its error, three times for gradients.

import { describe, expect, test } from '@jest/globals';

import { theory } from '../dist/index.js';
import { add, describeSetting, draw, eachBinary, forwardArgs, inner, lazy, problem, random, slopeError } from './support.js';
import type { Problem, Setting } from './support.js';
import { resultsOf, yardstick } from './yardstick.js';

const sizes = [1, 3, 4, 5, 6, 7, 8, 9, 31, 32, 33, 59, 60, 61, 64, 119, 120, 121, 128, 257, 300];
const heads = 1;

const lengthSettings: Setting[] = [
  ...sizes.map((queryLength) => ({ shape: { heads, queryLength, headDim: 16 } })),
  ...sizes.map((queryLength) => ({ shape: { heads, queryLength, headDim: 16 }, causal: true })),
  ...sizes.map((keyLength) => ({ shape: { heads, queryLength: 9, keyLength, headDim: 8 } })),
  ...sizes.map((queryLength) => ({ shape: { heads, queryLength, keyLength: 33, headDim: 8 }, causal: true })),
];

const dimensionSettings: Setting[] = [1, 2, 3, 4, 5, 6, 7, 8, 10, 16, 20, 32, 64, 80, 128].flatMap((dim) => {
  const rotary = dim % 2 ? { rotary: false as const } : {};
  const lengths = { heads, queryLength: 33, keyLength: 66 };
  return [
    { shape: { ...lengths, headDim: dim }, ...rotary, causal: true, queryOffset: 33 },
    { shape: { ...lengths, headDim: dim, valueDim: 6 }, ...rotary },
    { shape: { ...lengths, headDim: 6, valueDim: dim } },
  ];
});

const shape = { heads, queryLength: 37, headDim: 12 };
const optionSettings: Setting[] = [
  { shape: { ...shape, batch: 3 } },
  { shape: { ...shape, heads: 3 }, causal: true },
  { shape: { ...shape, batch: 2, heads: 6, kvHeads: 2, keyLength: 20, valueDim: 5 } },
  { shape: { ...shape, batch: 2, heads: 4, kvHeads: 1 }, causal: true },
  ...[1, 20, 1000, -1, -20, -36].map((queryOffset) => ({ shape, causal: true, queryOffset })),
  ...[50, -50].map((queryOffset) => ({ shape: { ...shape, keyLength: 90 }, causal: true, queryOffset })),
  { shape, queryOffset: -7 },
  { shape, rotary: false },
  { shape, rotary: { dim: 0 } },
  { shape, rotary: { dim: 4 } },
  { shape, rotary: { dim: 10, interleaved: true }, causal: true },
  { shape, rotary: { interleaved: true }, queryOffset: 5 },
  { shape, rotary: { base: 500 } },
  { shape, rotary: { frequencies: Float32Array.of(1, 0.1, -0.2, 3, 0, 0.5) } },
  { shape, rotary: { dim: 4, frequencies: Float32Array.of(0.7, 0.01) }, causal: true },
  { shape, layout: 'bnhd' },
  { shape: { ...shape, batch: 2, heads: 6, kvHeads: 2, keyLength: 20, valueDim: 5 }, layout: 'bnhd', causal: true, queryOffset: -9 },
  { shape: { ...shape, batch: 3, heads: 2, queryLength: 260 }, layout: 'bnhd', rotary: { dim: 6, interleaved: true }, window: [30, 4] },
  { shape, scale: 0 },
  { shape, scale: -0.5 },
  { shape, scale: 3, causal: true },
];

const long = { heads, queryLength: 300, headDim: 8 };
const maskSettings: Setting[] = [
  ...[0, 1, 7, 31, 32, 100, 120, 299, 1000].map((left) => ({ shape: long, causal: true, window: [left, -1] as const })),
  ...[0, 3, 127, 128, 129].map((right) => ({ shape: long, window: [-1, right] as const })),
  { shape: long, window: [0, 0] },
  { shape: long, window: [5, 9] },
  { shape: long, window: [64, 64] },
  { shape: long, window: [5, 9], causal: true },
  { shape: { ...long, queryLength: 40 }, window: [20, 10], queryOffset: 260 },
  { shape: { ...long, queryLength: 1, keyLength: 300 }, window: [127, -1], causal: true, queryOffset: 299 },
  { shape: { ...long, queryLength: 200, keyLength: 140 }, window: [60, 2], queryOffset: -30 },
  { shape: { ...long, batch: 2, heads: 4, kvHeads: 2, queryLength: 140, valueDim: 5 }, window: [33, 1] },
  { shape: long, segments: [0] },
  { shape: long, segments: [0, 100] },
  { shape: long, segments: Uint32Array.of(0, 1, 2, 40, 40, 128, 250, 300, 400), causal: true },
  { shape: long, segments: Array.from({ length: 300 }, (_, n) => n) },
  { shape: { ...long, keyLength: 200 }, segments: [0, 37, 190, 230] },
  { shape: { ...long, queryLength: 50 }, segments: [0, 37, 190, 230], queryOffset: 170 },
  { shape: { ...long, queryLength: 90, keyLength: 70 }, segments: [0, 37], queryOffset: -20 },
  { shape: { ...long, batch: 2, heads: 4, kvHeads: 2, queryLength: 140 }, segments: [0, 37, 90], window: [20, 10] },
];

/** cos and sin of all angles from 0 on, as a model would keep them. */
function tablesOf(rows: number, frequencies: readonly number[]) {
  const angles = Float64Array.from({ length: rows * frequencies.length }, (_, n) => {
    const row = Math.floor(n / frequencies.length);
    return row * frequencies[n % frequencies.length];
  });
  return { cos: Float32Array.from(angles, Math.cos), sin: Float32Array.from(angles, Math.sin) };
}

const scattered = (count: number, seed: number) => Array.from({ length: count }, (_, n) => ((n + seed) * 7919) % 611);
const spread = { ...shape, batch: 3, heads: 4, kvHeads: 2, queryLength: 45, keyLength: 70 };
const positionSettings: Setting[] = [
  { shape, rotary: { queryPositions: Array.from({ length: 37 }, (_, n) => 1e6 + n) } },
  { shape, rotary: { keyPositions: Float64Array.from({ length: 37 }, (_, n) => 0.37 * n - 5) }, queryOffset: 11 },
  { shape: spread, rotary: { queryPositions: scattered(45, 1), keyPositions: scattered(70, 2) }, causal: true },
  { shape: spread, rotary: { queryPositions: scattered(135, 1), keyPositions: Int32Array.from(scattered(210, 2)) } },
  { shape: spread, rotary: { queryPositions: scattered(45, 3), keyPositions: scattered(210, 4), interleaved: true } },
  { shape: spread, rotary: { keyPositions: scattered(210, 5), dim: 4 }, layout: 'bnhd', window: [20, 8] },
  { shape: spread, rotary: { queryPositions: Float32Array.from(scattered(135, 6), (m) => -m / 3) }, layout: 'bnhd' },
  { shape: spread, rotary: { tables: tablesOf(70, [1, 0.5, 0.3, 0.1, 0.02, 0.004]) }, causal: true, queryOffset: 25 },
  { shape, rotary: { tables: tablesOf(37, [1, 0.3]), dim: 4, interleaved: true } },
  {
    shape: spread,
    rotary: {
      tables: tablesOf(611, [1, 0.5, 0.3, 0.1, 0.02, 0.004]),
      queryPositions: scattered(135, 7),
      keyPositions: Uint16Array.from(scattered(70, 8)),
    },
  },
  { shape: spread, rotary: { base: 100, scaling: { type: 'linear', factor: 4 } }, causal: true },
  { shape: spread, rotary: { base: 100, scaling: { type: 'dynamic', factor: 4, originalLength: 20, length: 70 } } },
  { shape: spread, rotary: { base: 100, dim: 8, scaling: { type: 'yarn', factor: 40, originalLength: 30 } }, layout: 'bnhd' },
  // Rows that are no rotations: cos^2 + sin^2 is not 1
  { shape, rotary: { tables: { cos: draw(37 * 6, random(1).normal), sin: draw(37 * 6, random(2).normal) } }, causal: true },
];

const middle = { ...shape, batch: 2, heads: 4, kvHeads: 2, queryLength: 70, keyLength: 83, headDim: 8, valueDim: 5 };
const biasOf = (heads: number, seed: number) => draw(heads * 152, random(seed).normal);
const maskOf = (count: number, seed: number) => draw(count, random(seed).normal);
/** A third is forbidden, and all of every eleventh row of 83 keys. */
const holes = (count: number, seed: number) => {
  const r = random(seed);
  return draw(count, r.normal).map((x, n) => (r.uniform() < 1 / 3 || Math.floor(n / 83) % 11 === 5 ? -Infinity : x));
};
const allowedOf = (count: number, seed: number) => Uint8Array.from(holes(count, seed), (x) => (x === -Infinity ? 0 : 7));
const modifierSettings: Setting[] = [
  ...[0.3, 1, 5, 50].map((softcap) => ({ shape: middle, softcap, causal: true, queryOffset: 13 })),
  { shape: { ...middle, queryLength: 300 }, softcap: 2, scale: 3 },
  { shape: middle, bias: biasOf(1, 1) },
  { shape: middle, bias: biasOf(4, 2), causal: true, queryOffset: 13 },
  { shape: { ...middle, batch: 1, heads: 1, kvHeads: 1, queryLength: 1, keyLength: 152 }, bias: biasOf(1, 3) },
  { shape: { ...middle, queryLength: 152, keyLength: 1 }, bias: biasOf(4, 4) },
  { shape: { heads, queryLength: 300, headDim: 8 }, bias: draw(599, random(5).normal), window: [130, 20] },
  { shape: { heads, queryLength: 260, headDim: 8 }, bias: Float32Array.from({ length: 519 }, (_, n) => -0.1 * Math.abs(n - 259)) },
  { shape: middle, mask: maskOf(70 * 83, 6) },
  { shape: middle, mask: holes(70 * 83, 7), causal: true, queryOffset: 13 },
  { shape: middle, mask: holes(2 * 4 * 70 * 83, 8), maskShape: [2, 4, 70, 83] },
  { shape: middle, mask: holes(4 * 83, 9), maskShape: [1, 4, 1, 83] },
  { shape: middle, mask: allowedOf(2 * 70 * 83, 10), maskShape: [2, 1, 70, 83] },
  { shape: middle, mask: allowedOf(2 * 4 * 83, 11), maskShape: [2, 4, 1, 83], layout: 'bnhd' },
  { shape: { ...middle, queryLength: 1 }, mask: allowedOf(83, 12) },
  { shape: { ...middle, batch: 1, heads: 1, kvHeads: 1, queryLength: 300, keyLength: 290 }, mask: maskOf(300 * 290, 13) },
  { shape: middle, sinks: Float32Array.of(0, 2, -1, 5) },
  { shape: middle, sinks: Float32Array.of(0, 20, -30, 1), causal: true, queryOffset: -4 },
  { shape: middle, sinks: Float32Array.of(0, 2, -1, 5), mask: holes(70 * 83, 14), layout: 'bnhd' },
  {
    shape: { ...middle, queryLength: 152, keyLength: 160 },
    layout: 'bnhd',
    rotary: { queryPositions: scattered(152, 9), base: 100, scaling: { type: 'yarn', factor: 4, originalLength: 100 } },
    causal: true,
    queryOffset: 8,
    window: [100, -1],
    segments: [0, 90],
    softcap: 3,
    bias: draw(4 * 311, random(15).normal),
    mask: Uint8Array.from(draw(2 * 152 * 160, random(16).uniform), (x) => Number(x > 0.2)),
    maskShape: [2, 1, 152, 160],
    sinks: Float32Array.of(1, 0, -1, 2),
  },
];

/** Entries of one sign and size: scores from low to high without rotation, at scale 1. */
function scoresBetween(low: number, high: number, causal: boolean, seed: number): Problem {
  const setting = { shape: { heads, queryLength: 70, headDim: 8 }, rotary: false as const, scale: 1, causal };
  const [least, most] = [low, high].map((s) => Math.sqrt(Math.abs(s) / 8)).sort((a, b) => a - b);
  const args = problem(setting, seed, (r) => least + (most - least) * r.uniform());
  return low < 0 ? { ...args, q: args.q.map((x) => -x) } : args;
}

const withValues = (args: Problem, size: number): Problem => ({ ...args, v: args.v.map((x) => x * size) });

const square = { heads, queryLength: 70, headDim: 16 };
const scoreProblems = named([
  // exp overflows float32 at 89 and vanishes at -104: only differences of scores may reach it.
  ['from 90 to 100', () => scoresBetween(90, 100, false, 21)],
  ['from 90 to 100, causal', () => scoresBetween(90, 100, true, 22)],
  ['from -100 to -90', () => scoresBetween(-100, -90, false, 23)],
  ['from -100 to -90, causal', () => scoresBetween(-100, -90, true, 24)],
  // Up to 24 log 2 = 16.64 no maximum is looked for.
  ...[16, 17].flatMap((high): [string, () => Problem][] => [
    [`from 0 to ${high}`, () => scoresBetween(0, high, false, 30)],
    [`from -${high} to 0, causal`, () => scoresBetween(-high, 0, true, 31)],
    [`from 0 to ${high} beside a sink of 300`, () => ({ ...scoresBetween(0, high, true, 32), sinks: Float32Array.of(300) })],
  ]),
  // Weights far from 1 leave no room for such values.
  ...[1e30, 1e-36].flatMap((size): [string, () => Problem][] => [
    [`from 0 to 16 with values of ${size}`, () => withValues(scoresBetween(0, 16, false, 33), size)],
    [`from -16 to -15 with values of ${size}`, () => withValues(scoresBetween(-16, -15, true, 34), size)],
  ]),
  ['hundreds apart: one key takes all', () => problem({ shape: square }, 25, (r) => 10 * r.normal())],
  ['hundreds apart, causal', () => problem({ shape: square, causal: true }, 26, (r) => 10 * r.normal())],
  ['rising along the keys, so that the reference of the softmax keeps moving', () => rising(27, 1)],
  ['falling along the keys', () => rising(28, -1)],
  ['tiny', () => problem({ shape: square }, 29, (r) => 1e-20 * r.normal())],
]);

/** Scores that change by about 200 from the first key to the last. */
function rising(seed: number, sign: number): Problem {
  const args = problem({ shape: { heads, queryLength: 20, keyLength: 300, headDim: 4 }, rotary: false, scale: 1 }, seed);
  const q = args.q.map((x, n) => (n % 4 === 0 ? 1 : 0.1 * x));
  return { ...args, q, k: args.k.map((x, n) => (n % 4 === 0 ? (sign * 200 * Math.floor(n / 4)) / 300 : x)) };
}

/** Rows for test.each: a name, the problem and its yardstick, both made once and only when needed. */
function named(problems: [name: string, make: () => Problem][]) {
  return problems.map(([name, make]) => {
    const args = lazy(make);
    return [name, args, lazy(() => yardstick(args()))] as const;
  });
}

const withYardsticks = (settings: Setting[], seed: number) =>
  named(settings.map((setting, n) => [describeSetting(setting), () => problem(setting, seed + n)]));

const groups = [
  ['lengths', withYardsticks(lengthSettings, 1000)],
  ['dimensions', withYardsticks(dimensionSettings, 2000)],
  ['options', withYardsticks(optionSettings, 3000)],
  ['masks', withYardsticks(maskSettings, 4000)],
  ['positions', withYardsticks(positionSettings, 5000)],
  ['modified scores', withYardsticks(modifierSettings, 6000)],
  ['scores', scoreProblems],
] as const;

const slopes = [
  { shape: { heads: 2, queryLength: 33, headDim: 16 } },
  { shape: { heads: 4, kvHeads: 2, queryLength: 20, keyLength: 41, headDim: 10, valueDim: 7 }, causal: true, queryOffset: 21 },
].map((setting: Setting) => [describeSetting(setting), setting] as const);

/** Rounding of the loss over the step, in the units of `slopeError`: 1.6e-5 was the most seen. */
const SLOPE_TOLERANCE = 5e-5;

eachBinary((attention) => {
  const run = (args: Problem) => {
    const { output, lse } = attention().forward({ ...forwardArgs(args), method: 'exact' });
    return { output, lse, ...attention().backward({ ...args, method: 'exact' }) };
  };

  describe.each(groups)('%s', (_, problems) => {
    test.each(problems)('%s', (_, args, expected) => {
      const [result, { exact, allowed }] = [run(args()), expected()];
      expect(Object.keys(result).sort()).toEqual(['report', ...resultsOf(args())].sort());
      for (const name of resultsOf(args())) {
        expect(result[name]).toBeAllclose(exact[name]!, { atol: allowed[name], name });
      }
    });
  });

  describe.each(slopes)('slope along a random direction, %s', (_, setting) => {
    test.each(['q', 'k', 'v'] as const)('of %s', (name) => {
      const args = problem(setting, 11);
      const gradient = attention().backward({ ...args, method: 'exact' })[`d${name}`];
      const direction = draw(args[name].length, random(12).normal);
      const loss = (step: number) => {
        const moved = { ...forwardArgs(args), [name]: add(args[name], step, direction) };
        return inner(attention().forward({ ...moved, method: 'exact' }).output, args.dOutput);
      };
      expect(slopeError(loss, gradient, direction)).toBeLessThan(SLOPE_TOLERANCE);
    });
  });

  test('rows with nothing allowed: zeros, lse -Infinity, zero gradients', () => {
    const shape = { heads: 2, queryLength: 40, keyLength: 30, headDim: 8, valueDim: 4 };
    const args = problem({ shape, causal: true, queryOffset: -33 }, 13);
    const { output, lse, dq, dk, dv } = run(args);
    for (const head of [0, 1]) {
      expect(output.subarray(head * 160, head * 160 + 33 * 4)).toEqual(new Float32Array(33 * 4));
      expect(lse.subarray(head * 40, head * 40 + 33)).toEqual(new Float32Array(33).fill(-Infinity));
      expect(dq.subarray(head * 320, head * 320 + 33 * 8).map(Math.abs)).toEqual(new Float32Array(33 * 8));
      // Seven queries see keys 0 to 6 at most.
      expect(dk.subarray(head * 240 + 7 * 8, head * 240 + 240).map(Math.abs)).toEqual(new Float32Array(23 * 8));
      expect(dv.subarray(head * 120 + 7 * 4, head * 120 + 120).map(Math.abs)).toEqual(new Float32Array(23 * 4));
    }
  });

  test('no key allowed anywhere', () => {
    const args = problem({ shape: { heads: 1, queryLength: 9, headDim: 8 }, causal: true, queryOffset: -9 }, 14);
    const { output, lse, dq, dk, dv } = run(args);
    for (const x of [output, dq, dk, dv]) expect(x.map(Math.abs)).toEqual(new Float32Array(72));
    expect(lse).toEqual(new Float32Array(9).fill(-Infinity));
  });

  test('backward is the same with and without the output and lse of forward, and repeats bit by bit', () => {
    const args = problem({ shape: { heads: 2, queryLength: 70, headDim: 16 }, causal: true }, 15);
    const { output, lse } = attention().forward({ ...forwardArgs(args), method: 'exact' });
    const without = attention().backward({ ...args, method: 'exact' });
    const given = attention().backward({ ...args, method: 'exact', output, lse });
    for (const name of ['dq', 'dk', 'dv'] as const) expect(given[name]).toEqual(without[name]);
    expect(attention().forward({ ...forwardArgs(args), method: 'exact' }).output).toEqual(output);
  });

  test('the report counts the operations of theory.cost', () => {
    const shape = { batch: 2, heads: 4, kvHeads: 2, queryLength: 20, keyLength: 31, headDim: 8, valueDim: 6 };
    const args = problem({ shape, causal: true, queryOffset: 3 }, 16);
    const { report } = attention().forward({ ...forwardArgs(args), method: 'exact' });
    expect(report).toMatchObject({ method: 'exact', degree: null, rank: null });
    expect(report.flops).toBe(theory.cost({ ...shape, method: 'exact', causal: true, queryOffset: 3, pass: 'forward' }));
  });
});
