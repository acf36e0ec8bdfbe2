// SPDX-License-Identifier: MIT
//
// onnxruntime-web on WebAssembly: RoPE attention as ONNX graphs. It has no gradients. The tables and weights of a graph are
// constants; inputs are tensors made once.
//
//   plain     what an export of ordinary code holds: MatMul, Mul, Where, Softmax, MatMul; keeps N x N matrices
//   fused     RotaryEmbedding and MultiHeadAttention, as the graph optimisers write them; ends where 2 N^2 D reaches 2^31
//   blocked   plain, unrolled over blocks of query rows: the scores stay in cache, a causal block stops at its last column

import { createModel } from './onnx.mjs';
import { blocksOf, headsFirst, tokensFirst } from './problem.mjs';

export const name = 'onnxruntime-web';

export const forms = {
  plain: { expert: false, passes: ['forward'] },
  fused: { expert: false, passes: ['forward'] },
  blocked: { expert: true, passes: ['forward'] },
};

const MICROSOFT = 'com.microsoft';
const ROWS = { full: 128, causal: 64 };
const MASKED = -1e30;

export async function open(host) {
  const ort = await host.libraries[name]();
  ort.env.wasm.numThreads = 1;
  return ort;
}

const floats = (dims, data) => ({ dims, data });
const integers = (dims, data) => ({ dims, data: BigInt64Array.from(data, BigInt) });
const op = (kind, inputs, output, attributes) => ({ op: kind, inputs, outputs: [output], attributes });

function plain({ length, headDim, heads, causal, cos, sin, scale }) {
  const dims = [1, heads, length, headDim];
  const pairs = headDim / 2;
  const twice = (table) => {
    const out = new Float32Array(length * headDim);
    for (let n = 0; n < length; n++) {
      const row = table.subarray(n * pairs, (n + 1) * pairs);
      out.set(row, n * headDim);
      out.set(row, n * headDim + pairs);
    }
    return out;
  };
  const rotated = (x) => [
    { op: 'Split', inputs: [x], outputs: [`${x}First`, `${x}Second`], attributes: { axis: 3, num_outputs: 2 } },
    op('Neg', [`${x}Second`], `${x}Negated`),
    op('Concat', [`${x}Negated`, `${x}First`], `${x}Turned`, { axis: 3 }),
    op('Mul', [x, 'cos'], `${x}Cos`),
    op('Mul', [`${x}Turned`, 'sin'], `${x}Sin`),
    op('Add', [`${x}Cos`, `${x}Sin`], `${x}Rotated`),
  ];
  const masked = [
    op('Range', ['zero', 'length', 'one'], 'columns'),
    op('Reshape', ['columns', 'asColumn'], 'rows'),
    op('Greater', ['columns', 'rows'], 'future'),
    op('Where', ['future', 'masked', 'scaled'], 'allowed'),
  ];
  return {
    dims,
    model: {
      inputs: { q: dims, k: dims, v: dims },
      outputs: { output: dims },
      constants: {
        cos: floats([length, headDim], twice(cos)),
        sin: floats([length, headDim], twice(sin)),
        scale: floats([], Float32Array.of(scale)),
        masked: floats([], Float32Array.of(MASKED)),
        zero: integers([], [0]),
        one: integers([], [1]),
        length: integers([], [length]),
        asColumn: integers([2], [length, 1]),
      },
      nodes: [
        ...rotated('q'),
        ...rotated('k'),
        op('Transpose', ['kRotated'], 'kColumns', { perm: [0, 1, 3, 2] }),
        op('MatMul', ['qRotated', 'kColumns'], 'scores'),
        op('Mul', ['scores', 'scale'], 'scaled'),
        ...(causal ? masked : []),
        op('Softmax', [causal ? 'allowed' : 'scaled'], 'weights', { axis: -1 }),
        op('MatMul', ['weights', 'v'], 'output'),
      ],
    },
  };
}

function fused({ length, headDim, heads, causal, cos, sin }) {
  const dims = [1, length, heads * headDim];
  const table = [length, headDim / 2];
  const rotated = (x) => ({ ...op('RotaryEmbedding', [x, 'positions', 'cos', 'sin'], `${x}Rotated`), domain: MICROSOFT });
  const attributes = { num_heads: heads, unidirectional: causal ? 1 : 0 };
  const attention = { ...op('MultiHeadAttention', ['qRotated', 'kRotated', 'v'], 'output', attributes), domain: MICROSOFT };
  return {
    dims,
    tokensFirst: true,
    model: {
      inputs: { q: dims, k: dims, v: dims },
      outputs: { output: dims },
      constants: { positions: integers([1], [0]), cos: floats(table, cos), sin: floats(table, sin) },
      // Heads of [1, N, H D] are counted from the table's width
      nodes: [rotated('q'), rotated('k'), attention],
      domains: [MICROSOFT],
    },
  };
}

function blocked(problem) {
  const { length, headDim, heads, causal, cos, sin, scale } = problem;
  const dims = [1, heads, length, headDim];
  const blocks = blocksOf(problem, causal ? ROWS.causal : ROWS.full);
  const rows = blocks[0].count;
  const constants = {
    cos: floats([1, length, headDim / 2], cos),
    sin: floats([1, length, headDim / 2], sin),
    scale: floats([], Float32Array.of(scale)),
    zero: integers([1], [0]),
    rowAxis: integers([1], [2]),
    columnAxis: integers([1], [3]),
  };
  const nodes = [
    op('RotaryEmbedding', ['q', 'cos', 'sin'], 'qRotated'),
    op('RotaryEmbedding', ['k', 'cos', 'sin'], 'kRotated'),
    op('Transpose', ['kRotated'], 'kColumns', { perm: [0, 1, 3, 2] }),
    op('Mul', ['qRotated', 'scale'], 'qScaled'),
  ];
  blocks.forEach(({ at, count, to }, b) => {
    constants[`at${b}`] = integers([1], [at]);
    constants[`to${b}`] = integers([1], [to]);
    nodes.push(op('Slice', ['qScaled', `at${b}`, `to${b}`, 'rowAxis'], `q${b}`));
    if (causal) {
      constants[`size${b}`] = integers([2], [count, count]);
      constants[`pads${b}`] = integers([4], [0, at, 0, 0]);
      const triangle = count < rows ? `triangle${b}` : 'triangle';
      if (count < rows) nodes.push(op('Slice', ['triangle', 'corner', `size${b}`], triangle));
      nodes.push(
        op('Slice', ['kColumns', 'zero', `to${b}`, 'columnAxis'], `k${b}`),
        op('Slice', ['v', 'zero', `to${b}`, 'rowAxis'], `v${b}`),
        op('Pad', [triangle, `pads${b}`], `mask${b}`),
        op('MatMul', [`q${b}`, `k${b}`], `scores${b}`),
        op('Add', [`scores${b}`, `mask${b}`], `allowed${b}`),
        op('Softmax', [`allowed${b}`], `weights${b}`, { axis: -1 }),
        op('MatMul', [`weights${b}`, `v${b}`], `output${b}`),
      );
    } else {
      nodes.push(
        op('MatMul', [`q${b}`, 'kColumns'], `scores${b}`),
        op('Softmax', [`scores${b}`], `weights${b}`, { axis: -1 }),
        op('MatMul', [`weights${b}`, 'v'], `output${b}`),
      );
    }
  });
  const outputs = blocks.map((_, b) => `output${b}`);
  nodes.push(op('Concat', outputs, 'output', { axis: 2 }));
  const inputs = { q: dims, k: dims, v: dims };
  if (!causal) return { dims, model: { inputs, outputs: { output: dims }, constants, nodes } };

  constants.corner = integers([2], [0, 0]);
  const triangle = new Float32Array(rows * rows);
  for (let n = 0; n < rows; n++) triangle.fill(MASKED, n * rows + n + 1, (n + 1) * rows);
  // The mask is an input, not a constant: the optimiser would store every padded copy of it
  inputs.triangle = [rows, rows];
  return { dims, feeds: { triangle }, model: { inputs, outputs: { output: dims }, constants, nodes } };
}

const graphs = { plain, fused, blocked };

export async function prepare(ort, problem, form) {
  const { dims, model, feeds = {}, tokensFirst: byToken = false } = graphs[form](problem);
  const session = await ort.InferenceSession.create(createModel(model), {
    executionProviders: ['wasm'],
    graphOptimizationLevel: 'all',
    logSeverityLevel: 3,
  });
  const tensors = {};
  for (const input of ['q', 'k', 'v']) {
    const data = byToken ? tokensFirst(problem[input], problem) : problem[input];
    tensors[input] = new ort.Tensor('float32', data, dims);
  }
  for (const [input, data] of Object.entries(feeds)) tensors[input] = new ort.Tensor('float32', data, model.inputs[input]);
  let results;
  return {
    async run() {
      results = await session.run(tensors);
    },
    result: () => ({ output: byToken ? headsFirst(results.output.data, problem) : results.output.data }),
    dispose: () => session.release(),
  };
}
