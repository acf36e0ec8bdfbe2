import type { BackwardResult, ForwardResult, Options, RopeAttention } from '../../dist/index.js';
import type { Instance } from './instances.mjs';

export type Promise = 'certified' | 'forward' | 'backward' | 'training';

/** An error over its tolerance, null where nothing was promised; the certified bound over the error. */
export interface Kept {
  tolerance: number;
  ratio: number | null;
  slack: number | null;
  degree: number | null;
  exact: boolean;
}

export interface Expected {
  output: Float32Array | Float64Array;
  dq: Float32Array | Float64Array;
  dk: Float32Array | Float64Array;
  dv: Float32Array | Float64Array;
  dBias?: Float32Array | Float64Array;
}

export const TOLERANCES: readonly number[];
export const SETTINGS: Record<string, (length: number, headDim: number) => Omit<Instance, 'q' | 'k' | 'v' | 'dOutput'>>;
export function methodOf(args: Instance): 'polynomial' | 'toeplitz';
export const LONG_SETTINGS: typeof SETTINGS;

/** A set of instances. */
export interface Instances {
  settings: typeof SETTINGS;
  lengths: readonly number[];
  headDims: readonly number[];
  tolerances: readonly number[];
}

export const SHORT: Instances;
export const LONG: Instances;
export function numbered(n: number, instances?: Instances): { name: string; kind: string; setting: string; args: Instance };
export function outputError(args: Omit<Instance, 'dOutput'>, output: ForwardResult['output'], expected: Expected['output']): number;
export function gradientError(got: BackwardResult, expected: Omit<Expected, 'output'>): number;
export function promised(
  attention: RopeAttention,
  args: Instance,
  how: Promise,
  tolerances: readonly number[],
  expected: Expected,
  options?: Pick<Options, 'method'>,
): Kept[];
export function exactOf(attention: RopeAttention, args: Instance): Expected;
export function expectedOf(args: Instance): Expected;
