// SPDX-License-Identifier: MIT
//
// What a pass costs: useful floating-point operations, counted in closed form, over the share of the machine's peak that
// each engine reaches. Only ratios of costs decide, so the peak itself is not needed. Counts are numbers, exact to 2^53.

import { seenKeys } from './scores.js';
import { cost as products, pairs } from './theory.js';
import type { Geometry } from './validate.js';

export type Pass = 'forward' | 'backward';

/** Queries and keys of one chunk of the causal polynomial engine, inside which exp is exact; keys that join a state together. */
export const CHUNK = 32;

/** When errors are sampled: rows at a time in a key/value head, heads that are looked at, rows in all for the last check. */
export const SAMPLE_ROWS = 8;
export const SAMPLE_HEADS = 4;
export const CHECK_ROWS = 32;
/** Segments that are looked at for their own sake: rows that see few keys, so next to nothing. */
export const LOOKED_SEGMENTS = 4;
/** Scores that a head's polynomial is fitted to, about. */
export const SAMPLE_SCORES = 2048;
/** Keys that are weighed together there (TILE of sample.c). */
const SAMPLE_TILE = 128;

/** Outliers of a key/value head: of `rows` queries or keys at most these are done exactly beside a polynomial. */
export function outlierLimit(rows: number): number {
  return Math.min(rows, Math.max(64, Math.ceil(OUTLIER_SHARE * rows)));
}

/** Queries and keys of each key/value head that are done exactly beside a polynomial. */
export interface OutlierCounts {
  queries: number;
  keys: number;
}

export const NO_OUTLIERS: OutlierCounts = { queries: 0, keys: 0 };

/** Of the rows; with as many queries and keys the gain over exact is below 12. */
const OUTLIER_SHARE = 0.04;

/** Share of the multiply-add peak, by head size: the first row whose `upTo` is not below headDim. */
const EFFICIENCY = [
  { upTo: 16, exact: { forward: 0.73, backward: 0.8 }, polynomial: { forward: 0.5, backward: 0.45 }, outliers: { forward: 0.45, backward: 0.45 } },
  { upTo: 32, exact: { forward: 0.83, backward: 0.87 }, polynomial: { forward: 0.65, backward: 0.62 }, outliers: { forward: 0.55, backward: 0.55 } },
  { upTo: Infinity, exact: { forward: 0.88, backward: 0.9 }, polynomial: { forward: 0.8, backward: 0.8 }, outliers: { forward: 0.65, backward: 0.65 } },
] as const;

/** The same for the sampling functions, and what the fit of one polynomial (in JavaScript) takes, in operations at peak. */
const SAMPLING_EFFICIENCY = 0.25;
const FIT = 6e6;

/** Pairs (query, key) that the mask allows, over all query heads. */
export function allowedPairs(g: Geometry): number {
  return g.batch * g.heads * pairs(g);
}

/** Useful operations of the exact engine. */
export function exactFlops(g: Geometry, pass: Pass): number {
  return products({ ...g, method: 'exact', pass });
}

/**
 * Useful operations of the polynomial engine, with (CHUNK + 1) / 2 exact pairs for each query at each edge of what it sees, and the
 * pairs of outliers.
 */
export function polynomialFlops(g: Geometry, pass: Pass, degree: number, outliers = NO_OUTLIERS): number {
  const edges = Number(g.causal || g.window[1] >= 0) + Number(g.window[0] >= 0);
  const beside = Math.min(((edges * (CHUNK + 1)) / 2) * g.batch * g.heads * g.queryLength, allowedPairs(g));
  return products({ ...g, method: 'polynomial', degree, pass }) + flopsOfPair(g, pass) * (beside + outlierPairs(g, outliers));
}

/** Pairs of outliers, those of an outlier query and an outlier key once; outliers see and are seen like others. */
export function outlierPairs(g: Geometry, { queries, keys }: OutlierCounts): number {
  const others = (g.heads / g.kvHeads) * g.queryLength - queries;
  const all = g.batch * g.kvHeads * (queries * g.keyLength + keys * others);
  return all * (allowedPairs(g) / (g.batch * g.heads * g.queryLength * g.keyLength));
}

/** Operations at peak speed that take as long as the pass: `degree` null for the exact engine. */
export function cost(g: Geometry, pass: Pass, degree: number | null, outliers = NO_OUTLIERS): number {
  const share = EFFICIENCY.find((row) => g.headDim <= row.upTo)!;
  if (degree === null) return exactFlops(g, pass) / share.exact[pass];
  // The keys at the left edge of a window, and those that leave the state, are rotated once more and weighed in whole blocks.
  const besides = g.window[0] < 0 ? 0 : 1.5 * CHUNK * flopsOfPair(g, pass) * g.batch * g.heads * g.queryLength;
  const ofOutliers = (flopsOfPair(g, pass) * outlierPairs(g, outliers)) / share.outliers[pass];
  return (polynomialFlops(g, pass, degree) + besides) / share.polynomial[pass] + ofOutliers;
}

/** The same for the sampling that goes with the polynomial engine, by the number of degrees to compare. */
export function samplingCost(g: Geometry, pass: Pass, candidates: number): number {
  const heads = g.batch * g.kvHeads;
  const looked = Math.min(heads, SAMPLE_HEADS);
  const [keys, queries] = [g.keyLength, (g.heads / g.kvHeads) * g.queryLength];
  const survey = heads * g.headDim * (8 * (keys + queries) + 2 * SAMPLE_SCORES);
  const seen = Math.min(keys, seenKeys(g) + SAMPLE_TILE);
  // Pilot rows, exact and of each candidate; rows of the check, and columns of its gradients.
  // The rows that are likely to be worst: two portions, in the pilot for one or two candidates, and in the check.
  const rows = (looked * SAMPLE_ROWS * (1 + candidates + 2 * 4) + CHECK_ROWS) * seen;
  const columns = pass === 'backward' ? looked * 2 * SAMPLE_ROWS * queries * (seen / keys) : 0;
  const fits = FIT * (heads + looked * candidates);
  return (survey + flopsOfPair(g, pass) * (rows + columns)) / SAMPLING_EFFICIENCY + fits;
}

function flopsOfPair(g: Geometry, pass: Pass): number {
  return products({ method: 'exact', pass, heads: 1, queryLength: 1, headDim: g.headDim, valueDim: g.valueDim });
}
