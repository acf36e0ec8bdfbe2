// SPDX-License-Identifier: MIT
//
// From the options of a call to a problem in which every default is resolved and every size has been checked, so that no
// later layer has to doubt. TypeError: wrong kind, or an option that does not exist; RangeError: wrong size or value. Every
// message is "function: rule and value". Arguments are only read.

import type { BackwardArgs, CreateOptions, ForwardArgs, PlanArgs, RotateArgs, Rotary, Shape } from './types.js';

/** The largest headDim and valueDim (RA_MAX_HEAD_DIM), and degree (RA_MAX_DEGREE). */
const MAX_DIM = 1024;
const MAX_DEGREE = 8;
const INT32_MAX = 2 ** 31 - 1;
/** Smallest tolerance: what float32 sums keep at moderate lengths. */
export const TOLERANCE_FLOOR = 1e-6;

/** Sizes, rotation and mask: what the kernels compute. */
export interface Geometry {
  batch: number;
  heads: number;
  kvHeads: number;
  queryLength: number;
  keyLength: number;
  headDim: number;
  valueDim: number;
  /** 0: no rotation. */
  rotaryDim: number;
  interleaved: boolean;
  /** [rotaryDim/2], radians per position. */
  frequencies: Float64Array;
  causal: boolean;
  queryOffset: number;
  scale: number;
}

/** Geometry, and how it is to be computed. */
export interface Problem extends Geometry {
  method: 'auto' | 'exact' | 'polynomial';
  degree: number | null;
  tolerance: number;
  guarantee: 'certified' | 'sampled';
  seed: number;
  onMiss: 'error' | 'report';
}

/** The arrays of a call; those that it does not have are null. */
export interface Inputs {
  q: Float32Array;
  k: Float32Array;
  v: Float32Array | null;
  dOutput: Float32Array | null;
  output: Float32Array | null;
  lse: Float32Array | null;
}

export interface Call {
  problem: Problem;
  inputs: Inputs;
}

const SHAPE = ['batch', 'heads', 'kvHeads', 'queryLength', 'keyLength', 'headDim', 'valueDim'];
const ROTARY = ['base', 'dim', 'interleaved', 'frequencies'];
const OPTIONS = [
  'shape',
  'rotary',
  'scale',
  'causal',
  'queryOffset',
  'window',
  'bias',
  'relativePositions',
  'relative',
].concat(['method', 'tolerance', 'guarantee', 'degree', 'seed', 'onMiss']);
const LATER = ['bias', 'relativePositions', 'relative'];

/** The options of each call, by name. */
export const ARGUMENTS = {
  forward: ['q', 'k', 'v', ...OPTIONS],
  backward: ['q', 'k', 'v', 'dOutput', 'output', 'lse', ...OPTIONS],
  plan: ['q', 'k', 'v', 'dOutput', ...OPTIONS],
  rotate: ['x', 'shape', 'rotary', 'queryOffset', 'inverse'],
} as const;
export type CallName = keyof typeof ARGUMENTS;

/** Checks the arguments of `forward`, `backward` or `plan`. */
export function readCall(name: 'forward' | 'backward' | 'plan', args: ForwardArgs | BackwardArgs | PlanArgs): Call {
  const given = readRecord(name, 'its argument', args, ARGUMENTS[name]);
  const problem = readProblem(name, given);
  const size = sizesOf(name, problem);
  const array = (option: keyof Inputs, values: number) =>
    given[option] === undefined ? null : readFloats(name, option, given[option], values);
  const required = (option: keyof Inputs, values: number) => readFloats(name, option, given[option], values);
  const inputs: Inputs = {
    q: required('q', size.q),
    k: required('k', size.k),
    v: name === 'plan' ? array('v', size.v) : required('v', size.v),
    dOutput: name === 'backward' ? required('dOutput', size.output) : array('dOutput', size.output),
    output: array('output', size.output),
    lse: array('lse', size.lse),
  };
  if (name === 'plan' && inputs.dOutput && !inputs.v) throw new TypeError('plan: dOutput needs v as well');
  if (!inputs.output !== !inputs.lse) {
    const [there, missing] = inputs.output ? ['output', 'lse'] : ['lse', 'output'];
    throw new TypeError(`${name}: ${there} needs ${missing} as well; give both or neither`);
  }
  return { problem, inputs };
}

/** Checks the arguments of `rotate`. */
export function readRotate(args: RotateArgs): { geometry: Geometry; x: Float32Array; inverse: boolean } {
  const given = readRecord('rotate', 'its argument', args, ARGUMENTS.rotate);
  const geometry = readGeometry('rotate', given);
  const x = readFloats('rotate', 'x', given['x'], sizesOf('rotate', geometry).q);
  return { geometry, x, inverse: readBoolean('rotate', 'inverse', given['inverse'], false) };
}

/** Checks what `createRopeAttention` and the worker share; `wasm` is looked at when it is loaded. */
export function readCreate(
  name: string,
  options: unknown,
  known: readonly string[],
): Omit<CreateOptions, 'wasm'> & { maxMemoryBytes: number } {
  const given = readRecord(name, 'its argument', options, known);
  const relaxedSimd = given['relaxedSimd'] ?? 'auto';
  if (typeof relaxedSimd !== 'boolean' && relaxedSimd !== 'auto') {
    throw wrong(name, 'relaxedSimd', "'auto', true or false", relaxedSimd, typeof relaxedSimd === 'string');
  }
  const limit = 2 ** 32;
  const maxMemoryBytes =
    given['maxMemoryBytes'] === undefined ? limit : readNumber(name, 'maxMemoryBytes', given['maxMemoryBytes']);
  if (!(maxMemoryBytes > 0 && maxMemoryBytes <= limit)) {
    throw wrong(name, 'maxMemoryBytes', `above 0 and at most ${limit}`, maxMemoryBytes, true);
  }
  return { relaxedSimd, maxMemoryBytes };
}

/** Values in each array of a call. */
export function sizesOf(name: string, g: Geometry): { q: number; k: number; v: number; output: number; lse: number } {
  const product = (array: string, ...factors: number[]) => {
    const values = factors.reduce((a, b) => a * b);
    if (values > Number.MAX_SAFE_INTEGER)
      throw new RangeError(`${name}: shape needs ${values} values of ${array}, which is beyond any array`);
    return values;
  };
  return {
    q: product('q', g.batch, g.heads, g.queryLength, g.headDim),
    k: product('k', g.batch, g.kvHeads, g.keyLength, g.headDim),
    v: product('v', g.batch, g.kvHeads, g.keyLength, g.valueDim),
    output: product('output', g.batch, g.heads, g.queryLength, g.valueDim),
    lse: product('lse', g.batch, g.heads, g.queryLength),
  };
}

type Given = Readonly<Record<string, unknown>>;

function readProblem(name: string, given: Given): Problem {
  const geometry = readGeometry(name, given);
  refuseLater(name, given);
  const tolerance = given['tolerance'] === undefined ? 1e-3 : readNumber(name, 'tolerance', given['tolerance']);
  if (!(tolerance >= TOLERANCE_FLOOR && tolerance < Infinity)) {
    throw wrong(
      name,
      'tolerance',
      `finite and at least ${TOLERANCE_FLOOR}, the floor of float32 sums`,
      tolerance,
      true,
    );
  }
  const method = readChoice(name, 'method', given['method'], ['auto', 'exact', 'polynomial', 'toeplitz'] as const);
  if (method === 'toeplitz') throw new RangeError(`${name}: method 'toeplitz' is not available in this version`);
  const degree = given['degree'] === undefined ? null : readInteger(name, 'degree', given['degree'], 0, MAX_DEGREE);
  if (degree !== null && method === 'exact')
    throw new RangeError(`${name}: method 'exact' has no degree, got degree ${degree}`);
  return {
    ...geometry,
    method,
    degree,
    tolerance,
    guarantee: readChoice(name, 'guarantee', given['guarantee'], ['sampled', 'certified'] as const),
    seed: given['seed'] === undefined ? 0 : readInteger(name, 'seed', given['seed'], 0, 2 ** 32 - 1),
    onMiss: readChoice(name, 'onMiss', given['onMiss'], ['error', 'report'] as const),
  };
}

function readGeometry(name: string, given: Given): Geometry {
  const shape = readShape(name, given['shape']);
  const queryOffset =
    given['queryOffset'] === undefined
      ? 0
      : readInteger(name, 'queryOffset', given['queryOffset'], -(2 ** 31), INT32_MAX);
  if (queryOffset + shape.queryLength > INT32_MAX) {
    throw new RangeError(
      `${name}: queryOffset ${queryOffset} + queryLength ${shape.queryLength} must not exceed ${INT32_MAX}`,
    );
  }
  const scale = given['scale'] === undefined ? 1 / Math.sqrt(shape.headDim) : readNumber(name, 'scale', given['scale']);
  if (!Number.isFinite(Math.fround(scale))) throw wrong(name, 'scale', 'a finite float32', scale, true);
  return {
    ...shape,
    ...readRotary(name, given['rotary'], shape.headDim),
    causal: readBoolean(name, 'causal', given['causal'], false),
    queryOffset,
    scale,
  };
}

function readShape(name: string, value: unknown): Required<Shape> {
  const shape = readRecord(name, 'shape', value, SHAPE);
  const size = (option: string, most: number, absent?: number) =>
    shape[option] === undefined && absent !== undefined
      ? absent
      : readInteger(name, `shape.${option}`, shape[option], 1, most);
  const heads = size('heads', INT32_MAX);
  const kvHeads = size('kvHeads', INT32_MAX, heads);
  if (heads % kvHeads !== 0)
    throw new RangeError(`${name}: shape.heads must be a multiple of shape.kvHeads, got ${heads} and ${kvHeads}`);
  const queryLength = size('queryLength', INT32_MAX);
  const headDim = size('headDim', MAX_DIM);
  return {
    batch: size('batch', INT32_MAX, 1),
    heads,
    kvHeads,
    queryLength,
    keyLength: size('keyLength', INT32_MAX, queryLength),
    headDim,
    valueDim: size('valueDim', MAX_DIM, headDim),
  };
}

function readRotary(
  name: string,
  value: unknown,
  headDim: number,
): Pick<Geometry, 'rotaryDim' | 'interleaved' | 'frequencies'> {
  if (value === false) return { rotaryDim: 0, interleaved: false, frequencies: new Float64Array(0) };
  if (value === true) throw wrong(name, 'rotary', 'false or an object', value, false);
  const rotary: { readonly [option in keyof Rotary]: unknown } =
    value === undefined ? {} : readRecord(name, 'rotary', value, ROTARY);
  if (rotary.dim === undefined && headDim % 2 !== 0) {
    const advice = `give an even rotary.dim, such as ${headDim - 1}, or rotary: false`;
    throw new RangeError(
      `${name}: rotary.dim is headDim by default and must be even, headDim is ${headDim}; ${advice}`,
    );
  }
  const rotaryDim = rotary.dim === undefined ? headDim : readInteger(name, 'rotary.dim', rotary.dim, 0, headDim);
  if (rotaryDim % 2 !== 0) throw wrong(name, 'rotary.dim', 'even', rotaryDim, true);
  const interleaved = readBoolean(name, 'rotary.interleaved', rotary.interleaved, false);
  if (rotary.frequencies === undefined)
    return { rotaryDim, interleaved, frequencies: readBase(name, rotary.base, rotaryDim) };

  if (rotary.base !== undefined) throw new TypeError(`${name}: rotary has both base and frequencies; give one of them`);
  const given = readFloats(name, 'rotary.frequencies', rotary.frequencies, rotaryDim / 2, 'rotary.dim/2');
  const frequencies = Float64Array.from(given);
  const bad = frequencies.findIndex((frequency) => !Number.isFinite(frequency));
  if (bad >= 0) throw wrong(name, `rotary.frequencies[${bad}]`, 'finite', frequencies[bad], true);
  return { rotaryDim, interleaved, frequencies };
}

/** base^(-2p/dim) for each pair p. */
function readBase(name: string, value: unknown, dim: number): Float64Array {
  const base = value === undefined ? 10000 : readNumber(name, 'rotary.base', value);
  if (!(base > 0 && base < Infinity)) throw wrong(name, 'rotary.base', 'positive and finite', base, true);
  const frequencies = Float64Array.from({ length: dim / 2 }, (_, p) => base ** ((-2 * p) / dim));
  if (!frequencies.every(Number.isFinite))
    throw wrong(name, 'rotary.base', 'large enough that base^(-2p/dim) is finite', base, true);
  return frequencies;
}

/** Options that the types name for a later version. */
function refuseLater(name: string, given: Given): void {
  for (const option of LATER) {
    if (given[option] !== undefined) throw new RangeError(`${name}: ${option} is not available in this version`);
  }
  const window = given['window'];
  if (window === undefined) return;
  if (!Array.isArray(window) || window.length !== 2) throw wrong(name, 'window', 'a pair [left, right]', window, false);
  const [left, right] = window as unknown[];
  readInteger(name, 'window[0]', left, -1, INT32_MAX);
  readInteger(name, 'window[1]', right, -1, INT32_MAX);
  if (left !== -1 || right !== -1) {
    throw new RangeError(
      `${name}: window other than [-1, -1] is not available in this version, got [${String(left)}, ${String(right)}]`,
    );
  }
}

function readRecord(name: string, option: string, value: unknown, known: readonly string[]): Given {
  if (typeof value !== 'object' || value === null || Array.isArray(value) || ArrayBuffer.isView(value)) {
    throw wrong(name, option, 'an object', value, false);
  }
  for (const key of Object.keys(value)) {
    if (known.includes(key)) continue;
    if (key === 'signal' || key === 'onProgress') {
      throw new TypeError(`${name}: ${key} is only for createRopeAttentionWorker; this instance computes at once`);
    }
    const inside = option === 'its argument' ? '' : `${option}.`;
    throw new TypeError(`${name}: there is no option ${inside}${key}; known are ${known.join(', ')}`);
  }
  return value as Given;
}

function readFloats(name: string, option: string, value: unknown, values: number, needs = 'shape'): Float32Array {
  // By tag, so that arrays of another realm count too.
  if (!ArrayBuffer.isView(value) || (value as Float32Array)[Symbol.toStringTag] !== 'Float32Array') {
    throw wrong(name, option, 'a Float32Array', value, false);
  }
  const array = value as Float32Array;
  if (array.length !== values)
    throw new RangeError(`${name}: ${option} has ${array.length} values, ${needs} needs ${values}`);
  return array;
}

function readNumber(name: string, option: string, value: unknown): number {
  if (typeof value !== 'number') throw wrong(name, option, 'a number', value, false);
  return value;
}

function readInteger(name: string, option: string, value: unknown, least: number, most: number): number {
  const number = readNumber(name, option, value);
  if (!Number.isInteger(number) || number < least || number > most) {
    throw wrong(name, option, `an integer from ${least} to ${most}`, number, true);
  }
  return number;
}

function readBoolean(name: string, option: string, value: unknown, absent: boolean): boolean {
  if (value === undefined) return absent;
  if (typeof value !== 'boolean') throw wrong(name, option, 'true or false', value, false);
  return value;
}

/** One of the texts, the first by default. */
function readChoice<T extends string>(name: string, option: string, value: unknown, texts: readonly [T, ...T[]]): T {
  if (value === undefined) return texts[0];
  const found = texts.find((text) => text === value);
  if (found === undefined)
    throw wrong(name, option, `one of '${texts.join("', '")}'`, value, typeof value === 'string');
  return found;
}

/** The error of a value that breaks a rule; of the right kind: RangeError, else TypeError. */
function wrong(name: string, option: string, rule: string, value: unknown, rightKind: boolean): Error {
  const message = `${name}: ${option} must be ${rule}, got ${describe(value)}`;
  return rightKind ? new RangeError(message) : new TypeError(message);
}

function describe(value: unknown): string {
  if (typeof value === 'string') return `'${value}'`;
  if (Array.isArray(value)) return 'an array';
  if (typeof value === 'function') return 'a function';
  if (typeof value === 'object' && value !== null) return `a ${Object.prototype.toString.call(value).slice(8, -1)}`;
  return String(value);
}
