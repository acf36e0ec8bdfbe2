// SPDX-License-Identifier: MIT
//
// Rotary frequencies: base^(-2p/dim) for pair p, and what models change about them to read sequences longer than those of
// their training. Names, formulas and defaults are those of the models' configurations (`rope_scaling`, transformers'
// modeling_rope_utils), so that a configuration can be copied.
//
//   linear     Chen et al. Extending Context Window of Large Language Models via Positional Interpolation. 2023 (2306.15595)
//   dynamic    bloc97. NTK-Aware Scaled RoPE; emozilla. Dynamically Scaled RoPE. 2023 (notes on r/LocalLLaMA)
//   yarn       Peng et al. YaRN: Efficient Context Window Extension of Large Language Models. 2023 (2309.00071)
//   longrope   Ding et al. LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens. 2024 (2402.13753)
//   llama3     Grattafiori et al. The Llama 3 Herd of Models. 2024 (2407.21783), as published with Llama 3.1
//
// Some also multiply rotated queries and keys by an attention factor, and so their scores by its square.

import { readBoolean, readInteger, readNumber, readNumbers, readRecord, wrong, type Given } from './check.js';
import type { RotaryScaling } from './types.js';

export interface RotaryFrequencies {
  /** [dim/2], radians per position. */
  frequencies: Float64Array;
  /** On rotated queries and keys; 1 where the scaling has none. */
  attentionFactor: number;
}

/** Arguments of `rotaryFrequencies`. */
export interface RotaryFrequenciesArgs {
  /** Dimensions that rotate, an even number. */
  dim: number;
  /** Default 10000. Positive. */
  base?: number;
  /** Default none. */
  scaling?: RotaryScaling;
  /** Of the sequence, for those scalings that depend on it, unless they give it themselves. Default: originalLength. */
  length?: number;
}

/**
 * The frequencies that `rotary: { dim, base, scaling }` stands for, and its attention factor.
 *
 * @throws TypeError and RangeError for options that do not exist or do not fit.
 */
export function rotaryFrequencies(args: RotaryFrequenciesArgs): RotaryFrequencies {
  const name = 'rotaryFrequencies';
  const given = readRecord(name, 'its argument', args, ['dim', 'base', 'scaling', 'length']);
  const dim = readInteger(name, 'dim', given['dim'], 0, 2 ** 31);
  if (dim % 2 !== 0) throw wrong(name, 'dim', 'even', dim, true);
  const length = given['length'] === undefined ? 0 : readPositive(name, 'length', given['length']);
  return readFrequencies(name, '', given, dim, length);
}

/**
 * The same for `base` and `scaling` of an option.
 *
 * @param prefix of the names of the options in messages.
 * @param length of the sequence.
 */
export function readFrequencies(
  name: string,
  prefix: string,
  { base: givenBase, scaling }: { readonly base?: unknown; readonly scaling?: unknown },
  dim: number,
  length: number,
): RotaryFrequencies {
  const base = givenBase === undefined ? 10000 : readNumber(name, `${prefix}base`, givenBase);
  if (!(base > 0 && base < Infinity)) throw wrong(name, `${prefix}base`, 'positive and finite', base, true);
  const found =
    scaling === undefined
      ? { frequencies: powers(base, dim), attentionFactor: 1 }
      : scaled(readScaling(name, `${prefix}scaling`, scaling, base, dim), base, dim, length);
  if (!found.frequencies.every(Number.isFinite))
    throw wrong(name, `${prefix}base`, 'large enough that base^(-2p/dim) is finite', base, true);
  return found;
}

/** base^(-2p/dim) for each pair p. */
function powers(base: number, dim: number): Float64Array {
  return Float64Array.from({ length: dim / 2 }, (_, p) => base ** ((-2 * p) / dim));
}

function scaled(scaling: RotaryScaling, base: number, dim: number, callLength: number): RotaryFrequencies {
  const plain = powers(base, dim);
  switch (scaling.type) {
    case 'linear':
      return { frequencies: plain.map((theta) => theta / scaling.factor), attentionFactor: 1 };
    case 'dynamic': {
      const { factor, originalLength, length = callLength } = scaling;
      // The slowest pair turns by 1 / (1 + factor (length / originalLength - 1)) of its angle, the fastest as before.
      const stretch = 1 + factor * (Math.max(length, originalLength) / originalLength - 1);
      return { frequencies: powers(base * stretch ** (dim / (dim - 2)), dim), attentionFactor: 1 };
    }
    case 'yarn':
      return yarn(scaling, base, dim);
    case 'longrope': {
      const { shortFactor, longFactor, originalLength, factor = 1, length = callLength } = scaling;
      const divisors = length > originalLength ? longFactor : shortFactor;
      const { attentionFactor = Math.sqrt(1 + Math.log(factor) / Math.log(originalLength)) } = scaling;
      return { frequencies: plain.map((theta, p) => theta / divisors[p]), attentionFactor };
    }
    case 'llama3': {
      const { factor, lowFrequencyFactor: low, highFrequencyFactor: high, originalLength } = scaling;
      const frequencies = plain.map((theta) => {
        // Turns over the original length: from `high` on a pair stays, up to `low` it is divided, in between a mixture.
        const turns = (originalLength * theta) / (2 * Math.PI);
        const kept = Math.min(Math.max((turns - low) / (high - low), 0), 1);
        return kept * theta + ((1 - kept) * theta) / factor;
      });
      return { frequencies, attentionFactor: 1 };
    }
  }
}

function yarn(scaling: Extract<RotaryScaling, { type: 'yarn' }>, base: number, dim: number): RotaryFrequencies {
  const { factor, originalLength, betaFast = 32, betaSlow = 1, truncate = true } = scaling;
  // The pair, not an integer, that turns so often over the original length; the ramp goes from the fast to the slow one.
  const pairOf = (turns: number) => (dim * Math.log(originalLength / (2 * Math.PI * turns))) / (2 * Math.log(base));
  const [fast, slow] = [pairOf(betaFast), pairOf(betaSlow)];
  const low = Math.max(truncate ? Math.floor(fast) : fast, 0);
  const high = Math.min(truncate ? Math.ceil(slow) : slow, dim - 1);
  const width = high === low ? 1e-3 : high - low;
  const frequencies = powers(base, dim).map((theta, p) => {
    const divided = Math.min(Math.max((p - low) / width, 0), 1);
    return (1 - divided) * theta + (divided * theta) / factor;
  });
  // Temperature of the softmax: sqrt(1/t) = 0.1 ln(factor) + 1 (Peng et al., equation 22).
  const magnitude = (m: number) => 0.1 * m * Math.log(factor) + 1;
  const { mscale, mscaleAllDim } = scaling;
  const ratio = mscale && mscaleAllDim ? magnitude(mscale) / magnitude(mscaleAllDim) : magnitude(1);
  return { frequencies, attentionFactor: scaling.attentionFactor ?? ratio };
}

// --- Checks -----------------------------------------------------------------------------------------------------------

/** Options of each type besides `type`; those before the bar are needed. */
const OPTIONS = {
  linear: [['factor'], []],
  dynamic: [['factor', 'originalLength'], ['length']],
  yarn: [
    ['factor', 'originalLength'],
    ['attentionFactor', 'betaFast', 'betaSlow', 'mscale', 'mscaleAllDim', 'truncate'],
  ],
  longrope: [
    ['shortFactor', 'longFactor', 'originalLength'],
    ['factor', 'attentionFactor', 'length'],
  ],
  llama3: [['factor', 'lowFrequencyFactor', 'highFrequencyFactor', 'originalLength'], []],
} as const satisfies Record<RotaryScaling['type'], readonly (readonly string[])[]>;

function readScaling(name: string, option: string, value: unknown, base: number, dim: number): RotaryScaling {
  const known = Object.keys(OPTIONS);
  const all = Object.values(OPTIONS).flat(2);
  const type = readRecord(name, option, value, ['type', ...new Set(all)])['type'];
  if (typeof type !== 'string' || !known.includes(type)) {
    throw wrong(name, `${option}.type`, `one of '${known.join("', '")}'`, type, typeof type === 'string');
  }
  const [needed, optional] = OPTIONS[type as keyof typeof OPTIONS];
  const given = readRecord(name, option, value, ['type', ...needed, ...optional]);
  const read = (one: string) => readOption(name, `${option}.${one}`, one, given[one], dim);
  const settled = Object.fromEntries(
    [...needed, ...optional.filter((one) => given[one] !== undefined)].map((one) => [one, read(one)]),
  );
  checkTogether(name, option, type as RotaryScaling['type'], settled, base, dim);
  return { type, ...settled } as unknown as RotaryScaling;
}

function readOption(name: string, path: string, option: string, value: unknown, dim: number): unknown {
  switch (option) {
    case 'factor': {
      const factor = readPositive(name, path, value);
      if (factor < 1) throw wrong(name, path, 'at least 1', factor, true);
      return factor;
    }
    case 'originalLength':
      return readInteger(name, path, value, 2, Number.MAX_SAFE_INTEGER);
    case 'truncate':
      return readBoolean(name, path, value, true);
    case 'shortFactor':
    case 'longFactor': {
      const needs = `dim/2 needs ${dim / 2}`;
      const divisors = readNumbers(name, path, value, (values) => values === dim / 2, needs);
      divisors.forEach((divisor, p) => readPositive(name, `${path}[${p}]`, divisor));
      return divisors;
    }
    default:
      return readPositive(name, path, value);
  }
}

/** What single options cannot tell. */
function checkTogether(
  name: string,
  option: string,
  type: RotaryScaling['type'],
  settled: Given,
  base: number,
  dim: number,
): void {
  const has = (one: string) => settled[one] !== undefined;
  const number = (one: string, absent: number) => (settled[one] as number | undefined) ?? absent;
  if (type === 'dynamic' && dim === 2) {
    throw new RangeError(`${name}: ${option} of type 'dynamic' needs a dim above 2, got 2`);
  }
  if (type === 'longrope' && !has('factor') && !has('attentionFactor')) {
    throw new TypeError(`${name}: ${option} of type 'longrope' needs factor or attentionFactor`);
  }
  if (type === 'llama3' && number('lowFrequencyFactor', 0) >= number('highFrequencyFactor', 0)) {
    const rule = `above lowFrequencyFactor ${number('lowFrequencyFactor', 0)}`;
    throw wrong(name, `${option}.highFrequencyFactor`, rule, settled['highFrequencyFactor'], true);
  }
  if (type !== 'yarn') return;
  if (base <= 1) throw new RangeError(`${name}: ${option} of type 'yarn' needs a base above 1, got ${base}`);
  if (number('betaFast', 32) < number('betaSlow', 1)) {
    throw wrong(name, `${option}.betaFast`, `at least betaSlow ${number('betaSlow', 1)}`, number('betaFast', 32), true);
  }
  if (has('mscale') !== has('mscaleAllDim')) {
    throw new TypeError(`${name}: ${option} needs both mscale and mscaleAllDim, or neither`);
  }
  if (has('mscale') && has('attentionFactor')) {
    throw new TypeError(`${name}: ${option} has both attentionFactor and mscale; give one of them`);
  }
}

function readPositive(name: string, option: string, value: unknown): number {
  const number = readNumber(name, option, value);
  if (!(number > 0 && number < Infinity)) throw wrong(name, option, 'positive and finite', number, true);
  return number;
}
