// SPDX-License-Identifier: MIT
//
// Whether a bias goes through decaying states: causal, finite, and beyond a near band a sum of few decays (decays.ts) within a
// share of the tolerance. Under `auto` the fit is tried where it takes little of the exact engine's time; a bias that has none goes
// to Fourier transforms.

import { CHUNK, costOfDecays, exactCost, FIT_DECAYS, type Pass } from './cost.js';
import { fitDecays, MAX_DECAYS, type Decays, type Lags } from './decays.js';
import { FORBIDDEN, foreignTo } from './scores.js';
import type { Problem } from './validate.js';

/** Share of the tolerance that the error of the fit may take: it adds to that of the polynomial. */
const SHARE = 1 / 3;

/** Share of the exact engine's cost that a fit may take which finds nothing. */
const LOSS = 0.05;

/** Positions behind the last key times the smallest rate: past that weights leave the range of float32. */
const MOST_EXCESS = 40;

/** Larger biases are not kept. */
const MOST_KEPT = 2 ** 21;

/** What came of the last bias of an instance: backward comes after forward, and one step after another. */
export class DecayFits {
  #last: { bias: Float32Array; rest: string; found: ReturnType<typeof fitDecays> } | null = null;

  /** As fitDecays, from memory where bias and all else are the same. The cost of both passes decides, so that both get the same. */
  of(problem: Problem, target: number): ReturnType<typeof fitDecays> {
    const bias = problem.bias!;
    const inside = isInside(problem);
    const rest = JSON.stringify([shapeOf(problem), inside, target]);
    const same = this.#last?.rest === rest && this.#last.bias.length === bias.length;
    if (same && this.#last!.bias.every((value, n) => value === bias[n])) return this.#last!.found;
    const found = fitDecays(lagsOf(problem), target, costOfDecays(problem), inside);
    this.#last = bias.length <= MOST_KEPT ? { bias: bias.slice(), rest, found } : null;
    return found;
  }

  /** Forgets it. */
  clear(): void {
    this.#last = null;
  }
}

/** All that a fit depends on beside the bias. */
function shapeOf({ heads, kvHeads, batch, queryLength, keyLength, headDim, valueDim, queryOffset, window }: Problem): unknown[] {
  return [heads, kvHeads, batch, queryLength, keyLength, headDim, valueDim, queryOffset, window[0]];
}

/** Whether whoever sees a key at one distance sees others at all smaller ones, and errors may be relative to these. */
function isInside({ queryOffset, queryLength, keyLength, guarantee }: Problem): boolean {
  return queryOffset + queryLength <= keyLength && guarantee === 'sampled';
}

/**
 * The decays for a call; null where its bias does not go through states, with the least error if that is why.
 *
 * @throws RangeError for method 'polynomial' with a bias that no decays fit.
 */
export function decaysOf(name: string, problem: Problem, pass: Pass, fits: DecayFits): Pick<Problem, 'decays' | 'misfit'> {
  const none = { decays: null, misfit: null };
  const { bias, causal, method, tolerance } = problem;
  if (!bias || !causal || (method !== 'auto' && method !== 'polynomial')) return none;
  if (foreignTo('polynomial', { ...problem, bias: null }).length > 0 || problem.segments.length > 1 || problem.alibi) return none;
  if (method === 'auto' && FIT_DECAYS > LOSS * exactCost(problem, pass)) return none;
  const target = SHARE * tolerance;
  const { decays, error } = fits.of(problem, target);
  const usable = decays && isUsable(problem, decays);
  if (!usable && method === 'polynomial') {
    const what = decays ? 'which takes weights out of the range of float32' : `the best of ${MAX_DECAYS} or fewer is off by ${error.toExponential(1)}, above ${target.toExponential(1)}`;
    throw new RangeError(`${name}: method 'polynomial' needs a bias that is a sum of a few decays far away: ${what}`);
  }
  return usable ? { decays, misfit: null } : { decays: null, misfit: decays ? null : error };
}

/** The biases of all heads, as far as they are in sight. */
function lagsOf({ bias, heads, queryOffset, queryLength, keyLength, window: [left] }: Problem): Lags[] {
  const diagonals = queryLength + keyLength - 1;
  const own = bias!.length > diagonals ? heads : 1;
  const last = queryOffset + queryLength - 1;
  return Array.from({ length: own }, (_, head) => ({
    bias: bias!,
    first: head * diagonals + keyLength - 1 - queryOffset,
    from: Math.max(0, queryOffset - keyLength + 1),
    to: left < 0 ? last : Math.min(left, last),
  }));
}

/** Whether near pairs have finite biases, and weights of queries far behind the keys stay in range. */
function isUsable(problem: Problem, { near, count, rates }: Decays): boolean {
  const { queryOffset, queryLength, keyLength } = problem;
  const excess = Math.max(0, queryOffset + queryLength - keyLength - near);
  return lagsOf(problem).every(({ bias, first, from, to }, head) => {
    const least = Math.min(...rates.subarray(head * count, (head + 1) * count));
    if (least * excess > MOST_EXCESS) return false;
    const end = Math.min(near + CHUNK, queryOffset + queryLength);
    for (let t = from; t < end; t++) if (!(bias[first + t] > FORBIDDEN && bias[first + t] < Infinity)) return false;
    return from <= to || excess === 0;
  });
}
