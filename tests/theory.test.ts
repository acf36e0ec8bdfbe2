// SPDX-License-Identifier: MIT
//
// The closed forms of the theory against counting and searching: features, pairs and crossovers by enumeration, the
// certified bound by the example that attains it and by random ones that do not.

import { describe, expect, test } from '@jest/globals';

import { reference, theory } from '../dist/index.js';
import { minimax } from '../dist/polynomial.js';
import { maxAbs, maxDifference, problem, random } from './support.js';

describe('rank', () => {
  /** Monomials of degree at most `degree`: choose a power of the first variable, then the others. */
  const count = (variables: number, degree: number): number =>
    variables === 0 ? 1 : Array.from({ length: degree + 1 }, (_, m) => count(variables - 1, degree - m)).reduce((a, b) => a + b);

  test('counts monomials', () => {
    for (const dim of [1, 2, 3, 5, 8]) {
      for (const degree of [0, 1, 2, 3, 4]) expect(theory.rank(dim, degree)).toBe(count(dim, degree));
    }
  });

  test('known values', () => {
    expect([2, 3, 4].map((degree) => theory.rank(16, degree))).toEqual([153, 969, 4845]);
    expect([theory.rank(32, 2), theory.rank(64, 2), theory.rank(64, 3)]).toEqual([561, 2145, 47905]);
    expect(theory.rank(128, 8)).toBe(2353351951665); // C(136, 8), still exact
  });
});

describe('terms', () => {
  /** Powers of `variables` variables that add up to at most `degree`. */
  const monomials = (variables: number, degree: number): number[][] =>
    variables === 0
      ? [[]]
      : Array.from({ length: degree + 1 }, (_, m) => monomials(variables - 1, degree - m).map((others) => [m, ...others])).flat();

  test('of rotations by any positions: monomials in z, conj(z) and others, one of each conjugate pair', () => {
    for (const [headDim, rotaryDim] of [[2, 2], [3, 2], [4, 4], [5, 4], [6, 6], [7, 2], [8, 4]]) {
      for (const degree of [0, 1, 2, 3, 4]) {
        const found = new Set<string>();
        for (const powers of monomials(headDim, degree)) {
          const half = rotaryDim / 2;
          const conjugate = [...powers.slice(half, rotaryDim), ...powers.slice(0, half), ...powers.slice(rotaryDim)];
          if (!found.has(conjugate.join())) found.add(powers.join());
        }
        expect(theory.terms({ headDim, degree, rotaryDim })).toBe(found.size);
      }
    }
  });

  test('of general maps: monomials in the places; of rotations that factorise: the rank', () => {
    expect(theory.terms({ headDim: 3, degree: 2, places: 7 })).toBe(monomials(7, 2).length);
    expect(theory.terms({ headDim: 16, degree: 3 })).toBe(969);
    expect(theory.terms({ headDim: 16, degree: 2, rotaryDim: 16 })).toBe(81);
    expect(theory.terms({ headDim: 8, degree: 2, places: 16 })).toBe(153);
  });
});

describe('transforms', () => {
  // A native build of src/ with every call of its transform counted: queries, keys, D, Dv, degree, forward, backward
  const cases: [map: { rotaryDim?: number; places?: number }, bias: boolean, counted: number[][]][] = [
    [{}, false, [[300, 300, 4, 4, 2, 984, 1944], [1000, 70, 4, 3, 3, 5112, 10152], [5000, 9000, 2, 2, 2, 480, 928]]],
    [{}, true, [[300, 300, 4, 4, 2, 984, 1968], [1000, 70, 4, 3, 3, 5112, 10224], [5000, 9000, 2, 2, 2, 480, 960]]],
    [{ rotaryDim: 4 }, false, [[300, 300, 4, 4, 2, 1256, 2296], [1000, 70, 4, 3, 3, 6400, 11440]]],
    [{ rotaryDim: 4 }, true, [[300, 300, 4, 4, 2, 1256, 2512], [1000, 70, 4, 3, 3, 6400, 12800]]],
    [{ rotaryDim: 2 }, false, [[5000, 9000, 2, 2, 2, 440, 776]]],
    [{ places: 8 }, false, [[300, 300, 4, 4, 2, 3744, 7488], [1000, 70, 4, 3, 3, 34944, 69888]]],
    [{ places: 4 }, true, [[5000, 9000, 2, 2, 2, 1312, 2624]]],
  ];

  test('are those that the engine runs', () => {
    for (const [map, bias, counted] of cases) {
      for (const [queryLength, keyLength, headDim, valueDim, degree, ...counts] of counted) {
        const sizes = { queryLength: queryLength!, keyLength: keyLength!, headDim: headDim!, valueDim: valueDim!, degree: degree! };
        const found = (['forward', 'backward'] as const).map((pass) => theory.transforms({ ...sizes, ...map, bias, pass }).count);
        expect(found).toEqual(counts);
      }
    }
  });

  test('are of a block, and by default of as many keys and value columns', () => {
    const some = theory.transforms({ queryLength: 4096, headDim: 8, degree: 2, pass: 'forward' });
    expect(some).toEqual(theory.transforms({ queryLength: 4096, keyLength: 4096, headDim: 8, valueDim: 8, degree: 2, pass: 'forward' }));
    expect(some.length).toBeGreaterThanOrEqual(32);
    expect(some.length).toBeLessThanOrEqual(2 ** 14);
  });
});

describe('certifiedBound', () => {
  /** out^ - out for softmax weights w, values v and relative errors e of the weights. */
  const change = (w: number[], v: number[], e: number[]) => {
    const total = w.reduce((a, b) => a + b);
    const out = w.reduce((sum, wj, j) => sum + wj * v[j], 0) / total;
    const changed = w.reduce((sum, wj, j) => sum + wj * (1 + e[j]) * v[j], 0);
    return changed / w.reduce((sum, wj, j) => sum + wj * (1 + e[j]), 0) - out;
  };

  test.each([1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999])('t = %d: two keys attain it', (t) => {
    // u = 1 - t + 2 a t = sqrt(1 - t^2) gives the weight a of the key whose value is 1.
    const a = (Math.sqrt(1 - t * t) - 1 + t) / (2 * t);
    const bound = theory.certifiedBound(t);
    expect(change([a, 1 - a], [1, -1], [t, -t]) / bound).toBeCloseTo(1, 9);
  });

  test('random weights, values and errors stay below it', () => {
    const r = random(1);
    for (let trial = 0; trial < 2000; trial++) {
      const t = r.uniform();
      const n = 2 + Math.floor(4 * r.uniform());
      const weights = Array.from({ length: n }, () => Math.exp(3 * r.normal()));
      // Half of the trials at corners, where the extremes are.
      const sign = () => (trial % 2 ? 2 * r.uniform() - 1 : Math.sign(r.uniform() - 0.5));
      const values = weights.map(sign);
      const errors = weights.map(() => t * sign());
      expect(Math.abs(change(weights, values, errors))).toBeLessThanOrEqual(theory.certifiedBound(t) * (1 + 1e-12));
    }
  });

  test('t for small t, 2 at 1, nothing beyond', () => {
    expect(theory.certifiedBound(0)).toBe(0);
    expect(theory.certifiedBound(1e-9) / 1e-9).toBeCloseTo(1, 12);
    expect(theory.certifiedBound(1 - 1e-12)).toBeCloseTo(2, 5);
    expect([1, 2, NaN].map(theory.certifiedBound)).toEqual([Infinity, Infinity, Infinity]);
  });
});

describe('scoreBound', () => {
  const B = 1.5;
  const shape = { heads: 1, queryLength: 1, keyLength: 200, headDim: 4, valueDim: 1 };

  test('without centring: equal signs attain it', () => {
    const [q, k] = [new Float32Array(4).fill(B), new Float32Array(800).fill(B)];
    const { lse } = reference.forward({ q, k, v: new Float32Array(200), shape, rotary: false });
    const score = lse[0] - Math.log(200);
    expect(score).toBeCloseTo(theory.scoreBound({ headDim: 4, entryBound: B, centred: false }), 12);
    expect(theory.scoreBound({ headDim: 4, entryBound: B, scale: -1 / 4, centred: false })).toBe(B * B);
  });

  test('with centring: one key against all others comes within 1/Nk of it', () => {
    const bound = theory.scoreBound({ headDim: 4, entryBound: B });
    // Scores are s for key 0 and -s for the others; the mean score of the centred keys is 0.
    const s = 0.5 * 4 * B * B;
    const largest = s - (s - 199 * s) / 200;
    expect(largest / bound).toBeCloseTo(1 - 1 / 200, 12);
    expect(bound).toBe(2 * theory.scoreBound({ headDim: 4, entryBound: B, centred: false }));
  });
});

describe('degreeFor', () => {
  test('is the smallest degree within the tolerance', () => {
    for (const tolerance of [0.3, 1e-2, 1e-3, 1e-5]) {
      for (const bound of [0, 0.1, 0.5, 1, 2, 3]) {
        const degree = theory.degreeFor({ tolerance, scoreBound: bound });
        if (degree === null) {
          expect(theory.certifiedBound(minimax(8, bound).error)).toBeGreaterThan(tolerance);
          continue;
        }
        expect(theory.certifiedBound(minimax(degree, bound).error)).toBeLessThanOrEqual(tolerance);
        if (degree > 0) expect(theory.certifiedBound(minimax(degree - 1, bound).error)).toBeGreaterThan(tolerance);
      }
    }
  });

  test('null where float32 coefficients cannot', () => {
    expect(theory.degreeFor({ tolerance: 1e-3, scoreBound: 20 })).toBeNull();
    expect(theory.degreeFor({ tolerance: 1e-9, scoreBound: 1 })).toBeNull();
  });

  // The whole chain, polynomial to output: replace exp by the polynomial in plain attention and stay within the tolerance.
  test('attention by that degree stays within the tolerance', () => {
    const shape = { heads: 1, queryLength: 40, headDim: 4 };
    const args = problem({ shape, rotary: false }, 2, (r) => 2 * r.uniform() - 1);
    const exact = reference.forward(args).output;
    const bound = theory.scoreBound({ headDim: 4, entryBound: 1, centred: false });
    for (const tolerance of [0.1, 1e-2, 1e-3, 1e-4]) {
      const degree = theory.degreeFor({ tolerance, scoreBound: bound });
      const { coefficients } = minimax(degree as number, bound);
      const output = new Float64Array(exact.length);
      for (let i = 0; i < 40; i++) {
        let sum = 0;
        for (let j = 0; j < 40; j++) {
          let s = 0;
          for (let d = 0; d < 4; d++) s += (args.q[4 * i + d] * args.k[4 * j + d]) / 2;
          const weight = coefficients.reduce((value, c, m) => value + c * s ** m, 0);
          sum += weight;
          for (let d = 0; d < 4; d++) output[4 * i + d] += weight * args.v[4 * j + d];
        }
        for (let d = 0; d < 4; d++) output[4 * i + d] /= sum;
      }
      expect(maxDifference(output, exact)).toBeLessThanOrEqual(tolerance * maxAbs(args.v));
    }
  });
});

describe('pairs and cost', () => {
  test('causal pairs, by counting', () => {
    for (const queryLength of [1, 2, 5, 8]) {
      for (const keyLength of [1, 3, 5, 9]) {
        for (let queryOffset = -12; queryOffset <= 12; queryOffset++) {
          let count = 0;
          for (let i = 0; i < queryLength; i++) for (let j = 0; j < keyLength; j++) if (j <= i + queryOffset) count++;
          expect(theory.pairs({ queryLength, keyLength, causal: true, queryOffset })).toBe(count);
        }
      }
    }
    expect(theory.pairs({ queryLength: 5, keyLength: 9, queryOffset: -3 })).toBe(45);
  });

  test('operations of both engines on a small shape', () => {
    const shape = { batch: 2, heads: 4, kvHeads: 2, queryLength: 10, keyLength: 20, headDim: 3, valueDim: 5 };
    // 8 heads of 200 pairs; a score is 3 multiply-adds, a value row 5.
    expect(theory.cost({ ...shape, method: 'exact', pass: 'forward' })).toBe(2 * (3 + 5) * 8 * 200);
    expect(theory.cost({ ...shape, method: 'exact', pass: 'backward' })).toBe(2 * (9 + 10) * 8 * 200);
    expect(theory.cost({ ...shape, method: 'exact', pass: 'forward', causal: true, queryOffset: 10 })).toBe(2 * 8 * 8 * 155);
    // Rank C(5, 2) = 10; a feature meets 5 values and the denominator, for 80 rows of k and 80 rows of q.
    const poly = { ...shape, method: 'polynomial', degree: 2 } as const;
    expect(theory.cost({ ...poly, pass: 'forward' })).toBe(2 * 10 * 6 * (80 + 80));
    expect(theory.cost({ ...poly, pass: 'backward' })).toBe(2 * 10 * 6 * (3 * 80 + 2 * 80));
    expect(() => theory.cost({ ...shape, method: 'polynomial', pass: 'forward' })).toThrow(RangeError);
  });

  test('crossover is the first length at which the polynomial is cheaper', () => {
    for (const [headDim, valueDim, degree] of [[16, 16, 2], [8, 3, 3], [64, 64, 1], [4, 64, 0]]) {
      for (const causal of [false, true]) {
        for (const [group, speed] of [[1, 1], [4, 0.8]]) {
          const price = (method: 'exact' | 'polynomial', pass: 'forward' | 'backward', queryLength: number) =>
            theory.cost({ method, degree, causal, pass, heads: group, kvHeads: 1, queryLength, headDim, valueDim });
          const cheaper = (passes: ('forward' | 'backward')[], n: number) =>
            passes.reduce((sum, pass) => sum + price('polynomial', pass, n) / speed - price('exact', pass, n), 0) < 0;
          const options = { headDim, valueDim, degree, causal, group, speed };
          for (const [pass, passes] of [
            ['forward', ['forward']],
            ['backward', ['backward']],
            ['both', ['forward', 'backward']],
          ] as const) {
            const n = theory.crossover({ ...options, pass });
            expect(cheaper([...passes], n)).toBe(true);
            if (n > 1) expect(cheaper([...passes], n - 1)).toBe(false);
          }
        }
      }
    }
    expect(theory.crossover({ headDim: 16, degree: 2, pass: 'forward' })).toBe(163); // 153 * 17/16 = 162.6
  });
});

describe('frontier', () => {
  test('at its entry bound the degree is certified and affordable, a little above it is neither', () => {
    for (const length of [500, 4096, 65536]) {
      for (const tolerance of [1e-1, 1e-3]) {
        const { entryBound, degree, scoreBound } = theory.frontier({ tolerance, headDim: 16, length });
        expect(theory.scoreBound({ headDim: 16, entryBound })).toBeCloseTo(scoreBound, 9);
        expect(theory.certifiedBound(minimax(degree as number, scoreBound).error)).toBeLessThanOrEqual(tolerance);
        expect(theory.crossover({ headDim: 16, degree: degree as number, pass: 'forward' })).toBeLessThanOrEqual(length);
        // Past it, the degree that the tolerance asks for does not pay at this length.
        const next = theory.degreeFor({ tolerance, scoreBound: 1.001 * scoreBound });
        expect(theory.crossover({ headDim: 16, degree: next ?? 9, pass: 'forward' })).toBeGreaterThan(length);
      }
    }
  });

  test('it rises with the length and with the tolerance, and is 0 where nothing pays', () => {
    const at = (length: number, tolerance = 1e-2) => theory.frontier({ tolerance, headDim: 16, length }).entryBound;
    const lengths = [256, 1024, 4096, 16384, 65536].map((length) => at(length));
    lengths.slice(1).forEach((bound, n) => expect(bound).toBeGreaterThanOrEqual(lengths[n]));
    expect(lengths[4]).toBeGreaterThan(lengths[0]);
    expect(at(4096, 1e-1)).toBeGreaterThan(at(4096, 1e-3));
    expect(theory.frontier({ tolerance: 1e-2, headDim: 16, length: 1 })).toEqual({ entryBound: 0, degree: null, scoreBound: 0 });
  });

  test('the scale 1/D of the papers allows larger entries', () => {
    const options = { tolerance: 1e-2, headDim: 16, length: 4096 };
    const ours = theory.frontier(options);
    const theirs = theory.frontier({ ...options, scale: 1 / 16 });
    expect(theirs.entryBound).toBeCloseTo(ours.entryBound * 2, 9); // sqrt(D) = 4 in the score, 2 in the entries
  });
});

test("the papers' curves", () => {
  expect(theory.paperBound(Math.E ** 4)).toBeCloseTo(2, 12);
  // Large scores: B decides. Many digits: log(1/e) / log(log(1/e) / B).
  expect(theory.optimalDegree({ scoreBound: 100, error: 1e-3 })).toBe(100);
  const digits = Math.log(1e12);
  expect(theory.optimalDegree({ scoreBound: 1, error: 1e-12 })).toBeCloseTo(digits / Math.log(digits), 12);
});
