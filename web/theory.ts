// SPDX-License-Identifier: MIT
//
// The arithmetic behind the choice between the exact and the polynomial engine: how many features a degree needs, which
// degree a tolerance needs, what each engine costs, and from which length and up to which entry size the polynomial one wins.
// Closed forms, for teaching and for the planner; nothing here looks at data.
//
//   exact        O(N^2 D) operations, any scores;
//   polynomial   O(N rank Dv), rank = C(D + g, g), scores within [-S, S] where a polynomial of degree g is close to exp.
//
// The papers' statement (Alman, Song 2023, arXiv 2302.13214; with RoPE 2025, arXiv 2505.11892; gradients arXiv 2412.17316v3):
// with head size O(log n) and entries below o(sqrt(log n)) attention takes n^(1+o(1)) operations, and with entries above
// order sqrt(log n) it cannot be done in n^(2-e) for any e > 0 unless SETH fails. `frontier` puts numbers to it.

import { batchesOf, blocksOf, rank, termsAndReal } from './blocks.js';
import { MAX_DEGREE, minimax, TURNOVER } from './polynomial.js';
import type { Options, Shape } from './types.js';

export { rank };

/**
 * Terms of the Toeplitz engine: the monomials of degree 0 to g in the variables that a score is the sum of, each with one Toeplitz
 * matrix.
 *
 *   rotation that factorises    headDim variables x_d y_d:                  C(D + g, g)
 *   general W_t                 one for each place of its support:         C(|S| + g, g)
 *   rotation by any f(i - j)    for each pair of dimensions a complex number z and its conjugate, for others x_d y_d: headDim
 *                               variables. A monomial and its conjugate add up to a real number, so that one of them is enough:
 *                               (C(D + g, g) + those that are their own conjugates) / 2
 *
 * A monomial is its own conjugate when it has every z as often as its conjugate: with P pairs and R other dimensions there are
 * sum over m of C(P - 1 + m, m) C(R + g - 2m, R), m being half of its degree in the pairs.
 *
 * @param args.rotaryDim dimensions that `relativePositions` rotate.
 * @param args.places |S| of `relative`, its support's length / 2.
 */
export function terms(args: { headDim: number; degree: number; rotaryDim?: number; places?: number }): number {
  return termsAndReal(args).count;
}

/**
 * Complex Fourier transforms of the Toeplitz engine, for each key/value head (each query head where heads have a bias of their own):
 * how many, and of how many numbers, S. Sequences are cut into blocks of S, each filled up to 2 S, which is two transforms of S
 * (src/convolution.h):
 *
 *   columns     two for each block of queries and of keys, each term and each column of values, with one of ones; two columns are one
 *               complex one where terms are real, four terms go together. Backward as many again, of the gradients
 *   matrices    two for each diagonal of blocks: of the one matrix that all terms share, four diagonals together, or of each term's own;
 *               backward as many again where there is a gradient by the matrices
 *
 * Those that fill up four are counted. Masks leave some of the matrices out, and where no pair is 64 or more apart all are done exactly,
 * without any.
 *
 * @param args.rotaryDim, args.places as for `terms`: the map that gives each term a matrix of its own, if any.
 * @param args.bias whether there is one; its gradient is made with the others.
 */
export function transforms(args: {
  queryLength: number;
  keyLength?: number;
  headDim: number;
  valueDim?: number;
  degree: number;
  rotaryDim?: number;
  places?: number;
  bias?: boolean;
  pass: 'forward' | 'backward';
}): { count: number; length: number } {
  const { queryLength, keyLength = queryLength, headDim, valueDim = headDim, rotaryDim = 0, places, bias = false } = args;
  const { rows, columns, block } = blocksOf({ queryLength, keyLength });
  const { groups, batches } = batchesOf(termsAndReal(args), valueDim);
  const backward = args.pass === 'backward';
  const diagonals = rows + columns - 1;
  const matrices = rotaryDim > 0 || places !== undefined ? groups * diagonals : Math.ceil(diagonals / 4);
  const ofColumns = batches * (rows + columns) * (backward ? 2 : 1);
  const ofMatrices = matrices * (backward && (bias || places !== undefined) ? 2 : 1);
  return { count: 2 * 4 * (ofColumns + ofMatrices), length: block };
}

/**
 * The error of attention's output when every weight exp(s_j) is replaced by exp(s_j) (1 + e_j) with |e_j| <= t < 1, at most:
 *
 *   |out^ - out| <= 2 (1 - sqrt(1 - t^2)) / t * max_j |v_j - c|,     c any centre, the midrange being the best one.
 *
 * Derivation. Let w_j be the softmax weights and take v_j in [-1, 1] (c = 0, half range 1). Then
 * out^ - out = sum w_j (1 + e_j) v_j / sum w_j (1 + e_j) - sum w_j v_j. It is linear in each v_j and monotone in each e_j
 * (a ratio of linear functions), so it is largest at corners: v_j = 1 with e_j = t on some keys, of total weight a, and
 * v_j = -1 with e_j = -t on the others. There it is
 *
 *   f(a) = 4 a (1 - a) t / (1 - t + 2 a t).
 *
 * With u = 1 - t + 2 a t, the sum of the changed weights, f = (2 - u - (1 - t^2) / u) / t, largest at u = sqrt(1 - t^2).
 * The bound is attained (two keys are enough), grows from t (1 + t^2/4 + ...) at small t to 2 at t = 1, and with
 * t = sin(y) reads 2 tan(y / 2).
 *
 * @param t the relative error of the polynomial on the scores, 0 or more (`minimax`); from 1 on the answer is Infinity, as
 *   weights may then vanish or be negative.
 */
export function certifiedBound(t: number): number {
  return t < 1 ? (2 * t) / (1 + Math.sqrt(1 - t * t)) : Infinity;
}

/** The relative error t that a polynomial may have for `certifiedBound(t)` to be the tolerance: its inverse, 4 x / (4 + x^2). */
function admissible(tolerance: number): number {
  return tolerance < 2 ? (4 * tolerance) / (4 + tolerance * tolerance) : 1;
}

/**
 * The smallest degree whose certified output error is within the tolerance when no |score| exceeds `scoreBound`:
 * certifiedBound(minimax(degree, scoreBound).error) <= tolerance.
 *
 * @param args.tolerance in units of max |v - c|, as for `forward`; positive.
 * @param args.scoreBound S: scores lie in [-S, S] (after centring; `scoreBound`, or a report's).
 * @returns the degree, or null where none up to 8, with float32 coefficients, will do.
 */
export function degreeFor(args: { tolerance: number; scoreBound: number }): number | null {
  for (let degree = 0; degree <= MAX_DEGREE; degree++) {
    if (certifiedBound(minimax(degree, args.scoreBound).error) <= args.tolerance) return degree;
  }
  return null;
}

/**
 * The largest |score| that entries within [-B, B] allow, whatever their signs and the rotation (which keeps norms): queries
 * and keys have norms up to sqrt(D) B, so |scale q.k| <= |scale| D B^2; and with the mean of the rotated keys subtracted, as
 * the polynomial engine does, keys have norms below 2 sqrt(D) B, so the bound doubles. The papers' scale is 1/D and their
 * bound B^2.
 *
 * @param args.entryBound B = max |entry| of q and k.
 * @param args.scale default 1/sqrt(headDim).
 * @param args.centred false leaves the doubling out. Default true.
 */
export function scoreBound(args: { headDim: number; entryBound: number; scale?: number; centred?: boolean }): number {
  const { headDim, entryBound, scale = 1 / Math.sqrt(headDim), centred = true } = args;
  return Math.abs(scale) * headDim * entryBound ** 2 * (centred ? 2 : 1);
}

/** Sizes and pass of `cost`: the fields of a `Shape`, spread. */
export interface CostArgs extends Shape {
  method: 'exact' | 'polynomial';
  /** Of the polynomial; required for it. */
  degree?: number;
  causal?: boolean;
  queryOffset?: number;
  window?: Options['window'];
  segments?: Options['segments'];
  /** Slopes, when there are some. */
  alibi?: Options['alibi'] | null;
  pass: 'forward' | 'backward';
}

/**
 * Useful floating-point operations (a multiply-add counts two) of one call, the products only:
 *
 *   exact       forward    2 (D + Dv) pairs                   S = q k^T and out = P v
 *               backward   2 (3 D + 2 Dv) pairs               S again, dP = dout v^T, dv, dq, dk
 *   polynomial  forward    2 rank (Dv + 1) (Nk kvHeads + Nq heads) batch       the state, and its use
 *               backward   2 rank (Dv + 1) (3 Nk kvHeads + 2 Nq heads) batch   state, its use, its gradient; dphi(k), dv
 *
 * where pairs counts the allowed (query, key) pairs of all heads. In a window that is limited to the left keys leave the state
 * again, and in the backward pass queries its gradient: as many rows more, and a quarter of them for making sums anew. With
 * alibi every query head has a state of its own, so that kvHeads is heads, and the backward pass a second one: Nk + Nq rows
 * more. What the engines spend besides (features, exponentials, the exact edges of the polynomial engine under a causal mask or
 * a window, about 32 keys for each query) is not counted.
 *
 * @throws RangeError for the polynomial without a degree.
 */
export function cost(args: CostArgs): number {
  const { batch = 1, heads, kvHeads = heads, queryLength, keyLength = queryLength, headDim, valueDim = headDim } = args;
  const backward = args.pass === 'backward';
  if (args.method === 'exact') {
    const perPair = backward ? 2 * (3 * headDim + 2 * valueDim) : 2 * (headDim + valueDim);
    return perPair * batch * heads * pairs(args);
  }
  if (args.degree === undefined) throw new RangeError('cost: method polynomial needs a degree, got undefined');
  const [keys, queries] = [keyLength * (args.alibi ? heads : kvHeads), queryLength * heads];
  const moment = args.alibi && backward ? keys + queries : 0;
  const rows = (backward ? 3 * keys + 2 * queries : keys + queries) + moment;
  const leaving = leavingShare(args) * (1 + 1 / TURNOVER) * (backward ? keys + queries : keys);
  return 2 * rank(headDim, args.degree) * (valueDim + 1) * (rows + leaving) * batch;
}

/** Keys that the window of the last query has left behind, as a share of all. */
function leavingShare({ queryLength, keyLength = queryLength, queryOffset = 0, window = [-1, -1] }: PairArgs): number {
  const [left] = window;
  return left < 0 ? 0 : Math.min(Math.max(queryLength + queryOffset - left, 0), keyLength) / keyLength;
}

/** What decides about pairs. */
export type PairArgs = Pick<Shape, 'queryLength' | 'keyLength'> &
  Pick<Options, 'causal' | 'queryOffset' | 'window' | 'segments'>;

/**
 * Allowed (query, key) pairs of one head: all Nq Nk, or those with -right <= i + queryOffset - j <= left, causal being
 * right = 0: sum_i clamp(i + queryOffset + right + 1, 0, Nk) - clamp(i + queryOffset - left, 0, Nk), in closed form. Segments
 * are problems of their own that add up.
 */
export function pairs(args: PairArgs): number {
  const { queryLength, keyLength = queryLength, causal = false, queryOffset = 0, window = [-1, -1] } = args;
  const { segments = [0] } = args;
  if (segments.length > 1) {
    const inside = (position: number, length: number) => Math.min(Math.max(position, 0), length);
    let sum = 0;
    for (let n = 0; n < segments.length; n++) {
      const [start, end] = [n === 0 ? -Infinity : segments[n], segments[n + 1] ?? Infinity];
      const [query, key] = [inside(start - queryOffset, queryLength), inside(start, keyLength)];
      sum += pairs({
        queryLength: inside(end - queryOffset, queryLength) - query,
        keyLength: inside(end, keyLength) - key,
        causal,
        queryOffset: query + queryOffset - key,
        window,
      });
    }
    return sum;
  }
  // 1 + 2 + ... + n; the sum of max(x, 0) over x = a + 1 .. a + Nq is then triangle(a + Nq) - triangle(a).
  const triangle = (n: number) => (Math.max(n, 0) * (Math.max(n, 0) + 1)) / 2;
  const sum = (a: number) => triangle(a + queryLength) - triangle(a);
  /** Pairs with j <= i + queryOffset + ahead; no numbers beyond those at which this is all of them, or none. */
  const upTo = (ahead: number) => {
    const a = Math.min(Math.max(queryOffset + ahead, -queryLength), keyLength);
    return sum(a) - sum(a - keyLength);
  };
  const [left, right] = window;
  const whole = causal ? upTo(0) : right < 0 ? queryLength * keyLength : upTo(right);
  return left < 0 ? whole : whole - upTo(-left - 1);
}

/** Sizes of `crossover`: one length for queries and keys. */
export interface CrossoverArgs {
  headDim: number;
  /** Default headDim. */
  valueDim?: number;
  degree: number;
  causal?: boolean;
  /** `both` is a training step: forward and backward. */
  pass: 'forward' | 'backward' | 'both';
  /** Query heads for each key/value head, heads / kvHeads. Default 1. */
  group?: number;
  /** Operations per second of the polynomial engine over those of the exact one. Default 1. */
  speed?: number;
}

/**
 * The smallest length N = Nq = Nk at which the polynomial engine costs less than the exact one. By `cost` it grows as the
 * rank: N = 2 rank (Dv + 1) / (2 Dv) for an ungrouped full forward pass with Dv = D, twice that when causal.
 */
export function crossover(args: CrossoverArgs): number {
  const { headDim, valueDim = headDim, degree, causal = false, group = 1, speed = 1 } = args;
  const passes: CostArgs['pass'][] = args.pass === 'both' ? ['forward', 'backward'] : [args.pass];
  const at = (method: 'exact' | 'polynomial') =>
    passes
      .map((pass) => cost({ method, degree, pass, heads: group, kvHeads: 1, queryLength: 1, headDim, valueDim }))
      .reduce((sum, operations) => sum + operations, 0);
  // Costs at length 1 are the costs of a pair and of a row: exact is a * pairs, polynomial b * N / speed.
  const ratio = at('polynomial') / speed / at('exact');
  // pairs = N^2 > ratio N, or N (N + 1) / 2 > ratio N.
  return Math.max(1, Math.floor(causal ? 2 * ratio - 1 : ratio) + 1);
}

/**
 * The largest entry size B, entries of q and k in [-B, B], at which a polynomial with a certified error within the tolerance
 * is cheaper than exact attention, full forward pass, Nq = Nk = length. Where the papers say "B = o(sqrt(log n))", this is
 * the curve for real sizes and constants: every degree that is affordable at this length (`crossover`) is tried, the widest
 * interval of scores on which it is certified found, and turned into B by `scoreBound`.
 *
 * @param args.scale default 1/sqrt(headDim); the papers' is 1/headDim.
 * @param args.causal default false.
 * @returns `entryBound` B, the `degree` that reaches it and the `scoreBound` S of its interval; 0, null, 0 where no degree
 *   is cheaper.
 */
export function frontier(args: { tolerance: number; headDim: number; length: number; scale?: number; causal?: boolean }): {
  entryBound: number;
  degree: number | null;
  scoreBound: number;
} {
  const { tolerance, headDim, length, causal = false } = args;
  const perSquare = scoreBound({ ...args, entryBound: 1 });
  const t = admissible(tolerance);
  let best: ReturnType<typeof frontier> = { entryBound: 0, degree: null, scoreBound: 0 };
  for (let degree = 0; degree <= MAX_DEGREE; degree++) {
    if (crossover({ headDim, degree, causal, pass: 'forward' }) > length) break;
    // The error grows with the radius: bisect. No float32 polynomial is certified at radius 16.
    let [radius, beyond] = [0, 16];
    for (let step = 0; step < 40; step++) {
      const middle = (radius + beyond) / 2;
      if (minimax(degree, middle).error <= t) radius = middle;
      else beyond = middle;
    }
    if (radius > best.scoreBound) best = { entryBound: Math.sqrt(radius / perSquare), degree, scoreBound: radius };
  }
  return best;
}

/**
 * The papers' threshold B = sqrt(log n) (natural logarithm, constant 1): entries of smaller order allow almost linear time,
 * entries of larger order do not. For scores q.k / D and D of order log n.
 */
export function paperBound(length: number): number {
  return Math.sqrt(Math.log(length));
}

/**
 * The papers' count of the degree: a polynomial within `error` of exp on [0, B] needs the degree
 *
 *   Theta(max(B, log(1/e) / log(log(1/e) / B)))       (Aggarwal, Alman 2022, arXiv 2205.06249; B >= 1)
 *
 * returned here without the constant that Theta hides, as a real number: a growth curve, not a choice of degree (`degreeFor` is
 * that). The inner logarithm is kept at 1 or more: where log(1/e) is below a constant times B the first term decides.
 */
export function optimalDegree(args: { scoreBound: number; error: number }): number {
  const digits = Math.log(1 / args.error);
  return Math.max(args.scoreBound, digits / Math.max(1, Math.log(digits / args.scoreBound)));
}
