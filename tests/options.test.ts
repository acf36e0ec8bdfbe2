// SPDX-License-Identifier: MIT
//
// Masks and what is done to scores, by the exact engine: options that say the same thing in two ways give the same result, and
// additions that softmax does not see change nothing. No reference is needed; accuracy is the matter of exact.test.ts.

import { describe, expect, test } from '@jest/globals';

import type { RopeAttention } from '../dist/index.js';
import { UNIT, draw, eachBinary, forwardArgs, fullShape, maxAbs, problem, random } from './support.js';
import type { Problem, Setting } from './support.js';

const shape = { batch: 2, heads: 4, kvHeads: 2, queryLength: 70, keyLength: 83, headDim: 8, valueDim: 5 };
const [QUERIES, KEYS, DIAGONALS] = [70, 83, 152];

/** Roundings, 2^-24, of the size of the result: twice the most seen, which stands behind each. */
const TOLERANCE = {
  added: 16, // 7.9
  alibi: 8,
  masked: 23, // 11.5
  packed: 40, // 19.7
  sink: 21, // 10.2
  cap: 16, // 7.8
  sums: 4.1, // 2.0
};

const NAMES = ['output', 'lse', 'dq', 'dk', 'dv', 'dBias', 'dAlibi', 'dSinks'] as const;
type Results = Partial<Record<(typeof NAMES)[number], Float32Array>>;

function both(attention: RopeAttention, args: Problem): Results {
  const { report: _, ...forward } = attention.forward({ ...forwardArgs(args), method: 'exact' });
  const { report: __, ...backward } = attention.backward({ ...args, method: 'exact' });
  return { ...forward, ...backward };
}

/** |x - y| <= roundings * 2^-24 * size of y for every entry of every result that both have. */
function expectSame(x: Results, y: Results, roundings: number): void {
  for (const name of NAMES) {
    if (!x[name] || !y[name]) continue;
    const size = maxAbs(y[name].filter(Number.isFinite));
    expect(x[name]).toBeAllclose(y[name], { atol: roundings * UNIT * size, name });
  }
}

/** The mask, [QUERIES, KEYS], of a rule. */
const maskOf = (allowed: (i: number, j: number) => boolean) =>
  Float32Array.from({ length: QUERIES * KEYS }, (_, n) => (allowed(Math.floor(n / KEYS), n % KEYS) ? 0 : -Infinity));
/** The bias of a rule about i - j. */
const biasOf = (value: (distance: number) => number) =>
  Float32Array.from({ length: DIAGONALS }, (_, n) => value(n - KEYS + 1));

eachBinary((attention) => {
  const run = (args: Problem) => both(attention(), args);
  const normal = (seed: number) => random(seed).normal;

  describe('masks', () => {
    const offset = 13;
    const RULES: [string, Setting, (i: number, j: number) => boolean][] = [
      ['causal', { shape, causal: true, queryOffset: offset }, (i, j) => j <= i + offset],
      ['a window', { shape, window: [20, 9], queryOffset: offset }, (i, j) => Math.abs(i + offset - j + -5.5) <= 14.5],
      ['a window to the left', { shape, window: [4, -1] }, (i, j) => i - j <= 4],
      ['segments', { shape, segments: [0, 30, 64] }, (i, j) => [30, 64].every((start) => i >= start === j >= start)],
      ['rows that see nothing', { shape, causal: true, queryOffset: -5 }, (i, j) => j <= i - 5],
    ];

    test.each(RULES)('%s, and the same as a mask to add and as one of bytes', (_, setting, rule) => {
      const args = problem(setting, 1);
      const plain = { ...args, causal: false, window: undefined, segments: undefined };
      const [expected, mask] = [run(args), maskOf(rule)];
      const added = run({ ...plain, mask });
      expectSame(added, expected, TOLERANCE.masked);
      expect(run({ ...plain, mask: Uint8Array.from(mask, (x) => Number(x === 0)) })).toEqual(added);
    });

    test('a window, and the same as a bias of -Infinity by distance', () => {
      const args = problem({ shape, queryOffset: offset }, 2);
      const bias = biasOf((distance) => (distance + offset <= 20 && -distance - offset <= 9 ? 0 : -Infinity));
      const { dBias, ...got } = run({ ...args, bias });
      expectSame(got, run({ ...args, window: [20, 9] }), TOLERANCE.masked);
      expect(bias.every((x, n) => x === 0 || dBias![n] === 0)).toBe(true);
    });

    test.each([0, 13, -20])('window [-1, 0] is causal, bit by bit; offset %d', (queryOffset) => {
      const args = problem({ shape, queryOffset }, 3);
      expect(run({ ...args, window: [-1, 0] })).toEqual(run({ ...args, causal: true }));
      expect(run({ ...args, window: [30, 4], causal: true })).toEqual(run({ ...args, window: [30, 0] }));
    });

    test('keys to the right are causal from further on, without positions, bit by bit', () => {
      const args = problem({ shape, rotary: false }, 4);
      expect(run({ ...args, window: [-1, 6] })).toEqual(run({ ...args, causal: true, queryOffset: 6 }));
    });

    test('a window that holds all, and segments that hold all, are none, bit by bit', () => {
      const args = problem({ shape }, 5);
      const expected = run(args);
      expect(run({ ...args, window: [69, 82] })).toEqual(expected);
      expect(run({ ...args, window: [2 ** 31 - 1, 2 ** 31 - 1] })).toEqual(expected);
      expect(run({ ...args, segments: [0, 83] })).toEqual(expected);
    });

    test('segments are calls of their own', () => {
      const packed = { heads: 2, queryLength: 300, headDim: 8, valueDim: 5 };
      const starts = [0, 3, 131, 260];
      for (const masks of [{ causal: true }, {}, { window: [40, 3] as const }]) {
        const args = problem({ shape: packed, ...masks, segments: starts }, 6);
        const whole = run(args);
        starts.forEach((start, n) => {
          const end = starts[n + 1] ?? 300;
          const part = (x: Float32Array, width: number) => {
            const rows = [0, 300].map((head) => x.subarray((head + start) * width, (head + end) * width));
            return Float32Array.of(...rows[0], ...rows[1]);
          };
          const own = run({
            ...args,
            segments: undefined,
            shape: { ...packed, queryLength: end - start },
            q: part(args.q, 8),
            k: part(args.k, 8),
            v: part(args.v, 5),
            dOutput: part(args.dOutput, 5),
          });
          const widths = { output: 5, lse: 1, dq: 8, dk: 8, dv: 5 };
          for (const [name, width] of Object.entries(widths) as [keyof typeof widths, number][]) {
            const size = maxAbs(whole[name]!);
            expect(own[name]).toBeAllclose(part(whole[name]!, width), { atol: TOLERANCE.packed * UNIT * size, name });
          }
        });
      }
    });

    test('sizes of 1 in maskShape repeat, bit by bit', () => {
      const args = problem({ shape }, 7);
      for (const sizes of [[1, 1, 1], [2, 1, 1], [1, 4, 1], [1, 1, 70], [2, 4, 1], [2, 1, 70], [1, 4, 70]]) {
        const few = draw(sizes.reduce((a, b) => a * b) * KEYS, normal(8));
        const all = Float32Array.from({ length: 2 * 4 * QUERIES * KEYS }, (_, n) => {
          const index = [Math.floor(n / KEYS / QUERIES / 4), Math.floor(n / KEYS / QUERIES) % 4, Math.floor(n / KEYS) % QUERIES];
          const row = index.reduce((sum, at, axis) => sum * sizes[axis] + (sizes[axis] === 1 ? 0 : at), 0);
          return few[row * KEYS + (n % KEYS)];
        });
        const maskShape = [...sizes, KEYS] as [number, number, number, number];
        const expected = run({ ...args, mask: all, maskShape: [2, 4, QUERIES, KEYS] });
        expect(run({ ...args, mask: few, maskShape })).toEqual(expected);
      }
    });
  });

  describe('bias', () => {
    test('a constant changes nothing but lse', () => {
      const args = problem({ shape, causal: true, queryOffset: 13 }, 9);
      const constant = run({ ...args, bias: biasOf(() => 3) });
      const plain = run(args);
      expectSame({ ...constant, lse: constant.lse!.map((x) => x - 3) }, plain, TOLERANCE.added);
      expect(maxAbs(constant.dBias!)).toBeGreaterThan(1e-3);
    });

    test('is a mask with equal diagonals', () => {
      const args = problem({ shape, window: [60, 9] }, 10);
      const bias = draw(DIAGONALS, normal(11));
      const mask = maskOf(() => true).map((_, n) => bias[Math.floor(n / KEYS) - (n % KEYS) + KEYS - 1]);
      expectSame(run({ ...args, bias }), run({ ...args, mask }), TOLERANCE.masked);
    });

    test('alike for all heads, given once or for each: dBias is the sum over heads', () => {
      const args = problem({ shape }, 12);
      const bias = draw(DIAGONALS, normal(13));
      const each = Float32Array.from({ length: 4 * DIAGONALS }, (_, n) => bias[n % DIAGONALS]);
      const [{ dBias: once, ...shared }, { dBias: four, ...own }] = [run({ ...args, bias }), run({ ...args, bias: each })];
      expect(own).toEqual(shared);
      const sum = bias.map((_, n) => [0, 1, 2, 3].reduce((total, head) => total + four![head * DIAGONALS + n], 0));
      expect(once).toBeAllclose(sum, { atol: TOLERANCE.sums * UNIT * maxAbs(sum) });
    });

    test.each([
      { causal: true, queryOffset: 13 },
      { queryOffset: 5 },
      { window: [30, 20] as const, bias: draw(DIAGONALS, normal(17)) },
    ])('alibi is a bias, of each head, of slopes times distances, and so is its gradient: %p', (setting) => {
      const alibi = Float32Array.of(0, 0.5, 0.1, 0.01);
      const args = problem({ shape, ...setting }, 16);
      const offset = args.queryOffset ?? 0;
      const distance = Array.from(biasOf((n) => Math.abs(n + offset)));
      const added = Array.from({ length: DIAGONALS }, (_, n) => args.bias?.[n] ?? 0);
      const bias = Float32Array.from(Array.from(alibi).flatMap((m) => distance.map((d, n) => added[n] - m * d)));
      const [got, expected] = [run({ ...args, alibi }), run({ ...args, bias })];
      expectSame({ ...got, dBias: undefined }, expected, TOLERANCE.alibi);
      Array.from(alibi).forEach((_, head) => {
        const own = expected.dBias!.subarray(head * DIAGONALS, (head + 1) * DIAGONALS);
        const terms = Array.from(own, (d, n) => -d * distance[n]);
        const [sum, size] = [(x: number[]) => x.reduce((a, b) => a + b, 0), terms.map(Math.abs)];
        const atol = TOLERANCE.alibi * UNIT * sum(size);
        expect(Float32Array.of(got.dAlibi![head])).toBeAllclose([sum(terms)], { atol, name: 'dAlibi' });
      });
    });

    test('gradients of bias and sinks add up to zero: a constant on both changes nothing; they repeat bit by bit', () => {
      const sinks = Float32Array.of(0, 1, -1, 2);
      const args = problem({ shape, causal: true, bias: draw(DIAGONALS, normal(14)), sinks }, 15);
      const { dBias, dSinks } = run(args);
      const total = (x: Float32Array) => x.reduce((sum, value) => sum + value, 0);
      expect(Math.abs(total(dSinks!))).toBeGreaterThan(0.1);
      expect(Math.abs(total(dBias!) + total(dSinks!))).toBeLessThan(TOLERANCE.sums * UNIT * DIAGONALS * maxAbs(dBias!));
      expect(run(args)).toEqual(run(args));
    });
  });

  describe('softcap', () => {
    test.each([1e6, 1e30])('%d caps nothing', (softcap) => {
      const args = problem({ shape, causal: true }, 16);
      expectSame(run({ ...args, softcap }), run(args), TOLERANCE.cap);
    });

    test('bounds scores: with a cap of 0.01 weights are almost equal', () => {
      const args = problem({ shape, softcap: 0.01, scale: 10 }, 17);
      const { lse } = run(args);
      expect(lse).toBeAllclose(new Float32Array(560).fill(Math.log(KEYS)), { atol: 0.01 });
    });

    test('comes before bias and mask', () => {
      const args = problem({ shape, softcap: 0.01 }, 18);
      // Scores that are capped to nothing leave the softmax of what is added.
      const [bias, mask] = [draw(DIAGONALS, normal(19)), draw(QUERIES * KEYS, normal(20))];
      const { lse } = run({ ...args, bias, mask });
      const expected = Array.from({ length: 560 }, (_, r) => {
        const i = r % QUERIES;
        const added = (j: number) => bias[i - j + KEYS - 1] + mask[i * KEYS + j];
        return Math.log(Array.from({ length: KEYS }, (_, j) => Math.exp(added(j))).reduce((a, b) => a + b));
      });
      expect(lse).toBeAllclose(expected, { atol: 0.02 });
    });
  });

  describe('sinks', () => {
    test.each([-200, -1e9, -1e30])('of %d are none', (sink) => {
      const args = problem({ shape, causal: true, queryOffset: -3 }, 21);
      const { dSinks, lse, ...rest } = run({ ...args, sinks: new Float32Array(4).fill(sink) });
      const { lse: without, ...plain } = run(args);
      expectSame(rest, plain, TOLERANCE.sink);
      expect(dSinks!.map(Math.abs)).toEqual(new Float32Array(4));
      // Rows that see nothing have the sink, alone.
      const expected = without!.map((x) => (x === -Infinity ? sink : x));
      expect(lse).toBeAllclose(expected, { rtol: 4 * UNIT, atol: TOLERANCE.sink * UNIT });
    });

    test.each([5, -1e9, -1e30])('of %d are alone where a mask forbids all', (sink) => {
      const args = problem({ shape, mask: maskOf((i) => i % 3 !== 1) }, 22);
      const { output, lse, dq } = run({ ...args, sinks: new Float32Array(4).fill(sink) });
      const blind = (x: Float32Array, width: number) => x.filter((_, n) => (Math.floor(n / width) % QUERIES) % 3 === 1);
      expect(blind(output!, 5).every((x) => x === 0)).toBe(true);
      expect(blind(dq!, 8).every((x) => Math.abs(x) === 0)).toBe(true);
      expect(blind(lse!, 1)).toBeAllclose(blind(new Float32Array(560).fill(sink), 1), { rtol: 4 * UNIT });
      const { dk, dv } = run(args);
      const got = run({ ...args, sinks: new Float32Array(4).fill(sink) });
      if (sink < 0) expectSame({ dk: got.dk, dv: got.dv }, { dk, dv }, TOLERANCE.sink);
      expect([got.dk!, got.dv!].every((x) => x.every(Number.isFinite))).toBe(true);
    });

    test('are one more key, of value zero', () => {
      // One more dimension holds the score: 1 in queries, 0 in keys, sink / scale in the last key.
      const sinks = Float32Array.of(0.5, -1, 2, 1);
      const setting = { shape: { ...shape, kvHeads: 4, keyLength: 82 }, rotary: { dim: 8 }, scale: 0.5, sinks };
      const args = problem(setting, 23);
      const widen = (x: Float32Array, last: number) =>
        Float32Array.from({ length: (x.length / 8) * 9 }, (_, n) => (n % 9 === 8 ? last : x[Math.floor(n / 9) * 8 + (n % 9)]));
      const extend = (x: Float32Array, width: number, row: (head: number) => Float32Array) => {
        const longer = new Float32Array((x.length / 82) * 83);
        for (let head = 0; head < 8; head++) {
          longer.set(x.subarray(head * 82 * width, (head + 1) * 82 * width), head * 83 * width);
          longer.set(row(head % 4), (head * 83 + 82) * width);
        }
        return longer;
      };
      const k = extend(widen(args.k, 0), 9, (head) => Float32Array.of(0, 0, 0, 0, 0, 0, 0, 0, sinks[head] / 0.5));
      const v = extend(args.v, 5, () => new Float32Array(5));
      const wide = { ...args, sinks: undefined, shape: { ...setting.shape, keyLength: 83, headDim: 9 }, q: widen(args.q, 1), k, v };
      const [{ dSinks, ...got }, expected] = [run(args), run(wide)];
      const narrow = (x: Float32Array) => x.filter((_, n) => n % 9 !== 8);
      const shorter = (x: Float32Array, width: number) => x.filter((_, n) => Math.floor(n / width) % 83 !== 82);
      const last = Array.from({ length: 8 }, (_, head) => expected.dk![(head * 83 + 82) * 9 + 8] / 0.5);
      const plain = {
        ...expected,
        dq: narrow(expected.dq!),
        dk: narrow(shorter(expected.dk!, 9)),
        dv: shorter(expected.dv!, 5),
        dSinks: Float32Array.from({ length: 4 }, (_, head) => last[head] + last[head + 4]),
      };
      expectSame({ ...got, dSinks }, plain, TOLERANCE.sink);
      expect(fullShape(args.shape).keyLength).toBe(82);
    });
  });
});
