// SPDX-License-Identifier: MIT
//
// How the Toeplitz engine cuts up its work: scores into terms (terms.c), sequences into blocks (convolution.h), terms and columns of
// values into batches that are transformed together (toeplitz.c).

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

/** Features of the polynomial engine: the monomials of degree 0 to g in D variables, C(D + g, g). Exact below 2^53. */
export function rank(headDim: number, degree: number): number {
  let count = 1;
  for (let m = 1; m <= degree; m++) count = (count * (headDim + m)) / m;
  return count;
}

/** Terms of the engine, and how many of them are real. */
export interface Terms {
  count: number;
  real: number;
}

/** Those of theory.terms; all are real but for rotations, where it is those that are their own conjugates. */
export function termsAndReal(args: { headDim: number; degree: number; rotaryDim?: number; places?: number }): Terms {
  const { headDim, degree, rotaryDim = 0, places } = args;
  const all = rank(places ?? headDim, degree);
  if (places !== undefined || rotaryDim === 0) return { count: all, real: all };
  let real = 0;
  for (let m = 0; 2 * m <= degree; m++) real += rank(rotaryDim / 2 - 1, m) * rank(headDim - rotaryDim, degree - 2 * m);
  return { count: (all + real) / 2, real };
}

/**
 * Groups of four terms, and batches of all: four complex columns, or of real terms eight in pairs. Those that do not fill a group of
 * their own join complex ones where that makes fewer batches.
 */
export function batchesOf({ count, real }: Terms, valueDim: number): { groups: number; batches: number } {
  const columns = valueDim + 1;
  const own = [Math.ceil(real / LANES), Math.floor(real / LANES)].map((groups) => {
    const others = Math.ceil((count - Math.min(LANES * groups, real)) / LANES);
    return { groups: groups + others, batches: groups * Math.ceil(columns / 2) + others * columns };
  });
  return own[0].batches < own[1].batches ? own[0] : own[1];
}
