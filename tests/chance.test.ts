// SPDX-License-Identifier: MIT
//
// Where chance decides: weighted draws that go on, the rule by which a sample is enlarged, and calls at the border of a tolerance, of which
// one in ten or so used to go on to the next degree, five times as dear, or to the exact engine.

import { afterAll, beforeAll, describe, expect, jest, test } from '@jest/globals';

import { createRopeAttention, type RopeAttention } from '../dist/index.js';
import { random, WeightedDraws } from '../dist/draws.js';
import { Session } from '../dist/kernel.js';
import { DEVIATIONS, Tally } from '../dist/tally.js';
import { instance } from './promise/instances.mjs';
import { relativeFrobenius } from './support.js';

const TAKEN = new Set([3, 77, 500]);
const sum = (values: Iterable<number>) => [...values].reduce((a, b) => a + b, 0);

describe('weighted draws', () => {
  test.each([
    ['evenly', null],
    ['half as many again by the logarithm of the row', 500],
  ])('%s: sums are right on average, of the first ones and of all when there are more', (_, length) => {
    const value = (row: number) => 1 / ((row % 500) + 10);
    const total = sum(Array.from({ length: 2000 }, (_, row) => (TAKEN.has(row) ? 0 : value(row))));
    const sums = [0, 1].map(() => [] as number[]);
    for (let seed = 0; seed < 500; seed++) {
      const draws = new WeightedDraws(2000, length, TAKEN, random(seed, 0, 1)).add(32);
      const first = draws.rows;
      sums[0].push(sum(first.map(({ row, weight }) => weight * value(row))) / total);
      const all = draws.add(96).rows;
      sums[1].push(sum(all.map(({ row, weight }) => weight * value(row))) / total);
      expect(all.slice(0, first.length).map(({ row }) => row)).toEqual(first.map(({ row }) => row));
      expect(all.some(({ row }) => TAKEN.has(row))).toBe(false);
    }
    for (const own of sums) {
      const mean = sum(own) / own.length;
      const deviation = Math.sqrt(sum(own.map((one) => (one - mean) ** 2)) / own.length);
      expect(Math.abs(mean - 1)).toBeLessThan((4 * deviation) / Math.sqrt(own.length));
    }
  });

  test('all of few, once each, whether at first or later', () => {
    for (const counts of [[40], [10, 30]]) {
      const draws = new WeightedDraws(100, null, new Set([3, 77]), random(1, 0, 1));
      for (const count of counts) draws.add(count);
      expect(draws.rows.map(({ row }) => row).sort((a, b) => a - b)).toEqual(Array.from({ length: 100 }, (_, n) => n).filter((n) => n !== 3 && n !== 77));
      expect(draws.rows.every(({ weight }) => weight === 1)).toBe(true);
    }
  });
});

describe('the rule', () => {
  const FEW = { hidden: 1, enlarged: { rows: false, columns: false } };
  const MORE = { hidden: 1, enlarged: { rows: true, columns: true } };

  /** Rows of relative squared errors, each row standing for `weight`. */
  function tally(chance: typeof FEW, name: 'dq' | 'dk' | 'dv', errors: readonly number[], weight: number): Tally {
    const own = new Tally(chance);
    own.gradient(name, new Float32Array(errors.length).fill(1), Float32Array.from(errors, (one) => 1 + Math.sqrt(one)), 0, errors.map(() => weight));
    return own;
  }

  test('two deviations of the squared error, two and a half once a sample was enlarged', () => {
    const errors = [1e-4, 3e-4];
    const deviation = Math.sqrt(10 * 9 * 2) * 1e-4; // of 10 (1e-4 + 3e-4), whose mean is 20 2e-4
    for (const [chance, times] of [[FEW, DEVIATIONS.first], [MORE, DEVIATIONS.enlarged]] as const) {
      const { error, upper } = tally(chance, 'dq', errors, 10).result();
      expect(error).toBeCloseTo(Math.sqrt(2e-4), 6);
      expect(upper).toBeCloseTo(Math.sqrt((40e-4 + times * deviation) / 20), 6);
    }
    expect([DEVIATIONS.first, DEVIATIONS.enlarged]).toEqual([2, 2.5]);
  });

  test('a doubt is an error that may be on either side of the limit, of rows or of columns, and no other that is too large', () => {
    const errors = [1e-4, 3e-4];
    const at = (share: number) => Math.sqrt((40e-4 + share * Math.sqrt(180) * 1e-4) / 20);
    for (const [name, sample] of [['dq', 'rows'], ['dk', 'columns'], ['dv', 'columns']] as const) {
      const own = tally(FEW, name, errors, 10);
      expect(own.doubtful(at(2.01))).toEqual([]); // within the limit
      expect(own.doubtful(at(1.99))).toEqual([sample]);
      expect(own.doubtful(at(-0.99))).toEqual([sample]);
      expect(own.doubtful(at(-1.01))).toEqual([]); // most likely beyond it
    }
    const both = tally(FEW, 'dq', errors, 10);
    both.gradient('dk', Float32Array.of(1), Float32Array.of(1.5), 0, [1]);
    expect(both.doubtful(at(1))).toEqual([]);
    const failed = tally(FEW, 'dq', errors, 10);
    failed.fail();
    expect(failed.doubtful(at(1))).toEqual([]);
  });

  test('the second look lets far fewer errors pass that are too large than the first', () => {
    // Squared errors like those of exponential ones, relative to rows of different sizes.
    const next = random(5, 0, 9);
    const rows = 10000;
    const reference = Float64Array.from({ length: rows }, () => 0.5 + next());
    const difference = reference.map((one) => -1e-4 * one * Math.log(1 - next()));
    const truth = Math.sqrt(sum(difference) / sum(reference));
    const look = (draws: WeightedDraws, chance: typeof FEW) => {
      const drawn = draws.rows;
      const own = new Tally(chance);
      const exact = Float32Array.from(drawn, ({ row }) => Math.sqrt(reference[row]));
      const got = exact.map((one, n) => one + Math.sqrt(difference[drawn[n].row]));
      own.gradient('dq', exact, got, 0, drawn.map(({ weight }) => weight));
      return own;
    };
    const passing = (limit: number) => {
      let [first, second] = [0, 0];
      for (let seed = 0; seed < 1000; seed++) {
        const draws = new WeightedDraws(rows, null, new Set(), random(seed, 1, 2)).add(32);
        const few = look(draws, FEW);
        if (few.result().upper <= limit) first++;
        else if (few.doubtful(limit).length > 0 && look(draws.add(96), MORE).result().upper <= limit) second++;
      }
      return { first: first / 1000, second: second / 1000 };
    };
    const [just, tenth, well] = [1.0001, 1.1, 0.85].map((share) => passing(truth / share));
    expect(just.second).toBeLessThan(0.03);
    expect(just.second).toBeLessThan(0.4 * just.first);
    expect(tenth.second).toBeLessThan(0.003);
    expect(well.second).toBeGreaterThan(0.2); // what it is for
    expect(well.first + well.second).toBeGreaterThan(0.8);
  });
});

describe('calls at the border of a tolerance', () => {
  let attention: RopeAttention;
  beforeAll(async () => {
    attention = await createRopeAttention();
  });
  afterAll(() => attention.dispose());

  test.each([
    [false, [0, 6, 11, 15, 28]],
    [true, [26]],
  ])('take the degree that keeps it, whatever the seed: causal %p', (causal, seeds) => {
    const tolerance = 9.5e-3;
    const shape = { heads: 1, queryLength: 8192, headDim: 16 };
    const args = instance({ kind: 'uniform', bound: 0.5, seed: 1, shape, causal });
    const exact = attention.backward({ ...args, method: 'exact' });
    for (const seed of seeds) {
      const got = attention.backward({ ...args, tolerance, seed });
      expect(got.report.degree).toBe(2);
      for (const name of ['dq', 'dk', 'dv'] as const) expect(relativeFrobenius(got[name], exact[name])).toBeLessThanOrEqual(tolerance);
    }
  });

  test('no more is drawn where nothing is in doubt, and more than once never', () => {
    const shape = { heads: 1, queryLength: 8192, headDim: 16 };
    const args = { ...instance({ kind: 'uniform', bound: 0.5, seed: 1, shape }), seed: 28 };
    const [apart, beside] = [jest.spyOn(Session.prototype, 'columns'), jest.spyOn(Session.prototype, 'polynomialColumns')];
    /** Keys that gradients are exact for, in all. */
    const keys = (tolerance: number) => {
      for (const columns of [apart, beside]) columns.mockClear();
      const { report } = attention.backward({ ...args, tolerance });
      expect(report.degree).toBe(2);
      const lengths = beside.mock.calls.map(([, rows, , withExact]) => (withExact ? rows.length : 0));
      return sum([...lengths, ...apart.mock.calls.map(([, rows]) => rows.length)]);
    };
    const [clear, doubtful] = [keys(1.5e-2), keys(9.5e-3)];
    for (const columns of [apart, beside]) columns.mockRestore();
    expect(clear).toBeLessThanOrEqual(24);
    expect(doubtful).toBeGreaterThan(24);
    expect(doubtful).toBeLessThanOrEqual(24 + 48);
  });
});
