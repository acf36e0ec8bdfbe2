// One small problem, the same for every consumer: grouped heads, unequal lengths, causal, no two numbers alike.

const draw = (length, phase) => Float32Array.from({ length }, (_, n) => Math.sin(phase + 1.7 * n));

export const forwardArgs = {
  shape: { heads: 2, kvHeads: 1, queryLength: 5, keyLength: 7, headDim: 4, valueDim: 3 },
  causal: true,
  queryOffset: 2,
  q: draw(40, 1),
  k: draw(28, 2),
  v: draw(21, 3),
};

export const backwardArgs = { ...forwardArgs, dOutput: draw(30, 4) };
