// SPDX-License-Identifier: MIT
//
// How far slopes let a query see: scores lie within a radius r of 0, so that beyond some distance what a slope m takes off leaves nothing
// that float32 would notice. Samples of rows, and of keys, then need not look further.
//
// The query's own key, at distance 0, weighs exp(-r) at least; all keys from distance t on together exp(r - m t) / (1 - exp(-m)) at most.

import { CHUNK } from './cost.js';
import type { Geometry } from './validate.js';

/** Keys that together weigh less than exp(-DIGITS) of the others count as nothing: 2^-29, and room for a polynomial that is not below exp. */
const DIGITS = 24;

/**
 * The left side of a window in which a query with this slope has all keys that count, as the polynomial engine weighs them: two chunks more,
 * as it weighs those at the edge of a window exactly. Infinity where that is not known.
 *
 * @param radius of all scores, but for what the mean key adds to all of a row.
 */
export function reachOf(g: Geometry, slope: number, radius: number): number {
  const others = g.bias || g.mask || g.softcap || g.sinks || g.relative || g.relativePositions;
  const ownKey = g.causal && g.queryOffset + g.queryLength <= g.keyLength; // every query that sees a key sees the one at its place
  if (!ownKey || others || !(slope > 0)) return Infinity;
  const reach = 2 * CHUNK + Math.ceil((2 * radius + DIGITS - Math.log(-Math.expm1(-slope))) / slope);
  return reach < g.queryOffset + g.queryLength ? reach : Infinity; // NaN too
}
