// SPDX-License-Identifier: MIT
//
// Attention that is plain attention in pieces, by distance.
//
// Relative positions that are straight lines: ReRoPE rotates by i - j up to a window and by the window beyond, its leaky
// form by a line of smaller slope. On a piece f(i - j) = slope (i - j) + offset the rotation factorises: queries turn by slope i + offset,
// keys by slope j. So each piece is attention with plain rotation over the keys at its distances, and these are merged by their
// lse (merge.ts); gradients are those of the pieces, all by the output and lse of the whole, added up:
//
//   dS_ij = exp(s_ij - lse_i) (dout_i . v_j - dout_i . out_i)    whichever piece the pair (i, j) is in
//
// Each piece is as cheap as plain attention with a window: almost linear by a polynomial, and a band done exactly where that is
// narrow. O(N D) more for each piece. What comes out is checked as a whole, on exact rows of the map itself.
//
// Slopes that fall to both sides (`alibi` without `causal`): the keys up to a query are a causal call, those behind it are one of
// the rows in reverse order, mirrored here. -m |i - j| is linear in either, so that a state that decays serves them. With i' = Nq - 1 - i, j' = Nk - 1 - j the
// nearest key behind i is at distance 0 instead of 1: scores are m more, which lse gives back; and of the slope's gradient
//
//   -sum_ij dS_ij |i - j| = -sum_ij dS_ij (|i - j| - 1) - sum_ij dS_ij,     sum_j dS_ij = w_i dout_i . (out_i^s - out_i)
//
// for the keys j of a part s whose output is out_i^s and whose share of the weights is w_i = exp(lse_i^s - lse_i).
//
// Press, Smith, Lewis. Train short, test long (ALiBi). 2022 (2108.12409)
// Su. Rectified Rotary Position Embeddings (ReRoPE). 2023 (github.com/bojone/rerope)

import { allowedPairs, LEAST_REFUSAL, pairwiseCost, samplingCost, type Pass } from './cost.js';
import type { Kernel, Session } from './kernel.js';
import { mergeStates } from './merge.js';
import { costOf, missing, roomOf } from './planner.js';
import { Sampler, survey } from './sampling.js';
import { featuresOf, hasSides } from './scores.js';
import type { Measured } from './tally.js';
import type { BackwardResult, ForwardResult, Report, State } from './types.js';
import type { Call, Inputs, Problem } from './validate.js';

/** More of them are no lines, or not worth it. */
const MOST_PIECES = 4;

/** Distance to the line, in units of float32 rounding of the largest position: what rounding to float32 may have done to it. */
const SLACK = 1.5 * 2 ** -24;

/** Operations at peak (5e4 a microsecond) for each value that JavaScript merges, or adds; for looking at a piece, and at the whole. */
const [MERGING, LOOKING] = [800, 2e8];

/** The same for each value of sides that is mirrored, merged or added. */
const MIRRORING = 300;

/** How many times as much as counted for a side is looked at, plans and the check of the whole included. */
const LOOKS: Readonly<Record<Pass, number>> = { forward: 1.5, backward: 2 };

/** Sides are worth it below this share of exact, as they may yet miss. */
const WORTH = 0.5;

/**
 * Shares of the tolerance that a piece may take, one after another until the whole keeps it: merging outputs weighs their errors, and adds
 * that of the weights; gradients of pieces may cancel. Then all are done exactly.
 */
const SHARES: Readonly<Record<Pass, readonly number[]>> = { forward: [0.7], backward: [1, 0.3] };
/** The same of sides, whose exact pieces are dear. */
const SHARES_OF_SIDES: typeof SHARES = { forward: [0.7], backward: [0.85, 0.4] };

/** Of the tolerance of gradients, what the output that they go by may be off, relative to itself. */
const OF_STATE = 0.25;

/** Of a backward pass that needs them, the part of its progress that output and lse are. */
const FORWARD = 0.3;

const GRADIENTS = ['dq', 'dk', 'dv'] as const;

/** One of the calls that a call falls into. */
interface Piece {
  problem: Problem;
  /** Of queries and keys in reverse order, with distances less one: the keys behind each query. */
  mirrored: boolean;
}

/** What a piece is computed by. */
export interface Engines {
  kernel: Kernel;
  forward(call: Call): Generator<number, ForwardResult>;
  /** Gradients by the output and lse of the whole, unchecked. */
  part(call: Call): Generator<number, BackwardResult>;
  plan(call: Call): Generator<number, Report>;
}

/** A straight piece: f(t) = slope t + offset at the distances first .. last. */
interface Line {
  first: number;
  last: number;
  slope: number;
  offset: number;
}

/** The lines that positions lie on, in order; null when there are more than `MOST_PIECES`. `first`: the distance of entry 0. */
export function linesOf(positions: Float32Array, first: number): Line[] | null {
  const slack = SLACK * positions.reduce((largest, x) => Math.max(largest, Math.abs(x)), 0);
  const lines: Line[] = [];
  for (let start = 0, end = 0; start < positions.length; start = end) {
    if (lines.length === MOST_PIECES) return null;
    // slopes that pass all entries so far
    let [low, high] = [-Infinity, Infinity];
    for (end = start + 1; end < positions.length; end++) {
      const rise = positions[end] - positions[start];
      const [least, most] = [(rise - slack) / (end - start), (rise + slack) / (end - start)];
      if (!(Math.max(low, least) <= Math.min(high, most))) break;
      [low, high] = [Math.max(low, least), Math.min(high, most)];
    }
    const last = end - 1;
    const straight = last > start ? (positions[last] - positions[start]) / (last - start) : 0;
    const slope = Math.min(Math.max(straight, low), high);
    lines.push({ first: first + start, last: first + last, slope, offset: positions[start] - slope * (first + start) });
  }
  return lines;
}

/** The pieces of a call; null where it has none, where an option is in use that pieces do not share, or where they would not be cheaper. */
function piecesOf(problem: Problem, passes: readonly Pass[]): Piece[] | null {
  return hasSides(problem) ? sidesOf(problem, passes) : byLines(problem, passes);
}

/** Plain rotation at the distances of each line. */
function byLines(problem: Problem, passes: readonly Pass[]): Piece[] | null {
  const { relativePositions, queryLength, keyLength, queryOffset, window, method } = problem;
  const others = problem.softcap > 0 || problem.alibi || problem.bias || problem.mask || problem.sinks || problem.segments.length > 1;
  if (!relativePositions || method !== 'auto' || others) return null;

  // distances that there are, and those that may see one another
  const [nearest, farthest] = [queryOffset - keyLength + 1, queryOffset + queryLength - 1];
  const behind = problem.causal ? 0 : window[1] >= 0 ? -window[1] : nearest;
  const first = Math.max(nearest, problem.causal && window[1] >= 0 ? Math.max(0, -window[1]) : behind);
  const last = Math.min(farthest, window[0] >= 0 ? window[0] : farthest);
  if (first > last) return null;
  const lines = linesOf(relativePositions.subarray(first - nearest, last - nearest + 1), first);
  if (!lines) return null;
  const pieces = lines.map((line) => ({ problem: pieceOf(problem, line, nearest, farthest), mirrored: false }));
  const exactly = pieces.reduce((sum, piece) => sum + costOf(piece.problem, passes, null), 0);
  const beside = (pieces.length + 1) * (MERGING * valuesOf(problem) + LOOKING * passes.length);
  const pairwise = passes.reduce((sum, pass) => sum + pairwiseCost(problem, pass), 0);
  return exactly + beside < pairwise ? pieces : null;
}

/** Entries of q, k, v and the output, about. */
function valuesOf({ batch, heads, kvHeads, queryLength, keyLength, headDim, valueDim }: Problem): number {
  return batch * (heads * queryLength + kvHeads * keyLength) * (headDim + valueDim);
}

/** The keys up to each query, and those behind it. */
function sidesOf(problem: Problem, passes: readonly Pass[]): Piece[] | null {
  const { window, queryLength, keyLength, queryOffset, degree } = problem;
  const least = 2 * LOOKS[passes[passes.length - 1]] * LEAST_REFUSAL;
  if (least + mirroringCost(problem, passes) > WORTH * costOf(problem, passes, null)) return null; // short calls have no time for more
  const [past, future] = window;
  const causal = { ...problem, causal: true };
  const mirror = { ...causal, queryOffset: keyLength - queryLength - queryOffset - 1 };
  const sides: Piece[] = [{ problem: { ...causal, window: [past, -1] }, mirrored: false }];
  if (future !== 0) sides.push({ problem: { ...mirror, window: [future < 0 ? -1 : future - 1, -1] }, mirrored: true });
  const pairs = (side: Piece) => allowedPairs(side.problem);
  const pieces = sides.filter((side) => pairs(side) > 0).sort((a, b) => pairs(b) - pairs(a)); // the first one is planned first
  if (pieces.length === 0 || !areWorthIt(problem, pieces, passes, degree ?? 0)) return null;
  for (const piece of pieces) if (piece.mirrored) piece.problem = { ...piece.problem, ...mirroredPositions(problem) };
  return pieces;
}

function mirroringCost(problem: Problem, passes: readonly Pass[]): number {
  return passes.length * MIRRORING * valuesOf(problem);
}

/** Whether sides with polynomials of a degree, and all that is beside these, are cheaper than exact. */
function areWorthIt(problem: Problem, pieces: readonly Piece[], passes: readonly Pass[], degree: number): boolean {
  const pass = passes[passes.length - 1];
  const looks = (piece: Problem) => LOOKS[pass] * samplingCost(piece, pass, 1).all;
  const cost = pieces.reduce((sum, piece) => sum + costOf(piece.problem, passes, degree) + looks(piece.problem), mirroringCost(problem, passes));
  return cost < WORTH * costOf(problem, passes, null);
}

/** Where rows in reverse order turn by the same angles: at positions that rise, by frequencies of the other sign; or at those rows of the tables. */
function mirroredPositions(problem: Problem): Pick<Problem, 'queryPositions' | 'keyPositions' | 'positionBatches' | 'frequencies'> {
  const { queryLength, keyLength, queryOffset, positionBatches, tables } = problem;
  const mirrored = (given: Float64Array | null, length: number, first: number) =>
    Float64Array.from({ length: positionBatches * length }, (_, n) => {
      const i = length - 1 - (n % length);
      return (tables ? 1 : -1) * (given ? given[n - (n % length) + i] : first + i);
    });
  return {
    queryPositions: mirrored(problem.queryPositions, queryLength, queryOffset),
    keyPositions: mirrored(problem.keyPositions, keyLength, 0),
    positionBatches,
    frequencies: problem.frequencies.map((x) => -x),
  };
}

/** Plain rotation at the distances of a line. Those of a band are causal, shifted so that its first distance is 0. */
function pieceOf(problem: Problem, { first, last, slope, offset }: Line, nearest: number, farthest: number): Problem {
  const { queryOffset, queryLength, keyLength } = problem;
  const [fromBegin, toEnd] = [first === nearest, last === farthest];
  const shift = fromBegin ? (toEnd ? 0 : last) : first;
  const positions = (length: number, at: (n: number) => number) => Float64Array.from({ length }, (_, n) => at(n));
  return {
    ...problem,
    relativePositions: null,
    queryPositions: positions(queryLength, (i) => slope * (i + queryOffset) + offset),
    keyPositions: positions(keyLength, (j) => slope * j),
    positionBatches: 1,
    causal: !fromBegin,
    queryOffset: queryOffset - shift,
    window: fromBegin ? [toEnd ? -1 : 0, -1] : [toEnd ? -1 : last - first, -1],
  };
}

/** Arrays of a call with rows in reverse order, those of q, k, v and dOutput made once. */
class Mirror {
  readonly #problem: Problem;
  readonly #known = new Map<'q' | 'k' | 'v' | 'dOutput', Float32Array>();

  constructor(problem: Problem) {
    this.#problem = problem;
  }

  /** What computes a piece of a call with these inputs. */
  call({ problem, mirrored }: Piece, inputs: Inputs): Call {
    if (!mirrored) return { problem, inputs };
    const once = (name: 'q' | 'k' | 'v' | 'dOutput', flipped: () => Float32Array) => {
      const known = this.#known.get(name) ?? flipped();
      this.#known.set(name, known);
      return known;
    };
    const { q, k, v, dOutput, output, lse } = inputs;
    return {
      problem,
      inputs: {
        q: once('q', () => this.#queries(q, problem.headDim)),
        k: once('k', () => this.#keys(k, problem.headDim)),
        v: v && once('v', () => this.#keys(v, problem.valueDim)),
        dOutput: dOutput && once('dOutput', () => this.#queries(dOutput, problem.valueDim)),
        output: output && this.#queries(output, problem.valueDim),
        lse: lse && this.#lse(lse, 1),
      },
    };
  }

  /** The output and lse of a mirrored piece as parts of those of the call. */
  state({ output, lse }: State): State {
    return { output: this.#queries(output, this.#problem.valueDim), lse: this.#lse(lse, -1) };
  }

  gradients({ dq, dk, dv }: Pick<BackwardResult, 'dq' | 'dk' | 'dv'>): Pick<BackwardResult, 'dq' | 'dk' | 'dv'> {
    const { headDim, valueDim } = this.#problem;
    return { dq: this.#queries(dq, headDim), dk: this.#keys(dk, headDim), dv: this.#keys(dv, valueDim) };
  }

  #queries(x: Float32Array, dim: number): Float32Array {
    return this.#flipped(x, this.#problem.heads, this.#problem.queryLength, dim);
  }

  #keys(x: Float32Array, dim: number): Float32Array {
    return this.#flipped(x, this.#problem.kvHeads, this.#problem.keyLength, dim);
  }

  #flipped(x: Float32Array, heads: number, length: number, dim: number): Float32Array {
    const { batch, layout } = this.#problem;
    return layout === 'bnhd' ? inReverse(x, batch, length, heads * dim) : inReverse(x, batch * heads, length, dim);
  }

  /** Distances of a mirrored piece are less by one, and its scores more by a slope. */
  #lse(lse: Float32Array, sign: number): Float32Array {
    const { batch, heads, queryLength, alibi } = this.#problem;
    const flipped = inReverse(lse, batch * heads, queryLength, 1);
    for (let r = 0; r < flipped.length; r++) flipped[r] += sign * alibi![Math.floor(r / queryLength) % heads];
    return flipped;
  }
}

/** x [groups][length][width], the last row of each group first. */
function inReverse(x: Float32Array, groups: number, length: number, width: number): Float32Array {
  const y = new Float32Array(x.length);
  for (let group = 0; group < groups; group++) {
    for (let i = 0; i < length; i++) {
      const [from, to] = [(group * length + i) * width, (group * length + length - 1 - i) * width];
      for (let d = 0; d < width; d++) y[to + d] = x[from + d];
    }
  }
  return y;
}

/**
 * Plans of pieces from which it is seen that they are worth it, null where they are not: none for lines, which always are; for sides that of the first one.
 */
function* plansOf(
  pieces: readonly Piece[],
  { problem, inputs }: Call,
  passes: readonly Pass[],
  mirror: Mirror,
  { plan }: Engines,
): Generator<number, Report[] | null> {
  if (!hasSides(problem)) return [];
  const first = yield* within(plan(mirror.call(pieces[0], inputs)), 0, 0);
  return first.degree !== null && areWorthIt(problem, pieces, passes, first.degree) ? [first] : null;
}

/** The forward pass by pieces, null when there are none. Where they are out of tolerance together they are done more exactly. */
export function* forwardByPieces(
  name: string,
  call: Call,
  engines: Engines,
  notes: readonly string[] = [],
): Generator<number, ForwardResult | null> {
  const start = performance.now();
  const { problem, inputs } = call;
  const pieces = piecesOf(problem, ['forward']);
  if (!pieces) return null;
  const mirror = new Mirror(problem);
  const mine = shared(problem, pieces, 'forward', notes);
  if (notes.length === 0 && !(yield* plansOf(mine, call, ['forward'], mirror, engines))) return null;
  const { state, reports } = yield* stateOf(problem, mine, inputs, mirror, engines);
  const measured = areExact(reports) ? null : yield* checkWhole(name, { problem, inputs: { ...inputs, ...state } }, engines.kernel, null);
  const miss = missOf(problem, measured, 'forward');
  if (miss !== null) return yield* forwardByPieces(name, call, engines, [...notes, miss]);
  const report = reportOf(problem, pieces, reports, 'forward', measured, notes);
  report.milliseconds = performance.now() - start;
  yield 1;
  return { ...state, report };
}

/** The backward pass, likewise. Where output and lse are not those of the whole, pieces compute them by the degrees of their gradients. */
export function* backwardByPieces(
  name: string,
  call: Call,
  engines: Engines,
  notes: readonly string[] = [],
): Generator<number, BackwardResult | null> {
  const start = performance.now();
  const { problem, inputs } = call;
  const passes: Pass[] = inputs.output ? ['backward'] : ['forward', 'backward'];
  const pieces = piecesOf(problem, passes);
  if (!pieces) return null;
  const mirror = new Mirror(problem);
  const mine = shared(problem, pieces, 'backward', notes);
  const plans = notes.length === 0 ? yield* plansOf(mine, call, passes, mirror, engines) : [];
  if (!plans) return null;
  const given = notes.length === 0 ? yield* givenState(name, call, engines.kernel) : null; // after a miss they may be to blame
  const planned = given ? mine : yield* withDegrees(mine, plans, mirror, inputs, engines);
  const own = given ? null : yield* within(stateOf(problem, planned, inputs, mirror, engines), 0, FORWARD);
  const { output, lse } = given ?? own!.state;
  const whole = { problem, inputs: { ...inputs, output, lse } };
  const reports: Report[] = [];
  let sum: BackwardResult | null = null;
  for (const [n, piece] of planned.entries()) {
    const [from, to] = [n, n + 1].map((m) => (given ? 0 : FORWARD) + (given ? 1 : 1 - FORWARD) * (m / pieces.length));
    const result: BackwardResult = yield* within(engines.part(mirror.call(piece, whole.inputs)), from, to);
    const part: BackwardResult = piece.mirrored ? { ...result, ...mirror.gradients(result) } : result;
    if (piece.mirrored) {
      const state = own?.parts[n] ?? mirror.state(yield* within(engines.forward(mirror.call(piece, inputs)), to, to));
      addDistance(problem, whole.inputs, state, part.dAlibi!);
    }
    reports.push(part.report);
    if (sum) for (const array of [...GRADIENTS, 'dAlibi'] as const) add(sum[array], part[array]);
    else sum = part;
  }
  const exact = own !== null && areExact([...reports, ...own.reports]);
  const measured = exact ? null : yield* checkWhole(name, whole, engines.kernel, sum);
  const miss = missOf(problem, measured, 'backward');
  const again = given ? ', by the given output and lse, which were computed again' : '';
  if (miss !== null) return yield* backwardByPieces(name, call, engines, [...notes, miss + again]);
  const report = reportOf(problem, pieces, reports, 'backward', measured, notes);
  for (const { flops, bytes } of own?.reports ?? []) {
    report.flops += flops;
    report.bytes = Math.max(report.bytes, bytes);
  }
  report.milliseconds = performance.now() - start;
  yield 1;
  return { ...sum!, report };
}

/** Pieces with what their plans take, those that are known and others, by which output and lse are computed as well. */
function* withDegrees(
  pieces: readonly Piece[],
  known: readonly Report[],
  mirror: Mirror,
  inputs: Inputs,
  { plan }: Engines,
): Generator<number, Piece[]> {
  const planned: Piece[] = [];
  for (const [n, piece] of pieces.entries()) {
    const { method, degree } = known[n] ?? (yield* within(plan(mirror.call(piece, inputs)), 0, 0));
    planned.push({ ...piece, problem: { ...piece.problem, ...(method === 'exact' ? { method } : { degree }) } });
  }
  return planned;
}

/** What the distance that a mirrored piece lacks gives to the gradient of each slope: less the sum of dS over its pairs. */
function addDistance({ batch, heads, queryLength, valueDim, layout }: Problem, whole: Inputs, part: State, dAlibi: Float32Array): void {
  const [dOutput, output, lse] = [whole.dOutput!, whole.output!, whole.lse!];
  for (let head = 0; head < heads; head++) {
    let sum = 0;
    for (let b = 0; b < batch; b++) {
      for (let i = 0; i < queryLength; i++) {
        const row = (b * heads + head) * queryLength + i;
        if (part.lse[row] === -Infinity) continue;
        const at = valueDim * (layout === 'bnhd' ? (b * queryLength + i) * heads + head : row);
        let inner = 0;
        for (let d = at; d < at + valueDim; d++) inner += dOutput[d] * (part.output[d] - output[d]);
        sum += Math.exp(part.lse[row] - lse[row]) * inner;
      }
    }
    dAlibi[head] -= sum;
  }
}

/** Output and lse of the whole, from those of its pieces. */
function* stateOf(
  { layout, heads, queryLength }: Problem,
  pieces: readonly Piece[],
  inputs: Inputs,
  mirror: Mirror,
  { forward }: Engines,
): Generator<number, { state: State; parts: State[]; reports: Report[] }> {
  const [parts, reports]: [State[], Report[]] = [[], []];
  for (const [n, piece] of pieces.entries()) {
    const { output, lse, report } = yield* within(forward(mirror.call(piece, inputs)), n / pieces.length, (n + 1) / pieces.length);
    parts.push(piece.mirrored ? mirror.state({ output, lse }) : { output, lse });
    reports.push(report);
  }
  const state = mergeStates(parts, layout === 'bnhd' ? { layout, shape: { heads, queryLength } } : {});
  return { state, parts, reports };
}

/** What `plan` says of a call that falls into pieces; null of others. */
export function* planByPieces(call: Call, engines: Engines): Generator<number, Report | null> {
  const { problem, inputs } = call;
  const pass: Pass = inputs.dOutput ? 'backward' : 'forward';
  const passes: Pass[] = pass === 'backward' ? ['forward', 'backward'] : ['forward'];
  const pieces = piecesOf(problem, passes);
  if (!pieces) return null;
  const mirror = new Mirror(problem);
  const mine = shared(problem, pieces, pass);
  const reports = yield* plansOf(mine, call, passes, mirror, engines);
  if (!reports) return null;
  for (const piece of mine.slice(reports.length)) reports.push(yield* engines.plan(mirror.call(piece, inputs)));
  return planOfPieces(problem, pieces, reports, pass);
}

/** From the plans of each; the errors of a whole are not known before it is there. */
function planOfPieces(problem: Problem, pieces: readonly Piece[], reports: readonly Report[], pass: Pass): Report {
  const report = reportOf(problem, pieces, reports, pass, null, []);
  const times = reports.map(({ milliseconds }) => milliseconds);
  if (!times.includes(null)) report.milliseconds = times.reduce((sum: number, one) => sum + (one ?? 0), 0);
  return report;
}

/** Pieces as they are to be computed after so many misses (`notes`); exactly where errors must be proved. */
function shared(problem: Problem, pieces: readonly Piece[], pass: Pass, notes: readonly string[] = []): Piece[] {
  const { guarantee, tolerance } = problem;
  const share = (hasSides(problem) ? SHARES_OF_SIDES : SHARES)[pass][notes.length];
  const how = guarantee === 'certified' || share === undefined ? { method: 'exact' as const } : { tolerance: share * tolerance };
  return pieces.map((piece) => ({ ...piece, problem: { ...piece.problem, ...how } }));
}

/** The output and lse that were given, where they are accurate enough for gradients. */
function* givenState(name: string, call: Call, kernel: Kernel): Generator<number, State | null> {
  const { output, lse } = call.inputs;
  if (!output || !lse) return null;
  const { relative } = yield* sampled(name, call, kernel, 'backward', (sampler) => sampler.check('forward', call.problem.tolerance));
  return relative <= OF_STATE * call.problem.tolerance ? { output, lse } : null;
}

const areExact = (reports: readonly Report[]) => reports.every(({ method }) => method === 'exact');

/** Compares what pieces gave, output and lse or gradients, with exact rows of the map. */
function* checkWhole(name: string, call: Call, kernel: Kernel, gradients: BackwardResult | null): Generator<number, Measured> {
  const pass = gradients ? 'backward' : 'forward';
  return yield* sampled(name, call, kernel, pass, (sampler, session) => {
    if (gradients) for (const array of GRADIENTS) session.place(array, gradients[array]);
    return sampler.check(pass, call.problem.tolerance);
  });
}

/** Looks at rows of the whole. */
function* sampled<T>(
  name: string,
  { problem, inputs }: Call,
  kernel: Kernel,
  pass: Pass,
  look: (sampler: Sampler, session: Session) => Generator<number, T>,
): Generator<number, T> {
  const session = kernel.open(name, problem, featuresOf(problem));
  try {
    session.load(inputs, pass, 0);
    return yield* look(new Sampler(session, yield* survey(session), problem.seed), session);
  } finally {
    session.close();
  }
}

function missOf({ tolerance }: Problem, measured: Measured | null, pass: Pass): string | null {
  const room = roomOf(pass, 'check', { outliers: null });
  if (measured === null || measured.upper <= room * tolerance) return null;
  return `a try before had ${missing(measured, 'sampled', room)}`;
}

function reportOf(
  problem: Problem,
  pieces: readonly Piece[],
  reports: readonly Report[],
  pass: Pass,
  measured: Measured | null,
  notes: readonly string[],
): Report {
  const largest = (of: (report: Report) => number | null) => Math.max(...reports.map((report) => of(report) ?? 0));
  const polynomial = reports.some(({ method }) => method === 'polynomial');
  const outliers = (of: 'queries' | 'keys') => largest((report) => report.outliers?.[of] ?? 0);
  const parts = reports.map(({ method, degree }, n) => {
    const engine = method === 'exact' ? method : `${method} of degree ${degree}`;
    return hasSides(problem) ? `keys ${pieces[n].mirrored ? 'behind' : 'up to'} each query ${engine}` : `${rangeOf(pieces[n].problem, problem)} ${engine}`;
  });
  const error = measured ? [`sampled error ${measured.error.toExponential(1)} within ${problem.tolerance}`] : [];
  const lines = `relativePositions are ${pieces.length} straight line${pieces.length > 1 ? 's' : ''}, each a plain rotation`;
  const what = hasSides(problem) ? 'alibi falls to both sides' : lines;
  return {
    method: polynomial ? 'polynomial' : 'exact',
    degree: polynomial ? largest(({ degree }) => degree) : null,
    rank: polynomial ? largest(({ rank }) => rank) : null,
    outliers: polynomial ? { queries: outliers('queries'), keys: outliers('keys') } : null,
    entryBound: largest(({ entryBound }) => entryBound),
    scoreBound: largest(({ scoreBound }) => scoreBound),
    errorBound: null,
    errorEstimate: measured && measured.error,
    gradientErrorEstimate: pass === 'backward' && measured ? measured.error : null,
    relativeErrorEstimate: measured && measured.relative,
    flops: reports.reduce((sum, { flops }) => sum + flops, 0),
    bytes: largest(({ bytes }) => bytes),
    milliseconds: null,
    reason: [`${what}: ${parts.join(', ')}`, ...error, ...notes].join('; '),
  };
}

/** The distances i + queryOffset - j of a piece, in words. */
function rangeOf({ queryOffset, window, causal }: Problem, whole: Problem): string {
  const shift = whole.queryOffset - queryOffset;
  if (!causal) return window[0] < 0 ? 'everywhere' : `up to ${shift}`;
  return window[0] < 0 ? `from ${shift} on` : `${shift} to ${shift + window[0]}`;
}

/** The steps of a part, as a share of the whole; 1 is for the very end of all. */
function within<T>(steps: Generator<number, T>, from: number, to: number): Generator<number, T> {
  return mapped(steps, (fraction) => Math.min(from + (to - from) * fraction, 0.999));
}

/** The same without steps back, which another try would take. */
export function rising<T>(steps: Generator<number, T>): Generator<number, T> {
  let most = 0;
  return mapped(steps, (fraction) => (most = Math.max(most, fraction)));
}

function* mapped<T>(steps: Generator<number, T>, by: (fraction: number) => number): Generator<number, T> {
  try {
    for (;;) {
      const step = steps.next();
      if (step.done) return step.value;
      yield by(step.value);
    }
  } finally {
    steps.return(undefined as T); // when this is left half done, so are they
  }
}

function add(sum: Float32Array | undefined, part: Float32Array | undefined): void {
  for (let n = 0; sum && part && n < sum.length; n++) sum[n] += part[n];
}
