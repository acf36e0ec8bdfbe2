// SPDX-License-Identifier: MIT
//
// The promise of `tolerance` over instances of all kinds (promise/), on both binaries: a certified error is never above the
// tolerance, a sampled one above it in at most one call of a thousand and nowhere above twice. `make sweep` runs more, with `--long` of
// long sequences.

import { describe, expect, test } from '@jest/globals';

import { eachBinary } from './support.js';
import { KINDS, instance } from './promise/instances.mjs';
import { LONG, LONG_SETTINGS, SETTINGS, TOLERANCES, exactOf, expectedOf, numbered, promised, type Expected, type Kept, type Promise } from './promise/promise.mjs';

const COUNT = 500;
const references = new Map<number, Expected>();

/** Three tolerances of an instance: others for each, all of the 41 in turn. */
const some = (n: number) => [0, 14, 28].map((step) => TOLERANCES[(3 * n + step) % TOLERANCES.length]);

/** null where that is refused. */
function resultOf<T>(call: () => T): T | null {
  try {
    return call();
  } catch (error) {
    expect(error).toBeInstanceOf(RangeError);
    return null;
  }
}

describe('instances of every kind, mask and size', () => {
  eachBinary((attention) => {
    test.each<[Promise, number, number]>([
      ['certified', 1, 0.3],
      ['forward', 2, 0.6],
      ['backward', 2, 0.6],
      ['training', 2, 0.6],
    ])('%s: no error is above %d tolerances', (how, most, share) => {
      const kept: (Kept & { name: string })[] = [];
      for (let n = 0; n < COUNT; n++) {
        const { name, args } = numbered(n);
        const expected = references.get(n) ?? expectedOf(args);
        references.set(n, expected);
        kept.push(...promised(attention(), args, how, some(n), expected).map((one) => ({ ...one, name })));
      }
      const given = kept.filter(({ ratio }) => ratio !== null);
      expect(given.length).toBeGreaterThan(share * kept.length); // most calls do promise something
      const over = (limit: number) => given.filter(({ ratio }) => !(ratio! <= limit));
      expect(over(most)).toEqual([]);
      expect(over(1).length).toBeLessThanOrEqual(given.length / 1000 + 1);
      expect(given.filter(({ slack }) => slack !== null && !(slack >= 1))).toEqual([]); // certified bounds hold
    });
  });
});

describe('steep slopes: errors gather where chunks begin, in a few rows and in a few keys', () => {
  eachBinary((attention) => {
    test.each<[string, number, number, number, Promise, number]>([
      ['few values', 2, 2, 1659, 'backward', 1e-3],
      ['few values', 2, 2, 1659, 'backward', 10 ** -4.625],
      ['one huge key', 8, 1, 6336, 'forward', 10 ** -2.375],
      ['aligned', 8, 2, 7893, 'forward', 1e-2],
    ])('%s, D = %d, entries to %d, seed %d, %s, tolerance %d', (kind, headDim, bound, seed, how, tolerance) => {
      const args = instance({ kind, bound, seed, ...SETTINGS['steep alibi'](333, headDim) });
      for (const { ratio } of promised(attention(), args, how, [tolerance], expectedOf(args))) {
        expect(ratio ?? 0).toBeLessThanOrEqual(1);
      }
    });
  });
});

describe('a sequence one token longer than the band of a bias: its last row alone has a key through the polynomial', () => {
  eachBinary((attention) => {
    test.each([0, 1, 2, 3, 4, 5, 6, 7])('seed %d', (seed) => {
      const shape = { heads: 1, queryLength: 257, headDim: 8 };
      const bias = Float32Array.from({ length: 513 }, (_, n) => -0.5 * Math.floor(Math.log2(1 + Math.abs(n - 256)))); // steps
      const args = { ...instance({ kind: 'uniform', bound: 1, seed, shape, bias, causal: true }), seed };
      const [{ ratio }] = promised(attention(), args, 'forward', [1e-5], expectedOf(args), { method: 'polynomial' });
      expect(ratio ?? 0).toBeLessThanOrEqual(1);
    });
  });
});

describe('rows whose weights are all off by one factor, that of lse: dq, small there, hides it, dv does not', () => {
  eachBinary((attention) => {
    test.each<[string, 'causal' | 'causal segments', number, number, number]>([
      ['one huge key', 'causal', 8, 9376, 5.6e-2],
      ['one huge key', 'causal', 4, 582, 0.1],
      ['one huge key', 'causal', 8, 834, 0.1],
      ['one huge key', 'causal segments', 4, 1182, 0.1],
    ])('%s, %s, D = %d, seed %d, tolerance %d', (kind, setting, headDim, seed, tolerance) => {
      const args = instance({ kind, bound: 2, seed, ...SETTINGS[setting](33, headDim) });
      for (const { ratio } of promised(attention(), args, 'backward', [tolerance], expectedOf(args))) {
        expect(ratio ?? 0).toBeLessThanOrEqual(1);
      }
    });
  });
});

describe('gradients beside outliers by an output that was given: of a polynomial without, it is wrong in rows that are ordinary now', () => {
  eachBinary((attention) => {
    test.each<[string, 'causal' | 'causal segments' | 'grouped', number, number, number, number]>([
      ['heavy tails', 'causal', 333, 2, 2328, 10 ** -2.75],
      ['one huge key', 'causal segments', 333, 8, 1887, 10 ** -1.375],
      ['one huge key', 'grouped', 64, 4, 1909, 10 ** -2.75],
    ])('%s, %s, N = %d, D = %d, seed %d, tolerance %d', (kind, setting, length, headDim, seed, tolerance) => {
      const args = instance({ kind, bound: 1, seed, ...SETTINGS[setting](length, headDim) });
      for (const { ratio } of promised(attention(), args, 'training', [tolerance], expectedOf(args))) {
        expect(ratio ?? 0).toBeLessThanOrEqual(1);
      }
    });
  });
});

describe('polynomials of rows whose weights nearly cancel: such rows are looked at', () => {
  const { length, shape } = { length: 500, shape: { heads: 1, queryLength: 500 } };
  eachBinary((attention) => {
    test.each([
      [4, [16, 66, 79, 167]],
      [8, [4, 93, 105, 178]],
    ])('D = %d', (headDim, seeds) => {
      let kept = 0;
      for (const seed of seeds) {
        const bound = 2 + (seed % 2);
        const { dOutput: _, ...args } = instance({ kind: 'uniform', bound, seed, shape: { ...shape, headDim } });
        const exact = attention().forward({ ...args, method: 'exact' }).output;
        for (const tolerance of [0.1, 0.2, 0.3]) {
          const output = resultOf(() => attention().forward({ ...args, method: 'polynomial', tolerance }).output);
          if (!output) continue;
          kept++;
          for (let d = 0; d < headDim; d++) {
            const column = Array.from({ length }, (_, j) => args.v[j * headDim + d]);
            const half = (Math.max(...column) - Math.min(...column)) / 2;
            for (let i = d; i < output.length; i += headDim) expect(Math.abs(output[i] - exact[i])).toBeLessThanOrEqual(2 * tolerance * half);
          }
        }
      }
      expect(kept).toBeGreaterThan(3);
    });
  });
});

describe('exact gradients by an output that was given: one that is wrong in any head is computed again', () => {
  eachBinary((attention) => {
    test.each(['bhnd', 'bnhd'] as const)('%s', (layout) => {
      const [heads, length, headDim] = [4, 1024, 8];
      const args = { ...instance({ kind: 'uniform', bound: 2, seed: 3, shape: { heads, queryLength: length, headDim } }), layout };
      const { dOutput: _, ...forward } = args;
      const saved = attention().forward({ ...forward, method: 'exact' });
      expect(attention().backward({ ...args, saved, tolerance: 1e-4 }).report.reason).not.toContain('again');
      for (let head = 0; head < heads; head++) {
        const lse = saved.lse.map((x, n) => (Math.floor(n / length) === head ? x + 0.1 : x));
        const { report } = attention().backward({ ...args, output: saved.output, lse, tolerance: 1e-4 });
        expect([head, report.reason]).toEqual([head, expect.stringMatching(/^exact: .*; the given output and lse are off by \S+ and were computed again$/)]);
      }
    });
  });
});

describe('exact gradients by an output that a huge key has spoilt in a few rows: it is computed again', () => {
  eachBinary((attention) => {
    test('slope 0.01, 8,192 tokens', () => {
      const args = instance({ kind: 'one huge key', bound: 1, seed: 28, ...LONG_SETTINGS['slope 0.01'](8192, 8) });
      const expected = exactOf(attention(), args);
      const { dOutput: _, ...forward } = args;
      const saved = attention().forward({ ...forward, tolerance: 0.1 });
      const { report } = attention().backward({ ...args, saved, tolerance: 0.1 });
      expect([saved.report.method, report.method]).toEqual(['polynomial', 'exact']);
      expect(report.reason).toMatch(/; the given output and lse are off by \S+ and were computed again$/);
      for (const { ratio } of promised(attention(), args, 'training', [0.1], expected, { method: 'auto' })) {
        expect(ratio).toBeLessThanOrEqual(1);
      }
    });
  });
});

describe('lengths at which `auto` runs polynomials by itself', () => {
  eachBinary((attention) => {
    test.each(Object.keys(KINDS))('%s', (kind) => {
      let polynomials = 0;
      for (const causal of [false, true]) {
        for (const [length, headDim, bound, seed] of [
          [1500, 4, 1, 1],
          [2048, 16, 0.25, 2],
        ]) {
          const args = instance({ kind, bound, seed, shape: { heads: 1, queryLength: length, headDim }, causal });
          const exact = exactOf(attention(), args);
          for (const how of ['forward', 'backward', 'training', 'certified'] as const) {
            // The exact engine is the reference here, right to 1e-6.
            for (const { ratio, degree } of promised(attention(), args, how, [3e-2, 1e-3, 1e-4], exact, { method: 'auto' })) {
              expect(ratio).toBeLessThanOrEqual(how === 'certified' ? 1 : 2);
              if (degree !== null) polynomials++;
            }
          }
        }
      }
      expect(polynomials).toBeGreaterThan(0);
    });
  });
});

describe('long sequences: every kind of input twice, every mask, slope and bias once', () => {
  const lengths = [2048, 4096];
  eachBinary((attention) => {
    test.each([...Array(20).keys()].map((n) => 21 * n))('instance %d', (n) => {
      const { args } = numbered(n, { ...LONG, lengths });
      const exact = exactOf(attention(), args);
      const tolerances = [0, 10, 20].map((step) => LONG.tolerances[(n + step) % 25]);
      for (const how of ['forward', 'backward', 'training', 'certified'] as const) {
        for (const { ratio } of promised(attention(), args, how, tolerances, exact, { method: 'auto' })) {
          expect(ratio).toBeLessThanOrEqual(1);
        }
      }
    });
  });
});
