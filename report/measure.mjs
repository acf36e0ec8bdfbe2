// SPDX-License-Identifier: MIT
//
// Timing and running through the public API. Functions that are compared take turns, so that whatever disturbs the machine
// disturbs all of them; times are medians. A polynomial that cannot be fitted at all counts as one that failed, not as an
// error of the report.

import { theory } from '../dist/index.js';
import { median } from './statistics.mjs';

/** Milliseconds beyond which one warm-up call and few timed ones are enough. */
const LONG = 150;

/**
 * Calls the functions in turn until each has had `seconds` (three calls at least) and gives the median of each in
 * milliseconds.
 *
 * @param {Record<string, () => unknown>} runs
 */
export function race(runs, seconds) {
  const time = (run) => {
    const start = performance.now();
    run();
    return performance.now() - start;
  };
  const names = Object.keys(runs);
  const times = Object.fromEntries(names.map((name) => [name, []]));
  for (const name of names) if (time(runs[name]) < LONG) time(runs[name]);
  const spent = (name) => times[name].reduce((sum, one) => sum + one, 0);
  const enough = (name) => times[name].length >= 3 && (spent(name) >= 1000 * seconds || times[name].length >= 100);
  while (!names.every(enough)) for (const name of names) if (!enough(name)) times[name].push(time(runs[name]));
  return Object.fromEntries(names.map((name) => [name, median(times[name])]));
}

/** Options of a call by a polynomial that is to be measured whatever it is worth. */
export const polynomial = (degree) => ({ method: 'polynomial', degree, onMiss: 'report' });

/** The result, or null where no polynomial of the degree can be fitted. */
export function attempt(run) {
  try {
    return run();
  } catch (problem) {
    if (problem instanceof RangeError && problem.message.includes('coefficients beyond float32')) return null;
    throw problem;
  }
}

/** Useful operations of a degree, or of exact without one: to leave out what would take too long. */
export const operations = ({ length, headDim, degree, pass = 'forward' }) =>
  theory.cost({ method: degree === undefined ? 'exact' : 'polynomial', degree, pass, heads: 1, queryLength: length, headDim });

/** How many times those of exact are those of a degree, forward. */
export const operationsGain = ({ length, headDim, degree }) =>
  operations({ length, headDim }) / operations({ length, headDim, degree });

/** `count` rows of `length`, evenly spread, first and last included. */
export function spreadRows(length, count) {
  const rows = Math.min(count, length);
  return Array.from({ length: rows }, (_, n) => Math.round((n * (length - 1)) / Math.max(1, rows - 1)));
}

/** Those rows of an array [length, dim]. */
export function takeRows(array, rows, dim) {
  const taken = new array.constructor(rows.length * dim);
  rows.forEach((row, n) => taken.set(array.subarray(row * dim, (row + 1) * dim), n * dim));
  return taken;
}

/** Arguments for these query rows alone, at the positions that they have in the whole (no causal mask). */
export function rowsOnly(args, rows) {
  const { headDim } = args.shape;
  const dOutput = args.dOutput && { dOutput: takeRows(args.dOutput, rows, headDim) };
  return {
    ...args,
    q: takeRows(args.q, rows, headDim),
    ...dOutput,
    shape: { ...args.shape, queryLength: rows.length, keyLength: args.shape.queryLength },
    rotary: { queryPositions: rows },
  };
}
