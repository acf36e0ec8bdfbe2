// SPDX-License-Identifier: MIT
//
// Streaming states: tokens that come one by one, in any pieces, to several states that are merged or sent elsewhere, are
// together what one attention over all of them is. The error stays below the proved bound of the report.

import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';

import { createRopeAttention, reference, theory } from '../dist/index.js';
import type { AttentionState, ForwardResult, RopeAttention, StateOptions } from '../dist/index.js';
import { draw, eachBinary, maxAbs, maxDifference, random } from './support.js';

const N = 100;
const [BATCH, HEADS, KV, D, DV] = [2, 4, 2, 8, 5];
const shape = { batch: BATCH, heads: HEADS, kvHeads: KV, headDim: D, valueDim: DV };
const SCORES = 2;
const base: StateOptions = { shape, scoreBound: SCORES };

interface Tokens {
  q: Float32Array;
  k: Float32Array;
  v: Float32Array;
}

/** Rows of [BATCH][heads][N][width], or [BATCH][N][heads][width], with norms up to `norm`. */
function tokens(seed: number, layout: StateOptions['layout'] = 'bhnd'): Tokens {
  const r = random(seed);
  const bounded = (heads: number) => {
    // |q| |k| / sqrt(D) stays below SCORES
    const most = Math.sqrt(SCORES * Math.sqrt(D));
    const rows = Array.from({ length: BATCH * heads * N }, () => draw(D, r.normal));
    return Float32Array.from(rows.flatMap((row) => Array.from(row, (x) => (x * most * 0.99) / Math.hypot(...row))));
  };
  expect(['bhnd', 'bnhd']).toContain(layout);
  return { q: bounded(HEADS), k: bounded(KV), v: draw(BATCH * KV * N * DV, r.normal) };
}

/** Tokens from .. to - 1 of all heads. */
function piece(x: Float32Array, heads: number, width: number, from: number, to: number, layout = 'bhnd'): Float32Array {
  const outer = layout === 'bhnd' ? BATCH * heads : BATCH;
  const inner = layout === 'bhnd' ? width : heads * width;
  const rows = Array.from({ length: outer }, (_, n) => x.slice((n * N + from) * inner, (n * N + to) * inner));
  return Float32Array.from(rows.flatMap((row) => [...row]));
}

const keysOf = ({ k, v }: Tokens, from: number, to: number, layout?: string) => ({
  k: piece(k, KV, D, from, to, layout),
  v: piece(v, KV, DV, from, to, layout),
});

/** Ends of pieces. */
const CUTS: [string, number[]][] = [
  ['at once', [N]],
  ['one by one', Array.from({ length: N }, (_, n) => n + 1)],
  ['in chunks', [32, 64, 96, N]],
  ['in uneven pieces', [5, 6, 37, 38, 70, 99, N]],
];

function fill(state: AttentionState, all: Tokens, ends: readonly number[], layout?: string): AttentionState {
  let from = state.length;
  for (const to of ends) {
    state.append(keysOf(all, from, to, layout));
    from = to;
  }
  return state;
}

/** Float64 attention of all queries to all keys. */
function exactly({ q, k, v }: Tokens, options: StateOptions, queryOffset = 0) {
  const { rotary, scale, layout } = options;
  return reference.forward({ q, k, v, shape: { ...shape, queryLength: N }, rotary, scale, layout, queryOffset });
}

/** Jest takes a second to compare so many. */
const sameBytes = (a: Uint8Array, b: Uint8Array) => Buffer.compare(a, b) === 0;

const keptBound = ({ output, report }: ForwardResult, expected: { output: Float64Array }, v: Float32Array) => {
  expect(report.errorBound).not.toBeNull();
  expect(maxDifference(output, expected.output)).toBeLessThanOrEqual(report.errorBound! * maxAbs(v));
};

const VARIANTS: [string, Partial<StateOptions>][] = [
  ['by the default tolerance', {}],
  ['tolerance 0.1', { tolerance: 0.1 }],
  ['tolerance 1e-5', { tolerance: 1e-5 }],
  ['degree 8', { degree: 8 }],
  ['tokens before heads', { layout: 'bnhd' }],
  ['no rotation', { rotary: false }],
  ['partial rotation of neighbours', { rotary: { dim: 4, interleaved: true } }],
  ['yarn', { rotary: { scaling: { type: 'yarn', factor: 1.5, originalLength: 50, attentionFactor: 1 } } }],
  ['a smaller, negative scale', { scale: -0.2 }],
];

eachBinary((attention) => {
  describe.each(VARIANTS)('%s', (_, own) => {
    const options = { ...base, ...own };
    const all = tokens(1, options.layout);
    const expected = exactly(all, options);
    test.each(CUTS)('keys that come %s', (_, ends) => {
      const state = fill(attention().createState(options), all, ends, options.layout);
      expect(state.length).toBe(N);
      const result = state.attend({ q: all.q });
      keptBound(result, expected, all.v);
      // log of a sum whose terms are off by t
      expect(maxDifference(result.lse, expected.lse)).toBeLessThanOrEqual(2 * result.report.errorBound! + 1e-6);
      const { tolerance = 1e-3 } = own;
      expect(state.degree).toBe(own.degree ?? theory.degreeFor({ tolerance, scoreBound: SCORES }));
    });
  });

  test('decoding token by token is causal attention', () => {
    const all = tokens(2);
    const state = attention().createState(base);
    const causal = reference.forward({ ...all, shape: { ...shape, queryLength: N }, causal: true });
    for (let n = 0; n < N; n++) {
      state.append(keysOf(all, n, n + 1));
      const { output, report } = state.attend({ q: piece(all.q, HEADS, D, n, n + 1) });
      const row = piece(Float32Array.from(causal.output), HEADS, DV, n, n + 1);
      expect(maxDifference(output, row)).toBeLessThanOrEqual(report.errorBound! * maxAbs(all.v) + 1e-6);
    }
  });

  test('keys that wait, fewer than a chunk, are attended exactly', () => {
    const all = tokens(3);
    const few = keysOf(all, 0, 31);
    const state = attention().createState({ ...base, degree: 0 });
    state.append(few);
    const { output } = state.attend({ q: all.q, position: 0 });
    const lengths = { queryLength: N, keyLength: 31 };
    const expected = reference.forward({ ...few, q: all.q, shape: { ...shape, ...lengths } });
    expect(maxDifference(output, expected.output)).toBeLessThan(1e-6); // 3e-7 seen
  });

  test('positions are given, or go on from the keys so far', () => {
    const all = tokens(4);
    const shifted = attention().createState({ ...base, tolerance: 1e-5 });
    shifted.append({ ...keysOf(all, 0, 60), position: 1000 });
    shifted.append(keysOf(all, 60, N));
    const straight = fill(attention().createState({ ...base, tolerance: 1e-5 }), all, [N]);
    // Only differences of positions matter.
    const moved = shifted.attend({ q: all.q });
    expect(shifted.attend({ q: all.q, position: 1000 }).output).toEqual(moved.output);
    expect(maxDifference(moved.output, straight.attend({ q: all.q }).output)).toBeLessThan(1e-5);
    expect(maxDifference(moved.output, straight.attend({ q: all.q, position: 50 }).output)).toBeGreaterThan(1e-3);
  });

  test('positions of tables are rows', () => {
    const all = tokens(5);
    const angles = Float32Array.from({ length: N * (D / 2) }, (_, n) => Math.floor(n / (D / 2)) * 100 ** (-(n % (D / 2)) / (D / 2)));
    const rotary = { tables: { cos: angles.map(Math.cos), sin: angles.map(Math.sin) } };
    const state = fill(attention().createState({ ...base, rotary, scoreBound: 3 }), all, [40, N]);
    keptBound(state.attend({ q: all.q }), exactly(all, { ...base, rotary }), all.v);
    expect(() => state.append(keysOf(all, 0, 1))).toThrow(
      new RangeError('append: positions 100 to 100 are not all rows of rotary.tables, which has 100'),
    );
  });

  test.each([
    [10, 70],
    [50, 60],
    [33, 64],
    [0, 20],
  ])('states of keys 0 to %d, and on to %d, and the rest, add up', (first, second) => {
    const all = tokens(6);
    const options: StateOptions = { ...base, tolerance: 1e-5 };
    const parts = [
      [0, first],
      [first, second],
      [second, N],
    ].map(([from, to]) => {
      const state = attention().createState(options);
      if (to > from) state.append({ ...keysOf(all, from, to), position: from });
      return state;
    });
    parts[0].merge(parts[1]);
    parts[0].merge(parts[2]);
    expect(parts.map(({ length }) => length)).toEqual([N, second - first, N - second]);
    keptBound(parts[0].attend({ q: all.q }), exactly(all, options), all.v);
  });

  test('a state may be merged with itself: every key twice', () => {
    const all = tokens(7);
    const state = fill(attention().createState(base), all, [N]);
    const before = state.attend({ q: all.q });
    state.merge(state);
    const after = state.attend({ q: all.q, position: 0 });
    expect(state.length).toBe(2 * N);
    // 72 waiting keys of the two fill two chunks: other keys are exact than before
    expect(maxDifference(after.output, before.output)).toBeLessThanOrEqual(2 * before.report.errorBound! * maxAbs(all.v));
    expect(after.lse[0] - before.lse[0]).toBeCloseTo(Math.log(2), 2);
  });

  describe('serialize', () => {
    const all = tokens(8);
    test.each([20, 32, 75])('after %d keys, and on from there', (n) => {
      const state = fill(attention().createState(base), all, [n]);
      const bytes = state.serialize();
      expect(bytes.length - state.bytes).toBeLessThan(200);
      const shifted = new Uint8Array(bytes.length + 3).subarray(3); // an offset that is not aligned
      shifted.set(bytes);
      const copy = attention().createState({ ...base, from: shifted });
      expect(copy.length).toBe(n);
      expect(sameBytes(copy.serialize(), bytes)).toBe(true);
      expect(attention().createState({ ...base, from: Buffer.from(bytes) }).length).toBe(n); // lies in a pool
      expect(fill(copy, all, [N]).attend({ q: all.q })).toMatchObject({ output: fill(state, all, [N]).attend({ q: all.q }).output });
    });

    test('what was made otherwise is refused', () => {
      const from = fill(attention().createState(base), all, [N]).serialize();
      const refuse = (options: Partial<StateOptions>, message: string) =>
        expect(() => attention().createState({ ...base, from, ...options })).toThrow(`createState: ${message}`);
      refuse({ shape: { ...shape, heads: 2 } }, 'from has another heads');
      refuse({ shape: { ...shape, valueDim: 6 } }, 'from has another valueDim');
      refuse({ scale: 1 }, 'from has another scale');
      refuse({ layout: 'bnhd' }, 'from has another layout');
      refuse({ degree: 2 }, 'from has another degree');
      refuse({ scoreBound: 1, degree: attention().createState(base).degree }, 'from has another scoreBound');
      refuse({ rotary: { base: 9999 } }, 'from has another rotary');
      refuse({ rotary: false }, 'from has another rotary');
      const state = attention().createState(base);
      const needs = 8 * 17 + state.bytes;
      refuse({ from: from.subarray(0, 200) }, `from has 200 bytes, this state needs ${needs}`);
      refuse({ from: from.subarray(0, 7) }, 'from is not what serialize gave (7 bytes)');
      refuse({ from: new Uint8Array(1000) }, 'from is not what serialize gave (1000 bytes)');
      const damaged = (at: number, value: number) => {
        const copy = from.slice();
        new DataView(copy.buffer).setFloat64(8 * at, value, true);
        return copy;
      };
      refuse({ from: damaged(12, NaN) }, 'from is damaged: it says NaN keys, 4 of them waiting, norm 2.3546');
      refuse({ from: damaged(12, 101) }, 'from is damaged: it says 101 keys, 4 of them waiting, norm 2.3546');
      refuse({ from: damaged(14, -1) }, 'from is damaged: it says 100 keys, 4 of them waiting, norm -1');
      refuse({ from: damaged(16, NaN) }, 'from is damaged');
      refuse({ from: damaged(17, 0) }, 'from is damaged: it says 100 keys, 0 of them waiting, norm 2.3546');
    });
  });

  test('constant in size: neither the state nor the memory grows over a thousand tokens', () => {
    const all = tokens(9);
    const state = fill(attention().createState(base), all, [N]);
    state.attend({ q: piece(all.q, HEADS, D, 0, 1) });
    const [bytes, memory] = [state.bytes, attention().memoryBytes];
    const [token, query] = [keysOf(all, 3, 4), piece(all.q, HEADS, D, 3, 4)];
    for (let n = 0; n < 1000; n++) {
      state.append(token);
      state.attend({ q: query });
    }
    expect([state.length, state.bytes, attention().memoryBytes]).toEqual([N + 1000, bytes, memory]);
    expect(state.bytes).toBe(16 + 4 * BATCH * KV * (32 * (8 + 12) + theory.rank(D, state.degree) * 12)); // padded to 8, to 8 + 4
  });

  test('many keys: sums over 2^17 stay as good as their chunks', () => {
    const [n, headDim] = [2 ** 17, 4];
    const state = attention().createState({ shape: { heads: 1, headDim }, scoreBound: 1, degree: 6 });
    const r = random(10);
    const [k, v] = [draw(n * headDim, () => 0.9 * r.uniform()), draw(n * headDim, () => 1 + r.uniform())];
    const q = draw(3 * headDim, () => 0.9 * r.uniform() - 0.45);
    for (let from = 0; from < n; from += 2 ** 14) {
      const part = (x: Float32Array) => x.subarray(from * headDim, (from + 2 ** 14) * headDim);
      state.append({ k: part(k), v: part(v) });
    }
    const { output } = state.attend({ q, position: 0 });
    const lengths = { queryLength: 3, keyLength: n };
    const expected = reference.forward({ q, k, v, shape: { heads: 1, headDim, ...lengths } });
    expect(maxDifference(output, expected.output) / maxAbs(v)).toBeLessThan(4e-6); // 1e-6 seen
  });

  test('an empty state gives zeros', () => {
    const { output, lse, report } = attention().createState(base).attend({ q: tokens(11).q });
    expect(output.every((x) => x === 0) && lse.every((x) => x === -Infinity)).toBe(true);
    expect(report).toMatchObject({ method: 'polynomial', scoreBound: 0, errorEstimate: null });
  });

  describe('scores beyond the bound', () => {
    const all = tokens(12);
    test('are an error that says so, and the state goes on', () => {
      const state = fill(attention().createState(base), all, [N]);
      const before = state.attend({ q: all.q });
      const q = all.q.map((x) => 1.5 * x);
      expect(() => state.attend({ q })).toThrow(
        /^attend: scores may reach 2\.9\d \(\|scale\| \|q\| \|k\|\), the scoreBound of the state is 2$/,
      );
      expect(state.attend({ q: all.q }).output).toEqual(before.output);
    });

    test("or are reported, with onMiss: 'report'", () => {
      const state = fill(attention().createState({ ...base, onMiss: 'report' }), all, [N]);
      const { report } = state.attend({ q: all.q.map((x) => 1.5 * x) });
      expect(report.errorBound).toBeNull();
      expect(report.reason).toMatch(/scores may reach 2\.9\d, beyond the bound 2 of the state$/);
    });
  });

  test('tables are copied', () => {
    const all = tokens(15);
    const tables = { cos: new Float32Array(N * 4).fill(1), sin: new Float32Array(N * 4) };
    const state = fill(attention().createState({ ...base, rotary: { tables } }), all, [N]);
    const before = state.attend({ q: all.q }).output;
    tables.cos.fill(-1);
    expect(state.attend({ q: all.q, position: 0 }).output).toEqual(before);
  });

  test('sums beyond float32 are an error, or a result without a bound', () => {
    const state = (onMiss: 'error' | 'report') => {
      const one = attention().createState({ shape: { heads: 1, headDim: 2 }, scoreBound: 1, degree: 2, onMiss });
      for (let n = 0; n < 40; n++) one.append({ k: Float32Array.of(1e9, 1e9), v: Float32Array.of(1e11, 1e11) });
      return one;
    };
    const q = Float32Array.of(1e-38, 1e-38);
    expect(state('report').attend({ q: q.map((x) => x * 1e28) }).report.errorBound).not.toBeNull();
    const poisoned = state('report');
    for (let n = 0; n < 30; n++) poisoned.merge(poisoned); // 40 * 2^30 keys
    expect(poisoned.attend({ q: Float32Array.of(1e-10, 1e-10) }).report.errorBound).toBeNull();
  });

  test('products below float32 are an error, or a result without a bound', () => {
    const options = { shape: { heads: 1, headDim: 2 }, scoreBound: 3, scale: 1, tolerance: 0.01, rotary: false } as const;
    const attend = (onMiss: 'error' | 'report', size: number, value: number) => {
      const state = attention().createState({ ...options, onMiss });
      for (let n = 0; n < 40; n++) state.append({ k: Float32Array.of(1 / size, -1 / size), v: Float32Array.of(value, n % 2 ? value : -value) });
      return state.attend({ q: Float32Array.of(size, size / 2) }).report;
    };
    expect(attend('error', 1, 1e-20).errorBound).toBeLessThan(0.02);
    expect(() => attend('error', 1e6, 1e-30)).toThrow('attend: products of |q| 1e+6, |k| 1e-6 and v up to 1e-30 fall below float32; scale these to be of one size');
    expect(attend('report', 1e6, 1e-30)).toMatchObject({ errorBound: null, reason: expect.stringContaining('products of entries leave float32') });
  });

  test('a state that the memory cannot hold is refused at once', async () => {
    const small = await createRopeAttention({ maxMemoryBytes: 2 ** 20 });
    expect(() => small.createState({ shape: { heads: 1, headDim: 64 }, scoreBound: 1, degree: 3 })).toThrow(
      /^createState: needs \d+ bytes of WebAssembly memory, the limit is 1048576$/,
    );
    small.dispose();
  });

  describe('misuse leaves the state as it was', () => {
    const all = tokens(13);
    const good = keysOf(all, 0, 2);
    const poisoned = (x: Float32Array, n: number, value: number) => x.map((old, at) => (at === n ? value : old));
    const cases: [string, (state: AttentionState) => unknown, string][] = [
      ['NaN in k', (s) => s.append({ ...good, k: poisoned(good.k, 5, NaN) }), 'append: k[5] must be finite, got NaN'],
      ['infinity in v', (s) => s.append({ ...good, v: poisoned(good.v, 7, -Infinity) }), 'append: v[7] must be finite, got -Infinity'],
      ['NaN in q', (s) => s.attend({ q: poisoned(all.q, 0, NaN) }), 'attend: q[0] must be finite, got NaN'],
      ['a length of k', (s) => s.append({ ...good, k: new Float32Array(33) }), 'append: k has 33 values, shape needs a multiple of 32, at least one'],
      ['terms beyond float32', (s) => s.append({ ...good, k: good.k.map((x) => 1e12 * x) }), 'append: |k|^6 |v| reaches'],
      ['no tokens', (s) => s.attend({ q: new Float32Array(0) }), 'attend: q has 0 values, shape needs a multiple of 64, at least one'],
      ['a length of v', (s) => s.append({ ...good, v: new Float32Array(20) }), 'append: v has 20 values, k has 2 tokens and v needs 40'],
      ['an array', (s) => s.append({ ...good, k: [1] as never }), 'append: k must be a Float32Array, got an array'],
      ['nothing', (s) => s.append(undefined as never), 'append: its argument must be an object, got undefined'],
      ['an unknown option', (s) => s.attend({ q: all.q, offset: 1 } as never), 'attend: there is no option offset; known are q, position'],
      ['a position', (s) => s.attend({ q: all.q, position: 0.5 }), 'attend: position must be an integer from -2147483648 to 2147483646, got 0.5'],
      ['the last position', (s) => s.append({ ...good, position: 2 ** 31 - 2 }), 'append: the last position is 2147483647, 2147483646 is the largest'],
      ['merging something else', (s) => s.merge({} as never), 'merge: its argument must be a state of createState, got a Object'],
      ['merging another shape', (s) => s.merge(attention().createState({ ...base, shape: { ...shape, headDim: 10 } })), 'merge: the other state has another headDim'],
    ];
    test.each(cases)('%s', (_, misuse, message) => {
      const state = fill(attention().createState(base), all, [N]);
      const before = state.serialize();
      expect(() => misuse(state)).toThrow(message);
      expect(sameBytes(state.serialize(), before)).toBe(true);
    });

    const wrong: [string, Partial<Record<keyof StateOptions | 'window', unknown>>, string][] = [
      ['no bound', { scoreBound: undefined }, 'createState: scoreBound must be a number, got undefined'],
      ['bound 0', { scoreBound: 0 }, 'createState: scoreBound must be above 0 and finite, got 0'],
      ['a bound that no degree serves', { scoreBound: 20 }, 'createState: no degree up to 8 keeps the tolerance 0.001 on scores up to 20'],
      ['a tolerance below float32', { tolerance: 1e-9 }, 'createState: tolerance must be finite and at least 0.000001, got 1e-9'],
      ['degree and tolerance', { tolerance: 0.1, degree: 2 }, 'createState: degree takes the place of tolerance; give one of them'],
      ['a degree that keeps nothing', { scoreBound: 12, degree: 4 }, 'createState: degree 4 keeps no error on scores up to 12'],
      ['degree 9', { degree: 9 }, 'createState: degree must be an integer from 0 to 8, got 9'],
      ['a length', { shape: { ...shape, queryLength: 4 } }, 'createState: there is no option shape.queryLength; known are batch, heads, kvHeads, headDim, valueDim'],
      ['a mask', { window: [1, 1] }, 'createState: there is no option window; known are shape, rotary, scale, layout, scoreBound, tolerance, degree, onMiss, from'],
      ['positions', { rotary: { keyPositions: [1] } }, 'createState: rotary.keyPositions is not for states: append and attend take a position'],
      ['a scaling by length', { rotary: { scaling: { type: 'dynamic', factor: 2, originalLength: 8 } } }, "createState: rotary.scaling of type 'dynamic' needs length, as the sequence has none yet"],
      ['from text', { from: 'abc' }, "createState: from must be a Uint8Array, got 'abc'"],
    ];
    test.each(wrong)('%s', (_, options, message) => {
      expect(() => attention().createState({ ...base, ...options } as never)).toThrow(message);
    });
  });
});

describe('two instances', () => {
  let [one, two] = [] as unknown as [RopeAttention, RopeAttention];
  beforeAll(async () => {
    [one, two] = [await createRopeAttention({ relaxedSimd: false }), await createRopeAttention()];
  });
  afterAll(() => two.dispose());

  test('their states merge, also when one instance is gone', () => {
    const all = tokens(14);
    const [a, b] = [one.createState(base), two.createState(base)];
    a.append(keysOf(all, 0, 50));
    b.append({ ...keysOf(all, 50, N), position: 50 });
    one.dispose();
    expect(() => a.append(keysOf(all, 0, 1))).toThrow('append: this instance was disposed');
    b.merge(a);
    keptBound(b.attend({ q: all.q }), exactly(all, base), all.v);
  });
});
