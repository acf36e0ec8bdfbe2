// SPDX-License-Identifier: MIT
//
// Where labels go so that they do not cover each other. Pure.

/** Keeps labels of one height in decades apart from each other, each as near to its place as that allows. */
export function spread<T extends { x: number; y: number }>(labels: T[], decades: number): T[] {
  const sorted = [...labels].sort((a, b) => a.y - b.y);
  const heights = sorted.map((label) => Math.log10(label.y));
  for (let pass = 0; pass < 50; pass++) {
    for (let i = 1; i < sorted.length; i++) {
      const overlap = decades - (heights[i]! - heights[i - 1]!);
      if (overlap > 0 && sorted[i]!.x === sorted[i - 1]!.x) {
        heights[i] = heights[i]! + overlap / 2;
        heights[i - 1] = heights[i - 1]! - overlap / 2;
      }
    }
  }
  return sorted.map((label, i) => ({ ...label, y: 10 ** heights[i]! }));
}

/** Labels above an axis, each in the lowest row where the one before is at least `ratio` away. */
export function rowed<T extends { x: number }>(labels: readonly T[], ratio: number): (T & { row: number })[] {
  const last: number[] = [];
  return [...labels]
    .sort((a, b) => a.x - b.x)
    .map((label) => {
      const free = last.findIndex((x) => label.x >= ratio * x);
      const row = free < 0 ? last.length : free;
      last[row] = label.x;
      return { ...label, row };
    });
}
