// SPDX-License-Identifier: MIT
//
// What the suites share: seeded inputs, error measures, a matcher, and the loop over both binaries.

import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';

import { createRopeAttention } from '../dist/index.js';
import { hasRelaxedSimd } from '../dist/probe.js';
import type { AttentionLossArgs, BackwardArgs, Layout, LossShape, Options, RopeAttention, Shape } from '../dist/index.js';

export type Floats = Float32Array | Float64Array;

/** Unit roundoff of float32, 2^-24: half the spacing at 1. */
export const UNIT = 2 ** -24;

// --- Inputs -----------------------------------------------------------------------------------------------------------

export interface Random {
  /** [0, 1) */
  uniform(): number;
  /** Mean 0, variance 1. */
  normal(): number;
}

/** mulberry32, a 32-bit generator: the same numbers from the same seed on every machine. */
export function random(seed: number): Random {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  const normal = () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  return { uniform, normal };
}

/** `length` numbers drawn one by one, so that no two rows, heads or columns are alike. */
export function draw(length: number, next: () => number): Float32Array {
  return Float32Array.from({ length }, next);
}

/** The options that the mathematics depends on. */
export type Setting = Pick<
  Options,
  | 'shape'
  | 'rotary'
  | 'scale'
  | 'causal'
  | 'queryOffset'
  | 'window'
  | 'segments'
  | 'layout'
  | 'softcap'
  | 'alibi'
  | 'bias'
  | 'mask'
  | 'maskShape'
  | 'sinks'
  | 'relativePositions'
  | 'relative'
>;
export type Arrays = Pick<BackwardArgs, 'q' | 'k' | 'v' | 'dOutput'>;
export type Problem = Setting & Arrays;

/** Entries of random matrices W_t in random places, some of them named twice. */
export function relativeMap(shape: Shape, places: number, seed: number): NonNullable<Setting['relative']> {
  const { queryLength, keyLength, headDim } = fullShape(shape);
  const { uniform, normal } = random(seed);
  const support = Uint32Array.from({ length: 2 * places }, () => Math.floor(headDim * uniform()));
  support.copyWithin(2, 0, places > 1 ? 2 : 0);
  return { support, weights: draw(places * (queryLength + keyLength - 1), normal) };
}

/** f(i + queryOffset - j) for every diagonal. */
export function positionsBy(shape: Shape, f: (t: number) => number, queryOffset = 0): Float32Array {
  const { queryLength, keyLength } = fullShape(shape);
  return Float32Array.from({ length: queryLength + keyLength - 1 }, (_, n) => f(n - (keyLength - 1) + queryOffset));
}

/** The rotation by f(t) as a relative map: 2 x 2 blocks, and 1 for dimensions that do not turn. */
export function rotationMap(
  shape: Shape,
  positions: Float32Array,
  { dim = shape.headDim, interleaved = false, base = 10000 }: { dim?: number; interleaved?: boolean; base?: number } = {},
): NonNullable<Setting['relative']> {
  const places: number[] = [];
  const rows: Float32Array[] = [];
  const add = (a: number, b: number, of: (t: number) => number) => {
    places.push(a, b);
    rows.push(positions.map(of));
  };
  for (let p = 0; p < dim / 2; p++) {
    const [first, second] = interleaved ? [2 * p, 2 * p + 1] : [p, p + dim / 2];
    const angle = (t: number) => t * base ** ((-2 * p) / dim);
    add(first, first, (t) => Math.cos(angle(t)));
    add(first, second, (t) => Math.sin(angle(t)));
    add(second, first, (t) => -Math.sin(angle(t)));
    add(second, second, (t) => Math.cos(angle(t)));
  }
  for (let d = dim; d < shape.headDim; d++) add(d, d, () => 1);
  const weights = new Float32Array(rows.length * positions.length);
  rows.forEach((row, n) => weights.set(row, n * positions.length));
  return { support: Uint32Array.from(places), weights };
}

/** What `forward` takes: it knows no dOutput. */
export function forwardArgs({ dOutput: _, ...args }: Problem): Omit<Problem, 'dOutput'> {
  return args;
}

/** Number of elements of q (and dq), k, v and output. */
export function lengths(shape: Shape): { q: number; k: number; v: number; output: number } {
  const { batch, heads, kvHeads, queryLength, keyLength, headDim, valueDim } = fullShape(shape);
  return {
    q: batch * heads * queryLength * headDim,
    k: batch * kvHeads * keyLength * headDim,
    v: batch * kvHeads * keyLength * valueDim,
    output: batch * heads * queryLength * valueDim,
  };
}

/** The sizes with their defaults filled in. */
export function fullShape(shape: Shape): Required<Shape> {
  const { batch = 1, heads, kvHeads = heads, queryLength, keyLength = queryLength, headDim, valueDim = headDim } = shape;
  return { batch, heads, kvHeads, queryLength, keyLength, headDim, valueDim };
}

/** The setting with normal inputs; `entries` draws q and k instead where given. */
export function problem(setting: Setting, seed: number, entries?: (r: Random) => number): Problem {
  const r = random(seed);
  const n = lengths(setting.shape);
  const next = entries ? () => entries(r) : r.normal;
  return { ...setting, q: draw(n.q, next), k: draw(n.k, next), v: draw(n.v, r.normal), dOutput: draw(n.output, r.normal) };
}

/** The arrays of `attentionLoss`: tokens, weights, target. */
export const TRAINING_ARRAYS = ['a1', 'a2', 'a3', 'x1', 'x2', 'y', 'e'] as const;

/** A training problem of normal tokens and target, and of weights such that entries of q, k and v have the deviation `size`. */
export function training<T extends { shape: LossShape }>(setting: T, seed: number, size = 1): T & AttentionLossArgs {
  const { batch, heads, kvHeads, queryLength, keyLength, headDim, valueDim } = fullShape(setting.shape);
  const { modelDim = heads * headDim } = setting.shape;
  const { normal } = random(seed);
  const token = (length: number, width = modelDim) => draw(batch * length * width, normal);
  const weight = (width: number) => draw(modelDim * width, () => (normal() * size) / Math.sqrt(modelDim));
  return {
    ...setting,
    a1: token(queryLength),
    a2: token(keyLength),
    a3: token(keyLength),
    x1: weight(heads * headDim),
    x2: weight(kvHeads * headDim),
    y: weight(kvHeads * valueDim),
    e: token(queryLength, heads * valueDim),
  };
}

/** x [batch, heads, length, dim] in another layout, or from another layout to this one. */
export function inLayout<T extends Floats>(x: T, to: Layout, heads: number, length: number, dim: number): T {
  const y = x.slice() as T;
  for (let r = 0; r < x.length / dim; r++) {
    const [head, n] = [Math.floor(r / length), r % length];
    const other = (Math.floor(head / heads) * length + n) * heads + (head % heads);
    const [from, at] = to === 'bnhd' ? [r, other] : [other, r];
    y.set(x.subarray(from * dim, (from + 1) * dim) as never, at * dim);
  }
  return y;
}

/** The same problem with all arrays in another layout than they are in. */
export function withLayout(args: Problem, layout: Layout): Problem {
  if (layout === (args.layout ?? 'bhnd')) return args;
  const { heads, kvHeads, queryLength, keyLength, headDim, valueDim } = fullShape(args.shape);
  return {
    ...args,
    layout,
    q: inLayout(args.q, layout, heads, queryLength, headDim),
    k: inLayout(args.k, layout, kvHeads, keyLength, headDim),
    v: inLayout(args.v, layout, kvHeads, keyLength, valueDim),
    dOutput: inLayout(args.dOutput, layout, heads, queryLength, valueDim),
  };
}

/** A few words that tell one setting from another. */
export function describeSetting({ shape, rotary, scale, causal, queryOffset, layout, ...scores }: Setting): string {
  const { batch, heads, kvHeads, queryLength, keyLength, headDim, valueDim } = fullShape(shape);
  const words = [`${queryLength}x${keyLength} D=${headDim}`];
  if (valueDim !== headDim) words.push(`Dv=${valueDim}`);
  if (batch * heads > 1) words.push(`batch ${batch} heads ${heads}/${kvHeads}`);
  if (causal) words.push('causal');
  if (queryOffset) words.push(`offset ${queryOffset}`);
  if (rotary === false) words.push('no rotation');
  else if (rotary) words.push(...Object.entries(rotary).map(([key, value]) => `${key} ${brief(value)}`));
  if (layout) words.push(layout);
  words.push(...Object.entries(scores).map(([key, value]) => `${key} ${brief(value)}`));
  if (scale !== undefined) words.push(`scale ${scale}`);
  return words.join(', ');
}

/** Long lists by their length. */
function brief(value: unknown): string {
  const [text, list] = [JSON.stringify(value), value as { length?: number }];
  return text.length <= 60 ? text : list.length === undefined ? Object.keys(list).join(' ') : `of ${list.length}`;
}

// --- Errors -----------------------------------------------------------------------------------------------------------

export function maxAbs(x: Floats): number {
  let largest = 0;
  for (const value of x) largest = Math.max(largest, Math.abs(value));
  return largest;
}

/** max |x - y|; equal infinities differ by 0, a NaN by Infinity. */
export function maxDifference(x: Floats, y: Floats): number {
  if (x.length !== y.length) throw new RangeError(`maxDifference: ${x.length} and ${y.length} values`);
  let largest = 0;
  for (let n = 0; n < x.length; n++) {
    const difference = x[n] === y[n] ? 0 : Math.abs(x[n] - y[n]);
    if (!(difference <= largest)) largest = Number.isNaN(difference) ? Infinity : difference;
  }
  return largest;
}

/** |x - y|_F / |y|_F */
export function relativeFrobenius(x: Floats, y: Floats): number {
  let [above, below] = [0, 0];
  for (let n = 0; n < y.length; n++) {
    above += (x[n] - y[n]) ** 2;
    below += y[n] ** 2;
  }
  return Math.sqrt(above / below);
}

export function inner(x: Floats, y: Floats): number {
  let sum = 0;
  for (let n = 0; n < x.length; n++) sum += x[n] * y[n];
  return sum;
}

/** x + a y, rounded to float32. */
export function add(x: Float32Array, a: number, y: Floats): Float32Array {
  return x.map((value, n) => value + a * y[n]);
}

/**
 * How far a gradient is from the slope of the loss along a direction, relative to the spread of the sum <gradient, direction>,
 * (sum (g_n d_n)^2)^(1/2). The slope is the four-point difference of error step^4.
 */
export function slopeError(loss: (step: number) => number, gradient: Floats, direction: Floats, step = 0.02): number {
  const slope = (8 * (loss(step) - loss(-step)) - (loss(2 * step) - loss(-2 * step))) / (12 * step);
  const spread = Math.sqrt(Array.from(gradient).reduce((sum, g, n) => sum + (g * direction[n]) ** 2, 0));
  return Math.abs(slope - inner(gradient, direction)) / spread;
}

/** |received - expected| <= atol + rtol |expected| for every element; both default to 0. Equal infinities are close. */
function toBeAllclose(received: unknown, expected: Floats | readonly number[], { rtol = 0, atol = 0, name = 'value' } = {}) {
  const x = received as Floats;
  if (x.length !== expected.length) return { pass: false, message: () => `${name}: ${x.length} values, expected ${expected.length}` };
  let [worst, excess] = [-1, 0];
  for (let n = 0; n < x.length; n++) {
    const over = x[n] === expected[n] ? 0 : Math.abs(x[n] - expected[n]) - atol - rtol * Math.abs(expected[n]);
    if (!(over <= excess)) [worst, excess] = [n, Number.isNaN(over) ? Infinity : over];
  }
  const message = () =>
    worst < 0
      ? `${name}: all values are close`
      : `${name} ${worst} is ${x[worst]}, expected ${expected[worst]}: off by ${x[worst] - expected[worst]}, rtol ${rtol}, atol ${atol}`;
  return { pass: worst < 0, message };
}

expect.extend({ toBeAllclose });
declare module 'expect' {
  interface Matchers<R> {
    toBeAllclose(expected: Floats | readonly number[], tolerance?: { rtol?: number; atol?: number; name?: string }): R;
  }
}

// --- The binaries -----------------------------------------------------------------------------------------------------

/** The WebAssembly files that this engine accepts. */
export const binaries = [
  { name: 'simd128', relaxed: false, file: 'rope-attention.wasm' },
  { name: 'relaxed-simd', relaxed: true, file: 'rope-attention.relaxed.wasm' },
].filter(({ relaxed }) => !relaxed || hasRelaxedSimd());

/** Runs a suite with each binary; one that the engine refuses is listed as skipped. */
export function eachBinary(body: (attention: () => RopeAttention) => void): void {
  describe.each(binaries)('$name', ({ relaxed }) => {
    let attention: RopeAttention;
    beforeAll(async () => {
      attention = await createRopeAttention({ relaxedSimd: relaxed });
    });
    afterAll(() => attention.dispose());
    body(() => attention);
  });
  if (binaries.length < 2) test.skip('relaxed-simd: this engine refuses the instructions', () => {});
}

/** Computed when first asked for, then kept: references are shared by the binaries. */
export function lazy<T>(compute: () => T): () => T {
  let result: { value: T } | undefined;
  return () => (result ??= { value: compute() }).value;
}
