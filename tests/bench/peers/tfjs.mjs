// SPDX-License-Identifier: MIT
//
// TensorFlow.js on its WebAssembly backend. Inputs, tables and masks are tensors made once; a call ends with the results read.
//
//   plain         ordinary operations on [H, N, D], gradients by tf.valueAndGrads; keeps N x N matrices
//   blocked       head by head in blocks of 256 query rows with a gradient of its own that keeps the weights of every block
//   recomputing   the same, but the backward pass makes the weights again: memory grows like N instead of N^2
//
// What an expert has to know of the backend: its product is fast (XNNPACK) only for untransposed matrices of batch 1, and its
// transpose of a large matrix costs three products. So keys and values are transposed once, and the gradients of keys and
// values are made transposed, from small transposes: dk^T = q^T dS, dv^T = dout^T P. The softmax is one fast operation, so
// recomputed weights do not come from the saved sums.

import { OUTPUTS, blocksOf } from './problem.mjs';

export const name = '@tensorflow/tfjs';

export const forms = {
  plain: { expert: false, passes: ['forward', 'both'] },
  blocked: { expert: true, passes: ['forward', 'both'] },
  recomputing: { expert: true, passes: ['both'] },
};

const ROWS = 256;
const MASKED = -1e9;

export async function open(host) {
  const tf = await host.libraries[name]();
  await tf.setBackend('wasm');
  await tf.ready();
  return tf;
}

/** 0 where column <= row, MASKED elsewhere, [rows, rows]. */
function triangleOf(tf, rows) {
  return tf.tidy(() => {
    const index = tf.range(0, rows, 1, 'float32');
    return tf.mul(tf.cast(tf.greater(index.reshape([1, rows]), index.reshape([rows, 1])), 'float32'), MASKED);
  });
}

/** Attention of one head, [N, D] rotated and scaled: a differentiable function of q, k, v. */
function blockedHead(tf, problem, triangle, keepsWeights) {
  const { length, headDim } = problem;
  const blocks = blocksOf(problem, ROWS);
  const rowsOf = (x, { at, count }) => tf.slice(x, [at, 0], [count, x.shape[1]]);
  const firstRows = (x, end) => (end === length ? x : tf.slice(x, [0, 0], [end, headDim]));
  const firstColumns = (x, end) => (end === length ? x : tf.slice(x, [0, 0], [headDim, end]));
  const sum = (total, x, end) => {
    const whole = end === length ? x : tf.pad(x, [[0, 0], [0, length - end]]);
    return total ? tf.add(total, whole) : whole;
  };
  const maskOf = ({ at, count }) => {
    const own = count < triangle.shape[0] ? tf.slice(triangle, [0, 0], [count, count]) : triangle;
    return at > 0 ? tf.pad(own, [[0, 0], [at, 0]]) : own;
  };
  const weightsOf = (q, kColumns, block) => {
    const scores = tf.matMul(rowsOf(q, block), firstColumns(kColumns, block.end));
    return tf.softmax(triangle ? tf.add(scores, maskOf(block)) : scores);
  };

  return tf.customGrad((q, k, v, save) => {
    const kept = [];
    const kColumns = tf.transpose(k);
    const outputs = blocks.map((block) =>
      tf.tidy(() => {
        const weights = weightsOf(q, kColumns, block);
        if (keepsWeights) kept.push(tf.keep(weights));
        return tf.matMul(weights, firstRows(v, block.end));
      }),
    );
    const value = tf.concat(outputs, 0);
    save([q, k, v, value]);

    const gradFunc = (dOutput, [q, k, v, output]) => {
      const [kColumns, vColumns] = [tf.transpose(k), tf.transpose(v)];
      const delta = tf.sum(tf.mul(dOutput, output), 1, true);
      const dq = [];
      let dkColumns = null;
      let dvColumns = null;
      blocks.forEach((block, b) => {
        const { end } = block;
        const [dqRows, dkSum, dvSum] = tf.tidy(() => {
          const weights = keepsWeights ? kept[b] : weightsOf(q, kColumns, block);
          const [qRows, dOutputRows] = [rowsOf(q, block), rowsOf(dOutput, block)];
          const dWeights = tf.matMul(dOutputRows, firstColumns(vColumns, end));
          const dScores = tf.mul(weights, tf.sub(dWeights, rowsOf(delta, block)));
          return [
            tf.matMul(dScores, firstRows(k, end)),
            sum(dkColumns, tf.matMul(tf.transpose(qRows), dScores), end),
            sum(dvColumns, tf.matMul(tf.transpose(dOutputRows), weights), end),
          ];
        });
        tf.dispose([kept[b], dkColumns, dvColumns].filter(Boolean));
        dq.push(dqRows);
        [dkColumns, dvColumns] = [dkSum, dvSum];
      });
      return [tf.concat(dq, 0), tf.transpose(dkColumns), tf.transpose(dvColumns)];
    };
    return { value, gradFunc };
  });
}

export function prepare(tf, problem, form, pass) {
  const { length, headDim, heads, causal, scale } = problem;
  const pairs = headDim / 2;
  const dims = [heads, length, headDim];
  const [q, k, v, dOutput] = ['q', 'k', 'v', 'dOutput'].map((input) => tf.tensor3d(problem[input], dims));
  const wide = (table) => tf.tidy(() => tf.tile(tf.tensor2d(table, [length, pairs]), [1, 2]));
  const [cos, sin] = [wide(problem.cos), wide(problem.sin)];
  const triangle = causal ? triangleOf(tf, form === 'plain' ? length : blocksOf(problem, ROWS)[0].count) : null;

  const rotated = (x) => {
    const [first, second] = [tf.slice(x, [0, 0, 0], [-1, -1, pairs]), tf.slice(x, [0, 0, pairs], [-1, -1, pairs])];
    return tf.add(tf.mul(x, cos), tf.mul(tf.concat([tf.neg(second), first], 2), sin));
  };
  const plain = (q, k, v) => {
    const scores = tf.matMul(tf.mul(rotated(q), scale), rotated(k), false, true);
    return tf.matMul(tf.softmax(triangle ? tf.add(scores, triangle) : scores), v);
  };
  const attend = blockedHead(tf, problem, triangle, form === 'blocked' && pass === 'both');
  const blocked = (q, k, v) => {
    // The gradient of a stack of one throws
    const split = (x) => (heads === 1 ? [tf.reshape(x, [length, headDim])] : tf.unstack(x));
    const [qs, ks, vs] = [split(tf.mul(rotated(q), scale)), split(rotated(k)), split(v)];
    const outputs = qs.map((_, h) => attend(qs[h], ks[h], vs[h]));
    return heads === 1 ? tf.reshape(outputs[0], [1, length, headDim]) : tf.stack(outputs);
  };
  const attention = form === 'plain' ? plain : blocked;
  const withGradients = () => {
    let output;
    const { grads } = tf.valueAndGrads((q, k, v) => {
      output = tf.keep(attention(q, k, v));
      return output;
    })([q, k, v], dOutput);
    return [output, ...grads];
  };

  let results = [];
  return {
    async run() {
      tf.dispose(results);
      results = tf.tidy(() => (pass === 'forward' ? [attention(q, k, v)] : withGradients()));
      await Promise.all(results.map((tensor) => tensor.data()));
    },
    async result() {
      const arrays = await Promise.all(results.map((tensor) => tensor.data()));
      return Object.fromEntries(OUTPUTS[pass].map((output, n) => [output, arrays[n]]));
    },
    dispose: () => tf.dispose([q, k, v, dOutput, cos, sin, triangle, ...results].filter(Boolean)),
  };
}
