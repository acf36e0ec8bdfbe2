// SPDX-License-Identifier: MIT
//
// Dense matrix products in plain JavaScript, float32 in and out, sums in float64: what stands around attention in the training
// problem (training.ts). 2 rows inner columns operations, about 4e9 a second.

/** Multiply-adds between two yields, about 20 ms. */
const SLICE = 2 ** 25;

/** Sizes of a product: [rows, inner] times [inner, columns]. */
interface Sizes {
  rows: number;
  inner: number;
  columns: number;
}

/** A B. Yields between slices of rows. */
export function* product(a: Float32Array, b: Float32Array, sizes: Sizes): Generator<undefined, Float32Array> {
  return yield* inSlices(a, sizes.inner, 1, b, sizes);
}

/** A^T B, of A [inner, rows]. Yields between slices of rows. */
export function* transposedProduct(a: Float32Array, b: Float32Array, sizes: Sizes): Generator<undefined, Float32Array> {
  return yield* inSlices(a, 1, sizes.rows, b, sizes);
}

/** Entry [r, n] of the left matrix is a[r * down + n * along]. */
function* inSlices(
  a: Float32Array,
  down: number,
  along: number,
  b: Float32Array,
  { rows, inner, columns }: Sizes,
): Generator<undefined, Float32Array> {
  const c = new Float32Array(rows * columns);
  const slice = Math.max(1, Math.floor(SLICE / (inner * columns)));
  for (let r = 0; r < rows; r += slice) {
    multiplyRows(a, down, along, b, inner, columns, c, r, Math.min(rows, r + slice));
    yield;
  }
  return c;
}

/** Rows first to last of C = A B. Four terms of a sum at once: a quarter of the reads and writes of the sums. */
function multiplyRows(
  a: Float32Array,
  down: number,
  along: number,
  b: Float32Array,
  inner: number,
  columns: number,
  c: Float32Array,
  first: number,
  last: number,
): void {
  const sums = new Float64Array(columns);
  for (let r = first; r < last; r++) {
    sums.fill(0);
    let n = 0;
    for (; n + 4 <= inner; n += 4) {
      const x = r * down + n * along;
      const [a0, a1, a2, a3] = [a[x], a[x + along], a[x + 2 * along], a[x + 3 * along]];
      const [b0, b1, b2, b3] = [n * columns, (n + 1) * columns, (n + 2) * columns, (n + 3) * columns];
      for (let k = 0; k < columns; k++) sums[k] += a0 * b[b0 + k] + a1 * b[b1 + k] + a2 * b[b2 + k] + a3 * b[b3 + k];
    }
    for (; n < inner; n++) {
      const x = a[r * down + n * along];
      for (let k = 0; k < columns; k++) sums[k] += x * b[n * columns + k];
    }
    c.set(sums, r * columns);
  }
}
