// SPDX-License-Identifier: MIT
//
// Mean squares of scores, on which a certificate stands, are never below what float64 makes of the same inputs, and hardly above.

import { describe, expect, test } from '@jest/globals';

import { reference } from '../dist/index.js';
import type { ForwardArgs } from '../dist/index.js';
import type { Spread } from '../dist/kernel.js';
import { readCall } from '../dist/validate.js';
import { createKernel } from './engine.js';
import { instance } from './promise/instances.mjs';
import { binaries } from './support.js';

type Setting = Omit<ForwardArgs, 'q' | 'k' | 'v'>;

const CHUNK = 32;

/** Of one head, in float64. */
function spreadOf({ q, k, shape: { headDim: D }, rotary, causal = false, queryOffset = 0 }: Pick<ForwardArgs, 'q' | 'k'> & Setting): Omit<Spread, 'rows'> {
  const [Nq, Nk] = [q.length / D, k.length / D];
  const rotated = (x: Float32Array, offset: number) =>
    rotary === false ? Float64Array.from(x) : reference.rotate({ x, shape: { heads: 1, queryLength: x.length / D, headDim: D }, queryOffset: offset });
  const [queries, keys] = [rotated(q, queryOffset), rotated(k, 0)];
  for (let d = 0; d < D; d++) {
    let mean = 0;
    for (let j = 0; j < Nk; j++) mean += keys[j * D + d] / Nk;
    for (let j = 0; j < Nk; j++) keys[j * D + d] -= mean;
  }
  const products = new Float64Array(D * D);
  const sum = new Float64Array(D);
  const found = { scores: 0, keys: 0, gain: 0 };
  for (let i = 0, known = 0; i < Nq; i++) {
    if (i % CHUNK === 0) {
      for (const end = causal ? Math.min(Nk, i + queryOffset) : Nk; known < end; known++) {
        const row = keys.subarray(known * D, (known + 1) * D);
        row.forEach((x, a) => {
          sum[a] += x;
          row.forEach((y, b) => (products[a * D + b] += x * y));
        });
      }
      if (known > 0) found.keys = Math.max(found.keys, sum.reduce((all, _, a) => all + products[a * (D + 1)], 0) / known);
    }
    if (known === 0) continue;
    const row = queries.subarray(i * D, (i + 1) * D);
    let [mean, square] = [0, 0];
    row.forEach((x, a) => {
      mean += (x * sum[a]) / known / Math.sqrt(D);
      row.forEach((y, b) => (square += (x * y * products[a * D + b]) / known / D));
    });
    found.scores = Math.max(found.scores, square * Math.exp(-mean));
    found.gain = Math.max(found.gain, Math.exp(-mean));
  }
  return found;
}

/** Keys of two kinds, one after the other, whose sums float32 rounds down: queries opposed to the first kind. */
function drift(): ForwardArgs {
  const [D, half, a] = [8, 2 ** 17, Math.fround(0.69890207)];
  const [q, k] = [new Float32Array(64 * D), new Float32Array(2 * half * D)];
  for (let j = 0; j < 2 * half; j++) k[j * D] = j < half ? a : -a;
  for (let i = 0; i < 64; i++) q[i * D] = ((i % 2 ? 1 : -1) * 3 * Math.sqrt(D)) / a;
  const shape = { heads: 1, queryLength: 64, keyLength: 2 * half, headDim: D };
  return { q, k, v: k, shape, causal: true, rotary: false, queryOffset: half - CHUNK };
}

describe.each(binaries)('mean squares of scores ($file)', (binary) => {
  const shape = { heads: 1, queryLength: 600, headDim: 16 };
  const random = (kind: string, bound: number, setting: Partial<Setting> = {}): ForwardArgs => {
    const { q, k, v, ...rest } = instance({ kind, bound, seed: 5, shape, ...setting });
    return { q, k, v, shape: rest.shape, ...setting };
  };
  test.each<[string, () => ForwardArgs]>([
    ['uniform', () => random('uniform', 0.5)],
    ['uniform, causal', () => random('uniform', 1, { causal: true })],
    ['heavy tails, causal', () => random('heavy tails', 1, { causal: true })],
    ['few keys', () => random('clusters', 0.5, { shape: { ...shape, keyLength: 77 } })],
    ['head size no multiple of four', () => random('uniform', 1, { shape: { ...shape, headDim: 10 }, causal: true })],
    ['sums that drift', drift],
  ])('%s', async (_, make) => {
    const args = make();
    const { problem, inputs } = readCall('forward', args);
    const session = (await createKernel(binary)).open('test', problem);
    session.load(inputs, 'forward', 2 ** 20, true);
    const found = session.spread(0)!;
    const wanted = spreadOf(args);
    for (const name of ['scores', 'keys', 'gain'] as const) {
      expect(found[name]).toBeGreaterThanOrEqual(wanted[name]);
      expect(found[name]).toBeLessThanOrEqual(wanted[name] * 1.05);
    }
  });
});
