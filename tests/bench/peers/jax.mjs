// SPDX-License-Identifier: MIT
//
// jax-js on its WebAssembly backend. Inputs and tables are arrays made once; a call ends with the results read.
//
//   plain         nn.dotProductAttention of all heads under jit, gradients by vjp; keeps N x N matrices
//   heads         the same head by head: the library's batched product is slower than its plain one
//   blocked       head by head in blocks of 256 query rows under one jit, normalised after the product with v; a causal block
//                 reads the keys up to its last row
//   recomputing   the same blocks, each a jitted function of its own in a loop, and a backward pass written by hand that makes
//                 the weights again: memory grows like N instead of N^2
//
// jax-js counts references: every operation consumes its arguments, `.ref` keeps one for another use. It queues operations with
// memory for their results until somebody waits, so the loop waits for every block; and what is freed serves later arrays of
// the same size only, so causal blocks of the loop come in eight widths.

import { OUTPUTS, blocksOf, headsFirst, tokensFirst } from './problem.mjs';

export const name = '@jax-js/jax';

export const forms = {
  plain: { expert: false, passes: ['forward', 'both'] },
  heads: { expert: true, passes: ['forward', 'both'], minimumHeads: 2 },
  blocked: { expert: true, passes: ['forward', 'both'] },
  recomputing: { expert: true, passes: ['forward', 'both'] },
};

const ROWS = 256;

export async function open(host) {
  const jax = await host.libraries[name]();
  await jax.init();
  jax.defaultDevice('wasm');
  return jax;
}

/** Blocks of one head, [N, D] rotated: parts of the arrays, and the functions of a block. */
function blocksOfHead({ lax, numpy: np }, problem, widths) {
  const { length, causal, scale } = problem;
  const step = Math.ceil(length / widths);
  const widened = (end) => Math.min(length, Math.ceil(end / step) * step);
  const blocks = blocksOf(problem, ROWS).map((block) => ({ ...block, end: widened(block.end) }));
  const rows = (x, { at, to }) => x.ref.slice([at, to]);
  const firstRows = (x, { end }) => (end === length ? x.ref : x.ref.slice([0, end]));

  /** exp(scores - row maximum) and its row sums; the maximum cancels, so it has no gradient. */
  const weightsOf = (q, k, { at, count, end }) => {
    let scores = np.matmul(q.mul(scale), np.transpose(k));
    if (causal) scores = np.where(np.tri(count, end, at, { dtype: np.bool }), scores, -Infinity);
    const weights = np.exp(scores.ref.sub(lax.stopGradient(np.max(scores, 1, { keepdims: true }))));
    return [weights, np.sum(weights.ref, 1, { keepdims: true })];
  };
  const forward = (block) => (q, k, v) => {
    const [weights, sums] = weightsOf(q, k, block);
    return np.matmul(weights, v).div(sums);
  };
  /** dq of the block, and dk, dv with its part added. */
  const backward = (block) => (q, k, v, output, dOutput, dk, dv) => {
    const { end } = block;
    const [weights, sums] = weightsOf(q.ref, k.ref, block);
    const p = weights.div(sums);
    const delta = np.sum(dOutput.ref.mul(output), 1, { keepdims: true });
    const dScores = p.ref.mul(np.matmul(dOutput.ref, np.transpose(v)).sub(delta)).mul(scale);
    const add = (total, x) => total.add(end === length ? x : np.pad(x, [[0, length - end], [0, 0]]));
    return [
      np.matmul(dScores.ref, k),
      add(dk, np.matmul(np.transpose(dScores), q)),
      add(dv, np.matmul(np.transpose(p), dOutput)),
    ];
  };
  return { blocks, rows, firstRows, forward, backward };
}

export function prepare(jax, problem, form, pass) {
  const { jit, vjp, nn, numpy: np } = jax;
  const { length, headDim, heads, causal } = problem;
  const [q, k, v, dOutput] = ['q', 'k', 'v', 'dOutput'].map((input) =>
    np.array(tokensFirst(problem[input], problem)).reshape([length, heads, headDim]),
  );
  const [cos, sin] = ['cos', 'sin'].map((table) => np.array(problem[table]).reshape([length, 1, headDim / 2]));
  const head = blocksOfHead(jax, problem, form === 'recomputing' ? 8 : length);

  const rotated = (x, cos, sin) => {
    const [first, second] = np.split(x, 2, 2);
    return np.concatenate([first.ref.mul(cos.ref).sub(second.ref.mul(sin.ref)), second.mul(cos).add(first.mul(sin))], 2);
  };
  const rotatedBack = (x, cos, sin) => rotated(x, cos, np.negative(sin));
  const split = (x) => (heads > 1 ? np.split(x, heads, 1) : [x]);
  const matrices = (x) => split(x).map((part) => part.reshape([length, headDim]));
  const joined = (parts) => {
    const wide = parts.map((part) => part.reshape([length, 1, headDim]));
    return heads > 1 ? np.concatenate(wide, 1) : wide[0];
  };
  const dispose = (...arrays) => arrays.flat().forEach((array) => array.dispose());

  // Functions of rotated q and k, and v, all [N, H, D]
  const attend = {
    plain: (q, k, v) => nn.dotProductAttention(q, k, v, { isCausal: causal }),
    heads(q, k, v) {
      const [qs, ks, vs] = [q, k, v].map(split);
      return np.concatenate(qs.map((_, h) => nn.dotProductAttention(qs[h], ks[h], vs[h], { isCausal: causal })), 1);
    },
    blocked(q, k, v) {
      const [qs, ks, vs] = [q, k, v].map(matrices);
      const block = (h) => (part) => {
        const [ownK, ownV] = [head.firstRows(ks[h], part), head.firstRows(vs[h], part)];
        return head.forward(part)(head.rows(qs[h], part), ownK, ownV);
      };
      const output = joined(qs.map((_, h) => np.concatenate(head.blocks.map(block(h)))));
      dispose(qs, ks, vs);
      return output;
    },
  }[form];

  /** The whole pass under one jit; gradients by vjp. */
  function compiled() {
    const attention = (q, k, v, cos, sin) => attend(rotated(q, cos.ref, sin.ref), rotated(k, cos, sin), v);
    if (pass === 'forward') {
      const forward = jit(attention);
      return () => [forward(q.ref, k.ref, v.ref, cos.ref, sin.ref)];
    }
    const both = jit((q, k, v, cos, sin, dOutput) => {
      const [output, pull] = vjp((q, k, v) => attention(q, k, v, cos, sin), [q, k, v]);
      return [output, ...pull(dOutput)];
    });
    return () => both(q.ref, k.ref, v.ref, cos.ref, sin.ref, dOutput.ref);
  }

  /** Loops over jitted blocks. */
  function looped() {
    const [turn, turnBack] = [jit(rotated), jit(rotatedBack)];
    // Full blocks of one size share a function
    const compile = (make) => {
      const made = new Map();
      return (part) => {
        const key = causal ? part.at : part.count;
        if (!made.has(key)) made.set(key, jit(make(part)));
        return made.get(key);
      };
    };
    const [forward, backward] = [compile(head.forward), compile(head.backward)];

    async function outputOf(q, k, v) {
      const parts = [];
      for (const part of head.blocks) {
        const own = [head.rows(q, part), head.firstRows(k, part), head.firstRows(v, part)];
        parts.push(await jax.blockUntilReady(forward(part)(...own)));
      }
      return np.concatenate(parts);
    }

    async function gradientsOf(q, k, v, output, dOutput) {
      let [dk, dv] = [np.zeros([length, headDim]), np.zeros([length, headDim])];
      const parts = [];
      for (const part of head.blocks) {
        const [ownK, ownV] = [head.firstRows(k, part), head.firstRows(v, part)];
        const [ownQ, ownOutput, ownDOutput] = [q, output, dOutput].map((x) => head.rows(x, part));
        const [dq, ...sums] = await jax.blockUntilReady(backward(part)(ownQ, ownK, ownV, ownOutput, ownDOutput, dk, dv));
        parts.push(dq);
        [dk, dv] = sums;
      }
      return [np.concatenate(parts), dk, dv];
    }

    return async () => {
      const [qs, ks] = [q, k].map((x) => matrices(turn(x.ref, cos.ref, sin.ref)));
      const [vs, dOutputs] = [v, dOutput].map((x) => matrices(x.ref));
      const outputs = [];
      for (let h = 0; h < heads; h++) outputs.push(await outputOf(qs[h], ks[h], vs[h]));
      const output = joined(outputs.map((x) => x.ref));
      const gradients = [];
      for (let h = 0; h < heads && pass === 'both'; h++) {
        gradients.push(await gradientsOf(qs[h], ks[h], vs[h], outputs[h], dOutputs[h]));
      }
      dispose(qs, ks, vs, outputs, dOutputs);
      if (pass === 'forward') return [output];
      const [dq, dk, dv] = [0, 1, 2].map((n) => joined(gradients.map((own) => own[n])));
      return [output, turnBack(dq, cos.ref, sin.ref), turnBack(dk, cos.ref, sin.ref), dv];
    };
  }

  const call = form === 'recomputing' ? looped() : compiled();
  let results = [];
  return {
    async run() {
      const arrays = await call();
      results = await Promise.all(arrays.map((array) => array.data()));
    },
    result: () => Object.fromEntries(OUTPUTS[pass].map((output, n) => [output, headsFirst(results[n], problem)])),
    dispose: () => dispose(q, k, v, dOutput, cos, sin),
  };
}
