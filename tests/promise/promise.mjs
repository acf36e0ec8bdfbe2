// SPDX-License-Identifier: MIT
//
// The promise of `tolerance`, tested as FINUFFT tests its own: instances by the thousand, tolerances from 1e-1 to 1e-6, eight a
// decade, and the error that results over the tolerance that was asked for. Sequences are short and heads small, so that
// every instance has a float64 reference of all its rows; `method: 'polynomial'`, or 'toeplitz' where scores ask for it, has
// polynomials run where `auto` would not.
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

/** The engine that an instance is for. */
export const methodOf = ({ method, bias, relativePositions, relative }) =>
  method ?? (bias || relativePositions || relative ? 'toeplitz' : 'polynomial');

const LENGTHS = [33, 64, 100, 200, 333];
const HEAD_DIMS = [2, 4, 8];
const BOUNDS = [0.05, 0.25, 0.5, 1, 2];

/** Instance number `n` of the sweep: the kinds and the settings in turn, the rest by chance, longer ones less often. */
export function numbered(n, lengths = LENGTHS) {
  const r = random(n);
  const kinds = Object.keys(KINDS);
  const settings = Object.keys(SETTINGS);
  const kind = kinds[n % kinds.length];
  const setting = settings[Math.floor(n / kinds.length) % settings.length];
  const headDim = HEAD_DIMS[r.whole(HEAD_DIMS.length)];
  const bound = BOUNDS[r.whole(BOUNDS.length)];
  const length = lengths[Math.floor(lengths.length * r.uniform() ** 1.5)];
  const args = instance({ kind, bound, seed: n, ...SETTINGS[setting](length, headDim) });
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
 * @returns for each tolerance { tolerance, ratio, slack, degree }; ratio null where nothing was promised, slack the certified
 *   bound over the error
 */
export function promised(attention, args, how, tolerances, expected, options = { method: methodOf(args) }) {
  const { dOutput: _, ...forwardArgs } = args;
  return tolerances.map((tolerance) => {
    const guarantee = how === 'certified' ? 'certified' : 'sampled';
    const call = { tolerance, guarantee, ...options };
    const forward = () => attention.forward({ ...forwardArgs, ...call });
    const got = attempted(() => {
      if (how === 'backward') return attention.backward({ ...args, ...call });
      return how === 'training' ? attention.backward({ ...args, ...call, saved: forward() }) : forward();
    });
    if (!got) return { tolerance, ratio: null, slack: null, degree: null };
    const error = got.output ? outputError(args, got.output, expected.output) : gradientError(got, expected);
    const { errorBound, degree } = got.report;
    return { tolerance, ratio: error / tolerance, slack: how === 'certified' && errorBound ? errorBound / error : null, degree };
  });
}

/** Float64 results of both passes. */
export function expectedOf(args) {
  const { dOutput: _, ...forwardArgs } = args;
  return { ...reference.forward(forwardArgs), ...reference.backward(args) };
}
