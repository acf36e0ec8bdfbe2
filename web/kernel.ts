// SPDX-License-Identifier: MIT
//
// The C functions of rope_attention.h as methods on JavaScript arrays. A `Session` is one call: its arrays live in the
// arena from `load` to `close`, each copied in once; results are copied out. Addresses stay in here.

import {
  changesCost,
  columnsCost,
  DISTANCE_OF_GRADIENTS,
  centringCost,
  extremesCost,
  outlierLimit,
  prepareCost,
  rankCost,
  rowsCost,
  SAMPLE_KEYS,
  SAMPLE_ROWS,
  SHORT_ROWS,
  spreadCost,
  type Pass,
} from './cost.js';
import { hasSpread, roundedUp, scoreRadius } from './certificate.js';
import { EXPORTS, type Exports } from './exports.js';
import { Arena, ARRAYS, BOUNDS, DISTANCE, MEMORY_LIMIT, PROBLEM, sizeOf, SPREAD, type Values } from './memory.js';
import { reachOf } from './reach.js';
import { seenKeys, type Features, type Mask } from './scores.js';
import { sizesOf, type Geometry, type Inputs } from './validate.js';

/** ra_bounds of one key/value head. */
export type Bounds = Values<typeof BOUNDS>;

/** ra_distance. */
export type Distance = Values<typeof DISTANCE>;

/** ra_spread. */
export type Spread = Values<typeof SPREAD>;

/** Rows that are done exactly beside a polynomial, of all key/value heads one after the other, ascending in each. */
export interface Outliers {
  /** [heads][counts.queries]: query i of the h-th query head of a group of g is i * g + h. */
  queries: Uint32Array;
  /** [heads][counts.keys] */
  keys: Uint32Array;
  /** In each key/value head. */
  counts: { queries: number; keys: number };
}

/** Rows of a key/value head, the largest first, and their norms. */
export interface Largest {
  rows: Uint32Array;
  norms: Float32Array;
}

/** Rows by falling norms, the first of equal ones first. */
function fallingNorms(rows: Uint32Array, norms: Float32Array): Largest {
  // As numbers of 64 bits, which sort without calling back: floats from 0 on are in the order of their bits.
  const keys = new BigUint64Array(rows.length);
  const halves = new Uint32Array(keys.buffer);
  const bits = new Uint32Array(norms.buffer, norms.byteOffset, norms.length);
  for (let n = 0; n < rows.length; n++) {
    halves[2 * n] = ~rows[n];
    halves[2 * n + 1] = bits[n];
  }
  keys.sort();
  for (let n = 0; n < rows.length; n++) {
    const at = 2 * (rows.length - 1 - n);
    rows[n] = ~halves[at];
    bits[n] = halves[at + 1];
  }
  return { rows, norms };
}

/** The arrays that a pass writes, and dout. */
export type ArrayName = 'out' | 'lse' | 'dout' | 'dq' | 'dk' | 'dv';

/** Gradients of what has no rows. */
export type VectorName = 'dbias' | 'dalibi' | 'dsinks' | 'dweights';

/** A row of a head, as `resultRows` numbers them, with an output and lse in place of those that are there. */
export interface Change {
  row: number;
  share: number;
  out: Float32Array;
  lse: number;
}

/** Sampled rows: out [rows][Dv], lse [rows], dq [rows][D] (empty unless asked for). */
export interface Rows {
  /** Whether the weights of every row add up to a positive number; always so with exp. */
  positive: boolean;
  out: Float32Array;
  lse: Float32Array;
  dq: Float32Array;
  /** By a polynomial, with dq: how far all this is from a given output and lse, and from dq by these; null where there are none. */
  distance: Distance | null;
}

/** Sampled rows of dk [keys][D] and dv [keys][Dv]. */
export interface Columns {
  dk: Float32Array;
  dv: Float32Array;
}

const OK = 0;
const NOT_POSITIVE = -3;

/** Rows of a gradient that was not asked for. */
const NOTHING = new Float32Array(0);
const [EXACT, POLYNOMIAL, TOEPLITZ] = [1, 2, 3];
const SIZE_OVERFLOW = 2 ** 32 - 1;
const MAX_COEFFICIENTS = 9;
/** Largest degree of the polynomial for the gradient of a bias at far distances (RA_MAX_LAG_DEGREE). */
export const MAX_LAG_DEGREE = 2;
/** Distances that are looked at together (RA_SAMPLE_LAGS). */
export const SAMPLE_LAGS = 256;
/** Rows whose exact output and lse are taken together in columns. */
export const SAMPLE_CHANGES = 64;
const EXTREMES = 8;
/** Rows of which `leastSums` takes one logarithm, and more only where one of them may be among the least. */
const STRETCH = 64;
const WARM_UP_CALLS = 20_000;

/** Whether a mask is added to scores, or says which ones count. */
const isAdded = ({ values }: Mask) => values.BYTES_PER_ELEMENT === 4;

const passNumber = (pass: Pass) => (pass === 'forward' ? 0 : 1);

/** One instance of the WebAssembly: its memory, and at most one open session. */
export class Kernel {
  readonly relaxed: boolean;
  #exports: Exports | null;
  #arena: Arena | null;
  #session: Session | null = null;

  private constructor(exports: Exports, arena: Arena) {
    this.#exports = exports;
    this.#arena = arena;
    this.relaxed = exports.ra_relaxed() === 1;
  }

  /** @throws Error for a module of another kind; RangeError when the empty instance is larger than the limit. */
  static async create(name: string, module: WebAssembly.Module, maxMemoryBytes: number): Promise<Kernel> {
    const foreign = (why: string, cause?: unknown) =>
      new Error(`${name}: the given WebAssembly is not rope-attention's (${why})`, { cause });
    const [needed] = WebAssembly.Module.imports(module);
    if (needed) throw foreign(`it imports ${needed.module}.${needed.name}`);
    const exports = (await WebAssembly.instantiate(module)).exports as unknown as Exports;
    const missing = EXPORTS.find((one) => !(one in exports));
    if (missing) throw foreign(`it has no ${missing}`);
    const arena = new Arena(
      exports.memory,
      exports.__heap_base.value as number,
      Math.min(maxMemoryBytes, MEMORY_LIMIT),
    );
    if (arena.bytes > maxMemoryBytes) {
      throw new RangeError(`${name}: maxMemoryBytes is ${maxMemoryBytes}, an instance at rest holds ${arena.bytes}`);
    }
    return new Kernel(exports, arena);
  }

  /** Bytes of memory held; 0 after `dispose`. */
  get memoryBytes(): number {
    return this.#arena?.bytes ?? 0;
  }

  /** Has the engine compile the kernels well before the first call that matters; about a millisecond. */
  warmUp(): void {
    this.#exports?.ra_warm_up(WARM_UP_CALLS);
  }

  /**
   * Begins a call; `features`: the engine that a degree stands for. A session that is still open ends: a call that was left half
   * done is forgotten here.
   */
  open(name: string, geometry: Geometry, features: Features = 'polynomial'): Session {
    if (!this.#exports || !this.#arena) throw new Error(`${name}: this instance was disposed`);
    this.#session?.close();
    this.#session = new Session(name, geometry, this.#exports, this.#arena, features);
    return this.#session;
  }

  /**
   * The dense product A B, or A^T B for A [inner, rows], whose b has a multiple of 8 columns. A call of its own: an open session
   * ends.
   */
  multiply(name: string, a: Float32Array, b: Float32Array, sizes: ProductSizes): Float32Array {
    if (!this.#exports || !this.#arena) throw new Error(`${name}: this instance was disposed`);
    this.#session?.close();
    this.#session = null;
    const { rows, inner, columns, transposed } = sizes;
    const [exports, arena] = [this.#exports, this.#arena];
    arena.reset();
    const [at, bt, ct] = [a.length, b.length, rows * columns].map((count) => arena.reserve(4 * count));
    arena.commit(name);
    arena.writeFloats(at, a);
    arena.writeFloats(bt, b);
    if (transposed) exports.ra_transposed_product(at, bt, inner, rows, columns, ct);
    else exports.ra_product(at, bt, rows, inner, columns, ct);
    const c = arena.readFloats(ct, rows * columns);
    arena.reset();
    return c;
  }

  dispose(): void {
    this.#session?.close();
    this.#session = null;
    this.#exports = null;
    this.#arena = null;
  }
}

/** Of A B, [rows, inner] times [inner, columns]. */
export interface ProductSizes {
  rows: number;
  inner: number;
  columns: number;
  /** A is [inner, rows]. */
  transposed: boolean;
}

/** Places for what is small or sampled; reserved with the session. */
interface Places {
  problem: number;
  arrays: number;
  bounds: number;
  distance: number;
  spread: number;
  frequencies: number;
  cos: number;
  sin: number;
  queryPositions: number;
  keyPositions: number;
  segments: number;
  alibi: number;
  bias: number;
  mask: number;
  sinks: number;
  relativePositions: number;
  support: number;
  weights: number;
  decayRates: number;
  decayWeights: number;
  decayTops: number;
  lagCoefficients: number;
  lags: number;
  coefficients: number;
  own: number;
  rows: number;
  changes: number;
  extremes: number;
  outlierQueries: number;
  outlierKeys: number;
  largest: number;
  scores: number;
  out: number;
  lse: number;
  dq: number;
  dk: number;
  dv: number;
}

export class Session {
  readonly geometry: Geometry;
  /** Key/value heads over the whole batch. */
  readonly heads: number;
  /** Rows (queries) of the query heads that share one key/value head. */
  readonly rowsOfHead: number;
  /** Outliers that there is room for, in each key/value head. */
  readonly outlierLimits: Outliers['counts'];
  readonly #name: string;
  /** The engine that a degree stands for. */
  readonly features: Features;
  readonly #exports: Exports;
  readonly #arena: Arena;
  readonly #at: Places;
  readonly #arrays = Object.fromEntries(Object.keys(ARRAYS).map((name) => [name, 0])) as Values<typeof ARRAYS>;
  #sampling = 0;
  #loaded = 0;
  #workspace = 0;
  #prepared: { head: number; bounds: Bounds } | null = null;
  /** Of each head the radius of all scores; undefined until it is prepared. */
  readonly #radii: number[] = [];
  readonly #spreads = new Map<number, { beside: Outliers | null; spread: Spread }>();
  #measured: number | null = null;
  #outliers: Outliers | null = null;
  /** Beside which outliers the mean keys of each head were found. */
  readonly #meansBeside: (Outliers | null | undefined)[];
  #overwritten = false;
  #given = false;
  #spent = 0;
  #open = true;

  constructor(name: string, g: Geometry, exports: Exports, arena: Arena, features: Features = 'polynomial') {
    this.#name = name;
    this.geometry = g;
    this.heads = g.batch * g.kvHeads;
    this.#meansBeside = Array<undefined>(this.heads).fill(undefined);
    this.rowsOfHead = (g.heads / g.kvHeads) * g.queryLength;
    const limit = (rows: number) => (g.alibi || g.decays ? 1 : outlierLimit(rows)); // none is chosen: the engine has not both
    this.outlierLimits = { queries: limit(this.rowsOfHead), keys: limit(g.keyLength) };
    this.features = features;
    this.#exports = exports;
    this.#arena = arena;
    arena.reset();
    const floats = (count: number) => arena.reserve(4 * count);
    const some = (values: ArrayLike<number> | null | undefined, bytes: number) =>
      values ? arena.reserve(bytes * values.length) : 0;
    this.#at = {
      problem: arena.reserve(sizeOf(PROBLEM)),
      arrays: arena.reserve(sizeOf(ARRAYS)),
      bounds: arena.reserve(sizeOf(BOUNDS)),
      distance: arena.reserve(sizeOf(DISTANCE)),
      spread: arena.reserve(sizeOf(SPREAD)),
      frequencies: some(g.tables ? null : g.frequencies, 8),
      cos: some(g.tables?.cos, 4),
      sin: some(g.tables?.sin, 4),
      queryPositions: some(g.queryPositions, 8),
      keyPositions: some(g.keyPositions, 8),
      segments: some(g.segments.length > 1 ? g.segments : null, 4),
      alibi: some(g.alibi, 4),
      bias: some(g.bias, 4),
      mask: some(g.mask?.values, g.mask?.values.BYTES_PER_ELEMENT ?? 0),
      sinks: some(g.sinks, 4),
      relativePositions: some(g.relativePositions, 4),
      support: some(g.relative?.support, 4),
      weights: some(g.relative?.weights, 4),
      decayRates: some(g.decays?.rates, 8),
      decayWeights: some(g.decays?.weights, 4),
      decayTops: some(g.decays?.tops, 4),
      lagCoefficients: g.decays ? floats(this.heads * (MAX_LAG_DEGREE + 1)) : 0,
      lags: g.decays ? floats(5 * SAMPLE_LAGS + 9) : 0,
      coefficients: floats(this.heads * MAX_COEFFICIENTS),
      own: floats(MAX_COEFFICIENTS),
      rows: floats(Math.max(SHORT_ROWS, SAMPLE_KEYS)),
      changes: floats(SAMPLE_CHANGES * (3 + g.valueDim)),
      extremes: floats(4 * EXTREMES),
      outlierQueries: floats(this.heads * this.outlierLimits.queries),
      outlierKeys: floats(this.heads * this.outlierLimits.keys),
      largest: floats(2 * Math.max(this.outlierLimits.queries, this.outlierLimits.keys)),
      scores: floats(SAMPLE_ROWS * g.keyLength),
      out: floats(2 * SHORT_ROWS * g.valueDim), // in two ways at a time
      lse: floats(2 * SHORT_ROWS),
      dq: floats(2 * SHORT_ROWS * g.headDim),
      dk: floats(2 * SAMPLE_KEYS * g.headDim),
      dv: floats(2 * SAMPLE_KEYS * g.valueDim),
    };
    arena.commit(name);
    this.#writeGeometry();
    this.setEngine(null);
  }

  #writeGeometry(): void {
    const [g, at, arena] = [this.geometry, this.#at, this.#arena];
    if (at.frequencies) arena.writeDoubles(at.frequencies, g.frequencies);
    if (g.tables) arena.writeFloats(at.cos, g.tables.cos);
    if (g.tables) arena.writeFloats(at.sin, g.tables.sin);
    if (g.queryPositions) arena.writeDoubles(at.queryPositions, g.queryPositions);
    if (g.keyPositions) arena.writeDoubles(at.keyPositions, g.keyPositions);
    if (at.segments) arena.writeIntegers(at.segments, g.segments);
    if (g.alibi) arena.writeFloats(at.alibi, g.alibi);
    if (g.bias) arena.writeFloats(at.bias, g.bias);
    if (g.mask && isAdded(g.mask)) arena.writeFloats(at.mask, g.mask.values);
    else if (g.mask) arena.writeBytes(at.mask, g.mask.values);
    if (g.sinks) arena.writeFloats(at.sinks, g.sinks);
    if (g.relativePositions) arena.writeFloats(at.relativePositions, g.relativePositions);
    if (g.relative) arena.writeIntegers(at.support, g.relative.support);
    if (g.relative) arena.writeFloats(at.weights, g.relative.weights);
    if (g.decays) arena.writeDoubles(at.decayRates, g.decays.rates);
    if (g.decays) arena.writeFloats(at.decayWeights, g.decays.weights);
    if (g.decays) arena.writeFloats(at.decayTops, g.decays.tops);
    arena.writeStruct(at.problem, PROBLEM, {
      batch: g.batch,
      heads: g.heads,
      kv_heads: g.kvHeads,
      query_length: g.queryLength,
      key_length: g.keyLength,
      head_dim: g.headDim,
      value_dim: g.valueDim,
      rotary_dim: g.rotaryDim,
      interleaved: Number(g.interleaved),
      causal: Number(g.causal),
      query_offset: g.queryOffset,
      scale: g.scale,
      frequencies: at.frequencies,
      coefficients: at.coefficients,
      layout: Number(g.layout === 'bnhd'),
      rotary_factor: g.rotaryFactor,
      query_positions: at.queryPositions,
      key_positions: at.keyPositions,
      position_batches: g.positionBatches,
      cos_table: at.cos,
      sin_table: at.sin,
      table_rows: g.tables?.rows ?? 0,
      window_left: g.window[0],
      window_right: g.window[1],
      segments: at.segments,
      segment_count: g.segments.length,
      alibi: at.alibi,
      softcap: g.softcap,
      bias: at.bias,
      bias_heads: g.bias ? g.bias.length / (g.queryLength + g.keyLength - 1) : 0,
      mask: g.mask && isAdded(g.mask) ? at.mask : 0,
      allowed: g.mask && !isAdded(g.mask) ? at.mask : 0,
      mask_batch: g.mask?.strides.batch ?? 0,
      mask_head: g.mask?.strides.head ?? 0,
      mask_row: g.mask?.strides.row ?? 0,
      sinks: at.sinks,
      score_bound: 0,
      relative_positions: at.relativePositions,
      support: at.support,
      support_count: (g.relative?.support.length ?? 0) / 2,
      weights: at.weights,
      outlier_queries: at.outlierQueries,
      outlier_keys: at.outlierKeys,
      outlier_query_count: 0,
      outlier_key_count: 0,
      decay_rates: at.decayRates,
      decay_weights: at.decayWeights,
      decay_tops: at.decayTops,
      decay_count: g.decays?.count ?? 0,
      decay_from: g.decays?.near ?? 0,
      lag_coefficients: at.lagCoefficients,
      lag_degree: 0,
      dv_by_derivative: 0,
    } satisfies Omit<Values<typeof PROBLEM>, 'method' | 'degree'>);
  }

  /** Bytes of memory that the call needs. */
  get bytes(): number {
    return Math.max(this.#arena.needed, this.#loaded); // some of which a last workspace may have taken over
  }

  /** Bytes that are left below the limit of the memory. */
  get free(): number {
    return this.#arena.free;
  }

  /** Takes the memory back; later uses of this session throw. */
  close(): void {
    if (!this.#open) return;
    this.#open = false;
    this.#arena.reset();
  }

  /**
   * Chooses the engine of the calls that follow: null is exact. `coefficients` [heads][degree + 1] belong to a degree; their derivative is
   * what dv goes by if so asked.
   */
  setEngine(degree: number | null, coefficients?: Float32Array, dvByDerivative = false): void {
    this.#check();
    const at = this.#at;
    if (coefficients) this.#arena.writeFloats(at.coefficients, coefficients);
    this.#arena.writeStruct(at.problem, PROBLEM, {
      method: degree === null ? EXACT : this.features === 'toeplitz' ? TOEPLITZ : POLYNOMIAL,
      degree: degree ?? 0,
      dv_by_derivative: Number(dvByDerivative),
    });
  }

  /** Chooses the polynomial for the gradient of a bias at far distances, [heads][degree + 1]. */
  setLags(degree: number, coefficients: Float32Array): void {
    this.#check();
    this.#arena.writeFloats(this.#at.lagCoefficients, coefficients);
    this.#arena.writeStruct(this.#at.problem, PROBLEM, { lag_degree: degree });
  }

  /** Rows that are exact in what follows beside a polynomial, in the engine and in samples. Within `outlierLimits`. */
  setOutliers(outliers: Outliers | null): void {
    this.#check();
    if (this.#outliers === outliers) return;
    const at = this.#at;
    this.#outliers = outliers;
    this.#prepared = null;
    if (outliers) this.#arena.writeIntegers(at.outlierQueries, outliers.queries);
    if (outliers) this.#arena.writeIntegers(at.outlierKeys, outliers.keys);
    this.#arena.writeStruct(at.problem, PROBLEM, {
      outlier_query_count: outliers?.counts.queries ?? 0,
      outlier_key_count: outliers?.counts.keys ?? 0,
    });
  }

  /** Tells the exact engine that no |scale q.k| exceeds `bound`; Infinity when nothing is known. */
  boundScores(bound: number): void {
    this.#check();
    const score_bound = Math.fround(bound) < Infinity ? Math.fround(bound * (1 + 2 ** -23)) : 0;
    this.#arena.writeStruct(this.#at.problem, PROBLEM, { score_bound });
  }

  /** Bytes of workspace of a pass by an engine; Infinity beyond 32 bits. Leaves the exact engine set. */
  workspaceBytes(pass: Pass, degree: number | null): number {
    this.setEngine(degree);
    const bytes = this.#exports.ra_workspace(this.#at.problem, passNumber(pass));
    if (degree !== null) this.setEngine(null);
    return this.#size(bytes, 'ra_workspace');
  }

  /**
   * Makes room for the arrays of a pass and for sampling, and copies the inputs in.
   *
   * @param workspaceBytes what `setWorkspace` will ask for, `last` or not; only so that a call that cannot fit ends here.
   */
  load(inputs: Inputs, pass: Pass, workspaceBytes: number, last = false): void {
    this.#check();
    const { q, k, v, dOutput, output, lse } = inputs;
    const size = sizesOf(this.#name, this.geometry);
    const floats = (count: number) => this.#arena.reserve(4 * count);
    const arrays = this.#arrays;
    arrays.q = floats(size.q);
    arrays.k = floats(size.k);
    arrays.v = floats(size.v);
    arrays.out = floats(size.output);
    arrays.lse = floats(size.lse);
    arrays.means = floats(this.heads * (2 * this.geometry.headDim + this.geometry.valueDim));
    if (pass === 'backward') {
      arrays.dout = floats(size.output);
      arrays.dq = floats(size.q);
      arrays.dk = floats(size.k);
      arrays.dv = floats(size.v);
      arrays.dbias = floats(this.geometry.bias?.length ?? 0);
      arrays.dalibi = floats(this.geometry.alibi?.length ?? 0);
      arrays.dsinks = floats(this.geometry.sinks?.length ?? 0);
      arrays.dweights = floats(this.geometry.relative?.weights.length ?? 0);
    }
    this.#sampling = this.#arena.reserve(
      this.#size(this.#exports.ra_sample_workspace(this.#at.problem), 'ra_sample_workspace'),
    );
    this.#loaded = this.#arena.needed;
    this.#reserveWorkspace(workspaceBytes, last);
    this.#arena.check(this.#name);
    this.#arena.reset(this.#loaded);
    this.#arena.commit(this.#name);

    this.#arena.writeFloats(arrays.q, q);
    this.#arena.writeFloats(arrays.k, k);
    if (v) this.#arena.writeFloats(arrays.v, v);
    else arrays.v = 0;
    if (dOutput && pass === 'backward') this.#arena.writeFloats(arrays.dout, dOutput);
    if (output) this.#arena.writeFloats(arrays.out, output);
    if (lse) this.#arena.writeFloats(arrays.lse, lse);
    this.#given = output !== null && lse !== null;
    this.#arena.writeStruct(this.#at.arrays, ARRAYS, arrays);
  }

  /** Whether the call came with an output and lse. */
  get wasGiven(): boolean {
    return this.#given;
  }

  /** Whether the output and lse that are there are those that were given. */
  get hasGiven(): boolean {
    return this.#given && !this.#overwritten;
  }

  /** Puts the output and lse that were given back in their place, once a forward pass has written its own there. */
  restoreOutput({ output, lse }: Inputs): void {
    this.#check();
    if (!this.#overwritten || !output || !lse) return;
    this.#arena.writeFloats(this.#arrays.out, output);
    this.#arena.writeFloats(this.#arrays.lse, lse);
    this.#overwritten = false;
  }

  /** Puts what a pass would write in its place, as `result` reads it: made otherwise, to be compared. */
  place(array: ArrayName, values: Float32Array): void {
    this.#check();
    this.#arena.writeFloats(this.#arrays[array], values);
  }

  /**
   * Makes room for the workspace of the engine that runs next, in the place of the one before.
   *
   * @param last nothing is sampled from now on: in the place of what that needs, too.
   */
  setWorkspace(bytes: number, last = false): void {
    this.#check();
    this.#workspace = this.#reserveWorkspace(bytes, last);
    this.#arena.commit(this.#name);
    if (last) this.#prepared = null;
  }

  /** Bytes of memory that the call needs with such a workspace. */
  bytesWith(workspaceBytes: number, last: boolean): number {
    this.#reserveWorkspace(workspaceBytes, last);
    const bytes = this.bytes;
    this.#arena.reset(this.#loaded);
    return bytes;
  }

  #reserveWorkspace(bytes: number, last: boolean): number {
    this.#arena.reset(last ? this.#sampling : this.#loaded);
    return this.#arena.reserve(bytes);
  }

  /** Units of a pass by the engine that is set. */
  units(pass: Pass): number {
    this.#check();
    return this.#exports.ra_units(this.#at.problem, passNumber(pass)) >>> 0;
  }

  /** Runs units first .. last-1; false when the polynomial's weights are not positive everywhere. */
  run(pass: Pass, first: number, last: number): boolean {
    this.#check();
    if (pass === 'forward') this.#overwritten = true;
    this.#giveMeans(this.#meansBeside.every((one) => one === this.#outliers));
    const code = this.#exports.ra_run(
      this.#at.problem,
      this.#at.arrays,
      passNumber(pass),
      this.#workspace,
      first,
      last,
    );
    if (code === NOT_POSITIVE) return false;
    this.#expect(code, 'ra_run');
    return true;
  }

  /** Whether mean keys have a place, from which they are read or in which they are left. */
  #giveMeans(there: boolean): void {
    this.#arena.writeStruct(this.#at.arrays, ARRAYS, { means: there ? this.#arrays.means : 0 });
  }

  /** A copy of what a pass wrote. */
  result(array: ArrayName): Float32Array {
    this.#check();
    const { batch } = this.geometry;
    const { heads, length, width } = this.#sizes(array);
    return this.#arena.readFloats(this.#arrays[array], batch * heads * length * width);
  }

  /** A copy of the gradient of bias, slopes, sinks or relative weights; undefined where there are none. */
  vector(array: VectorName): Float32Array | undefined {
    this.#check();
    const { bias, alibi, sinks, relative } = this.geometry;
    const of = { dbias: bias, dalibi: alibi, dsinks: sinks, dweights: relative?.weights }[array];
    return of ? this.#arena.readFloats(this.#arrays[array], of.length) : undefined;
  }

  /** A copy of rows of a key/value head, one after the other: row i of its h-th query is h * queryLength + i; rows of dk and dv are keys. */
  resultRows(array: ArrayName, head: number, rows: readonly number[]): Float32Array {
    this.#check();
    const { kvHeads, layout } = this.geometry;
    const { heads, length, width } = this.#sizes(array);
    const [batch, first] = [Math.floor(head / kvHeads), (head % kvHeads) * (heads / kvHeads)];
    const straight = layout === 'bhnd' || array === 'lse';
    const places = rows.map((row) => {
      const [own, place] = [first + Math.floor(row / length), row % length];
      return straight ? (batch * heads + own) * length + place : (batch * length + place) * heads + own;
    });
    return this.#arena.gatherFloats(this.#arrays[array], places, width);
  }

  /** The lse of rows of a key/value head. */
  lseOf(head: number, rows: readonly number[]): Float32Array {
    this.#check();
    return this.#arena.gatherFloats(this.#arrays.lse + 4 * this.rowsOfHead * head, rows, 1);
  }

  /** Rows of a head whose lse is the least beside the logarithm of how many keys they see, windows and segments aside. */
  leastSums(head: number, count: number): number[] {
    this.#check();
    const { causal, queryOffset, queryLength, keyLength } = this.geometry;
    const lse = this.#arena.readFloats(this.#arrays.lse + 4 * this.rowsOfHead * head, this.rowsOfHead);
    const least: { row: number; sum: number }[] = [];
    const seen = (i: number) => Math.log(causal ? Math.max(Math.min(keyLength, i + queryOffset + 1), 1) : keyLength);
    let most = 0; // of rows up to the end of a stretch
    for (let row = 0; row < lse.length; row++) {
      const i = row % queryLength;
      if (i % STRETCH === 0) most = seen(i + STRETCH);
      if (lse[row] === -Infinity || (least.length === count && !(lse[row] - most < least[count - 1].sum))) continue;
      const sum = lse[row] - seen(i);
      if (least.length === count && !(sum < least[count - 1].sum)) continue;
      if (least.length === count) least.pop();
      let at = least.length;
      while (at > 0 && least[at - 1].sum > sum) at--;
      least.splice(at, 0, { row, sum });
    }
    return least.map(({ row }) => row);
  }

  /**
   * Operations at peak speed that sampling has taken so far, as cost.ts counts them: the same for the same call, whatever the machine
   * does at the time.
   */
  get spent(): number {
    return this.#spent;
  }

  /** Counts what was taken elsewhere. */
  spend(operations: number): void {
    this.#spent += operations;
  }

  /** Makes a key/value head the one that the sampling methods look at. */
  prepare(head: number): Bounds {
    this.#check();
    if (this.#prepared?.head !== head) {
      const { problem, arrays, bounds } = this.#at;
      const again = head === this.#measured; // with other outliers
      this.#prepared = null;
      this.#measured = head;
      this.#spent += prepareCost(this.geometry, again);
      this.#giveMeans(true);
      const { ra_sample_prepare } = this.#exports;
      this.#expect(
        ra_sample_prepare(problem, arrays, head, Number(again), bounds, this.#sampling),
        'ra_sample_prepare',
      );
      this.#meansBeside[head] = this.#outliers;
      this.#prepared = { head, bounds: this.#arena.readStruct(bounds, BOUNDS) };
      if (!again && this.#prepared.bounds.q_mean_norm > 0) this.#spent += centringCost(this.geometry);
      this.#radii[head] ??= scoreRadius(this.geometry, this.#prepared.bounds);
    }
    return this.#prepared.bounds;
  }

  /** Leaves the means of all heads where the polynomial engine finds them: it is to centre rows as samples, and certificates, did. */
  prepareAll(): void {
    for (let head = 0; head < this.heads; head++) if (this.#meansBeside[head] !== this.#outliers) this.prepare(head);
  }

  /** The same call as samples have to see it: with slopes, queries see no further than these let them. `rows`: of all by default. */
  #inSight(head: number, rows: ArrayLike<number> | null): Geometry {
    const { alibi, heads, kvHeads, queryLength, window } = this.geometry;
    if (!alibi) return this.geometry;
    const group = heads / kvHeads;
    const own = rows ? Array.from(rows, (row) => Math.floor(row / queryLength)) : Array.from({ length: group }, (_, h) => h);
    const slope = Math.min(...own.map((h) => alibi[(head % kvHeads) * group + h]));
    const reach = reachOf(this.geometry, slope, this.#radii[head] ?? NaN);
    return reach === Infinity || (window[0] >= 0 && window[0] <= reach) ? this.geometry : { ...this.geometry, window: [reach, window[1]] };
  }

  /** What rows of a head take, and keys likewise. */
  costOfRows(head: number, rows: ArrayLike<number>, pass: Pass): number {
    return rowsCost(this.#inSight(head, rows), rows, pass);
  }

  costOfColumns(head: number, keys: ArrayLike<number>): number {
    return columnsCost(this.#inSight(head, null), keys);
  }

  /** Has the C see a call as samples have to. */
  #withSight<T>(seen: Geometry, look: () => T): T {
    if (seen === this.geometry) return look();
    const set = ([left]: Geometry['window']) => this.#arena.writeStruct(this.#at.problem, PROBLEM, { window_left: left });
    set(seen.window);
    try {
      return look();
    } finally {
      set(this.geometry.window);
    }
  }

  /** Whether a row may have one of these keys (ascending) that counts. */
  mayCount(head: number, row: number, keys: readonly number[]): boolean {
    const { causal, queryLength, queryOffset } = this.geometry;
    const position = (row % queryLength) + queryOffset;
    const [left] = this.#inSight(head, [row]).window;
    return !causal || (keys[0] <= position && (left < 0 || keys[keys.length - 1] >= position - left));
  }

  /** How far queries of a head see, those with the steepest slope; all that comes before where there is none. */
  sight(head: number): number {
    const { alibi, heads, kvHeads, queryLength } = this.geometry;
    const group = heads / kvHeads;
    if (!alibi) return seenKeys(this.geometry);
    const slopes = alibi.subarray((head % kvHeads) * group, ((head % kvHeads) + 1) * group);
    return seenKeys(this.#inSight(head, [slopes.indexOf(Math.max(...slopes)) * queryLength]));
  }

  /** The largest queries (numbered as outliers), or centred keys, of a head, as many as `outlierLimits` says. */
  largest(head: number, of: 'queries' | 'keys'): Largest {
    this.prepare(head);
    this.#spent += rankCost(this.geometry, of);
    const { problem, arrays, largest } = this.#at;
    const count = this.outlierLimits[of];
    const norms = largest + 4 * count;
    const { ra_sample_largest } = this.#exports;
    const code = ra_sample_largest(
      problem,
      arrays,
      head,
      Number(of === 'queries'),
      count,
      largest,
      norms,
      this.#sampling,
    );
    this.#expect(code, 'ra_sample_largest');
    return fallingNorms(this.#arena.readIntegers(largest, count), this.#arena.readFloats(norms, count));
  }

  /** How far scores of ordinary rows through the state are from 0 in a head, rounded up; null where that is not known, or beyond a limit. */
  spread(head: number, limit = Infinity): Spread | null {
    const known = this.#spreads.get(head);
    if (known?.beside === this.#outliers) return known.spread.scores <= limit ? known.spread : null;
    const found = this.prepare(head);
    if (!hasSpread(this.geometry, found)) return null;
    const { problem, arrays, spread: at } = this.#at;
    const { ra_sample_spread } = this.#exports;
    this.#expect(ra_sample_spread(problem, arrays, head, limit, at, this.#sampling), 'ra_sample_spread');
    const asFound = this.#arena.readStruct(at, SPREAD);
    this.#spent += spreadCost(this.geometry, asFound.rows);
    if (!(asFound.scores <= limit)) return null;
    const spread = roundedUp(this.geometry, asFound, scoreRadius(this.geometry, found));
    this.#spreads.set(head, { beside: this.#outliers, spread });
    return spread;
  }

  /** How far entries of the output of a head are outside of what their columns of v span, at most. */
  outside(head: number): number {
    this.#check();
    return this.#exports.ra_sample_outside(this.#at.problem, this.#at.arrays, head);
  }

  /**
   * Where an approximation is likely to fail first: rows of the largest queries; rows with the largest positive and negative scores against
   * the keys that are largest, and of outputs those whose values are farthest from the mean, where slopes make scores fall against such keys
   * of the chunk before; and the largest keys of all in that sense; falling.
   */
  extremes(head: number): { large: number[]; aligned: number[]; opposed: number[]; keys: number[] } {
    this.prepare(head);
    this.#spent += extremesCost(this.geometry);
    const { problem, arrays, extremes } = this.#at;
    const [large, aligned, opposed, keys] = [0, 1, 2, 3].map((n) => extremes + 4 * n * EXTREMES);
    const { ra_sample_extremes } = this.#exports;
    this.#giveMeans(true); // means of values
    const code = ra_sample_extremes(problem, arrays, head, large, aligned, opposed, keys, this.#sampling);
    this.#expect(code, 'ra_sample_extremes');
    const read = (address: number) => [...new Set(this.#arena.readIntegers(address, EXTREMES))];
    return { large: read(large), aligned: read(aligned), opposed: read(opposed), keys: read(keys) };
  }

  /** Centred scores of some rows of a head against every `stride`-th key, those that are allowed. */
  scores(head: number, rows: ArrayLike<number>, stride: number): Float32Array {
    this.prepare(head);
    const at = this.#at;
    this.#arena.writeIntegers(at.rows, rows);
    const { ra_sample_scores } = this.#exports;
    const count =
      ra_sample_scores(at.problem, at.arrays, head, at.rows, rows.length, stride, at.scores, this.#sampling) >>> 0;
    if (count > SAMPLE_ROWS * this.geometry.keyLength) throw this.#failure('ra_sample_scores', count | 0);
    return this.#arena.readFloats(at.scores, count);
  }

  /** Rows of the forward pass, and of dq when `gradient`, with exp. */
  rows(head: number, rows: ArrayLike<number>, gradient: boolean): Rows {
    this.#sampleRows(head, rows, null, false, gradient ? this.#at.dq : 0, 0);
    return this.#rowsThere(0, rows.length, gradient, true, false);
  }

  /**
   * The same with a polynomial, of gradients `withDistance` where there is a given output; and, `withExact`, with exp as well, for what
   * that takes beyond the scores.
   */
  polynomialRows(
    head: number,
    rows: ArrayLike<number>,
    coefficients: Float32Array,
    gradient: boolean,
    withDistance: boolean,
    withExact: boolean,
  ): { got: Rows; exact: Rows | null } {
    const at = this.#at;
    const there = withDistance && gradient && this.hasGiven;
    const positive = this.#sampleRows(head, rows, coefficients, withExact, gradient ? at.dq : 0, there ? at.distance : 0);
    return {
      got: this.#rowsThere(0, rows.length, gradient, positive, there),
      exact: withExact ? this.#rowsThere(rows.length, rows.length, gradient, true, false) : null,
    };
  }

  /** Rows that sampling has left, `count` from `first` on. */
  #rowsThere(first: number, count: number, gradient: boolean, positive: boolean, distance: boolean): Rows {
    const at = this.#at;
    const read = (from: number, width: number) => this.#arena.readFloats(from + 4 * first * width, count * width);
    return {
      positive,
      out: read(at.out, this.geometry.valueDim),
      lse: read(at.lse, 1),
      dq: gradient ? read(at.dq, this.geometry.headDim) : NOTHING,
      distance: distance ? this.#arena.readStruct(at.distance, DISTANCE) : null,
    };
  }

  /** How far such rows are from the output and lse that are there; when `gradient`, and dq from that by these. */
  distance(
    head: number,
    rows: ArrayLike<number>,
    coefficients: Float32Array | null,
    gradient: boolean,
  ): Distance {
    this.#sampleRows(head, rows, coefficients, false, gradient ? this.#at.dq : 0, this.#at.distance);
    return this.#arena.readStruct(this.#at.distance, DISTANCE);
  }

  /** Leaves such rows, and what has an address, in their places; false when the weights of one do not add up to a positive number. */
  #sampleRows(
    head: number,
    rows: ArrayLike<number>,
    coefficients: Float32Array | null,
    beside: boolean,
    dq: number,
    distance: number,
  ): boolean {
    this.prepare(head);
    const at = this.#at;
    const seen = this.#inSight(head, rows);
    const ways = (dq && distance ? DISTANCE_OF_GRADIENTS : 1) + Number(beside);
    this.#spent += ways * rowsCost(seen, rows, dq ? 'backward' : 'forward');
    this.#arena.writeIntegers(at.rows, rows);
    if (coefficients) this.#arena.writeFloats(at.own, coefficients);
    const [own, degree] = coefficients ? [at.own, coefficients.length - 1] : [0, 0];
    const { ra_sample_rows } = this.#exports;
    const { problem, arrays, rows: from, out, lse } = at;
    const [count, too, sampling] = [rows.length, Number(beside), this.#sampling];
    const code = this.#withSight(seen, () =>
      ra_sample_rows(problem, arrays, head, from, count, own, degree, too, out, lse, dq, distance, sampling),
    );
    if (code !== NOT_POSITIVE) this.#expect(code, 'ra_sample_rows');
    return code === OK;
  }

  /** Up to SAMPLE_KEYS rows `keys` (ascending) of dk and dv with exp, and the lse and out that are there. */
  columns(head: number, keys: ArrayLike<number>): Columns {
    this.#sampleColumns(head, keys, null, false);
    return this.#columnsThere(0, keys.length);
  }

  /** The same with a polynomial; and, `withExact`, with exp as well, for what that takes beyond the scores. */
  polynomialColumns(
    head: number,
    keys: ArrayLike<number>,
    coefficients: Float32Array,
    withExact: boolean,
  ): { got: Columns; exact: Columns | null } {
    this.#sampleColumns(head, keys, coefficients, withExact);
    return {
      got: this.#columnsThere(0, keys.length),
      exact: withExact ? this.#columnsThere(keys.length, keys.length) : null,
    };
  }

  #sampleColumns(head: number, keys: ArrayLike<number>, coefficients: Float32Array | null, beside: boolean): void {
    this.prepare(head);
    const at = this.#at;
    const seen = this.#inSight(head, null);
    this.#spent += (1 + Number(beside)) * columnsCost(seen, keys);
    this.#arena.writeIntegers(at.rows, keys);
    if (coefficients) this.#arena.writeFloats(at.own, coefficients);
    const [own, degree] = coefficients ? [at.own, coefficients.length - 1] : [0, 0];
    const { ra_sample_columns } = this.#exports;
    const { problem, arrays, rows, dk, dv } = at;
    const [count, too, sampling] = [keys.length, Number(beside), this.#sampling];
    const code = this.#withSight(seen, () =>
      ra_sample_columns(problem, arrays, head, rows, count, own, degree, too, dk, dv, sampling),
    );
    this.#expect(code, 'ra_sample_columns');
  }

  /**
   * What rows `keys` of dk and dv with exp gain when the lse and out of up to SAMPLE_CHANGES rows are not those that are there but
   * others, each counted `share` times.
   */
  changes(head: number, rows: readonly Change[], keys: readonly number[]): Columns {
    this.prepare(head);
    const at = this.#at;
    this.#spent += changesCost(this.geometry, rows.length);
    const [lse, shares, out] = [1, 2, 3].map((n) => at.changes + 4 * n * SAMPLE_CHANGES);
    const { valueDim } = this.geometry;
    const outs = new Float32Array(rows.length * valueDim);
    rows.forEach((one, n) => outs.set(one.out, n * valueDim));
    this.#arena.writeIntegers(at.rows, keys);
    this.#arena.writeIntegers(at.changes, rows.map(({ row }) => row));
    this.#arena.writeFloats(lse, Float32Array.from(rows, (one) => one.lse));
    this.#arena.writeFloats(shares, Float32Array.from(rows, ({ share }) => share));
    this.#arena.writeFloats(out, outs);
    const { ra_sample_changes } = this.#exports;
    const code = ra_sample_changes(
      at.problem,
      at.arrays,
      head,
      at.changes,
      rows.length,
      lse,
      out,
      shares,
      at.rows,
      keys.length,
      at.dk,
      at.dv,
      this.#sampling,
    );
    this.#expect(code, 'ra_sample_changes');
    return this.#columnsThere(0, keys.length);
  }

  /** Rows of dk and dv that sampling has left, `count` from `first` on. */
  #columnsThere(first: number, count: number): Columns {
    const { headDim, valueDim } = this.geometry;
    const read = (from: number, width: number) => this.#arena.readFloats(from + 4 * first * width, count * width);
    return { dk: read(this.#at.dk, headDim), dv: read(this.#at.dv, valueDim) };
  }

  /**
   * The gradient of the bias of a query head (over the whole batch) at some entries, with the lse and out that are there: four
   * numbers for each, with exp and with three polynomials of degree 2, `coefficients` [3][3].
   */
  lags(head: number, entries: ArrayLike<number>, coefficients: Float32Array): Float32Array {
    const { heads, kvHeads } = this.geometry;
    this.prepare(Math.floor(head / (heads / kvHeads)));
    const { problem, arrays, lags } = this.#at;
    const [own, sums] = [lags + 4 * SAMPLE_LAGS, lags + 4 * (SAMPLE_LAGS + 9)];
    this.#arena.writeIntegers(lags, entries);
    this.#arena.writeFloats(own, coefficients);
    const { ra_sample_lags } = this.#exports;
    this.#expect(
      ra_sample_lags(problem, arrays, head, lags, entries.length, own, sums, this.#sampling),
      'ra_sample_lags',
    );
    return this.#arena.readFloats(sums, 4 * entries.length);
  }

  /** What these, with exp, gain when the lse and out of a row of a key/value head are not those that are there but others. */
  lagChanges(head: number, { row, lse, out }: Change, entries: ArrayLike<number>): Float32Array {
    this.prepare(head);
    const { problem, arrays, lags, changes } = this.#at;
    const sums = lags + 4 * SAMPLE_LAGS;
    this.#arena.writeIntegers(lags, entries);
    this.#arena.writeFloats(changes, out);
    const { ra_sample_lag_changes } = this.#exports;
    this.#expect(
      ra_sample_lag_changes(problem, arrays, head, row, lse, changes, lags, entries.length, sums, this.#sampling),
      'ra_sample_lag_changes',
    );
    return this.#arena.readFloats(sums, entries.length);
  }

  /**
   * Bytes of a streaming state, or of its beginning, which is all that an append touches that fills no chunk; Infinity beyond
   * 32 bits. The engine of these calls is a polynomial, set before.
   */
  stateBytes(whole: boolean): number {
    this.#check();
    return this.#size(this.#exports.ra_state_bytes(this.#at.problem, Number(whole)), 'ra_state_bytes');
  }

  /** @throws RangeError when a whole state cannot be worked on within the limit of the memory. */
  checkState(): void {
    this.#check();
    this.#arena.reserve(this.stateBytes(true));
    this.#arena.reserve(this.#size(this.#exports.ra_state_workspace(this.#at.problem), 'ra_state_workspace'));
    this.#arena.check(this.#name);
  }

  /** Keys and values join the state, or the beginning of one. */
  appendToState(state: Float32Array, k: Float32Array, v: Float32Array): void {
    const { ra_state_append } = this.#exports;
    const [k_at, v_at] = [this.#arena.reserve(4 * k.length), this.#arena.reserve(4 * v.length)];
    const [at, workspace] = this.#stateAt(state);
    this.#arena.writeFloats(k_at, k);
    this.#arena.writeFloats(v_at, v);
    this.#arena.writeStruct(this.#at.arrays, ARRAYS, { k: k_at, v: v_at });
    this.#expect(ra_state_append(this.#at.problem, this.#at.arrays, at, workspace), 'ra_state_append');
    state.set(this.#arena.readFloats(at, state.length));
  }

  /** Attention of the queries to all keys of the state; `positive`: no row's weights failed to add up to a positive number. */
  attendToState(state: Float32Array, q: Float32Array): { output: Float32Array; lse: Float32Array; positive: boolean } {
    const { ra_state_attend } = this.#exports;
    const size = sizesOf(this.#name, this.geometry);
    const [q_at, out, lse] = [q.length, size.output, size.lse].map((values) => this.#arena.reserve(4 * values));
    const [at, workspace] = this.#stateAt(state);
    this.#arena.writeFloats(q_at, q);
    this.#arena.writeStruct(this.#at.arrays, ARRAYS, { q: q_at, out, lse });
    const code = ra_state_attend(this.#at.problem, this.#at.arrays, at, workspace);
    if (code !== NOT_POSITIVE) this.#expect(code, 'ra_state_attend');
    return {
      output: this.#arena.readFloats(out, size.output),
      lse: this.#arena.readFloats(lse, size.lse),
      positive: code === OK,
    };
  }

  /** The keys of `other` join `state`. */
  mergeStates(state: Float32Array, other: Float32Array): void {
    const other_at = this.#arena.reserve(4 * other.length);
    const [at, workspace] = this.#stateAt(state);
    this.#arena.writeFloats(other_at, other);
    this.#expect(this.#exports.ra_state_merge(this.#at.problem, at, other_at, workspace), 'ra_state_merge');
    state.set(this.#arena.readFloats(at, state.length));
  }

  /** Copies a state in, beside what is reserved, and makes room to work on it. */
  #stateAt(state: Float32Array): [state: number, workspace: number] {
    this.#check();
    const at = this.#arena.reserve(4 * state.length);
    const workspace = this.#arena.reserve(
      this.#size(this.#exports.ra_state_workspace(this.#at.problem), 'ra_state_workspace'),
    );
    this.#arena.commit(this.#name);
    this.#arena.writeFloats(at, state);
    return [at, workspace];
  }

  /** Rotates all rows of x, which has the shape and the layout of q. */
  rotate(x: Float32Array, inverse: boolean): Float32Array {
    this.#check();
    const { ra_rotate_workspace, ra_rotate } = this.#exports;
    const at = this.#arena.reserve(4 * x.length);
    const workspace = this.#arena.reserve(ra_rotate_workspace(this.#at.problem) >>> 0); // 0 without rotation
    this.#arena.commit(this.#name);
    this.#arena.writeFloats(at, x);
    this.#expect(ra_rotate(this.#at.problem, at, Number(inverse), workspace), 'ra_rotate');
    return this.#arena.readFloats(at, x.length);
  }

  /** Heads, rows in a head and values in a row of an array. */
  #sizes(array: ArrayName): { heads: number; length: number; width: number } {
    const { heads, kvHeads, queryLength, keyLength, headDim, valueDim } = this.geometry;
    const ofKeys = array === 'dk' || array === 'dv';
    const width = array === 'lse' ? 1 : array === 'dq' || array === 'dk' ? headDim : valueDim;
    return ofKeys ? { heads: kvHeads, length: keyLength, width } : { heads, length: queryLength, width };
  }

  #check(): void {
    if (!this.#open)
      throw new Error(`${this.#name}: this call was left: its instance was disposed or began another call`);
  }

  #size(bytes: number, what: string): number {
    const size = bytes >>> 0;
    if (size === 0) throw this.#failure(what, 0);
    return size === SIZE_OVERFLOW ? Infinity : size;
  }

  #expect(code: number, what: string): void {
    if (code !== OK) throw this.#failure(what, code);
  }

  /** Arguments were checked before: this is a fault of the package. */
  #failure(what: string, code: number): Error {
    return new Error(`${this.#name}: internal error, ${what} returned ${code}`);
  }
}
