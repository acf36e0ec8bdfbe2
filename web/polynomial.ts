// SPDX-License-Identifier: MIT
//
// Polynomials p(s) = sum_m c_m s^m, m = 0 .. g, that stand in for exp(s) in the polynomial engine:
//
//   minimax      the best worst case of |p(s) exp(-s) - 1| on [-radius, radius] (Remez exchange): for certificates;
//   tangent      |p(s) - exp(s)| <= E s^2 there with a small E: for certificates by the mean of s^2;
//   fitToScores  least squares, value and derivative, over sampled scores: for the best typical case.
//
// All end as float32 coefficients of s^m, which is what the engine takes. Near |s| = 7 the values of exp(-|s|) and exp(|s|)
// are a factor 1e6 apart and float32 coefficients cannot carry both: an `error` is always that of the rounded coefficients.
//
// Based on: Remez 1934; Karlin, Studden. Tchebycheff Systems. 1966 (s^m exp(-s) is a Haar system, so the best p is unique
// and its error takes its extreme value with alternating sign at g + 2 points); Aggarwal, Alman. Optimal-Degree Polynomial
// Approximations for Exponentials and Gaussian Kernel Density Estimation. 2022 (arXiv 2205.06249: how g must grow).

/** Largest degree that the engine takes (RA_MAX_DEGREE). */
export const MAX_DEGREE = 8;
/** A sum of the engine from which tokens leave is made anew once this many have left for each that stays (RA_TURNOVER). */
export const TURNOVER = 4;

/** Half of float32's spacing at 1: smaller improvements of a polynomial are lost when its coefficients are rounded. */
const FLOAT32_ROUNDING = 2 ** -25;

/** Intervals that `condense` sorts scores into. */
const POINTS = 64;

/** p(s) = sum_m coefficients[m] s^m by Horner's rule, in float64. */
export function evaluate(coefficients: ArrayLike<number>, s: number): number {
  let sum = 0;
  for (let m = coefficients.length - 1; m >= 0; m--) sum = sum * s + coefficients[m];
  return sum;
}

/**
 * The least and the largest p(s) exp(-s) for s in [low, high], rounded outwards; -Infinity and Infinity where they cannot be told.
 *
 * Not a search on a grid: the derivative of p exp(-s) is (p' - p) exp(-s), so both are at an end or at a root of the polynomial
 * p' - p, and all its roots are found. What is added covers the rounding of this evaluation.
 */
export function relativeRange(coefficients: ArrayLike<number>, low: number, high: number): { least: number; most: number } {
  const p = Array.from(coefficients);
  const magnitude = p.map(Math.abs);
  const slope = p.map((c, m) => (m + 1 < p.length ? (m + 1) * p[m + 1] : 0) - c);
  let [least, most] = [Infinity, -Infinity];
  for (const s of [low, high, ...signChanges(slope, low, high)]) {
    const decay = Math.exp(-s);
    const rounding = 8 * p.length * Number.EPSILON * (1 + Math.abs(s)) * evaluate(magnitude, Math.abs(s)) * decay;
    const ratio = evaluate(p, s) * decay;
    if (Number.isNaN(ratio + rounding)) return { least: -Infinity, most: Infinity };
    least = Math.min(least, ratio - rounding);
    most = Math.max(most, ratio + rounding);
  }
  return { least, most };
}

/** max |p(s) exp(-s) - 1| for s in [low, high], rounded up a little; Infinity where it cannot be told. */
export function relativeError(coefficients: ArrayLike<number>, low: number, high: number): number {
  const { least, most } = relativeRange(coefficients, low, high);
  return Math.max(most - 1, 1 - least) * (1 + 1e-9);
}

/**
 * p times a number that makes its mean over scores that of exp, as far as p(s) exp(-s) is still 1 somewhere on [-radius, radius]. Ratios of weights, and so
 * what is proved of outputs, stay as they are, but lse is right on average, and so are gradients that go by it: `minimax`, which has
 * its largest errors at 0 too, where most scores are, is off by up to its error there.
 *
 * @param coefficients c_0 .. c_g of s^m; returned as they are where p or that mean is not positive.
 * @param variance of the scores, whose mean is 0; normal, about.
 */
export function unbiased(coefficients: Float32Array, radius: number, variance: number): Float32Array {
  const { least, most } = relativeRange(coefficients, -radius, radius);
  let [mean, moment] = [0, 1]; // of s^m: that of s^(m + 2) is (m + 1) variance times as much
  for (let m = 0; m < coefficients.length; m += 2) {
    mean += coefficients[m] * moment;
    moment *= (m + 1) * variance;
  }
  const factor = Math.min(Math.max(Math.exp(variance / 2) / mean, 1 / most), 1 / least);
  return least > 0 && mean > 0 ? coefficients.map((c) => factor * c) : coefficients;
}

/**
 * The polynomial of the given degree (0 to 8) that minimises max |p(s) exp(-s) - 1| on [-radius, radius].
 *
 * @returns coefficients c_0 .. c_degree of s^m, rounded to float32, and `error`, that maximum for the rounded coefficients,
 *   rounded up (`relativeError`). For a radius near 0 it is the Taylor polynomial; where float32 coefficients do not bring
 *   the error below 1 (a radius of about 5 to 10, by degree) it is a positive constant, and `error` certifies nothing.
 * @throws RangeError for a degree that is not an integer from 0 to 8 or a radius that is negative or not finite.
 */
export function minimax(degree: number, radius: number): { coefficients: Float32Array; error: number } {
  checkDegree('minimax', degree);
  if (!(radius >= 0 && radius < Infinity)) throw new RangeError(`minimax: radius must be finite and not negative, got ${radius}`);

  const rounded = (p: number[]) => {
    const coefficients = Float32Array.from(p);
    return { coefficients, error: relativeError(coefficients, -radius, radius) };
  };
  const taylor = rounded(exponentialSeries(degree));
  if (taylor.error <= FLOAT32_ROUNDING) return taylor;
  const best = rounded(remez(degree, radius));
  if (best.error < 1) return best;
  // 1 / cosh(radius) is the best constant; its error tanh(radius) is below 1, though not in float64 past radius 19. The
  // floor is the smallest normal float32: weights of zero would leave nothing to divide by.
  const constant = new Array<number>(degree + 1).fill(0);
  constant[0] = Math.max(1 / Math.cosh(radius), 2 ** -126);
  return rounded(constant);
}

/** Terms of the series of `tangent`, and the radius up to which those that follow are below float64's rounding. */
const [TANGENT_TERMS, TANGENT_RADIUS] = [48, 8];

/**
 * The polynomial 1 + s + s^2 u(s) of the given degree (1 to 8), u of the least error but for a little: for scores most of which are small beside
 * their radius.
 *
 * (exp(s) - 1 - s) / s^2 = sum_k s^k / (k + 2)! is a sum of powers of x = s / radius with positive coefficients, and so one of Chebyshev polynomials,
 * of which u takes the first. The others add up to the most at x = 1, and there to the sum of their coefficients.
 *
 * @returns coefficients of s^m, rounded to float32, and `error` E with |p(s) - exp(s)| <= E s^2 for |s| <= radius, that of the rounded ones;
 *   Infinity beyond radius 8.
 */
export function tangent(degree: number, radius: number): { coefficients: Float32Array; error: number } {
  checkDegree('tangent', degree);
  const coefficients = new Float32Array(degree + 1).fill(1, 0, 2);
  if (degree < 1 || !(radius <= TANGENT_RADIUS)) return { coefficients, error: Infinity };
  // 2^-k (k over j) of x^k are in T_(k - 2 j) twice, but once in T_0
  const series = zeros(TANGENT_TERMS);
  let power = 1 / 2; // (radius / 2)^k / (k + 2)!
  for (let k = 0; k < TANGENT_TERMS; k++) {
    for (let m = k, ways = power, j = 0; m >= 0; m -= 2, j++) {
      series[m] += m === 0 ? ways : 2 * ways;
      ways *= (k - j) / (j + 1);
    }
    power *= radius / 2 / (k + 3);
  }
  const u = degree < 2 ? [] : compose(fromChebyshev(series.slice(0, degree - 1)), 0, radius || 1);
  let error = 0;
  for (let m = TANGENT_TERMS - 1; m >= degree - 1; m--) error += series[m];
  for (let m = 0, size = 1; m < u.length; m++, size *= radius) {
    coefficients[m + 2] = u[m];
    error += Math.abs(coefficients[m + 2] - u[m]) * size;
  }
  return { coefficients, error: error * (1 + 1e-9) + 1e-15 };
}

/**
 * The polynomial that minimises, over the given scores, the sum of (p(s) - exp(s))^2 + (p'(s) - exp(s))^2: output and
 * gradient of attention depend on the value and on the derivative of the stand-in for exp.
 *
 * Solved in a Chebyshev basis on [min, max] by normal equations with a regularisation (1e-13 of their trace) towards the
 * Taylor polynomial about the mean score, which therefore settles whatever too few different scores leave open; with no
 * scores at all it is the Taylor polynomial about 0.
 *
 * @param scores any number of finite scores. exp of the largest must fit float32 (below about 88), or the coefficients do not.
 * @param degree an integer from 0 to 8.
 * @returns c_0 .. c_degree of s^m, rounded to float32.
 * @throws RangeError for another degree and for scores that are not finite.
 */
export function fitToScores(scores: ArrayLike<number>, degree: number): Float32Array {
  return new ScoreFits(scores).fit(degree);
}

/** The same for one degree after another; `weights`: how often each score counts, once where none are given. */
export class ScoreFits {
  readonly #scores: ArrayLike<number>;
  readonly #weights: Float64Array;
  /** exp(s - high): everything is divided by exp(high) until the end, so that no square overflows. */
  readonly #exponentials: Float64Array;
  readonly #high: number = 0;
  readonly #mean: number = 0;
  /** Scores are middle + half x. */
  readonly #middle: number = 0;
  readonly #half: number = 0;
  /** T_m(x) and d/ds T_m = T_m'(x) / half of every score, m = 0, 1, .. as far as they were needed. */
  readonly #values: Float64Array[] = [];
  readonly #derivatives: Float64Array[] = [];
  /** Their products, values and derivatives, summed over scores: row m has those with 0 .. m. */
  readonly #products: number[][] = [];

  constructor(scores: ArrayLike<number>, weights: Float64Array = new Float64Array(scores.length).fill(1)) {
    const count = scores.length;
    const exponentials = new Float64Array(count);
    [this.#scores, this.#weights, this.#exponentials] = [scores, weights, exponentials];
    if (count === 0) return;
    let [low, high, sum, total] = [Infinity, -Infinity, 0, 0];
    for (let n = 0; n < count; n++) {
      const s = scores[n];
      if (!Number.isFinite(s)) throw new RangeError(`fitToScores: scores must be finite, got ${s}`);
      if (s < low) low = s;
      if (s > high) high = s;
      sum += weights[n] * s;
      total += weights[n];
    }
    for (let n = 0; n < count; n++) exponentials[n] = Math.exp(scores[n] - high);
    this.#high = high;
    this.#mean = Math.min(Math.max(sum / total, low), high); // equal scores: themselves, whatever rounding says
    this.#middle = (low + high) / 2;
    this.#half = (high - low) / 2;
  }

  fit(degree: number): Float32Array {
    checkDegree('fitToScores', degree);
    const size = degree + 1;
    const series = exponentialSeries(degree);
    const least = Math.exp(this.#mean - this.#high);
    for (let m = 0; m < size; m++) series[m] *= least;
    const p = compose(series, this.#mean, 1);
    // The remainder of the series is at most (2 half)^size / size! of exp(high).
    const remainder = (SERIES[degree] * (2 * this.#half) ** size) / size;
    if (remainder > FLOAT32_ROUNDING) {
      const correction = this.#correction(series);
      for (let m = 0; m < size; m++) p[m] += correction[m];
    }
    const most = Math.exp(this.#high);
    const coefficients = new Float32Array(size);
    for (let m = 0; m < size; m++) coefficients[m] = p[m] * most;
    return coefficients;
  }

  /** What is to be added to the Taylor polynomial about the mean, coefficients of s^m. */
  #correction(series: readonly number[]): number[] {
    const size = series.length;
    for (let m = this.#values.length; m < size; m++) this.#addDegree(m);
    // 1. Normal equations for p - taylor = sum_m a_m T_m(x)
    const rows: number[][] = [];
    let trace = 0;
    for (let a = 0; a < size; a++) {
      const row: number[] = [];
      for (let b = 0; b < size; b++) row.push(b <= a ? this.#products[a][b] : this.#products[b][a]);
      row.push(0);
      rows.push(row);
      trace += this.#products[a][a];
    }
    const [scores, weights, exponentials, mean] = [this.#scores, this.#weights, this.#exponentials, this.#mean];
    const [values, derivatives] = [this.#values, this.#derivatives];
    for (let n = 0; n < weights.length; n++) {
      const difference = scores[n] - mean;
      // The series' derivative lacks its last term.
      let slope = 0;
      let power = 1;
      for (let m = 0; m + 1 < size; m++, power *= difference) slope += series[m] * power;
      const toSlope = weights[n] * (exponentials[n] - slope);
      const toValue = toSlope - weights[n] * series[size - 1] * power;
      for (let a = 0; a < size; a++) rows[a][size] += values[a][n] * toValue + derivatives[a][n] * toSlope;
    }
    // 2. Regularise and solve
    for (let a = 0; a < size; a++) rows[a][a] += 1e-13 * trace;
    // 3. Back to powers of s
    return compose(fromChebyshev(solve(rows)), this.#middle, this.#half);
  }

  #addDegree(m: number): void {
    const [scores, weights, middle, half] = [this.#scores, this.#weights, this.#middle, this.#half];
    const value = new Float64Array(weights.length).fill(m === 0 ? 1 : 0);
    const derivative = new Float64Array(weights.length).fill(m === 1 ? 1 / half : 0);
    const factor = m === 1 ? 1 : 2;
    for (let n = 0; m > 0 && n < weights.length; n++) {
      const x = (scores[n] - middle) / half;
      value[n] = factor * x * this.#values[m - 1][n] - (m > 1 ? this.#values[m - 2][n] : 0);
      if (m === 1) continue;
      derivative[n] = 2 * (this.#values[m - 1][n] / half + x * this.#derivatives[m - 1][n]) - this.#derivatives[m - 2][n];
    }
    this.#values.push(value);
    this.#derivatives.push(derivative);
    const row: number[] = [];
    for (let a = 0; a <= m; a++) {
      const [otherValue, otherDerivative] = [this.#values[a], this.#derivatives[a]];
      let sum = 0;
      for (let n = 0; n < weights.length; n++) sum += weights[n] * (value[n] * otherValue[n] + derivative[n] * otherDerivative[n]);
      row.push(sum);
    }
    this.#products.push(row);
  }

  /** How well p, `derivative`: its derivative, fits: the root of the sum of squares of what it leaves of exp, over that of exp. */
  residual(p: ArrayLike<number>, derivative: boolean): number {
    const [scores, weights, exponentials] = [this.#scores, this.#weights, this.#exponentials];
    const scale = Math.exp(-this.#high);
    const of = zeros(derivative ? Math.max(p.length - 1, 1) : p.length);
    for (let m = 0; m < p.length; m++) {
      if (!derivative) of[m] = scale * p[m];
      else if (m > 0) of[m - 1] = scale * m * p[m];
    }
    let [left, all] = [0, 0];
    for (let n = 0; n < weights.length; n++) {
      const exponential = exponentials[n];
      let off = -exponential;
      let power = 1;
      for (let m = 0; m < of.length; m++, power *= scores[n]) off += of[m] * power;
      left += weights[n] * off * off;
      all += weights[n] * exponential * exponential;
    }
    return all > 0 ? Math.sqrt(left / all) : 0;
  }
}

/**
 * The same scores in fewer numbers: the mean of those in each of POINTS intervals of equal width, and how many they are. Moments
 * change by (width of an interval / standard deviation)^2 / 12, a thousandth or so, and fits take a tenth of the time.
 *
 * @returns null where one is not finite.
 */
export function condense(scores: ArrayLike<number>): { scores: Float64Array; weights: Float64Array } | null {
  let low = Infinity;
  let high = -Infinity;
  let nothing = 0; // or NaN
  for (let n = 0; n < scores.length; n++) {
    const s = scores[n];
    if (s < low) low = s;
    if (s > high) high = s;
    nothing += 0 * s;
  }
  if (nothing !== 0) return null;
  const sums = new Float64Array(POINTS);
  const counts = new Float64Array(POINTS);
  const factor = high > low ? (POINTS * (1 - 2 ** -40)) / (high - low) : 0;
  for (let n = 0; n < scores.length; n++) {
    const at = Math.floor((scores[n] - low) * factor);
    sums[at] += scores[n];
    counts[at]++;
  }
  let used = 0;
  for (let at = 0; at < POINTS; at++) {
    if (counts[at] === 0) continue;
    sums[used] = sums[at] / counts[at];
    counts[used++] = counts[at];
  }
  return { scores: sums.subarray(0, used), weights: counts.subarray(0, used) };
}

function checkDegree(name: string, degree: number): void {
  if (!Number.isInteger(degree) || degree < 0 || degree > MAX_DEGREE) {
    throw new RangeError(`${name}: degree must be an integer from 0 to ${MAX_DEGREE}, got ${degree}`);
  }
}

/** 1/m! for m = 0 .. MAX_DEGREE. */
const SERIES: readonly number[] = [1, 1, 2, 6, 24, 120, 720, 5040, 40320].map((factorial) => 1 / factorial);

/** The same for m = 0 .. degree. */
function exponentialSeries(degree: number): number[] {
  return SERIES.slice(0, degree + 1);
}

/**
 * The unrounded minimax polynomial, coefficients of s^m, by Remez exchange in x = s / radius: solve for p and the level E with
 * p(s_i) exp(-s_i) - 1 = -(-1)^i E on a reference of g + 2 points, then move the reference to the extrema of that error. The
 * error alternates on the reference, so between its points it has g + 1 zeros and g extrema, the roots of p' - p: the new
 * reference is these and the two ends. Converges quadratically (4 to 8 rounds).
 */
function remez(degree: number, radius: number): number[] {
  const size = degree + 1;
  const basis = zeros(size);
  let points = Array.from({ length: size + 1 }, (_, i) => -Math.cos((Math.PI * i) / size));
  let p: number[] = [];
  for (let round = 0; round < 30; round++) {
    const system = points.map((x, i) => {
      chebyshev(x, basis);
      const decay = Math.exp(-radius * x);
      return [...basis.map((t) => t * decay), i % 2 === 0 ? 1 : -1, 1];
    });
    const solution = solve(system);
    const level = Math.abs(solution[size]);
    p = fromChebyshev(solution.slice(0, size));
    const slope = p.map((c, m) => (m + 1 < size ? (m + 1) * p[m + 1] : 0) - radius * c);
    const extrema = [-1, ...signChanges(slope, -1, 1), 1];
    // Fewer than g + 2 extrema: rounding has taken over (a radius too large, or an error too small, for float64).
    if (extrema.length !== size + 1) break;
    const largest = Math.max(...extrema.map((x) => Math.abs(evaluate(p, x) * Math.exp(-radius * x) - 1)));
    if (largest <= level * (1 + 1e-4)) break;
    points = extrema;
  }
  return compose(p, 0, radius);
}

/** Engines make and read these in a fraction of the time of a typed array of a few numbers. */
function zeros(count: number): number[] {
  const all: number[] = [];
  for (let n = 0; n < count; n++) all.push(0);
  return all;
}

/** T_0(x) .. T_g(x) into `value`. */
function chebyshev(x: number, value: number[]): void {
  for (let m = 0; m < value.length; m++) value[m] = m === 0 ? 1 : m === 1 ? x : 2 * x * value[m - 1] - value[m - 2];
}

/** Coefficients of x^m of sum_m a_m T_m(x), by Clenshaw's recurrence on polynomials. */
function fromChebyshev(a: ArrayLike<number>): number[] {
  const size = a.length;
  let [current, next, afterNext] = [zeros(size), zeros(size), zeros(size)];
  for (let m = size - 1; m >= 0; m--) {
    const factor = m > 0 ? 2 : 1;
    for (let n = 0; n < size; n++) current[n] = (n > 0 ? factor * next[n - 1] : a[m]) - afterNext[n];
    [current, next, afterNext] = [afterNext, current, next];
  }
  return next;
}

/** Coefficients of s^m of p((s - middle) / half), by Horner's rule on polynomials. */
function compose(p: ArrayLike<number>, middle: number, half: number): number[] {
  const result = zeros(p.length);
  for (let m = p.length - 1; m >= 0; m--) {
    for (let n = p.length - 1; n >= 0; n--) result[n] = ((n > 0 ? result[n - 1] : 0) - middle * result[n]) / half;
    result[0] += p[m];
  }
  return result;
}

/**
 * The places in (low, high) where the polynomial sum_m p_m x^m changes sign, ascending. Between two neighbouring sign changes
 * of its derivative (found the same way) it is monotone, so it changes sign at most once there.
 */
function signChanges(p: readonly number[], low: number, high: number): number[] {
  if (p.length < 2) return [];
  const derivative = p.slice(1).map((c, m) => (m + 1) * c);
  const turns = [low, ...signChanges(derivative, low, high), high];
  const found: number[] = [];
  for (let n = 0; n + 1 < turns.length; n++) {
    let [a, b] = [turns[n], turns[n + 1]];
    const rising = evaluate(p, b) > 0;
    if (evaluate(p, a) > 0 === rising) continue;
    // Newton's method, and bisection where it would leave the bracket.
    let x = (a + b) / 2;
    for (let step = 0; step < 60; step++) {
      const y = evaluate(p, x);
      if (y > 0 === rising) b = x;
      else a = x;
      const newton = x - y / evaluate(derivative, x);
      const following = newton > a && newton < b ? newton : (a + b) / 2;
      const done = Math.abs(following - x) <= 4 * Number.EPSILON * Math.abs(x);
      x = following;
      if (done) break;
    }
    found.push(x);
  }
  return found;
}

/** Solves the linear system whose rows hold the matrix and, last, the right-hand side (overwritten). Partial pivoting. */
function solve(rows: number[][]): number[] {
  const size = rows.length;
  for (let n = 0; n < size; n++) {
    let pivot = n;
    for (let r = n + 1; r < size; r++) if (Math.abs(rows[r][n]) > Math.abs(rows[pivot][n])) pivot = r;
    [rows[n], rows[pivot]] = [rows[pivot], rows[n]];
    for (let r = n + 1; r < size; r++) {
      const factor = rows[r][n] / rows[n][n];
      for (let c = n; c <= size; c++) rows[r][c] -= factor * rows[n][c];
    }
  }
  const x = zeros(size);
  for (let n = size - 1; n >= 0; n--) {
    let sum = rows[n][size];
    for (let c = n + 1; c < size; c++) sum -= rows[n][c] * x[c];
    x[n] = sum / rows[n][n];
  }
  return x;
}
