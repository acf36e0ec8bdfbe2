// SPDX-License-Identifier: MIT
//
// Medians, quantiles, slopes on logarithmic axes, and the package's error measures. Pure.
//
//   output error      max |out^ - out| over max |v - c|, c the midrange of each column of v
//   gradient error    |dX^ - dX| / |dX| in the Frobenius norm
//
// They are those of `tolerance` in web/types.ts; the first is the l-infinity error of Alman, Song (arXiv 2302.13214) in a form
// that does not change when a constant is added to a column of v.

/** @param {ArrayLike<number>} values Not empty. */
export function quantile(values, share) {
  const sorted = Float64Array.from(values).sort();
  const at = share * (sorted.length - 1);
  const below = Math.floor(at);
  const above = Math.min(below + 1, sorted.length - 1);
  return sorted[below] + (at - below) * (sorted[above] - sorted[below]);
}

export const median = (values) => quantile(values, 0.5);

/**
 * y = factor x^slope by least squares on the logarithms, of the points with positive finite x and y.
 *
 * @param {{ x: number, y: number }[]} points
 * @returns {{ slope: number, factor: number } | null} null with fewer than two different x.
 */
export function powerLaw(points) {
  const usable = points.filter(({ x, y }) => x > 0 && y > 0 && Number.isFinite(x) && Number.isFinite(y));
  const mean = (of) => usable.reduce((sum, point) => sum + Math.log(of(point)), 0) / usable.length;
  const [meanX, meanY] = [mean(({ x }) => x), mean(({ y }) => y)];
  let [xx, xy] = [0, 0];
  for (const { x, y } of usable) {
    xx += (Math.log(x) - meanX) ** 2;
    xy += (Math.log(x) - meanX) * (Math.log(y) - meanY);
  }
  if (!(xx > 0)) return null;
  return { slope: xy / xx, factor: Math.exp(meanY - (xy / xx) * meanX) };
}

/** Half the widest range of a column of v, [rows, columns]. */
export function halfRange(v, columns) {
  let widest = 0;
  for (let column = 0; column < columns; column++) {
    let [low, high] = [Infinity, -Infinity];
    for (let n = column; n < v.length; n += columns) {
      if (v[n] < low) low = v[n];
      if (v[n] > high) high = v[n];
    }
    widest = Math.max(widest, (high - low) / 2);
  }
  return widest;
}

/** Infinity where the output is not finite. */
export function outputError(got, exact, halfRangeOfV) {
  let worst = 0;
  for (let n = 0; n < exact.length; n++) {
    const difference = Math.abs(got[n] - exact[n]);
    if (!Number.isFinite(difference)) return Infinity;
    if (difference > worst) worst = difference;
  }
  return worst / halfRangeOfV;
}

/** Infinity where the values are not finite. */
export function relativeError(got, exact) {
  let [difference, size] = [0, 0];
  for (let n = 0; n < exact.length; n++) {
    difference += (got[n] - exact[n]) ** 2;
    size += exact[n] ** 2;
  }
  return Number.isFinite(difference) ? Math.sqrt(difference / size) : Infinity;
}

/** The number, or null where it is none: JSON has no NaN and no Infinity. */
export const finite = (value) => (Number.isFinite(value) ? value : null);

/**
 * The smallest x from which on `challenger` is below `holder` at every common x; null when it is not below at the last one.
 *
 * @param {{ x: number, y: number }[]} challenger
 * @param {{ x: number, y: number }[]} holder
 */
export function takesOver(challenger, holder) {
  const other = new Map(holder.map(({ x, y }) => [x, y]));
  const common = challenger.filter(({ x }) => other.has(x)).sort((a, b) => b.x - a.x);
  let from = null;
  for (const { x, y } of common) {
    if (!(y < other.get(x))) break;
    from = x;
  }
  return from;
}
