// SPDX-License-Identifier: MIT
//
// The promise of `tolerance`, tested as FINUFFT tests its own: instances by the thousand, tolerances from 1e-1 to 1e-6, eight a
// decade, and the error that results over the tolerance that was asked for. Sequences are short and heads small, so that
// every instance has a float64 reference of all its rows; `method: 'polynomial'`, or 'toeplitz' where scores ask for it, has
// polynomials run where `auto` would not. Long ones have what short ones cannot have, many chunks, states that forget, samples that are a small
// share of the rows: there `auto` chooses, and the exact engine is the reference. Its own error is that of float32, 1e-6 of outputs,
// a hundredth of the smallest tolerance asked of them; gradients that are next to nothing may have lost more, so that what
// seems to be above its tolerance is measured against float64 as well.
//
// Based on: Barnett, Magland, af Klinteberg. A Parallel Nonuniform Fast Fourier Transform Library Based on an "Exponential of
// Semicircle" Kernel. 2019 (arXiv 1808.06736).

import { reference } from '../../dist/index.js';
import { KINDS, instance, random } from './instances.mjs';

/** 1e-1 to 1e-6, eight a decade. */
export const TOLERANCES = Array.from({ length: 41 }, (_, n) => 10 ** (-1 - n / 8));

/** Random numbers in [-size, size], no two of which have anything to do with one another, for the distances i - j of a shape. */
function rough({ queryLength, keyLength = queryLength }, size, heads = 1) {
  const { uniform } = random(queryLength);
  return Float32Array.from({ length: heads * (queryLength + keyLength - 1) }, () => size * (2 * uniform() - 1));
}

/** One head, small: by Fourier transforms every term is transformed for itself. */
const small = (length, headDim) => ({ heads: 1, queryLength: Math.min(length, 200), headDim: Math.min(headDim, 4) });

/** T5's buckets with maxDistance 128. */
const bucket = (t) => (t < 16 ? t : Math.min(31, 16 + Math.floor((Math.log(t / 16) / Math.log(8)) * 16)));

/** Causal, with a bias that goes through decaying states beyond a band: longer, for there to be anything beyond. */
const smooth = (length, headDim, f, more = {}) => {
  const shape = { heads: 1, queryLength: 2 * length, headDim, ...more.shape };
  const { heads, queryLength, keyLength = queryLength } = shape;
  const diagonals = queryLength + keyLength - 1;
  const bias = Float32Array.from({ length: (more.ofHeads ? heads : 1) * diagonals }, (_, n) => {
    const t = (n % diagonals) - keyLength + 1 + (more.queryOffset ?? 0);
    return t < 0 ? 0 : f(t) * (1 + Math.floor(n / diagonals));
  });
  const { ofHeads: _, ...setting } = more;
  return { ...setting, shape, bias, causal: true, method: 'polynomial' };
};

/** Masks and shapes, by name: settings for a length and a head size. */
export const SETTINGS = {
  full: (length, headDim) => ({ shape: { heads: 1, queryLength: length, headDim } }),
  causal: (length, headDim) => ({ shape: { heads: 1, queryLength: length, headDim }, causal: true }),
  segments: (length, headDim) => ({
    shape: { heads: 1, queryLength: length, headDim },
    segments: [0, Math.floor(length / 7), Math.floor(length / 2)],
  }),
  'causal segments': (length, headDim) => ({ ...SETTINGS.segments(length, headDim), causal: true }),
  'query offset': (length, headDim) => ({
    shape: { heads: 1, queryLength: Math.ceil(length / 2), keyLength: length, headDim },
    causal: true,
    queryOffset: Math.floor(length / 3),
  }),
  grouped: (length, headDim) => ({
    shape: { batch: 2, heads: 4, kvHeads: 2, queryLength: Math.ceil(length / 4), keyLength: Math.ceil(length / 3), headDim, valueDim: 3 },
    rotary: { dim: 2 * Math.floor(headDim / 4) || 2, interleaved: true },
  }),
  'many heads': (length, headDim) => ({
    shape: { heads: 12, kvHeads: 6, queryLength: Math.ceil(length / 3), headDim },
    causal: true,
  }),
  'grouped causal': (length, headDim) => ({
    shape: { heads: 4, kvHeads: 2, queryLength: Math.ceil(length / 2), headDim, valueDim: headDim + 3 },
    causal: true,
  }),
  alibi: (length, headDim) => ({
    shape: { heads: 4, kvHeads: 2, queryLength: Math.ceil(length / 2), headDim },
    causal: true,
    alibi: Float32Array.of(0.5, 0.06, 0.008, 0),
  }),
  'steep alibi': (length, headDim) => ({
    shape: { heads: 1, queryLength: Math.ceil(length / 2), keyLength: length, headDim },
    causal: true,
    queryOffset: Math.floor(length / 3),
    alibi: Float32Array.of(2),
  }),
  'rough bias': (length, headDim) => ({ shape: small(length, headDim), bias: rough(small(length, headDim), 1) }),
  'rough causal bias': (length, headDim) => ({ shape: small(length, headDim), bias: rough(small(length, headDim), 3), causal: true }),
  'rough biases in a window': (length, headDim) => {
    const shape = { ...small(length, headDim), heads: 4, kvHeads: 2, valueDim: 3 };
    return { shape, bias: rough(shape, 0.5, 4), window: [Math.ceil(length / 3), 7], queryOffset: 5 };
  },
  'rough positions': (length, headDim) => {
    const shape = { ...small(length, headDim), heads: 2, kvHeads: 1, valueDim: 3 };
    return { shape, relativePositions: rough(shape, 100), rotary: { dim: 2 } };
  },
  'clipped positions': (length, headDim) => {
    const shape = small(length, headDim);
    const distances = Array.from({ length: 2 * shape.queryLength - 1 }, (_, n) => n - shape.queryLength + 1);
    return { shape, causal: true, relativePositions: Float32Array.from(distances, (t) => Math.min(t, 20)), bias: rough(shape, 0.3) };
  },
  matrices: (length, headDim) => {
    const shape = { ...small(length, headDim), queryLength: Math.min(Math.ceil(length / 2), 100), keyLength: Math.min(length, 200) };
    const places = [0, 0, 0, 1, 1, 1, 1, 0, 0, 1].map((place) => Math.min(place, shape.headDim - 1));
    return { shape, relative: { support: Uint32Array.from(places), weights: rough(shape, 0.7, 5) } };
  },
  'power law': (length, headDim) => smooth(length, headDim, (t) => -0.5 * Math.log1p(t)),
  'logarithmic biases': (length, headDim) =>
    smooth(length, headDim, (t) => -1.7 * Math.log1p(0.1 * t), { shape: { heads: 2, kvHeads: 1, valueDim: 3 }, ofHeads: true }),
  'linear bias': (length, headDim) => smooth(length, headDim, (t) => -0.05 * t),
  'linear bias, window and offset': (length, headDim) =>
    smooth(length, headDim, (t) => -0.01 * t, { shape: { queryLength: length, keyLength: 2 * length }, queryOffset: length, window: [Math.ceil(1.7 * length), -1] }),
  'T5 buckets': (length, headDim) => smooth(length, headDim, (t) => 0.4 * Math.sin(2.3 * bucket(t)) - 0.06 * bucket(t)),
};

const grouped = (length, headDim) => ({ heads: 4, kvHeads: 2, queryLength: length, headDim });
const sloped = (length, headDim, slope) => ({ shape: { heads: 1, queryLength: length, headDim }, causal: true, alibi: Float32Array.of(slope) });

/** Long sequences; lengths are powers of two. */
export const LONG_SETTINGS = {
  full: SETTINGS.full,
  causal: SETTINGS.causal,
  'slope 0.01': (length, headDim) => sloped(length, headDim, 0.01),
  'slope 0.05': (length, headDim) => sloped(length, headDim, 0.05),
  'slope 0.3': (length, headDim) => sloped(length, headDim, 0.3),
  'slope 1.5': (length, headDim) => sloped(length, headDim, 1.5),
  'slopes of heads': (length, headDim) => ({
    shape: grouped(length / 2, headDim),
    causal: true,
    alibi: Float32Array.of(0.5, 0.06, 0.008, 0),
  }),
  'slope, segments': (length, headDim) => ({ ...SETTINGS['causal segments'](length, headDim), alibi: Float32Array.of(0.1) }),
  'slope, more keys': (length, headDim) => ({
    shape: { heads: 1, queryLength: length / 2, keyLength: length, headDim },
    causal: true,
    queryOffset: length / 2,
    alibi: Float32Array.of(0.2),
  }),
  'slope, window': (length, headDim) => ({ ...sloped(length, headDim, 0.02), window: [length / 8, -1] }),
  window: (length, headDim) => ({ ...SETTINGS.causal(length, headDim), window: [length / 4 + 17, -1] }),
  'window, both sides': (length, headDim) => ({ ...SETTINGS.full(length, headDim), window: [length / 4, length / 8 + 5] }),
  segments: SETTINGS.segments,
  'causal segments': SETTINGS['causal segments'],
  'grouped causal': (length, headDim) => ({ shape: grouped(length / 2, headDim), causal: true }),
  'power law': (length, headDim) => SETTINGS['power law'](length / 2, headDim),
  'logarithmic biases': (length, headDim) => SETTINGS['logarithmic biases'](length / 2, headDim),
  'linear bias': (length, headDim) => SETTINGS['linear bias'](length / 2, headDim),
  'T5 buckets': (length, headDim) => SETTINGS['T5 buckets'](length / 2, headDim),
  'rough causal bias': (length, headDim) => ({ ...SETTINGS.causal(length, headDim), bias: rough({ queryLength: length }, 0.5) }),
};

/** The engine that an instance is for. */
export const methodOf = ({ method, bias, relativePositions, relative }) =>
  method ?? (bias || relativePositions || relative ? 'toeplitz' : 'polynomial');

const LENGTHS = [33, 64, 100, 200, 333];
const HEAD_DIMS = [2, 4, 8];
const BOUNDS = [0.05, 0.25, 0.5, 1, 2];

/** The two sets of instances of the sweep. */
export const SHORT = { settings: SETTINGS, lengths: LENGTHS, headDims: HEAD_DIMS, tolerances: TOLERANCES };
export const LONG = { settings: LONG_SETTINGS, lengths: [2048, 4096, 8192, 16384], headDims: [4, 8, 16], tolerances: TOLERANCES.slice(0, 25) };

/** Instance number `n` of a set: the kinds and the settings in turn, the rest by chance, longer ones less often. */
export function numbered(n, { settings: all, lengths, headDims } = SHORT) {
  const r = random(n);
  const kinds = Object.keys(KINDS);
  const settings = Object.keys(all);
  const kind = kinds[n % kinds.length];
  const setting = settings[Math.floor(n / kinds.length) % settings.length];
  const headDim = headDims[r.whole(headDims.length)];
  const bound = BOUNDS[r.whole(BOUNDS.length)];
  const length = lengths[Math.floor(lengths.length * r.uniform() ** 1.5)];
  const args = instance({ kind, bound, seed: n, ...all[setting](length, headDim) });
  const name = `${n}: ${kind}, ${setting}, D = ${args.shape.headDim}, N = ${length}, entries to ${bound}`;
  return { name, kind, setting, args };
}

/** Half the range of the widest value column of each key/value head. */
function halfRanges({ v, shape }) {
  const { queryLength, keyLength = queryLength, headDim, valueDim = headDim } = shape;
  return Array.from({ length: v.length / keyLength / valueDim }, (_, head) => {
    let widest = 0;
    for (let d = 0; d < valueDim; d++) {
      let [low, high] = [Infinity, -Infinity];
      for (let j = 0; j < keyLength; j++) {
        const x = v[(head * keyLength + j) * valueDim + d];
        [low, high] = [Math.min(low, x), Math.max(high, x)];
      }
      widest = Math.max(widest, (high - low) / 2);
    }
    return widest;
  });
}

/** The output's error in the units of the tolerance, each head in its own. */
export function outputError(args, output, expected) {
  const { heads, kvHeads = heads } = args.shape;
  const ranges = halfRanges(args);
  const width = (output.length * (heads / kvHeads)) / heads / (ranges.length / kvHeads);
  let worst = 0;
  for (let n = 0; n < output.length; n++) {
    const error = Math.abs(output[n] - expected[n]) / ranges[Math.floor(n / width)];
    if (!(error <= worst)) worst = Number.isNaN(error) ? Infinity : error;
  }
  return worst;
}

/** The largest of the relative Frobenius errors of dq, dk and dv, and of dBias where decaying states stand for a bias. */
export function gradientError(got, expected) {
  const names = ['dq', 'dk', 'dv', ...(got.dBias && got.report.method === 'polynomial' ? ['dBias'] : [])];
  return Math.max(
    ...names.map((name) => {
      let [difference, size] = [0, 0];
      for (let n = 0; n < got[name].length; n++) {
        difference += (got[name][n] - expected[name][n]) ** 2;
        size += expected[name][n] ** 2;
      }
      return difference === 0 ? 0 : Math.sqrt(difference / size);
    }),
  );
}

/** A call whose miss, or that of a fit, a RangeError, is a promise not given: null. */
function attempted(call) {
  try {
    return call();
  } catch (error) {
    if (error instanceof RangeError && /misses the tolerance|needs a bias that is a sum of a few decays/.test(error.message)) return null;
    throw error;
  }
}

/**
 * One instance at some tolerances: what was promised, and the error over the tolerance.
 *
 * @param how 'certified', 'forward', 'backward' or 'training', gradients by the output and lse of a forward call (sampled)
 * @returns for each tolerance { tolerance, ratio, slack, degree, exact }; ratio null where nothing was promised, slack the certified
 *   bound over the error, exact where all of it was done by the exact engine
 */
export function promised(attention, args, how, tolerances, expected, options = { method: methodOf(args) }) {
  const { dOutput: _, ...forwardArgs } = args;
  return tolerances.map((tolerance) => {
    const guarantee = how === 'certified' ? 'certified' : 'sampled';
    const call = { tolerance, guarantee, ...options };
    const results = attempted(() => {
      if (how === 'backward') return [attention.backward({ ...args, ...call })];
      const saved = attention.forward({ ...forwardArgs, ...call });
      return how === 'training' ? [attention.backward({ ...args, ...call, saved }), saved] : [saved];
    });
    if (!results) return { tolerance, ratio: null, slack: null, degree: null, exact: false };
    const [got] = results;
    const exact = results.every(({ report }) => report.method === 'exact');
    const error = got.output ? outputError(args, got.output, expected.output) : gradientError(got, expected);
    const { errorBound, degree } = got.report;
    return { tolerance, ratio: error / tolerance, slack: how === 'certified' && errorBound ? errorBound / error : null, degree, exact };
  });
}

/** Results of both passes by the exact engine. */
export function exactOf(attention, args) {
  const { dOutput: _, ...forwardArgs } = args;
  const saved = attention.forward({ ...forwardArgs, method: 'exact' });
  return { output: saved.output, ...attention.backward({ ...args, saved, method: 'exact' }) };
}

/** Float64 results of both passes. */
export function expectedOf(args) {
  const { dOutput: _, ...forwardArgs } = args;
  return { ...reference.forward(forwardArgs), ...reference.backward(args) };
}
