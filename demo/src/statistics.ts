// SPDX-License-Identifier: MIT
//
// Error measures and what one reads off a chart with logarithmic axes. Pure.

/**
 * max |approximate - exact| / max |v - c|, c the midrange of each column of v: the papers' measure, which does not change
 * when a constant is added to a column. Rows have `dim` values. NaN when the approximation is not finite.
 */
export function outputError(approximate: Float32Array, exact: Float32Array, v: Float32Array, dim: number): number {
  let spread = 0;
  for (let column = 0; column < dim; column++) {
    let low = Infinity;
    let high = -Infinity;
    for (let i = column; i < v.length; i += dim) {
      low = Math.min(low, v[i]!);
      high = Math.max(high, v[i]!);
    }
    spread = Math.max(spread, (high - low) / 2);
  }
  let worst = 0;
  for (let i = 0; i < exact.length; i++) {
    const difference = Math.abs(approximate[i]! - exact[i]!);
    if (!(difference <= worst)) worst = difference;
    if (Number.isNaN(worst)) return NaN;
  }
  return worst / spread;
}

/** |approximate - exact| / |exact| in the Frobenius norm. */
export function relativeError(approximate: Float32Array, exact: Float32Array): number {
  let difference = 0;
  let norm = 0;
  for (let i = 0; i < exact.length; i++) {
    difference += (approximate[i]! - exact[i]!) ** 2;
    norm += exact[i]! ** 2;
  }
  return Math.sqrt(difference / norm);
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

export interface XY {
  readonly x: number;
  readonly y: number;
}

/** y = factor * x^slope, by least squares on the logarithms; null with fewer than three points. */
export function powerLaw(points: readonly XY[]): { slope: number; factor: number } | null {
  if (points.length < 3) return null;
  const n = points.length;
  const meanX = points.reduce((sum, p) => sum + Math.log(p.x), 0) / n;
  const meanY = points.reduce((sum, p) => sum + Math.log(p.y), 0) / n;
  let xx = 0;
  let xy = 0;
  for (const p of points) {
    xx += (Math.log(p.x) - meanX) ** 2;
    xy += (Math.log(p.x) - meanX) * (Math.log(p.y) - meanY);
  }
  const slope = xy / xx;
  return { slope, factor: Math.exp(meanY - slope * meanX) };
}

/**
 * Where `falling` first goes below `rising`, both given at increasing x, between two common abscissae by a straight line on
 * logarithmic axes. 'before' when it is below from the first one on, 'after' when it never is, null without common points.
 */
export function crossover(falling: readonly XY[], rising: readonly XY[]): XY | 'before' | 'after' | null {
  const other = new Map(rising.map((p) => [p.x, p.y]));
  const common = falling.filter((p) => other.has(p.x)).sort((a, b) => a.x - b.x);
  let last: { x: number; y: number; gap: number } | null = null;
  for (const p of common) {
    const gap = Math.log(p.y) - Math.log(other.get(p.x)!);
    if (gap <= 0) {
      if (last === null) return 'before';
      const t = last.gap / (last.gap - gap);
      const between = (a: number, b: number) => Math.exp(Math.log(a) * (1 - t) + Math.log(b) * t);
      return { x: between(last.x, p.x), y: between(last.y, p.y) };
    }
    last = { x: p.x, y: p.y, gap };
  }
  return last === null ? null : 'after';
}
