// SPDX-License-Identifier: MIT
//
// Laws that attention keeps whatever the method: what may be shifted, scaled, permuted or added without changing the result,
// and sums that gradients must have. No reference is needed, so they hold at any size; both engines must keep them to a few
// roundings, the polynomial one because it is a softmax of other weights, centred.

import { describe, expect, test } from '@jest/globals';

import { reference } from '../dist/index.js';
import type { Report } from '../dist/index.js';
import { UNIT, eachBinary, forwardArgs, inLayout, inner, maxAbs, problem, random, withLayout } from './support.js';
import type { Floats, Problem, Setting } from './support.js';

const shape = { batch: 2, heads: 4, kvHeads: 2, queryLength: 70, headDim: 8, valueDim: 5 };
const KEY_HEADS = 4;
/** Scores within about 1.5, where a polynomial of degree 3 is at home. */
const make = (setting: Setting, seed: number) => problem(setting, seed, (r) => 0.6 * r.normal());

/**
 * Roundings, 2^-24, of the size of the result (what is large beside the result cancels before it, so there are several). Twice
 * the most seen over both engines and binaries, which stands behind each.
 */
const TOLERANCE = {
  shift: 35, // 17.3
  shiftGradient: 24, // 11.8
  constant: 18, // 9.0
  constantGradient: 3.2, // 1.6
  first: 2.2, // 1.1
  order: 20, // 9.5
  orderGradient: 16, // 7.7
  added: 21, // 10.2
  addedGradient: 31, // 15.4
  lse: 3.5, // 1.8
  linear: 1.4, // 0.7
  linearGradient: 15, // 7.2
  sums: 0.9, // 0.45
  halves: 2.2, // 1.1
  rotation: 5, // 2.5
  before: 9, // 4.4
};

/** |x - y| <= roundings * 2^-24 * size for every entry; size is that of y unless given. */
function expectClose(x: Floats, y: Floats | number[], roundings: number, size = maxAbs(Float64Array.from(y))): void {
  expect(x).toBeAllclose(y, { atol: roundings * UNIT * size });
}

/** f(row of x, flat row number) for every row. */
function mapRows(x: Float32Array, width: number, f: (row: Float32Array, r: number) => Float32Array): Float32Array {
  const result = new Float32Array(x.length);
  for (let r = 0; r < x.length / width; r++) result.set(f(x.subarray(r * width, (r + 1) * width), r), r * width);
  return result;
}

eachBinary((attention) => {
  describe.each([
    { method: 'exact' as const, options: { method: 'exact' as const } },
    { method: 'polynomial' as const, options: { method: 'polynomial' as const, degree: 3, onMiss: 'report' as const } },
  ])('$method', ({ method, options }) => {
    const forward = (args: Problem) => attention().forward({ ...forwardArgs(args), ...options });
    const backward = (args: Problem) => attention().backward({ ...args, ...options });

    test.each([7, 1000])('shifting all positions by %d changes nothing', (shift) => {
      const args = make({ shape, queryOffset: 3 }, 1);
      // Keys start at position 0: turn them by the shift beforehand, one row at a time.
      const turn = (x: Float32Array, inverse = false) =>
        attention().rotate({ x, shape: { batch: x.length / 8, heads: 1, queryLength: 1, headDim: 8 }, queryOffset: shift, inverse });
      const shifted = { ...args, k: turn(args.k), queryOffset: 3 + shift };
      expectClose(forward(shifted).output, forward(args).output, TOLERANCE.shift);
      expectClose(forward(shifted).lse, forward(args).lse, TOLERANCE.shift);
      const [moved, still] = [backward(shifted), backward(args)];
      expectClose(moved.dq, still.dq, TOLERANCE.shiftGradient);
      expectClose(turn(moved.dk, true), still.dk, TOLERANCE.shiftGradient);
      expectClose(moved.dv, still.dv, TOLERANCE.shift);
    });

    test.each([false, true])('constant values come out as they are, with no gradient for q and k; causal %s', (causal) => {
      const args = make({ shape, causal }, 2);
      const v = mapRows(args.v, 5, () => Float32Array.of(3, -2, 0.5, 0, 100));
      const { output } = forward({ ...args, v });
      expectClose(output, mapRows(output, 5, () => Float32Array.of(3, -2, 0.5, 0, 100)), TOLERANCE.constant);
      const { dq, dk } = backward({ ...args, v });
      expectClose(dq, new Float32Array(dq.length), TOLERANCE.constantGradient, 100);
      expectClose(dk, new Float32Array(dk.length), TOLERANCE.constantGradient, 100);
    });

    test('the first causal row is the first value', () => {
      const args = make({ shape, causal: true }, 3);
      const { output, lse } = forward(args);
      for (let head = 0; head < 8; head++) {
        const first = Math.floor(head / 2) * 70;
        const value = args.v.subarray(5 * first, 5 * first + 5);
        expectClose(output.subarray(head * 350, head * 350 + 5), value, TOLERANCE.first, maxAbs(args.v));
        // Position 0 is not rotated: its score is the plain product.
        const [q, k] = [args.q.subarray(head * 560, head * 560 + 8), args.k.subarray(first * 8, first * 8 + 8)];
        expect(Math.abs(lse[head * 70] - inner(q, k) / Math.sqrt(8))).toBeLessThan(TOLERANCE.first * UNIT * 2);
      }
    });

    test('the order of keys does not matter without positions', () => {
      const args = make({ shape, rotary: false }, 4);
      const order = Array.from({ length: 70 }, (_, j) => (j * 27 + 5) % 70);
      const permute = (x: Float32Array, width: number) =>
        mapRows(x, width, (_, r) => {
          const from = Math.floor(r / 70) * 70 + order[r % 70];
          return x.subarray(from * width, (from + 1) * width);
        });
      const permuted = { ...args, k: permute(args.k, 8), v: permute(args.v, 5) };
      expectClose(forward(permuted).output, forward(args).output, TOLERANCE.order);
      expectClose(forward(permuted).lse, forward(args).lse, TOLERANCE.order);
      const [moved, still] = [backward(permuted), backward(args)];
      expectClose(moved.dq, still.dq, TOLERANCE.orderGradient);
      expectClose(moved.dk, permute(still.dk, 8), TOLERANCE.orderGradient);
      expectClose(moved.dv, permute(still.dv, 5), TOLERANCE.order);
    });

    test('a vector added to all keys does not matter without positions', () => {
      const args = make({ shape, rotary: false }, 5);
      const r = random(55);
      const added = Array.from({ length: KEY_HEADS }, () => Float32Array.from({ length: 8 }, r.normal));
      const k = mapRows(args.k, 8, (row, n) => row.map((x, d) => x + added[Math.floor(n / 70)][d]));
      expectClose(forward({ ...args, k }).output, forward(args).output, TOLERANCE.added);
      const { dq, dv } = backward(args);
      const moved = backward({ ...args, k });
      expectClose(moved.dq, dq, TOLERANCE.addedGradient);
      expectClose(moved.dv, dv, TOLERANCE.added);
    });

    test.each([false, true])('q times 4 is the scale times 4, bit by bit; causal %s', (causal) => {
      const args = make({ shape, causal, scale: 0.25 }, 6);
      const scaled = { ...args, q: args.q.map((x) => 4 * x), scale: 0.0625 };
      expect(forward(scaled).output).toEqual(forward(args).output);
      expect(forward(scaled).lse).toEqual(forward(args).lse);
      const [a, b] = [backward(scaled), backward(args)];
      expect(a.dq.map((x) => 4 * x)).toEqual(b.dq);
      expect(a.dk).toEqual(b.dk);
      expect(a.dv).toEqual(b.dv);
    });

    test('the other layout gives the same, bit by bit, and the same report', () => {
      const args = make({ shape: { ...shape, keyLength: 83 }, causal: true, queryOffset: 13 }, 12);
      const other = withLayout(args, 'bnhd');
      const timeless = ({ milliseconds: _, ...report }: Report) => report;
      const [a, b] = [forward(args), forward(other)];
      expect(b.output).toEqual(inLayout(a.output, 'bnhd', 4, 70, 5));
      expect(b.lse).toEqual(a.lse);
      expect(timeless(b.report)).toEqual(timeless(a.report));
      const [c, d] = [backward(args), backward(other)];
      expect(d.dq).toEqual(inLayout(c.dq, 'bnhd', 4, 70, 8));
      expect(d.dk).toEqual(inLayout(c.dk, 'bnhd', 2, 83, 8));
      expect(d.dv).toEqual(inLayout(c.dv, 'bnhd', 2, 83, 5));
      expect(timeless(d.report)).toEqual(timeless(c.report));
    });

    test('positions that are counted anyway change nothing, bit by bit', () => {
      const args = make({ shape, causal: true, queryOffset: 3 }, 13);
      const count = (first: number) => Array.from({ length: 70 }, (_, n) => first + n);
      const rotary = { queryPositions: count(3), keyPositions: Int16Array.from([...count(0), ...count(0)]) };
      const [a, b] = [args, { ...args, rotary }];
      for (const name of ['output', 'lse'] as const) expect(forward(b)[name]).toEqual(forward(a)[name]);
      for (const name of ['dq', 'dk', 'dv'] as const) expect(backward(b)[name]).toEqual(backward(a)[name]);
    });

    test('rotation may come before, at any positions of each batch', () => {
      const args = make({ shape, causal: true }, 14);
      const r = random(14);
      const [queryPositions, keyPositions] = [0, 1].map(() => Float64Array.from({ length: 140 }, () => 500 * r.normal()));
      const turn = (x: Float32Array, positions: Float64Array, heads: number, inverse = false) => {
        const rotary = { queryPositions: positions };
        return attention().rotate({ x, shape: { ...shape, heads, kvHeads: heads }, rotary, inverse });
      };
      const before = { ...args, rotary: false as const, q: turn(args.q, queryPositions, 4), k: turn(args.k, keyPositions, 2) };
      const within = { ...args, rotary: { queryPositions, keyPositions } };
      expectClose(forward(within).output, forward(before).output, TOLERANCE.before);
      expectClose(forward(within).lse, forward(before).lse, TOLERANCE.before);
      const [a, b] = [backward(within), backward(before)];
      expectClose(a.dq, turn(b.dq, queryPositions, 4, true), TOLERANCE.before);
      expectClose(a.dk, turn(b.dk, keyPositions, 2, true), TOLERANCE.before);
      expectClose(a.dv, b.dv, TOLERANCE.before);
    });

    test('tables of the same angles are the same rotation', () => {
      const args = make({ shape, causal: true }, 15);
      const angles = Float64Array.from({ length: 70 * 4 }, (_, n) => Math.floor(n / 4) * 10000 ** (-(n % 4) / 4));
      const tables = { cos: Float32Array.from(angles, Math.cos), sin: Float32Array.from(angles, Math.sin) };
      const [a, b] = [args, { ...args, rotary: { tables } }];
      expectClose(forward(b).output, forward(a).output, TOLERANCE.before);
      for (const name of ['dq', 'dk', 'dv'] as const) expectClose(backward(b)[name], backward(a)[name], TOLERANCE.before);
    });

    test('scale 0: means of the values, lse the logarithm of their number', () => {
      const args = make({ shape, causal: true, scale: 0 }, 7);
      const { output, lse } = forward(args);
      expectClose(lse, Array.from(lse, (_, r) => Math.log((r % 70) + 1)), TOLERANCE.lse);
      expectClose(output, reference.forward(args).output, TOLERANCE.constant, maxAbs(args.v));
    });

    test.each([false, true])('values and the output gradient enter linearly; causal %s', (causal) => {
      const args = make({ shape, causal }, 8);
      const other = make({ shape, causal }, 9);
      const mix = (x: Float32Array, y: Float32Array) => x.map((value, n) => 2 * value - y[n]);
      const mixed = { ...args, v: mix(args.v, other.v) };
      const expected = mix(forward(args).output, forward({ ...args, v: other.v }).output);
      expectClose(forward(mixed).output, expected, TOLERANCE.linear, 3 * maxAbs(args.v));
      const gradients = [args.dOutput, other.dOutput, mix(args.dOutput, other.dOutput)];
      const [a, b, c] = gradients.map((dOutput) => backward({ ...args, dOutput }));
      for (const name of ['dq', 'dk', 'dv'] as const) expectClose(c[name], mix(a[name], b[name]), TOLERANCE.linearGradient);
    });

    test.each([false, true])('sums of gradients: dv as dOutput, q.dq as k.dk, dk none without positions; causal %s', (causal) => {
      const args = make({ shape, causal }, 10);
      const { dq, dk, dv } = backward(args);
      // Weights of a row add up to 1.
      for (let d = 0; d < 5; d++) {
        const column = (x: Float32Array) => x.reduce((sum, value, n) => (n % 5 === d ? sum + value : sum), 0);
        expect(Math.abs(column(dv) - column(args.dOutput))).toBeLessThan(TOLERANCE.sums * UNIT * 560);
      }
      // Both are the derivative by the logarithm of the scale.
      const size = Math.sqrt(inner(dq, dq) * inner(args.q, args.q));
      expect(Math.abs(inner(args.q, dq) - inner(args.k, dk))).toBeLessThan(TOLERANCE.sums * UNIT * size);

      const unturned = backward({ ...args, rotary: false });
      for (let keyHead = 0; keyHead < KEY_HEADS; keyHead++) {
        for (let d = 0; d < 8; d++) {
          let sum = 0;
          for (let j = 0; j < 70; j++) sum += unturned.dk[(keyHead * 70 + j) * 8 + d];
          expect(Math.abs(sum)).toBeLessThan(TOLERANCE.sums * UNIT * 70 * maxAbs(unturned.dk));
        }
      }
    });

    // Exact only: the polynomial is fitted to the scores of each call, so its three calls differ by its error.
    if (method !== 'exact') return;
    test('attention over all keys is that over two halves, weighted by exp(lse)', () => {
      const args = make({ shape, queryOffset: 70 }, 11);
      const half = (x: Float32Array, width: number, second: boolean) => {
        const rows = Array.from({ length: KEY_HEADS * 35 * width }, (_, n) => {
          const keyHead = Math.floor(n / width / 35);
          return x[(keyHead * 70 + (second ? 35 : 0)) * width + (n - keyHead * 35 * width)];
        });
        return Float32Array.from(rows);
      };
      const over = (second: boolean) =>
        forward({
          ...args,
          k: half(args.k, 8, second),
          v: half(args.v, 5, second),
          shape: { ...shape, keyLength: 35 },
          queryOffset: second ? 35 : 70,
        });
      const [whole, a, b] = [forward(args), over(false), over(true)];
      const weight = whole.lse.map((_, r) => 1 / (1 + Math.exp(b.lse[r] - a.lse[r])));
      const output = whole.output.map((_, n) => {
        const w = weight[Math.floor(n / 5)];
        return w * a.output[n] + (1 - w) * b.output[n];
      });
      const lse = whole.lse.map((_, r) => a.lse[r] + Math.log1p(Math.exp(b.lse[r] - a.lse[r])));
      expectClose(output, whole.output, TOLERANCE.halves, maxAbs(args.v));
      expectClose(lse, whole.lse, TOLERANCE.lse);
    });
  });

  describe('rotate', () => {
    const x = make({ shape: { batch: 2, heads: 3, queryLength: 40, headDim: 12 } }, 12).q;
    const call = { x, shape: { batch: 2, heads: 3, queryLength: 40, headDim: 12 } };

    test.each([
      {},
      { dim: 4 },
      { dim: 0 },
      { interleaved: true },
      { dim: 10, interleaved: true, base: 500 },
      { frequencies: Float32Array.of(1, 0.3, 2, 0.001, -0.5, 0) },
    ])('%j: as in float64, at any position; the inverse undoes it', (rotary) => {
      for (const queryOffset of [0, 5, -17, 4096, 1000000]) {
        const turned = attention().rotate({ ...call, rotary, queryOffset });
        expectClose(turned, reference.rotate({ ...call, rotary, queryOffset }), TOLERANCE.rotation);
        expectClose(attention().rotate({ ...call, x: turned, rotary, queryOffset, inverse: true }), x, 2 * TOLERANCE.rotation);
      }
    });

    test('at given positions, of one batch or of each, and by tables', () => {
      const r = random(16);
      const positions = Array.from({ length: 80 }, () => 1000 * r.normal());
      const rows = Uint8Array.from({ length: 80 }, () => 20 * r.uniform());
      const angles = Float64Array.from({ length: 120 }, () => 6 * r.uniform());
      const tables = { cos: Float32Array.from(angles, Math.cos), sin: Float32Array.from(angles, Math.sin) };
      for (const rotary of [
        { queryPositions: positions },
        { queryPositions: positions.slice(0, 40), dim: 4 },
        { queryPositions: rows, tables },
        { queryPositions: rows.subarray(0, 40), tables, interleaved: true },
      ]) {
        for (const layout of ['bhnd', 'bnhd'] as const) {
          const turned = attention().rotate({ ...call, rotary, layout });
          expectClose(turned, reference.rotate({ ...call, rotary, layout }), TOLERANCE.rotation);
          const back = attention().rotate({ ...call, x: turned, rotary, layout, inverse: true });
          expectClose(back, x, 2 * TOLERANCE.rotation);
        }
      }
    });

    test('rows may be in the other layout', () => {
      const options = { rotary: { dim: 10, interleaved: true }, queryOffset: -3 };
      const turned = attention().rotate({ ...call, x: inLayout(x, 'bnhd', 3, 40, 12), layout: 'bnhd', ...options });
      expect(turned).toEqual(inLayout(attention().rotate({ ...call, ...options }), 'bnhd', 3, 40, 12));
    });

    test('dimensions past rotary.dim, and position 0, stay bit by bit', () => {
      const turned = attention().rotate({ ...call, rotary: { dim: 4 } });
      for (let r = 0; r < 240; r++) {
        const from = r % 40 === 0 ? 0 : 4;
        expect(turned.subarray(12 * r + from, 12 * r + 12)).toEqual(x.subarray(12 * r + from, 12 * r + 12));
      }
      expect(attention().rotate({ ...call, rotary: false })).toEqual(x);
    });
  });
});
