// SPDX-License-Identifier: MIT
//
// The float64 reference: against cases worked out by hand, against its own finite differences, and rotation against its
// inverse. Everything else is compared with it, so it is compared with nothing of ours.

import { describe, expect, test } from '@jest/globals';

import { gradientParts, reference } from '../dist/index.js';
import { describeSetting, draw, inLayout, inner, lengths, maxAbs, problem, random, relativeMap, withLayout } from './support.js';
import type { Floats, Problem, Setting } from './support.js';

/** Values that float64 arithmetic of a few dozen operations reproduces. */
const EXACT = { rtol: 1e-14, atol: 1e-15 };

describe('by hand', () => {
  // One query at position 1, two keys, quarter turn per position: the rotated query is (0, 1), the rotated keys (1, 0) and
  // (0, 1). With scale 1 the scores are 0 and 1.
  const args = {
    q: Float32Array.of(1, 0),
    k: Float32Array.of(1, 0, 1, 0),
    v: Float32Array.of(1, 3),
    dOutput: Float32Array.of(1),
    shape: { heads: 1, queryLength: 1, keyLength: 2, headDim: 2, valueDim: 1 },
    rotary: { frequencies: Float64Array.of(Math.PI / 2) },
    queryOffset: 1,
    scale: 1,
  };
  const e = Math.E;

  test('two keys, forward', () => {
    const { output, lse } = reference.forward(args);
    expect(output).toBeAllclose([(1 + 3 * e) / (1 + e)], EXACT);
    expect(lse).toBeAllclose([Math.log(1 + e)], EXACT);
  });

  test('two keys, backward', () => {
    // dS = (-2, 2) P_0 P_1; by the rotated query 2 P_0 P_1 (-1, 1), turned back by a quarter 2 P_0 P_1 (1, 1).
    const [p0, p1] = [1 / (1 + e), e / (1 + e)];
    const { dq, dk, dv } = reference.backward(args);
    expect(dv).toBeAllclose([p0, p1], EXACT);
    expect(dq).toBeAllclose([2 * p0 * p1, 2 * p0 * p1], EXACT);
    expect(dk).toBeAllclose([0, -2 * p0 * p1, 2 * p0 * p1, 0], EXACT);
  });

  test('one key takes all the weight, whatever its score', () => {
    const shape = { heads: 1, queryLength: 1, headDim: 2 };
    const one = { q: Float32Array.of(30, 40), k: Float32Array.of(50, -60), v: Float32Array.of(7, 8), shape, rotary: false as const };
    const { output, lse } = reference.forward(one);
    expect(output).toBeAllclose([7, 8]);
    expect(lse).toBeAllclose([(30 * 50 - 40 * 60) / Math.sqrt(2)], EXACT);
    const { dq, dk, dv } = reference.backward({ ...one, dOutput: Float32Array.of(2, 3) });
    expect([...dq, ...dk, ...dv]).toEqual([0, 0, 0, 0, 2, 3]);
  });

  test.each([
    { pairs: '(p, p + dim/2)', interleaved: false, dim: 4, turned: [-3, -2, 1, -4, 5, 6] },
    { pairs: '(2p, 2p + 1)', interleaved: true, dim: 4, turned: [-2, 1, -3, -4, 5, 6] },
    { pairs: '(p, p + dim/2) of 2', interleaved: false, dim: 2, turned: [-2, 1, 3, 4, 5, 6] },
    { pairs: 'none', interleaved: false, dim: 0, turned: [1, 2, 3, 4, 5, 6] },
  ])('rotation by a quarter and a half turn, pairs $pairs', ({ interleaved, dim, turned }) => {
    const frequencies = Float64Array.of(Math.PI / 2, Math.PI).subarray(0, dim / 2);
    const rotary = { dim, interleaved, frequencies };
    const shape = { heads: 1, queryLength: 2, headDim: 6 };
    const x = Float32Array.of(1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6);
    // Position 0 stays as it is, position 1 turns.
    expect(reference.rotate({ x, shape, rotary })).toBeAllclose([1, 2, 3, 4, 5, 6, ...turned], { atol: 1e-14 });
  });

  test('frequencies are base^(-2p/dim), positions start at queryOffset', () => {
    const shape = { heads: 1, queryLength: 1, headDim: 4 };
    const x = Float32Array.of(1, 1, 0, 0);
    for (const base of [10000, 500]) {
      const angles = [7, 7 / Math.sqrt(base)];
      const y = reference.rotate({ x, shape, rotary: { base }, queryOffset: 7 });
      expect(y).toBeAllclose([...angles.map(Math.cos), ...angles.map(Math.sin)], EXACT);
    }
    expect(reference.rotate({ x, shape, queryOffset: 7 })).toEqual(
      reference.rotate({ x, shape, rotary: { base: 10000 }, queryOffset: 7 }),
    );
  });

  // Scale 0 makes the weights of a row equal, and one-hot values show them: row i is its mask over the number of ones in it.
  test.each([
    { queryLength: 3, keyLength: 3, queryOffset: 0, mask: ['100', '110', '111'] },
    { queryLength: 2, keyLength: 4, queryOffset: 2, mask: ['1110', '1111'] },
    { queryLength: 2, keyLength: 4, queryOffset: 0, mask: ['1000', '1100'] },
    { queryLength: 4, keyLength: 2, queryOffset: 0, mask: ['10', '11', '11', '11'] },
    { queryLength: 4, keyLength: 2, queryOffset: -2, mask: ['00', '00', '10', '11'] },
    { queryLength: 2, keyLength: 2, queryOffset: 100, mask: ['11', '11'] },
    { queryLength: 2, keyLength: 2, queryOffset: -100, mask: ['00', '00'] },
  ])('causal mask $queryLength x $keyLength, offset $queryOffset: $mask', ({ queryLength, keyLength, queryOffset, mask }) => {
    const shape = { heads: 1, queryLength, keyLength, headDim: 2, valueDim: keyLength };
    const v = Float32Array.from({ length: keyLength ** 2 }, (_, n) => (n % (keyLength + 1) === 0 ? 1 : 0));
    const [q, k] = [new Float32Array(2 * queryLength).fill(1), new Float32Array(2 * keyLength).fill(1)];
    const { output, lse } = reference.forward({ q, k, v, shape, scale: 0, causal: true, queryOffset });
    const ones = mask.map((row) => row.replaceAll('0', '').length);
    expect(output).toBeAllclose(mask.flatMap((row, i) => [...row].map((bit) => (bit === '1' ? 1 / ones[i] : 0))), EXACT);
    expect(lse).toBeAllclose(ones.map(Math.log), EXACT);
  });

  test('window keeps keys from left before to right after the query', () => {
    const shape = { heads: 1, queryLength: 4, headDim: 2, valueDim: 4 };
    const v = Float32Array.from({ length: 16 }, (_, n) => (n % 5 === 0 ? 1 : 0));
    const ones = new Float32Array(8).fill(1);
    const { output } = reference.forward({ q: ones, k: ones, v, shape, scale: 0, window: [1, 1] });
    const [h, t] = [1 / 2, 1 / 3];
    expect(output).toBeAllclose([h, h, 0, 0, t, t, t, 0, 0, t, t, t, 0, 0, h, h], EXACT);
  });

  test.each([
    { segments: [0, 2], queryOffset: 0, mask: ['1100', '1100', '0011', '0011'] },
    { segments: [0, 1, 1, 3], queryOffset: 0, mask: ['1000', '0110', '0110', '0001'] },
    { segments: [0, 2], queryOffset: 1, mask: ['1100', '0011', '0011', '0011'] },
    { segments: [0, 2, 4], queryOffset: 2, mask: ['0011', '0011', '0000', '0000'] },
    { segments: [0, 3], queryOffset: -2, mask: ['1110', '1110', '1110', '1110'] },
    { segments: [0, 2], queryOffset: 0, window: [1, 0] as const, mask: ['1000', '1100', '0010', '0011'] },
  ])('segments $segments, offset $queryOffset: $mask', ({ mask, ...masks }) => {
    const shape = { heads: 1, queryLength: 4, headDim: 2, valueDim: 4 };
    const v = Float32Array.from({ length: 16 }, (_, n) => (n % 5 === 0 ? 1 : 0));
    const ones = new Float32Array(8).fill(1);
    const { output, lse } = reference.forward({ q: ones, k: ones, v, shape, scale: 0, ...masks });
    const counts = mask.map((row) => row.replaceAll('0', '').length);
    expect(output).toBeAllclose(mask.flatMap((row, i) => [...row].map((bit) => (bit === '1' ? 1 / counts[i] : 0))), EXACT);
    expect(lse).toBeAllclose(counts.map(Math.log), EXACT);
  });

  describe('what is done to scores', () => {
    // One query, two keys of score 0 unless said otherwise, values 1 and 3.
    const two = { ...args, q: Float32Array.of(0, 0), rotary: false as const, queryOffset: 0 };
    const log3 = Math.log(3);

    test('bias: entry i - j + keyLength - 1', () => {
      // j = 0 has entry 1, j = 1 entry 0: weights 3/4 for the second key.
      const bias = Float64Array.of(log3, 0);
      const { output, lse } = reference.forward({ ...two, bias });
      expect(output).toBeAllclose([1 / 4 + 9 / 4], EXACT);
      expect(lse).toBeAllclose([Math.log(4)], EXACT);
      // dS = P_0 P_1 (-2, 2)
      expect(reference.backward({ ...two, bias }).dBias!).toBeAllclose([3 / 8, -3 / 8], EXACT);
    });

    test('bias of each head, and mask of each head', () => {
      const shape = { ...two.shape, heads: 2, kvHeads: 1 };
      const heads = { ...two, shape, q: new Float32Array(4), dOutput: Float32Array.of(1, 1) };
      const bias = Float64Array.of(log3, 0, 0, log3);
      expect(reference.forward({ ...heads, bias }).output).toBeAllclose([10 / 4, 6 / 4], EXACT);
      expect(reference.backward({ ...heads, bias }).dBias!).toBeAllclose([3 / 8, -3 / 8, 3 / 8, -3 / 8], EXACT);
      const mask = Float64Array.of(0, log3, log3, 0);
      expect(reference.forward({ ...heads, mask, maskShape: [1, 2, 1, 2] }).output).toBeAllclose([10 / 4, 6 / 4], EXACT);
      expect(reference.forward({ ...heads, mask: mask.subarray(0, 2) }).output).toBeAllclose([10 / 4, 10 / 4], EXACT);
    });

    test('mask: -Infinity, all below -3.4e29 and byte 0 forbid', () => {
      for (const mask of [Float32Array.of(-Infinity, 0), Float32Array.of(-2e30, 5), Uint8Array.of(0, 200)]) {
        expect(reference.forward({ ...two, mask }).output).toBeAllclose([3], EXACT);
      }
      const { output, lse } = reference.forward({ ...two, mask: Uint8Array.of(0, 0) });
      expect([output[0], lse[0]]).toEqual([0, -Infinity]);
    });

    test('softcap c: c tanh(s / c), before bias', () => {
      // Scores 0 and 2 ln 3 without rotation; capped at ln 9: ln 9 tanh 1.
      const capped = { ...args, rotary: false as const, k: Float32Array.of(0, 0, 1, 0), scale: 2 * log3, softcap: 2 * log3 };
      expect(reference.forward(capped).lse).toBeAllclose([Math.log(1 + 9 ** Math.tanh(1))], EXACT);
      const bias = Float64Array.of(1, 0);
      expect(reference.forward({ ...capped, bias }).lse).toBeAllclose([Math.log(1 + Math.E * 9 ** Math.tanh(1))], EXACT);
      // dk_1 = scale (1 - tanh^2 1) P_0 P_1 2 q
      const p1 = 9 ** Math.tanh(1) / (1 + 9 ** Math.tanh(1));
      const slope = 1 - Math.tanh(1) ** 2;
      expect(reference.backward(capped).dk.subarray(2)).toBeAllclose([2 * log3 * slope * 2 * p1 * (1 - p1), 0], EXACT);
    });

    test('sink: weights 1/6 for two keys and 4/6 for the sink', () => {
      const sinks = Float64Array.of(Math.log(4));
      const { output, lse } = reference.forward({ ...two, sinks });
      expect(output).toBeAllclose([4 / 6], EXACT);
      expect(lse).toBeAllclose([Math.log(6)], EXACT);
      const { dSinks, dv } = reference.backward({ ...two, sinks });
      expect(dSinks!).toBeAllclose([(-4 / 6) * (4 / 6)], EXACT);
      expect(dv).toBeAllclose([1 / 6, 1 / 6], EXACT);
    });
  });

  test('rows with nothing allowed are zeros, lse -Infinity, no gradient', () => {
    const args = problem({ shape: { heads: 1, queryLength: 3, headDim: 4 }, causal: true, queryOffset: -2 }, 1);
    const { output, lse } = reference.forward(args);
    expect([...output.subarray(0, 8)]).toEqual(new Array(8).fill(0));
    expect([...lse.subarray(0, 2)]).toEqual([-Infinity, -Infinity]);
    const { dq, dk } = reference.backward(args);
    expect(maxAbs(dq) + maxAbs(dk)).toBe(0); // the last row sees one key only
  });
});

test('grouped heads are repeated key/value heads, whose gradients add up', () => {
  const shape = { batch: 2, heads: 4, kvHeads: 2, queryLength: 3, keyLength: 5, headDim: 4, valueDim: 3 };
  const grouped = problem({ shape }, 2);
  // Heads 0, 1 read key head 0, heads 2, 3 read key head 1, in each batch.
  const repeat = (x: Float32Array, size: number) =>
    Float32Array.from({ length: 2 * x.length }, (_, n) => x[Math.floor(n / size / 2) * size + (n % size)]);
  const repeated = { ...grouped, shape: { ...shape, kvHeads: 4 }, k: repeat(grouped.k, 20), v: repeat(grouped.v, 15) };
  expect(reference.forward(grouped)).toEqual(reference.forward(repeated));

  const together = reference.backward(grouped);
  const apart = reference.backward(repeated);
  const sum = (x: Float64Array, size: number) =>
    Float64Array.from({ length: x.length / 2 }, (_, n) => {
      const first = 2 * Math.floor(n / size) * size + (n % size);
      return x[first] + x[first + size];
    });
  expect(together.dq).toEqual(apart.dq);
  expect(together.dk).toBeAllclose(sum(apart.dk, 20), { atol: 1e-14 });
  expect(together.dv).toBeAllclose(sum(apart.dv, 15), { atol: 1e-14 });
});

test('the layout is where rows are, not what they are', () => {
  const shape = { batch: 2, heads: 4, kvHeads: 2, queryLength: 3, keyLength: 5, headDim: 4, valueDim: 3 };
  const args = problem({ shape, causal: true, queryOffset: 1 }, 2);
  const other = withLayout(args, 'bnhd');
  // Row n of head h of batch b: by hand for one of them
  expect(other.q.subarray(4 * ((1 * 3 + 2) * 4 + 3), 4 * ((1 * 3 + 2) * 4 + 3) + 4)).toEqual(args.q.subarray(92, 96));
  const [a, b] = [args, other].map((one) => ({ ...reference.forward(one), ...reference.backward(one) }));
  expect(b.output).toEqual(inLayout(a.output, 'bnhd', 4, 3, 3));
  expect(b.lse).toEqual(a.lse);
  expect(b.dq).toEqual(inLayout(a.dq, 'bnhd', 4, 3, 4));
  expect(b.dk).toEqual(inLayout(a.dk, 'bnhd', 2, 5, 4));
  expect(b.dv).toEqual(inLayout(a.dv, 'bnhd', 2, 5, 3));
  const turned = reference.rotate({ x: other.q, shape, queryOffset: 7, layout: 'bnhd' });
  expect(turned).toEqual(inLayout(reference.rotate({ x: args.q, shape, queryOffset: 7 }), 'bnhd', 4, 3, 4));
});

describe('gradients are finite differences of the forward pass', () => {
  const base = { heads: 1, queryLength: 5, headDim: 4 };
  const noise = (count: number, seed: number) => draw(count, random(seed).normal);
  const settings: Setting[] = [
    { shape: base },
    { shape: base, causal: true },
    { shape: { ...base, keyLength: 7 }, causal: true, queryOffset: 2 },
    { shape: { ...base, keyLength: 3 }, causal: true, queryOffset: -2 },
    { shape: { ...base, keyLength: 3, valueDim: 2 }, queryOffset: 11 },
    { shape: { ...base, batch: 2, heads: 4, kvHeads: 2, queryLength: 3 }, causal: true },
    { shape: { ...base, headDim: 6 }, rotary: { dim: 4 } },
    { shape: { ...base, headDim: 6 }, rotary: { dim: 4, interleaved: true }, causal: true },
    { shape: base, rotary: { frequencies: Float32Array.of(0.3, 2) } },
    { shape: { ...base, headDim: 3 }, rotary: false },
    { shape: base, scale: -0.7 },
    { shape: base, scale: 0 },
    { shape: base, window: [2, 0] },
    { shape: base, softcap: 0.8 },
    { shape: base, bias: noise(9, 1), causal: true },
    { shape: base, alibi: Float32Array.of(0.3), causal: true, queryOffset: 2 },
    { shape: { ...base, batch: 2, heads: 2, keyLength: 6 }, alibi: Float32Array.of(0.2, 1), bias: noise(20, 13) },
    { shape: { ...base, batch: 2, heads: 2, keyLength: 6 }, bias: noise(20, 2), softcap: 1.5 },
    { shape: { ...base, batch: 2, heads: 2 }, mask: noise(50, 3), maskShape: [2, 1, 5, 5] },
    { shape: { ...base, heads: 2 }, sinks: noise(2, 4) },
    { shape: { ...base, heads: 2 }, sinks: noise(2, 5), mask: Uint8Array.from(noise(25, 6), (x) => Number(x > 0)), layout: 'bnhd' },
    {
      shape: { ...base, batch: 2, heads: 4, kvHeads: 2 },
      rotary: {
        queryPositions: noise(10, 7),
        keyPositions: noise(5, 8),
        scaling: { type: 'yarn', factor: 2, originalLength: 4, attentionFactor: 1.3 },
      },
      softcap: 2,
      bias: noise(36, 9),
      sinks: noise(4, 10),
    },
    { shape: base, rotary: { tables: { cos: noise(10, 11), sin: noise(10, 12) } } },
    { shape: { ...base, queryLength: 6 }, segments: [0, 2, 5], causal: true },
    { shape: { ...base, keyLength: 6 }, relativePositions: noise(10, 13) },
    { shape: { ...base, headDim: 5 }, relativePositions: noise(9, 14), rotary: { dim: 4, interleaved: true }, causal: true },
    {
      shape: base,
      relativePositions: noise(9, 15),
      rotary: { scaling: { type: 'yarn', factor: 2, originalLength: 4, attentionFactor: 1.3 } },
    },
    { shape: { ...base, headDim: 3, keyLength: 4 }, relative: relativeMap({ ...base, headDim: 3, keyLength: 4 }, 5, 16) },
    {
      shape: { ...base, batch: 2, heads: 4, kvHeads: 2 },
      relative: relativeMap(base, 7, 17),
      softcap: 2,
      bias: noise(36, 18),
      mask: noise(25, 19),
      sinks: noise(4, 20),
      layout: 'bnhd',
      causal: true,
      queryOffset: 1,
    },
  ];

  // Central differences of a function of size 10 in float64: step 1e-4 leaves a truncation of 1e-8 times the third
  // derivative over 6, and rounding of 1e-15/1e-4. Measured over these cases: at most 2.3e-9 of the largest entry.
  // Slopes count times distances, up to 4 here: a smaller step.
  const [step, tolerance] = [1e-4, 1e-8];

  test.each(settings.map((setting) => [describeSetting(setting), setting] as const))('%s', (_, setting) => {
    const args = problem(setting, 3);
    const wide = {
      ...args,
      q: Float64Array.from(args.q),
      k: Float64Array.from(args.k),
      v: Float64Array.from(args.v),
      alibi: args.alibi && Float64Array.from(args.alibi),
      bias: args.bias && Float64Array.from(args.bias),
      sinks: args.sinks && Float64Array.from(args.sinks),
      relative: args.relative && { ...args.relative, weights: Float64Array.from(args.relative.weights) },
    };
    const loss = () => inner(reference.forward(wide).output, args.dOutput);
    const { dq, dk, dv, dAlibi, dBias, dSinks, dWeights } = reference.backward(args);
    const gradients = { q: dq, k: dk, v: dv, alibi: dAlibi, bias: dBias, sinks: dSinks, weights: dWeights };
    for (const name of ['q', 'k', 'v', 'alibi', 'bias', 'sinks', 'weights'] as const) {
      const x = name === 'weights' ? wide.relative?.weights : wide[name];
      expect(gradients[name] === undefined).toBe(x === undefined);
      if (!x) continue;
      const own = name === 'alibi' ? step / 4 : step;
      const differences = x.map((value, n) => {
        x[n] = value + own;
        const above = loss();
        x[n] = value - own;
        const below = loss();
        x[n] = value;
        return (above - below) / (2 * own);
      });
      expect(gradients[name]!).toBeAllclose(differences, { atol: tolerance * Math.max(1, maxAbs(differences)) });
    }
  });
});

describe('rotation', () => {
  const shape = { batch: 2, heads: 3, queryLength: 5, headDim: 8 };
  const x = problem({ shape }, 4).q;
  const norm = (y: Floats) => inner(y, y);

  test.each([{}, { dim: 6 }, { interleaved: true }, { base: 100, dim: 4 }])('%j: the inverse undoes it, norms stay', (rotary) => {
    for (const queryOffset of [0, 13, -5, 100000]) {
      const turned = reference.rotate({ x, shape, rotary, queryOffset });
      expect(norm(turned)).toBeCloseTo(norm(x), 10);
      expect(reference.rotate({ x: turned, shape, rotary, queryOffset, inverse: true })).toBeAllclose(x, { atol: 1e-14 });
    }
  });

  test('scores depend on differences of positions only', () => {
    const r = random(5);
    const one = { heads: 1, queryLength: 1, headDim: 8 };
    const [a, b] = [0, 1].map(() => Float64Array.from({ length: 8 }, r.normal));
    const score = (m: number, n: number) =>
      inner(reference.rotate({ x: a, shape: one, queryOffset: m }), reference.rotate({ x: b, shape: one, queryOffset: n }));
    expect(score(9, 4)).toBeCloseTo(score(5, 0), 12);
    expect(score(-3, 4)).toBeCloseTo(score(0, 7), 12);
    expect(Math.abs(score(9, 4) - score(9, 3))).toBeGreaterThan(1e-3);
  });
});

describe('misuse', () => {
  const args: Problem = problem({ shape: { heads: 1, queryLength: 3, headDim: 4 } }, 6);

  test('arrays that do not fit the shape are named', () => {
    for (const name of ['q', 'k', 'v', 'dOutput'] as const) {
      const short = { ...args, [name]: args[name].subarray(1) };
      expect(() => reference.backward(short)).toThrow(`${name} has 11 values, shape needs 12`);
    }
    const loose = Object.entries({ ...reference, gradientParts }) as [string, (args?: unknown) => unknown][];
    for (const [name, call] of loose) {
      for (const [given, message] of [
        [undefined, 'shape must be an object, got undefined'],
        [{}, 'shape must be an object, got undefined'],
        [{ shape: {} }, 'shape.heads must be a number, got undefined'],
        [{ shape: { heads: 1, queryLength: 0, headDim: 2 } }, 'shape.queryLength must be an integer from 1 to 2147483647, got 0'],
        [{ shape: { heads: 1, queryLength: 4, headDim: 2 } }, 'must be an array of numbers, got undefined'],
      ] as const) {
        expect(() => call(given)).toThrow(message);
        expect(() => call(given)).toThrow(name); // which says whose error it is
      }
    }
    expect(() => reference.forward({ ...args, shape: { ...args.shape, heads: 3, kvHeads: 2 } })).toThrow('kvHeads = 2');
    expect(() => reference.forward({ ...args, rotary: { dim: 3 } })).toThrow('rotary.dim = 3');
    expect(() => reference.forward({ ...args, bias: new Float32Array(4) })).toThrow('bias has 4 values, shape needs 5');
    expect(() => reference.forward({ ...args, mask: new Uint8Array(8) })).toThrow('mask has 8 values, shape needs 9');
    expect(() => reference.forward({ ...args, mask: new Uint8Array(6), maskShape: [1, 2, 1, 3] })).toThrow('maskShape = 1,2,1,3');
    expect(() => reference.forward({ ...args, sinks: new Float32Array(2) })).toThrow('sinks has 2 values, shape needs 1');
    expect(() => reference.forward({ ...args, rotary: { queryPositions: [1] } })).toThrow('positions has 1 values');
    const [positions, weights, support] = [new Float32Array(5), new Float32Array(10), Uint32Array.of(0, 1, 2, 3)];
    const relative = { support, weights };
    expect(() => reference.forward({ ...args, relativePositions: weights })).toThrow('relativePositions has 10 values, shape needs 5');
    expect(() => reference.forward({ ...args, relativePositions: positions, rotary: false })).toThrow('without relative and rotary: false');
    expect(() => reference.forward({ ...args, relativePositions: positions, relative })).toThrow('without relative and rotary: false');
    expect(() => reference.forward({ ...args, relative: { support, weights: positions } })).toThrow('relative.weights has 5 values');
    expect(() => reference.forward({ ...args, relative: { support: Uint32Array.of(0, 1, 4, 0), weights } })).toThrow('support reaches');
    expect(() => reference.forward({ ...args, relative, rotary: {} })).toThrow('relative stands without rotary');
  });

  test('arguments are left as they were', () => {
    const before = structuredClone(args);
    reference.forward(args);
    reference.backward(args);
    expect(args).toEqual(before);
    expect(lengths(args.shape).q).toBe(12);
  });
});
