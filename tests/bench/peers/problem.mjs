// SPDX-License-Identifier: MIT
//
// What every contender computes: RoPE attention of one batch, H heads, N tokens, D values a head, in float32, half-split
// pairs, base 10000, scale 1/sqrt(D), entries uniform in [-1.5, 1.5). Runs in Node and in a page.

export const BASE = 10000;

/** Outputs of the two passes: a forward call, or a forward and a backward call. */
export const OUTPUTS = { forward: ['output'], both: ['output', 'dq', 'dk', 'dv'] };

/** Uniform in [-bound, bound): mulberry32. */
export function uniform(count, seed, bound) {
  const out = new Float32Array(count);
  let state = seed >>> 0;
  for (let n = 0; n < count; n++) {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    out[n] = (((t ^ (t >>> 14)) >>> 0) / 2 ** 31 - 1) * bound;
  }
  return out;
}

/** cos and sin of position * BASE^(-2p/D), [N][D/2]. */
function rotaryTables(length, headDim) {
  const pairs = headDim / 2;
  const cos = new Float32Array(length * pairs);
  const sin = new Float32Array(length * pairs);
  for (let n = 0; n < length; n++) {
    for (let p = 0; p < pairs; p++) {
      const angle = n * BASE ** ((-2 * p) / headDim);
      cos[n * pairs + p] = Math.cos(angle);
      sin[n * pairs + p] = Math.sin(angle);
    }
  }
  return { cos, sin };
}

/** Inputs [H][N][D], and the tables that peers may keep between calls. */
export function createProblem({ length, headDim, heads, causal }) {
  const size = heads * length * headDim;
  const [q, k, v, dOutput] = [1, 2, 3, 4].map((seed) => uniform(size, seed, 1.5));
  return { length, headDim, heads, causal, scale: 1 / Math.sqrt(headDim), q, k, v, dOutput, ...rotaryTables(length, headDim) };
}

/**
 * Blocks of query rows, at least two of them, so that the smallest check goes through their seams. A causal block reads keys
 * 0 to end, all others all keys.
 */
export function blocksOf({ length, causal }, rows) {
  const most = Math.min(rows, Math.ceil(length / 2));
  const blocks = [];
  for (let at = 0; at < length; at += most) {
    const count = Math.min(most, length - at);
    blocks.push({ at, count, to: at + count, end: causal ? at + count : length });
  }
  return blocks;
}

function swapAxes(x, first, second, width) {
  if (first === 1 || second === 1) return x;
  const out = new Float32Array(x.length);
  for (let a = 0; a < first; a++) {
    for (let b = 0; b < second; b++) {
      const from = (a * second + b) * width;
      out.set(x.subarray(from, from + width), (b * first + a) * width);
    }
  }
  return out;
}

/** [H][N][D] to [N][H][D]. */
export const tokensFirst = (x, { heads, length, headDim }) => swapAxes(x, heads, length, headDim);

/** [N][H][D] to [H][N][D]. */
export const headsFirst = (x, { heads, length, headDim }) => swapAxes(x, length, heads, headDim);

/** Useful operations: 4 D a pair of allowed tokens forward, 10 D backward. */
export function operations({ length, headDim, heads, causal }, pass) {
  const pairs = causal ? (length * (length + 1)) / 2 : length * length;
  return (pass === 'forward' ? 4 : 14) * headDim * heads * pairs;
}

/** Largest |x - y| over the largest |y|; NaN where x has another size or a NaN. */
export function difference(x, y) {
  if (x.length !== y.length) return NaN;
  let worst = 0;
  let size = 0;
  for (let n = 0; n < y.length; n++) {
    const distance = Math.abs(x[n] - y[n]);
    if (!(distance <= worst)) worst = distance;
    size = Math.max(size, Math.abs(y[n]));
  }
  return worst / size;
}

/** The same of the worst output. */
export const worstDifference = (outputs, references) =>
  Object.keys(references).reduce((worst, name) => {
    const here = difference(outputs[name] ?? [], references[name]);
    return here <= worst ? worst : here;
  }, 0);
