// SPDX-License-Identifier: MIT
//
// The public types. Shapes are [batch, heads, length, dim], row-major (`layout` exchanges heads and length); N is a length, D
// the head size, Dv the value size.

/** Sizes of one call. Lengths and dimensions count elements; all are positive integers. */
export interface Shape {
  /** Default 1. */
  batch?: number;
  /** Query heads. */
  heads: number;
  /** Key/value heads; query head h reads key/value head floor(h * kvHeads / heads). Divides `heads`. Default `heads`. */
  kvHeads?: number;
  queryLength: number;
  /** Default `queryLength`. */
  keyLength?: number;
  /** D, 1 to 1024. */
  headDim: number;
  /** Dv, 1 to 1024. Default `headDim`. */
  valueDim?: number;
}

/** Positions, one for each row of one batch, or of all batches one after the other. Finite. */
export type Positions =
  | readonly number[]
  | Float32Array
  | Float64Array
  | Int8Array
  | Uint8Array
  | Int16Array
  | Uint16Array
  | Int32Array
  | Uint32Array;

/** Rotary position embedding (Su et al. 2021): pair p of a vector at position m turns by m * base^(-2p/dim) radians. */
export interface Rotary {
  /** Default 10000. Positive. */
  base?: number;
  /** Dimensions that rotate, the first ones of the head; even, 0 to headDim. Default headDim (headDim must be even then). */
  dim?: number;
  /** Pairs are (p, p + dim/2) when false (Llama, NeoX), (2p, 2p + 1) when true (GPT-J). Default false. */
  interleaved?: boolean;
  /** Radians per position, one for each pair, instead of `base` (not both): dim/2 finite numbers. */
  frequencies?: Float32Array;
  /** How a model that was trained on short sequences reads long ones: other frequencies from `base`. */
  scaling?: RotaryScaling;
  /**
   * cos and sin of pair p at position m, entry [m dim/2 + p] of each, instead of all these. Positions are row numbers then:
   * integers from 0 on, below the number of rows. Gradients, and `inverse`, turn by -sin.
   */
  tables?: { cos: Float32Array; sin: Float32Array };
  /** Where the queries are, [queryLength] or [batch, queryLength], instead of i + queryOffset; of the rotation, not of masks. */
  queryPositions?: Positions;
  /** Where the keys are, [keyLength] or [batch, keyLength], instead of j; not for `rotate`. */
  keyPositions?: Positions;
}

/**
 * Frequencies for sequences longer than those of the training, with the names and formulas that model configurations use
 * (`rope_scaling`); see scaling.ts. Factors are at least 1 and lengths count positions.
 */
export type RotaryScaling =
  | {
      /** Positions divided by `factor` (Chen et al. 2023). */
      type: 'linear';
      factor: number;
    }
  | {
      /** A larger base for sequences longer than `originalLength` (bloc97, emozilla 2023). */
      type: 'dynamic';
      factor: number;
      originalLength: number;
      /** Of the sequence; it decides how much. Default: the largest position of the call plus one. */
      length?: number;
    }
  | {
      /** High frequencies stay, low ones are divided by `factor`, a ramp in between (Peng et al. 2023). */
      type: 'yarn';
      factor: number;
      originalLength: number;
      /** On rotated queries and keys. Default 0.1 ln(factor) + 1, or by `mscale`. */
      attentionFactor?: number;
      /** Turns over `originalLength` from which a frequency stays. Default 32. */
      betaFast?: number;
      /** Turns below which it is divided. Default 1. */
      betaSlow?: number;
      /** With `mscaleAllDim`, instead of `attentionFactor`: the ratio of 0.1 m ln(factor) + 1 for the one and the other. */
      mscale?: number;
      mscaleAllDim?: number;
      /** Ends of the ramp at whole pairs. Default true. */
      truncate?: boolean;
    }
  | {
      /** A divisor for each pair, one list up to `originalLength` and one beyond (Ding et al. 2024). */
      type: 'longrope';
      /** dim/2 positive numbers each. */
      shortFactor: readonly number[] | Float32Array | Float64Array;
      longFactor: readonly number[] | Float32Array | Float64Array;
      originalLength: number;
      /** Longest length over `originalLength`: attentionFactor is sqrt(1 + ln(factor) / ln(originalLength)). One of the two is needed. */
      factor?: number;
      attentionFactor?: number;
      /** Of the sequence; it decides between the lists. Default: the largest position of the call plus one. */
      length?: number;
    }
  | {
      /** Wavelengths up to originalLength / highFrequencyFactor stay, those from originalLength / lowFrequencyFactor on are multiplied. */
      type: 'llama3';
      factor: number;
      lowFrequencyFactor: number;
      highFrequencyFactor: number;
      originalLength: number;
    };

/** Where rows are: [batch, heads, length, dim], or [batch, length, heads, dim] as projections leave them. */
export type Layout = 'bhnd' | 'bnhd';

/**
 * All compute the same function at different cost and error. `exact`: O(N^2 D). `polynomial`: O(N rank Dv), for scores of rotated
 * queries and keys alone, and when causal `alibi` (under 'auto' also to both sides), or a `bias` that is a sum of a few decays far away. `toeplitz`: the same features
 * and Fourier transforms, O(N rank Dv log N), with any `bias`, any `window` and any relative map.
 */
export type Method = 'auto' | 'exact' | 'polynomial' | 'toeplitz';

/** `certified`: the bound is proved, from norms or from the mean square of all scores. `sampled`: the error is measured on exact rows of a seeded sample, or proved where that is cheaper. */
export type Guarantee = 'certified' | 'sampled';

/**
 * Scores scale * q_i W_{i-j} k_j^T, the general form of arXiv 2505.11892: every W_t is headDim x headDim and has entries in the same
 * few places (a, b), so that s_ij = scale * sum_n q_i[a_n] weights[n, i - j + keyLength - 1] k_j[b_n].
 */
export interface RelativeMap {
  /** [places, 2]: a and b of each place, below headDim. What is named twice adds up. */
  support: Uint32Array;
  /** [places, queryLength + keyLength - 1]; gradient `dWeights`. Finite, where masks forbid as well. */
  weights: Float32Array;
}

/** What to compute; the same for `forward`, `backward` and `plan` (and, but for `layout`, `attentionLoss`). */
export interface Options {
  shape: Shape;
  /** `false`: no rotation. Default `{}`. */
  rotary?: false | Rotary;
  /** Factor on the scores, up to 2.3e38 in size; may be negative. Default 1/sqrt(headDim). */
  scale?: number;
  /** Key j is allowed for query i when j <= i + queryOffset. Default false. */
  causal?: boolean;
  /** Position of query 0 (key 0 is at position 0); an integer of 32 bits, queryOffset + queryLength too. Default 0. */
  queryOffset?: number;
  /** Key j is allowed for query i when -right <= i + queryOffset - j <= left; -1: no limit on that side. Default [-1, -1]. */
  window?: readonly [left: number, right: number];
  /**
   * Packed sequences: the position at which each begins, ascending from 0, the last one open-ended. A query sees keys of its
   * own segment only; query i is at i + queryOffset, before 0 in the first. Equal positions make an empty segment.
   */
  segments?: Uint32Array | readonly number[];
  /** Of q, k, v, dOutput, output and their gradients; lse is [batch, heads, queryLength] always. Default 'bhnd'. */
  layout?: Layout;
  /** Scores s become softcap * tanh(s / softcap), before what follows. From 1e-30 to 1e30. */
  softcap?: number;
  /**
   * ALiBi: slopes m, [heads], from 0 to 1e19. Scores have m |i + queryOffset - j| subtracted. With `causal` the polynomial
   * engine takes it too, in a state that decays: a state for each query head, also where heads share keys.
   */
  alibi?: Float32Array;
  /**
   * Added to scores by distance: [queryLength + keyLength - 1], entry [i - j + keyLength - 1], the same for all heads, or
   * heads times that. Together with `mask`, below -3.4e29 forbids and above 2.3e38 overflows. With `causal` the polynomial engine takes a smooth one: where
   * exp(bias), from distance 64, 128 or 256 on, is a sum of at most 8 decaying exponentials within a third of the tolerance.
   */
  bias?: Float32Array;
  /**
   * For each pair, [queryLength, keyLength] or as `maskShape` says: added to scores (Float32Array; -Infinity, and all below
   * -3.4e29, forbids), or 0 where forbidden (Uint8Array). Keys and values that are forbidden must still be finite.
   */
  mask?: Float32Array | Uint8Array;
  /** Sizes of `mask`; 1 where all batches, heads or queries have the same. Default [1, 1, queryLength, keyLength]. */
  maskShape?: readonly [batch: number, heads: number, queryLength: number, keyLength: number];
  /** Attention sinks: one more key for each head, of this score and of value zero; [heads], finite. lse counts it. */
  sinks?: Float32Array;
  /**
   * The rotation between query i and key j is by entry [i - j + keyLength - 1] of these queryLength + keyLength - 1 numbers instead
   * of i + queryOffset - j (ReRoPE and its kin); masks stay. Finite. Not with rotary.tables or positions of rows. Numbers on at most
   * four straight lines, one after another, are plain rotations in pieces, which `method: 'auto'` computes one by one.
   */
  relativePositions?: Float32Array;
  /** Instead of a rotation (`rotary` is false or absent): any matrices with few entries, one for each i - j. */
  relative?: RelativeMap;
  /** Default 'auto': the cheapest engine that meets the tolerance. */
  method?: Method;
  /**
   * forward: max |output - exact| <= tolerance * max |v - c|, c the midrange of each value column.
   * backward: |dX - exact|_F <= tolerance * |dX|_F for each of dq, dk, dv. Default 1e-3, at least 1e-6.
   *
   * A sampled error has to leave room for rows that are not in the sample: a polynomial runs if it is predicted within 0.7
   * of the tolerance (gradients 0.66) and its result stands if it is measured within 0.75 (0.72), of both 0.6 beside outliers. Of
   * gradients that includes what chance may hide; where chance decides, more rows are drawn, once.
   */
  tolerance?: number;
  /** Default 'sampled'. Of gradients there is no certificate: under 'auto' 'certified' computes them exactly, by the output and lse that are given, if any; a forced polynomial is a RangeError. */
  guarantee?: Guarantee;
  /** Degree of the polynomial, 0 to 8, instead of the planner's choice; with `method: 'polynomial'`, 'toeplitz' or 'auto'. */
  degree?: number;
  /** Seed of the sampled rows, an unsigned 32-bit integer. Default 0. */
  seed?: number;
  /**
   * A forced method that misses the tolerance, or the room in it that a sampled error may take (see `tolerance`): 'error' (default)
   * throws a RangeError that names both, 'report' returns the result as it is, with the miss in its reason.
   */
  onMiss?: 'error' | 'report';
  /** Look for NaN and infinity in q, k, v, dOutput and relative.weights first: a RangeError that names the array and the place. Default false. */
  checkFinite?: boolean;
}

export interface ForwardArgs extends Options {
  /** [batch, heads, queryLength, headDim] */
  q: Float32Array;
  /** [batch, kvHeads, keyLength, headDim] */
  k: Float32Array;
  /** [batch, kvHeads, keyLength, valueDim] */
  v: Float32Array;
}

export interface BackwardArgs extends ForwardArgs {
  /** Gradient of the loss by the output, [batch, heads, queryLength, valueDim]. */
  dOutput: Float32Array;
  /**
   * What `forward` returned; with `lse` it spares a forward pass. Both or neither. `auto` looks at a few rows and computes anew what is
   * wrong, but for calls of some 150 us and where sampled rows do not know an option; the report says when it did not look.
   */
  output?: Float32Array;
  lse?: Float32Array;
  /** The same as one object, the result of `forward` as it is, instead of `output` and `lse`. */
  saved?: State & { report?: Report };
}

export interface PlanArgs extends Options {
  q: Float32Array;
  k: Float32Array;
  /** With v, the plan is the one that `forward` follows; without, errors are stated for the worst values. */
  v?: Float32Array;
  /** With dOutput (and v), the plan is the one that `backward` follows when it is given no output and lse. */
  dOutput?: Float32Array;
}

export interface RotateArgs {
  /** [batch, heads, queryLength, headDim] of `shape`. */
  x: Float32Array;
  shape: Shape;
  rotary?: false | Rotary;
  /** Position of row 0. Default 0. */
  queryOffset?: number;
  /** Of x. Default 'bhnd'. */
  layout?: Layout;
  /** Rotate back. Default false. */
  inverse?: boolean;
}

/** Sizes of `attentionLoss`. */
export interface LossShape extends Shape {
  /** d, the size of a token: columns of a1, a2, a3, rows of x1, x2, y. Default heads * headDim. */
  modelDim?: number;
}

/**
 * The papers' training problem (arXiv 2402.04497, 2412.17316): tokens, weights, target. One head and one batch are theirs, with
 * their scale being 1/headDim. The rows of q = a1 x1, k = a2 x2 and v = a3 y hold all heads, head after head.
 */
export interface AttentionLossArgs extends Omit<Options, 'shape' | 'layout'> {
  shape: LossShape;
  /** Tokens of the queries, [batch, queryLength, modelDim]. */
  a1: Float32Array;
  /** Tokens of the keys and of the values, [batch, keyLength, modelDim]; in self-attention all three are the same. */
  a2: Float32Array;
  a3: Float32Array;
  /** Weights: [modelDim, heads * headDim], [modelDim, kvHeads * headDim], [modelDim, kvHeads * valueDim]. */
  x1: Float32Array;
  x2: Float32Array;
  y: Float32Array;
  /** What the output should be, [batch, queryLength, heads * valueDim]. */
  e: Float32Array;
}

export interface AttentionLossResult {
  /** 1/2 |output - e|_F^2, over all heads and batches. */
  loss: number;
  /** Gradients of the loss by x1, x2 and y. */
  dx1: Float32Array;
  dx2: Float32Array;
  dy: Float32Array;
  /** As of `backward`; there when `bias`, `alibi`, `sinks`, `relative` are. */
  dBias?: Float32Array;
  dAlibi?: Float32Array;
  dSinks?: Float32Array;
  dWeights?: Float32Array;
  /** The forward pass: output [batch, queryLength, heads * valueDim], lse, and its report. */
  saved: ForwardResult;
  /** Of the backward pass. */
  report: Report;
}

/** What a call did and how sure it is. */
export interface Report {
  method: 'exact' | 'polynomial' | 'toeplitz';
  /** Degree of the polynomial; null for exact. */
  degree: number | null;
  /** Features per row, C(D + degree, degree), or terms of a relative map (`theory.terms`); null for exact. */
  rank: number | null;
  /** Queries and keys of each key/value head that are done exactly beside the polynomial, all scores of theirs; null for exact. */
  outliers: { queries: number; keys: number } | null;
  /** max |entry| of q and k: the papers' B. */
  entryBound: number;
  /**
   * A number that no |score| exceeds, before softcap, bias and mask, once the mean key is subtracted, and the mean
   * query where queries have much in common (Cauchy-Schwarz); scores of `outliers` apart.
   */
  scoreBound: number;
  /** Proved bound of a polynomial's output error, in units of max |v - c|; null when there is none, for gradients, for exact. */
  errorBound: number | null;
  /**
   * Error measured on sampled exact rows, in the units of `tolerance`: of the output in `forward`, of the gradients in `backward`
   * (`plan`: predicted); null when nothing was sampled, as where `errorBound` alone shows that the tolerance is kept.
   */
  errorEstimate: number | null;
  /**
   * The largest of the relative Frobenius errors of dq, dk and dv, each on its sampled rows (`plan`: that of dq, predicted), and
   * where decaying states stand for a bias that of dBias at sampled distances; null in `forward` and when nothing was sampled.
   */
  gradientErrorEstimate: number | null;
  /** Relative Frobenius error of the output (backward: of dq, dk, dv together) on the same rows; null when nothing was sampled. */
  relativeErrorEstimate: number | null;
  /** Useful floating-point operations of the engine; `backward` without output and lse counts its forward pass too. */
  flops: number;
  /** Bytes of WebAssembly memory that the call needs. */
  bytes: number;
  /** Wall time of the call, or for `plan` the predicted cost of the chosen engine (null before any call has set a rate). */
  milliseconds: number | null;
  /** One sentence: why this method. */
  reason: string;
}

/** Attention over some keys, in the form that `mergeStates` can join with attention over others. */
export interface State {
  /** [batch, heads, queryLength, valueDim] */
  output: Float32Array;
  /**
   * log sum_j exp(s_ij), [batch, heads, queryLength]; -Infinity where nothing is allowed. `tolerance` is of the output: a polynomial
   * whose weights are all off by one factor has the right output and another lse.
   */
  lse: Float32Array;
}

export interface ForwardResult extends State {
  report: Report;
}

export interface BackwardResult {
  /** The shape of q. */
  dq: Float32Array;
  /** The shape of k. */
  dk: Float32Array;
  /** The shape of v. */
  dv: Float32Array;
  /** The shape of bias, summed over batches (and heads, where they share it); there when `bias` is. */
  dBias?: Float32Array;
  /** The shape of alibi, summed over batches; there when `alibi` is. */
  dAlibi?: Float32Array;
  /** The shape of sinks, summed over batches; there when `sinks` are. */
  dSinks?: Float32Array;
  /** The shape of relative.weights, summed over batches and heads; there when `relative` is. */
  dWeights?: Float32Array;
  report: Report;
}

/** What a streaming state is for. Everything is fixed for its life. */
export interface StateOptions {
  /** As in `Shape`, without lengths. */
  shape: Omit<Shape, 'queryLength' | 'keyLength'>;
  /** Without `queryPositions` and `keyPositions`: `append` and `attend` take a position. Default `{}`. */
  rotary?: false | Rotary;
  /** Default 1/sqrt(headDim). */
  scale?: number;
  /** Of all arrays. Default 'bhnd'. */
  layout?: Layout;
  /**
   * The largest |score| that the polynomial is made for, above 0: |scale| |q| |k|, times the square of an attention factor, of no
   * pair may exceed it.
   */
  scoreBound: number;
  /**
   * Of the output, in units of max |v| over all keys: the proved error of the polynomial, which decides the degree; the bound in
   * the reports has float32 rounding as well. Default 1e-3, at least 1e-6.
   */
  tolerance?: number;
  /** 0 to 8, instead of the least that keeps a tolerance; not beside one. */
  degree?: number;
  /**
   * Queries whose scores may exceed `scoreBound`, sums beyond float32, products far below it, and here a `degree` that keeps no error at all: 'error'
   * (default) throws a RangeError, 'report' attends as well as it goes.
   */
  onMiss?: 'error' | 'report';
  /** What `serialize` gave, of a state with the same options; the new state has its keys. */
  from?: Uint8Array;
}

/** Tokens for a state, n of them. */
export interface AppendArgs {
  /** [batch, kvHeads, n, headDim]; finite. */
  k: Float32Array;
  /** [batch, kvHeads, n, valueDim]; finite. */
  v: Float32Array;
  /** Of the first token, for the rotation. Default: the one after the last token, 0 at first. */
  position?: number;
}

export interface AttendArgs {
  /** [batch, heads, n, headDim]; finite. */
  q: Float32Array;
  /** Of the first query, for the rotation. Default: the queries are those of the last n tokens; 0 where these are fewer. */
  position?: number;
}

/**
 * The polynomial engine's summary of a sequence: rank x (valueDim + 1) numbers for each key/value head, however long the
 * sequence is. Tokens come one at a time or in any pieces; queries attend to all keys that have come.
 */
export interface AttentionState {
  /** Keys so far. */
  readonly length: number;
  /** Degree of the polynomial, and its features per row, C(D + degree, degree). */
  readonly degree: number;
  readonly rank: number;
  /** Bytes of the state; they do not grow. */
  readonly bytes: number;
  /** O(n rank valueDim) for each key/value head. @throws RangeError for values that are not finite: they would stay for ever. */
  append(args: AppendArgs): void;
  /** O(n rank valueDim) for each head. `report.errorBound` is in units of max |v|. @throws RangeError, see `onMiss`. */
  attend(args: AttendArgs): ForwardResult;
  /** The keys of another state with the same options, from any instance, join; that one stays as it is. */
  merge(other: AttentionState): void;
  /** A copy of everything but the options, for `createState({ ..., from })`, here or on another machine. */
  serialize(): Uint8Array;
}

/** Where the WebAssembly comes from when not from the package itself. */
export type WasmSource = string | URL | ArrayBuffer | ArrayBufferView | Response | WebAssembly.Module;

export interface CreateOptions {
  /** Default: the bytes that the package carries. An address may be of the scheme file: in Node. */
  wasm?: WasmSource | Promise<WasmSource>;
  /** 'auto' (default): by a probe; with `wasm`, whatever that is. true, false: this binary or a RangeError. */
  relaxedSimd?: 'auto' | boolean;
  /** Upper limit of the WebAssembly memory; default and maximum 4 GiB. A call that needs more is a RangeError. */
  maxMemoryBytes?: number;
}

/** An instance: one WebAssembly memory, synchronous calls. */
export interface RopeAttention {
  /** The binary that was chosen. */
  readonly simd: 'simd128' | 'relaxed-simd';
  /** Bytes of WebAssembly memory held now, those of the largest call so far; 0 after `dispose`. */
  readonly memoryBytes: number;
  forward(args: ForwardArgs): ForwardResult;
  backward(args: BackwardArgs): BackwardResult;
  rotate(args: RotateArgs): Float32Array;
  plan(args: PlanArgs): Report;
  /**
   * 1/2 |softmax attention of a1 x1, a2 x2, a3 y - e|_F^2 and its gradients, through any engine: what it takes besides attention
   * is linear in the lengths. `tolerance` is that of both passes: of the output, and of the gradients by a1 x1, a2 x2, a3 y for the
   * residual output - e as it was computed. Where the output is close to e, an error of the output is large beside the residual.
   */
  attentionLoss(args: AttentionLossArgs): AttentionLossResult;
  /** An empty state, or that of `from`, which works with the memory of this instance. */
  createState(options: StateOptions): AttentionState;
  /** Frees the memory; every later call throws an Error that says so. May be called again. */
  dispose(): void;
}

/** For the calls of the worker. */
export interface RemoteControls {
  /** Stops the call, also while it computes; its promise rejects with the signal's reason. */
  signal?: AbortSignal;
  /** Called with the fraction done, 0 to 1, about every 50 ms. What it throws ends the call. */
  onProgress?: (fraction: number) => void;
}

export interface CreateWorkerOptions {
  /** Address of the package's `dist/worker.js`. Default: beside this module. */
  url?: string | URL;
  /** As for createRopeAttention, but not a Response. */
  wasm?: string | URL | ArrayBuffer | ArrayBufferView | WebAssembly.Module;
  relaxedSimd?: 'auto' | boolean;
  maxMemoryBytes?: number;
}

/** The calls of RopeAttention but createState, as promises, off the main thread. Arguments are copied, never detached. */
export interface RemoteRopeAttention {
  readonly simd: 'simd128' | 'relaxed-simd';
  forward(args: ForwardArgs & RemoteControls): Promise<ForwardResult>;
  backward(args: BackwardArgs & RemoteControls): Promise<BackwardResult>;
  rotate(args: RotateArgs & RemoteControls): Promise<Float32Array>;
  plan(args: PlanArgs & RemoteControls): Promise<Report>;
  attentionLoss(args: AttentionLossArgs & RemoteControls): Promise<AttentionLossResult>;
  /** Ends the worker; calls under way reject. */
  dispose(): void;
}
