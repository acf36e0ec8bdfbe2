// SPDX-License-Identifier: MIT
//
// The multiply-add peak of a binary on this machine, which benchmarks divide by.

import { readFileSync } from 'node:fs';

import { createRopeAttention } from '../../../dist/index.js';

/** GFLOP/s of multiply-adds in the binary: the better of its two kinds, the best of some runs. */
export function peakOf(binary) {
  const rate = (kind, iterations, operations) => {
    let best = 0;
    for (let n = 0; n < 5; n++) {
      const t = performance.now();
      binary.ra_peak(kind, iterations);
      best = Math.max(best, (iterations * operations) / (performance.now() - t) / 1e6);
    }
    return best;
  };
  return Math.max(rate(0, 1_000_000, 96), rate(1, 1_920_000, 64));
}

/** Where a binary is. */
export const fileOf = (simd) => new URL(`../../../dist/rope-attention${simd === 'simd128' ? '' : '.relaxed'}.wasm`, import.meta.url);

/** An instance of a binary, and the binary's functions; null where the engine refuses it. */
export async function open(simd) {
  const bytes = readFileSync(fileOf(simd));
  if (!WebAssembly.validate(bytes)) return null;
  return {
    attention: await createRopeAttention({ wasm: bytes }),
    binary: (await WebAssembly.instantiate(bytes)).instance.exports,
  };
}
