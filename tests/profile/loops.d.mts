export type Kind = 'multiply-add' | 'load' | 'splat load' | 'store' | 'other vector' | 'scalar';
export const KINDS: readonly Kind[];
export function loopsOf(bytes: Uint8Array): Map<string, Partial<Record<Kind, number>>[]>;
