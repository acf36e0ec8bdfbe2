// SPDX-License-Identifier: MIT
//
// The ONNX project's own operator tests for Attention (opsets 23 to 25) and RotaryEmbedding (23): inputs and expected outputs as
// its reference implementation computes them, in the folder ../shared/conformance or ROPE_CONFORMANCE. Every case becomes a call
// of ours; what a case expects beyond that, and cases that have no counterpart, are listed by name.

import { existsSync, readFileSync } from 'node:fs';
import { describe, expect, test } from '@jest/globals';

import { reference } from '../dist/index.js';
import type { ForwardArgs, Layout, RotateArgs } from '../dist/index.js';
import { UNIT, eachBinary, fullShape, inLayout, lazy, maxAbs, withLayout } from './support.js';
import { magnitudes, yardstick } from './yardstick.js';

interface Tensor {
  dtype: 'float32' | 'float16' | 'bool' | 'int64';
  shape: number[];
  b64: string;
}

interface Case {
  name: string;
  op: 'Attention' | 'RotaryEmbedding';
  attrs: Record<string, number>;
  inputs: Record<string, Tensor>;
  outputs: Record<string, Tensor>;
}

const folder = process.env['ROPE_CONFORMANCE'] ?? new URL('../../shared/conformance', import.meta.url).pathname;
const file = `${folder}/onnx-attention-cases.json`;
const cases: Case[] = existsSync(file) ? JSON.parse(readFileSync(file, 'utf8')) : [];

/** Cases with no counterpart here, and why. */
const NOT_OFFERED: Record<string, string> = {};

/** Outputs that are not ours to give: the rest of such a case is checked. */
const OUTPUTS_NOT_OFFERED: Record<string, string> = {
  qk_matmul_output: 'a matrix of queries by keys, which is never formed here',
  present_key: 'past_key and K, one behind the other: the caller puts them together',
  present_value: 'past_value and V, likewise',
};

/** Those that want scores or weights. */
const WITH_SCORES = [
  'test_attention_23_fullymasked_qk_matmul_output_mode3_zero',
  'test_attention_24_fullymasked_qk_matmul_output_mode3_zero',
  ...['', '_bias', '_softcap', '_softmax'].map((end) => `test_attention_3d_with_past_and_present_qk_matmul${end}`),
  ...['', '_3d_mask', '_3d_mask_causal', '_4d_mask', '_4d_mask_causal'].map(
    (end) => `test_attention_4d_with_past_and_present_qk_matmul_bias${end}`,
  ),
  'test_attention_4d_with_past_and_present_qk_matmul',
  ...['', '_bias', '_softcap', '_softmax'].map((end) => `test_attention_4d_with_qk_matmul${end}`),
];

/** What a case may say: anything else would be an option that is ignored. */
const KNOWN = {
  attrs: [
    ...['scale', 'is_causal', 'softcap', 'left_window_size', 'right_window_size', 'q_num_heads', 'kv_num_heads'],
    ...['interleaved', 'rotary_embedding_dim', 'num_heads'],
    'qk_matmul_output_mode', // of an output that is not offered
  ],
  inputs: [
    ...['Q', 'K', 'V', 'attn_mask', 'past_key', 'past_value', 'nonpad_kv_seqlen'],
    ...['input', 'cos_cache', 'sin_cache', 'position_ids'],
  ],
};

// --- Tensors ----------------------------------------------------------------------------------------------------------

function bytesOf({ b64 }: Tensor): ArrayBuffer {
  const bytes = Buffer.from(b64, 'base64');
  return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength) as ArrayBuffer;
}

/** Half precision: a sign, five bits of exponent, ten of fraction. */
function widen(half: number): number {
  const [sign, exponent, fraction] = [half >> 15 ? -1 : 1, (half >> 10) & 31, half & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent === 0 ? fraction * 2 ** -24 : (1 + fraction / 1024) * 2 ** (exponent - 15));
}

function floatsOf(tensor: Tensor): Float32Array {
  const bytes = bytesOf(tensor);
  return tensor.dtype === 'float16' ? Float32Array.from(new Uint16Array(bytes), widen) : new Float32Array(bytes);
}

function integersOf(tensor: Tensor): number[] {
  return Array.from(new BigInt64Array(bytesOf(tensor)), Number);
}

// --- Attention --------------------------------------------------------------------------------------------------------

interface Sizes {
  batch: number;
  heads: number;
  length: number;
  dim: number;
}

/** A case as calls, one for each batch where these have different lengths; their outputs, one after the other, are Y. */
function callsOf({ attrs, inputs }: Case): ForwardArgs[] {
  // [batch, heads, length, dim], or [batch, length, heads * dim], which is our other layout
  const layout: Layout = inputs.Q.shape.length === 4 ? 'bhnd' : 'bnhd';
  const sizesOf = (tensor: Tensor, heads: number): Sizes => {
    const [batch, first, second, third] = tensor.shape;
    return layout === 'bhnd'
      ? { batch, heads: first, length: second, dim: third }
      : { batch, heads, length: first, dim: second / heads };
  };
  const [ofQ, ofK, ofV] = [
    sizesOf(inputs.Q, attrs.q_num_heads),
    sizesOf(inputs.K, attrs.kv_num_heads),
    sizesOf(inputs.V, attrs.kv_num_heads),
  ];
  const past = inputs.past_key ? inputs.past_key.shape[2] : 0;
  const shape = {
    batch: ofQ.batch,
    heads: ofQ.heads,
    kvHeads: ofK.heads,
    queryLength: ofQ.length,
    keyLength: past + ofK.length,
    headDim: ofQ.dim,
    valueDim: ofV.dim,
  };
  const whole: ForwardArgs = {
    q: floatsOf(inputs.Q),
    k: append(inputs.past_key, inputs.K, ofK, layout),
    v: append(inputs.past_value, inputs.V, ofV, layout),
    shape,
    layout,
    rotary: false,
    scale: attrs.scale,
    causal: attrs.is_causal === 1,
    queryOffset: past,
    window: [attrs.left_window_size ?? -1, attrs.right_window_size ?? -1],
    softcap: attrs.softcap,
    ...(inputs.attn_mask && maskOf(inputs.attn_mask, shape)),
  };
  if (!inputs.nonpad_kv_seqlen) return [whole];
  // So many keys count in each batch, and the queries are the last of them.
  return integersOf(inputs.nonpad_kv_seqlen).map((keys, batch) => cut(whole, batch, keys));
}

/** The keys, or values, of the past and of the present, in the layout of the present. The past has heads outside. */
function append(past: Tensor | undefined, now: Tensor, size: Sizes, layout: Layout): Float32Array {
  const { batch, heads, length, dim } = size;
  if (!past) return floatsOf(now);
  const before = past.shape[2];
  const own = layout === 'bhnd' ? floatsOf(now) : inLayout(floatsOf(now), 'bhnd', heads, length, dim);
  const [old, all] = [floatsOf(past), new Float32Array(batch * heads * (before + length) * dim)];
  for (let head = 0; head < batch * heads; head++) {
    all.set(old.subarray(head * before * dim, (head + 1) * before * dim), head * (before + length) * dim);
    all.set(own.subarray(head * length * dim, (head + 1) * length * dim), (head * (before + length) + before) * dim);
  }
  return layout === 'bhnd' ? all : inLayout(all, layout, heads, before + length, dim);
}

/** attn_mask with leading axes of 1; keys that it does not reach are forbidden. */
function maskOf(tensor: Tensor, shape: { keyLength: number }): Pick<ForwardArgs, 'mask' | 'maskShape'> {
  const [batch, heads, queries, keys] = [...new Array<number>(4 - tensor.shape.length).fill(1), ...tensor.shape];
  const rows = batch * heads * queries;
  const maskShape = [batch, heads, queries, shape.keyLength] as const;
  const spread = <T extends Float32Array | Uint8Array>(given: T, all: T): T => {
    for (let r = 0; r < rows; r++) all.set(given.subarray(r * keys, (r + 1) * keys), r * shape.keyLength);
    return all;
  };
  const values = rows * shape.keyLength;
  if (tensor.dtype === 'bool') return { mask: spread(new Uint8Array(bytesOf(tensor)), new Uint8Array(values)), maskShape };
  return { mask: spread(floatsOf(tensor), new Float32Array(values).fill(-Infinity)), maskShape };
}

/** The call of one batch with its first keys. */
function cut(whole: ForwardArgs, batch: number, keys: number): ForwardArgs {
  const { kvHeads, heads, queryLength, keyLength, headDim, valueDim } = fullShape(whole.shape);
  expect(whole.layout).toBe('bhnd');
  const rows = (x: Float32Array, heads: number, length: number, dim: number, count: number) => {
    const parts = Array.from({ length: heads }, (_, head) => {
      const first = (batch * heads + head) * length * dim;
      return x.subarray(first, first + count * dim);
    });
    return Float32Array.from(parts.flatMap((part) => [...part]));
  };
  const { mask, maskShape = [1, 1, 1, 1] } = whole;
  const maskRows = maskShape[1] * maskShape[2];
  const first = (maskShape[0] === 1 ? 0 : batch) * maskRows;
  const maskAt = (n: number) => mask![(first + Math.floor(n / keys)) * keyLength + (n % keys)];
  const ownMask = mask && Array.from({ length: maskRows * keys }, (_, n) => maskAt(n));
  const kind = mask?.BYTES_PER_ELEMENT === 1 ? Uint8Array : Float32Array;
  return {
    ...whole,
    q: rows(whole.q, heads, queryLength, headDim, queryLength),
    k: rows(whole.k, kvHeads, keyLength, headDim, keys),
    v: rows(whole.v, kvHeads, keyLength, valueDim, keys),
    shape: { ...whole.shape, batch: 1, keyLength: keys },
    queryOffset: keys - queryLength,
    ...(ownMask && { mask: kind.from(ownMask), maskShape: [1, maskShape[1], maskShape[2], keys] as const }),
  };
}

/**
 * How far an output may be from Y. In float32: what exact.test.ts allows the engine (twice the error of plain float32, or four
 * roundings of the magnitudes), and as much again for Y, which is a plain float32 result itself. In half precision Y was rounded
 * at every step, so it is four roundings of 2^-11 of the magnitudes.
 */
function toleranceOf(args: ForwardArgs, dtype: Tensor['dtype']): number {
  const { heads, batch, queryLength, valueDim } = fullShape(args.shape);
  const problem = { ...args, dOutput: new Float32Array(batch * heads * queryLength * valueDim) };
  if (dtype === 'float16') return 4 * 2 ** -11 * magnitudes(withLayout(problem, 'bhnd')).output;
  return 2 * yardstick(problem).allowed.output;
}

// --- RotaryEmbedding --------------------------------------------------------------------------------------------------

/** Without position_ids the caches have a row for each token. */
function rotationOf({ attrs, inputs }: Case): RotateArgs {
  const { input, cos_cache: cos, sin_cache: sin, position_ids: ids } = inputs;
  const [batch, first, second, third] = input.shape;
  const shape =
    input.shape.length === 4
      ? { batch, heads: first, queryLength: second, headDim: third }
      : { batch, heads: attrs.num_heads, queryLength: first, headDim: second / attrs.num_heads };
  const tokens = batch * shape.queryLength;
  return {
    x: floatsOf(input),
    shape,
    layout: input.shape.length === 4 ? 'bhnd' : 'bnhd',
    rotary: {
      dim: attrs.rotary_embedding_dim || shape.headDim,
      interleaved: attrs.interleaved === 1,
      tables: { cos: floatsOf(cos), sin: floatsOf(sin) },
      queryPositions: ids ? integersOf(ids) : Array.from({ length: tokens }, (_, token) => token),
    },
  };
}

// --- The cases --------------------------------------------------------------------------------------------------------

const concatenate = (parts: Float32Array[]) => Float32Array.from(parts.flatMap((part) => [...part]));
const offered = cases.filter(({ name }) => !(name in NOT_OFFERED));
const attention = offered.filter(({ op }) => op === 'Attention');
const rotary = offered.filter(({ op }) => op === 'RotaryEmbedding');

if (cases.length === 0) {
  test.skip(`the cases are not there: ${file}`, () => {});
} else {
  describe('the list', () => {
    test('is complete: 93 cases, each is run or listed as not offered', () => {
      const names = [...attention, ...rotary].map(({ name }) => name).concat(Object.keys(NOT_OFFERED));
      expect(cases).toHaveLength(93);
      expect([...names].sort()).toEqual(cases.map(({ name }) => name).sort());
      expect(new Set(names).size).toBe(93);
    });

    test('says which outputs are not offered, and why', () => {
      const beyond = (output: string) => cases.filter(({ outputs }) => output in outputs).map(({ name }) => name);
      expect(beyond('qk_matmul_output').sort()).toEqual([...WITH_SCORES].sort());
      expect(beyond('present_key')).toEqual(cases.filter(({ inputs }) => 'past_key' in inputs).map(({ name }) => name));
      expect(beyond('present_value')).toEqual(beyond('present_key'));
      const checked = ['Y', 'output'];
      const others = new Set(cases.flatMap(({ outputs }) => Object.keys(outputs)).filter((name) => !checked.includes(name)));
      expect([...others].sort()).toEqual(Object.keys(OUTPUTS_NOT_OFFERED).sort());
    });

    test('says nothing that is not understood', () => {
      for (const { attrs, inputs } of offered) {
        expect(KNOWN.attrs).toEqual(expect.arrayContaining(Object.keys(attrs)));
        expect(KNOWN.inputs).toEqual(expect.arrayContaining(Object.keys(inputs)));
      }
    });
  });

  const prepared = attention.map((one) => {
    const calls = lazy(() => callsOf(one));
    const tolerance = lazy(() => Math.max(...calls().map((args) => toleranceOf(args, one.outputs.Y.dtype))));
    return [one.name, one, calls, tolerance] as const;
  });

  eachBinary((instance) => {
    test.each(prepared)('%s', (_, one, calls, tolerance) => {
      const results = calls().map((args) => instance().forward(args));
      for (const { report } of results) expect(report.method).toBe('exact');
      expect(concatenate(results.map(({ output }) => output))).toBeAllclose(floatsOf(one.outputs.Y), { atol: tolerance() });
    });

    test.each(rotary.map((one) => [one.name, one] as const))('%s', (_, one) => {
      const args = rotationOf(one);
      // Two products and a sum on either side: three roundings of magnitudes of at most sqrt(2) |x|.
      const atol = 2 * 3 * UNIT * Math.SQRT2 * maxAbs(args.x);
      expect(instance().rotate(args)).toBeAllclose(floatsOf(one.outputs.output), { atol });
    });
  });

  describe('reference', () => {
    test.each(prepared)('%s', (_, one, calls, tolerance) => {
      const output = concatenate(calls().map((args) => Float32Array.from(reference.forward(args).output)));
      expect(output).toBeAllclose(floatsOf(one.outputs.Y), { atol: tolerance() });
    });

    test.each(rotary.map((one) => [one.name, one] as const))('%s', (_, one) => {
      const args = rotationOf(one);
      expect(reference.rotate(args)).toBeAllclose(floatsOf(one.outputs.output), { atol: 6 * UNIT * Math.SQRT2 * maxAbs(args.x) });
    });
  });
}
