// SPDX-License-Identifier: MIT
//
// Relative positions that are straight lines in pieces: ReRoPE rotates by i - j up to a window and by the window beyond, its leaky
// form by a line of smaller slope. On a piece f(i - j) = slope (i - j) + offset the rotation factorises: queries turn by slope i + offset,
// keys by slope j. So each piece is attention with plain rotation over the keys at its distances, and these are merged by their
// lse (merge.ts); gradients are those of the pieces, all by the output and lse of the whole, added up:
//
//   dS_ij = exp(s_ij - lse_i) (dout_i . v_j - dout_i . out_i)    whichever piece the pair (i, j) is in
//
// Each piece is as cheap as plain attention with a window: almost linear by a polynomial, and a band done exactly where that is
// narrow. O(N D) more for each piece. What comes out is checked as a whole, on exact rows of the map itself.
//
// Su. Rectified Rotary Position Embeddings (ReRoPE). 2023 (github.com/bojone/rerope)

import { pairwiseCost, type Pass } from './cost.js';
import type { Kernel, Session } from './kernel.js';
import { mergeStates } from './merge.js';
import { costOf, missing, roomOf } from './planner.js';
import { Sampler, survey } from './sampling.js';
import type { Measured } from './tally.js';
import type { BackwardResult, ForwardResult, Report, State } from './types.js';
import type { Call, Problem } from './validate.js';

/** More of them are no lines, or not worth it. */
const MOST_PIECES = 4;

/** Distance to the line, in units of float32 rounding of the largest position: what rounding to float32 may have done to it. */
const SLACK = 1.5 * 2 ** -24;

/** Operations at peak (5e4 a microsecond) for each value that JavaScript merges, or adds; for looking at a piece, and at the whole. */
const [MERGING, LOOKING] = [800, 2e8];

/**
 * Shares of the tolerance that a piece may take, one after another until the whole keeps it: merging outputs weighs their errors, and adds
 * that of the weights; gradients of pieces may cancel. Then all are done exactly.
 */
const SHARES: Readonly<Record<Pass, readonly number[]>> = { forward: [0.7], backward: [1, 0.3] };

/** Of the tolerance of gradients, what the output that they go by may be off, relative to itself. */
const OF_STATE = 0.25;

/** Of a backward pass that needs them, the part of its progress that output and lse are. */
const FORWARD = 0.3;

const GRADIENTS = ['dq', 'dk', 'dv'] as const;

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

/**
 * The problems that a call falls into: plain rotation at the distances of each piece. null where positions do not lie on a few lines,
 * where an option is in use that pieces do not share, or where it would not be cheaper.
 */
export function piecesOf(problem: Problem, passes: readonly Pass[]): Problem[] | null {
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
  const pieces = lines.map((line) => pieceOf(problem, line, nearest, farthest));
  const values = problem.batch * (problem.heads * queryLength + problem.kvHeads * keyLength) * (problem.headDim + problem.valueDim);
  const exactly = pieces.reduce((sum, piece) => sum + costOf(piece, passes, null), 0);
  const beside = (pieces.length + 1) * (MERGING * values + LOOKING * passes.length);
  const pairwise = passes.reduce((sum, pass) => sum + pairwiseCost(problem, pass), 0);
  return exactly + beside < pairwise ? pieces : null;
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

/** The forward pass by pieces, null when there are none. Where they are out of tolerance together they are done more exactly. */
export function* forwardByPieces(
  name: string,
  call: Call,
  engines: Engines,
  notes: readonly string[] = [],
): Generator<number, ForwardResult | null> {
  const { problem, inputs } = call;
  const pieces = piecesOf(problem, ['forward']);
  if (!pieces) return null;
  const start = performance.now();
  const { state, reports } = yield* stateOf(problem, shared(problem, pieces, 'forward', notes), inputs, engines);
  const measured = yield* checkWhole(name, { problem, inputs: { ...inputs, ...state } }, engines.kernel, reports, null);
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
  const { problem, inputs } = call;
  const pieces = piecesOf(problem, inputs.output ? ['backward'] : ['forward', 'backward']);
  if (!pieces) return null;
  const start = performance.now();
  const planned: Problem[] = [];
  for (const piece of shared(problem, pieces, 'backward', notes)) {
    const { method, degree } = yield* within(engines.plan({ problem: piece, inputs }), 0, 0);
    planned.push(method === 'exact' ? { ...piece, method } : { ...piece, degree });
  }
  const given = yield* givenState(name, call, engines.kernel);
  const own = given ? null : yield* within(stateOf(problem, planned, inputs, engines), 0, FORWARD);
  const { output, lse } = given ?? own!.state;
  const whole = { problem, inputs: { ...inputs, output, lse } };
  const reports: Report[] = [];
  let sum: BackwardResult | null = null;
  for (const [n, piece] of planned.entries()) {
    const [from, to] = [n, n + 1].map((m) => (given ? 0 : FORWARD) + (given ? 1 : 1 - FORWARD) * (m / pieces.length));
    const part: BackwardResult = yield* within(engines.part({ problem: piece, inputs: whole.inputs }), from, to);
    reports.push(part.report);
    if (sum) for (const array of GRADIENTS) add(sum[array], part[array]);
    else sum = part;
  }
  const all = own ? [...reports, ...own.reports] : reports;
  const measured = yield* checkWhole(name, whole, engines.kernel, all, sum);
  const miss = missOf(problem, measured, 'backward');
  if (miss !== null) return yield* backwardByPieces(name, call, engines, [...notes, miss]);
  const report = reportOf(problem, pieces, reports, 'backward', measured, notes);
  for (const { flops, bytes } of own?.reports ?? []) {
    report.flops += flops;
    report.bytes = Math.max(report.bytes, bytes);
  }
  report.milliseconds = performance.now() - start;
  yield 1;
  return { ...sum!, report };
}

/** Output and lse of the whole, from those of its pieces. */
function* stateOf(
  { layout, heads, queryLength }: Problem,
  pieces: readonly Problem[],
  inputs: Call['inputs'],
  { forward }: Engines,
): Generator<number, { state: State; reports: Report[] }> {
  const results: ForwardResult[] = [];
  for (const [n, problem] of pieces.entries()) {
    results.push(yield* within(forward({ problem, inputs }), n / pieces.length, (n + 1) / pieces.length));
  }
  const state = mergeStates(results, layout === 'bnhd' ? { layout, shape: { heads, queryLength } } : {});
  return { state, reports: results.map(({ report }) => report) };
}

/** What `plan` says of pieces, from the plans of each; the errors of a whole are not known before it is there. */
export function planOfPieces(problem: Problem, pieces: readonly Problem[], reports: readonly Report[], pass: Pass): Report {
  const report = reportOf(problem, pieces, reports, pass, null, []);
  const times = reports.map(({ milliseconds }) => milliseconds);
  if (!times.includes(null)) report.milliseconds = times.reduce((sum: number, one) => sum + (one ?? 0), 0);
  return report;
}

/** Pieces as they are to be computed after so many misses (`notes`); exactly where errors must be proved. */
export function shared(
  { guarantee, tolerance }: Problem,
  pieces: readonly Problem[],
  pass: Pass,
  notes: readonly string[] = [],
): Problem[] {
  const share = SHARES[pass][notes.length];
  if (guarantee === 'certified' || share === undefined) return pieces.map((piece) => ({ ...piece, method: 'exact' }));
  return pieces.map((piece) => ({ ...piece, tolerance: share * tolerance }));
}

/** The output and lse that were given, where they are accurate enough for gradients. */
function* givenState(name: string, call: Call, kernel: Kernel): Generator<number, State | null> {
  const { output, lse } = call.inputs;
  if (!output || !lse) return null;
  const { relative } = yield* sampled(name, call, kernel, 'backward', (sampler) => sampler.check('forward', call.problem.tolerance));
  return relative <= OF_STATE * call.problem.tolerance ? { output, lse } : null;
}

/** Compares what pieces gave, output and lse or gradients, with exact rows of the map; null when all of them are exact. */
function* checkWhole(
  name: string,
  call: Call,
  kernel: Kernel,
  reports: readonly Report[],
  gradients: BackwardResult | null,
): Generator<number, Measured | null> {
  if (reports.every(({ method }) => method === 'exact')) return null;
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
  const session = kernel.open(name, problem, 'toeplitz');
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
  pieces: readonly Problem[],
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
    return `${rangeOf(pieces[n], problem)} ${engine}`;
  });
  const error = measured ? [`sampled error ${measured.error.toExponential(1)} within ${problem.tolerance}`] : [];
  const lines = `relativePositions are ${pieces.length} straight line${pieces.length > 1 ? 's' : ''}, each a plain rotation`;
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
    reason: [`${lines}: ${parts.join(', ')}`, ...error, ...notes].join('; '),
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

function add(sum: Float32Array, part: Float32Array): void {
  for (let n = 0; n < sum.length; n++) sum[n] += part[n];
}
