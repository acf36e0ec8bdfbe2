// SPDX-License-Identifier: MIT
//
// Attention over a set of keys from attention over its parts, each computed on its own: in another call, worker or machine.
//
//   lse_i = log sum_s exp(lse_i^s),     out_i = sum_s exp(lse_i^s - lse_i) out_i^s         over the parts s
//
// Milakov, Gimelshein. Online normalizer calculation for softmax. 2018 (1805.02867). In float64, O(states rows Dv).

import { readChoice, readInteger, readRecord, tagOf, wrong } from './check.js';
import type { Layout, Shape, State } from './types.js';

export interface MergeOptions {
  /** Of the outputs. Default 'bhnd'. */
  layout?: Layout;
  /** Of the calls; only heads and queryLength are looked at, and only for 'bnhd', which cannot do without. */
  shape?: Shape | Pick<Shape, 'heads' | 'queryLength'>;
}

/**
 * The output and lse over all keys of the states together, which must not share any. The same as one call over all of them
 * would give, up to rounding; a state that saw nothing (lse -Infinity) counts for nothing. `sinks` belong to one of the calls.
 *
 * With what it returns, `backward` of `method: 'exact'` over the keys of one state gives dk and dv of these and their part of
 * dq; the parts add up.
 *
 * @throws TypeError for anything but states, RangeError for sizes that do not fit one another.
 */
export function mergeStates(states: readonly State[], options: MergeOptions = {}): State {
  const name = 'mergeStates';
  if (!Array.isArray(states)) throw wrong(name, 'states', 'an array', states, false);
  if (states.length === 0) throw new RangeError(`${name}: states must be one or more, got none`);
  const { rows, width } = checkSizes(name, states);
  const place = readPlace(name, options, rows);

  const [output, lse] = [new Float32Array(rows * width), new Float32Array(rows)];
  const sums = new Float64Array(width);
  for (let r = 0; r < rows; r++) {
    let largest = -Infinity;
    for (const state of states) largest = Math.max(largest, state.lse[r]);
    lse[r] = largest;
    if (largest === -Infinity) continue;
    const at = place(r) * width;
    let total = 0;
    sums.fill(0);
    for (const state of states) {
      const weight = Math.exp(state.lse[r] - largest);
      if (weight === 0) continue; // whatever its output is
      total += weight;
      for (let d = 0; d < width; d++) sums[d] += weight * state.output[at + d];
    }
    lse[r] = largest + Math.log(total);
    for (let d = 0; d < width; d++) output[at + d] = sums[d] / total;
  }
  return { output, lse };
}

/** Rows of lse, and values in a row of output, the same for all states. */
function checkSizes(name: string, states: readonly unknown[]): { rows: number; width: number } {
  const lengths = states.map((state, n) => {
    const given = readRecord(name, `states[${n}]`, state, ['output', 'lse', 'report']);
    return ['lse', 'output'].map((option) => {
      const value = given[option];
      if (tagOf(value) !== 'Float32Array') throw wrong(name, `states[${n}].${option}`, 'a Float32Array', value, false);
      return (value as Float32Array).length;
    });
  });
  const [[rows, values]] = lengths;
  if (rows === 0 || values === 0 || values % rows !== 0) {
    throw new RangeError(`${name}: states[0].output has ${values} values, no multiple of the ${rows} rows of its lse`);
  }
  lengths.forEach(([ofLse, ofOutput], n) => {
    if (ofLse === rows && ofOutput === values) return;
    const [option, got, expected] = ofLse === rows ? ['output', ofOutput, values] : ['lse', ofLse, rows];
    throw new RangeError(`${name}: states[${n}].${option} has ${got} values, that of states[0] has ${expected}`);
  });
  return { rows, width: values / rows };
}

/** Where output has row r of lse. */
function readPlace(name: string, options: unknown, rows: number): (r: number) => number {
  const { layout: givenLayout, shape } = readRecord(name, 'options', options, ['layout', 'shape']);
  const layout = readChoice(name, 'layout', givenLayout, ['bhnd', 'bnhd'] as const);
  if (layout === 'bhnd') return (r) => r;
  const known = ['batch', 'heads', 'kvHeads', 'queryLength', 'keyLength', 'headDim', 'valueDim'];
  const given = readRecord(name, 'shape', shape, known);
  const heads = readInteger(name, 'shape.heads', given['heads'], 1, rows);
  const length = readInteger(name, 'shape.queryLength', given['queryLength'], 1, rows);
  if (rows % (heads * length) !== 0) {
    throw new RangeError(`${name}: lse has ${rows} values, no multiple of shape.heads ${heads} * queryLength ${length}`);
  }
  return (r) => {
    const [head, n] = [Math.floor(r / length), r % length];
    return (Math.floor(head / heads) * length + n) * heads + (head % heads);
  };
}
