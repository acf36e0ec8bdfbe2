// SPDX-License-Identifier: MIT
//
// One engine run by hand, both passes, below the planner: with the degree and the coefficients that a test chooses.

import { readFile } from 'node:fs/promises';

import { Kernel } from '../dist/kernel.js';
import { featuresOf } from '../dist/scores.js';
import { readCall } from '../dist/validate.js';
import { binaries } from './support.js';
import type { Method } from '../dist/index.js';
import type { Outliers } from '../dist/kernel.js';
import type { Problem } from './support.js';

/** A kernel of one of the `binaries`. */
export async function createKernel({ file }: (typeof binaries)[number]): Promise<Kernel> {
  const bytes = await readFile(new URL(`../dist/${file}`, import.meta.url));
  return Kernel.create('test', await WebAssembly.compile(new Uint8Array(bytes)), 2 ** 30);
}

export interface EngineResult {
  output: Float32Array;
  lse: Float32Array;
  dq: Float32Array;
  dk: Float32Array;
  dv: Float32Array;
  dBias: Float32Array | undefined;
  /** There when alibi is. */
  dAlibi: Float32Array | undefined;
  /** There when relative is. */
  dWeights: Float32Array | undefined;
  /** false when the weights of some row did not add up to a positive number, by either pass. */
  positive: boolean;
}

/**
 * Forward, then backward with what forward returned. `coefficients` [batch * kvHeads][degree + 1]; null: the exact engine.
 * `args.method` says whether they are for the polynomial engine or for the Toeplitz engine.
 */
export function runEngine(
  kernel: Kernel,
  args: Problem & { method?: Method },
  coefficients: readonly Float32Array[] | null,
  outliers: Outliers | null = null,
): EngineResult {
  const { problem, inputs } = readCall('backward', args);
  const session = kernel.open('test', problem, featuresOf(problem));
  session.setOutliers(outliers);
  const degree = coefficients && coefficients[0].length - 1;
  const [forward, backward] = (['forward', 'backward'] as const).map((pass) => session.workspaceBytes(pass, degree));
  session.load(inputs, 'backward', Math.max(forward, backward));
  session.setEngine(degree, coefficients ? Float32Array.from(coefficients.flatMap((own) => [...own])) : undefined);
  session.setWorkspace(forward);
  const first = session.run('forward', 0, session.units('forward'));
  session.setWorkspace(backward);
  const second = session.run('backward', 0, session.units('backward'));
  const [output, lse, dq, dk, dv] = (['out', 'lse', 'dq', 'dk', 'dv'] as const).map((name) => session.result(name));
  const [dBias, dAlibi, dWeights] = (['dbias', 'dalibi', 'dweights'] as const).map((name) => session.vector(name));
  session.close();
  return { output, lse, dq, dk, dv, dBias, dAlibi, dWeights, positive: first && second };
}
