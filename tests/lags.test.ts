// SPDX-License-Identifier: MIT
//
// What the sampled distances say of dBias against its error at all of them: where it gathers at few distances, and where all of it comes
// from an output and lse that are off, which gradients at single distances go by themselves.

import { beforeAll, describe, expect, test } from '@jest/globals';

import { reference } from '../dist/index.js';
import { LagSampler } from '../dist/lags.js';
import { workspaceOf } from '../dist/planner.js';
import { Sampler, survey } from '../dist/sampling.js';
import { featuresOf } from '../dist/scores.js';
import { readCall } from '../dist/validate.js';
import { createKernel } from './engine.js';
import { binaries, eachBinary, relativeFrobenius } from './support.js';
import { instance } from './promise/instances.mjs';
import type { Kernel } from '../dist/kernel.js';

const LENGTH = 300;
const biasOf = (f: (t: number) => number) =>
  Float32Array.from({ length: 2 * LENGTH - 1 }, (_, n) => f(Math.max(0, n - LENGTH + 1)));

const drain = <T>(steps: Generator<number, T>): T => {
  for (;;) {
    const { done, value } = steps.next();
    if (done) return value;
  }
};

// Beyond the band weights fall to a hundredth within the first third of an octave of distances, and with them what is off.
describe('steep biases, all keys alike', () => {
  eachBinary((attention) => {
    test.each([
      [2, 2, 0],
      [4, 1, 2],
      [8, 1, 1],
      [8, 2, 1],
    ])('D = %d, entries to %d, seed %d: the estimate is the error', (headDim, bound, seed) => {
      const shape = { heads: 1, queryLength: LENGTH, headDim };
      const args = { ...instance({ kind: 'equal', bound, seed, shape, causal: true }), bias: biasOf((t) => -0.05 * t) };
      const { dBias, report } = attention().backward({ ...args, method: 'polynomial', degree: 4, tolerance: 1e-2, onMiss: 'report' });
      const error = relativeFrobenius(dBias!, reference.backward(args).dBias!);
      expect(report.gradientErrorEstimate! / error).toBeGreaterThan(0.6);
      expect(report.gradientErrorEstimate! / error).toBeLessThan(1.7);
    });
  });
});

describe.each(binaries)('output and lse that are off, $name', (binary) => {
  let kernel: Kernel;
  beforeAll(async () => {
    kernel = await createKernel(binary);
  });

  test.each<[string, (row: number) => number]>([
    ['alike in all rows', () => 0.1],
    ['by chance', (row) => (Math.imul(row + 1, 0x9e3779b1) & 0x10000 ? 0.1 : -0.1)],
  ])('%s', (_, off) => {
    // By chance estimates are 0.6 to 3.4 times the error, on average about what they should be.
    const ratios = [1, 2, 3, 4, 5, 6, 7, 8].map((seed) => ratioOf(off, seed));
    const mean = Math.exp(ratios.reduce((sum, ratio) => sum + Math.log(ratio), 0) / ratios.length);
    expect(mean).toBeGreaterThan(0.6);
    expect(mean).toBeLessThan(1.7);
  });

  /** The estimate over the error. */
  function ratioOf(off: (row: number) => number, seed: number): number {
    const shape = { heads: 2, kvHeads: 1, queryLength: LENGTH, headDim: 4 };
    const own = { ...instance({ kind: 'uniform', bound: 0.5, seed, shape, causal: true }), bias: biasOf((t) => -0.5 * Math.log1p(t)) };
    const { dOutput, ...forward } = own;
    const { output, lse } = reference.forward(forward);
    const there = { output: Float32Array.from(output), lse: Float32Array.from(lse, (x, row) => x + off(row)) };
    const { problem, inputs } = readCall('backward', { ...forward, ...there, dOutput, method: 'polynomial', degree: 3 });
    const session = kernel.open('test', problem, featuresOf(problem));
    session.load(inputs, 'backward', workspaceOf(session, ['backward'], 3));
    const bounds = drain(survey(session));
    const sampler = new Sampler(session, bounds, seed);
    drain(sampler.pilot('backward', [3], 1, { thorough: true }));
    session.setWorkspace(workspaceOf(session, ['backward'], 3));
    session.setEngine(3, drain(sampler.coefficients(3))!);
    const lags = new LagSampler(session, problem, bounds);
    expect(drain(lags.choose(sampler, 3, 1e-3)).error).toBeLessThan(1e-3);
    session.run('backward', 0, session.units('backward'));
    const error = relativeFrobenius(session.vector('dbias')!, reference.backward(own).dBias!);
    const estimate = lags.check(sampler, 1e-3).error;
    session.close();
    expect(error).toBeGreaterThan(5e-2);
    return estimate / error;
  }
});
