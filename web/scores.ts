// SPDX-License-Identifier: MIT
//
// The options that decide which keys a query sees.

import { readInteger, wrong, type Given } from './check.js';

const UINT32_MAX = 2 ** 32 - 1;
const INT32_MAX = 2 ** 31 - 1;

/** The options with their defaults. */
export interface Scores {
  /** Keys to the left and to the right of a query; -1: all. */
  window: readonly [left: number, right: number];
  /** First positions of the segments, from 0 on; [0] for none. */
  segments: Uint32Array;
}

/** Checks the options. */
export function readScores(name: string, given: Given): Scores {
  return { window: readWindow(name, given['window']), segments: readSegments(name, given['segments']) };
}

/** Names of the options in use that only the exact engine knows. */
export function exactOnly(scores: Scores): string[] {
  const used = {
    window: scores.window.some((side) => side >= 0),
    segments: scores.segments.length > 1,
  };
  return Object.entries(used).flatMap(([option, inUse]) => (inUse ? [option] : []));
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

function readWindow(name: string, value: unknown): Scores['window'] {
  if (value === undefined) return [-1, -1];
  if (!Array.isArray(value) || value.length !== 2) throw wrong(name, 'window', 'a pair [left, right]', value, false);
  const [left, right] = (value as unknown[]).map((side, n) => readInteger(name, `window[${n}]`, side, -1, INT32_MAX));
  return [left, right];
}

function readSegments(name: string, value: unknown): Uint32Array {
  if (value === undefined) return Uint32Array.of(0);
  const tag = ArrayBuffer.isView(value) ? (value as Uint32Array)[Symbol.toStringTag] : '';
  if (!Array.isArray(value) && tag !== 'Uint32Array') {
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
