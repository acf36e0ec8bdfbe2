// SPDX-License-Identifier: MIT
//
// Scores by i - j otherwise than through rotated rows, in the exact engine: `relativePositions` and `relative` against float64 at
// sizes around every tile, with all other options; and laws: what they are when they say what rotation says.

import { describe, expect, test } from '@jest/globals';

import type { RopeAttention } from '../dist/index.js';
import { add, describeSetting, draw, eachBinary, forwardArgs, inner, lazy, maxAbs, problem, random } from './support.js';
import { UNIT, positionsBy, relativeMap, rotationMap, slopeError } from './support.js';
import type { Problem, Setting } from './support.js';
import { resultsOf, yardstick } from './yardstick.js';

const heads = 1;
/** ReRoPE: distances as they are up to a window, then all the same. */
const clipped = (window: number) => (t: number) => Math.max(-window, Math.min(window, t));
/** Leaky: beyond the window at a quarter of the pace. */
const leaky = (t: number) => (Math.abs(t) < 20 ? t : Math.sign(t) * (20 + (Math.abs(t) - 20) / 4));
const logarithmic = (t: number) => Math.sign(t) * Math.log1p(Math.abs(t));

const positions = (shape: Setting['shape'], f: (t: number) => number, more: Omit<Setting, 'shape'> = {}): Setting => ({
  ...more,
  shape,
  relativePositions: positionsBy(shape, f, more.queryOffset),
});
const matrices = (shape: Setting['shape'], places: number, more: Omit<Setting, 'shape'> = {}): Setting => ({
  ...more,
  shape,
  relative: relativeMap(shape, places, places),
});

const sizes = [1, 2, 5, 6, 7, 8, 9, 31, 33, 119, 121, 257];
const lengths: Setting[] = sizes.flatMap((n) => [
  positions({ heads, queryLength: n, keyLength: 40, headDim: 4 }, logarithmic),
  positions({ heads, queryLength: 9, keyLength: n, headDim: 6 }, leaky),
  matrices({ heads, queryLength: n, headDim: 4 }, 5, { causal: true }),
  matrices({ heads, queryLength: n, keyLength: 33, headDim: 5 }, 3),
]);

const dimensions: Setting[] = [1, 2, 3, 8, 11, 16, 33, 64].flatMap((headDim) => {
  const shape = { heads, queryLength: 37, keyLength: 50, headDim, valueDim: 5 };
  const dim = headDim - (headDim % 2);
  return [matrices(shape, headDim), ...(dim ? [positions(shape, leaky, { rotary: { dim }, causal: true, queryOffset: 13 })] : [])];
});

const long = { heads, queryLength: 150, headDim: 8 };
const groups = { batch: 2, heads: 4, kvHeads: 2, queryLength: 70, keyLength: 83, headDim: 8, valueDim: 5 };
const noise = (count: number, seed: number) => draw(count, random(seed).normal);
const holes = (count: number, seed: number) => Uint8Array.from(noise(count, seed), (x) => Number(x > -1));
const far = { heads, queryLength: 290, keyLength: 270, headDim: 4, valueDim: 3 };
/** The same matrix before diagonal `first`, and behind `last`. */
const nearby = ({ support, weights }: NonNullable<Setting['relative']>, diagonals: number, first: number, last: number) => ({
  support,
  weights: weights.map((_, n) => weights[n - (n % diagonals) + Math.max(first, Math.min(last, n % diagonals))]),
});
const options: Setting[] = [
  positions(long, clipped(64), { causal: true }),
  positions(long, clipped(64), { window: [100, 3], rotary: { interleaved: true } }),
  positions(long, () => 3, { rotary: { dim: 4, base: 100 } }),
  positions(long, (t) => 1e4 * Math.sin(t), { segments: [0, 100, 190] }),
  positions(long, leaky, { rotary: { frequencies: Float32Array.of(1, -0.3, 0.1, 0) }, scale: -0.7 }),
  positions(groups, leaky, { rotary: { scaling: { type: 'yarn', factor: 4, originalLength: 40 } } }),
  positions(groups, leaky, { softcap: 2, bias: noise(4 * 152, 1), mask: noise(70 * 83, 2), sinks: noise(4, 3) }),
  positions(groups, leaky, { layout: 'bnhd', bias: noise(152, 4), causal: true, queryOffset: 9 }),
  positions(groups, leaky, { mask: holes(2 * 70 * 83, 5), maskShape: [2, 1, 70, 83] }),
  positions(groups, leaky, { causal: true, queryOffset: -40 }),
  matrices(long, 12, { causal: true }),
  matrices(long, 9, { window: [100, 3], segments: [0, 100, 190], rotary: false }),
  matrices(groups, 16, { layout: 'bnhd' }),
  matrices(groups, 64, { scale: 0.05 }),
  matrices(groups, 1),
  matrices(groups, 16, { softcap: 2, bias: noise(4 * 152, 6), mask: noise(70 * 83, 7), sinks: noise(4, 8) }),
  matrices(groups, 16, { mask: holes(2 * 70 * 83, 9), maskShape: [2, 1, 70, 83], causal: true, queryOffset: 13 }),
  matrices(groups, 16, { causal: true, queryOffset: -40 }),
  matrices({ ...groups, queryLength: 1 }, 7, { queryOffset: 82, causal: true }),
  // Constant from some distance on: whole tiles are products of matrices there.
  positions(far, clipped(20), { rotary: { interleaved: true } }),
  positions(far, clipped(20), { softcap: 2, bias: noise(559, 10) }),
  { shape: far, relative: nearby(relativeMap(far, 5, 11), 559, 250, 300), causal: true },
];

const named = (settings: Setting[], seed: number) =>
  settings.map((setting, n) => {
    const args = lazy(() => problem(setting, seed + n));
    return [describeSetting(setting), args, lazy(() => yardstick(args()))] as const;
  });
const suites = [
  ['lengths', named(lengths, 1000)],
  ['dimensions', named(dimensions, 2000)],
  ['options', named(options, 3000)],
] as const;

const NAMES = ['output', 'lse', 'dq', 'dk', 'dv', 'dBias', 'dSinks', 'dWeights'] as const;
type Results = Partial<Record<(typeof NAMES)[number], Float32Array>>;

/** Roundings, 2^-24, of the size of the result: twice the most seen, which stands behind each. */
const TOLERANCE = {
  rotation: 42, // 20.9
  matrices: 9.1, // 4.5
  sums: 12.2, // 6.1
};

/** |x - y| <= roundings * 2^-24 * size of y for every entry of every result that both have. */
function expectSame(x: Results, y: Results, roundings: number): void {
  for (const name of NAMES) {
    if (!x[name] || !y[name]) continue;
    expect(x[name]).toBeAllclose(y[name], { atol: roundings * UNIT * maxAbs(y[name].filter(Number.isFinite)), name });
  }
}

function both(attention: RopeAttention, args: Problem): Results {
  const { report: _, ...forward } = attention.forward({ ...forwardArgs(args), method: 'exact' });
  const { report: __, ...backward } = attention.backward({ ...args, method: 'exact' });
  return { ...forward, ...backward };
}

eachBinary((attention) => {
  const run = (args: Problem) => both(attention(), args);

  describe.each(suites)('%s', (_, problems) => {
    test.each(problems)('%s', (_, args, expected) => {
      const [result, { exact, allowed }] = [run(args()), expected()];
      expect(Object.keys(result).sort()).toEqual([...resultsOf(args())].sort());
      for (const name of resultsOf(args())) {
        expect(result[name]).toBeAllclose(exact[name]!, { atol: allowed[name]!, name });
      }
    });
  });

  describe('laws', () => {
    const settings: Setting[] = [
      { shape: long, causal: true },
      { shape: groups, queryOffset: 11, rotary: { dim: 6, interleaved: true, base: 50 }, window: [40, 30] },
      { shape: groups, softcap: 2, bias: noise(4 * 152, 10), sinks: noise(4, 11), layout: 'bnhd' },
    ];
    const rows = settings.map((setting) => [describeSetting(setting), setting] as const);

    test.each(rows)('positions i + queryOffset - j are plain rotation: %s', (_, setting) => {
      const args = problem(setting, 1);
      const relativePositions = positionsBy(setting.shape, (t) => t, setting.queryOffset);
      expectSame(run({ ...args, relativePositions }), run(args), TOLERANCE.rotation);
    });

    test.each(rows)('W_t = R_t is plain rotation: %s', (_, setting) => {
      const args = problem(setting, 2);
      const straight = positionsBy(setting.shape, (t) => t, setting.queryOffset);
      const relative = rotationMap(setting.shape, straight, { ...setting.rotary });
      const { dWeights, ...mapped } = run({ ...args, rotary: undefined, relative });
      expectSame(mapped, run(args), TOLERANCE.rotation);
      expect(maxAbs(dWeights!)).toBeGreaterThan(1e-3);
    });

    test.each(rows)('W_t = R_f(t) is relativePositions: %s', (_, setting) => {
      const args = problem(setting, 3);
      const relativePositions = positionsBy(setting.shape, leaky, setting.queryOffset);
      const relative = rotationMap(setting.shape, relativePositions, { ...setting.rotary });
      expectSame(run({ ...args, rotary: undefined, relative }), run({ ...args, relativePositions }), TOLERANCE.rotation);
    });

    test('positions that are all the same rotate queries once, masks see nothing of it', () => {
      const args = problem({ shape: groups, causal: true, queryOffset: 13 }, 4);
      const same = run({ ...args, relativePositions: positionsBy(groups, () => 7) });
      const rotary = { queryPositions: new Float32Array(70).fill(7), keyPositions: new Float32Array(83) };
      expectSame(same, run({ ...args, rotary }), TOLERANCE.rotation);
    });

    test('W_t = 1 is no rotation', () => {
      const args = problem({ shape: groups, causal: true }, 5);
      const relative = rotationMap(groups, new Float32Array(152), { dim: 0 });
      expectSame(run({ ...args, relative }), run({ ...args, rotary: false }), TOLERANCE.matrices);
    });

    test('places that are named twice add up, in any order, and have the same gradient', () => {
      const args = problem({ shape: groups }, 6);
      const { support, weights } = relativeMap(groups, 6, 7);
      const [row, whole] = [(n: number) => weights.subarray(n * 152, (n + 1) * 152), run({ ...args, relative: { support, weights } })];
      expect([...support.subarray(0, 2)]).toEqual([...support.subarray(2, 4)]);
      const together = Float32Array.from([...row(0).map((x, n) => x + row(1)[n]), ...weights.subarray(304)]);
      const once = run({ ...args, relative: { support: support.subarray(2), weights: together } });
      const { dWeights: twice, ...rest } = whole;
      const { dWeights: single, ...others } = once;
      expectSame(rest, others, TOLERANCE.sums);
      expect(twice!.subarray(0, 152)).toEqual(twice!.subarray(152, 304));
      expectSame({ dWeights: twice!.subarray(152) }, { dWeights: single }, TOLERANCE.sums);

      const places = [4, 0, 5, 2, 1, 3];
      const reordered = {
        support: Uint32Array.from(places.flatMap((n) => [...support.subarray(2 * n, 2 * n + 2)])),
        weights: Float32Array.from(places.flatMap((n) => [...row(n)])),
      };
      const { dWeights: moved, ...same } = run({ ...args, relative: reordered });
      expectSame(same, rest, TOLERANCE.sums);
      const back = Float32Array.from({ length: 912 }, (_, n) => moved![places.indexOf(Math.floor(n / 152)) * 152 + (n % 152)]);
      expectSame({ dWeights: back }, { dWeights: twice }, TOLERANCE.sums);
    });

    test('a gradient by the weights is the slope of the loss, and repeats bit by bit', () => {
      const args = problem(matrices(groups, 9, { causal: true, queryOffset: 20 }), 8);
      const { support, weights } = args.relative!;
      const { dWeights } = run(args);
      const direction = noise(weights.length, 9);
      const loss = (step: number) => {
        const relative = { support, weights: add(weights, step, direction) };
        return inner(attention().forward({ ...forwardArgs(args), relative, method: 'exact' }).output, args.dOutput);
      };
      expect(slopeError(loss, dWeights!, direction)).toBeLessThan(5e-5); // rounding of the loss over the step
      expect(run(args).dWeights).toEqual(dWeights);
    });

    test('diagonals that a mask forbids have no gradient', () => {
      const { dWeights } = run(problem(matrices({ heads, queryLength: 50, headDim: 4 }, 4, { causal: true, window: [9, -1] }), 10));
      dWeights!.forEach((x, n) => expect(x !== 0).toBe(n % 99 >= 49 && n % 99 <= 58));
    });
  });

  test('auto takes the exact engine and says why; the report counts what a map costs and bounds its scores', () => {
    const setting = { shape: { heads, queryLength: 40, headDim: 8 } };
    const [args, f] = [problem(setting, 11), positionsBy(setting.shape, leaky)];
    const plain = attention().forward(forwardArgs(args)).report;
    const { report } = attention().forward({ ...forwardArgs(args), relativePositions: f });
    expect(report.reason).toBe('exact: no polynomial is predicted cheaper at this size');
    expect(report.flops).toBe(plain.flops + 2 * 16 * 1600); // 3 D multiply-adds in place of D
    const norm = (x: Float32Array) => Math.max(...Array.from({ length: 40 }, (_, r) => Math.hypot(...x.subarray(8 * r, 8 * r + 8))));
    const bound = (norm(args.q) * norm(args.k)) / Math.sqrt(8);
    expect(report.scoreBound / bound).toBeCloseTo(1, 5);
    const relative = rotationMap(setting.shape, f);
    const mapped = attention().backward({ ...args, relative }).report;
    expect(mapped.reason).toBe('exact: no polynomial is predicted cheaper at this size');
    expect(mapped.scoreBound).toBeGreaterThan(bound); // |cos| + |sin|
    expect(mapped.scoreBound).toBeLessThan(1.001 * Math.SQRT2 * bound);
    const state = attention().forward({ ...forwardArgs(args), relativePositions: f });
    const given = attention().backward({ ...args, relativePositions: f, saved: state }).report;
    expect(given.reason).toBe(`${report.reason}; the given output and lse were not checked in so short a call`);
  });

  test('weights that are not finite harm the rows that meet them, not others', () => {
    const args = problem(matrices({ heads: 2, queryLength: 20, headDim: 4 }, 4, { segments: [0, 10] }), 12);
    args.relative!.weights[19 + 15] = NaN; // t = 15 is forbidden
    const { output } = run(args);
    expect(output!.every(Number.isFinite)).toBe(true);
  });
});
