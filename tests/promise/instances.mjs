// SPDX-License-Identifier: MIT
//
// Inputs on which a tolerance has to be kept: random ones, and some that were made to break polynomials or samples.

/**
 * @typedef {import('../../dist/index.js').BackwardArgs} BackwardArgs
 * @typedef {{ uniform(): number, normal(): number, whole(below: number): number }} Random
 */

/** Seeded random numbers (mulberry32). @returns {Random} */
export function random(seed) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  const normal = () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  return { uniform, normal, whole: (below) => Math.floor(below * uniform()) };
}

/** Rows of x [rows][width], as views. */
const rowsOf = (x, width) => Array.from({ length: x.length / width }, (_, n) => x.subarray(n * width, (n + 1) * width));

const fillUniform = ({ q, k }, bound, r) => {
  for (const x of [q, k]) x.forEach((_, n) => (x[n] = bound * (2 * r.uniform() - 1)));
};

/**
 * How q and k are made, by name: entries stay within [-bound, bound] except where the name says otherwise. Each function gets
 * arrays of zeros, the width of a row, the bound and random numbers; v and dOutput are normal unless it changes them.
 *
 * @type {Record<string, (x: { q: Float32Array, k: Float32Array, v: Float32Array, dOutput: Float32Array }, width: number, bound: number, r: Random, valueWidth: number) => void>}
 */
export const KINDS = {
  uniform: (x, _, bound, r) => fillUniform(x, bound, r),

  /** Every entry at the bound, signs by chance. */
  signs: ({ q, k }, _, bound, r) => {
    for (const x of [q, k]) x.forEach((_, n) => (x[n] = r.uniform() < 0.5 ? -bound : bound));
  },

  /** Signs that alternate along a row and from row to row. */
  alternating: ({ q, k }, width, bound) => {
    for (const x of [q, k]) rowsOf(x, width).forEach((row, n) => row.forEach((_, d) => (row[d] = (n + d) % 2 === 0 ? bound : -bound)));
  },

  /** All keys and queries along one vector, by different lengths. */
  aligned: ({ q, k }, width, bound, r) => {
    const direction = Float32Array.from({ length: width }, () => (r.uniform() < 0.5 ? -bound : bound));
    for (const x of [q, k]) {
      for (const row of rowsOf(x, width)) {
        const length = 2 * r.uniform() - 1;
        row.forEach((_, d) => (row[d] = length * direction[d]));
      }
    }
  },

  /** All queries the same, all keys the same. */
  equal: ({ q, k }, width, bound, r) => {
    for (const x of [q, k]) {
      const one = Float32Array.from({ length: width }, () => bound * (2 * r.uniform() - 1));
      for (const row of rowsOf(x, width)) row.set(one);
    }
  },

  /** Keys in a few tight groups, queries near their centres. */
  clusters: ({ q, k }, width, bound, r) => {
    const centres = Array.from({ length: 4 }, () => Float32Array.from({ length: width }, () => 0.9 * bound * (2 * r.uniform() - 1)));
    for (const x of [q, k]) {
      for (const row of rowsOf(x, width)) {
        const centre = centres[r.whole(centres.length)];
        row.forEach((_, d) => (row[d] = centre[d] + 0.1 * bound * (2 * r.uniform() - 1)));
      }
    }
  },

  /** One key four times as large as the bound allows. */
  'one huge key': (x, width, bound, r) => {
    fillUniform(x, bound, r);
    const row = rowsOf(x.k, width)[r.whole(x.k.length / width)];
    row.forEach((_, d) => (row[d] = r.uniform() < 0.5 ? -4 * bound : 4 * bound));
  },

  /** Normal vectors times log-normal lengths. */
  'heavy tails': ({ q, k }, width, bound, r) => {
    for (const x of [q, k]) {
      for (const row of rowsOf(x, width)) {
        const length = 0.5 * bound * Math.exp(0.4 * r.normal());
        row.forEach((_, d) => (row[d] = length * r.normal()));
      }
    }
  },

  /** A tenth of the queries and a few keys share a direction in which others have nothing; the largest vectors are elsewhere. */
  hidden: (x, width, bound, r) => {
    fillUniform(x, 0.5 * bound, r);
    const last = width - 1;
    const special = width > 2 ? [0, 1] : [0, 0];
    for (const row of rowsOf(x.q, width)) {
      row[last] = r.uniform() < 0.1 ? bound : 0;
      if (row[last] === 0 && r.uniform() < 0.05) row[special[0]] = 2 * bound;
      else row[special[0]] = 0;
    }
    for (const row of rowsOf(x.k, width)) {
      row[last] = r.uniform() < 0.05 ? bound : 0;
      row[special[0]] = 0;
    }
  },

  /** Values that are all but constant, with one key in eleven that differs: softmax weights show one by one. */
  'few values': (x, _, bound, r, valueDim) => {
    fillUniform(x, bound, r);
    rowsOf(x.v, valueDim).forEach((row, n) => row.fill(n % 11 === 3 ? -1 : 1));
  },

  /** All queries, and all keys, near one vector: as it were by the bias of a layer before. */
  'in common': ({ q, k }, width, bound, r) => {
    for (const x of [q, k]) {
      const one = Float32Array.from({ length: width }, () => (r.uniform() < 0.5 ? -bound : bound));
      for (const row of rowsOf(x, width)) row.forEach((_, d) => (row[d] = 0.6 * one[d] + 0.4 * bound * (2 * r.uniform() - 1)));
    }
  },
};

/** A seeded instance: arrays and setting. */
export function instance({ kind, bound, seed, shape, ...setting }) {
  const { batch = 1, heads, kvHeads = heads, queryLength, keyLength = queryLength, headDim, valueDim = headDim } = shape;
  const r = random(seed);
  const normal = (count) => Float32Array.from({ length: count }, r.normal);
  const arrays = {
    q: new Float32Array(batch * heads * queryLength * headDim),
    k: new Float32Array(batch * kvHeads * keyLength * headDim),
    v: normal(batch * kvHeads * keyLength * valueDim),
    dOutput: normal(batch * heads * queryLength * valueDim),
  };
  KINDS[kind](arrays, headDim, bound, r, valueDim);
  return { ...arrays, shape, ...setting };
}
