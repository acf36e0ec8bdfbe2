// SPDX-License-Identifier: MIT
//
// The option `rotary`: how far each pair of a vector turns at a position.

import { readBoolean, readFloats, readInteger, readNumber, readRecord, wrong } from './check.js';
import type { Rotary } from './types.js';

/** The option with its defaults. */
export interface Rotation {
  /** 0: no rotation. */
  rotaryDim: number;
  interleaved: boolean;
  /** [rotaryDim/2], radians per position. */
  frequencies: Float64Array;
}

const ROTARY = ['base', 'dim', 'interleaved', 'frequencies'];

/** Checks the option. */
export function readRotary(name: string, value: unknown, headDim: number): Rotation {
  if (value === false) return { rotaryDim: 0, interleaved: false, frequencies: new Float64Array(0) };
  if (value === true) throw wrong(name, 'rotary', 'false or an object', value, false);
  const rotary: { readonly [option in keyof Rotary]: unknown } =
    value === undefined ? {} : readRecord(name, 'rotary', value, ROTARY);
  if (rotary.dim === undefined && headDim % 2 !== 0) {
    const advice = `give an even rotary.dim, such as ${headDim - 1}, or rotary: false`;
    throw new RangeError(
      `${name}: rotary.dim is headDim by default and must be even, headDim is ${headDim}; ${advice}`,
    );
  }
  const rotaryDim = rotary.dim === undefined ? headDim : readInteger(name, 'rotary.dim', rotary.dim, 0, headDim);
  if (rotaryDim % 2 !== 0) throw wrong(name, 'rotary.dim', 'even', rotaryDim, true);
  const interleaved = readBoolean(name, 'rotary.interleaved', rotary.interleaved, false);
  if (rotary.frequencies === undefined)
    return { rotaryDim, interleaved, frequencies: readBase(name, rotary.base, rotaryDim) };

  if (rotary.base !== undefined) throw new TypeError(`${name}: rotary has both base and frequencies; give one of them`);
  const given = readFloats(name, 'rotary.frequencies', rotary.frequencies, rotaryDim / 2, 'rotary.dim/2');
  const frequencies = Float64Array.from(given);
  const bad = frequencies.findIndex((frequency) => !Number.isFinite(frequency));
  if (bad >= 0) throw wrong(name, `rotary.frequencies[${bad}]`, 'finite', frequencies[bad], true);
  return { rotaryDim, interleaved, frequencies };
}

/** base^(-2p/dim) for each pair p. */
function readBase(name: string, value: unknown, dim: number): Float64Array {
  const base = value === undefined ? 10000 : readNumber(name, 'rotary.base', value);
  if (!(base > 0 && base < Infinity)) throw wrong(name, 'rotary.base', 'positive and finite', base, true);
  const frequencies = Float64Array.from({ length: dim / 2 }, (_, p) => base ** ((-2 * p) / dim));
  if (!frequencies.every(Number.isFinite))
    throw wrong(name, 'rotary.base', 'large enough that base^(-2p/dim) is finite', base, true);
  return frequencies;
}
