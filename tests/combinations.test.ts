// SPDX-License-Identifier: MIT
//
// Every option together with every other one, drawn by a seeded generator, against float64: the exact engine and what `auto` makes
// of such calls to rounding, forced engines by their promise. Accuracy option by option is the matter of the other files; a
// combination that one of them leaves out should not be wrong without an error.

import { describe, expect, test } from '@jest/globals';

import { reference } from '../dist/index.js';
import type { Method, Rotary } from '../dist/index.js';
import { UNIT, describeSetting, draw, eachBinary, forwardArgs, fullShape, maxDifference, positionsBy, problem, random, relativeMap } from './support.js';
import { lazy, withLayout } from './support.js';
import type { Problem, Random, Setting } from './support.js';
import { outputError } from './promise/promise.mjs';
import { magnitudes } from './yardstick.js';

/** Roundings of the largest sum of magnitudes (`magnitudes`): twice the most seen, 6.9 of dv. */
const ROUNDINGS = 14;

const chooser = ({ uniform }: Random) => ({
  chance: (p: number) => uniform() < p,
  pick: <T>(...values: T[]): T => values[Math.floor(uniform() * values.length)],
});

function drawRotary(r: Random, headDim: number): Rotary | false | undefined {
  const { chance, pick } = chooser(r);
  const even = 2 * Math.floor(headDim / 2);
  if (headDim % 2 === 0 && chance(0.5)) return pick(undefined, undefined, false);
  const dim = pick(even, 2 * Math.floor((r.uniform() * (even + 2)) / 2));
  return {
    dim,
    ...(chance(0.4) && { interleaved: true }),
    ...pick<Rotary>(
      {},
      { base: pick(2, 500000) },
      { frequencies: draw(dim / 2, r.normal) },
      { scaling: pick({ type: 'linear', factor: 3 }, { type: 'yarn', factor: 4, originalLength: 64 }) },
    ),
  };
}

/** A setting of a few of all options; `far`: of those of the Toeplitz engine, with biases that are far apart. */
function drawSetting(seed: number, far: boolean): Setting {
  const r = random(seed);
  const { chance, pick } = chooser(r);
  const lengths = [1, 3, 8, 31, 33, 64, 65, 100];
  const kvHeads = pick(1, 1, 2);
  const shape = {
    batch: pick(1, 1, 2),
    heads: kvHeads * pick(1, 1, 3),
    kvHeads,
    queryLength: pick(...lengths),
    keyLength: pick(...(far ? lengths.slice(1) : lengths)), // one key alone leaves nothing to be off by
    headDim: pick(1, 2, 4, 5, 8, 12),
    valueDim: pick(1, 3, 4, 9),
  };
  const { batch, heads, queryLength, keyLength, headDim } = shape;
  const diagonals = queryLength + keyLength - 1;
  const setting: Setting = { shape, layout: pick('bhnd', 'bnhd') };
  const queryOffset = pick(0, 0, keyLength - queryLength, 7, -9, 50);
  Object.assign(setting, { queryOffset, causal: chance(0.5) });
  if (chance(0.25)) setting.window = pick([-1, 0], [3, 2], [31, -1], [0, 5], [40, 40]);
  if (chance(0.3)) setting.scale = pick(1, -0.4, 0);
  if (chance(far ? 1 : 0.3)) {
    const size = far ? 25 : 1;
    setting.bias = draw((chance(0.5) ? heads : 1) * diagonals, () => (far && chance(0.1) ? -Infinity : size * r.normal()));
  }
  if (!far) {
    if (chance(0.2)) setting.segments = [0, 5, 5, 30].slice(0, pick(2, 3, 4));
    if (chance(0.2)) setting.softcap = pick(0.5, 5, 1e4);
    if (chance(0.2)) setting.sinks = draw(heads, r.normal);
    if (chance(0.2)) {
      setting.maskShape = [pick(1, batch), pick(1, heads), pick(1, queryLength), keyLength];
      const count = setting.maskShape.reduce((a, b) => a * b);
      const holes = draw(count, () => (chance(0.3) ? -Infinity : r.normal()));
      setting.mask = chance(0.5) ? holes : Uint8Array.from(holes, (x) => Number(x > -1));
    }
  }
  const how = r.uniform();
  if (how < 0.15) return { ...setting, relative: relativeMap(shape, pick(1, 3, 6), seed) };
  const rotary = drawRotary(r, headDim);
  if (rotary !== undefined) setting.rotary = rotary;
  const turns = rotary === undefined ? headDim > 0 : rotary && rotary.dim! > 0;
  if (how < 0.3 && turns) setting.relativePositions = positionsBy(shape, pick((t) => Math.min(t, 9), Math.cbrt, (t) => 30 * Math.sin(t)), queryOffset);
  return setting;
}

/** ALiBi as the biases that it stands for. */
function withoutAlibi({ alibi, ...args }: Problem): Problem {
  if (!alibi) return args;
  const { heads, queryLength, keyLength } = fullShape(args.shape);
  const diagonals = queryLength + keyLength - 1;
  const bias = Float32Array.from({ length: heads * diagonals }, (_, n) => {
    const distance = Math.abs((n % diagonals) - keyLength + 1 + (args.queryOffset ?? 0));
    return (args.bias ? args.bias[n % args.bias.length] : 0) - alibi[Math.floor(n / diagonals)] * distance;
  });
  return { ...args, bias };
}

const RESULTS = ['output', 'lse', 'dq', 'dk', 'dv', 'dBias', 'dSinks', 'dWeights'] as const;
const exactly = Array.from({ length: 150 }, (_, seed) => {
  const setting = drawSetting(seed, false);
  const r = random(1000 + seed);
  const { chance, pick } = chooser(r);
  if (chance(0.2)) setting.alibi = draw(setting.shape.heads, () => pick(0, 0.01, 0.5, 3));
  const size = pick(0.02, 0.5, 2);
  const args = problem(setting, seed, ({ normal }) => size * normal());
  const want = lazy(() => ({ ...reference.forward(forwardArgs(args)), ...reference.backward(args) }));
  const sizes = lazy(() => magnitudes(withoutAlibi(withLayout(args, 'bhnd'))));
  return { seed, args, want, sizes, method: pick<Method>('exact', 'auto'), name: describeSetting(setting) };
});

const far = Array.from({ length: 120 }, (_, seed) => {
  const setting = drawSetting(2000 + seed, true);
  const args = problem({ ...setting, layout: 'bhnd' }, seed, ({ normal }) => 0.2 * normal());
  const want = lazy(() => reference.forward(forwardArgs(args)).output);
  return { seed, args, want, name: describeSetting(setting) };
});

/** What a call throws says; null when it does not. */
function refusalOf(call: () => unknown): string | null {
  try {
    call();
    return null;
  } catch (error) {
    return (error as Error).message;
  }
}

describe('every option beside every other', () => {
  eachBinary((attention) => {
    test.each(exactly)('$method, $seed: $name', ({ args, method, want, sizes }) => {
      const call = { ...args, method, tolerance: 1e-6 };
      const saved = attention().forward(forwardArgs(call));
      const got = { ...saved, ...attention().backward({ ...call, saved }) };
      const roundings = RESULTS.flatMap((name) => {
        expect(got[name] === undefined).toBe(want()[name] === undefined);
        const error = got[name] ? maxDifference(got[name], want()[name]!) : 0;
        return error === 0 ? [] : [{ name, roundings: error / (UNIT * sizes()[name]!) }];
      });
      expect(roundings.filter((one) => !(one.roundings <= ROUNDINGS))).toEqual([]);
    });

    test('biases far apart, by Fourier transforms: within twice the tolerance, or an error', () => {
      let kept = 0;
      const off: string[] = [];
      for (const { args, want, name } of far) {
        const call = { ...forwardArgs(args), method: 'toeplitz', degree: 3, tolerance: 1e-2 } as const;
        const forward = () => attention().forward(call).output;
        const refused = refusalOf(forward);
        if (refused !== null) expect(refused).toMatch(/^forward: method 'toeplitz' misses the tolerance 0.01: /);
        else if (outputError(args, forward(), want()) > 2e-2) off.push(name);
        else kept++;
      }
      expect(off).toEqual([]);
      expect(kept).toBeGreaterThan(far.length / 3);
    });
  });
});
