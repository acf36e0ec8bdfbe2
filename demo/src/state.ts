// SPDX-License-Identifier: MIT
//
// What the reader has chosen, and its form in the address: #panel=length&D=16&degrees=4&B=0.5&N=4096&causal=0&certified=0&seed=1&g=2.
// Pure: no DOM here.

export const PANELS = ['length', 'bound', 'time'] as const;
export const HEAD_DIMS = [4, 8, 16, 32, 64, 128] as const;
export const DEGREES = [1, 2, 3, 4, 5, 6] as const;
/** Of the one polynomial whose factors are drawn. */
export const IDEA_DEGREES = [1, 2, 3, 4] as const;
/** Thirds of an octave, in round numbers: the slider's steps and the abscissae of the second figure. */
export const BOUNDS = [0.1, 0.125, 0.16, 0.2, 0.25, 0.315, 0.4, 0.5, 0.63, 0.8, 1, 1.25, 1.6, 2, 2.5, 3.15, 4] as const;
export const LENGTHS = [256, 512, 1024, 2048, 4096, 8192, 16384] as const;
export const MAX_SEED = 2 ** 32 - 1;

export type Panel = (typeof PANELS)[number];

/** What the numbers depend on. */
export interface Settings {
  /** D */
  readonly headDim: number;
  /** One curve for each degree from 1 to this one. */
  readonly maxDegree: number;
  /** B: q, k, v and the output's gradient are uniform in [-B, B]. */
  readonly entryBound: number;
  /** N: the longest sequence of the first figure, the only one of the second; the third goes to 4 N. */
  readonly length: number;
  readonly causal: boolean;
  /** The polynomial with the best proof, instead of the one that fits the scores of these inputs. */
  readonly certified: boolean;
  readonly seed: number;
}

export interface State extends Settings {
  readonly panel: Panel;
  /** g, of the polynomial whose factors are drawn. */
  readonly degree: number;
}

export const DEFAULTS: State = {
  panel: 'length',
  degree: 2,
  headDim: 16,
  maxDegree: 4,
  entryBound: 0.5,
  length: 4096,
  causal: false,
  certified: false,
  seed: 1,
};

/** `text` as one of `values`, or undefined. */
function choice<T extends number>(text: string | null, values: readonly T[]): T | undefined {
  if (text === null || text.trim() === '') return undefined;
  const value = Number(text);
  return values.find((candidate) => candidate === value);
}

/** An unsigned 32-bit integer, or undefined. */
export function parseSeed(text: string | null): number | undefined {
  return text !== null && /^\d{1,10}$/.test(text.trim()) && Number(text) <= MAX_SEED ? Number(text) : undefined;
}

/** The state in an address. A value that is missing or makes no sense is the default one; this never throws. */
export function parseState(hash: string): State {
  const given = new URLSearchParams(hash.replace(/^#/, ''));
  const flag = (name: 'causal' | 'certified') => {
    const text = given.get(name);
    return text === '1' ? true : text === '0' ? false : DEFAULTS[name];
  };
  return {
    panel: PANELS.find((panel) => panel === given.get('panel')) ?? DEFAULTS.panel,
    headDim: choice(given.get('D'), HEAD_DIMS) ?? DEFAULTS.headDim,
    maxDegree: choice(given.get('degrees'), DEGREES) ?? DEFAULTS.maxDegree,
    entryBound: choice(given.get('B'), BOUNDS) ?? DEFAULTS.entryBound,
    length: choice(given.get('N'), LENGTHS) ?? DEFAULTS.length,
    causal: flag('causal'),
    certified: flag('certified'),
    seed: parseSeed(given.get('seed')) ?? DEFAULTS.seed,
    degree: choice(given.get('g'), IDEA_DEGREES) ?? DEFAULTS.degree,
  };
}

/** The address of a state: all of it, so that a link keeps its meaning when a default changes. */
export function formatState(state: State): string {
  return (
    `#panel=${state.panel}&D=${state.headDim}&degrees=${state.maxDegree}&B=${state.entryBound}` +
    `&N=${state.length}&causal=${state.causal ? 1 : 0}&certified=${state.certified ? 1 : 0}&seed=${state.seed}&g=${state.degree}`
  );
}

/** One curve for each. */
export const degreesOf = (settings: Settings): number[] => Array.from({ length: settings.maxDegree }, (_, i) => i + 1);

/** Whether the numbers of one serve for the other. The panel and the degree that is drawn do not matter. */
export function sameSettings(a: Settings, b: Settings): boolean {
  return (
    a.headDim === b.headDim &&
    a.maxDegree === b.maxDegree &&
    a.entryBound === b.entryBound &&
    a.length === b.length &&
    a.causal === b.causal &&
    a.certified === b.certified &&
    a.seed === b.seed
  );
}
