// SPDX-License-Identifier: MIT
//
// Softmax attention with rotary position embedding (RoPE), forward and backward, in float64: naive, short, obviously
// right. The yardstick of every test and a text to read before the kernels. O(Nq Nk (D + Dv)) time per head.
//
//   s_ij   = scale (R_{i+queryOffset} q_i) . (R_j k_j)        on the allowed pairs (i, j)
//   P_ij   = exp(s_ij) / sum_j exp(s_ij)
//   out_i  = sum_j P_ij v_j             lse_i = log sum_j exp(s_ij)
//
//   dP_ij  = dout_i . v_j               dS_ij = P_ij (dP_ij - sum_j P_ij dP_ij)
//   dv_j   = sum_i P_ij dout_i
//   dq_i   = R^T scale sum_j dS_ij (R k)_j
//   dk_j   = R^T scale sum_i dS_ij (R q)_i
//
// Papers: Su et al. 2021 (RoPE, arXiv 2104.09864); the names of the chain in Alman, Song (arXiv 2412.17316v3) are
// s = P, l = dout, beta = dP, gamma = dS.

import { rotaryFrequencies } from './scaling.js';
import type { ForwardArgs, Options, Positions, Rotary, RotateArgs } from './types.js';

/** Arrays of either precision; float32 values are widened exactly. */
export type Values = Float32Array | Float64Array;

type ReferenceRotary = Omit<Rotary, 'frequencies' | 'tables'> & {
  frequencies?: Values;
  tables?: { cos: Values; sin: Values };
};
type Widened<T> = Omit<T, 'q' | 'k' | 'v' | 'x' | 'rotary'> & { rotary?: false | ReferenceRotary };

export type ReferenceForwardArgs = Widened<ForwardArgs> & { q: Values; k: Values; v: Values };
export type ReferenceBackwardArgs = ReferenceForwardArgs & { dOutput: Values; output?: Values; lse?: Values };
export type ReferenceRotateArgs = Widened<RotateArgs> & { x: Values };

export interface ReferenceForward {
  /** [batch, heads, queryLength, valueDim] */
  output: Float64Array;
  /** [batch, heads, queryLength]; -Infinity where nothing is allowed. */
  lse: Float64Array;
}

export interface ReferenceBackward {
  /** The shapes of q, k and v. */
  dq: Float64Array;
  dk: Float64Array;
  dv: Float64Array;
}

/** Every default filled in. */
function settle(name: string, args: Widened<Options>, hasKeys = true) {
  for (const option of ['bias', 'relativePositions', 'relative'] as const) {
    if (args[option] !== undefined) throw new RangeError(`${name}: option ${option} is not supported by the reference`);
  }
  const { batch = 1, heads, kvHeads = heads, queryLength, headDim } = args.shape;
  const { keyLength = queryLength, valueDim = headDim } = args.shape;
  const { scale = 1 / Math.sqrt(headDim), causal = false, queryOffset = 0, window: [left, right] = [-1, -1] } = args;
  const segments = Array.from(args.segments ?? [0]);
  if (heads % kvHeads !== 0) throw new RangeError(`${name}: heads = ${heads} is not a multiple of kvHeads = ${kvHeads}`);

  /** The number of the segment that a position is in: the last one that begins there or before. */
  const segmentOf = (position: number) => Math.max(segments.filter((start) => start <= position).length, 1);

  /** Pairs that take part: the key is not after the query (causal), at most `left` before it, `right` after it. */
  const allowed = (i: number, j: number): boolean => {
    const distance = i + queryOffset - j;
    const near = (!causal || distance >= 0) && (left < 0 || distance <= left) && (right < 0 || -distance <= right);
    return near && segmentOf(i + queryOffset) === segmentOf(j);
  };
  const rotary: ReferenceRotary = args.rotary === false ? { dim: 0 } : (args.rotary ?? {});
  const positionsOf = (given: Positions | undefined, heads: number, length: number, first: number) => (r: number) => {
    const [batch, n] = [Math.floor(r / length / heads), r % length];
    return given ? given[given.length > length ? batch * length + n : n] : first + n;
  };
  const queryPosition = positionsOf(rotary.queryPositions, heads, queryLength, queryOffset);
  const keyPosition = positionsOf(rotary.keyPositions, kvHeads, keyLength, 0);
  const largest = (position: (r: number) => number, rows: number) =>
    Array.from({ length: rows }, (_, r) => position(r)).reduce((a, b) => Math.max(a, b));
  const queryEnd = largest(queryPosition, batch * heads * queryLength) + 1;
  const keyEnd = hasKeys ? largest(keyPosition, batch * kvHeads * keyLength) + 1 : 1;
  const rotation = rotationOf(name, rotary, headDim, Math.max(queryEnd, keyEnd, 1));
  const { layout = 'bhnd' } = args;
  /** The rows of x, [batch][heads][length][width] whatever the layout. */
  const split = (what: string, x: Values, heads: number, length: number, width: number): Float64Array[] => {
    const rows = batch * heads * length;
    if (x.length !== rows * width) throw new RangeError(`${name}: ${what} has ${x.length} values, shape needs ${rows * width}`);
    const at = (r: number) => (layout === 'bhnd' ? r : placeOf(r, heads, length)) * width;
    return Array.from({ length: rows }, (_, r) => Float64Array.from(x.subarray(at(r), at(r) + width)));
  };
  /** Undoes `split`. */
  const join = (rows: Float64Array[], heads: number, length: number): Float64Array => {
    const width = rows[0]?.length ?? 0;
    const x = new Float64Array(rows.length * width);
    rows.forEach((row, r) => x.set(row, (layout === 'bhnd' ? r : placeOf(r, heads, length)) * width));
    return x;
  };
  const positions = { queryPosition, keyPosition };
  return { heads, kvHeads, queryLength, keyLength, headDim, valueDim, scale, allowed, rotation, ...positions, split, join };
}

/** The row of [batch][length][heads] that is row r of [batch][heads][length]. */
function placeOf(r: number, heads: number, length: number): number {
  const [head, n] = [Math.floor(r / length), r % length];
  return (Math.floor(head / heads) * length + n) * heads + (head % heads);
}

/** What is done to a vector: R, its transpose, its inverse. They differ by a factor where R is not only a rotation. */
type Direction = 'forward' | 'transpose' | 'inverse';
type Rotation = (x: Float64Array, position: number, direction: Direction) => Float64Array;

/** @param length of the sequence, which some scalings go by. */
function rotationOf(name: string, rotary: ReferenceRotary, headDim: number, length: number): Rotation {
  const { base, dim = headDim, interleaved = false, frequencies, scaling, tables } = rotary;
  if (dim % 2 !== 0 || dim > headDim) throw new RangeError(`${name}: rotary.dim = ${dim} is odd or above ${headDim}`);
  const given = frequencies ?? tables;
  const { frequencies: angles, attentionFactor } = rotaryFrequencies({ dim, ...(given ? {} : { base, scaling, length }) });
  return (x, position, direction) => {
    const factor = direction === 'inverse' ? 1 / attentionFactor : attentionFactor;
    const sign = direction === 'forward' ? 1 : -1;
    const y = Float64Array.from(x);
    for (let p = 0; p < dim / 2; p++) {
      const [entry, angle] = [(position * dim) / 2 + p, position * (frequencies ?? angles)[p]];
      const [c, s] = tables ? [tables.cos[entry], tables.sin[entry]] : [Math.cos(angle), Math.sin(angle)];
      const [first, second] = interleaved ? [2 * p, 2 * p + 1] : [p, p + dim / 2];
      y[first] = factor * (x[first] * c - x[second] * sign * s);
      y[second] = factor * (x[first] * sign * s + x[second] * c);
    }
    return y;
  };
}

function dot(x: Float64Array, y: Float64Array): number {
  let sum = 0;
  for (let d = 0; d < x.length; d++) sum += x[d] * y[d];
  return sum;
}

/** y += a x */
function accumulate(y: Float64Array, a: number, x: Float64Array): void {
  for (let d = 0; d < y.length; d++) y[d] += a * x[d];
}

/** Rows of q and k, rotated, rows of v, and the softmax of every query row in turn. */
function prepare(name: string, args: ReferenceForwardArgs) {
  const setting = settle(name, args);
  const { heads, kvHeads, queryLength, keyLength, headDim, valueDim, scale, allowed, rotation, split } = setting;
  const q = split('q', args.q, heads, queryLength, headDim);
  const k = split('k', args.k, kvHeads, keyLength, headDim);
  const v = split('v', args.v, kvHeads, keyLength, valueDim);
  const rotatedQ = q.map((row, r) => rotation(row, setting.queryPosition(r), 'forward'));
  const rotatedK = k.map((row, r) => rotation(row, setting.keyPosition(r), 'forward'));

  /** P of flat query row r as pairs (flat key row, weight), and log of the row's sum; subtracts the largest score first. */
  const softmax = (r: number) => {
    const i = r % queryLength;
    const head = Math.floor(r / queryLength);
    const keyHead = Math.floor(head / heads) * kvHeads + Math.floor(((head % heads) * kvHeads) / heads);
    const keys: number[] = [];
    for (let j = 0; j < keyLength; j++) if (allowed(i, j)) keys.push(keyHead * keyLength + j);
    const scores = keys.map((key) => scale * dot(rotatedQ[r], rotatedK[key]));
    const largest = scores.reduce((a, b) => Math.max(a, b), -Infinity);
    const weights = scores.map((score) => Math.exp(score - largest));
    const sum = weights.reduce((a, b) => a + b, 0);
    return { pairs: keys.map((key, n) => [key, weights[n] / sum] as const), lse: largest + Math.log(sum) };
  };
  return { ...setting, rotatedQ, rotatedK, v, softmax };
}

/**
 * out_i = sum_j softmax_j(s_ij) v_j in float64, arguments as for `RopeAttention.forward`; q, k and v may be float64 too, and
 * `window` is honoured. Rows with nothing allowed are zeros with lse -Infinity. Cost O(Nq Nk (D + Dv)) per head.
 *
 * @throws RangeError for arrays whose size does not fit the shape, and for bias, relativePositions and relative.
 */
function forward(args: ReferenceForwardArgs): ReferenceForward {
  const { rotatedQ, v, heads, queryLength, valueDim, softmax, join } = prepare('reference.forward', args);
  const lse = new Float64Array(rotatedQ.length);
  const output = rotatedQ.map((_, r) => {
    const row = new Float64Array(valueDim);
    const { pairs, lse: lseOfRow } = softmax(r);
    for (const [key, weight] of pairs) accumulate(row, weight, v[key]);
    lse[r] = pairs.length > 0 ? lseOfRow : -Infinity;
    return row;
  });
  return { output: join(output, heads, queryLength), lse };
}

/**
 * The gradients of sum(output * dOutput) by q, k and v in float64, arguments as for `RopeAttention.backward` (output and lse
 * are not needed). dk and dv are summed over the query heads of their group. Cost O(Nq Nk (D + Dv)) per head.
 *
 * @throws RangeError as `forward` does.
 */
function backward(args: ReferenceBackwardArgs): ReferenceBackward {
  const { rotatedQ, rotatedK, v, softmax, ...setting } = prepare('reference.backward', args);
  const { heads, kvHeads, headDim, valueDim, queryLength, keyLength, scale, rotation, split, join } = setting;
  const dOutput = split('dOutput', args.dOutput, heads, queryLength, valueDim);
  const dq = rotatedQ.map(() => new Float64Array(headDim));
  const dk = rotatedK.map(() => new Float64Array(headDim));
  const dv = v.map(() => new Float64Array(valueDim));

  for (let r = 0; r < rotatedQ.length; r++) {
    const { pairs } = softmax(r);
    const dP = pairs.map(([key]) => dot(dOutput[r], v[key]));
    const delta = pairs.reduce((sum, [, weight], n) => sum + weight * dP[n], 0);
    pairs.forEach(([key, weight], n) => {
      const dS = weight * (dP[n] - delta);
      accumulate(dv[key], weight, dOutput[r]);
      accumulate(dq[r], scale * dS, rotatedK[key]);
      accumulate(dk[key], scale * dS, rotatedQ[r]);
    });
  }
  const turnedQ = dq.map((row, r) => rotation(row, setting.queryPosition(r), 'transpose'));
  const turnedK = dk.map((row, r) => rotation(row, setting.keyPosition(r), 'transpose'));
  return {
    dq: join(turnedQ, heads, queryLength),
    dk: join(turnedK, kvHeads, keyLength),
    dv: join(dv, kvHeads, keyLength),
  };
}

/**
 * R_{i+queryOffset} x_i, or its inverse, for every row of x, [batch, heads, queryLength, headDim], in float64:
 * (x1, x2) -> (x1 cos a - x2 sin a, x1 sin a + x2 cos a) with a = (i + queryOffset) base^(-2p/dim) for pair p.
 */
function rotate(args: ReferenceRotateArgs): Float64Array {
  const { heads, queryLength, headDim, queryPosition, rotation, split, join } = settle('reference.rotate', args, false);
  const rows = split('x', args.x, heads, queryLength, headDim);
  const turned = rows.map((row, r) => rotation(row, queryPosition(r), args.inverse ? 'inverse' : 'forward'));
  return join(turned, heads, queryLength);
}

/** Float64 attention, naive and slow: what the engines approximate. Nothing but plain loops; no WebAssembly. */
export const reference = { forward, backward, rotate };
