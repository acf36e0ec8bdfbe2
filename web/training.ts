// SPDX-License-Identifier: MIT
//
// The training problem of Alman, Song 2024 (arXiv 2402.04497) with RoPE inside, as in *RoPE Attention Can Be Trained in Almost
// Linear Time* (arXiv 2412.17316v3): fit attention with weights x1, x2, y to a target e,
//
//   loss = 1/2 |D^-1 A a3 y - e|_F^2,      A_ij = exp(scale (a1_i x1) R_{j-i} (a2_j x2)^T),   D = diag(A 1).
//
// With q = a1 x1, k = a2 x2, v = a3 y (h in the papers) this is attention between matrix products:
//
//   l = out - e = dL/dout,   dx1 = a1^T dq,   dx2 = a2^T dk,   dy = a3^T dv
//
// where dq, dk, dv are the backward pass at dout = l, by whatever engine. The products are linear in the length, 12 N d D
// operations in all, so that a step costs what attention costs: almost linear time where the polynomial engine serves.
// Heads and batches are those of a transformer: rows of q, k, v and e hold all heads, which is the layout 'bnhd'.

import type { Kernel } from './kernel.js';
import { correlate, project } from './products.js';
import type { AttentionLossResult, BackwardResult, ForwardResult } from './types.js';
import type { Call, Training } from './validate.js';

/** What an instance gives. */
interface Engine {
  kernel: Kernel;
  forward(call: Call): Generator<number, ForwardResult>;
  backward(call: Call): Generator<number, BackwardResult>;
}

/** Fractions of the work done when forward begins and ends and when backward ends, about. */
const [BEFORE, BETWEEN, AFTER] = [0.02, 0.35, 0.97];

/** Loss and gradients for the call `name`. Yields the fraction done. */
export function* lossSteps(name: string, training: Training, engine: Engine): Generator<number, AttentionLossResult> {
  const { problem, modelDim, a1, a2, a3, x1, x2, y, e } = training;
  const projected = (x: Float32Array, w: Float32Array) => at(0, project(engine.kernel, name, x, w, modelDim));
  const correlated = (x: Float32Array, dx: Float32Array) =>
    at(AFTER, correlate(engine.kernel, name, x, dx, x.length / modelDim));

  const q = yield* projected(a1, x1);
  const k = yield* projected(a2, x2);
  const v = yield* projected(a3, y);
  const inputs = { q, k, v, dOutput: null, output: null, lse: null };
  const saved = yield* between(BEFORE, BETWEEN, engine.forward({ problem, inputs }));

  const { residual, loss } = compare(saved.output, e);
  const given = { ...inputs, dOutput: residual, output: saved.output, lse: saved.lse };
  const { dq, dk, dv, ...rest } = yield* between(BETWEEN, AFTER, engine.backward({ problem, inputs: given }));

  const dx1 = yield* correlated(a1, dq);
  const dx2 = yield* correlated(a2, dk);
  const dy = yield* correlated(a3, dv);
  yield 1;
  return { loss, dx1, dx2, dy, ...rest, saved };
}

/** The papers' l, and half its square sum. */
function compare(output: Float32Array, e: Float32Array): { residual: Float32Array; loss: number } {
  const residual = new Float32Array(output.length);
  let sum = 0;
  for (let n = 0; n < output.length; n++) {
    const difference = output[n] - e[n];
    residual[n] = difference;
    sum += difference * difference;
  }
  return { residual, loss: sum / 2 };
}

/** Yields `fraction` between the slices of work. */
function* at<T>(fraction: number, slices: Generator<undefined, T>): Generator<number, T> {
  for (;;) {
    const step = slices.next();
    if (step.done) return step.value;
    yield fraction;
  }
}

/** Fractions 0 to 1 of the steps as `from` to `to`. */
function* between<T>(from: number, to: number, steps: Generator<number, T>): Generator<number, T> {
  // Whoever leaves this generator half done leaves the steps as well, so that the session is closed.
  try {
    for (;;) {
      const step = steps.next();
      if (step.done) return step.value;
      yield from + (to - from) * step.value;
    }
  } finally {
    steps.return(undefined as never);
  }
}
