// SPDX-License-Identifier: MIT
//
// This package, method 'exact', through its public API. A call copies the arrays in and out and makes its own rotary tables.

export const name = 'rope-attention';

/** Each form: is it what one writes first (ordinary) or what an expert makes of it, and the passes it has. */
export const forms = { exact: { expert: true, passes: ['forward', 'both'] } };

export async function open(host) {
  const { createRopeAttention } = await host.libraries[name]();
  return createRopeAttention();
}

export function prepare(attention, { q, k, v, dOutput, heads, length, headDim, causal }, form, pass) {
  const call = { q, k, v, shape: { heads, queryLength: length, headDim }, causal, method: form };
  let results;
  return {
    run() {
      const { output, lse } = attention.forward(call);
      results = { output };
      if (pass === 'both') {
        const { dq, dk, dv } = attention.backward({ ...call, dOutput, output, lse });
        results = { output, dq, dk, dv };
      }
    },
    result: () => results,
    dispose() {},
  };
}
