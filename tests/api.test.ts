// SPDX-License-Identifier: MIT
//
// The synchronous API as a caller meets it: what every option refuses and how it says so, what a call leaves untouched, and
// what an instance survives.

import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';

import { createRopeAttention, reference } from '../dist/index.js';
import { createAttention } from '../dist/attention.js';
import type { BackwardArgs, CreateOptions, RopeAttention } from '../dist/index.js';
import { maxAbs, maxDifference, problem } from './support.js';

const SHAPE = { batch: 2, heads: 4, kvHeads: 2, queryLength: 5, keyLength: 7, headDim: 8, valueDim: 6 };
const args = problem({ shape: SHAPE }, 1);
const { dOutput, ...forwardArgs } = args;
const planArgs = forwardArgs;
const rotateArgs = { x: args.q, shape: SHAPE };

/** A copy with another value in one place. */
function withValue(x: Float32Array, at: number, value: number): Float32Array {
  const copy = x.slice();
  copy[at] = value;
  return copy;
}

/** Eight rows. */
const RELATIVE = { support: Uint32Array.of(0, 0, 1, 7), weights: new Float32Array(22) };
const TABLES = { cos: new Float32Array(32).fill(1), sin: new Float32Array(32) };

let attention: RopeAttention;
beforeAll(async () => {
  attention = await createRopeAttention();
});
afterAll(() => attention.dispose());

/** A call with arguments that the types would not let through. */
function call(name: 'forward' | 'backward' | 'plan' | 'rotate', changes: unknown): () => unknown {
  const valid = { forward: forwardArgs, backward: args, plan: planArgs, rotate: rotateArgs }[name];
  const given = typeof changes === 'object' && changes !== null ? { ...valid, ...changes } : changes;
  return () => (attention[name] as (given: unknown) => unknown)(given);
}

type Case = [changes: Record<string, unknown>, kind: typeof TypeError | typeof RangeError, message: string];

/** Options that forward, backward and plan share; `@` stands for the function's name. */
const COMMON: Case[] = [
  [{ q: undefined }, TypeError, '@: q must be a Float32Array, got undefined'],
  [{ q: Array.from(args.q) }, TypeError, '@: q must be a Float32Array, got an array'],
  [{ q: Float64Array.from(args.q) }, TypeError, '@: q must be a Float32Array, got a Float64Array'],
  [{ q: args.q.buffer }, TypeError, '@: q must be a Float32Array, got a ArrayBuffer'],
  [{ q: args.q.subarray(1) }, RangeError, '@: q has 319 values, shape needs 320'],
  [{ k: new Float32Array(96) }, RangeError, '@: k has 96 values, shape needs 224'],
  [{ k: null }, TypeError, '@: k must be a Float32Array, got null'],
  [{ v: new Float32Array(0) }, RangeError, '@: v has 0 values, shape needs 168'],
  [{ v: new Uint8Array(168) }, TypeError, '@: v must be a Float32Array, got a Uint8Array'],
  [{ shape: undefined }, TypeError, '@: shape must be an object, got undefined'],
  [{ shape: [2, 4, 5, 8] }, TypeError, '@: shape must be an object, got an array'],
  [{ shape: { ...SHAPE, dim: 8 } }, TypeError, '@: there is no option shape.dim; known are batch, heads, kvHeads'],
  [{ shape: { ...SHAPE, heads: '4' } }, TypeError, "@: shape.heads must be a number, got '4'"],
  [{ shape: { ...SHAPE, heads: undefined } }, TypeError, '@: shape.heads must be a number, got undefined'],
  [{ shape: { ...SHAPE, batch: 0 } }, RangeError, '@: shape.batch must be an integer from 1 to 2147483647, got 0'],
  [{ shape: { ...SHAPE, heads: -4 } }, RangeError, '@: shape.heads must be an integer'],
  [{ shape: { ...SHAPE, kvHeads: 3 } }, RangeError, '@: shape.heads must be a multiple of shape.kvHeads, got 4 and 3'],
  [{ shape: { ...SHAPE, kvHeads: 8 } }, RangeError, '@: shape.heads must be a multiple of shape.kvHeads, got 4 and 8'],
  [
    { shape: { ...SHAPE, queryLength: 2.5 } },
    RangeError,
    '@: shape.queryLength must be an integer from 1 to 2147483647, got 2.5',
  ],
  [{ shape: { ...SHAPE, keyLength: NaN } }, RangeError, '@: shape.keyLength must be an integer'],
  [{ shape: { ...SHAPE, keyLength: 2 ** 32 } }, RangeError, '@: shape.keyLength must be an integer'],
  [{ shape: { ...SHAPE, headDim: 1025 } }, RangeError, '@: shape.headDim must be an integer from 1 to 1024, got 1025'],
  [
    { shape: { ...SHAPE, valueDim: Infinity } },
    RangeError,
    '@: shape.valueDim must be an integer from 1 to 1024, got Infinity',
  ],
  [
    { shape: { ...SHAPE, batch: 2 ** 31 - 1, heads: 2 ** 30, kvHeads: 1, queryLength: 2 ** 30 } },
    RangeError,
    'which is beyond any array',
  ],
  [
    { shape: { ...SHAPE, headDim: 7 } },
    RangeError,
    '@: rotary.dim is headDim by default and must be even, headDim is 7; give an even rotary.dim, such as 6',
  ],
  [{ rotary: true }, TypeError, '@: rotary must be false or an object, got true'],
  [{ rotary: null }, TypeError, '@: rotary must be an object, got null'],
  [
    { rotary: { theta: 1 } },
    TypeError,
    '@: there is no option rotary.theta; known are base, dim, interleaved, frequencies, scaling, tables, queryPositions, keyPositions',
  ],
  [{ rotary: { base: 0 } }, RangeError, '@: rotary.base must be positive and finite, got 0'],
  [{ rotary: { base: NaN } }, RangeError, '@: rotary.base must be positive and finite, got NaN'],
  [{ rotary: { base: '10000' } }, TypeError, "@: rotary.base must be a number, got '10000'"],
  [{ rotary: { dim: 5 } }, RangeError, '@: rotary.dim must be even, got 5'],
  [{ rotary: { dim: 10 } }, RangeError, '@: rotary.dim must be an integer from 0 to 8, got 10'],
  [{ rotary: { interleaved: 1 } }, TypeError, '@: rotary.interleaved must be true or false, got 1'],
  [{ rotary: { frequencies: [1, 2, 3, 4] } }, TypeError, '@: rotary.frequencies must be a Float32Array, got an array'],
  [
    { rotary: { frequencies: new Float32Array(3) } },
    RangeError,
    '@: rotary.frequencies has 3 values, rotary.dim/2 needs 4',
  ],
  [
    { rotary: { frequencies: Float32Array.of(1, 2, NaN, 4) } },
    RangeError,
    '@: rotary.frequencies[2] must be finite, got NaN',
  ],
  [{ rotary: { base: 500, frequencies: new Float32Array(4) } }, TypeError, '@: rotary has both base and frequencies'],
  [{ rotary: { queryPositions: 3 } }, TypeError, '@: rotary.queryPositions must be a typed array or an array of numbers, got 3'],
  [{ rotary: { queryPositions: [0, 1] } }, RangeError, '@: rotary.queryPositions has 2 values, shape needs 5 or 10'],
  [{ rotary: { keyPositions: new BigInt64Array(7) } }, TypeError, '@: rotary.keyPositions must be a typed array or'],
  [{ rotary: { keyPositions: new DataView(new ArrayBuffer(7)) } }, TypeError, '@: rotary.keyPositions must be a typed array or'],
  [{ rotary: { keyPositions: new Int8Array(8) } }, RangeError, '@: rotary.keyPositions has 8 values, shape needs 7 or 14'],
  [{ rotary: { queryPositions: [0, 1, 2, NaN, 4] } }, RangeError, '@: rotary.queryPositions[3] must be finite, got NaN'],
  [{ rotary: { queryPositions: [0, 1, 2, , 4] } }, TypeError, '@: rotary.queryPositions[3] must be a number, got undefined'],
  [{ rotary: { scaling: { type: 'linear' } } }, TypeError, '@: rotary.scaling.factor must be a number, got undefined'],
  [{ rotary: { scaling: { type: 'alibi' } } }, RangeError, "@: rotary.scaling.type must be one of 'linear', 'dynamic', 'yarn'"],
  [
    { rotary: { frequencies: new Float32Array(4), scaling: { type: 'linear', factor: 2 } } },
    TypeError,
    '@: rotary has both scaling and frequencies; give one of them',
  ],
  [{ rotary: { tables: TABLES, scaling: { type: 'linear', factor: 2 } } }, TypeError, '@: rotary has both scaling and tables'],
  [{ rotary: { tables: 1 } }, TypeError, '@: rotary.tables must be an object, got 1'],
  [{ rotary: { tables: { cos: [1], sin: [0] } } }, TypeError, '@: rotary.tables.cos must be a Float32Array, got an array'],
  [
    { rotary: { tables: { cos: new Float32Array(30), sin: new Float32Array(30) } } },
    RangeError,
    '@: rotary.tables.cos has 30 values, a number of rows of rotary.dim/2 needs 32',
  ],
  [
    { rotary: { tables: { cos: new Float32Array(32), sin: new Float32Array(28) } } },
    RangeError,
    '@: rotary.tables.sin has 28 values, rotary.tables.cos needs 32',
  ],
  [{ rotary: { dim: 0, tables: TABLES } }, RangeError, '@: rotary.tables need a rotary.dim above 0, got 0'],
  [{ rotary: { base: 500, tables: TABLES } }, TypeError, '@: rotary has both base and tables; give one of them'],
  [
    { rotary: { frequencies: new Float32Array(4), tables: TABLES } },
    TypeError,
    '@: rotary has both frequencies and tables; give one of them',
  ],
  [
    { rotary: { tables: TABLES }, queryOffset: 4 },
    RangeError,
    '@: queryOffset 4 + length 5 must stay within the 8 rows of rotary.tables',
  ],
  [{ rotary: { tables: TABLES }, queryOffset: -1 }, RangeError, '@: queryOffset -1 + length 5 must stay within the 8 rows'],
  [
    { rotary: { tables: TABLES, queryPositions: [0, 1, 2, 8, 4] } },
    RangeError,
    '@: rotary.queryPositions[3] must be a row of rotary.tables, 0 to 7, got 8',
  ],
  [{ rotary: { tables: TABLES, queryPositions: [0, 1, 2.5, 3, 4] } }, RangeError, '@: rotary.queryPositions[2] must be a row of'],
  [{ scale: '1' }, TypeError, "@: scale must be a number, got '1'"],
  [{ scale: Infinity }, RangeError, '@: scale must be finite and at most 2.3e38 in size, got Infinity'],
  [{ scale: 3e38 }, RangeError, '@: scale must be finite and at most 2.3e38 in size, got 3e+38'],
  [{ causal: 'yes' }, TypeError, "@: causal must be true or false, got 'yes'"],
  [{ queryOffset: 1.5 }, RangeError, '@: queryOffset must be an integer'],
  [{ queryOffset: 2 ** 31 - 5 }, RangeError, '@: queryOffset 2147483643 + queryLength 5 must not exceed 2147483647'],
  [{ queryOffset: -(2 ** 31) - 1 }, RangeError, '@: queryOffset must be an integer'],
  [{ window: 3 }, TypeError, '@: window must be a pair [left, right], got 3'],
  [{ window: [1, 2, 3] }, TypeError, '@: window must be a pair [left, right], got an array'],
  [{ window: ['a', 2] }, TypeError, "@: window[0] must be a number, got 'a'"],
  [{ window: [-2, 0] }, RangeError, '@: window[0] must be an integer from -1 to 2147483647, got -2'],
  [{ window: [0, 1.5] }, RangeError, '@: window[1] must be an integer from -1 to 2147483647, got 1.5'],
  [{ alibi: [1, 2] }, TypeError, '@: alibi must be a Float32Array, got an array'],
  [{ alibi: new Float32Array(7) }, RangeError, '@: alibi has 7 values, shape.heads needs'],
  [{ alibi: Float32Array.of(0, 1, -0.5, 1) }, RangeError, '@: alibi[2] must be from 0 to 1e19, got -0.5'],
  [{ alibi: Float32Array.of(0, NaN, 0, 1) }, RangeError, '@: alibi[1] must be from 0 to 1e19, got NaN'],
  [{ alibi: new Float32Array(4), method: 'polynomial' }, RangeError, "@: method 'polynomial' has no alibi without causal; 'auto' and 'exact' have it"],
  [{ segments: 3 }, TypeError, '@: segments must be a Uint32Array or an array of numbers, got 3'],
  [{ segments: Int32Array.of(0, 2) }, TypeError, '@: segments must be a Uint32Array or an array of numbers, got a Int32Array'],
  [{ segments: [] }, RangeError, '@: segments must begin with 0, got none'],
  [{ segments: [2, 4] }, RangeError, '@: segments[0] must be 0, got 2'],
  [{ segments: [0, 4, 3] }, RangeError, '@: segments[2] must be at least the one before, 4, got 3'],
  [{ segments: [0, '4'] }, TypeError, "@: segments[1] must be a number, got '4'"],
  [{ segments: [0, -4] }, RangeError, '@: segments[1] must be an integer from 0 to 4294967295, got -4'],
  [{ softcap: '1' }, TypeError, "@: softcap must be a number, got '1'"],
  [{ softcap: 0 }, RangeError, '@: softcap must be positive, from 1e-30 to 1e+30, got 0'],
  [{ softcap: Infinity }, RangeError, '@: softcap must be positive, from 1e-30 to 1e+30, got Infinity'],
  [{ softcap: 3, method: 'polynomial' }, RangeError, "@: method 'polynomial' has no softcap; 'auto' and 'exact' have it"],
  [{ bias: [1] }, TypeError, '@: bias must be a Float32Array, got an array'],
  [{ bias: new Float64Array(11) }, TypeError, '@: bias must be a Float32Array, got a Float64Array'],
  [
    { bias: new Float32Array(10) },
    RangeError,
    '@: bias has 10 values, queryLength + keyLength - 1, or heads times that, needs 11',
  ],
  [{ bias: new Float32Array(22) }, RangeError, '@: bias has 22 values'],
  [{ bias: new Float32Array(11), method: 'polynomial' }, RangeError, "@: method 'polynomial' has no bias"],
  [{ mask: new Int8Array(35) }, TypeError, '@: mask must be a Float32Array or a Uint8Array, got a Int8Array'],
  [{ mask: [1] }, TypeError, '@: mask must be a Float32Array or a Uint8Array, got an array'],
  [{ mask: new Uint8Array(34) }, RangeError, '@: mask has 34 values, queryLength * keyLength needs 35'],
  [{ mask: new Uint8Array(35), maskShape: [1, 4, 5, 7] }, RangeError, '@: mask has 35 values, maskShape needs 140'],
  [{ mask: new Uint8Array(35), maskShape: 35 }, TypeError, '@: maskShape must be four sizes, [batch, heads, queryLength, keyLength]'],
  [{ mask: new Uint8Array(35), maskShape: [5, 7] }, TypeError, '@: maskShape must be four sizes'],
  [{ mask: new Uint8Array(35), maskShape: [1, 2, 5, 7] }, RangeError, '@: maskShape[1] must be 1 or 4, got 2'],
  [{ mask: new Uint8Array(5), maskShape: [1, 1, 5, 1] }, RangeError, '@: maskShape[3] must be 7, got 1'],
  [{ mask: new Uint8Array(35), maskShape: [1, 1, '5', 7] }, TypeError, "@: maskShape[2] must be a number, got '5'"],
  [{ maskShape: [1, 1, 5, 7] }, TypeError, '@: maskShape needs mask as well'],
  [{ mask: new Uint8Array(35), method: 'polynomial' }, RangeError, "@: method 'polynomial' has no mask"],
  [{ sinks: new Float32Array(3) }, RangeError, '@: sinks has 3 values, shape.heads needs 4'],
  [{ sinks: [1, 2, 3, 4] }, TypeError, '@: sinks must be a Float32Array, got an array'],
  [{ sinks: Float32Array.of(1, 2, -Infinity, 4) }, RangeError, '@: sinks[2] must be finite, got -Infinity'],
  [{ sinks: new Float32Array(4), method: 'polynomial' }, RangeError, "@: method 'polynomial' has no sinks"],
  [{ relativePositions: new Float32Array(10) }, RangeError, '@: relativePositions has 10 values, queryLength + keyLength - 1 needs 11'],
  [{ relativePositions: new Float64Array(11) }, TypeError, '@: relativePositions must be a Float32Array, got a Float64Array'],
  [{ relativePositions: withValue(new Float32Array(11), 3, NaN) }, RangeError, '@: relativePositions[3] must be finite, got NaN'],
  [{ relativePositions: new Float32Array(11), rotary: false }, RangeError, '@: relativePositions needs a rotary.dim above 0, got 0'],
  [
    { relativePositions: new Float32Array(11), rotary: { tables: TABLES } },
    TypeError,
    '@: relativePositions and rotary.tables are both given; give one of them',
  ],
  [
    { relativePositions: new Float32Array(11), rotary: { keyPositions: [0, 1, 2, 3, 4, 5, 6] } },
    TypeError,
    '@: relativePositions and rotary.keyPositions are both given',
  ],
  [{ relativePositions: new Float32Array(11), relative: RELATIVE }, TypeError, '@: relativePositions and relative are two ways'],
  [{ relativePositions: new Float32Array(11), method: 'polynomial' }, RangeError, "@: method 'polynomial' has no relativePositions"],
  [{ relative: {} }, TypeError, '@: relative.support must be a Uint32Array, got undefined'],
  [{ relative: [1] }, TypeError, '@: relative must be an object, got an array'],
  [{ relative: { ...RELATIVE, bias: 1 } }, TypeError, '@: there is no option relative.bias; known are support, weights'],
  [{ relative: { ...RELATIVE, support: [0, 1] } }, TypeError, '@: relative.support must be a Uint32Array, got an array'],
  [
    { relative: { ...RELATIVE, support: new Uint32Array(3) } },
    RangeError,
    '@: relative.support must be 1 to 1048576 pairs of dimensions, got 3 values',
  ],
  [{ relative: { ...RELATIVE, support: new Uint32Array(0) } }, RangeError, '@: relative.support must be 1 to 1048576 pairs'],
  [{ relative: { ...RELATIVE, support: Uint32Array.of(0, 1, 8, 0) } }, RangeError, '@: relative.support[2] must be below headDim, 8, got 8'],
  [
    { relative: { ...RELATIVE, weights: new Float32Array(21) } },
    RangeError,
    '@: relative.weights has 21 values, support of that size with queryLength + keyLength - 1 needs 22',
  ],
  [{ relative: { support: RELATIVE.support } }, TypeError, '@: relative.weights must be a Float32Array, got undefined'],
  [{ relative: RELATIVE, rotary: {} }, TypeError, '@: relative takes the place of the rotation; rotary must be false or absent'],
  [{ relative: RELATIVE, method: 'polynomial' }, RangeError, "@: method 'polynomial' has no relative"],
  [
    { relative: { ...RELATIVE, weights: withValue(new Float32Array(22), 12, Infinity) }, checkFinite: true },
    RangeError,
    '@: relative.weights[12] must be finite, got Infinity',
  ],
  [{ layout: 'bnhc' }, RangeError, "@: layout must be one of 'bhnd', 'bnhd', got 'bnhc'"],
  [{ layout: 1 }, TypeError, '@: layout must be one of'],
  [{ method: 'toeplitz', softcap: 1 }, RangeError, "@: method 'toeplitz' has no softcap; 'auto' and 'exact' have it"],
  [{ method: 'toeplitz', segments: [0, 2] }, RangeError, "@: method 'toeplitz' has no segments; 'auto' and 'exact' have it"],
  [{ method: 'toeplitz', sinks: new Float32Array(4) }, RangeError, "@: method 'toeplitz' has no sinks"],
  [{ method: 'toeplitz', mask: new Uint8Array(35) }, RangeError, "@: method 'toeplitz' has no mask"],
  [{ method: 'toeplitz', degree: 9 }, RangeError, '@: degree must be an integer from 0 to 8, got 9'],
  [
    { method: 'toeplitz', bias: new Float32Array(11).fill(Infinity) },
    RangeError,
    "@: method 'toeplitz' needs a bias below Infinity, found NaN or Infinity",
  ],
  [
    { method: 'toeplitz', guarantee: 'certified', tolerance: 1e-6 },
    RangeError,
    "@: method 'toeplitz' misses the tolerance 0.000001: ",
  ],
  [{ method: 'fast' }, RangeError, "@: method must be one of 'auto', 'exact', 'polynomial', 'toeplitz', got 'fast'"],
  [{ method: 1 }, TypeError, '@: method must be one of'],
  [
    { tolerance: 1e-7 },
    RangeError,
    '@: tolerance must be finite and at least 0.000001, the floor of float32 sums, got 1e-7',
  ],
  [{ tolerance: Infinity }, RangeError, '@: tolerance must be finite'],
  [{ tolerance: NaN }, RangeError, '@: tolerance must be finite'],
  [{ tolerance: '1e-3' }, TypeError, "@: tolerance must be a number, got '1e-3'"],
  [{ guarantee: 'proved' }, RangeError, "@: guarantee must be one of 'sampled', 'certified', got 'proved'"],
  [{ degree: 9 }, RangeError, '@: degree must be an integer from 0 to 8, got 9'],
  [{ degree: -1 }, RangeError, '@: degree must be an integer from 0 to 8, got -1'],
  [{ degree: '2' }, TypeError, "@: degree must be a number, got '2'"],
  [{ degree: 2, method: 'exact' }, RangeError, "@: method 'exact' has no degree, got degree 2"],
  [{ seed: -1 }, RangeError, '@: seed must be an integer from 0 to 4294967295, got -1'],
  [{ seed: 0.5 }, RangeError, '@: seed must be an integer'],
  [{ onMiss: 'ignore' }, RangeError, "@: onMiss must be one of 'error', 'report', got 'ignore'"],
  [{ checkFinite: 1 }, TypeError, '@: checkFinite must be true or false, got 1'],
  [{ checkFinite: true, q: withValue(args.q, 31, NaN) }, RangeError, '@: q[31] must be finite, got NaN'],
  [{ checkFinite: true, k: withValue(args.k, 0, Infinity) }, RangeError, '@: k[0] must be finite, got Infinity'],
  [{ checkFinite: true, v: withValue(args.v, 167, NaN) }, RangeError, '@: v[167] must be finite, got NaN'],
  [{ casual: true }, TypeError, '@: there is no option casual; known are q, k, v'],
  [{ signal: new AbortController().signal }, TypeError, '@: signal is only for createRopeAttentionWorker'],
  [{ onProgress: () => {} }, TypeError, '@: onProgress is only for createRopeAttentionWorker'],
];

const CASES: [name: 'forward' | 'backward' | 'plan' | 'rotate', ...Case][] = [
  ...(['forward', 'backward', 'plan'] as const).flatMap((name) =>
    COMMON.map((one): (typeof CASES)[number] => [name, ...one]),
  ),
  ['forward', { v: undefined }, TypeError, '@: v must be a Float32Array, got undefined'],
  ['forward', { dOutput }, TypeError, '@: there is no option dOutput'],
  ['backward', { v: undefined }, TypeError, '@: v must be a Float32Array, got undefined'],
  ['backward', { dOutput: undefined }, TypeError, '@: dOutput must be a Float32Array, got undefined'],
  ['backward', { dOutput: dOutput.subarray(6) }, RangeError, '@: dOutput has 234 values, shape needs 240'],
  ['backward', { output: dOutput }, TypeError, '@: output needs lse as well; give both or neither'],
  ['backward', { lse: new Float32Array(40) }, TypeError, '@: lse needs output as well; give both or neither'],
  ['backward', { output: dOutput, lse: new Float32Array(41) }, RangeError, '@: lse has 41 values, shape needs 40'],
  ['backward', { saved: dOutput }, TypeError, '@: saved must be an object, got a Float32Array'],
  ['backward', { saved: { output: dOutput } }, TypeError, '@: saved.lse must be a Float32Array, got undefined'],
  ['backward', { saved: { output: dOutput, lse: new Float32Array(39) } }, RangeError, '@: saved.lse has 39 values, shape needs 40'],
  ['backward', { saved: { output: dOutput, logsumexp: 1 } }, TypeError, '@: there is no option saved.logsumexp; known are'],
  [
    'backward',
    { saved: { output: dOutput, lse: new Float32Array(40) }, output: dOutput },
    TypeError,
    '@: saved takes the place of output and lse; output is given too',
  ],
  ['forward', { saved: { output: dOutput, lse: new Float32Array(40) } }, TypeError, '@: there is no option saved'],
  ['backward', { checkFinite: true, dOutput: withValue(dOutput, 7, -Infinity) }, RangeError, '@: dOutput[7] must be finite, got -Infinity'],
  ['rotate', { checkFinite: true }, TypeError, '@: there is no option checkFinite'],
  ['plan', { v: undefined, dOutput }, TypeError, '@: dOutput needs v as well'],
  ['plan', { output: dOutput }, TypeError, '@: there is no option output'],
  [
    'forward',
    { shape: { ...SHAPE, keyLength: 9 }, k: new Float32Array(288), v: new Float32Array(216), rotary: { tables: TABLES } },
    RangeError,
    '@: first key 0 + length 9 must stay within the 8 rows of rotary.tables',
  ],
  [
    'forward',
    { rotary: { tables: TABLES, keyPositions: [0, 1, 2, 3, 4, 5, -6] } },
    RangeError,
    '@: rotary.keyPositions[6] must be a row of rotary.tables, 0 to 7, got -6',
  ],
  [
    'rotate',
    { rotary: { keyPositions: [0, 1, 2, 3, 4, 5, 6] } },
    TypeError,
    '@: rotary.keyPositions is not for rotate: x is turned by rotary.queryPositions',
  ],
  ['rotate', { x: args.k }, RangeError, '@: x has 224 values, shape needs 320'],
  ['rotate', { x: [1, 2] }, TypeError, '@: x must be a Float32Array, got an array'],
  ['rotate', { layout: 'bnh' }, RangeError, "@: layout must be one of 'bhnd', 'bnhd', got 'bnh'"],
  ['rotate', { inverse: 1 }, TypeError, '@: inverse must be true or false, got 1'],
  [
    'rotate',
    { causal: true },
    TypeError,
    '@: there is no option causal; known are x, shape, rotary, queryOffset, layout, inverse',
  ],
  ['rotate', { shape: { ...SHAPE, headDim: 7 } }, RangeError, '@: rotary.dim is headDim by default'],
  ['rotate', { rotary: { dim: 3 } }, RangeError, '@: rotary.dim must be even, got 3'],
  ['rotate', { queryOffset: 2 ** 31 }, RangeError, '@: queryOffset must be an integer'],
];

describe('misuse', () => {
  const title = ([name, changes, , message]: (typeof CASES)[number]) =>
    `${name} ${Object.keys(changes).join(', ')}: ${message.replace('@', name)}`;
  test.each(CASES.map((one) => [title(one), ...one] as const))('%s', (_, name, changes, kind, message) => {
    let thrown: unknown;
    try {
      call(name, changes)();
    } catch (error) {
      thrown = error;
    }
    expect(thrown).toBeInstanceOf(kind);
    expect((thrown as Error).message).toContain(message.replace('@', name));
  });

  test.each([undefined, null, 3, 'q', [], new Float32Array(3)])('an argument that is no object: %p', (given) => {
    for (const name of ['forward', 'backward', 'plan', 'rotate'] as const) {
      const act = () => (attention[name] as (given: unknown) => unknown)(given);
      expect(act).toThrow(TypeError);
      expect(act).toThrow(`${name}: its argument must be an object, got`);
    }
  });

  const CREATE: [unknown, typeof TypeError | typeof RangeError, string][] = [
    [null, TypeError, 'createRopeAttention: its argument must be an object, got null'],
    [
      { simd: true },
      TypeError,
      'createRopeAttention: there is no option simd; known are wasm, relaxedSimd, maxMemoryBytes',
    ],
    [{ relaxedSimd: 'yes' }, RangeError, "createRopeAttention: relaxedSimd must be 'auto', true or false, got 'yes'"],
    [{ relaxedSimd: 1 }, TypeError, "createRopeAttention: relaxedSimd must be 'auto', true or false, got 1"],
    [{ maxMemoryBytes: '1' }, TypeError, "createRopeAttention: maxMemoryBytes must be a number, got '1'"],
    [
      { maxMemoryBytes: 0 },
      RangeError,
      'createRopeAttention: maxMemoryBytes must be above 0 and at most 4294967296, got 0',
    ],
    [{ maxMemoryBytes: 2 ** 33 }, RangeError, 'createRopeAttention: maxMemoryBytes must be above 0'],
    [{ maxMemoryBytes: 1000 }, RangeError, 'createRopeAttention: maxMemoryBytes is 1000, an instance at rest holds '],
    [
      { wasm: 7 },
      TypeError,
      'createRopeAttention: wasm must be an address, bytes, a Response or a WebAssembly.Module, got 7',
    ],
    [{ wasm: {} }, TypeError, 'createRopeAttention: wasm must be'],
  ];
  test.each(CREATE)('createRopeAttention(%p)', async (options, kind, message) => {
    const made = createRopeAttention(options as CreateOptions);
    await expect(made).rejects.toThrow(kind);
    await expect(made).rejects.toThrow(message);
  });

  test('checkFinite changes nothing where all is finite, and nothing is looked at without it', () => {
    const { output } = attention.forward({ ...forwardArgs, checkFinite: true });
    expect(output).toEqual(attention.forward(forwardArgs).output);
    const strange = attention.forward({ ...forwardArgs, q: withValue(args.q, 0, NaN), checkFinite: false });
    expect(strange.output.slice(0, 6)).toEqual(new Float32Array(6).fill(NaN));
  });

  test('an option that is undefined is an option not given', () => {
    const absent = {
      rotary: undefined,
      scale: undefined,
      causal: undefined,
      window: undefined,
      bias: undefined,
      degree: undefined,
    };
    expect(attention.forward({ ...forwardArgs, ...absent }).output).toEqual(attention.forward(forwardArgs).output);
  });

  test('a throw leaves the instance usable', () => {
    const before = attention.backward(args);
    for (const [name, changes] of CASES) expect(call(name, changes)).toThrow();
    const after = attention.backward(args);
    expect([after.dq, after.dk, after.dv]).toEqual([before.dq, before.dk, before.dv]);
  });
});

describe('arguments', () => {
  /** The same values in the middle of a larger buffer that is filled with NaN. */
  const inMiddle = (values: Float32Array, buffer: ArrayBufferLike, offset: number) => {
    new Float32Array(buffer).fill(NaN);
    const view = new Float32Array(buffer, offset, values.length);
    view.set(values);
    return view;
  };
  const arrays = ['q', 'k', 'v', 'dOutput'] as const;

  test.each([
    ['views with an offset', (bytes: number) => new ArrayBuffer(bytes)],
    ['views on shared memory', (bytes: number) => new SharedArrayBuffer(bytes)],
  ])('%s count as their part only, and are not written', (_, allocate) => {
    const given: BackwardArgs = { ...args };
    for (const name of arrays)
      given[name] = inMiddle(args[name], allocate(4 * args[name].length + 64), 20) as Float32Array;
    const before = arrays.map((name) => new Uint8Array(given[name].buffer).slice());
    const expected = { ...attention.backward(args), ...attention.forward(forwardArgs) };
    const { dOutput: _dOutput, ...forwardGiven } = given;
    const got = { ...attention.backward(given), ...attention.forward(forwardGiven) };
    for (const name of ['dq', 'dk', 'dv', 'output', 'lse'] as const) expect(got[name]).toEqual(expected[name]);
    arrays.forEach((name, n) => {
      expect(given[name].length).toBe(args[name].length); // not detached
      expect(new Uint8Array(given[name].buffer)).toEqual(before[n]);
    });
  });

  test('one array may stand for several', () => {
    const shape = { heads: 1, queryLength: 4, headDim: 4 };
    const { q } = problem({ shape }, 2);
    const expected = attention.forward({ q, k: q.slice(), v: q.slice(), shape });
    expect(attention.forward({ q, k: q, v: q, shape }).output).toEqual(expected.output);
  });

  test('results own their memory', () => {
    const { output, lse } = attention.forward(forwardArgs);
    const kept = [output.slice(), lse.slice()];
    attention.forward({ ...forwardArgs, v: args.v.map((x) => -x), scale: 3 });
    expect([output, lse]).toEqual(kept);
    expect(output.buffer.byteLength).toBe(output.byteLength);
    expect(output.buffer).not.toBe(lse.buffer);
  });
});

describe('options reach the kernels', () => {
  const SETTINGS = [
    {},
    { rotary: false as const },
    { rotary: { base: 100 } },
    { rotary: { dim: 4 } },
    { rotary: { dim: 0 } },
    { rotary: { interleaved: true } },
    { rotary: { frequencies: Float32Array.of(1, 0.5, -0.25, 2) } },
    { rotary: { dim: 4, frequencies: Float32Array.of(0.3, 1.7) } },
    { scale: 1 / 8 },
    { scale: -0.5 },
    { causal: true },
    { causal: true, queryOffset: 2 },
    { causal: true, queryOffset: -3 },
    { queryOffset: 100000 },
    { window: [-1, -1] as const },
    { window: [2, 1] as const },
    { segments: [0] },
    { segments: [0, 2, 5] },
    { layout: 'bnhd' as const },
    { softcap: 0.5 },
    { bias: Float32Array.from({ length: 11 }, (_, n) => n % 4) },
    { bias: Float32Array.from({ length: 44 }, (_, n) => n % 5) },
    { mask: Float32Array.from({ length: 35 }, (_, n) => n % 3) },
    { mask: Uint8Array.from({ length: 2 * 4 * 7 }, (_, n) => n % 3), maskShape: [2, 4, 1, 7] as const },
    { sinks: Float32Array.of(1, 0, -1, 3) },
    { rotary: { queryPositions: [5, 0, 3.5, -2, 9] } },
    { rotary: { keyPositions: Float32Array.from({ length: 14 }, (_, n) => (n * 5) % 13) } },
    { rotary: { tables: { cos: TABLES.cos, sin: TABLES.cos.map((_, n) => Math.sin(n)) } } },
    { relativePositions: Float32Array.from({ length: 11 }, (_, n) => (n % 4) / 2) },
    { relative: { support: RELATIVE.support, weights: Float32Array.from({ length: 22 }, (_, n) => (n % 7) - 3) } },
  ];
  /** These say what the default is. */
  const IDLE = [SETTINGS[0], SETTINGS[14], SETTINGS[16]];
  test.each(SETTINGS)('%p', (setting) => {
    const given = { ...args, ...setting };
    const { dOutput: _dOutput, ...forwardGiven } = given;
    const expected = { ...reference.forward(given), ...reference.backward(given) };
    const got = {
      ...attention.forward({ ...forwardGiven, method: 'exact' }),
      ...attention.backward({ ...given, method: 'exact' }),
    };
    for (const name of ['output', 'lse', 'dq', 'dk', 'dv'] as const) {
      expect(maxDifference(got[name], expected[name])).toBeLessThan(
        1e-5 * maxAbs(expected[name].filter(Number.isFinite)),
      );
    }
    // The setting matters: without it the result is another one.
    const plain = reference.forward({ ...args });
    const same = maxDifference(plain.output, expected.output) === 0;
    expect(same).toBe(IDLE.includes(setting));
  });

  test('rotate, and back', () => {
    const setting = { rotary: { dim: 6, base: 50 }, queryOffset: 1234 };
    const expected = reference.rotate({ ...rotateArgs, ...setting });
    const rotated = attention.rotate({ ...rotateArgs, ...setting });
    expect(maxDifference(rotated, expected)).toBeLessThan(1e-6 * maxAbs(args.q));
    expect(maxDifference(rotated, args.q)).toBeGreaterThan(0.1);
    expect(
      maxDifference(attention.rotate({ ...rotateArgs, ...setting, x: rotated, inverse: true }), args.q),
    ).toBeLessThan(1e-6 * maxAbs(args.q));
    expect(attention.rotate({ ...rotateArgs, rotary: false })).toEqual(args.q);
  });

  test('backward from the given output and lse is backward without them', () => {
    const { output, lse } = attention.forward({ ...forwardArgs, method: 'exact' });
    const without = attention.backward({ ...args, method: 'exact' });
    const given = attention.backward({ ...args, output, lse, method: 'exact' });
    for (const name of ['dq', 'dk', 'dv'] as const) expect(given[name]).toEqual(without[name]);
    expect(given.report.flops).toBeLessThan(without.report.flops);
    const whole = attention.forward({ ...forwardArgs, method: 'exact' });
    const saved = attention.backward({ ...args, saved: whole, method: 'exact' });
    for (const name of ['dq', 'dk', 'dv'] as const) expect(saved[name]).toEqual(given[name]);
    expect(saved.report.flops).toBe(given.report.flops);
  });

  test('backward does use them: other ones give other gradients with `exact`, and are found out with `auto`', () => {
    const shape = { ...SHAPE, queryLength: 200, keyLength: 140 };
    const longer = problem({ shape }, 1);
    const wrong = { output: new Float32Array(9600).fill(1), lse: new Float32Array(1600).fill(1) };
    const { dq } = attention.backward({ ...longer, method: 'exact' });
    expect(maxDifference(attention.backward({ ...longer, ...wrong, method: 'exact' }).dq, dq)).toBeGreaterThan(0.01);
    const found = attention.backward({ ...longer, ...wrong });
    expect(found.dq).toEqual(dq);
    expect(found.report.reason).toContain('computed again');
  });

  test('the report says where a call is too short to look at them', () => {
    const { output, lse } = attention.forward({ ...forwardArgs, method: 'exact' });
    const { report } = attention.backward({ ...args, output, lse });
    expect(report.reason).toContain('the given output and lse were not checked in so short a call');
    expect(attention.backward(args).report.reason).not.toContain('given');
  });
});

describe('an instance', () => {
  test('does not see another one', async () => {
    const other = await createRopeAttention();
    const expected = attention.forward(forwardArgs).output;
    other.forward({ ...forwardArgs, scale: 2 });
    expect(attention.forward(forwardArgs).output).toEqual(expected);
    other.dispose();
    expect(attention.forward(forwardArgs).output).toEqual(expected);
  });

  test('refuses every call after dispose, which may be repeated', async () => {
    const gone = await createRopeAttention();
    expect(gone.memoryBytes).toBeGreaterThan(0);
    gone.dispose();
    gone.dispose();
    expect(gone.memoryBytes).toBe(0);
    expect(() => gone.forward(forwardArgs)).toThrow('forward: this instance was disposed');
    expect(() => gone.backward(args)).toThrow('backward: this instance was disposed');
    expect(() => gone.plan(planArgs)).toThrow('plan: this instance was disposed');
    expect(() => gone.rotate(rotateArgs)).toThrow('rotate: this instance was disposed');
  });

  test('takes more key/value heads than fit the arguments of a function', () => {
    const batch = 2 ** 17;
    const x = Float32Array.from({ length: 2 * batch }, (_, n) => n % 7);
    const { output, report } = attention.forward({ q: x, k: x, v: x, shape: { batch, heads: 1, queryLength: 1, headDim: 2 } });
    expect(output).toEqual(x);
    expect(report.entryBound).toBe(6);
  });

  test('is not harmed by a call that is left half done', async () => {
    const one = await createAttention({});
    const large = problem({ shape: { heads: 4, queryLength: 1000, headDim: 16 } }, 5);
    const { dOutput: _dOutput, ...forwardLarge } = large;
    const expected = one.forward({ ...forwardLarge, method: 'exact' }).output;
    const held = one.memoryBytes;

    const left = one.forwardSteps({ ...forwardLarge, method: 'exact', scale: 0 });
    for (let n = 0; n < 6; n++) expect(left.next().done).toBe(false);
    expect(one.forward({ ...forwardLarge, method: 'exact' }).output).toEqual(expected);
    expect(() => left.next()).toThrow('forward: this call was left: its instance was disposed or began another call');

    const returned = one.forwardSteps({ ...forwardLarge, method: 'exact', scale: 0 });
    for (let n = 0; n < 6; n++) returned.next();
    returned.return(undefined as never);
    expect(one.forward({ ...forwardLarge, method: 'exact' }).output).toEqual(expected);
    expect(one.memoryBytes).toBe(held);

    const last = one.forwardSteps({ ...forwardLarge, method: 'exact' });
    last.next();
    one.dispose();
    expect(() => last.next()).toThrow('forward: this call was left');
  });

  test('holds the same memory after a thousand calls', async () => {
    const one = await createRopeAttention();
    const round = () => {
      one.forward(forwardArgs);
      one.backward(args);
      one.rotate(rotateArgs);
      one.plan(planArgs);
      expect(call('forward', { q: args.k })).toThrow(RangeError);
    };
    // One large call sets the size.
    const large = problem({ shape: { heads: 2, queryLength: 600, headDim: 16 } }, 3);
    one.backward(large);
    const held = one.memoryBytes;
    for (let n = 0; n < 250; n++) round();
    one.backward(large);
    expect(one.memoryBytes).toBe(held);
    one.dispose();
  });

  test('keeps to maxMemoryBytes, names both numbers, and goes on', async () => {
    const maxMemoryBytes = 2 ** 20;
    const small = await createRopeAttention({ maxMemoryBytes });
    const shape = { heads: 1, queryLength: 8192, headDim: 16 };
    const q = new Float32Array(8192 * 16);
    let message = '';
    try {
      small.forward({ q, k: q, v: q, shape });
    } catch (error) {
      expect(error).toBeInstanceOf(RangeError);
      message = (error as Error).message;
    }
    const [, needed, limit] =
      /^forward: needs (\d+) bytes of WebAssembly memory, the limit is (\d+)$/.exec(message) ?? [];
    expect(Number(limit)).toBe(maxMemoryBytes);
    expect(Number(needed)).toBeGreaterThan(4 * q.byteLength); // q, k, v, output
    expect(small.memoryBytes).toBeLessThanOrEqual(maxMemoryBytes);
    const { dOutput: _dOutput, ...wide } = problem({ shape: { heads: 1, queryLength: 2000, headDim: 2 } }, 6);
    const masked = { ...wide, mask: new Uint8Array(2000 * 2000) };
    expect(() => small.forward(masked)).toThrow(/^forward: needs \d+ bytes of WebAssembly memory, the limit is 1048576$/);
    expect(small.forward(forwardArgs).output).toEqual(attention.forward(forwardArgs).output);
    expect(small.memoryBytes).toBeLessThanOrEqual(maxMemoryBytes);
    small.dispose();
  });

  test('reports the bytes that it needs', async () => {
    const one = await createRopeAttention();
    const large = problem({ shape: { heads: 1, queryLength: 5000, headDim: 32 } }, 4);
    const { dOutput: _dOutput, ...forwardLarge } = large;
    const { report } = one.forward({ ...forwardLarge, method: 'exact' });
    expect(report.bytes).toBeGreaterThan(4 * 4 * 5000 * 32);
    expect(one.memoryBytes - report.bytes).toBeLessThan(65536);
    one.dispose();
  });
});
