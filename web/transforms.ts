// SPDX-License-Identifier: MIT
//
// What float32 Fourier transforms may add to the output of the Toeplitz engine, proved; MATH.md section 8 has the derivation.
//
// A transform is a product of sparse matrices, one for each factor of its length: so each of its results is off by at most a multiple of
// the sum of magnitudes that go in, and all together by a multiple of their Euclidean norm (Higham, Accuracy and Stability of
// Numerical Algorithms, 2002, chapter 24). In the product of a block E of the Toeplitz matrix with a block x of keys every rounding
// ends as at most eta |E|_2 |x|_2 in each row, |E|_2 being the norm of the lags of the block. Beside a row's sum of weights that is small where the
// bias is moderate and the row sees as much as others do; where it is not there is no certificate.

import { blocksOf } from './blocks.js';
import { termsOf } from './cost.js';
import { FORBIDDEN } from './scores.js';
import type { Geometry } from './validate.js';

/** Unit roundoff of float32. */
const UNIT = 2 ** -24;

/** Of one factor of the length: roundings of each result, over the sum of magnitudes that go in, products with roots of unity included. */
const STAGES = { 2: 5, 3: 9, 4: 6, 5: 13 } as const;

/** Keys that are done exactly beside a row, and the distance below which they are (near.c). */
const [NEAR_KEYS, NEAR] = [168, 64];

/** Roundings of a transform of so many numbers: `each` over the sum of magnitudes that go in, `norm` in Euclidean norms. */
function roundingsOf(length: number): { each: number; norm: number } {
  let [each, norm, rest] = [0, 0, length];
  for (const factor of [4, 2, 3, 5] as const) {
    for (; rest % factor === 0; rest /= factor) {
      each += STAGES[factor];
      norm += STAGES[factor] * (factor % 2 === 0 ? 1 : Math.sqrt(factor)); // sums of two keep norms but for sqrt 2
    }
  }
  return { each, norm };
}

/**
 * Worst case of what float32 adds to the output of a key/value head, in units of half the range of its values, beside the rounding of
 * scores.
 *
 * @param magnitude sum of |c_m| R^m, which bounds the terms of a pair with their signs left out.
 * @param least of the polynomial's weights, exp(bias) apart.
 */
export function transformBound(g: Geometry, degree: number, magnitude: number, least: number): number {
  const { rows, columns, block } = blocksOf(g);
  const { each, norm } = roundingsOf(block);
  const { worst, near } = shareOf(g);
  const own = g.relative || g.relativePositions ? 4 * (degree + 1) : 0; // matrices are products of some
  // the transform of keys and their turn, that of the matrix, products and their sum, the transform back
  const eta = (norm + 4 + norm + 6 + own + 3 * Math.max(rows, columns) + 5 + each + 6) * UNIT;
  // the sums over terms and over near keys, features of both sides, weights, the constant term
  const chain = ((g.relativePositions ? 2 : 1) * termsOf(g, degree) + (near ? NEAR_KEYS : 0) + 8 * (degree + 1) + 24) * UNIT;
  if (!(eta < 0.01 && chain < 0.5)) return Infinity;
  const rho = (magnitude * (1.02 * eta * worst + chain / (1 - chain))) / least;
  // values and the column of ones, of the same size within a factor of two, are transformed in pairs
  const [numerator, denominator] = [Math.sqrt(5), Math.SQRT2];
  return denominator * rho < 1 ? (2 * (numerator + denominator) * rho) / (1 - denominator * rho) : Infinity;
}

/**
 * `worst`: of all rows, Infinity where a row's weights are lost; `near`: some pairs are done exactly; `drowned`: of each bias rows whose
 * share is large, the worst one first.
 */
interface Share {
  worst: number;
  near: boolean;
  drowned: number[][];
}

/** Sums of a row's weights, over the largest exp(bias) of all, that nothing is said of: floats end there (LEAST_SUM of toeplitz.c is 2^-80). */
const LEAST_SUM = 2 ** -60;

/** Rounding is looked for in rows where it counts so many times what it does in a row of equal weights: in a few of them. */
const [DROWNED, LOOKED] = [8, 4];

/**
 * Of each bias (one, or one of each head) some rows whose sums of weights are small beside what their blocks hold, which the transforms' rounding
 * shows in first; none where it counts as little there as anywhere.
 */
export function drownedRows(g: Geometry): readonly (readonly number[])[] {
  return shareOf(g).drowned;
}

const shares = new WeakMap<Geometry, Share>();

/** The largest |E|_2 |x|_2, summed over the blocks of a row, over the row's sum of exp(bias); rows without far keys have no rounding. */
function shareOf(g: Geometry): Share {
  const known = shares.get(g);
  if (known !== undefined) return known;
  const diagonals = g.queryLength + g.keyLength - 1;
  const share: Share = { worst: 0, near: false, drowned: [] };
  for (let first = 0; first < (g.bias?.length ?? diagonals); first += diagonals) {
    const own = shareOfBias(g, g.bias ? g.bias.subarray(first, first + diagonals) : null);
    share.worst = Math.max(share.worst, own.worst);
    share.near ||= own.near;
    share.drowned.push(...own.drowned);
  }
  shares.set(g, share);
  return share;
}

function shareOfBias(g: Geometry, bias: Float32Array | null): Share {
  const { queryLength, keyLength, queryOffset } = g;
  const diagonals = queryLength + keyLength - 1;
  const [behind, ahead] = [g.window[0] < 0 ? Infinity : g.window[0], g.causal ? 0 : g.window[1] < 0 ? Infinity : g.window[1]];
  const distanceOf = (n: number) => n - (keyLength - 1) + queryOffset;
  const counts = (n: number) =>
    distanceOf(n) <= behind && -distanceOf(n) <= ahead && (bias === null || bias[n] > FORBIDDEN);
  let [top, nearest] = [-Infinity, Infinity];
  for (let n = diagonals - 1; n >= 0; n--) {
    if (!counts(n)) continue;
    top = Math.max(top, bias ? bias[n] : 0);
    nearest = distanceOf(n);
  }
  const apart = -nearest < NEAR; // near pairs are done exactly
  const weights = new Float64Array(diagonals); // exp(bias)
  // sums up to entry n: how many count, of far ones how many, and of squares of their weights
  const [seen, far, squares] = [0, 1, 2].map(() => new Float64Array(diagonals + 1));
  for (let n = 0; n < diagonals; n++) {
    if (counts(n)) weights[n] = Math.exp((bias ? bias[n] : 0) - top);
    const isFar = weights[n] > 0 && !(apart && distanceOf(n) < NEAR);
    seen[n + 1] = seen[n] + Number(counts(n));
    far[n + 1] = far[n] + Number(isFar);
    squares[n + 1] = squares[n] + (isFar ? weights[n] ** 2 : 0);
  }
  const sums = windowSums(weights, keyLength, queryLength);
  const { rows, columns, block } = blocksOf(g);
  const clip = (n: number) => Math.min(Math.max(n, 0), diagonals);
  const norms = Array.from({ length: rows + columns - 1 }, (_, n) => {
    const lag = (n - columns) * block + keyLength; // entry of the least lag of the block d = n - columns + 1
    return Math.sqrt(Math.max(squares[clip(lag + 2 * block - 1)] - squares[clip(lag)], 0));
  });
  const sizes = Array.from({ length: columns }, (_, J) => Math.sqrt(Math.min(block, keyLength - J * block)));
  let [worst, largest, worstRow] = [0, 0, 0];
  const drowned: number[] = [];
  for (let I = 0; I < rows; I++) {
    const rounding = sizes.reduce((sum, size, J) => sum + norms[I - J + columns - 1] * size, 0);
    for (let i = I * block; i < Math.min((I + 1) * block, queryLength); i++) {
      if (seen[i + keyLength] === seen[i]) continue;
      if (!(sums[i] >= LEAST_SUM)) worst = Infinity;
      if (far[i + keyLength] === far[i]) continue;
      const share = rounding / sums[i];
      if (!(share <= largest)) [largest, worstRow] = [share, i];
      if (!(share <= DROWNED)) drowned.push(i);
    }
  }
  // the worst one and others evenly, as rounding is by chance
  const others = Array.from({ length: LOOKED - 1 }, (_, n) => drowned[Math.floor((n * drowned.length) / (LOOKED - 1))]);
  const some = drowned.length > 0 ? [...new Set([worstRow, ...others])] : [];
  worst = Math.max(worst, largest);
  return { worst: Number.isNaN(worst) ? Infinity : worst, near: apart, drowned: [some] };
}

/** x[i] + .. + x[i + width - 1] for i < count, of what is before a multiple of width and what is behind: large ones are never subtracted. */
function windowSums(x: Float64Array, width: number, count: number): Float64Array {
  const sums = new Float64Array(count);
  for (let n = x.length - 1, sum = 0; n >= 0; n--) {
    sum = (n + 1) % width === 0 ? x[n] : sum + x[n];
    if (n < count) sums[n] = sum;
  }
  for (let n = 0, sum = 0; n < x.length; n++) {
    sum = n % width === 0 ? x[n] : sum + x[n];
    const first = n - width + 1;
    if (first >= 0 && first < count && first % width !== 0) sums[first] += sum;
  }
  return sums;
}
