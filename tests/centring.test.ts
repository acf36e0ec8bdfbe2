// SPDX-License-Identifier: MIT
//
// Queries and keys that have something in common: exp(x.y) = exp((x - m).y) exp(m.y), so that the polynomial is to serve only what is left.

import { describe, expect, test } from '@jest/globals';

import { gradientError, outputError } from './promise/promise.mjs';
import { eachBinary, forwardArgs, problem, type Problem, type Setting } from './support.js';

const N = 2048;
const SETTINGS: Record<string, Setting> = {
  full: { shape: { heads: 1, queryLength: N, headDim: 16 }, rotary: false },
  causal: { shape: { heads: 1, queryLength: N, headDim: 16 }, rotary: false, causal: true },
  'partial rotation': { shape: { heads: 1, queryLength: N, headDim: 16 }, rotary: { dim: 4 } },
  'grouped heads': { shape: { batch: 2, heads: 4, kvHeads: 2, queryLength: N / 2, keyLength: N, headDim: 8 }, rotary: false },
  window: { shape: { heads: 1, queryLength: N, headDim: 16 }, rotary: false, causal: true, window: [700, 0] },
  segments: { shape: { heads: 1, queryLength: N, headDim: 16 }, rotary: false, segments: [0, 300, 1100] },
};

/** The same problem with `mean` added to entries of q and k beyond the fourth, their signs in turn. */
function shifted(args: Problem, queries: number, keys: number): Problem {
  const { headDim } = args.shape;
  const by = (mean: number) => (value: number, n: number) => value + (n % headDim < 4 ? 0 : n % 2 === 0 ? mean : -mean);
  return { ...args, q: args.q.map(by(queries)), k: args.k.map(by(keys)) };
}

eachBinary((attention) => {
  describe.each(Object.entries(SETTINGS))('%s', (_, setting) => {
    const plain = problem(setting, 5, (r) => r.uniform() - 0.5);

    test('scores are bounded as if queries and keys had nothing in common', () => {
      const bound = (args: Problem) => attention().forward({ ...forwardArgs(args), tolerance: 1e-2 }).report.scoreBound;
      expect(bound(shifted(plain, 1, 0.5))).toBeLessThan(1.1 * bound(plain));
    });

    test.each([1e-2, 1e-3])('the same degree serves, within %p', (tolerance) => {
      const args = shifted(plain, 1, 0.5);
      const [got, want] = [args, plain].map((one) => attention().forward({ ...forwardArgs(one), tolerance, method: 'polynomial' }).report);
      expect(got.degree).toBe(want.degree);
      const exact = attention().forward({ ...forwardArgs(args), method: 'exact' });
      const { output, lse } = attention().forward({ ...forwardArgs(args), tolerance, method: 'polynomial' });
      expect(outputError(args, output, exact.output)).toBeLessThanOrEqual(tolerance);
      for (let n = 0; n < lse.length; n += 97) expect(Math.abs(lse[n] - exact.lse[n])).toBeLessThan(0.1); // m.mean is 1.5
    });

    test('gradients keep the tolerance, by a polynomial', () => {
      const args = { ...shifted(plain, 1, 0.5), method: 'polynomial', tolerance: 1e-2 } as const;
      const got = attention().backward(args);
      expect(got.report.degree).toBeLessThanOrEqual(3);
      expect(gradientError(got, attention().backward({ ...args, method: 'exact' }))).toBeLessThanOrEqual(1e-2);
    });

    test('a certificate holds', () => {
      const args = { ...forwardArgs(shifted(plain, 1, 0.5)), tolerance: 1e-2, guarantee: 'certified', method: 'polynomial' } as const;
      const { output, report } = attention().forward(args);
      const error = outputError(args, output, attention().forward({ ...args, method: 'exact' }).output);
      expect(report.errorBound!).toBeLessThanOrEqual(1e-2);
      expect(error).toBeLessThanOrEqual(report.errorBound!);
    });
  });

  describe('what cannot be taken out', () => {
    const args = problem(SETTINGS.causal, 6, (r) => r.uniform() - 0.5);

    test('a mean query that gives a key e to the power of 20 or more stays', () => {
      const far = shifted(args, 30, 0);
      const { output, report } = attention().forward({ ...forwardArgs(far), tolerance: 1e-2 });
      expect(report.scoreBound).toBeGreaterThan(20);
      const exact = attention().forward({ ...forwardArgs(far), method: 'exact' });
      expect(outputError(far, output, exact.output)).toBeLessThanOrEqual(1e-2);
    });

    test('one huge key and one huge query beside a mean are exact, and the mean still goes', () => {
      const long = problem({ ...SETTINGS.causal, shape: { heads: 1, queryLength: 8192, headDim: 16 } }, 6, (r) => r.uniform() - 0.5);
      const huge = shifted(long, 0.5, 0.5);
      for (let d = 0; d < 16; d++) {
        huge.q[16 * 1000 + d] *= 40;
        huge.k[16 * 700 + d] *= 10;
      }
      const { output, report } = attention().forward({ ...forwardArgs(huge), tolerance: 1e-2 });
      expect(report.method).toBe('polynomial');
      expect(report.outliers!.keys + report.outliers!.queries).toBeGreaterThan(0);
      expect(report.scoreBound).toBeLessThan(2);
      expect(outputError(huge, output, attention().forward({ ...forwardArgs(huge), method: 'exact' }).output)).toBeLessThanOrEqual(1e-2);
    });
  });
});
