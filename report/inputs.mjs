// SPDX-License-Identifier: MIT
//
// Seeded inputs: the same seed gives the same numbers on every machine. Arrays are [length, dim], float32.
//
//   uniformInputs    q and k uniform in [-B, B], the bounded entries of Alman, Song (arXiv 2302.13214, 2505.11892, 2412.17316);
//                    v and the gradient of the output uniform in [-1, 1]
//   PATTERNS         q and k as one meets them, some of which keep no bound: normal, log-normal norms, clustered keys, one
//                    huge key, one huge channel

/** Pseudo-random numbers in [0, 1): mulberry32 by Tommy Ettinger, 32 bits of state. */
export function mulberry32(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Normal numbers, mean 0 and variance 1, by Box and Muller. */
function normals(seed) {
  const next = mulberry32(seed);
  return () => Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next());
}

function fill(count, next) {
  const array = new Float32Array(count);
  for (let n = 0; n < count; n++) array[n] = next();
  return array;
}

/** Uniform in [-bound, bound]. */
export function uniform(count, bound, seed) {
  const next = mulberry32(seed);
  return fill(count, () => (2 * next() - 1) * bound);
}

export function uniformInputs({ length, headDim, bound, seed = 1 }) {
  const size = length * headDim;
  const stream = (n) => 4 * seed + n;
  return {
    q: uniform(size, bound, stream(0)),
    k: uniform(size, bound, stream(1)),
    v: uniform(size, 1, stream(2)),
    dOutput: uniform(size, 1, stream(3)),
  };
}

/** q or k of normal entries, each row times what `factor` says. */
function rows(length, headDim, seed, factor) {
  const next = normals(seed);
  const array = fill(length * headDim, next);
  for (let i = 0; i < length; i++) {
    const times = factor(i);
    for (let d = 0; d < headDim; d++) array[i * headDim + d] *= times;
  }
  return array;
}

const pair = (make) => (length, headDim, seed) => ({ q: make(length, headDim, 2 * seed), k: make(length, headDim, 2 * seed + 1) });
const normal = (deviation) => pair((length, headDim, seed) => rows(length, headDim, seed, () => deviation));

/** Makers of q and k by name: (length, headDim, seed) => { q, k }. */
export const PATTERNS = {
  'uniform in [−1, 1]': pair((length, headDim, seed) => uniform(length * headDim, 1, seed)),
  'normal (deviation 0.5)': normal(0.5),
  'normal (deviation 1)': normal(1),
  'log-normal norms': pair((length, headDim, seed) => {
    const next = normals(seed + 1000);
    return rows(length, headDim, seed, () => 0.5 * Math.exp(0.5 * next()));
  }),
  // Eight centres of deviation 1, and a tenth of that around them
  'clustered keys': (length, headDim, seed) => {
    const { q, k } = normal(0.5)(length, headDim, seed);
    const centres = rows(8, headDim, seed + 2000, () => 1);
    const next = mulberry32(seed + 3000);
    for (let j = 0; j < length; j++) {
      const centre = Math.floor(8 * next()) * headDim;
      for (let d = 0; d < headDim; d++) k[j * headDim + d] = centres[centre + d] + 0.2 * k[j * headDim + d];
    }
    return { q, k };
  },
  'one huge key': (length, headDim, seed) => {
    const { q, k } = normal(0.5)(length, headDim, seed);
    const j = Math.floor(mulberry32(seed + 4000)() * length);
    for (let d = 0; d < headDim; d++) k[j * headDim + d] *= 16;
    return { q, k };
  },
  'one huge channel': (length, headDim, seed) => {
    const { q, k } = normal(0.5)(length, headDim, seed);
    for (let i = 0; i < length; i++) {
      q[i * headDim] *= 4;
      k[i * headDim] *= 4;
    }
    return { q, k };
  },
};
