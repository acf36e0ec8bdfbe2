// SPDX-License-Identifier: MIT
//
// Seeded inputs: the same seed gives the same numbers everywhere. Arrays are [length, dim], so that a shorter sequence is
// the beginning of a longer one. Pure.

/** Pseudo-random numbers in [0, 1): mulberry32 by Tommy Ettinger, 32 bits of state. */
export function mulberry32(seed: number): () => number {
  let a = seed >>> 0;
  return () => {
    a = (a + 0x6d2b79f5) >>> 0;
    let t = Math.imul(a ^ (a >>> 15), a | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

export interface Inputs {
  readonly q: Float32Array;
  readonly k: Float32Array;
  readonly v: Float32Array;
  readonly dOutput: Float32Array;
}

/** Entries uniform in [-1, 1], made when first asked for and kept. */
export class InputSource {
  readonly #seed: number;
  #unit: Inputs | null = null;

  constructor(seed: number) {
    this.#seed = seed;
  }

  /** `count` entries of each array, uniform in [-bound, bound]. */
  take(count: number, bound: number): Inputs {
    if (this.#unit === null || this.#unit.q.length < count) this.#unit = this.#fill(count);
    const { q, k, v, dOutput } = this.#unit;
    const scaled = (x: Float32Array) => x.subarray(0, count).map((value) => value * bound);
    return { q: scaled(q), k: scaled(k), v: scaled(v), dOutput: scaled(dOutput) };
  }

  #fill(count: number): Inputs {
    const array = (stream: number) => {
      const random = mulberry32((Math.imul(this.#seed, 4) + stream) >>> 0);
      const result = new Float32Array(count);
      for (let i = 0; i < count; i++) result[i] = 2 * random() - 1;
      return result;
    };
    return { q: array(0), k: array(1), v: array(2), dOutput: array(3) };
  }
}
