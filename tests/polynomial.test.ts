// SPDX-License-Identifier: MIT
//
// The polynomials that stand in for exp: the minimax one by the properties that define it, its stated error against dense
// grids, the fitted one by least squares' own definition, and both where their inputs are degenerate.

import { describe, expect, test } from '@jest/globals';

import { MAX_DEGREE, ScoreFits, evaluate, fitToScores, minimax, relativeError, relativeRange, tangent, unbiased } from '../dist/polynomial.js';
import { maxAbs, random } from './support.js';

const degrees = Array.from({ length: MAX_DEGREE + 1 }, (_, degree) => degree);
const taylor = (degree: number) => Float32Array.from({ length: degree + 1 }, (_, m) => 1 / factorial(m));
const factorial = (m: number): number => (m < 2 ? 1 : m * factorial(m - 1));

function grid(low: number, high: number, count: number): number[] {
  return Array.from({ length: count + 1 }, (_, n) => low + ((high - low) * n) / count);
}

const signedError = (c: ArrayLike<number>, s: number) => evaluate(c, s) * Math.exp(-s) - 1;

function errorOnGrid(c: ArrayLike<number>, low: number, high: number, count = 20000): number {
  return Math.max(...grid(low, high, count).map((s) => Math.abs(signedError(c, s))));
}

test('evaluate is the sum of c_m s^m', () => {
  expect(evaluate([], 5)).toBe(0);
  expect(evaluate([3], 5)).toBe(3);
  expect(evaluate([1, -2, 0, 4], 3)).toBe(1 - 6 + 4 * 27);
});

describe('relativeError', () => {
  // exp(1.5 s) p-like shapes: several extrema inside, one end larger, intervals that do not hold 0.
  test.each([
    [[1, 1, 0.5], -1, 1],
    [[1, 1, 0.5], 2, 3],
    [[1, 1, 0.5, 0.2], -3, -1],
    [[2], -1, 4],
    [[1, 0, 0, 0, 0, 1], -2, 2],
    [[0.9, 1.1, 0.4, 0.2, 0.03, 0.01, 0.002], -2.5, 2.5],
  ])('%j on [%d, %d] covers a dense grid and is barely above it', (c, low, high) => {
    const error = relativeError(c, low, high);
    const seen = errorOnGrid(c, low, high);
    expect(error).toBeGreaterThanOrEqual(seen);
    // The grid of 20,000 misses an extremum by at most e'' h^2 / 8, about 1e-8 of the values here.
    expect(error).toBeLessThan(seen * (1 + 1e-6) + 1e-12);
  });

  test('a single point, and values past the range of float64', () => {
    expect(relativeError([1, 1], 0, 0)).toBeLessThan(1e-13);
    expect(relativeError([1, 1], -800, 0)).toBe(Infinity);
  });
});

test('relativeRange covers a dense grid from both sides, and says nothing of what it cannot tell', () => {
  for (const [c, low, high] of [[[1, 1, 0.5], -1, 1], [[0.9, 1.1, 0.4, 0.2], -2.5, 2], [[2], -1, 4]] as const) {
    const { least, most } = relativeRange(c, low, high);
    const ratios = grid(low, high, 20000).map((s) => 1 + signedError(c, s));
    expect(least).toBeLessThanOrEqual(Math.min(...ratios));
    expect(most).toBeGreaterThanOrEqual(Math.max(...ratios));
    expect(least).toBeGreaterThan(Math.min(...ratios) - 1e-6);
    expect(most).toBeLessThan(Math.max(...ratios) + 1e-6);
  }
  expect(relativeRange([1, NaN], -1, 1)).toEqual({ least: -Infinity, most: Infinity });
});

describe('unbiased', () => {
  /** Of normal scores, by the trapezoidal rule. */
  const mean = (c: ArrayLike<number>, variance: number) => {
    const sum = (of: (s: number) => number) => grid(-8, 8, 4000).reduce((total, x) => total + Math.exp(-x * x / 2) * of(x * Math.sqrt(variance)), 0);
    return sum((s) => evaluate(c, s)) / sum(() => 1);
  };

  test.each([[1, 0.4, 0.01], [2, 1, 0.04], [3, 2, 0.3], [4, 2, 0.3], [6, 3, 0.5]])(
    'degree %d, radius %d, variance %d: the mean of exp, and ratios to exp as far apart as before',
    (degree, radius, variance) => {
      const { coefficients } = minimax(degree, radius);
      const got = unbiased(coefficients, radius, variance);
      expect(Math.abs(mean(got, variance) / Math.exp(variance / 2) - 1)).toBeLessThan(1e-6);
      expect(Math.abs(mean(coefficients, variance) / Math.exp(variance / 2) - 1)).toBeGreaterThan(1e-5);
      const [before, after] = [coefficients, got].map((c) => relativeRange(c, -radius, radius));
      expect(after.most / after.least).toBeCloseTo(before.most / before.least, 5);
      expect(after.least).toBeLessThanOrEqual(1 + 1e-6);
      expect(after.most).toBeGreaterThanOrEqual(1 - 1e-6);
    },
  );

  test('no farther than where the ratio is 1 somewhere; what is not positive stays', () => {
    const { coefficients } = minimax(2, 1);
    for (const variance of [1e-9, 30]) {
      const { least, most } = relativeRange(unbiased(coefficients, 1, variance), -1, 1);
      expect(least).toBeLessThanOrEqual(1 + 1e-6);
      expect(most).toBeGreaterThanOrEqual(1 - 1e-6);
    }
    expect(unbiased(Float32Array.of(0.1, 1), 1, 0.1)).toEqual(Float32Array.of(0.1, 1));
    expect(unbiased(Float32Array.of(NaN, 1), 1, 0.1)).toEqual(Float32Array.of(NaN, 1));
  });
});

describe('minimax', () => {
  const radii = [0.1, 0.5, 1, 2, 3, 4, 5, 7, 10, 20];

  test.each(degrees)('degree %d: the error stated covers a dense grid and is barely above it', (degree) => {
    for (const radius of radii) {
      const { coefficients, error } = minimax(degree, radius);
      const seen = errorOnGrid(coefficients, -radius, radius);
      expect(error).toBeGreaterThanOrEqual(seen);
      expect(error).toBeLessThan(seen * (1 + 1e-4) + 1e-10);
    }
  });

  // de la Vallee Poussin: a polynomial whose error alternates in sign at g + 2 points with at least the height L there has
  // no competitor of degree g below L. So alternation at (nearly) full height proves it (nearly) the best one. Rounding to
  // float32 moves the heights by about 2^-24 times the sum of |c_m| r^m exp(r), hence radii where the error is larger.
  test.each(degrees.flatMap((degree) => [1, 2, 3, 4].map((radius) => [degree, radius] as const)))(
    'degree %d, radius %d: the error alternates at degree + 2 points',
    (degree, radius) => {
      const { coefficients, error } = minimax(degree, radius);
      const floor = 2 ** -24 * evaluate(Array.from(coefficients, Math.abs), radius) * Math.exp(radius);
      const height = 0.998 * error - 2 * floor;
      if (height <= 0) return expect(error).toBeLessThan(4 * floor);
      let [alternations, sign] = [0, 0];
      for (const s of grid(-radius, radius, 20000)) {
        const e = signedError(coefficients, s);
        if (Math.abs(e) >= height && Math.sign(e) !== sign) [alternations, sign] = [alternations + 1, Math.sign(e)];
      }
      expect(alternations).toBe(degree + 2);
    },
  );

  test('the error falls with the degree down to float32 rounding, and grows with the radius', () => {
    for (const radius of radii.filter((r) => r <= 5)) {
      for (const degree of degrees.slice(1)) {
        // Rounding c_0 and c_1 alone costs up to 2^-25 (1 + radius) near 0; where it decides, 1.7e-8 is the most seen.
        expect(minimax(degree, radius).error).toBeLessThan(Math.max(minimax(degree - 1, radius).error, 4e-8));
      }
    }
    for (const degree of degrees) {
      const errors = radii.map((radius) => minimax(degree, radius).error);
      errors.slice(1).forEach((error, n) => expect(error).toBeGreaterThanOrEqual(errors[n]));
    }
  });

  test('it is better than the Taylor polynomial, by up to 2^degree', () => {
    for (const degree of [1, 2, 3, 4]) {
      const { error } = minimax(degree, 1);
      const taylorError = relativeError(taylor(degree), -1, 1);
      expect(error).toBeLessThan((taylorError * 2) / 2 ** degree);
    }
  });

  test('a radius of 0, or next to it, gives the Taylor polynomial', () => {
    for (const degree of degrees) {
      for (const radius of [0, 1e-300, 1e-9]) {
        const { coefficients, error } = minimax(degree, radius);
        if (degree > 0) expect(coefficients).toEqual(taylor(degree));
        expect(error).toBeLessThan(1e-8);
      }
    }
  });

  test('a radius too large for float32 gives a positive polynomial and an error that certifies nothing', () => {
    for (const degree of degrees) {
      for (const radius of [20, 50, 80]) {
        const { coefficients, error } = minimax(degree, radius);
        expect(error).toBeGreaterThan(0.999);
        for (const s of grid(-radius, radius, 1000)) expect(evaluate(coefficients, s)).toBeGreaterThan(0);
      }
    }
  });

  test('degrees and radii outside their range are RangeErrors with the value', () => {
    for (const degree of [-1, 9, 1.5, NaN]) expect(() => minimax(degree, 1)).toThrow(`got ${degree}`);
    for (const radius of [-1, Infinity, NaN]) expect(() => minimax(2, radius)).toThrow(`got ${radius}`);
    expect(() => minimax(9, 1)).toThrow(RangeError);
  });
});

describe('tangent', () => {
  test.each([0, 0.01, 0.3, 1, 3, 8])('it is off by at most error s^2 within radius %d, and by as much at its end', (radius) => {
    for (const degree of degrees.slice(1)) {
      const { coefficients, error } = tangent(degree, radius);
      expect(Array.from(coefficients.slice(0, 2))).toEqual([1, 1]);
      for (const s of grid(-radius, radius, 500)) {
        const rounding = 2 ** -50 * Math.exp(Math.abs(s));
        expect(Math.abs(evaluate(coefficients, s) - Math.exp(s))).toBeLessThanOrEqual(error * s * s + rounding);
      }
      const attained = Math.abs(evaluate(coefficients, radius) - Math.exp(radius)) / radius ** 2;
      if (error * radius ** 2 > 1e-4) expect(attained).toBeGreaterThan(0.99 * error);
    }
  });

  test('its error falls with the degree, faster than that of Taylor polynomials', () => {
    let power = 1 / 2;
    for (const degree of degrees.slice(1, 7)) {
      // (e - sum of s^m / m!) / s^2 at s = 1: what Taylor polynomials leave
      const taylors = Math.E - evaluate(taylor(degree), 1);
      const { error } = tangent(degree, 1);
      if (degree > 1) expect(error).toBeLessThan(taylors / 2 ** (degree - 2.5));
      expect(error).toBeLessThan(1.6 * power);
      power = error;
    }
  });

  test('there is none of degree 0, nor beyond radius 8', () => {
    expect(tangent(0, 1).error).toBe(Infinity);
    expect(tangent(3, 8.5).error).toBe(Infinity);
    expect(tangent(3, NaN).error).toBe(Infinity);
    expect(() => tangent(9, 1)).toThrow('got 9');
  });
});

describe('fitToScores', () => {
  const r = random(1);
  const spread = (deviation: number, count = 2048) => Float32Array.from({ length: count }, () => deviation * r.normal());

  /** What is minimised: the mean of (p(s) - exp(s))^2 + (p'(s) - exp(s))^2. */
  const objective = (c: ArrayLike<number>, scores: Float32Array) => {
    const slope = Array.from(c).map((_, m) => (m + 1 < c.length ? (m + 1) * c[m + 1] : 0));
    let sum = 0;
    for (const s of scores) sum += (evaluate(c, s) - Math.exp(s)) ** 2 + (evaluate(slope, s) - Math.exp(s)) ** 2;
    return sum / scores.length;
  };

  test('no change of a coefficient lowers the sum of squares', () => {
    for (const scores of [spread(0.3), spread(1), spread(0.5).map((s) => s + 1), spread(0.4).map((s) => s ** 3)]) {
      for (const degree of [0, 1, 2, 3, 4, 5]) {
        const c = fitToScores(scores, degree);
        const least = objective(c, scores);
        for (const m of c.keys()) {
          for (const change of [-1e-3, 1e-3]) {
            const other = c.map((value, n) => (n === m ? value + change : value));
            expect(objective(other, scores)).toBeGreaterThan(least);
          }
        }
      }
    }
  });

  test('it beats Taylor and minimax on the scores that it was fitted to, and improves with the degree', () => {
    const scores = spread(0.5);
    const radius = maxAbs(scores);
    for (const degree of degrees) {
      const fitted = objective(fitToScores(scores, degree), scores);
      // From degree 8 on, all three are at the rounding of their float32 coefficients.
      if (degree < 8) expect(fitted).toBeLessThan(objective(taylor(degree), scores));
      if (degree < 8) expect(fitted).toBeLessThan(objective(minimax(degree, radius).coefficients, scores));
      if (degree > 0 && degree < 8) expect(fitted).toBeLessThan(objective(fitToScores(scores, degree - 1), scores) / 4);
    }
  });

  test('few distinct scores: two of them decide four coefficients (value and slope), Taylor the rest', () => {
    // Hermite interpolation of exp at 0 and 1: 1 + s + (2e - 5) s^2 + (3 - e) s^3.
    expect(fitToScores([0, 1, 1, 0], 3)).toBeAllclose([1, 1, 2 * Math.E - 5, 3 - Math.E], { atol: 1e-7 });
    for (const degree of degrees) {
      const c = fitToScores([-0.5, 1], degree);
      if (degree < 3) continue;
      for (const s of [-0.5, 1]) expect(evaluate(c, s)).toBeCloseTo(Math.exp(s), 6);
      expect(errorOnGrid(c, -0.5, 1)).toBeLessThan(0.05);
    }
  });

  test('equal scores give the Taylor polynomial about them', () => {
    for (const degree of degrees) {
      expect(fitToScores([0, 0, 0], degree)).toEqual(taylor(degree));
      for (const s of [-2, 0.75, 3]) {
        const c = fitToScores([s, s], degree);
        // Powers of s about 0 from powers of s - 3: sums of |terms| up to (1 + 3 + 9/2 + ...) exp(3), rounded to float32.
        expect(evaluate(c, s) / Math.exp(s)).toBeCloseTo(1, 4);
        if (degree > 1) expect(evaluate(c, s + 0.01) / Math.exp(s + 0.01)).toBeCloseTo(1, 4);
      }
    }
  });

  test('no scores at all give the Taylor polynomial about 0', () => {
    for (const degree of degrees) expect(fitToScores([], degree)).toEqual(taylor(degree));
  });

  test('narrow, wide and heavy-tailed scores give finite coefficients', () => {
    const heavy = spread(0.3).map((s, n) => (n % 100 === 0 ? 7 * Math.sign(s) : s));
    for (const scores of [spread(1e-6), spread(1e-3).map((s) => s - 1), spread(10), heavy, [-80, 0, 80]]) {
      for (const degree of degrees) {
        for (const c of fitToScores(scores, degree)) expect(Number.isFinite(c)).toBe(true);
      }
    }
  });

  test('one after the other, in any order, they are what each is alone; a weight is so many equal scores', () => {
    const few = Array.from(spread(0.7, 20));
    const weights = Float64Array.from(few, (_, n) => 1 + (n % 3));
    const fits = new ScoreFits(few, weights);
    const all = few.flatMap((s, n) => new Array<number>(weights[n]).fill(s));
    for (const degree of [3, 0, 5, 8, 1, 3, 2]) {
      const size = Math.exp(Math.max(...few));
      const [got, expected] = [fits.fit(degree), fitToScores(all, degree)];
      // on the scores, as high coefficients of so few of them are open
      for (const s of few) expect(Math.abs(evaluate(got, s) - evaluate(expected, s)) / size).toBeLessThan(1e-5);
    }
  });

  test.each([0, 1, 4])('what degree %d leaves of exp, by value and by derivative', (degree) => {
    const scores = Array.from(spread(0.6, 50), (s) => s + 2);
    const weights = Float64Array.from(scores, (_, n) => 1 + (n % 4));
    const fits = new ScoreFits(scores, weights);
    const p = fits.fit(degree);
    const slope = Array.from(p).map((_, m) => (m < degree ? (m + 1) * p[m + 1] : 0));
    const sum = (of: (s: number) => number) => scores.reduce((total, s, n) => total + weights[n] * of(s) ** 2, 0);
    for (const [of, derivative] of [[p, false], [slope, true]] as const) {
      const expected = Math.sqrt(sum((s) => evaluate(of, s) - Math.exp(s)) / sum(Math.exp));
      expect(fits.residual(p, derivative) / expected).toBeCloseTo(1, 9);
    }
  });

  test('scores that are not finite, and degrees outside 0 to 8, are RangeErrors with the value', () => {
    expect(() => fitToScores([0, NaN], 2)).toThrow('got NaN');
    expect(() => fitToScores([0, -Infinity], 2)).toThrow(RangeError);
    expect(() => fitToScores([0, 1], 9)).toThrow('got 9');
  });
});
