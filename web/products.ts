// SPDX-License-Identifier: MIT
//
// Dense matrix products of any length by the kernels of dense.c, in slices of tokens: what stands around attention in the
// training problem (training.ts). 2 rows inner columns operations; a megabyte of WebAssembly memory beside the weights.

import type { Kernel } from './kernel.js';

/** Numbers of the token arrays of one slice, about: it stays in cache. */
const SLICE = 2 ** 18;

/** Lanes of the kernels. */
const LANES = 8;

/** x w of tokens x [tokens, inner] and weights w [inner, columns]. Yields between slices. */
export function* project(
  kernel: Kernel,
  name: string,
  x: Float32Array,
  w: Float32Array,
  inner: number,
): Generator<undefined, Float32Array> {
  const [tokens, columns] = [x.length / inner, w.length / inner];
  const padded = widen(w, columns);
  const result = new Float32Array(tokens * columns);
  for (const [first, last] of slices(tokens, inner + columns)) {
    const sizes = { rows: last - first, inner, columns: padded.length / inner, transposed: false };
    const rows = kernel.multiply(name, x.subarray(first * inner, last * inner), padded, sizes);
    result.set(narrow(rows, columns, sizes.columns), first * columns);
    yield;
  }
  return result;
}

/** x^T y of tokens x [tokens, rows] and y [tokens, columns]: the gradient by weights. Slices are summed in float64. */
export function* correlate(
  kernel: Kernel,
  name: string,
  x: Float32Array,
  y: Float32Array,
  tokens: number,
): Generator<undefined, Float32Array> {
  const [rows, columns] = [x.length / tokens, y.length / tokens];
  const sums = new Float64Array(rows * columns);
  for (const [first, last] of slices(tokens, rows + columns)) {
    const padded = widen(y.subarray(first * columns, last * columns), columns);
    const sizes = { rows, inner: last - first, columns: padded.length / (last - first), transposed: true };
    const part = kernel.multiply(name, x.subarray(first * rows, last * rows), padded, sizes);
    narrow(part, columns, sizes.columns).forEach((value, n) => (sums[n] += value));
    yield;
  }
  return Float32Array.from(sums);
}

function* slices(tokens: number, width: number): Generator<[first: number, last: number]> {
  const step = Math.max(1, Math.floor(SLICE / width));
  for (let first = 0; first < tokens; first += step) yield [first, Math.min(tokens, first + step)];
}

/** The rows with zeros up to a whole number of vectors. */
function widen(x: Float32Array, columns: number): Float32Array {
  return inRowsOf(Math.ceil(columns / LANES) * LANES, x, columns);
}

/** And without. */
function narrow(x: Float32Array, columns: number, width: number): Float32Array {
  return inRowsOf(columns, x, width);
}

/** The same rows, cut or with zeros behind; `x` itself where nothing changes. */
function inRowsOf(width: number, x: Float32Array, before: number): Float32Array {
  if (width === before) return x;
  const y = new Float32Array((x.length / before) * width);
  for (let r = 0; r * before < x.length; r++) y.set(x.subarray(r * before, r * before + Math.min(width, before)), r * width);
  return y;
}
