// SPDX-License-Identifier: MIT
//
// The options that make scores depend on i - j otherwise than by rotated rows (2505.11892): `relativePositions`, a rotation by
// any number f(i - j), and `relative`, matrices W_{i-j} with few entries.

import { readFinite, readFloats, readRecord, tagOf, wrong, type Given } from './check.js';
import type { Rotation } from './rotation.js';
import type { Shape } from './types.js';

/** All pairs of dimensions of the largest head (RA_MAX_SUPPORT). */
const MAX_SUPPORT = 2 ** 20;

/** The options; at most one of them is there. */
export interface Relative {
  /** [queryLength + keyLength - 1] */
  relativePositions: Float32Array | null;
  relative: {
    /** [entries][2] */
    support: Uint32Array;
    /** [entries][queryLength + keyLength - 1] */
    weights: Float32Array;
    /** A number that no |q W_t k| exceeds |q| |k| by, as a factor; not finite where a weight is not. */
    gain: number;
  } | null;
}

type Sizes = Required<Shape>;

/** Checks the options beside `rotary`. */
export function readRelative(name: string, given: Given, sizes: Sizes, rotation: Rotation): Relative {
  const [positions, relative] = [given['relativePositions'], given['relative']];
  if (positions !== undefined && relative !== undefined) {
    throw new TypeError(`${name}: relativePositions and relative are two ways to say it; give one of them`);
  }
  return {
    relativePositions: positions === undefined ? null : readPositions(name, positions, sizes, rotation),
    relative: relative === undefined ? null : readMatrices(name, relative, sizes),
  };
}

/** `rotary` as it is to be read: with `relative` nothing else rotates. */
export function rotaryBeside(name: string, given: Given): unknown {
  const rotary = given['rotary'];
  if (given['relative'] === undefined || rotary === false) return rotary;
  if (rotary === undefined) return false;
  throw new TypeError(`${name}: relative takes the place of the rotation; rotary must be false or absent`);
}

/**
 * Multiply-adds of a pair (query, key) for its score, for its share of the gradients of q and k, and of the weights; null without
 * a relative map. Grouped by the dimension of q, or of k, entries cost one each and groups one each.
 */
export function productsOfPair(
  g: Relative & { headDim: number; rotaryDim: number },
): { score: number; gradients: number; weights: number } | null {
  if (g.relativePositions) {
    const score = g.headDim + g.headDim + g.rotaryDim;
    return { score, gradients: 2 * score, weights: 0 };
  }
  if (!g.relative) return null;
  const { support } = g.relative;
  const entries = support.length / 2;
  const groups = (side: number) => new Set(support.filter((_, n) => n % 2 === side)).size;
  return { score: entries + groups(0), gradients: 2 * entries + groups(0) + groups(1), weights: entries };
}

function readPositions(name: string, value: unknown, { queryLength, keyLength }: Sizes, rotation: Rotation): Float32Array {
  const option = 'relativePositions';
  const needs = 'queryLength + keyLength - 1';
  const positions = readFinite(name, option, readFloats(name, option, value, queryLength + keyLength - 1, needs));
  if (rotation.rotaryDim === 0) throw new RangeError(`${name}: ${option} needs a rotary.dim above 0, got 0`);
  for (const other of ['tables', 'queryPositions', 'keyPositions'] as const) {
    if (rotation[other]) throw new TypeError(`${name}: ${option} and rotary.${other} are both given; give one of them`);
  }
  return positions;
}

function readMatrices(name: string, value: unknown, sizes: Sizes): NonNullable<Relative['relative']> {
  const given = readRecord(name, 'relative', value, ['support', 'weights']);
  const support = given['support'] as Uint32Array;
  if (tagOf(support) !== 'Uint32Array') throw wrong(name, 'relative.support', 'a Uint32Array', support, false);
  const entries = support.length / 2;
  if (!Number.isInteger(entries) || entries < 1 || entries > MAX_SUPPORT) {
    throw new RangeError(`${name}: relative.support must be 1 to ${MAX_SUPPORT} pairs of dimensions, got ${support.length} values`);
  }
  const outside = support.findIndex((dimension) => dimension >= sizes.headDim);
  if (outside >= 0) {
    throw wrong(name, `relative.support[${outside}]`, `below headDim, ${sizes.headDim}`, support[outside], true);
  }
  const diagonals = sizes.queryLength + sizes.keyLength - 1;
  const needs = 'support of that size with queryLength + keyLength - 1';
  const weights = readFloats(name, 'relative.weights', given['weights'], entries * diagonals, needs);
  return { support, weights, gain: largestNorm(support, weights, sizes.headDim) };
}

/** The same gain of the matrix whose entries are the largest of |W_t|, over all t: of sums of products with their signs left out. */
export function entriesGain({ support, weights }: NonNullable<Relative['relative']>, headDim: number): number {
  const [entries, diagonals] = [support.length / 2, (2 * weights.length) / support.length];
  const largest = Float32Array.from({ length: entries }, (_, n) =>
    weights.subarray(n * diagonals, (n + 1) * diagonals).reduce((most, x) => Math.max(most, Math.abs(x)), 0),
  );
  return largestNorm(support, largest, headDim);
}

/** max over t of (largest row sum of |W_t|)^(1/2) (largest column sum)^(1/2), which bounds the largest singular value. */
function largestNorm(support: Uint32Array, weights: Float32Array, headDim: number): number {
  const entries = support.length / 2;
  const diagonals = weights.length / entries;
  const [rows, columns] = [new Float64Array(headDim), new Float64Array(headDim)];
  let largest = 0;
  for (let t = 0; t < diagonals; t++) {
    rows.fill(0);
    columns.fill(0);
    for (let n = 0; n < entries; n++) {
      const size = Math.abs(weights[n * diagonals + t]);
      rows[support[2 * n]] += size;
      columns[support[2 * n + 1]] += size;
    }
    largest = Math.max(largest, Math.sqrt(rows.reduce((a, b) => Math.max(a, b)) * columns.reduce((a, b) => Math.max(a, b))));
  }
  return largest;
}
