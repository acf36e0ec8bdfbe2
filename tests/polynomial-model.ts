// SPDX-License-Identifier: MIT
//
// What the polynomial engine computes, in float64 and without features: every weight a_ij written out.
//
//   x_i = scale R q_i,  y_j = R k_j - mean of R k (outliers left out),  s_ij = x_i . y_j
//   a_ij = p(s_ij)        all pairs of a segment; when causal, keys before the block of 32 queries that i is in; in a window,
//                         those of them that all queries of the block see, whose number is a multiple of 32
//        = exp(s_ij)      the other keys that i may see
// and, with slopes, times exp(-m |i + queryOffset - j|),
//
//   den_i = sum_j a_ij,   out_i = sum_j a_ij v_j / den_i,   lse_i = log den_i + x_i . mean
//
// and the gradient is the derivative of that, p held fixed, the mean key included:
//
//   g_ij = (dout_i.v_j - dout_i.out_i) / den_i * da_ij/ds      dx_i = sum_j g_ij y_j
//   dy_j = sum_i g_ij x_i, and since y_j = R k_j - mean,       d(R k)_j = dy_j - sum of dy / keys that are no outliers, for these
//
// Pairs of outliers have a_ij = exp(s_ij) everywhere.

import { reference } from '../dist/index.js';
import { fullShape, maxAbs } from './support.js';
import { RESULTS } from './yardstick.js';
import type { Arrays, Floats, Setting } from './support.js';
import type { ByResult } from './yardstick.js';
import type { Outliers } from '../dist/kernel.js';

/** Queries of one diagonal block (RA_CHUNK). */
const BLOCK = 32;

const NO_OUTLIERS: Outliers = { queries: new Uint32Array(0), keys: new Uint32Array(0), counts: { queries: 0, keys: 0 } };

/** Arrays of either precision. */
export type ModelArgs = Setting & Record<keyof Arrays, Floats>;

export interface ModelResult extends ByResult<Float64Array> {
  /** For each result the largest sum of magnitudes of the terms of an entry, as `magnitudes` of yardstick.ts. */
  terms: ByResult<number>;
  /** When there are slopes, and the sums of magnitudes of its terms; a distance counts as a chunk more, since a state's is known to one. */
  dAlibi: Float64Array;
  dAlibiTerms: Float64Array;
}

/**
 * @param coefficients for each key/value head, [batch * kvHeads][degree + 1].
 * @param outliers of each key/value head, as ra_problem has them.
 */
export function polynomialModel(
  args: ModelArgs,
  coefficients: readonly ArrayLike<number>[],
  outliers: Outliers = NO_OUTLIERS,
): ModelResult {
  const { batch, heads, kvHeads, queryLength, keyLength, headDim, valueDim } = fullShape(args.shape);
  const { rotary = {}, scale = 1 / Math.sqrt(headDim), causal = false, queryOffset = 0 } = args;
  const { segments = [0], window = [-1, -1], alibi = new Float32Array(heads) } = args;
  const left = window[0] < 0 ? Infinity : window[0];
  const right = causal ? 0 : window[1] < 0 ? Infinity : window[1];
  const keyShape = { batch, heads: kvHeads, queryLength: keyLength, headDim };
  const q = reference.rotate({ x: args.q, shape: args.shape, rotary, queryOffset });
  const k = reference.rotate({ x: args.k, shape: keyShape, rotary });
  const row = (x: Float64Array, r: number, width: number) => x.subarray(r * width, (r + 1) * width);
  const dot = (x: Float64Array, y: Float64Array) => {
    let sum = 0;
    for (let d = 0; d < x.length; d++) sum += x[d] * y[d];
    return sum;
  };
  const absDot = (x: Float64Array, y: Float64Array) => {
    let sum = 0;
    for (let d = 0; d < x.length; d++) sum += Math.abs(x[d] * y[d]);
    return sum;
  };
  const accumulate = (y: Float64Array, a: number, x: Float64Array) => {
    for (let d = 0; d < x.length; d++) y[d] += a * x[d];
  };
  const accumulateAbs = (y: Float64Array, a: number, x: Float64Array) => {
    for (let d = 0; d < x.length; d++) y[d] += Math.abs(a * x[d]);
  };

  const { counts } = outliers;
  const plainKeys = keyLength - counts.keys;
  const isFarKey = (keyHead: number, j: number) =>
    outliers.keys.subarray(keyHead * counts.keys, (keyHead + 1) * counts.keys).includes(j);
  const isFarQuery = (keyHead: number, n: number) =>
    outliers.queries.subarray(keyHead * counts.queries, (keyHead + 1) * counts.queries).includes(n);

  const x = q.map((value) => scale * value);
  const means = Array.from({ length: batch * kvHeads }, (_, head) => {
    const mean = new Float64Array(headDim);
    for (let j = 0; j < keyLength; j++) {
      if (!isFarKey(head, j)) accumulate(mean, 1 / plainKeys, row(k, head * keyLength + j, headDim));
    }
    return mean;
  });
  const y = k.map((value, n) => value - means[Math.floor(n / headDim / keyLength)][n % headDim]);
  const [v, dout] = [Float64Array.from(args.v), Float64Array.from(args.dOutput)];

  const zeros = () => ({
    output: new Float64Array(dout.length),
    lse: new Float64Array(x.length / headDim),
    dq: new Float64Array(x.length),
    dk: new Float64Array(y.length),
    dv: new Float64Array(v.length),
  });
  const [result, terms] = [zeros(), zeros()];
  const [dAlibi, dAlibiTerms] = [new Float64Array(heads), new Float64Array(heads)];
  result.lse.fill(-Infinity);
  for (let r = 0; r < result.lse.length; r++) {
    const i = r % queryLength;
    const head = Math.floor(r / queryLength);
    const keyHead = Math.floor(head / heads) * kvHeads + Math.floor(((head % heads) * kvHeads) / heads);
    const clamp = (n: number) => Math.min(Math.max(n, 0), keyLength);
    const position = i + queryOffset;
    const segment = Math.max(Array.from(segments).filter((start) => start <= position).length, 1);
    const [start, end] = [segments[segment - 1], segments[segment] ?? Infinity];
    const first = Math.max(clamp(start), clamp(position - left));
    const seen = Math.min(clamp(end), clamp(position + right + 1));
    // Of the whole block, wherever segments cut it; when causal without the query's own key.
    const block = BLOCK * Math.floor(i / BLOCK) + queryOffset;
    const behind = causal ? block : block + right + 1;
    const from = block + BLOCK - 1 - left;
    const odd = Number.isFinite(behind - from) ? (((behind - from) % BLOCK) + BLOCK) % BLOCK : 0;
    const [stateFrom, stateTo] = [Math.max(start, from + odd), Math.min(end, behind)];
    if (seen <= first) continue;

    const group = heads / kvHeads;
    const farQuery = isFarQuery(keyHead, i * group + (head % group));
    // a, da/ds, and the sums of magnitudes of the terms of either
    // all over exp(top), so that none overflows
    const scores = Array.from({ length: seen - first }, (_, n) => {
      const [x_r, y_j] = [row(x, r, headDim), row(y, keyHead * keyLength + first + n, headDim)];
      return { s: dot(x_r, y_j), size: absDot(x_r, y_j) };
    });
    const top = Math.max(...scores.map(({ s }) => s)) > 50 || farQuery ? Math.max(...scores.map(({ s }) => s)) : 0;
    const weights = scores.map(({ s, size }, n) => {
      const j = first + n;
      const bias = -alibi[head % heads] * Math.abs(position - j);
      if (j >= stateFrom && j < stateTo && !farQuery && !isFarKey(keyHead, j)) {
        return polynomialWeight(coefficients[keyHead], s, size, Math.exp(bias - top));
      }
      const a = Math.exp(s + bias - top);
      const sizeA = a * (1 + size - bias);
      return { a, slope: a, sizeA, sizeSlope: sizeA };
    });
    const den = weights.reduce((sum, { a }) => sum + a, 0);
    const sizeDen = weights.reduce((sum, { sizeA }) => sum + sizeA, 0) / den;
    const [x_r, dout_r, out_r] = [row(x, r, headDim), row(dout, r, valueDim), row(result.output, r, valueDim)];
    const shift = dot(x_r, means[keyHead]);
    weights.forEach(({ a }, n) => accumulate(out_r, a / den, row(v, keyHead * keyLength + first + n, valueDim)));
    result.lse[r] = Math.log(den) + top + shift;
    terms.lse[r] = sizeDen + Math.abs(result.lse[r]) + absDot(x_r, means[keyHead]);

    const delta = dot(dout_r, out_r);
    const sizeDP = (n: number) => absDot(dout_r, row(v, keyHead * keyLength + first + n, valueDim));
    const sizeDelta = weights.reduce((sum, { sizeA }, n) => sum + (sizeA / den) * sizeDP(n), 0);
    const sizeLse = 1 + terms.lse[r]; // exp(-lse) divides in the backward pass
    weights.forEach(({ a, slope, sizeA, sizeSlope }, n) => {
      const at = keyHead * keyLength + first + n;
      const [y_j, v_j] = [row(y, at, headDim), row(v, at, valueDim)];
      const g = ((dot(dout_r, v_j) - delta) / den) * slope;
      accumulate(row(result.dv, at, valueDim), a / den, dout_r);
      accumulate(row(result.dq, r, headDim), g, y_j);
      accumulate(row(result.dk, at, headDim), g, x_r);
      const distance = Math.abs(position - first - n);
      dAlibi[head % heads] -= distance * ((dot(dout_r, v_j) - delta) / den) * a;
      dAlibiTerms[head % heads] += (distance + BLOCK) * ((sizeDP(n) + sizeDelta) / den) * sizeA * sizeLse;

      const sizeG = ((sizeDP(n) + sizeDelta) / den) * sizeSlope * sizeLse;
      accumulateAbs(row(terms.output, r, valueDim), sizeA / den, v_j);
      accumulateAbs(row(terms.dv, at, valueDim), (sizeA * sizeLse) / den, dout_r);
      accumulateAbs(row(terms.dq, r, headDim), scale * sizeG, y_j);
      accumulateAbs(row(terms.dk, at, headDim), sizeG, x_r);
    });
    accumulateAbs(row(terms.output, r, valueDim), sizeDen, out_r);
  }

  // Through x = scale R q and y = R k - mean, back to q and k.
  for (let keyHead = 0; keyHead < batch * kvHeads; keyHead++) {
    const mean = new Float64Array(headDim);
    for (let j = 0; j < keyLength; j++) accumulate(mean, 1 / plainKeys, row(result.dk, keyHead * keyLength + j, headDim));
    for (let j = 0; j < keyLength; j++) {
      if (!isFarKey(keyHead, j)) accumulate(row(result.dk, keyHead * keyLength + j, headDim), -1, mean);
    }
  }
  const dq = reference.rotate({ x: result.dq.map((g) => scale * g), shape: args.shape, rotary, queryOffset, inverse: true });
  const dk = reference.rotate({ x: result.dk, shape: keyShape, rotary, inverse: true });
  return { ...result, dq, dk, dAlibi, dAlibiTerms, terms: Object.fromEntries(RESULTS.map((name) => [name, maxAbs(terms[name])])) as ByResult<number> };
}

/** p(s) and p'(s) times `factor`; and, the products of s adding up to `size` in magnitude, how many roundings of 1 either is off at most. */
function polynomialWeight(coefficients: ArrayLike<number>, s: number, size: number, factor: number) {
  let [a, slope, sizeA, sizeSlope] = [0, 0, 0, 0];
  for (let m = 0; m < coefficients.length; m++) {
    const c = factor * coefficients[m];
    a += c * s ** m;
    sizeA += (1 + m) * Math.abs(c) * size ** m;
    if (m === 0) continue;
    slope += m * c * s ** (m - 1);
    sizeSlope += (1 + m) * m * Math.abs(c) * size ** (m - 1);
  }
  return { a, slope, sizeA, sizeSlope };
}
