// SPDX-License-Identifier: MIT
//
// How accurate is accurate enough: attention in float32 as one writes it first, and from it the error that an exact engine is
// allowed: twice that of plain float32, three times for gradients.

import { reference, rotaryFrequencies } from '../dist/index.js';
import { UNIT, fullShape, inner, lengths, maxAbs, maxDifference, withLayout } from './support.js';
import type { Rotary } from '../dist/index.js';
import type { Floats, Problem } from './support.js';

/** The results of both passes. */
export const RESULTS = ['output', 'lse', 'dq', 'dk', 'dv'] as const;
/** Together with gradients that are there with their options. */
export type ByResult<T> = Record<(typeof RESULTS)[number], T> & { dBias?: T; dSinks?: T; dWeights?: T };

/** The names of the results of a problem. */
export function resultsOf({ bias, sinks, relative }: Problem): (keyof ByResult<unknown>)[] {
  const more = { dBias: bias, dSinks: sinks, dWeights: relative };
  return [...RESULTS, ...(['dBias', 'dSinks', 'dWeights'] as const).filter((name) => more[name])];
}

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
  const allowed = resultsOf(args).map((name) => {
    const ratio = name === 'output' || name === 'lse' ? 2 : 3;
    const error = ratio * maxDifference(plain[name]!, ordered[name]!);
    return [name, Math.max(error, FLOOR * UNIT * terms[name]!)];
  });
  return { exact, allowed: Object.fromEntries(allowed) };
}

/** What a pair of a query and a key is made of, besides their product. */
interface Pair {
  /** Flat row of the key. */
  key: number;
  /** Entry of bias, and of what goes by i - j and is the same for all heads. */
  diagonal: number;
  shared: number;
  bias: number;
  mask: number;
}

/** For flat query row r: its head, and the pairs that the masks allow. */
function pairsOf(args: Problem, r: number): { head: number; pairs: Pair[] } {
  const { shape, causal, queryOffset = 0, window = [-1, -1], segments = [0], bias, mask } = args;
  const { heads, kvHeads, queryLength, keyLength } = fullShape(shape);
  const [i, head, batch] = [r % queryLength, Math.floor(r / queryLength) % heads, Math.floor(r / queryLength / heads)];
  const keyHead = batch * kvHeads + Math.floor((head * kvHeads) / heads);
  const position = i + queryOffset;
  const [left, right] = window.map((side) => (side < 0 ? Infinity : side));
  const segment = Math.max(Array.from(segments).filter((start) => start <= position).length, 1);
  const first = Math.max(segments[segment - 1], position - left, 0);
  const end = Math.min(segments[segment] ?? Infinity, position + (causal ? 0 : right) + 1, keyLength);

  const [maskBatch, maskHeads, maskRows] = args.maskShape ?? [1, 1, queryLength];
  const maskRow = ((batch % maskBatch) * maskHeads + (head % maskHeads)) * maskRows + (i % maskRows);
  const pairs: Pair[] = [];
  for (let j = first; j < end; j++) {
    const own = bias && bias.length > queryLength + keyLength - 1 ? head : 0;
    const shared = i - j + keyLength - 1;
    const diagonal = own * (queryLength + keyLength - 1) + shared;
    const value = mask ? mask[maskRow * keyLength + j] : 0;
    const masked = mask?.BYTES_PER_ELEMENT === 1 ? (value === 0 ? -Infinity : 0) : value;
    if (masked < -3.4657e29) continue;
    pairs.push({ key: keyHead * keyLength + j, diagonal, shared, bias: bias ? bias[diagonal] : 0, mask: masked });
  }
  return { head, pairs };
}

const row = <T extends Float32Array | Float64Array>(x: T, r: number, width: number) => x.subarray(r * width, (r + 1) * width) as T;

/** One entry of the matrices W_t of a relative map: s = scale sum q[a] at(t) k[b], t counted from the first diagonal on. */
interface Entry {
  a: number;
  b: number;
  at: (t: number) => number;
}

/** The map's entries, those of a rotation by relativePositions too; null where rows are rotated. */
function entriesOf({ shape, rotary, relativePositions, relative }: Problem): Entry[] | null {
  const { queryLength, keyLength, headDim } = fullShape(shape);
  if (relative) {
    const { support, weights } = relative;
    const at = (n: number) => (t: number) => weights[n * (queryLength + keyLength - 1) + t];
    return Array.from({ length: support.length / 2 }, (_, n) => ({ a: support[2 * n], b: support[2 * n + 1], at: at(n) }));
  }
  if (!relativePositions) return null;
  const { base, dim = headDim, interleaved = false, scaling, frequencies } = { ...(rotary as Rotary) };
  const computed = rotaryFrequencies({ dim, base, scaling });
  const factor = computed.attentionFactor ** 2;
  const entries: Entry[] = [];
  for (let p = 0; p < dim / 2; p++) {
    const [first, second] = interleaved ? [2 * p, 2 * p + 1] : [p, p + dim / 2];
    const angles = Float64Array.from(relativePositions, (position) => position * (frequencies ?? computed.frequencies)[p]);
    const [cos, sin] = [Math.cos, Math.sin].map((of) => angles.map((angle) => factor * of(angle)));
    entries.push({ a: first, b: first, at: (t) => cos[t] }, { a: first, b: second, at: (t) => sin[t] });
    entries.push({ a: second, b: first, at: (t) => -sin[t] }, { a: second, b: second, at: (t) => cos[t] });
  }
  for (let d = dim; d < headDim; d++) entries.push({ a: d, b: d, at: () => 1 });
  return entries;
}

/** q W_t (side 'a'), or k W_t^T (side 'b'), each term and sum passed through `round`; x itself without a map. */
function mapped<T extends Floats>(entries: Entry[] | null, x: T, side: 'a' | 'b', t: number, round: (x: number) => number): T {
  if (!entries) return x;
  const y = x.map(() => 0) as T;
  for (const entry of entries) {
    const to = entry[side === 'a' ? 'b' : 'a'];
    y[to] = round(y[to] + round(round(entry.at(t)) * x[entry[side]]));
  }
  return y;
}

/**
 * Both passes in float32, layout 'bhnd': every product and sum rounded, one running sum for each, a whole row of weights in
 * memory, angles in float64, exp and log rounded correctly.
 */
export function plainFloat32(args: Problem): ByResult<Float32Array> {
  const f = Math.fround;
  const shape = fullShape(args.shape);
  const { queryLength, keyLength, headDim, valueDim } = shape;
  const { queryOffset = 0, v, dOutput, softcap: givenCap, bias, sinks } = args;
  const softcap = givenCap === undefined ? undefined : f(givenCap);
  const scale = f(args.scale ?? 1 / Math.sqrt(headDim));

  const entries = entriesOf(args);
  const rotary: Rotary = args.rotary === false ? { dim: 0 } : (args.rotary ?? {});
  const { base, dim = entries ? 0 : headDim, interleaved = false, scaling, tables } = rotary;
  const angles = rotaryFrequencies({ dim, base, scaling });
  const frequencies = rotary.frequencies ?? angles.frequencies;
  const factor = f(angles.attentionFactor);
  /** Rows of the queries, or of the keys. */
  const rotate = (x: Float32Array, of: 'queries' | 'keys', sign: number) => {
    if (entries) return Float32Array.from(x);
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
  const [p, slope] = [new Float32Array(keyLength), new Float32Array(keyLength)];
  const [dBias, dSinks, dWeights] = [bias, sinks, args.relative?.weights].map((x) => x && new Float32Array(x.length));
  for (let r = 0; r < lse.length; r++) {
    const { head, pairs } = pairsOf(args, r);
    const [q_r, out_r, dout_r] = [row(q, r, headDim), row(output, r, valueDim), row(dOutput, r, valueDim)];
    const sink = sinks ? sinks[head] : -Infinity;

    let largest = sink;
    pairs.forEach(({ key, shared, bias, mask }, j) => {
      p[j] = scale * dot(mapped(entries, q_r, 'a', shared, f), row(k, key, headDim));
      slope[j] = 1;
      if (softcap !== undefined) {
        const t = f(Math.tanh(f(p[j] / softcap)));
        p[j] = softcap * t;
        slope[j] = 1 - f(t * t);
      }
      p[j] = f(p[j] + bias) + mask;
      largest = Math.max(largest, p[j]);
    });
    if (largest === -Infinity) continue;
    const sinkWeight = f(Math.exp(f(sink - largest)));
    let sum = sinkWeight;
    for (let j = 0; j < pairs.length; j++) {
      p[j] = Math.exp(f(p[j] - largest));
      sum = f(sum + p[j]);
    }
    pairs.forEach(({ key }, j) => {
      p[j] = p[j] / sum;
      accumulate(out_r, p[j], row(v, key, valueDim));
    });
    lse[r] = largest + f(Math.log(sum));

    const delta = dot(dout_r, out_r);
    if (dSinks) dSinks[head] = dSinks[head] - f(f(sinkWeight / sum) * delta);
    pairs.forEach(({ key, diagonal, shared }, j) => {
      const dP = dot(dout_r, row(v, key, valueDim));
      const dS = f(p[j] * f(dP - delta));
      const dT = f(scale * f(dS * slope[j]));
      if (dBias) dBias[diagonal] = dBias[diagonal] + dS;
      accumulate(row(dv, key, valueDim), p[j], dout_r);
      const k_j = row(k, key, headDim);
      accumulate(row(dq, r, headDim), dT, mapped(entries, k_j, 'b', shared, f));
      accumulate(row(dk, key, headDim), dT, mapped(entries, q_r, 'a', shared, f));
      if (!dWeights) return;
      entries!.forEach(({ a, b }, n) => {
        const at = n * (queryLength + keyLength - 1) + shared;
        dWeights[at] = dWeights[at] + f(f(dT * q_r[a]) * k_j[b]);
      });
    });
  }
  return {
    output,
    lse,
    dq: rotate(dq, 'queries', -1),
    dk: rotate(dk, 'keys', -1),
    dv,
    ...(dBias && { dBias }),
    ...(dSinks && { dSinks }),
    ...(dWeights && { dWeights }),
  };
}

/** R q or R k, in float64; q and k themselves where a relative map takes the place of R. */
export function turned(args: Problem, name: 'q' | 'k'): Float64Array {
  if (entriesOf(args)) return Float64Array.from(args[name]);
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
 * with |x| the vector of magnitudes, after rotation (of a relative map, |q| |W| |k| in place of |q|.|k|, |W| |k| of |k|, and so on; and
 * sum b_ij |q_ia| |k_jb| for dWeights); and |lse_i| + sum_j a_ij for lse. Bias and mask add to the magnitude of a
 * score; softcap counts that of the result twice (tanh to 4e-7), and 2 for its slope, a difference from 1.
 */
export function magnitudes(args: Problem): ByResult<number> {
  const { headDim, valueDim } = fullShape(args.shape);
  const { scale = 1 / Math.sqrt(headDim), softcap, bias, sinks, relative } = args;
  const entries = entriesOf(args);
  const sizes = entries && entries.map(({ a, b, at }) => ({ a, b, at: (t: number) => Math.abs(at(t)) }));
  const same = (x: number) => x;
  const [turnedQ, turnedK] = [turned(args, 'q'), turned(args, 'k')];
  const [q, k, v, dout] = [turnedQ, turnedK, args.v, args.dOutput].map((x) => Float64Array.from(x, Math.abs));
  const { lse } = reference.forward(args);

  const accumulate = (y: Float64Array, a: number, x: Float64Array) => {
    for (let d = 0; d < x.length; d++) y[d] += a * x[d];
  };
  const of = (x?: Floats) => new Float64Array(x?.length ?? 0);
  const total = { output: of(dout), dq: of(q), dk: of(k), dv: of(v), lse: of(lse) };
  const more = { dBias: of(bias), dSinks: of(sinks), dWeights: of(relative?.weights) };
  for (let r = 0; r < lse.length; r++) {
    const { head, pairs } = pairsOf(args, r);
    const signed = row(turnedQ, r, headDim);
    const [q_r, dout_r] = [row(q, r, headDim), row(dout, r, valueDim)];
    const scores = pairs.map(({ key, shared, bias, mask }) => {
      const product = scale * inner(mapped(entries, signed, 'a', shared, same), row(turnedK, key, headDim));
      const size = Math.abs(scale) * inner(mapped(sizes, q_r, 'a', shared, same), row(k, key, headDim));
      const more = Math.abs(bias) + Math.abs(mask);
      if (softcap === undefined) return { weight: Math.exp(product + bias + mask - lse[r]), size: size + more, slope: 1 };
      const t = Math.tanh(product / softcap);
      const bent = softcap * t;
      const sizeOfBent = (1 - t * t) * size + 2 * Math.abs(bent);
      return { weight: Math.exp(bent + bias + mask - lse[r]), size: sizeOfBent + more, slope: 3 - t * t };
    });
    const dP = pairs.map(({ key }) => inner(dout_r, row(v, key, valueDim)));
    const mean = scores.reduce((sum, { weight }, j) => sum + weight * dP[j], 0);
    if (lse[r] !== -Infinity) total.lse[r] = Math.abs(lse[r]);
    if (sinks && lse[r] !== -Infinity) {
      const a = Math.exp(sinks[head] - lse[r]) * (1 + Math.abs(sinks[head]) + Math.abs(lse[r]));
      total.lse[r] += a;
      more.dSinks[head] += a * mean;
    }
    pairs.forEach(({ key, diagonal, shared }, j) => {
      const a = scores[j].weight * (1 + scores[j].size);
      const b = a * Math.abs(scale) * scores[j].slope * (dP[j] + mean);
      total.lse[r] += a;
      if (bias) more.dBias[diagonal] += a * (dP[j] + mean);
      accumulate(row(total.output, r, valueDim), a, row(v, key, valueDim));
      accumulate(row(total.dv, key, valueDim), a, dout_r);
      const k_j = row(k, key, headDim);
      accumulate(row(total.dq, r, headDim), b, mapped(sizes, k_j, 'b', shared, same));
      accumulate(row(total.dk, key, headDim), b, mapped(sizes, q_r, 'a', shared, same));
      if (!relative) return;
      const diagonals = more.dWeights.length / entries!.length;
      entries!.forEach((entry, n) => (more.dWeights[n * diagonals + shared] += b * q_r[entry.a] * k_j[entry.b]));
    });
  }
  return Object.fromEntries(Object.entries({ ...total, ...more }).map(([name, sums]) => [name, maxAbs(sums)])) as ByResult<number>;
}
