// SPDX-License-Identifier: MIT
//
// What the options of a call mean, for the reference: where rows are, how they turn, which keys a query sees and what becomes
// of a score. Every answer is a function of one row or one pair.

import { readInteger, wrong } from './check.js';
import { rotaryFrequencies } from './scaling.js';
import type { ForwardArgs, Options, Positions, Rotary, RotateArgs } from './types.js';

/** Arrays of either precision; float32 values are widened exactly. */
export type Values = Float32Array | Float64Array;

export type ReferenceRotary = Omit<Rotary, 'frequencies' | 'tables'> & {
  frequencies?: Values;
  tables?: { cos: Values; sin: Values };
};

/** Options whose arrays may be of either precision. */
type Widened<T> = Omit<T, 'q' | 'k' | 'v' | 'x' | 'rotary' | 'alibi' | 'bias' | 'mask' | 'sinks' | keyof WidenedMaps> & {
  rotary?: false | ReferenceRotary;
};
interface WidenedMaps {
  relativePositions?: Values;
  relative?: { support: Uint32Array; weights: Values };
}
interface WidenedScores {
  alibi?: Values;
  bias?: Values;
  mask?: Values | Uint8Array;
  sinks?: Values;
}

export type ReferenceForwardArgs = Widened<ForwardArgs> & WidenedMaps & WidenedScores & { q: Values; k: Values; v: Values };
export type ReferenceRotateArgs = Widened<RotateArgs> & { x: Values };

/** Added to a score, this and less forbids the pair. */
const FORBIDDEN = -3.4657e29;

/** A query and a key: batch, query head, position in their sequences. */
export interface Pair {
  batch: number;
  head: number;
  i: number;
  j: number;
}

/** What is done to a vector: R, its transpose, its inverse. They differ by a factor where R is not only a rotation. */
export type Direction = 'forward' | 'transpose' | 'inverse';

/** The sizes with their defaults, and scale. */
export function readSizes(name: string, args: Pick<Options, 'shape' | 'scale'>) {
  if (typeof args?.shape !== 'object') throw wrong(name, 'shape', 'an object', args?.shape, false);
  const { batch = 1, heads, kvHeads = heads, queryLength, keyLength = queryLength, headDim, valueDim = headDim } = args.shape;
  const sizes = { batch, heads, kvHeads, queryLength, keyLength, headDim, valueDim };
  for (const [size, value] of Object.entries(sizes)) readInteger(name, `shape.${size}`, value, 1, 2 ** 31 - 1);
  if (heads % kvHeads !== 0) throw new RangeError(`${name}: heads = ${heads} is not a multiple of kvHeads = ${kvHeads}`);
  return { ...sizes, scale: args.scale ?? 1 / Math.sqrt(headDim) };
}
export type Sizes = ReturnType<typeof readSizes>;

// --- Where rows are ---------------------------------------------------------------------------------------------------

/** Arrays apart into the rows [batch][heads][length] whatever the layout, and together again. */
export function readLayout(name: string, { batch }: Sizes, { layout = 'bhnd' }: Pick<Options, 'layout'>) {
  /** The row of [batch][length][heads] that is row r of [batch][heads][length]. */
  const swap = (r: number, heads: number, length: number) => {
    const [head, n] = [Math.floor(r / length), r % length];
    return (Math.floor(head / heads) * length + n) * heads + (head % heads);
  };
  const place = (r: number, heads: number, length: number) => (layout === 'bhnd' ? r : swap(r, heads, length));

  const split = (what: string, x: Values, heads: number, length: number, width: number): Float64Array[] => {
    const rows = batch * heads * length;
    checkLength(name, what, x, [rows * width]);
    const at = (r: number) => place(r, heads, length) * width;
    return Array.from({ length: rows }, (_, r) => Float64Array.from(x.subarray(at(r), at(r) + width)));
  };
  const join = (rows: Float64Array[], heads: number, length: number): Float64Array => {
    const width = rows[0].length;
    const x = new Float64Array(rows.length * width);
    rows.forEach((row, r) => x.set(row, place(r, heads, length) * width));
    return x;
  };
  return { split, join };
}

// --- How they turn ----------------------------------------------------------------------------------------------------

/** Turns row r, [batch][heads][length], of the queries, or of the keys (when there are any). */
export function readRotation(
  name: string,
  { batch, heads, kvHeads, queryLength, keyLength, headDim }: Sizes,
  { rotary = {}, queryOffset = 0 }: { rotary?: false | ReferenceRotary; queryOffset?: number },
  hasKeys: boolean,
) {
  const given: ReferenceRotary = rotary === false ? { dim: 0 } : rotary;
  const positionsOf = (positions: Positions | undefined, heads: number, length: number, first: number) => {
    if (positions) checkLength(name, 'positions', positions, [length, batch * length]);
    return Array.from({ length: batch * heads * length }, (_, r) => {
      const [batch, n] = [Math.floor(r / length / heads), r % length];
      return positions ? positions[positions.length > length ? batch * length + n : n] : first + n;
    });
  };
  const queries = positionsOf(given.queryPositions, heads, queryLength, queryOffset);
  const keys = hasKeys ? positionsOf(given.keyPositions, kvHeads, keyLength, 0) : [];

  const { base, dim = headDim, interleaved = false, scaling, tables } = given;
  if (dim % 2 !== 0 || dim > headDim) throw new RangeError(`${name}: rotary.dim = ${dim} is odd or above ${headDim}`);
  const length = Math.max(1, queries.concat(keys).reduce((a, b) => Math.max(a, b)) + 1);
  const computed = rotaryFrequencies({ dim, ...(given.frequencies || tables ? {} : { base, scaling, length }) });
  const frequencies = given.frequencies ?? computed.frequencies;

  /** (x1, x2) -> (x1 cos a - x2 sin a, x1 sin a + x2 cos a) with a = position * frequency, times the attention factor. */
  const turn = (x: Float64Array, position: number, direction: Direction): Float64Array => {
    const factor = direction === 'inverse' ? 1 / computed.attentionFactor : computed.attentionFactor;
    const sign = direction === 'forward' ? 1 : -1;
    const y = Float64Array.from(x);
    for (let p = 0; p < dim / 2; p++) {
      const entry = (position * dim) / 2 + p;
      const cos = factor * (tables ? tables.cos[entry] : Math.cos(position * frequencies[p]));
      const sin = factor * (tables ? tables.sin[entry] : Math.sin(position * frequencies[p])) * sign;
      const [first, second] = interleaved ? [2 * p, 2 * p + 1] : [p, p + dim / 2];
      y[first] = x[first] * cos - x[second] * sin;
      y[second] = x[first] * sin + x[second] * cos;
    }
    return y;
  };
  return {
    turn,
    turnQuery: (x: Float64Array, r: number, direction: Direction) => turn(x, queries[r], direction),
    turnKey: (x: Float64Array, r: number, direction: Direction) => turn(x, keys[r], direction),
  };
}

// --- What depends on i - j ---------------------------------------------------------------------------------------------

/**
 * Scores of rows are scale q_i W_{i-j} k_j^T with W = 1 for rotated rows, a rotation for relativePositions (`turn` of
 * readRotation), or the given W. Rows that a map takes in place of rotated ones are as they come.
 */
export function readMap(
  name: string,
  { queryLength, keyLength, headDim }: Sizes,
  { relativePositions, relative, rotary }: WidenedMaps & { rotary?: false | ReferenceRotary },
  turn: ReturnType<typeof readRotation>['turn'],
) {
  const diagonals = queryLength + keyLength - 1;
  const diagonal = ({ i, j }: Pair): number => i - j + keyLength - 1;
  if (relativePositions) {
    if (relative || rotary === false) throw new RangeError(`${name}: relativePositions stands without relative and rotary: false`);
    checkLength(name, 'relativePositions', relativePositions, [diagonals]);
    // The query is turned by the difference of positions and the key by nothing; both take the attention factor.
    const turned = (x: Float64Array, pair: Pair, direction: Direction) =>
      turn(turn(x, relativePositions[diagonal(pair)], direction), 0, direction);
    return {
      ofQuery: (q: Float64Array, pair: Pair) => turned(q, pair, 'forward'),
      ofKey: (k: Float64Array, pair: Pair) => turned(k, pair, 'transpose'),
    };
  }
  if (!relative) return null;
  if (rotary) throw new RangeError(`${name}: relative stands without rotary`);
  const { support, weights } = relative;
  const places = support.length / 2;
  checkLength(name, 'relative.weights', weights, [places * diagonals]);
  if (support.some((dimension) => dimension >= headDim)) throw new RangeError(`${name}: relative.support reaches headDim = ${headDim}`);
  const multiply = (x: Float64Array, pair: Pair, transposed: boolean) => {
    const y = new Float64Array(headDim);
    for (let n = 0; n < places; n++) {
      const [a, b] = [support[2 * n], support[2 * n + 1]];
      y[transposed ? a : b] += weights[n * diagonals + diagonal(pair)] * x[transposed ? b : a];
    }
    return y;
  };
  return {
    /** q W_t */
    ofQuery: (q: Float64Array, pair: Pair) => multiply(q, pair, false),
    /** k W_t^T */
    ofKey: (k: Float64Array, pair: Pair) => multiply(k, pair, true),
    /** Adds dT q_a k_b to the gradient of every entry of W_t. */
    addTo: (dWeights: Float64Array, dT: number, q: Float64Array, k: Float64Array, pair: Pair) => {
      for (let n = 0; n < places; n++) dWeights[n * diagonals + diagonal(pair)] += dT * q[support[2 * n]] * k[support[2 * n + 1]];
    },
  };
}

// --- What becomes of a score ------------------------------------------------------------------------------------------

export function readScores(name: string, sizes: Sizes, args: Omit<Widened<Options>, 'rotary'> & WidenedScores) {
  const { batch, heads, queryLength, keyLength } = sizes;
  const { causal = false, queryOffset = 0, window: [left, right] = [-1, -1], softcap, alibi, bias, mask, sinks } = args;
  const segments = Array.from(args.segments ?? [0]);
  const diagonals = queryLength + keyLength - 1;
  const maskShape = args.maskShape ?? [1, 1, queryLength, keyLength];
  if (bias) checkLength(name, 'bias', bias, [diagonals, heads * diagonals]);
  if (alibi) checkLength(name, 'alibi', alibi, [heads]);
  if (mask) checkLength(name, 'mask', mask, [maskShape.reduce((a, b) => a * b)]);
  if (sinks) checkLength(name, 'sinks', sinks, [heads]);
  const fits = (size: number, n: number) => size === [batch, heads, queryLength, keyLength][n] || (size === 1 && n < 3);
  if (!maskShape.every(fits)) throw new RangeError(`${name}: maskShape = ${maskShape} does not fit the shape`);

  /** The number of the segment that a position is in: the last one that begins there or before. */
  const segmentOf = (position: number) => {
    let number = 0;
    while (number + 1 < segments.length && segments[number + 1] <= position) number++;
    return number;
  };

  /** The key is not after the query (causal), at most `left` before it, `right` after it, and in the same segment. */
  const seen = ({ i, j }: Pair): boolean => {
    const distance = i + queryOffset - j;
    const near = (!causal || distance >= 0) && (left < 0 || distance <= left) && (right < 0 || -distance <= right);
    return near && segmentOf(i + queryOffset) === segmentOf(j);
  };

  /** Where bias has a pair. */
  const diagonal = ({ head, i, j }: Pair): number => {
    const own = bias && bias.length > diagonals ? head : 0;
    return own * diagonals + i - j + keyLength - 1;
  };
  const maskAt = ({ batch, head, i, j }: Pair): number => {
    const at = [batch, head, i, j].map((index, n) => (maskShape[n] === 1 ? 0 : index));
    return mask![at.reduce((sum, index, n) => sum * maskShape[n] + index, 0)];
  };
  const distance = ({ i, j }: Pair): number => Math.abs(i + queryOffset - j);
  /** ALiBi, bias and mask together. */
  const added = (pair: Pair): number => {
    const masked = !mask ? 0 : mask.BYTES_PER_ELEMENT === 1 ? (maskAt(pair) === 0 ? -Infinity : 0) : maskAt(pair);
    return masked + (bias ? bias[diagonal(pair)] : 0) - (alibi ? alibi[pair.head] * distance(pair) : 0);
  };
  const allowed = (pair: Pair): boolean => seen(pair) && !(added(pair) < FORBIDDEN);

  /** The score of a product, and its derivative by the product. */
  const modify = (product: number, pair: Pair): { score: number; slope: number } => {
    const bent = softcap === undefined ? product : softcap * Math.tanh(product / softcap);
    const slope = softcap === undefined ? 1 : 1 - (bent / softcap) ** 2;
    return { score: bent + added(pair), slope };
  };
  const sinkOf = (head: number): number => (sinks ? sinks[head] : -Infinity);
  return { allowed, modify, diagonal, distance, sinkOf };
}

export function checkLength(name: string, what: string, x: ArrayLike<number>, lengths: readonly number[]): void {
  if (typeof x !== 'object' || x === null) throw wrong(name, what, 'an array of numbers', x, false);
  if (lengths.includes(x.length)) return;
  throw new RangeError(`${name}: ${what} has ${x.length} values, shape needs ${[...new Set(lengths)].join(' or ')}`);
}
