// SPDX-License-Identifier: MIT
//
// Softmax attention with rotary position embedding (RoPE), forward and backward, in float64: naive, short, obviously
// right. The yardstick of every test and a text to read before the kernels. O(Nq Nk (D + Dv)) time per head.
//
//   t_ij   = scale (R_{i+queryOffset} q_i) . (R_j k_j)        on the allowed pairs (i, j); scale q_i W_{i-j} k_j^T with `relative`,
//            where W is R_f(i-j) with `relativePositions`
//   s_ij   = softcap tanh(t_ij / softcap) - alibi |i-j| + bias_{i-j} + mask_ij        (t_ij without these options)
//   P_ij   = exp(s_ij) / (sum_j exp(s_ij) + exp(sink))
//   out_i  = sum_j P_ij v_j             lse_i = log (sum_j exp(s_ij) + exp(sink))
//
//   dP_ij  = dout_i . v_j               dS_ij = P_ij (dP_ij - sum_j P_ij dP_ij)
//   dv_j   = sum_i P_ij dout_i          dbias_t = sum_{i-j=t} dS_ij         dsink = -sum_i P_sink sum_j P_ij dP_ij
//   dT_ij  = dS_ij ds_ij/dt_ij
//   dq_i   = R^T scale sum_j dT_ij (R k)_j
//   dk_j   = R^T scale sum_i dT_ij (R q)_i
//   (dq_i  = scale sum_j dT_ij W k_j      dk_j = scale sum_i dT_ij W^T q_i     dW_t = scale sum_{i-j=t} dT_ij q_i k_j^T)
//
// Papers: Su et al. 2021 (RoPE, arXiv 2104.09864); the names of the chain in arXiv 2412.17316v3 are s = P, l = dout, beta = dP,
// gamma = dS, and gradient-parts.ts computes them as matrices.

import { checkLength, readLayout, readMap, readRotation, readScores, readSizes } from './reference-options.js';
import type { AttentionLossArgs } from './types.js';
import type { Pair, ReferenceForwardArgs, ReferenceRotateArgs, Values } from './reference-options.js';

export type { ReferenceForwardArgs, ReferenceRotateArgs, Values } from './reference-options.js';
export type ReferenceBackwardArgs = ReferenceForwardArgs & {
  dOutput: Values;
  output?: Values;
  lse?: Values;
  saved?: { output: Values; lse: Values };
};

export type ReferenceLossArgs = Omit<ReferenceForwardArgs, 'q' | 'k' | 'v' | 'shape' | 'layout'> &
  Pick<AttentionLossArgs, 'shape'> &
  Record<'a1' | 'a2' | 'a3' | 'x1' | 'x2' | 'y' | 'e', Values>;

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
  /** The shapes of bias, alibi, sinks and relative.weights; there when these are. */
  dBias?: Float64Array;
  dAlibi?: Float64Array;
  dSinks?: Float64Array;
  dWeights?: Float64Array;
}

export interface ReferenceLoss {
  loss: number;
  /** The shapes of x1, x2 and y. */
  dx1: Float64Array;
  dx2: Float64Array;
  dy: Float64Array;
  /** As of `backward`. */
  dBias?: Float64Array;
  dAlibi?: Float64Array;
  dSinks?: Float64Array;
  dWeights?: Float64Array;
  /** [batch, queryLength, heads * valueDim] */
  output: Float64Array;
}

export function dot(x: Float64Array, y: Float64Array): number {
  let sum = 0;
  for (let d = 0; d < x.length; d++) sum += x[d] * y[d];
  return sum;
}

/** y += a x */
export function accumulate(y: Float64Array, a: number, x: Float64Array): void {
  for (let d = 0; d < y.length; d++) y[d] += a * x[d];
}

/** Rows of q and k, rotated, rows of v, and the softmax of every query row in turn. */
export function prepare(name: string, args: ReferenceForwardArgs) {
  const sizes = readSizes(name, args);
  const { heads, kvHeads, queryLength, keyLength, headDim, valueDim, scale } = sizes;
  const { split, join } = readLayout(name, sizes, args);
  const { turn, turnQuery, turnKey } = readRotation(name, sizes, args.relative ? { rotary: false } : args, true);
  const map = readMap(name, sizes, args, turn);
  const turned = (rows: Float64Array[], turnRow: typeof turnQuery) => (map ? rows : rows.map((row, r) => turnRow(row, r, 'forward')));
  const { allowed, modify, diagonal, distance, sinkOf } = readScores(name, sizes, args);
  const rotatedQ = turned(split('q', args.q, heads, queryLength, headDim), turnQuery);
  const rotatedK = turned(split('k', args.k, kvHeads, keyLength, headDim), turnKey);
  const v = split('v', args.v, kvHeads, keyLength, valueDim);

  /**
   * P of flat query row r for its keys (flat rows), the weight of its sink, and the log of the row's sum; subtracts the largest
   * score first.
   */
  const softmax = (r: number) => {
    const [row, i] = [Math.floor(r / queryLength), r % queryLength];
    const [batch, head] = [Math.floor(row / heads), row % heads];
    const keyHead = batch * kvHeads + Math.floor((head * kvHeads) / heads);
    const keys: { key: number; pair: Pair; weight: number; slope: number; diagonal: number; distance: number }[] = [];
    let largest = sinkOf(head);
    for (let j = 0; j < keyLength; j++) {
      const pair = { batch, head, i, j };
      if (!allowed(pair)) continue;
      const key = keyHead * keyLength + j;
      const query = map ? map.ofQuery(rotatedQ[r], pair) : rotatedQ[r];
      const { score, slope } = modify(scale * dot(query, rotatedK[key]), pair);
      keys.push({ key, pair, weight: score, slope, diagonal: diagonal(pair), distance: distance(pair) });
      largest = Math.max(largest, score);
    }
    if (largest === -Infinity) return { keys: [], sinkWeight: 0, head, lse: -Infinity };
    const sink = Math.exp(sinkOf(head) - largest);
    let sum = sink;
    for (const one of keys) sum += one.weight = Math.exp(one.weight - largest);
    for (const one of keys) one.weight /= sum;
    return { keys, sinkWeight: sink / sum, head, lse: largest + Math.log(sum) };
  };
  return { ...sizes, turnQuery, turnKey, map, join, split, rotatedQ, rotatedK, v, softmax };
}

/**
 * out_i = sum_j softmax_j(s_ij) v_j in float64, arguments as for `RopeAttention.forward`; all arrays but those of integers may
 * be float64 too. Rows with nothing allowed are zeros with lse -Infinity. Cost O(Nq Nk (D + Dv)) per head.
 *
 * @throws RangeError for arrays whose size does not fit the shape.
 */
function forward(args: ReferenceForwardArgs): ReferenceForward {
  const { rotatedQ, v, heads, queryLength, valueDim, softmax, join } = prepare('reference.forward', args);
  const lse = new Float64Array(rotatedQ.length);
  const output = rotatedQ.map((_, r) => {
    const row = new Float64Array(valueDim);
    const weights = softmax(r);
    for (const { key, weight } of weights.keys) accumulate(row, weight, v[key]);
    lse[r] = weights.lse;
    return row;
  });
  return { output: join(output, heads, queryLength), lse };
}

/**
 * The gradients of sum(output * dOutput) by q, k, v, bias, alibi, sinks and relative weights in float64, arguments as for `RopeAttention.backward`
 * (output and lse are not needed). dk and dv are summed over the query heads of their group. Cost O(Nq Nk (D + Dv)) per head.
 *
 * @throws RangeError as `forward` does.
 */
function backward(args: ReferenceBackwardArgs): ReferenceBackward {
  const { rotatedQ, rotatedK, v, softmax, turnQuery, turnKey, map, ...rest } = prepare('reference.backward', args);
  const { heads, kvHeads, headDim, valueDim, queryLength, keyLength, scale, split, join } = rest;
  const dOutput = split('dOutput', args.dOutput, heads, queryLength, valueDim);
  const dq = rotatedQ.map(() => new Float64Array(headDim));
  const dk = rotatedK.map(() => new Float64Array(headDim));
  const dv = v.map(() => new Float64Array(valueDim));
  const dBias = args.bias && new Float64Array(args.bias.length);
  const dAlibi = args.alibi && new Float64Array(args.alibi.length);
  const dSinks = args.sinks && new Float64Array(args.sinks.length);
  const dWeights = args.relative && new Float64Array(args.relative.weights.length);

  for (let r = 0; r < rotatedQ.length; r++) {
    const { keys, sinkWeight, head } = softmax(r);
    const dP = keys.map(({ key }) => dot(dOutput[r], v[key]));
    const delta = keys.reduce((sum, { weight }, n) => sum + weight * dP[n], 0);
    if (dSinks) dSinks[head] -= sinkWeight * delta;
    keys.forEach(({ key, pair, weight, slope, diagonal, distance }, n) => {
      const dS = weight * (dP[n] - delta);
      accumulate(dv[key], weight, dOutput[r]);
      if (dBias) dBias[diagonal] += dS;
      if (dAlibi) dAlibi[head] -= dS * distance;
      const [q, k, dT] = [rotatedQ[r], rotatedK[key], scale * dS * slope];
      accumulate(dq[r], dT, map ? map.ofKey(k, pair) : k);
      accumulate(dk[key], dT, map ? map.ofQuery(q, pair) : q);
      if (dWeights) map?.addTo?.(dWeights, dT, q, k, pair);
    });
  }
  const turnedQ = map ? dq : dq.map((row, r) => turnQuery(row, r, 'transpose'));
  const turnedK = map ? dk : dk.map((row, r) => turnKey(row, r, 'transpose'));
  return {
    dq: join(turnedQ, heads, queryLength),
    dk: join(turnedK, kvHeads, keyLength),
    dv: join(dv, kvHeads, keyLength),
    ...(dBias && { dBias }),
    ...(dAlibi && { dAlibi }),
    ...(dSinks && { dSinks }),
    ...(dWeights && { dWeights }),
  };
}

/**
 * R_{i+queryOffset} x_i, or its inverse, for every row of x, [batch, heads, queryLength, headDim], in float64:
 * (x1, x2) -> (x1 cos a - x2 sin a, x1 sin a + x2 cos a) with a = (i + queryOffset) base^(-2p/dim) for pair p. With tables the
 * inverse is the transpose.
 */
function rotate(args: ReferenceRotateArgs): Float64Array {
  const name = 'reference.rotate';
  const sizes = readSizes(name, args);
  const { heads, queryLength, headDim } = sizes;
  const { split, join } = readLayout(name, sizes, args);
  const { turnQuery } = readRotation(name, sizes, args, false);
  const rows = split('x', args.x, heads, queryLength, headDim);
  const turned = rows.map((row, r) => turnQuery(row, r, args.inverse ? 'inverse' : 'forward'));
  return join(turned, heads, queryLength);
}

/** A B, or A^T B where a is [inner, rows], with all sizes but `inner` from the arrays. */
export function multiply(a: Values, b: Values, inner: number, transposed = false): Float64Array {
  const [rows, columns] = [a.length / inner, b.length / inner];
  return Float64Array.from({ length: rows * columns }, (_, entry) => {
    const [r, c] = [Math.floor(entry / columns), entry % columns];
    let sum = 0;
    for (let n = 0; n < inner; n++) sum += (transposed ? a[n * rows + r] : a[r * inner + n]) * b[n * columns + c];
    return sum;
  });
}

/** The training problem as a call of `forward`: q = a1 x1, k = a2 x2, v = a3 y, whose rows hold all heads. */
export function prepareLoss(name: string, args: ReferenceLossArgs) {
  const { batch, heads, kvHeads, headDim, valueDim, ...lengths } = readSizes(name, args);
  const { a1, a2, a3, x1, x2, y, e, shape, ...options } = args;
  const { modelDim: width, ...rest } = shape;
  const modelDim = width ?? heads * headDim;
  const [queries, keys] = [batch * lengths.queryLength, batch * lengths.keyLength];
  checkLength(name, 'a1', a1, [queries * modelDim]);
  checkLength(name, 'a2', a2, [keys * modelDim]);
  checkLength(name, 'a3', a3, [keys * modelDim]);
  checkLength(name, 'x1', x1, [modelDim * heads * headDim]);
  checkLength(name, 'x2', x2, [modelDim * kvHeads * headDim]);
  checkLength(name, 'y', y, [modelDim * kvHeads * valueDim]);
  checkLength(name, 'e', e, [queries * heads * valueDim]);
  const [q, k, v] = [multiply(a1, x1, modelDim), multiply(a2, x2, modelDim), multiply(a3, y, modelDim)];
  return { call: { ...options, q, k, v, shape: rest, layout: 'bnhd' as const }, queries, keys };
}

/**
 * 1/2 |output - e|_F^2 for attention of q = a1 x1, k = a2 x2, v = a3 y, and its gradients by x1, x2, y in float64, arguments as for
 * `RopeAttention.attentionLoss`: dout = output - e, dx1 = a1^T dq, dx2 = a2^T dk, dy = a3^T dv.
 *
 * @throws RangeError as `forward` does.
 */
function attentionLoss(args: ReferenceLossArgs): ReferenceLoss {
  const { call, queries, keys } = prepareLoss('reference.attentionLoss', args);
  const { a1, a2, a3, e } = args;
  const { output } = forward(call);
  const residual = output.map((value, n) => value - e[n]);
  const { dq, dk, dv, ...others } = backward({ ...call, dOutput: residual });
  return {
    loss: dot(residual, residual) / 2,
    dx1: multiply(a1, dq, queries, true),
    dx2: multiply(a2, dk, keys, true),
    dy: multiply(a3, dv, keys, true),
    ...others,
    output,
  };
}

/** Float64 attention, naive and slow: what the engines approximate. Nothing but plain loops; no WebAssembly. */
export const reference = { forward, backward, rotate, attentionLoss };
