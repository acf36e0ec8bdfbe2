// SPDX-License-Identifier: MIT
//
// Sequences that arrive piece by piece: the sums of the polynomial engine as an object of their own (rope_attention.h, "A state
// of its own"). Constant in size, so that decoding token by token takes constant memory and time; additive, so that shards of
// a sequence can be summed up apart and merged.
//
// Nothing is known of the keys to come: scores are not centred, and their bound is the caller's promise, kept by looking at
// every key and query. Within it the error is proved, not sampled.

import { largestScore, outOfRange, roundingWithin } from './certificate.js';
import { readChoice, readFinite, readFloats, readInteger, readNumber, readRecord, tagOf, wrong } from './check.js';
import { CHUNK } from './cost.js';
import type { Kernel, Session } from './kernel.js';
import { MAX_DEGREE, minimax, relativeError } from './polynomial.js';
import { certifiedBound, degreeFor, rank } from './theory.js';
import type { AppendArgs, AttendArgs, AttentionState, ForwardResult, StateOptions } from './types.js';
import { TOLERANCE_FLOOR, readGeometry, type Geometry } from './validate.js';

const CREATE = 'createState';
const OPTIONS = ['shape', 'rotary', 'scale', 'layout', 'scoreBound', 'tolerance', 'degree', 'onMiss', 'from'];
const SHAPE = ['batch', 'heads', 'kvHeads', 'headDim', 'valueDim'];

/** Positions are 32-bit integers, the one after the last included. */
const LAST_POSITION = 2 ** 31 - 2;

/** Sums of 2^20 terms of this size stay within float32. */
const LARGEST_TERM = 1e30;

/** Rounding of norms, on the caller's side and ours: a score this much above the bound, relatively, is not above it. */
const SLACK = 1e-6;

export class StreamingState implements AttentionState {
  readonly degree: number;
  readonly rank: number;
  readonly #kernel: Kernel;
  /** Of one token at position 0. */
  readonly #geometry: Geometry;
  readonly #scoreBound: number;
  readonly #onMiss: 'error' | 'report';
  /** [kvHeads][degree + 1], the same for all heads. */
  readonly #coefficients: Float32Array;
  /** Relative error of the polynomial up to the bound. */
  readonly #polynomialError: number;
  /** What the kernels keep: waiting keys, then the sums. */
  readonly #data: Float32Array;
  /** Floats of #data before the sums. */
  readonly #waiting: number;
  #length = 0;
  /** The position after the last token. */
  #next = 0;
  /** Over all keys so far: max |k_j| and max |entry|. */
  #keyNorm = 0;
  #keyEntry = 0;
  #valueEntry = 0;

  constructor(kernel: Kernel, options: StateOptions) {
    const given = readRecord(CREATE, 'its argument', options, OPTIONS);
    this.#kernel = kernel;
    this.#geometry = readState(options);
    this.#scoreBound = readNumber(CREATE, 'scoreBound', given['scoreBound']);
    if (!(this.#scoreBound > 0 && this.#scoreBound < Infinity)) {
      throw wrong(CREATE, 'scoreBound', 'above 0 and finite', this.#scoreBound, true);
    }
    this.#onMiss = readChoice(CREATE, 'onMiss', given['onMiss'], ['error', 'report'] as const);
    this.degree = chooseDegree(given['degree'], given['tolerance'], this.#scoreBound);
    this.rank = rank(this.#geometry.headDim, this.degree);

    const { batch, kvHeads } = this.#geometry;
    const { coefficients } = minimax(this.degree, this.#scoreBound);
    this.#polynomialError = relativeError(coefficients, -this.#scoreBound, this.#scoreBound);
    if (!(this.#polynomialError < 1) && this.#onMiss === 'error') {
      throw new RangeError(`${CREATE}: degree ${this.degree} keeps no error on scores up to ${this.#scoreBound}`);
    }
    this.#coefficients = new Float32Array(batch * kvHeads * coefficients.length);
    for (let head = 0; head < batch * kvHeads; head++) this.#coefficients.set(coefficients, head * coefficients.length);

    const [all, waiting] = this.#during(CREATE, 1, 0, (session) => {
      session.checkState();
      return [session.stateBytes(true), session.stateBytes(false)];
    });
    this.#data = new Float32Array(all / 4);
    this.#waiting = waiting / 4;
    if (given['from'] !== undefined) this.#restore(given['from']);
  }

  get length(): number {
    return this.#length;
  }

  get bytes(): number {
    return this.#data.byteLength;
  }

  append(args: AppendArgs): void {
    const name = 'append';
    const given = readRecord(name, 'its argument', args, ['k', 'v', 'position']);
    const { batch, kvHeads, headDim, valueDim, rotaryGain } = this.#geometry;
    const tokens = readTokens(name, 'k', given['k'], batch * kvHeads * headDim);
    const k = given['k'] as Float32Array;
    const v = readFloats(name, 'v', given['v'], batch * kvHeads * tokens * valueDim, `k has ${tokens} tokens and v`);
    const position = this.#readPosition(name, given['position'], this.#next, tokens);
    const { norm, entry } = measure(name, 'k', k, headDim);
    const values = measure(name, 'v', v, valueDim);
    const largest = Math.max(1, rotaryGain * norm) ** this.degree * Math.max(1, values.entry);
    if (!(largest <= LARGEST_TERM)) {
      const what = `|k|^${this.degree} |v| reaches ${largest.toExponential(1)}`;
      throw new RangeError(`${name}: ${what}, more than float32 sums take (${LARGEST_TERM}) and keep for ever`);
    }

    const fills = (this.#length % CHUNK) + tokens >= CHUNK;
    const touched = fills ? this.#data : this.#data.subarray(0, this.#waiting);
    this.#during(name, tokens, position, (session) => session.appendToState(touched, k, v));
    this.#length += tokens;
    this.#next = position + tokens;
    this.#keyNorm = Math.max(this.#keyNorm, norm);
    this.#keyEntry = Math.max(this.#keyEntry, entry);
    this.#valueEntry = Math.max(this.#valueEntry, values.entry);
  }

  attend(args: AttendArgs): ForwardResult {
    const name = 'attend';
    const start = performance.now();
    const given = readRecord(name, 'its argument', args, ['q', 'position']);
    const { batch, heads, headDim, valueDim } = this.#geometry;
    const tokens = readTokens(name, 'q', given['q'], batch * heads * headDim);
    const q = given['q'] as Float32Array;
    const position = this.#readPosition(name, given['position'], Math.max(this.#next - tokens, 0), tokens);
    const { norm, entry } = measure(name, 'q', q, headDim);
    const scoreBound = largestScore(this.#geometry, { q_norm: norm, k_norm: this.#keyNorm });
    const within = scoreBound <= this.#scoreBound * (1 + SLACK);
    if (!within && this.#onMiss === 'error') {
      throw new RangeError(
        `${name}: scores may reach ${scoreBound.toPrecision(3)} (|scale| |q| |k|), the scoreBound of the state is ${this.#scoreBound}`,
      );
    }

    let bytes = 0;
    const { output, lse, positive } = this.#during(name, tokens, position, (session) => {
      const result = session.attendToState(this.#length < CHUNK ? this.#data.subarray(0, this.#waiting) : this.#data, q);
      bytes = session.bytes;
      return result;
    });
    const sound = positive && output.every(Number.isFinite);
    if (!sound && this.#onMiss === 'error') {
      throw new RangeError(`${name}: the sums of some rows are not positive or beyond float32; smaller k or v would help`);
    }
    const lost = this.#outOfRange(norm);
    if (lost && this.#onMiss === 'error') {
      const [q, k, v] = [norm, this.#keyNorm, this.#valueEntry].map((one) => one.toExponential(0));
      throw new RangeError(`${name}: products of |q| ${q}, |k| ${k} and v up to ${v} fall below float32; scale these to be of one size`);
    }
    const errorBound = within && sound ? this.#errorBound(norm) : null;
    const miss = `scores may reach ${scoreBound.toPrecision(3)}, beyond the bound ${this.#scoreBound} of the state`;
    const reasons = [
      `polynomial of degree ${this.degree} (rank ${this.rank}) on a state of ${this.#length} keys`,
      ...(within ? [] : [miss]),
      ...(sound ? [] : ['the sums of some rows are not positive or beyond float32']),
      ...(lost ? ['products of entries leave float32'] : []),
    ];
    return {
      output,
      lse,
      report: {
        method: 'polynomial',
        degree: this.degree,
        rank: this.rank,
        outliers: { queries: 0, keys: 0 },
        entryBound: Math.max(entry, this.#keyEntry),
        scoreBound,
        errorBound,
        errorEstimate: null,
        gradientErrorEstimate: null,
        relativeErrorEstimate: null,
        flops: 2 * batch * heads * tokens * (this.rank * (valueDim + 1) + (this.#length % CHUNK) * (headDim + valueDim)),
        bytes,
        milliseconds: performance.now() - start,
        reason: reasons.join('; '),
      },
    };
  }

  merge(other: AttentionState): void {
    const name = 'merge';
    if (!(other instanceof StreamingState)) throw wrong(name, 'its argument', 'a state of createState', other, false);
    const difference = firstDifference(this.#identity(), other.#identity());
    if (difference !== null) throw new RangeError(`${name}: the other state has another ${difference}`);
    this.#during(name, 1, 0, (session) => session.mergeStates(this.#data, other.#data));
    this.#length += other.#length;
    this.#next = Math.max(this.#next, other.#next);
    this.#keyNorm = Math.max(this.#keyNorm, other.#keyNorm);
    this.#keyEntry = Math.max(this.#keyEntry, other.#keyEntry);
    this.#valueEntry = Math.max(this.#valueEntry, other.#valueEntry);
  }

  serialize(): Uint8Array {
    const identity = Object.values(this.#identity());
    const own = [this.#length, this.#next, this.#keyNorm, this.#keyEntry, this.#valueEntry];
    const head = Float64Array.of(MAGIC, identity.length, ...identity, ...own);
    const bytes = new Uint8Array(head.byteLength + this.#data.byteLength);
    bytes.set(new Uint8Array(head.buffer));
    bytes.set(new Uint8Array(this.#data.buffer), head.byteLength);
    return bytes;
  }

  #restore(from: unknown): void {
    if (tagOf(from) !== 'Uint8Array') throw wrong(CREATE, 'from', 'a Uint8Array', from, false);
    const bytes = new Uint8Array(from as Uint8Array); // a copy from 0 on; a Buffer's slice is none
    const identity = this.#identity();
    const names = Object.keys(identity);
    const values = 7 + names.length;
    const head = new Float64Array(bytes.buffer, 0, Math.min(values, Math.floor(bytes.length / 8)));
    if (head[0] !== MAGIC || head[1] !== names.length) {
      throw new RangeError(`${CREATE}: from is not what serialize gave (${bytes.length} bytes)`);
    }
    const own = Object.fromEntries(names.map((name, n) => [name, head[2 + n]]));
    const difference = firstDifference(identity, own);
    if (difference !== null) throw new RangeError(`${CREATE}: from has another ${difference}`);
    const needs = 8 * values + this.bytes;
    if (bytes.length !== needs) throw new RangeError(`${CREATE}: from has ${bytes.length} bytes, this state needs ${needs}`);
    const [length, next, keyNorm, keyEntry, valueEntry] = head.subarray(values - 5);
    const data = new Float32Array(bytes.buffer, 8 * values, this.#data.length);
    const [joined, waiting] = new Uint32Array(data.buffer, data.byteOffset, 2);
    const counts = Number.isSafeInteger(length) && waiting === length % CHUNK && joined === Number(length >= CHUNK);
    if (!counts || !Number.isSafeInteger(next) || ![keyNorm, keyEntry, valueEntry].every((one) => one >= 0 && one < Infinity)) {
      throw new RangeError(`${CREATE}: from is damaged: it says ${length} keys, ${waiting} of them waiting, norm ${keyNorm}`);
    }
    [this.#length, this.#next, this.#keyNorm, this.#keyEntry, this.#valueEntry] = [length, next, keyNorm, keyEntry, valueEntry];
    this.#data.set(data);
  }

  /** What states must have in common to be merged or restored. */
  #identity(): Record<string, number> {
    const { batch, heads, kvHeads, headDim, valueDim, scale, layout } = this.#geometry;
    const shape = { batch, heads, kvHeads, headDim, valueDim };
    const rotary = rotationHash(this.#geometry);
    return { ...shape, scale, layout: Number(layout === 'bnhd'), degree: this.degree, scoreBound: this.#scoreBound, rotary };
  }

  #norms(queryNorm: number) {
    return { q_norm: queryNorm, k_norm: this.#keyNorm, q_mean_norm: 0, v_entry: this.#valueEntry, v_half_range: this.#valueEntry };
  }

  /** Whether products of queries, keys and values fall below float32 by more than the polynomial is off, or beyond it. */
  #outOfRange(queryNorm: number): boolean {
    const t = this.#polynomialError;
    const lost = outOfRange(this.#geometry, this.#coefficients.subarray(0, this.degree + 1), this.#norms(queryNorm));
    return t < 1 && !(lost <= (1 - t) * Math.exp(-this.#scoreBound) * Math.max(certifiedBound(t), TOLERANCE_FLOOR));
  }

  /** Of max |v|: |out^ - out| <= certifiedBound(t) max |v - c| for every c, 0 among them, and rounding. */
  #errorBound(queryNorm: number): number | null {
    const t = this.#polynomialError;
    if (!(t < 1)) return null;
    const coefficients = this.#coefficients.subarray(0, this.degree + 1);
    const geometry = { ...this.#geometry, keyLength: Math.max(this.#length, 1), causal: true }; // waiting keys: one more chunk
    const bound = certifiedBound(t) + roundingWithin(geometry, coefficients, this.#scoreBound, t, this.#norms(queryNorm), 1);
    return bound < 2 ? bound : null; // no mean of values is further from another
  }

  #readPosition(name: string, value: unknown, absent: number, tokens: number): number {
    const position = value === undefined ? absent : readInteger(name, 'position', value, -(2 ** 31), LAST_POSITION);
    const { tables } = this.#geometry;
    const last = position + tokens - 1;
    if (last > LAST_POSITION) throw new RangeError(`${name}: the last position is ${last}, ${LAST_POSITION} is the largest`);
    if (tables && (position < 0 || last >= tables.rows)) {
      throw new RangeError(`${name}: positions ${position} to ${last} are not all rows of rotary.tables, which has ${tables.rows}`);
    }
    return position;
  }

  /** A session for `tokens` tokens from `position` on. */
  #during<T>(name: string, tokens: number, position: number, act: (session: Session) => T): T {
    const lengths = { queryLength: tokens, keyLength: tokens, queryOffset: position };
    const session = this.#kernel.open(name, { ...this.#geometry, ...lengths });
    try {
      session.setEngine(this.degree, this.#coefficients);
      return act(session);
    } finally {
      session.close();
    }
  }
}

/** Marks the beginning of a serialized state, and its version; as a float64 it also tells the order of bytes. */
const MAGIC = 0x5241_5354_0001;

function readState(options: StateOptions): Geometry {
  const { shape, rotary, scale, layout } = options;
  readRecord(CREATE, 'shape', shape, SHAPE);
  if (typeof rotary === 'object' && rotary !== null) {
    const { queryPositions, keyPositions, scaling } = rotary;
    const positions = queryPositions === undefined ? keyPositions && 'keyPositions' : 'queryPositions';
    if (positions) throw new TypeError(`${CREATE}: rotary.${positions} is not for states: append and attend take a position`);
    if ((scaling?.type === 'dynamic' || scaling?.type === 'longrope') && scaling.length === undefined) {
      throw new TypeError(`${CREATE}: rotary.scaling of type '${scaling.type}' needs length, as the sequence has none yet`);
    }
  }
  const geometry = readGeometry(CREATE, { shape: { ...shape, queryLength: 1 }, rotary, scale, layout });
  const { tables } = geometry;
  return tables ? { ...geometry, tables: { ...tables, cos: tables.cos.slice(), sin: tables.sin.slice() } } : geometry;
}

function chooseDegree(degree: unknown, tolerance: unknown, scoreBound: number): number {
  if (degree !== undefined && tolerance !== undefined) {
    throw new TypeError(`${CREATE}: degree takes the place of tolerance; give one of them`);
  }
  if (degree !== undefined) return readInteger(CREATE, 'degree', degree, 0, MAX_DEGREE);
  const asked = tolerance === undefined ? 1e-3 : readNumber(CREATE, 'tolerance', tolerance);
  if (!(asked >= TOLERANCE_FLOOR && asked < Infinity)) {
    throw wrong(CREATE, 'tolerance', `finite and at least ${TOLERANCE_FLOOR}`, asked, true);
  }
  const least = degreeFor({ tolerance: asked, scoreBound });
  if (least !== null) return least;
  throw new RangeError(`${CREATE}: no degree up to ${MAX_DEGREE} keeps the tolerance ${asked} on scores up to ${scoreBound}`);
}

/** Tokens in an array with so many values for each. */
function readTokens(name: string, option: string, value: unknown, each: number): number {
  if (tagOf(value) !== 'Float32Array') throw wrong(name, option, 'a Float32Array', value, false);
  const { length } = value as Float32Array;
  if (length === 0 || length % each !== 0) {
    throw new RangeError(`${name}: ${option} has ${length} values, shape needs a multiple of ${each}, at least one`);
  }
  return length / each;
}

/** The largest norm of rows of `width` values, and the largest |entry|. @throws RangeError for one that is not finite. */
function measure(name: string, option: string, x: Float32Array, width: number): { norm: number; entry: number } {
  let [largest, entry] = [0, 0];
  for (let row = 0; row < x.length; row += width) {
    let squares = 0;
    for (let n = row; n < row + width; n++) {
      squares += x[n] * x[n];
      if (Math.abs(x[n]) > entry) entry = Math.abs(x[n]);
    }
    if (!Number.isFinite(squares)) readFinite(name, option, x);
    if (squares > largest) largest = squares;
  }
  return { norm: Math.sqrt(largest), entry };
}

/** A number that other rotations rarely share (FNV-1a over what decides one). */
function rotationHash(g: Geometry): number {
  let hash = 0x811c9dc5;
  const take = (values: Float64Array | Float32Array) => {
    for (const byte of new Uint8Array(values.buffer, values.byteOffset, values.byteLength)) {
      hash = Math.imul(hash ^ byte, 0x01000193) >>> 0;
    }
  };
  take(Float64Array.of(g.rotaryDim, Number(g.interleaved), g.rotaryFactor));
  take(g.frequencies);
  for (const table of g.tables ? [g.tables.cos, g.tables.sin] : []) take(table);
  return hash;
}

function firstDifference(a: Record<string, number>, b: Record<string, number>): string | null {
  return Object.keys(a).find((name) => a[name] !== b[name]) ?? null;
}
