// SPDX-License-Identifier: MIT
//
// One training step, timed, and how far its gradients are from others.

/** Forward, then backward with what it returned; milliseconds of each. */
export function step(attention, { dOutput, ...args }) {
  const t0 = performance.now();
  const { output, lse, report } = attention.forward(args);
  const t1 = performance.now();
  const gradients = attention.backward({ ...args, dOutput, output, lse });
  const t2 = performance.now();
  return { forward: t1 - t0, backward: t2 - t1, both: t2 - t0, output, lse, gradients, report };
}

/** |got - exact| / |exact|, Frobenius norms. */
export function relativeError(got, exact) {
  let [above, below] = [0, 0];
  exact.forEach((x, n) => ((above += (got[n] - x) ** 2), (below += x * x)));
  return Math.sqrt(above / below);
}

export const median = (values) => values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)];

/** Two significant figures, or whole numbers. */
export const figures = (x) => (x >= 100 ? x.toFixed(0) : x.toPrecision(2));
