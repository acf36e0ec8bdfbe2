// What an instance, of this thread or of a worker, makes of the inputs, as JSON can carry it.

import { backwardArgs, forwardArgs } from './inputs.js';

export async function compute(attention) {
  const { output, lse } = await attention.forward(forwardArgs);
  const { dq, dk, dv } = await attention.backward(backwardArgs);
  attention.dispose();
  return { simd: attention.simd, output: [...output], lse: [...lse], dq: [...dq], dk: [...dk], dv: [...dv] };
}
