// SPDX-License-Identifier: MIT
//
// How the Toeplitz engine cuts up its work: sequences into blocks (convolution.h), terms and columns of values into batches that are
// transformed together (toeplitz.c).

/** Terms that are transformed in lockstep. */
const LANES = 4;

/** Blocks of queries and of keys, and their size, by the rule of ra_convolution_block. */
export function blocksOf(g: { queryLength: number; keyLength: number }): { rows: number; columns: number; block: number } {
  let best = { rows: 1, columns: 1, block: 32, time: Infinity }; // where no length is above 16
  for (let power = 32; power <= 2 ** 14 && power / 2 < Math.max(g.queryLength, g.keyLength); power *= 2) {
    for (const odd of [4, 5, 6]) {
      const block = (power / 4) * odd;
      const [rows, columns] = [Math.ceil(g.queryLength / block), Math.ceil(g.keyLength / block)];
      const transforms = (rows + columns) * 10 * block * (Math.log2(power) + 0.3 * (odd - 4)) * (block > 4096 ? 1.15 : 1);
      const time = transforms + rows * columns * 8 * block;
      if (block % 32 === 0 && block <= 2 ** 14 && time < best.time) best = { rows, columns, block, time };
    }
  }
  return best;
}

/** Groups of four terms, and batches of each: four complex columns, or eight real ones in pairs. */
export function batchesOf(terms: number, valueDim: number, complex: boolean): { groups: number; steps: number } {
  const columns = valueDim + 1;
  return { groups: Math.ceil(terms / LANES), steps: complex ? columns : Math.ceil(columns / 2) };
}
