// SPDX-License-Identifier: MIT
//
// A bias by distance as a sum of few decays. With exp(b(t)) ~ sum_e c_e exp(-lambda_e (t - near)) for all distances t from `near`
// on, the keys of those distances need states that decay, one for each rate, instead of Fourier transforms; nearer pairs are done
// exactly. Power laws, logarithms and what is constant far away take 1 to 8 of them; a rough bias none.
//
// Rates are added one by one, where that helps most, and moved by Gauss-Newton steps with the weights c projected out (Golub,
// Pereyra 1973): the relative error at NODES distances at equal ratios, first in least squares, then with weights that grow where
// it is large (Lawson 1961). What counts is measured afterwards at every distance.
//
// Based on: Golub, Pereyra. The Differentiation of Pseudo-Inverses and Nonlinear Least Squares Problems Whose Variables Separate.
// 1973; Braess, Hackbusch. Approximation of 1/x by Exponential Sums in [1, infinity). 2005 (the error falls exponentially with
// the number of terms).

import { CHUNK } from './cost.js';

/** Decays of one or of all heads of a bias, as the engine takes them. */
export interface Decays {
  /** Distances from here on are decays. */
  near: number;
  /** Decays of each head; heads that need fewer have some of weight 0. */
  count: number;
  /** [heads][count] */
  rates: Float64Array;
  weights: Float32Array;
  /** [heads]: decays are of exp(bias - top). */
  tops: Float32Array;
  /** Largest error of the sum at any far distance in sight, relative to exp(bias - top), or where `floored` to a share of what is nearer. */
  error: number;
  /** Whether some weights are so small beside nearer ones that only those count. */
  floored: boolean;
  /** Largest sum of |c_e| exp(-lambda_e ..) over exp(bias - top): by how much rounding errors grow. */
  gain: number;
}

/** The bias of one head: `bias[first + t]` at distance t, for the distances `from` .. `to` that are in sight. */
export interface Lags {
  bias: Float32Array;
  first: number;
  from: number;
  to: number;
}

/** Most decays (RA_MAX_DECAYS). */
export const MAX_DECAYS = 8;
/** Distances that may be where the decays begin, the likely one first. */
const NEARS = [128, 64, 192, 256] as const;

const NODES = 128;
/** Weights may cancel by this factor. */
const MOST_GAIN = 8;
/** The floor of a weight is its mean over all smaller distances, over this: these errors add up to at most as much again, about. */
const FLOOR = 8;
/** Rates between which those of `mayFit` and the first ones lie: 1/span, times this, and 1/near over it. */
const WIDER = 4;
/** Steps of least squares, then against large errors, these where the former came near, until there is some room. */
const [STEPS, REWEIGHTS, WITHIN, ENOUGH] = [24, 40, 8, 0.9];

/** One head's decays beyond one distance. */
interface Fit {
  rates: number[];
  weights: number[];
  error: number;
  floored: boolean;
  gain: number;
}

/**
 * The decays of all heads within a relative error of `target`, of the kind that costs least; null where there are none, with the
 * least error that was seen.
 *
 * @param heads one for each head that has a bias of its own.
 * @param cost of so many decays beyond such a distance.
 * @param inside whoever sees a key at one distance sees others at all smaller ones.
 */
export function fitDecays(
  heads: readonly Lags[],
  target: number,
  cost: (count: number, near: number) => number,
  inside: boolean,
): { decays: Decays | null; error: number } {
  let best: { decays: Decays; cost: number } | null = null;
  let least = Infinity;
  for (const near of NEARS) {
    if (best && cost(1, near) >= best.cost) continue;
    const found = fitBeyond(heads, near, target, inside, (count) => best === null || cost(count, near) < best.cost);
    if (typeof found === 'number') least = Math.min(least, found);
    else best = { decays: found, cost: cost(found.count, near) };
  }
  return best ? { decays: best.decays, error: best.decays.error } : { decays: null, error: least };
}

/** The same beyond one distance, with as few decays as will do, as long as `worth` says so; the error where none will. */
function fitBeyond(
  heads: readonly Lags[],
  near: number,
  target: number,
  inside: boolean,
  worth: (count: number) => boolean,
): Decays | number {
  const fits: Fit[] = [];
  const tops: number[] = [];
  for (const head of heads) {
    const far = { ...head, from: Math.max(head.from, near) };
    const [top, smooth] = [topOf(far), isSmooth(far, near, target)];
    if (!smooth) return Infinity;
    const fit = fitOne(far, near, top, target, inside, worth);
    if (typeof fit === 'number') return fit;
    fits.push(fit);
    tops.push(top);
  }
  const count = Math.max(...fits.map((fit) => fit.rates.length));
  const padded = (values: number[]) => Array.from({ length: count }, (_, n) => values[n] ?? 0);
  return {
    near,
    count,
    rates: Float64Array.from(fits.flatMap((fit) => padded(fit.rates))),
    weights: Float32Array.from(fits.flatMap((fit) => padded(fit.weights))),
    tops: Float32Array.from(tops),
    error: Math.max(...fits.map((fit) => fit.error)),
    floored: fits.some((fit) => fit.floored),
    gain: Math.max(...fits.map((fit) => fit.gain)),
  };
}

/** The largest far bias, in float32; 0 without any. */
function topOf({ bias, first, from, to }: Lags): number {
  let top = -Infinity;
  for (let t = from; t <= to; t++) if (!(bias[first + t] <= top)) top = bias[first + t];
  return from > to ? 0 : top;
}

/** Whether neighbours differ no more than decays of 8/near a step do, at a hundred places: a rough bias is found out at once. */
function isSmooth({ bias, first, from, to }: Lags, near: number, target: number): boolean {
  const bend = (8 / near) ** 2 + 4 * target;
  const step = Math.max(1, Math.floor((to - from) / 100));
  for (let t = from + 1; t < to; t += step) {
    const [before, at, behind] = [bias[first + t - 1], bias[first + t], bias[first + t + 1]];
    if (!(Math.abs(before - 2 * at + behind) <= bend + 4e-7 * Math.abs(at))) return false;
  }
  return true;
}

function fitOne(
  lags: Lags,
  near: number,
  top: number,
  target: number,
  inside: boolean,
  worth: (count: number) => boolean,
): Fit | number {
  if (lags.from > lags.to) return { rates: [0], weights: [0], error: 0, floored: false, gain: 1 };
  if (!(top < Infinity && top > -Infinity)) return Infinity;
  const scales = scalesOf(lags, top, inside);
  const nodes = nodesOf(lags, near, top, scales);
  if (!nodes) return Infinity;
  let least = errorOfMany(nodes);
  if (least > target) return least;
  least = Infinity;
  let rates: number[] = [];
  for (let count = 1; count <= MAX_DECAYS && worth(count); count++) {
    rates = descend(nodes, withAnother(nodes, rates));
    const found = level(nodes, rates, target);
    least = Math.min(least, found.error);
    if (found.error > target) continue;
    const fit = measure(lags, near, top, scales, found);
    if (fit.error <= target && fit.gain <= MOST_GAIN) return fit;
    least = Math.min(least, Math.max(fit.error, 2 * target));
  }
  return least;
}

/** What errors are relative to, at each far distance: the weight, or a share of the mean of all nearer ones. */
function scalesOf({ bias, first, from, to }: Lags, top: number, inside: boolean): Float64Array {
  const scales = new Float64Array(to - from + 1);
  let sum = 0;
  for (let t = 0; inside && t < from; t++) sum += Math.exp(bias[first + t] - top);
  for (let t = from; t <= to; t++) {
    const own = Math.exp(bias[first + t] - top);
    sum += own;
    scales[t - from] = inside ? Math.max(own, sum / (FLOOR * (t + 1))) : own;
  }
  return scales;
}

// --- At the nodes -----------------------------------------------------------------------------------------------------

interface Nodes {
  /** Distances beyond `near`. */
  at: Float64Array;
  /** exp(bias - top) over its scale: 1, or less. */
  value: Float64Array;
  /** 1 / scale. */
  weight: Float64Array;
  span: number;
  near: number;
}

/** Distances at equal ratios, whole; null where the bias is not finite, or weights vanish. */
function nodesOf({ bias, first, from, to }: Lags, near: number, top: number, scales: Float64Array): Nodes | null {
  const count = Math.min(NODES, to - from + 1);
  const places = new Set<number>();
  for (let n = 0; n < count; n++) places.add(Math.round(from * (to / from) ** (count > 1 ? n / (count - 1) : 0)));
  const at = Float64Array.from(places);
  const value = new Float64Array(at.length);
  const weight = new Float64Array(at.length);
  for (const [n, t] of at.entries()) {
    const scale = scales[t - from];
    if (!(scale > 1e-300 && scale < Infinity)) return null;
    weight[n] = 1 / scale;
    value[n] = Math.exp(bias[first + t] - top) / scale;
    at[n] = t - near;
  }
  return { at, value, weight, span: to - near + 1, near };
}

/** Least and largest rate to begin with. */
function rangeOf({ span, near }: Nodes): [number, number] {
  return [1 / (WIDER * span), WIDER / near];
}

/** Rates at equal ratios between the two. */
function spread([low, high]: [number, number], count: number): number[] {
  return Array.from({ length: count }, (_, n) => low * (high / low) ** ((n + 0.5) / count));
}

/** The error at the nodes of three times as many decays at fixed rates: if that is too large, so are all others. */
function errorOfMany(nodes: Nodes): number {
  const { residual } = project(nodes, [0, ...spread(rangeOf(nodes), 3 * MAX_DECAYS - 1)], null);
  // A single decay may be faster than any of these: a bias that is linear.
  return Math.min(largest(residual), largest(project(nodes, [firstRate(nodes)], null).residual));
}

/** The rates and that one more which leaves least. */
function withAnother(nodes: Nodes, rates: readonly number[]): number[] {
  const sorted = [...rates].sort((a, b) => a - b);
  const [low, high] = rangeOf(nodes);
  const places = sorted.length === 0 ? [firstRate(nodes), ...spread([low, high], 8)] : [Math.min(low, sorted[0] / 4)];
  for (const [n, rate] of sorted.entries()) places.push(n + 1 < sorted.length ? Math.sqrt(rate * sorted[n + 1]) : rate * 4);
  const all = places.map((rate) => [...sorted, rate]);
  const left = all.map((own) => project(nodes, own, null).squares);
  return all[left.indexOf(Math.min(...left))];
}

/** Least squares of the relative error at the nodes. */
function descend(nodes: Nodes, rates: number[]): number[] {
  const even = new Float64Array(nodes.at.length).fill(1);
  let current = project(nodes, rates, even);
  let damping = 1e-3;
  for (let step = 0; step < STEPS && damping < 1e6; step++) {
    const moved = improve(nodes, rates, current, even, damping);
    damping = moved ? Math.max(damping / 4, 1e-9) : damping * 8;
    if (!moved) continue;
    const left = moved.projection.squares / current.squares;
    [rates, current] = [moved.rates, moved.projection];
    if (left > 0.98) break;
  }
  return rates;
}

/** Decays whose largest error at the nodes is below the target, if that can be had from these, of least squares. */
function level(nodes: Nodes, rates: number[], target: number): { rates: number[]; weights: number[]; error: number } {
  const share = new Float64Array(nodes.at.length).fill(1);
  let current = project(nodes, rates, share);
  let best = { rates, weights: current.weights, error: largest(current.residual) };
  let damping = 1e-3;
  for (let step = 0; step < REWEIGHTS && best.error > ENOUGH * target && best.error <= WITHIN * target; step++) {
    let sum = 0;
    const size = largest(current.residual);
    for (const [n, r] of current.residual.entries()) sum += share[n] *= 0.2 + Math.abs(r) / size;
    for (const n of share.keys()) share[n] *= share.length / sum;
    current = project(nodes, rates, share);
    const moved = improve(nodes, rates, current, share, damping);
    damping = moved ? Math.max(damping / 4, 1e-9) : damping * 8;
    if (moved) [rates, current] = [moved.rates, moved.projection];
    const error = largest(current.residual);
    if (error < best.error) best = { rates, weights: current.weights, error };
  }
  return best;
}

/** Of a bias that is linear: its slope. */
function firstRate({ at, value, weight }: Nodes): number {
  // over the first decade of the weights, where these are not below the floor
  const log = (n: number) => Math.log(value[n] / weight[n]);
  let end = at.length - 1;
  while (end > 1 && (value[end] < 1 || log(end) < log(0) - 2.3)) end--;
  return end > 0 ? Math.max((log(0) - log(end)) / (at[end] - at[0]), 0) : 0;
}

interface Projection {
  weights: number[];
  /** value - sum, relative. */
  residual: Float64Array;
  /** Orthonormal columns of the weighed decays. */
  basis: Float64Array[];
  squares: number;
}

/** The best weights for these rates: least squares by Gram and Schmidt, twice; `share`: how much each node counts, null: alike. */
function project(nodes: Nodes, rates: readonly number[], share: Float64Array | null): Projection {
  const { at, value, weight } = nodes;
  const root = share ? share.map(Math.sqrt) : null;
  const columns = rates.map((rate) => at.map((t, n) => Math.exp(-rate * t) * weight[n] * (root ? root[n] : 1)));
  const basis: Float64Array[] = [];
  const upper: number[][] = [];
  for (const column of columns) {
    const own = Float64Array.from(column);
    const size = Math.sqrt(dot(own, own));
    const above = basis.map(() => 0);
    for (let round = 0; round < 2; round++) {
      for (const [m, other] of basis.entries()) {
        const part = dot(other, own);
        above[m] += part;
        for (let n = 0; n < own.length; n++) own[n] -= part * other[n];
      }
    }
    const length = Math.sqrt(dot(own, own));
    // A column that depends on the others takes no part.
    const usable = length > 1e-11 * size;
    for (let n = 0; n < own.length; n++) own[n] = usable ? own[n] / length : 0;
    basis.push(own);
    upper.push([...above, usable ? length : Infinity]);
  }
  const left = value.map((one, n) => one * (root ? root[n] : 1));
  const parts = basis.map((one) => {
    const part = dot(one, left);
    for (let n = 0; n < left.length; n++) left[n] -= part * one[n];
    return part;
  });
  const weights = new Array<number>(rates.length).fill(0);
  for (let m = rates.length - 1; m >= 0; m--) {
    let sum = parts[m];
    for (let k = m + 1; k < rates.length; k++) sum -= upper[k][m] * weights[k];
    weights[m] = sum / upper[m][m];
  }
  const residual = left.map((one, n) => one / (root ? root[n] : 1));
  return { weights, residual, basis, squares: dot(left, left) };
}

/** A damped Gauss-Newton step on the logarithms of the rates; null when it makes things worse. */
function improve(
  nodes: Nodes,
  rates: readonly number[],
  { weights, residual, basis }: Projection,
  share: Float64Array,
  damping: number,
): { rates: number[]; projection: Projection } | null {
  const { at, weight } = nodes;
  // the derivative by log rate, without what the weights make up for
  const jacobian = rates.map((rate, m) => {
    const column = at.map(
      (t, n) => -weights[m] * rate * t * Math.exp(-rate * t) * weight[n] * Math.sqrt(share[n]),
    );
    for (const one of basis) {
      const part = dot(one, column);
      for (let n = 0; n < column.length; n++) column[n] -= part * one[n];
    }
    return column;
  });
  const left = residual.map((one, n) => one * Math.sqrt(share[n]));
  const system = jacobian.map((column, m) => {
    const row = Float64Array.from([...jacobian.map((other) => dot(column, other)), dot(column, left)]);
    row[m] += damping * row[m] + 1e-300;
    return row;
  });
  const step = solve(system);
  const size = Math.max(...step.map(Math.abs));
  if (!(size < Infinity)) return null;
  const limit = size > 1 ? 1 / size : 1;
  const next = rates.map((rate, m) => rate * Math.exp(step[m] * limit));
  const projection = project(nodes, next, share);
  let before = 0;
  for (let n = 0; n < left.length; n++) before += left[n] * left[n];
  return projection.squares < before ? { rates: next, projection } : null;
}

/** Rows hold a positive definite matrix and, last, the right-hand side (overwritten). */
function solve(rows: Float64Array[]): number[] {
  const size = rows.length;
  for (let n = 0; n < size; n++) {
    for (let r = n + 1; r < size; r++) {
      const factor = rows[r][n] / rows[n][n];
      for (let c = n; c <= size; c++) rows[r][c] -= factor * rows[n][c];
    }
  }
  const x = new Array<number>(size).fill(0);
  for (let n = size - 1; n >= 0; n--) {
    let sum = rows[n][size];
    for (let c = n + 1; c < size; c++) sum -= rows[n][c] * x[c];
    x[n] = sum / rows[n][n];
  }
  return x;
}

function dot(x: ArrayLike<number>, y: ArrayLike<number>): number {
  let sum = 0;
  for (let n = 0; n < x.length; n++) sum += x[n] * y[n];
  return sum;
}

function largest(values: Float64Array): number {
  let most = 0;
  for (const value of values) if (!(Math.abs(value) <= most)) most = Math.abs(value);
  return most;
}

// --- At every distance --------------------------------------------------------------------------------------------------

/** Exponentials are taken anew after so many steps. */
const AFRESH = 64;

/** After a chunk the engine's states decay by a float32 factor, so that rates are such that this is exact. */
function roundRate(rate: number): number {
  const factor = Math.fround(Math.exp(-CHUNK * rate));
  return factor > 1e-30 ? -Math.log(factor) / CHUNK : rate;
}

/** The error of rounded weights at every distance. */
function measure(
  { bias, first, from, to }: Lags,
  near: number,
  top: number,
  scales: Float64Array,
  found: { rates: number[]; weights: number[] },
): Fit {
  const rates = found.rates.map(roundRate);
  const rounded = found.weights.map(Math.fround);
  const steps = rates.map((rate) => Math.exp(-rate));
  const own = new Float64Array(rates.length);
  let [error, gain, floored] = [0, 1, false];
  for (let t = from; t <= to; t++) {
    if ((t - from) % AFRESH === 0) for (const [n, rate] of rates.entries()) own[n] = rounded[n] * Math.exp(-rate * (t - near));
    let [sum, size] = [0, 0];
    for (let n = 0; n < own.length; n++) {
      sum += own[n];
      size += Math.abs(own[n]);
      own[n] *= steps[n];
    }
    const exact = Math.exp(bias[first + t] - top);
    const scale = scales[t - from];
    if (exact < scale) floored = true;
    const off = Math.abs(sum - exact) / scale;
    if (!(off <= error)) error = Number.isNaN(off) ? Infinity : off;
    gain = Math.max(gain, size / scale);
  }
  return { rates, weights: rounded, error, floored, gain };
}
