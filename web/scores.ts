// SPDX-License-Identifier: MIT
//
// The options that decide what happens to a score: which keys a query sees, and what is done to s_ij before the softmax,
//
//   softcap tanh(s_ij / softcap) - alibi |i-j| + bias_{i-j} + mask_ij,     and one more key of score `sink` and value zero.

import { readFinite, readFloats, readInteger, readNumber, tagOf, wrong, type Given } from './check.js';
import type { Decays } from './decays.js';
import type { Relative } from './relative.js';
import type { Shape } from './types.js';

const UINT32_MAX = 2 ** 32 - 1;
const INT32_MAX = 2 ** 31 - 1;
/** Where softcap and its inverse are safe from overflow in float32, the factor log2 e included. */
const [LEAST_CAP, MOST_CAP] = [1e-30, 1e30];
/** Of a relative map that the Toeplitz engine takes (RA_MAX_HEAD_DIM). */
const MOST_PLACES = 1024;
/** Biases and masks below it forbid (rope_attention.h). */
export const FORBIDDEN = -3.4e29;
/** Times a distance below 2^32 it stays above what counts as forbidden. */
const MOST_SLOPE = Math.fround(1e19);

/** The options with their defaults. */
export interface Scores {
  /** Keys to the left and to the right of a query; -1: all. */
  window: readonly [left: number, right: number];
  /** First positions of the segments, from 0 on; [0] for none. */
  segments: Uint32Array;
  /** 0: none. */
  softcap: number;
  /** [heads] */
  alibi: Float32Array | null;
  /** [1 or heads][queryLength + keyLength - 1] */
  bias: Float32Array | null;
  /** What stands for the far part of bias in the polynomial engine; null where that does not take it (states.ts). */
  decays: Decays | null;
  mask: Mask | null;
  /** [heads] */
  sinks: Float32Array | null;
}

export interface Mask {
  /** Added, or 0 where forbidden. */
  values: Float32Array | Uint8Array;
  /** Values from one batch, head or query to the next; 0 where all have the same. */
  strides: { batch: number; head: number; row: number };
}

type Sizes = Required<Shape>;

/** Checks the options. */
export function readScores(name: string, given: Given, sizes: Sizes, queryOffset: number): Scores {
  return {
    window: readWindow(name, given['window'], sizes, queryOffset),
    segments: readSegments(name, given['segments']),
    softcap: readSoftcap(name, given['softcap']),
    alibi: readAlibi(name, given['alibi'], sizes),
    bias: readBias(name, given['bias'], sizes),
    decays: null,
    mask: readMask(name, given['mask'], given['maskShape'], sizes),
    sinks: readSinks(name, given['sinks'], sizes),
  };
}

/** Engines that multiply with features. */
export type Features = 'polynomial' | 'toeplitz';

/**
 * The one of them that a call with such a `method` would use: Fourier transforms where they are asked for, and under 'auto' where
 * they are needed, as something depends on distances in a way that no state of constant size can keep.
 */
export function featuresOf(problem: Scores & Relative & { method: string; causal: boolean }): Features {
  if (problem.method === 'toeplitz') return 'toeplitz';
  const needed = problem.method === 'auto' && foreignTo('polynomial', problem).length > 0;
  return needed && foreignTo('toeplitz', problem).length === 0 ? 'toeplitz' : 'polynomial';
}

/** Names of the options in use that an engine does not have. */
export function foreignTo(features: Features, options: Scores & Relative & { causal: boolean }): string[] {
  const { alibi, bias, decays, segments, causal, relativePositions, relative } = options;
  const [packed, tooMany] = [segments.length > 1, (relative?.support.length ?? 0) > 2 * MOST_PLACES];
  const names = options.softcap > 0 ? ['softcap'] : [];
  const add = (inUse: boolean, name: string) => inUse && names.push(name);
  if (features === 'toeplitz') {
    add(packed, 'segments');
    add(alibi !== null, 'alibi');
    add(tooMany, `relative.support of more than ${MOST_PLACES} pairs`);
  } else {
    add(alibi !== null && !causal, 'alibi without causal');
    add(bias !== null && !causal, 'bias without causal');
    add(bias !== null && alibi !== null, 'bias beside alibi');
    add(bias !== null && packed, 'bias beside segments');
    add(bias !== null && causal && decays === null, 'bias');
  }
  add(options.mask !== null, 'mask');
  add(options.sinks !== null, 'sinks');
  if (features === 'polynomial') {
    add(relativePositions !== null, 'relativePositions');
    add(relative !== null, 'relative');
  }
  return names;
}

/** Whether slopes fall to both sides and nothing else is in the way of polynomials: keys on one side of the queries have these. */
export function hasSides(options: Scores & Relative & { causal: boolean; method: string; guarantee: string }): boolean {
  const { alibi, causal, segments, method, guarantee } = options;
  if (!alibi || causal || method !== 'auto' || guarantee === 'certified' || segments.length > 1) return false;
  return foreignTo('polynomial', options).length === 1; // the slopes
}

/** Names of those that sampled rows do not know. */
export function unsampledOnly({ softcap, mask, sinks }: Scores): string[] {
  const used = [softcap > 0, mask !== null, sinks !== null];
  return ['softcap', 'mask', 'sinks'].filter((_, n) => used[n]);
}

/**
 * Queries that see some key: from .. to - 1. A query at a position of the keys sees the key there; one before them sees key 0
 * or nothing, one behind them the last key or nothing.
 */
export function seeingQueries(
  g: Pick<Scores, 'window' | 'segments'> & {
    causal: boolean;
    queryOffset: number;
    queryLength: number;
    keyLength: number;
  },
): { from: number; to: number } {
  const [left, right] = g.window;
  const ahead = g.causal ? 0 : right < 0 ? Infinity : right;
  const behind = left < 0 ? Infinity : left;
  const foreign = g.segments.find((start) => start >= g.keyLength) ?? Infinity;
  const place = (position: number) => Math.min(Math.max(position - g.queryOffset, 0), g.queryLength);
  return { from: place(-ahead), to: place(Math.min(g.keyLength + behind, foreign)) };
}

/** The most keys that a query sees. */
export function seenKeys({ causal, window, keyLength }: Pick<Scores, 'window'> & { causal: boolean; keyLength: number }): number {
  const [left, right] = causal ? [window[0], 0] : window;
  return left < 0 || right < 0 ? keyLength : Math.min(keyLength, left + right + 1);
}

/** Segments that hold queries and keys: rows from .. to - 1 of a head, and how many keys. */
export function segmentsOf(
  g: Pick<Scores, 'segments'> & { queryOffset: number; queryLength: number; keyLength: number },
): { from: number; to: number; keys: number }[] {
  const row = (position: number) => Math.min(Math.max(position - g.queryOffset, 0), g.queryLength);
  return Array.from(g.segments, (start, n) => {
    const end = g.segments[n + 1] ?? Infinity;
    return { from: n === 0 ? 0 : row(start), to: row(end), keys: Math.min(end, g.keyLength) - Math.min(start, g.keyLength) };
  }).filter(({ from, to, keys }) => from < to && keys > 0);
}

// --- Which keys a query sees ------------------------------------------------------------------------------------------

/** -1 also for sides that limit nothing at these lengths. */
function readWindow(name: string, value: unknown, { queryLength, keyLength }: Sizes, queryOffset: number): Scores['window'] {
  if (value === undefined) return [-1, -1];
  if (!Array.isArray(value) || value.length !== 2) throw wrong(name, 'window', 'a pair [left, right]', value, false);
  const [left, right] = (value as unknown[]).map((side, n) => readInteger(name, `window[${n}]`, side, -1, INT32_MAX));
  const farthest = queryOffset + queryLength - 1;
  return [left >= farthest ? -1 : left, right >= keyLength - 1 - queryOffset ? -1 : right];
}

function readSegments(name: string, value: unknown): Uint32Array {
  if (value === undefined) return Uint32Array.of(0);
  if (!Array.isArray(value) && tagOf(value) !== 'Uint32Array') {
    throw wrong(name, 'segments', 'a Uint32Array or an array of numbers', value, false);
  }
  const starts = Array.from(value as ArrayLike<unknown>, (start, n) =>
    readInteger(name, `segments[${n}]`, start, 0, UINT32_MAX),
  );
  if (starts.length === 0) throw new RangeError(`${name}: segments must begin with 0, got none`);
  if (starts[0] !== 0) throw wrong(name, 'segments[0]', '0', starts[0], true);
  starts.forEach((start, n) => {
    if (start < starts[n - 1]) throw wrong(name, `segments[${n}]`, `at least the one before, ${starts[n - 1]}`, start, true);
  });
  return Uint32Array.from(starts);
}

// --- What is done to scores -------------------------------------------------------------------------------------------

function readSoftcap(name: string, value: unknown): number {
  if (value === undefined) return 0;
  const softcap = readNumber(name, 'softcap', value);
  if (!(softcap >= LEAST_CAP && softcap <= MOST_CAP)) {
    throw wrong(name, 'softcap', `positive, from ${LEAST_CAP} to ${MOST_CAP}`, softcap, true);
  }
  return softcap;
}

function readAlibi(name: string, value: unknown, { heads }: Sizes): Float32Array | null {
  if (value === undefined) return null;
  const slopes = readFloats(name, 'alibi', value, heads, 'shape.heads');
  const bad = slopes.findIndex((slope) => !(slope >= 0 && slope <= MOST_SLOPE));
  if (bad >= 0) throw wrong(name, `alibi[${bad}]`, 'from 0 to 1e19', slopes[bad], true);
  return slopes;
}

function readBias(name: string, value: unknown, { heads, queryLength, keyLength }: Sizes): Float32Array | null {
  if (value === undefined) return null;
  const one = queryLength + keyLength - 1;
  const all = tagOf(value) === 'Float32Array' && (value as Float32Array).length === heads * one;
  const needs = `queryLength + keyLength - 1${heads > 1 ? ', or heads times that,' : ''}`;
  return readFloats(name, 'bias', value, all ? heads * one : one, needs);
}

function readMask(name: string, value: unknown, shape: unknown, sizes: Sizes): Mask | null {
  if (value === undefined) {
    if (shape !== undefined) throw new TypeError(`${name}: maskShape needs mask as well`);
    return null;
  }
  const tag = tagOf(value);
  if (tag !== 'Float32Array' && tag !== 'Uint8Array') {
    throw wrong(name, 'mask', 'a Float32Array or a Uint8Array', value, false);
  }
  const values = value as Float32Array | Uint8Array;
  const [batch, heads, rows, keys] = readMaskShape(name, shape, sizes);
  const needed = batch * heads * rows * keys;
  if (values.length !== needed) {
    const needs = shape === undefined ? 'queryLength * keyLength' : 'maskShape';
    throw new RangeError(`${name}: mask has ${values.length} values, ${needs} needs ${needed}`);
  }
  const stride = (count: number, inner: number) => (count > 1 ? inner : 0);
  return {
    values,
    strides: {
      batch: stride(batch, heads * rows * keys),
      head: stride(heads, rows * keys),
      row: stride(rows, keys),
    },
  };
}

function readMaskShape(name: string, value: unknown, sizes: Sizes): number[] {
  const whole = [sizes.batch, sizes.heads, sizes.queryLength, sizes.keyLength];
  if (value === undefined) return [1, 1, sizes.queryLength, sizes.keyLength];
  const rule = 'four sizes, [batch, heads, queryLength, keyLength]';
  if (!Array.isArray(value) || value.length !== 4) throw wrong(name, 'maskShape', rule, value, false);
  return (value as unknown[]).map((size, n) => {
    const number = readNumber(name, `maskShape[${n}]`, size);
    if (number === whole[n] || (number === 1 && n < 3)) return number;
    throw wrong(name, `maskShape[${n}]`, n < 3 && whole[n] > 1 ? `1 or ${whole[n]}` : `${whole[n]}`, number, true);
  });
}

function readSinks(name: string, value: unknown, { heads }: Sizes): Float32Array | null {
  if (value === undefined) return null;
  return readFinite(name, 'sinks', readFloats(name, 'sinks', value, heads, 'shape.heads'));
}
