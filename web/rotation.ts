// SPDX-License-Identifier: MIT
//
// The option `rotary`: where rows are, and how far each pair of a vector turns there.

import { readBoolean, readFinite, readFloats, readInteger, readNumbers, readRecord, tagOf, wrong } from './check.js';
import { readFrequencies } from './scaling.js';
import type { Rotary, Shape } from './types.js';

/** The option with its defaults. */
export interface Rotation {
  /** 0: no rotation. */
  rotaryDim: number;
  interleaved: boolean;
  /** [rotaryDim/2], radians per position; with tables none. */
  frequencies: Float64Array;
  /** [rows][rotaryDim/2] each, instead of frequencies. */
  tables: { cos: Float32Array; sin: Float32Array; rows: number } | null;
  /** On rotated queries and keys. */
  rotaryFactor: number;
  /** A number that no rotation exceeds the length of a vector by, as a factor. */
  rotaryGain: number;
  /** [positionBatches][queryLength], [positionBatches][keyLength]; null: i + queryOffset, j. */
  queryPositions: Float64Array | null;
  keyPositions: Float64Array | null;
  /** 1, or the batch. */
  positionBatches: number;
}

/** What the option is read beside. */
export interface Place extends Required<Shape> {
  queryOffset: number;
  /** Whether there are keys: `rotate` has none. */
  hasKeys: boolean;
}

type GivenRotary = { readonly [option in keyof Rotary]: unknown };

const ROTARY = ['base', 'dim', 'interleaved', 'frequencies', 'scaling', 'tables', 'queryPositions', 'keyPositions'];

/** Checks the option. */
export function readRotary(name: string, value: unknown, place: Place): Rotation {
  const { headDim } = place;
  if (value === true) throw wrong(name, 'rotary', 'false or an object', value, false);
  const rotary: GivenRotary =
    value === undefined ? {} : value === false ? { dim: 0 } : readRecord(name, 'rotary', value, ROTARY);
  if (rotary.dim === undefined && headDim % 2 !== 0) {
    const advice = `give an even rotary.dim, such as ${headDim - 1}, or rotary: false`;
    throw new RangeError(
      `${name}: rotary.dim is headDim by default and must be even, headDim is ${headDim}; ${advice}`,
    );
  }
  const rotaryDim = rotary.dim === undefined ? headDim : readInteger(name, 'rotary.dim', rotary.dim, 0, headDim);
  if (rotaryDim % 2 !== 0) throw wrong(name, 'rotary.dim', 'even', rotaryDim, true);
  const positions = readPositions(name, rotary, place);
  const common = {
    rotaryDim,
    interleaved: readBoolean(name, 'rotary.interleaved', rotary.interleaved, false),
    ...positions,
  };
  refuseBoth(name, rotary, 'tables', ['base', 'frequencies', 'scaling']);
  refuseBoth(name, rotary, 'frequencies', ['base', 'scaling']);
  if (rotary.tables !== undefined) {
    const tables = readTables(name, rotary.tables, rotaryDim);
    checkRows(name, tables.rows, positions, place);
    return { ...common, frequencies: new Float64Array(0), tables, rotaryFactor: 1, rotaryGain: gainOf(tables) };
  }
  const { frequencies, attentionFactor } =
    rotary.frequencies === undefined
      ? readFrequencies(name, 'rotary.', rotary, rotaryDim, lengthOf(positions, place))
      : { frequencies: readGiven(name, rotary.frequencies, rotaryDim), attentionFactor: 1 };
  return {
    ...common,
    frequencies,
    tables: null,
    rotaryFactor: attentionFactor,
    rotaryGain: Math.max(1, attentionFactor), // dimensions past rotaryDim stay
  };
}

function refuseBoth(name: string, rotary: GivenRotary, one: keyof Rotary, others: readonly (keyof Rotary)[]): void {
  for (const other of others) {
    if (rotary[other] === undefined || rotary[one] === undefined) continue;
    throw new TypeError(`${name}: rotary has both ${other} and ${one}; give one of them`);
  }
}

function readGiven(name: string, value: unknown, dim: number): Float64Array {
  const given = readFloats(name, 'rotary.frequencies', value, dim / 2, 'rotary.dim/2');
  return readFinite(name, 'rotary.frequencies', Float64Array.from(given));
}

// --- Positions --------------------------------------------------------------------------------------------------------

type Positions = Pick<Rotation, 'queryPositions' | 'keyPositions' | 'positionBatches'>;

function readPositions(name: string, rotary: GivenRotary, place: Place): Positions {
  const { batch, queryLength, keyLength } = place;
  if (rotary.keyPositions !== undefined && !place.hasKeys) {
    throw new TypeError(`${name}: rotary.keyPositions is not for ${name}: x is turned by rotary.queryPositions`);
  }
  const read = (option: 'queryPositions' | 'keyPositions', length: number) =>
    rotary[option] === undefined
      ? null
      : readNumbers(
          name,
          `rotary.${option}`,
          rotary[option],
          (values) => values === length || values === batch * length,
          `shape needs ${length}${batch > 1 ? ` or ${batch * length}` : ''}`,
        );
  const queries = read('queryPositions', queryLength);
  const keys = read('keyPositions', keyLength);
  const several = (queries !== null && queries.length > queryLength) || (keys !== null && keys.length > keyLength);
  const batches = several ? batch : 1;
  return {
    queryPositions: queries && repeat(queries, batches * queryLength),
    keyPositions: keys && repeat(keys, batches * keyLength),
    positionBatches: batches,
  };
}

/** The largest position plus one. */
function lengthOf({ queryPositions, keyPositions }: Positions, place: Place): number {
  const largest = (given: Float64Array | null, last: number) =>
    given ? given.reduce((most, position) => Math.max(most, position), -Infinity) : last;
  const queries = largest(queryPositions, place.queryOffset + place.queryLength - 1);
  return 1 + (place.hasKeys ? Math.max(queries, largest(keyPositions, place.keyLength - 1)) : queries);
}

/** The numbers again and again until there are so many. */
function repeat(numbers: Float64Array, count: number): Float64Array {
  return numbers.length === count ? numbers : Float64Array.from({ length: count }, (_, n) => numbers[n % numbers.length]);
}

// --- Tables -----------------------------------------------------------------------------------------------------------

function readTables(name: string, value: unknown, dim: number): NonNullable<Rotation['tables']> {
  const given = readRecord(name, 'rotary.tables', value, ['cos', 'sin']);
  if (dim === 0) throw new RangeError(`${name}: rotary.tables need a rotary.dim above 0, got 0`);
  const cosines = tagOf(given['cos']) === '' ? 0 : (given['cos'] as Float32Array).length;
  const rows = Math.max(Math.ceil((2 * cosines) / dim), 1);
  const cos = readFloats(name, 'rotary.tables.cos', given['cos'], (rows * dim) / 2, 'a number of rows of rotary.dim/2');
  const sin = readFloats(name, 'rotary.tables.sin', given['sin'], (rows * dim) / 2, 'rotary.tables.cos');
  return { cos, sin, rows };
}

/** Every position must be a row of the tables. */
function checkRows(name: string, rows: number, positions: Positions, place: Place): void {
  const check = (option: 'queryPositions' | 'keyPositions', first: string, from: number, length: number) => {
    const given = positions[option];
    if (!given && (from < 0 || from + length > rows)) {
      throw new RangeError(
        `${name}: ${first} ${from} + length ${length} must stay within the ${rows} rows of rotary.tables`,
      );
    }
    const bad = given?.findIndex((row) => !Number.isInteger(row) || row < 0 || row >= rows) ?? -1;
    if (bad < 0) return;
    throw wrong(name, `rotary.${option}[${bad}]`, `a row of rotary.tables, 0 to ${rows - 1}`, given![bad], true);
  };
  check('queryPositions', 'queryOffset', place.queryOffset, place.queryLength);
  if (place.hasKeys) check('keyPositions', 'first key', 0, place.keyLength);
}

/** (x1, x2) -> (x1 c - x2 s, x1 s + x2 c) multiplies lengths by sqrt(c^2 + s^2). */
function gainOf({ cos, sin }: { cos: Float32Array; sin: Float32Array }): number {
  return cos.reduce((most, c, n) => Math.max(most, Math.hypot(c, sin[n])), 1);
}
