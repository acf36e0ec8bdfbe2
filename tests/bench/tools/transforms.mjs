// SPDX-License-Identifier: MIT
//
// How fast the Fourier transforms inside the Toeplitz engine are, beside the same transforms of the same binary alone. V8's sampling
// profiler says how long each function runs; the functions of transforms are those that run while nothing but transforms does.

import { selfTimes } from './self-times.mjs';
import { median } from './step.mjs';

/** Functions that take a smaller share of transforms alone are none of theirs. */
const SHARE = 0.01;

const TURNS = 3;

const operations = (count, length) => count * 5 * length * Math.log2(length);

/** Runs of transforms of `length` numbers alone, compiled, into so many blocks in turn; how many operations one takes. */
function alone(binary, length, blocks) {
  const calls = Math.ceil(1e9 / operations(4, length));
  const bytes = (68 + 32 * blocks) * length + 1024;
  const base = Math.ceil(binary.__heap_base.value / 16) * 16;
  const missing = base + bytes - binary.memory.buffer.byteLength;
  if (missing > 0) binary.memory.grow(Math.ceil(missing / 65536));
  const run = () => binary.ra_fft_peak(length, blocks, calls, base);
  for (let n = 0; n < 3; n++) run();
  return { run, count: operations(4 * calls, length) };
}

/** GFLOP/s. */
function rateOf({ run, count }) {
  const start = performance.now();
  run();
  return count / (performance.now() - start) / 1e6;
}

/**
 * Calls and transforms alone in turns, TURNS times.
 *
 * @param binary the functions of the instance's binary.
 * @param work a call that makes `count` complex transforms of `length` numbers of sequences of so many `blocks`.
 * @returns medians of GFLOP/s of transforms in the call, and apart from it; of their ratio; of what they are of the call.
 */
export async function ratesOf(binary, work, { count, length, blocks }) {
  const transforms = alone(binary, length, 2 * blocks);
  const turns = [];
  for (let n = 0; n < TURNS; n++) {
    const apart = rateOf(transforms);
    const { wasm: known } = await selfTimes(transforms.run);
    const all = [...known.values()].reduce((sum, time) => sum + time, 0);
    const names = [...known].filter(([, time]) => time > SHARE * all).map(([name]) => name);
    const start = performance.now();
    const { wasm: times } = await selfTimes(work);
    const milliseconds = performance.now() - start;
    const time = names.reduce((sum, name) => sum + (times.get(name) ?? 0), 0);
    const inside = operations(count, length) / time / 1e6;
    turns.push({ inside, apart, share: inside / apart, ofCall: time / milliseconds });
  }
  return Object.fromEntries(Object.keys(turns[0]).map((name) => [name, median(turns.map((one) => one[name]))]));
}
