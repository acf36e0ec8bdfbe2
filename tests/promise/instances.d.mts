import type { BackwardArgs } from '../../dist/index.js';

export type Instance = Pick<BackwardArgs, 'q' | 'k' | 'v' | 'dOutput' | 'shape' | 'causal' | 'queryOffset' | 'segments' | 'rotary' | 'alibi' | 'bias' | 'window' | 'relativePositions' | 'relative'>;

export interface Random {
  uniform(): number;
  normal(): number;
  whole(below: number): number;
}

export function random(seed: number): Random;
export const KINDS: Record<string, (...args: never[]) => void>;
export function instance(
  args: { kind: string; bound: number; seed: number } & Omit<Instance, 'q' | 'k' | 'v' | 'dOutput'>,
): Instance;
