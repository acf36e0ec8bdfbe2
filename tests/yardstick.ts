// SPDX-License-Identifier: MIT
//
// How accurate is accurate enough: attention in float32 as one writes it first, and from it the error that an exact engine is
// allowed: twice that of plain float32, three times for gradients.

import { reference, rotaryFrequencies } from '../dist/index.js';
import { UNIT, fullShape, inner, lengths, maxAbs, maxDifference, withLayout } from './support.js';
import type { Rotary } from '../dist/index.js';
import type { Problem } from './support.js';

/** The results of both passes. */
export const RESULTS = ['output', 'lse', 'dq', 'dk', 'dv'] as const;
export type ByResult<T> = Record<(typeof RESULTS)[number], T>;

export interface Yardstick {
  /** Float64 results. */
  exact: ByResult<Float64Array>;
  /** The largest error of an entry that an engine may have. */
  allowed: ByResult<number>;
}

/**
 * Small problems can be right by luck in plain float32 (one key: no error at all), so there is a floor: this many roundings,
 * 2^-24, of the largest sum of magnitudes that makes up an entry (`magnitudes`). A weight of the engine has about three: exp to
 * 9e-8 is one and a half, passing through powers of 2 two more, while plain float32 has half a rounding for its exp. Where the
 * floor decides, engines were seen to need 1.9 (output), 1.2 (lse), 0.7 (dq), 0.9 (dk) and 2.8 (dv).
 */
const FLOOR = 4;

export function yardstick(args: Problem): Yardstick {
  const exact = { ...reference.forward(args), ...reference.backward(args) };
  const straight = withLayout(args, 'bhnd');
  const ordered = straight === args ? exact : { ...reference.forward(straight), ...reference.backward(straight) };
  const plain = plainFloat32(straight);
  const terms = magnitudes(straight);
  const allow = (name: (typeof RESULTS)[number], ratio: number) =>
    Math.max(ratio * maxDifference(plain[name], ordered[name]), FLOOR * UNIT * terms[name]);
  const allowed = { output: allow('output', 2), lse: allow('lse', 2), dq: allow('dq', 3), dk: allow('dk', 3), dv: allow('dv', 3) };
  return { exact, allowed };
}

/** For flat query row r: the rows of the keys that the masks allow. */
function keysOf({ shape, causal, queryOffset = 0, window = [-1, -1], segments = [0] }: Problem, r: number): number[] {
  const { heads, kvHeads, queryLength, keyLength } = fullShape(shape);
  const head = Math.floor(r / queryLength);
  const keyHead = Math.floor(head / heads) * kvHeads + Math.floor(((head % heads) * kvHeads) / heads);
  const position = (r % queryLength) + queryOffset;
  const [left, right] = window.map((side) => (side < 0 ? Infinity : side));
  const segment = Math.max(Array.from(segments).filter((start) => start <= position).length, 1);
  const first = Math.max(segments[segment - 1], position - left, 0);
  const end = Math.min(segments[segment] ?? Infinity, position + (causal ? 0 : right) + 1, keyLength);
  return Array.from({ length: Math.max(end - first, 0) }, (_, n) => keyHead * keyLength + first + n);
}

const row = <T extends Float32Array | Float64Array>(x: T, r: number, width: number) => x.subarray(r * width, (r + 1) * width) as T;

/**
 * Both passes in float32, layout 'bhnd': every product and sum rounded, one running sum for each, a whole row of weights in memory, angles in
 * float64, exp and log rounded correctly.
 */
export function plainFloat32(args: Problem): ByResult<Float32Array> {
  const f = Math.fround;
  const shape = fullShape(args.shape);
  const { queryLength, keyLength, headDim, valueDim } = shape;
  const { queryOffset = 0, v, dOutput } = args;
  const scale = f(args.scale ?? 1 / Math.sqrt(headDim));

  const rotary: Rotary = args.rotary === false ? { dim: 0 } : (args.rotary ?? {});
  const { base, dim = headDim, interleaved = false, scaling, tables } = rotary;
  const angles = rotaryFrequencies({ dim, base, scaling });
  const frequencies = rotary.frequencies ?? angles.frequencies;
  const factor = f(angles.attentionFactor);
  /** Rows of the queries, or of the keys. */
  const rotate = (x: Float32Array, of: 'queries' | 'keys', sign: number) => {
    const [length, heads] = of === 'queries' ? [queryLength, shape.heads] : [keyLength, shape.kvHeads];
    const given = of === 'queries' ? rotary.queryPositions : rotary.keyPositions;
    const y = Float32Array.from(x);
    for (let r = 0; r < x.length / headDim; r++) {
      const [batch, n] = [Math.floor(r / length / heads), r % length];
      const counted = n + (of === 'queries' ? queryOffset : 0);
      const position = given ? given[given.length > length ? batch * length + n : n] : counted;
      for (let p = 0; p < dim / 2; p++) {
        const angle = position * frequencies[p];
        const entry = (position * dim) / 2 + p;
        const cos = f(factor * (tables ? tables.cos[entry] : f(Math.cos(angle))));
        const sin = sign * f(factor * (tables ? tables.sin[entry] : f(Math.sin(angle))));
        const a = r * headDim + (interleaved ? 2 * p : p);
        const b = interleaved ? a + 1 : a + dim / 2;
        y[a] = f(x[a] * cos) - f(x[b] * sin);
        y[b] = f(x[a] * sin) + f(x[b] * cos);
      }
    }
    return y;
  };
  const dot = (x: Float32Array, y: Float32Array) => {
    let sum = 0;
    for (let d = 0; d < x.length; d++) sum = f(sum + f(x[d] * y[d]));
    return sum;
  };
  const accumulate = (y: Float32Array, a: number, x: Float32Array) => {
    for (let d = 0; d < x.length; d++) y[d] = y[d] + f(a * x[d]);
  };

  const q = rotate(args.q, 'queries', 1);
  const k = rotate(args.k, 'keys', 1);
  const output = new Float32Array(lengths(args.shape).output);
  const lse = new Float32Array(q.length / headDim).fill(-Infinity);
  const [dq, dk, dv] = [q, k, v].map((x) => new Float32Array(x.length));
  const p = new Float32Array(keyLength);
  for (let r = 0; r < lse.length; r++) {
    const keys = keysOf(args, r);
    const [q_r, out_r, dout_r] = [row(q, r, headDim), row(output, r, valueDim), row(dOutput, r, valueDim)];
    if (keys.length === 0) continue;

    let largest = -Infinity;
    keys.forEach((key, j) => {
      p[j] = scale * dot(q_r, row(k, key, headDim));
      largest = Math.max(largest, p[j]);
    });
    let sum = 0;
    for (let j = 0; j < keys.length; j++) {
      p[j] = Math.exp(f(p[j] - largest));
      sum = f(sum + p[j]);
    }
    keys.forEach((key, j) => {
      p[j] = p[j] / sum;
      accumulate(out_r, p[j], row(v, key, valueDim));
    });
    lse[r] = largest + f(Math.log(sum));

    const delta = dot(dout_r, out_r);
    keys.forEach((key, j) => {
      const dP = dot(dout_r, row(v, key, valueDim));
      const dS = f(scale * f(p[j] * f(dP - delta)));
      accumulate(row(dv, key, valueDim), p[j], dout_r);
      accumulate(row(dq, r, headDim), dS, row(k, key, headDim));
      accumulate(row(dk, key, headDim), dS, q_r);
    });
  }
  return { output, lse, dq: rotate(dq, 'queries', -1), dk: rotate(dk, 'keys', -1), dv };
}

/** R q or R k, in float64. */
export function turned(args: Problem, name: 'q' | 'k'): Float64Array {
  const { batch, kvHeads, keyLength, headDim } = fullShape(args.shape);
  const rotary = args.rotary === false ? { dim: 0 } : { ...args.rotary };
  const { queryPositions, keyPositions } = rotary;
  if (name === 'q') {
    return reference.rotate({ ...args, x: args.q, rotary: { ...rotary, queryPositions, keyPositions: undefined } });
  }
  const shape = { batch, heads: kvHeads, queryLength: keyLength, headDim };
  const ofKeys = { ...rotary, queryPositions: keyPositions, keyPositions: undefined };
  return reference.rotate({ x: args.k, shape, rotary: ofKeys, layout: args.layout });
}

/**
 * For each result the largest sum of magnitudes of the terms of an entry: 2^-24 times it is what one rounding of every term
 * can add up to. A score whose products have magnitudes m in total is off by m roundings, and its weight by 1 + m of them:
 *
 *   a_ij = P_ij (1 + |scale| |q_i|.|k_j|)                     output  sum_j a_ij |v_j|     dv  sum_i a_ij |dout_i|
 *   b_ij = a_ij |scale| (|dout_i|.|v_j| + its mean by P_i)    dq      sum_j b_ij |k_j|     dk  sum_i b_ij |q_i|
 *
 * with |x| the vector of magnitudes, after rotation; and |lse_i| + sum_j a_ij for lse.
 */
export function magnitudes(args: Problem): ByResult<number> {
  const { headDim, valueDim } = fullShape(args.shape);
  const { scale = 1 / Math.sqrt(headDim) } = args;
  const [turnedQ, turnedK] = [turned(args, 'q'), turned(args, 'k')];
  const [q, k, v, dout] = [turnedQ, turnedK, args.v, args.dOutput].map((x) => Float64Array.from(x, Math.abs));
  const { lse } = reference.forward(args);

  const accumulate = (y: Float64Array, a: number, x: Float64Array) => {
    for (let d = 0; d < x.length; d++) y[d] += a * x[d];
  };
  const sums = { output: dout, dq: q, dk: k, dv: v, lse };
  const total = Object.fromEntries(RESULTS.map((name) => [name, new Float64Array(sums[name].length)])) as ByResult<Float64Array>;
  for (let r = 0; r < lse.length; r++) {
    const keys = keysOf(args, r);
    const signed = row(turnedQ, r, headDim);
    const [q_r, dout_r] = [row(q, r, headDim), row(dout, r, valueDim)];
    const score = (key: number) => scale * inner(signed, row(turnedK, key, headDim));
    const weights = keys.map((key) => Math.exp(score(key) - lse[r]));
    const dP = keys.map((key) => inner(dout_r, row(v, key, valueDim)));
    const mean = weights.reduce((sum, weight, j) => sum + weight * dP[j], 0);
    if (keys.length > 0) total.lse[r] = Math.abs(lse[r]);
    keys.forEach((key, j) => {
      const a = weights[j] * (1 + Math.abs(scale) * inner(q_r, row(k, key, headDim)));
      const b = a * Math.abs(scale) * (dP[j] + mean);
      total.lse[r] += a;
      accumulate(row(total.output, r, valueDim), a, row(v, key, valueDim));
      accumulate(row(total.dv, key, valueDim), a, dout_r);
      accumulate(row(total.dq, r, headDim), b, row(k, key, headDim));
      accumulate(row(total.dk, key, headDim), b, q_r);
    });
  }
  return Object.fromEntries(RESULTS.map((name) => [name, maxAbs(total[name])])) as ByResult<number>;
}
