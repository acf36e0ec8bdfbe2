// SPDX-License-Identifier: MIT
//
// Singular values of a dense matrix in float64, without vectors: Householder reflections from both sides make it bidiagonal
// (Golub, Kahan 1965), then each value is bisected for. A bidiagonal matrix with entries d_1, e_1, d_2, .. has the positive
// eigenvalues of the symmetric tridiagonal matrix with a zero diagonal and d_1, e_1, d_2, .. beside it, and how many of these lie
// below a number is how many pivots of its elimination are negative (Sturm). O(rows columns min(rows, columns)); the error is a few roundings of the
// largest value.

/**
 * The min(rows, columns) singular values, descending.
 *
 * @param a [rows, columns], finite; only read.
 */
export function singularValues(a: Float64Array, rows: number, columns: number): Float64Array {
  if (rows < columns) return singularValues(transpose(a, rows, columns), columns, rows);
  const beside = bidiagonal(Float64Array.from(a), rows, columns);
  const bound = beside.reduce((most, x, n) => Math.max(most, Math.abs(x) + Math.abs(beside[n + 1] ?? 0)), 0);
  return Float64Array.from({ length: columns }, (_, n) => bisect(beside, bound, 2 * columns - n));
}

/** How many singular values exceed `tolerance` times the largest: the numerical rank. */
export function numericalRank(values: Float64Array, tolerance: number): number {
  return values.filter((value) => value > tolerance * values[0]).length;
}

function transpose(a: Float64Array, rows: number, columns: number): Float64Array {
  return a.map((_, n) => a[(n % rows) * columns + Math.floor(n / rows)]);
}

/** d_1, e_1, d_2, e_2, .. d_columns; overwrites a. */
function bidiagonal(a: Float64Array, rows: number, columns: number): Float64Array {
  const beside = new Float64Array(Math.max(0, 2 * columns - 1));
  const products = new Float64Array(columns);
  for (let n = 0; n < columns; n++) {
    // 1. From the left: column n below row n becomes one number. products = v^T A, A -= factor v products.
    const left = reflection(a, n * columns + n, columns, rows - n);
    beside[2 * n] = left.value;
    products.fill(0);
    for (let r = n; r < rows; r++) {
      const v = a[r * columns + n];
      for (let c = n + 1; c < columns; c++) products[c] += v * a[r * columns + c];
    }
    for (let r = n; r < rows; r++) {
      const v = left.factor * a[r * columns + n];
      for (let c = n + 1; c < columns; c++) a[r * columns + c] -= v * products[c];
    }
    // 2. From the right: row n beyond column n + 1.
    if (n + 1 === columns) break;
    const own = n * columns;
    const right = reflection(a, own + n + 1, 1, columns - n - 1);
    beside[2 * n + 1] = right.value;
    for (let r = n + 1; r < rows; r++) {
      const row = r * columns;
      let product = 0;
      for (let c = n + 1; c < columns; c++) product += a[row + c] * a[own + c];
      product *= right.factor;
      for (let c = n + 1; c < columns; c++) a[row + c] -= product * a[own + c];
    }
  }
  return beside;
}

/**
 * The reflection I - factor v v^T that takes x to (value, 0, 0, ..), x being `count` numbers from `first` on, `step` apart. v
 * takes the place of x.
 */
function reflection(a: Float64Array, first: number, step: number, count: number): { value: number; factor: number } {
  let norm = 0;
  for (let n = 0; n < count; n++) norm = Math.hypot(norm, a[first + n * step]);
  if (norm === 0) return { value: 0, factor: 0 };
  const value = a[first] > 0 ? -norm : norm; // v_0 = x_0 - value does not cancel
  for (let n = 0; n < count; n++) a[first + n * step] /= norm;
  a[first] -= value / norm;
  return { value, factor: 1 / Math.abs(a[first]) }; // |v|^2 = 2 |v_0| for x of length 1
}

/** The eigenvalue, number `index` from below (1 first), of the tridiagonal matrix with zero diagonal; between 0 and bound. */
function bisect(beside: Float64Array, bound: number, index: number): number {
  let [low, high] = [0, bound * (1 + 1e-12)];
  for (;;) {
    const middle = (low + high) / 2;
    if (middle <= low || middle >= high || high - low <= 1e-17 * bound) return middle;
    let below = 0;
    let pivot = -middle;
    for (let n = 0; ; n++) {
      if (pivot < 0) below++;
      if (n === beside.length) break;
      pivot = -middle - (beside[n] * beside[n]) / (pivot === 0 ? Number.MIN_VALUE : pivot);
    }
    if (below >= index) high = middle;
    else low = middle;
  }
}
