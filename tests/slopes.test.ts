// SPDX-License-Identifier: MIT
//
// Slopes: how far a query sees, and the promise for long sequences, of whose chunks each has a first row with few keys that count.

import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';

import { createRopeAttention, reference, type RopeAttention } from '../dist/index.js';
import { reachOf } from '../dist/reach.js';
import { readCall } from '../dist/validate.js';
import { instance } from './promise/instances.mjs';
import { outputError } from './promise/promise.mjs';
import { eachBinary, maxAbs, maxDifference } from './support.js';

const shape = (queryLength: number, headDim = 16) => ({ heads: 1, queryLength, headDim });

describe('reachOf', () => {
  const zeros = new Float32Array(4096);
  const geometry = (options: object) =>
    readCall('forward', { q: zeros, k: zeros, v: zeros, shape: shape(4096, 1), rotary: false, causal: true, alibi: Float32Array.of(1), ...options }).problem;

  test.each([0.02, 0.1, 0.7, 3])('beyond it keys weigh next to nothing beside the own one: slope %p', (slope) => {
    for (const radius of [0, 0.5, 4]) {
      const reach = reachOf(geometry({}), slope, radius);
      let beyond = 0;
      for (let t = reach - 64; t < 4096; t++) beyond += Math.exp(radius - slope * t);
      expect(beyond).toBeLessThanOrEqual(Math.exp(-24 - radius) * (1 + 1e-9)); // of exp(-radius), which the own key weighs at least
    }
  });

  test('none where it is not known, or is longer than the sequence', () => {
    expect(reachOf(geometry({}), 0, 1)).toBe(Infinity);
    expect(reachOf(geometry({}), 0.001, 1)).toBe(Infinity);
    expect(reachOf(geometry({}), 1, NaN)).toBe(Infinity);
    expect(reachOf(geometry({ causal: false }), 1, 1)).toBe(Infinity);
    expect(reachOf(geometry({ softcap: 5 }), 1, 1)).toBe(Infinity);
    expect(reachOf(geometry({}), 1, 1)).toBeLessThan(128);
  });
});

describe('long sequences with slopes', () => {
  let attention: RopeAttention;
  beforeAll(async () => {
    attention = await createRopeAttention();
  });
  afterAll(() => attention.dispose());

  // Where first rows of 32 of all chunks stood for the others, and the rows behind the huge key for none, errors were up to 500 times the tolerance
  test.each([
    ['one huge key', 16384, 0.05, 1, [1e-1, 1e-3]],
    ['few values', 4096, 0.25, 1, [1e-1, 1e-2]],
  ] as const)('keep the tolerance: %s, %p tokens', (kind, length, slope, bound, tolerances) => {
    const all = instance({ kind, bound, seed: 1, shape: shape(length), causal: true, alibi: Float32Array.of(slope) });
    const { dOutput: _, ...args } = all;
    const exact = attention.forward({ ...args, method: 'exact' });
    for (const tolerance of tolerances) {
      const got = attention.forward({ ...args, tolerance });
      expect(outputError(all, got.output, exact.output)).toBeLessThanOrEqual(tolerance);
    }
  });

  // One key of large values at a large score decides: before such rows were looked for, errors were 1.6 to 4.5 times those of sampled rows
  test.each([
    ['few values', 1024, 8, 0.05, 2],
    ['few values', 1024, 8, 0.05, 4],
    ['few values', 1024, 16, 0.1, 3],
    ['heavy tails', 512, 16, 0.5, 1],
  ] as const)('the worst row is one of those that are looked at: %s, %p tokens, D = %p, slope %p, seed %p', (kind, length, headDim, slope, seed) => {
    const all = instance({ kind, bound: 1, seed, shape: shape(length, headDim), causal: true, alibi: Float32Array.of(slope) });
    const { dOutput: _, ...args } = all;
    const exact = attention.forward({ ...args, method: 'exact' });
    for (const degree of [1, 2, 3]) {
      const { output, report } = attention.forward({ ...args, method: 'polynomial', degree, onMiss: 'report' });
      expect(outputError(all, output, exact.output)).toBeLessThanOrEqual(1.01 * report.errorEstimate!);
    }
  });

  test('a polynomial is still taken where it serves', () => {
    const { dOutput, ...args } = instance({ kind: 'uniform', bound: 0.5, seed: 1, shape: shape(16384), causal: true, alibi: Float32Array.of(0.05) });
    const saved = attention.forward({ ...args, tolerance: 1e-2 });
    expect(saved.report.method).toBe('polynomial');
    expect(attention.backward({ ...args, dOutput, saved, tolerance: 1e-2 }).report.method).toBe('polynomial');
  });
});

eachBinary((attention) => {
  describe('exact, with slopes', () => {
    // Errors were up to 9e-5 as long as the reference of a row was that of keys far away: s - slope distance there has no digits left for s.
    // Measured now: 7e-7 of the output, 5e-7 of gradients; where scores have no known bound 4e-6 (of scores up to 36, which are off by as much).
    test.each([
      ['uniform', 1, 0.02, 2e-6],
      ['uniform', 1, 0.5, 2e-6],
      ['signs', 1, 2, 2e-6],
      ['hidden', 1, 1, 2e-6],
      ['uniform', 3, 0.25, 1e-5],
      ['uniform', 3, 1, 1e-5],
    ] as const)('%s, entries to %p, slope %p: as near to float64 as without', (kind, bound, slope, limit) => {
      for (const causal of [true, false]) {
        const setting = { shape: shape(500), causal, alibi: Float32Array.of(slope) };
        const { dOutput, ...args } = instance({ kind, bound, seed: 3, ...setting });
        const { output, lse } = attention().forward({ ...args, method: 'exact' });
        const want = reference.forward(args);
        expect(maxDifference(output, want.output)).toBeLessThan(limit * maxAbs(want.output));
        expect(maxDifference(lse, want.lse)).toBeLessThan(limit * Math.max(1, maxAbs(want.lse)));
        const got = attention().backward({ ...args, dOutput, method: 'exact' });
        const gradients = reference.backward({ ...args, dOutput });
        for (const name of ['dq', 'dk', 'dv'] as const)
          expect(maxDifference(got[name], gradients[name])).toBeLessThan(limit * maxAbs(gradients[name]));
      }
    });

    test('keys out of sight change nothing, in either pass', () => {
      const setting = { shape: shape(1500, 8), causal: true, alibi: Float32Array.of(1) };
      const { dOutput, ...args } = instance({ kind: 'uniform', bound: 0.5, seed: 4, ...setting });
      const near = attention().backward({ ...args, dOutput, method: 'exact' });
      const far = { ...args, v: args.v.slice() };
      far.v.fill(1, 0, 8 * 300); // 1,200 positions behind the last query
      const { output } = attention().forward({ ...args, method: 'exact' });
      const changed = attention().forward({ ...far, method: 'exact' });
      expect(changed.output.subarray(8 * 700)).toEqual(output.subarray(8 * 700));
      const gradients = attention().backward({ ...far, dOutput, method: 'exact' });
      expect(gradients.dq.subarray(8 * 700)).toEqual(near.dq.subarray(8 * 700));
    });
  });
});
