// SPDX-License-Identifier: MIT
//
// Proved bounds of the output error of the polynomial engine, in units of max |v - c|, c the midrange of each value column.
//
// By Cauchy-Schwarz every score of a key/value head, centred, lies in [-R, R], R = |scale| max|q_i| max|Rk_j - mean Rk|, with |Rq_i - mean Rq|
// for |q_i| where queries are centred as well. If
// |p(s) exp(-s) - 1| <= t < 1 there, the engine's weights are w_j (1 + e_j), |e_j| <= t, w the true ones, and the output
// moves by at most `certifiedBound(t)` of theory.ts, 2 (1 - sqrt(1 - t^2)) / t, about t: a sharp bound, derived there. What all weights have in
// common does not matter: where p(s) exp(-s) is within [low, high], 1 included, t = (high - low) / (high + low).
// Where most scores are much smaller, what counts is their mean square (`certifySpread`): with |p(s) - exp(s)| <= E s^2 the changes of the weights of
// a row add up to E times sum s^2 over the sum of weights, which is n exp(mean s) at least.
// float32 adds the term of `roundingWithin`, or of transforms.ts. Not counted is what no float32 result can avoid: the rounding of v and of the
// output themselves, one part in 2^24 of |v|.

import { NO_OUTLIERS, type OutlierCounts } from './cost.js';
import type { Bounds, Spread } from './kernel.js';
import { relativeRange, TURNOVER } from './polynomial.js';
import { entriesGain } from './relative.js';
import type { Features } from './scores.js';
import { worse } from './tally.js';
import { certifiedBound, rank } from './theory.js';
import { transformBound } from './transforms.js';
import type { Geometry } from './validate.js';

/** Unit roundoff of float32. */
const UNIT = 2 ** -24;

/**
 * The engine sums over keys in chunks of 32 and then over chunks, over features in blocks of 48 and then over blocks (which
 * end with each degree), and over the keys at the exact edges last: one batch when causal, up to three in a window.
 */
const KEY_CHUNK = 32;
const FEATURE_BLOCK = 48;

/**
 * R: a number that no |score| of the head but outliers' exceeds, once the mean key is subtracted, and the mean query where queries are centred (with
 * a relative map: as it is); the rounding of the norms included.
 */
export function scoreRadius(g: Geometry, bounds: Bounds): number {
  // With a relative map the part of the mean key differs from key to key.
  if (g.relative || g.relativePositions) return largestScore(g, bounds) * (1 + (g.headDim + 8) * UNIT);
  const rotated = queryGain(g, bounds) * bounds.q_plain_norm; // k_centred_norm is of rotated keys
  return Math.abs(g.scale) * rotated * bounds.k_centred_norm * (1 + (g.headDim + 8) * UNIT);
}

/** Norms of keys whose squares, and sums of many, are well within float32. */
const MODERATE = { least: 1e-15, most: 1e12 } as const;

/** Whether the mean squares of a head's scores can be known: those of Session.spread. */
export function hasSpread(g: Geometry, { q_mean_norm, k_centred_norm }: Bounds): boolean {
  const scored = g.relative || g.relativePositions || g.bias || g.alibi || g.decays || g.mask || g.softcap;
  if (scored || q_mean_norm > 0) return false;
  return k_centred_norm >= MODERATE.least && k_centred_norm <= MODERATE.most;
}

/** What rotation makes of norms of queries: those of centred ones are of rotated rows already. */
export function queryGain(g: Pick<Geometry, 'rotaryGain'>, bounds: Pick<Bounds, 'q_mean_norm'>): number {
  return bounds.q_mean_norm > 0 ? 1 : g.rotaryGain;
}

/** Norms of unrotated queries and keys. */
type Norms = Pick<Bounds, 'q_norm' | 'k_norm'>;
/** What rounding depends on. */
type Rounded = Norms & Pick<Bounds, 'q_mean_norm' | 'v_entry' | 'v_half_range'>;

/** Cauchy-Schwarz: the largest |scale (R q).(R k)|, or |scale q W k|, for such norms, not centred, as far as these are exact. */
export function largestScore(
  g: Pick<Geometry, 'scale' | 'rotaryGain' | 'relative'>,
  { q_norm, k_norm }: Norms,
): number {
  return Math.abs(g.scale) * (g.relative?.gain ?? g.rotaryGain ** 2) * q_norm * k_norm;
}

/**
 * A number that no |scale q.k| of the heads exceeds, for the exact engine; Infinity where it must not count on one: entries that
 * are not finite, or values so large or small that weights far from 1 would take sums to the ends of float32.
 */
export function scoreBound(g: Geometry, bounds: readonly Bounds[]): number {
  const moderate = ({ finite, v_entry }: Bounds) =>
    finite === 1 && (v_entry === 0 || (v_entry >= 1e-28 && v_entry * g.keyLength <= 1e30));
  if (!bounds.every(moderate)) return Infinity;
  return bounds.reduce((most, one) => Math.max(most, largestScore(g, one)), 0) * (1 + (g.headDim + 8) * UNIT);
}

/**
 * Worst case of what float32 adds, in the same units.
 *
 * A sum of n float32 terms by chains of at most n additions and products is within gamma_n = n u / (1 - n u) of the sum of
 * magnitudes. Numerator and denominator are sums over keys and features of c_m (multinomial) q^a k^a [v, 1], whose
 * magnitudes add up to at most S = sum |c_m| R^m for each key, against weights of at least W = min p each: the quotient moves by at
 * most 2 gamma_n S / W times the largest |v| that is summed. Both may be means over the keys that a query sees. A window's sum may
 * hold what up to TURNOVER keys for each that is in it have left, which came and went: the rounding of their products twice, and of so many more
 * additions, to sums that at no time were of more than a window's keys. Weights that are exact have no features, but a score that is a
 * sum of D terms: a row of both is off by the larger of the two at most. The scores themselves are off (scoreRounding).
 *
 * @param magnitude S.
 * @param least W.
 * @param valueRatio largest |v| that the engine sums over half the range of v.
 * @param outlierKeys keys that are summed beside the state, weighed exactly.
 */
function roundingBound(
  g: Geometry,
  coefficients: ArrayLike<number>,
  magnitude: number,
  least: number,
  bounds: Rounded,
  valueRatio: number,
  outlierKeys = 0,
): number {
  const degree = coefficients.length - 1;
  const { left, right, keys, terms } = sumsOf(g);
  const edges = (left >= 0 ? 3 : right >= 0 ? 1 : 0) + (g.decays ? g.decays.near / KEY_CHUNK : 0);
  const overFeatures = FEATURE_BLOCK + Math.ceil(rank(g.headDim, degree) / FEATURE_BLOCK) + degree;
  const beside = outlierKeys > 0 ? KEY_CHUNK + Math.ceil(outlierKeys / KEY_CHUNK) : 0;
  // features of q and k, weights, [v, 1], the quotient; decays: factors of both sides, their weights, the sum over them
  const products = 2 * degree + 6 + (g.decays ? 6 + g.decays.count : 0);
  // A state that decays is rounded once more for each chunk.
  const additions = (g.alibi || g.decays ? 2 : 1) * (Math.ceil(keys / KEY_CHUNK) + 1);
  const over = terms * (KEY_CHUNK + products + additions) + edges * KEY_CHUNK + beside;
  const sums = 2 * gammaOf(over + overFeatures) * (g.decays?.gain ?? 1) * magnitude * valueRatio;
  const exact = 2 * gammaOf(over) * valueRatio + certifiedBound(Math.expm1(g.headDim * UNIT * largestScore(g, bounds)));
  return worse(sums / least, exact) + scoreRounding(g, bounds) + outOfRange(g, coefficients, bounds) / least;
}

/**
 * The same for products of entries and values that fall below float32, each by up to 2^-150 of what multiplies it in the end; Infinity where
 * some may exceed it. Of ordinary rows next to nothing: it takes norms of 1e6 and 1e-6, or values of 1e-30.
 */
export function outOfRange(g: Geometry, coefficients: ArrayLike<number>, { q_norm, k_norm, v_entry, v_half_range }: Rounded): number {
  const degree = coefficients.length - 1;
  const [x, y] = [Math.abs(g.scale) * q_norm, k_norm].map((norm) => Math.max(1, 2 * g.rotaryGain * norm)); // centred: twice as large at most
  if (!(g.keyLength * Math.max(x, y) ** degree * Math.max(1, v_entry) < 1e37)) return Infinity;
  const all = magnitudeOf(coefficients, g.headDim * x * y); // sums over features of what stands beside each entry
  const values = v_half_range > 0 ? 1 / v_half_range : 0;
  return 2 ** -150 * (2 * degree + 6) * all * (1 + values);
}

/** How far queries see, the keys of a state at most, and how many of them a sum has had, for each that is in it, that joined or left. */
function sumsOf(g: Geometry): { left: number; right: number; keys: number; terms: number } {
  const [left, right] = g.causal ? [g.window[0], 0] : g.window;
  const keys = left < 0 ? g.keyLength : Math.min(g.keyLength, right < 0 ? Infinity : left + right + 1);
  return { left, right, keys, terms: left < 0 ? 1 : 1 + 2 * TURNOVER };
}

/**
 * What a spread is at most, as it is found: squares of scores are sums of products that add up to the square of the radius at most, means of
 * products up to the radius.
 */
export function roundedUp(g: Geometry, { scores, keys, gain, rows }: Spread, radius: number): Spread {
  const sums = sumsOf(g);
  const off = (sums.terms * (Math.ceil(sums.keys / KEY_CHUNK) + KEY_CHUNK) + 2 * g.headDim) * 2 * UNIT;
  const most = gain * (1 + 2 ** -16 + off * radius);
  return { scores: scores * (1 + 2 ** -16 + off * radius) + off * most * radius ** 2, keys: keys * (1 + 2 ** -16 + off), gain: most, rows };
}

/** n u / (1 - n u) */
function gammaOf(roundings: number): number {
  const chain = roundings * UNIT;
  return chain < 1 ? chain / (1 - chain) : Infinity;
}

/**
 * The same where nothing is known but that scores are within a radius.
 *
 * @param t relative error of the polynomial there, so that it is (1 - t) exp(-radius) at least.
 */
export function roundingWithin(
  g: Geometry,
  coefficients: ArrayLike<number>,
  radius: number,
  t: number,
  bounds: Rounded,
  valueRatio: number,
  outlierKeys = 0,
): number {
  const least = (1 - t) * Math.exp(-radius);
  return roundingBound(g, coefficients, magnitudeOf(coefficients, radius), least, bounds, valueRatio, outlierKeys);
}

/** sum of |c_m| radius^m */
function magnitudeOf(coefficients: ArrayLike<number>, radius: number): number {
  let magnitude = 0;
  for (let m = coefficients.length - 1; m >= 0; m--) magnitude = magnitude * radius + Math.abs(coefficients[m]);
  return magnitude;
}

/**
 * What the rounding of rotated q and k, `delta` in a score, does to the output: weights change by the factor exp(+-delta). Of centred queries
 * a score is in two parts.
 */
function scoreRounding(g: Geometry, bounds: Norms & Pick<Bounds, 'q_mean_norm'>): number {
  const parts = bounds.q_mean_norm > 0 ? 2 : 1;
  return certifiedBound(Math.expm1(16 * parts * UNIT * largestScore(g, bounds)));
}

/**
 * The bound for one head; Infinity where there is none: t >= 1, weights that may not be positive.
 *
 * @param coefficients c_0 .. c_degree, as the engine takes them.
 * @param outliers rows that are exact; `bounds` are those of the others. Outlier queries have the rounding only.
 * @param features the engine, whose rounding it is.
 */
export function certifyHead(
  g: Geometry,
  coefficients: Float32Array,
  bounds: Bounds,
  outliers = NO_OUTLIERS,
  features: Features = 'polynomial',
): number {
  const radius = scoreRadius(g, bounds);
  // Decays that stand for a bias are off by a factor of their own.
  const fit = g.decays ? (g.decays.floored ? Infinity : g.decays.error) : 0;
  const { least, most } = relativeRange(coefficients, -radius, radius);
  const [low, high] = [Math.min(least * (1 - fit), 1), Math.max(most * (1 + fit), 1)]; // exact pairs beside it have 1
  const t = ((high - low) / (high + low)) * (1 + 1e-9);
  const off = Math.max(high - 1, 1 - low);
  return low > 0 && off < 1 ? certifiedBound(t) + rounding(g, coefficients, bounds, off, outliers, features) : Infinity;
}

/**
 * The same by the mean square of scores: the sum of |changes| of a row's weights, which add up to 1, is at most e = error * spread, and moves its
 * output by at most e / (1 - e) times what one value may be off it, 2. Weights are exp(mean s) (1 - e) on average, at least, and magnitudes
 * those of the mean square of keys.
 *
 * @param coefficients, error of `tangent`, on the head's score radius.
 */
export function certifySpread(
  g: Geometry,
  coefficients: Float32Array,
  error: number,
  spread: Omit<Spread, 'rows'>,
  bounds: Bounds,
  outliers = NO_OUTLIERS,
): number {
  const radius = scoreRadius(g, bounds);
  const e = error * spread.scores;
  if (!(e < 1)) return Infinity; // else weights add up to a positive number, whatever single ones are
  const typical = Math.min(radius, Math.abs(g.scale) * queryGain(g, bounds) * bounds.q_plain_norm * Math.sqrt(spread.keys));
  let magnitude = 1 + typical;
  for (let m = coefficients.length - 1, sum = 0; m > 1; m--) {
    sum = sum * radius + Math.abs(coefficients[m]);
    if (m === 2) magnitude += sum * typical ** 2;
  }
  const least = (1 - e) / Math.max(1, spread.gain); // of keys that are done exactly 1, relative to their magnitudes
  return (2 * e) / (1 - e) + roundingBound(g, coefficients, magnitude, least, bounds, 2, outliers.keys);
}

function rounding(g: Geometry, own: Float32Array, bounds: Bounds, t: number, outliers: OutlierCounts, features: Features): number {
  const radius = scoreRadius(g, bounds);
  if (features !== 'toeplitz') return roundingWithin(g, own, radius, t, bounds, 2, outliers.keys);
  const gains = g.relative ? entriesGain(g.relative, g.headDim) / g.relative.gain : 1;
  return transformBound(g, own.length - 1, magnitudeOf(own, radius * gains), (1 - t) * Math.exp(-radius)) + scoreRounding(g, bounds);
}

/**
 * The bound for a whole call: the largest over its key/value heads; null when there is none (t >= 1 on some head, or v is
 * not known).
 *
 * @param coefficients [heads][degree + 1].
 */
export function certify(
  g: Geometry,
  coefficients: Float32Array,
  degree: number,
  heads: readonly Bounds[],
  outliers = NO_OUTLIERS,
  features: Features = 'polynomial',
): number | null {
  const own = (head: number) => coefficients.subarray(head * (degree + 1), (head + 1) * (degree + 1));
  const largest = heads.reduce((most, bounds, head) => worse(most, certifyHead(g, own(head), bounds, outliers, features)), 0);
  return Number.isFinite(largest) ? largest : null;
}
