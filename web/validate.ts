// SPDX-License-Identifier: MIT
//
// From the options of a call to a problem in which every default is resolved and every size has been checked, so that no
// later layer has to doubt; check.ts says how values are refused. Arguments are only read.

import { readBoolean, readChoice, readFinite, readFloats, readInteger, readNumber, readRecord, wrong, type Given } from './check.js';
import { readRelative, rotaryBeside, type Relative } from './relative.js';
import { readRotary, type Rotation } from './rotation.js';
import { foreignTo, readScores, type Scores } from './scores.js';
import { DecayFits, decaysOf } from './states.js';
import type { AttentionLossArgs, BackwardArgs, CreateOptions, ForwardArgs, Layout, Method, PlanArgs, RotateArgs, Shape } from './types.js';

/** The largest headDim and valueDim (RA_MAX_HEAD_DIM), and degree (RA_MAX_DEGREE). */
const MAX_DIM = 1024;
const MAX_DEGREE = 8;
const INT32_MAX = 2 ** 31 - 1;
/** Floats in 4 GiB. */
const MOST_VALUES = 2 ** 30;
/** Smallest tolerance: what float32 sums keep at moderate lengths. */
export const TOLERANCE_FLOOR = 1e-6;

/** Sizes, rotation, masks: what the kernels compute. */
export interface Geometry extends Rotation, Relative, Scores {
  batch: number;
  heads: number;
  kvHeads: number;
  queryLength: number;
  keyLength: number;
  headDim: number;
  valueDim: number;
  causal: boolean;
  queryOffset: number;
  scale: number;
  layout: Layout;
}

/** Geometry, and how it is to be computed. */
export interface Problem extends Geometry {
  method: Method;
  degree: number | null;
  /** By how much the best decays miss the bias, where they were looked for and none fits. */
  misfit: number | null;
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

/** The training problem: tokens, weights, target. */
export interface Training extends Record<(typeof TRAINING)[number], Float32Array> {
  problem: Problem;
  modelDim: number;
}

const SHAPE = ['batch', 'heads', 'kvHeads', 'queryLength', 'keyLength', 'headDim', 'valueDim'];
const OPTIONS = [
  'shape',
  'rotary',
  'scale',
  'causal',
  'queryOffset',
  'window',
  'segments',
  'layout',
  'softcap',
  'alibi',
  'bias',
  'mask',
  'maskShape',
  'sinks',
  'relativePositions',
  'relative',
].concat(['method', 'tolerance', 'guarantee', 'degree', 'seed', 'onMiss', 'checkFinite']);
const TRAINING = ['a1', 'a2', 'a3', 'x1', 'x2', 'y', 'e'] as const;

/** The options of each call, by name. */
export const ARGUMENTS = {
  forward: ['q', 'k', 'v', ...OPTIONS],
  backward: ['q', 'k', 'v', 'dOutput', 'output', 'lse', 'saved', ...OPTIONS],
  plan: ['q', 'k', 'v', 'dOutput', ...OPTIONS],
  rotate: ['x', 'shape', 'rotary', 'queryOffset', 'layout', 'inverse'],
  attentionLoss: [...TRAINING, ...OPTIONS.filter((option) => option !== 'layout')],
} as const;
export type CallName = keyof typeof ARGUMENTS;

/** Checks the arguments of `forward`, `backward` or `plan`. @param fits what the instance has found for a bias. */
export function readCall(
  name: 'forward' | 'backward' | 'plan',
  args: ForwardArgs | BackwardArgs | PlanArgs,
  fits = new DecayFits(),
): Call {
  const given = readRecord(name, 'its argument', args, ARGUMENTS[name]);
  const problem = readProblem(name, given, fits);
  const size = sizesOf(name, problem);
  const array = (option: keyof Inputs, values: number) =>
    given[option] === undefined ? null : readFloats(name, option, given[option], values);
  const required = (option: keyof Inputs, values: number) => readFloats(name, option, given[option], values);
  const inputs: Inputs = {
    q: required('q', size.q),
    k: required('k', size.k),
    v: name === 'plan' ? array('v', size.v) : required('v', size.v),
    dOutput: name === 'backward' ? required('dOutput', size.output) : array('dOutput', size.output),
    ...readState(name, given, size),
  };
  if (name === 'plan' && inputs.dOutput && !inputs.v) throw new TypeError('plan: dOutput needs v as well');
  if (readBoolean(name, 'checkFinite', given['checkFinite'], false)) {
    for (const option of ['q', 'k', 'v', 'dOutput'] as const) {
      if (inputs[option]) readFinite(name, option, inputs[option]);
    }
    if (problem.relative) readFinite(name, 'relative.weights', problem.relative.weights);
  }
  return { problem, inputs };
}

/** What forward returned: apart, as one object, or not at all. */
function readState(name: string, given: Given, size: ReturnType<typeof sizesOf>): Pick<Inputs, 'output' | 'lse'> {
  const [apart] = ['output', 'lse'].filter((option) => given[option] !== undefined);
  if (given['saved'] === undefined) {
    if (apart === undefined) return { output: null, lse: null };
    const missing = ['output', 'lse'].find((option) => given[option] === undefined);
    if (missing !== undefined) throw new TypeError(`${name}: ${apart} needs ${missing} as well; give both or neither`);
    return {
      output: readFloats(name, 'output', given['output'], size.output),
      lse: readFloats(name, 'lse', given['lse'], size.lse),
    };
  }
  const saved = readRecord(name, 'saved', given['saved'], ['output', 'lse', 'report']);
  if (apart !== undefined) throw new TypeError(`${name}: saved takes the place of output and lse; ${apart} is given too`);
  return {
    output: readFloats(name, 'saved.output', saved['output'], size.output),
    lse: readFloats(name, 'saved.lse', saved['lse'], size.lse),
  };
}

/** Checks the arguments of `rotate`. */
export function readRotate(args: RotateArgs): { geometry: Geometry; x: Float32Array; inverse: boolean } {
  const given = readRecord('rotate', 'its argument', args, ARGUMENTS.rotate);
  const geometry = readGeometry('rotate', given);
  const x = readFloats('rotate', 'x', given['x'], sizesOf('rotate', geometry).q);
  return { geometry, x, inverse: readBoolean('rotate', 'inverse', given['inverse'], false) };
}

/** Checks the arguments of `attentionLoss`, likewise. */
export function readLoss(args: AttentionLossArgs, fits: DecayFits): Training {
  const name = 'attentionLoss';
  const given = readRecord(name, 'its argument', args, ARGUMENTS[name]);
  const { modelDim: width, ...shape } = readRecord(name, 'shape', given['shape'], [...SHAPE, 'modelDim']);
  const problem = readProblem(name, { ...given, shape, layout: 'bnhd' }, fits);
  const { batch, heads, kvHeads, queryLength, keyLength, headDim, valueDim } = problem;
  const modelDim = width === undefined ? heads * headDim : readInteger(name, 'shape.modelDim', width, 1, INT32_MAX);
  for (const [array, values] of Object.entries(sizesOf(name, problem))) {
    if (values > MOST_VALUES)
      throw new RangeError(`${name}: ${array} would have ${values} values, WebAssembly memory holds ${MOST_VALUES}`);
  }
  const sizes: Record<(typeof TRAINING)[number], number[]> = {
    a1: [batch, queryLength, modelDim],
    a2: [batch, keyLength, modelDim],
    a3: [batch, keyLength, modelDim],
    x1: [modelDim, heads, headDim],
    x2: [modelDim, kvHeads, headDim],
    y: [modelDim, kvHeads, valueDim],
    e: [batch, queryLength, heads, valueDim],
  };
  const checkFinite = readBoolean(name, 'checkFinite', given['checkFinite'], false);
  if (checkFinite && problem.relative) readFinite(name, 'relative.weights', problem.relative.weights);
  const read = (option: (typeof TRAINING)[number]) => {
    const array = readFloats(name, option, given[option], valuesOf(name, option, ...sizes[option]));
    return [option, checkFinite ? readFinite(name, option, array) : array];
  };
  return { problem, modelDim, ...(Object.fromEntries(TRAINING.map(read)) as Record<(typeof TRAINING)[number], Float32Array>) };
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
  return {
    q: valuesOf(name, 'q', g.batch, g.heads, g.queryLength, g.headDim),
    k: valuesOf(name, 'k', g.batch, g.kvHeads, g.keyLength, g.headDim),
    v: valuesOf(name, 'v', g.batch, g.kvHeads, g.keyLength, g.valueDim),
    output: valuesOf(name, 'output', g.batch, g.heads, g.queryLength, g.valueDim),
    lse: valuesOf(name, 'lse', g.batch, g.heads, g.queryLength),
  };
}

function valuesOf(name: string, array: string, ...factors: number[]): number {
  const values = factors.reduce((a, b) => a * b);
  if (values > Number.MAX_SAFE_INTEGER)
    throw new RangeError(`${name}: shape needs ${values} values of ${array}, which is beyond any array`);
  return values;
}

function readProblem(name: string, given: Given, fits: DecayFits): Problem {
  const geometry = readGeometry(name, given);
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
  const degree = given['degree'] === undefined ? null : readInteger(name, 'degree', given['degree'], 0, MAX_DEGREE);
  if (degree !== null && method === 'exact')
    throw new RangeError(`${name}: method 'exact' has no degree, got degree ${degree}`);
  const problem: Problem = {
    ...geometry,
    method,
    degree,
    tolerance,
    guarantee: readChoice(name, 'guarantee', given['guarantee'], ['sampled', 'certified'] as const),
    misfit: null,
    seed: given['seed'] === undefined ? 0 : readInteger(name, 'seed', given['seed'], 0, 2 ** 32 - 1),
    onMiss: readChoice(name, 'onMiss', given['onMiss'], ['error', 'report'] as const),
  };
  Object.assign(problem, decaysOf(name, problem, name === 'forward' ? 'forward' : 'backward', fits));
  const [foreign] = method === 'polynomial' || method === 'toeplitz' ? foreignTo(method, problem) : [];
  if (foreign !== undefined)
    throw new RangeError(`${name}: method '${method}' has no ${foreign}; 'auto' and 'exact' have it`);
  return problem;
}

/** What is not in `given` has its default. */
export function readGeometry(name: string, given: Given): Geometry {
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
  if (!Number.isFinite(Math.fround(scale * Math.LOG2E))) throw wrong(name, 'scale', 'finite and at most 2.3e38 in size', scale, true);
  const rotary = rotaryBeside(name, given);
  const rotation = readRotary(name, rotary, { ...shape, queryOffset, hasKeys: name !== 'rotate' });
  return {
    ...shape,
    ...rotation,
    ...readRelative(name, given, shape, rotation),
    causal: readBoolean(name, 'causal', given['causal'], false),
    queryOffset,
    scale,
    layout: readChoice(name, 'layout', given['layout'], ['bhnd', 'bnhd'] as const),
    ...readScores(name, given, shape, queryOffset),
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
