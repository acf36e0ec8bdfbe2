// SPDX-License-Identifier: MIT
//
// The idea at a size at which all of it can be seen: the weights of 48 tokens of head size 2, and the thin factors that a
// polynomial makes of them. All numbers are the package's own (`gradientParts`, `reference`), of the page's inputs. No DOM.

import { gradientParts, reference } from 'rope-attention';
import { InputSource } from './inputs.js';

export const TOKENS = 48;
/** Two dimensions are one turning pair, and features that one can name. */
export const HEAD_DIM = 2;

export interface IdeaSettings {
  readonly entryBound: number;
  readonly degree: number;
  readonly seed: number;
}

/** A column of the factors: x^a y^b, (x, y) being a query or a key after its turn. */
export interface Feature {
  readonly degree: number;
  readonly name: string;
}

/** Matrices are row-major. Weights are in units of the average one, 1 / TOKENS. */
export interface Idea {
  readonly entryBound: number;
  readonly degree: number;
  readonly features: readonly Feature[];
  /** [TOKENS, TOKENS]: softmax of the scores. */
  readonly weights: Float64Array;
  /** [TOKENS, TOKENS]: u v^T. */
  readonly product: Float64Array;
  /** product - weights */
  readonly difference: Float64Array;
  /** [TOKENS, features], for queries and for keys. Each feature has the same largest entry in both. */
  readonly u: Float64Array;
  readonly v: Float64Array;
  /** [TOKENS, TOKENS]: scaled scores of turned queries with turned keys less their mean, which softmax does not see. */
  readonly scores: Float64Array;
  /** p(s) = sum_m coefficients[m] s^m */
  readonly coefficients: Float32Array;
}

/** A power of x or y as one writes it. */
const power = (name: string, exponent: number): string => (exponent === 0 ? '' : exponent === 1 ? name : name + '⁰¹²³⁴⁵⁶⁷⁸'[exponent]!);

/** In the order of the package's factors: by degree, then by the power of x. */
export function featuresOf(degree: number): Feature[] {
  return Array.from({ length: degree + 1 }, (_, m) => m).flatMap((m) =>
    Array.from({ length: m + 1 }, (_, b) => ({ degree: m, name: power('x', m - b) + power('y', b) || '1' })),
  );
}

export function computeIdea({ entryBound, degree, seed }: IdeaSettings): Idea {
  const { q, k, v } = new InputSource(seed).take(TOKENS * HEAD_DIM, entryBound);
  const shape = { heads: 1, queryLength: TOKENS, headDim: HEAD_DIM };
  const identity = Float32Array.of(1, 0, 0, 1);
  const parts = gradientParts({ a1: q, a2: k, a3: v, x1: identity, x2: identity, y: identity, e: new Float32Array(v.length), shape, degree });
  const factors = parts.lowRank!;

  const weights = parts.s.map((weight) => TOKENS * weight);
  const [ofQueries, ofKeys] = balance(factors.u, factors.v, factors.rank);
  const product = weights.map((_, cell) => dot(ofQueries, ofKeys, Math.floor(cell / TOKENS), cell % TOKENS, factors.rank));

  const [turnedQ, turnedK] = [q, k].map((x) => reference.rotate({ x, shape })) as [Float64Array, Float64Array];
  const mean = turnedK.reduce((sums, x, n) => ((sums[n % HEAD_DIM]! += x / TOKENS), sums), new Float64Array(HEAD_DIM));
  const centred = turnedK.map((x, n) => x - mean[n % HEAD_DIM]!);
  const scaled = turnedQ.map((x) => x / Math.sqrt(HEAD_DIM));
  return {
    entryBound,
    degree,
    features: featuresOf(degree),
    weights,
    product,
    difference: product.map((value, cell) => value - weights[cell]!),
    u: ofQueries,
    v: ofKeys,
    scores: weights.map((_, cell) => dot(scaled, centred, Math.floor(cell / TOKENS), cell % TOKENS, HEAD_DIM)),
    coefficients: factors.coefficients,
  };
}

function dot(left: Float64Array, right: Float64Array, i: number, j: number, width: number): number {
  let sum = 0;
  for (let n = 0; n < width; n++) sum += left[i * width + n]! * right[j * width + n]!;
  return sum;
}

/** The same product, times TOKENS, with the size of each feature shared between the two factors. */
function balance(u: Float64Array, v: Float64Array, width: number): [Float64Array, Float64Array] {
  const largest = (x: Float64Array, feature: number) => x.reduce((most, value, n) => (n % width === feature ? Math.max(most, Math.abs(value)) : most), 0);
  const ratios = Array.from({ length: width }, (_, feature) => {
    const [ofU, ofV] = [largest(u, feature), largest(v, feature)];
    return ofU > 0 && ofV > 0 ? Math.sqrt(ofV / ofU) : 1;
  });
  const size = Math.sqrt(TOKENS);
  return [u.map((x, n) => x * size * ratios[n % width]!), v.map((x, n) => (x * size) / ratios[n % width]!)];
}

/** p(s) */
export function polynomial(coefficients: ArrayLike<number>, s: number): number {
  let sum = 0;
  for (let m = coefficients.length - 1; m >= 0; m--) sum = sum * s + coefficients[m]!;
  return sum;
}
