// SPDX-License-Identifier: MIT
//
// mergeStates: parts of the keys, attended to in calls of their own, are together what one call gives; so are their gradients.

import { describe, expect, test } from '@jest/globals';

import { mergeStates } from '../dist/index.js';
import type { State } from '../dist/index.js';
import { UNIT, eachBinary, forwardArgs, inLayout, maxAbs, problem } from './support.js';
import type { Problem, Setting } from './support.js';

/** Roundings, 2^-24, of the size of the result times that of the scores (lse): twice the most seen, which stands behind each. */
const TOLERANCE = {
  output: 3.2, // 1.6
  lse: 7, // 3.4
  gradient: 4.7, // 2.3
};

const shape = { batch: 2, heads: 4, kvHeads: 2, queryLength: 40, keyLength: 90, headDim: 8, valueDim: 5 };

/** Keys from .. to - 1 of a problem: positions count from there. */
function part(args: Problem, from: number, to: number): Problem {
  const keys = (x: Float32Array, width: number) => {
    const rows = Array.from({ length: 4 }, (_, head) => x.subarray((head * 90 + from) * width, (head * 90 + to) * width));
    return Float32Array.from(rows.flatMap((row) => [...row]));
  };
  const queryOffset = (args.queryOffset ?? 0) - from;
  return { ...args, shape: { ...shape, keyLength: to - from }, k: keys(args.k, 8), v: keys(args.v, 5), queryOffset };
}

eachBinary((attention) => {
  const options = { method: 'exact' } as const;
  const forward = (args: Problem): State => attention().forward({ ...forwardArgs(args), ...options });

  const SETTINGS: [string, Setting][] = [
    ['full', { shape }],
    ['causal: the last part is seen by few', { shape, causal: true, queryOffset: 45 }],
    ['a window: each part is seen by some', { shape, window: [10, 3], queryOffset: 20 }],
    ['large scores', { shape, scale: 20 }],
  ];
  test.each(SETTINGS)('parts together are the whole: %s', (_, setting) => {
    const args = problem(setting, 1);
    const whole = forward(args);
    const scores = maxAbs(whole.lse.filter(Number.isFinite));
    const parts = [part(args, 0, 30), part(args, 30, 31), part(args, 31, 90)];
    const states = parts.map(forward);
    const before = structuredClone(states);
    const merged = mergeStates(states);
    expect(states).toEqual(before);
    expect(merged.output).toBeAllclose(whole.output, { atol: TOLERANCE.output * UNIT * scores * maxAbs(args.v) });
    expect(merged.lse).toBeAllclose(whole.lse, { atol: TOLERANCE.lse * UNIT * scores });
    // In any order and in steps
    const steps = mergeStates([mergeStates([states[2], states[0]]), states[1]]);
    expect(steps.output).toBeAllclose(whole.output, { atol: TOLERANCE.output * UNIT * scores * maxAbs(args.v) });

    // Gradients of each part from the state of the whole
    const gradients = parts.map((one) => attention().backward({ ...one, ...options, saved: merged }));
    const expected = attention().backward({ ...args, ...options });
    const dq = gradients[0].dq.map((x, n) => x + gradients[1].dq[n] + gradients[2].dq[n]);
    expect(dq).toBeAllclose(expected.dq, { atol: TOLERANCE.gradient * UNIT * scores * maxAbs(expected.dq) });
    for (const [name, width] of [['dk', 8], ['dv', 5]] as const) {
      const atol = TOLERANCE.gradient * UNIT * scores * maxAbs(expected[name]);
      for (let head = 0; head < 4; head++) {
        const rows = gradients.map((one) => one[name].subarray((head * one[name].length) / 4, ((head + 1) * one[name].length) / 4));
        const own = Float32Array.from(rows.flatMap((row) => [...row]));
        expect(own).toBeAllclose(expected[name].subarray(head * 90 * width, (head + 1) * 90 * width), { atol, name });
      }
    }
  });

  test('sinks are given to one of the parts', () => {
    const sinks = Float32Array.of(1, 0, 2, -1);
    const args = problem({ shape, sinks }, 2);
    const merged = mergeStates([forward(part(args, 0, 50)), forward({ ...part(args, 50, 90), sinks: undefined })]);
    expect(merged.output).toBeAllclose(forward(args).output, { atol: TOLERANCE.output * UNIT * maxAbs(args.v) });
  });

  test('the other layout', () => {
    const args = problem({ shape }, 3);
    const states = [part(args, 0, 50), part(args, 50, 90)].map(forward);
    const merged = mergeStates(states);
    const other = states.map((state) => ({ ...state, output: inLayout(state.output, 'bnhd', 4, 40, 5) }));
    const got = mergeStates(other, { layout: 'bnhd', shape });
    expect(got.output).toEqual(inLayout(merged.output, 'bnhd', 4, 40, 5));
    expect(got.lse).toEqual(merged.lse);
    expect(mergeStates(other, { layout: 'bnhd', shape: { heads: 4, queryLength: 40 } })).toEqual(got);
    // lse is in the same order, so the layout matters
    expect(mergeStates(other).output).not.toEqual(got.output);
  });
});

describe('by hand', () => {
  const state = (lse: number[], output: number[]): State => ({ lse: Float32Array.from(lse), output: Float32Array.from(output) });

  test('weights are exp(lse) over their sum', () => {
    const merged = mergeStates([state([Math.log(1), Math.log(2)], [8, 0, 3, 3]), state([Math.log(3), Math.log(2)], [0, 4, 5, 1])]);
    expect(merged.output).toBeAllclose([2, 3, 4, 2], { rtol: 2 * UNIT });
    expect(merged.lse).toBeAllclose([Math.log(4), Math.log(4)], { rtol: 2 * UNIT });
  });

  test('a state that saw nothing counts for nothing, whatever it holds; none of them: zeros', () => {
    const merged = mergeStates([state([-Infinity, -Infinity], [NaN, NaN]), state([3, -Infinity], [7, 9])]);
    expect(merged).toEqual(state([3, -Infinity], [7, 0]));
  });

  test('lse far apart and far from 0 do not overflow', () => {
    const merged = mergeStates([state([1e4, -1e4], [1, 2]), state([1e4, 500], [3, 4])]);
    expect(merged.output).toEqual(Float32Array.of(2, 4));
    expect(merged.lse).toBeAllclose([1e4 + Math.log(2), 500], { rtol: UNIT });
  });

  test('one state is itself; NaN stays NaN', () => {
    expect(mergeStates([state([1, 2], [3, 4])])).toEqual(state([1, 2], [3, 4]));
    expect(mergeStates([state([NaN], [3]), state([1], [2])])).toEqual(state([NaN], [NaN]));
  });

  const one = state([1, 2], [3, 4, 5, 6]);
  const CASES: [unknown, unknown, typeof TypeError | typeof RangeError, string][] = [
    [one, {}, TypeError, 'states must be an array, got a Object'],
    [[], {}, RangeError, 'states must be one or more, got none'],
    [[one, null], {}, TypeError, 'states[1] must be an object, got null'],
    [[one, { output: one.output }], {}, TypeError, 'states[1].lse must be a Float32Array, got undefined'],
    [[{ ...one, output: [1] }], {}, TypeError, 'states[0].output must be a Float32Array, got an array'],
    [[{ ...one, weights: 1 }], {}, TypeError, 'there is no option states[0].weights; known are output, lse, report'],
    [[state([1, 2], [3, 4, 5])], {}, RangeError, 'states[0].output has 3 values, no multiple of the 2 rows of its lse'],
    [[state([], [])], {}, RangeError, 'states[0].output has 0 values'],
    [[one, state([1], [3, 4, 5, 6])], {}, RangeError, 'states[1].lse has 1 values, that of states[0] has 2'],
    [[one, state([1, 2], [3, 4])], {}, RangeError, 'states[1].output has 2 values, that of states[0] has 4'],
    [[one], { layout: 'nhd' }, RangeError, "layout must be one of 'bhnd', 'bnhd', got 'nhd'"],
    [[one], { layout: 'bnhd' }, TypeError, 'shape must be an object, got undefined'],
    [[one], { layout: 'bnhd', shape: { heads: 2 } }, TypeError, 'shape.queryLength must be a number, got undefined'],
    [
      [one],
      { layout: 'bnhd', shape: { heads: 2, queryLength: 2 } },
      RangeError,
      'lse has 2 values, no multiple of shape.heads 2 * queryLength 2',
    ],
    [[one], { order: 1 }, TypeError, 'there is no option options.order; known are layout, shape'],
  ];
  test.each(CASES)('mergeStates(%j, %j)', (states, options, kind, message) => {
    const act = () => mergeStates(states as never, options as never);
    expect(act).toThrow(kind);
    expect(act).toThrow(`mergeStates: ${message}`);
  });
});
