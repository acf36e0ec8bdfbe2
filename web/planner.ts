// SPDX-License-Identifier: MIT
//
// The choice: which engines to try, in order, and why. Cheapest first by the cost model of cost.ts, among the polynomials
// that meet the tolerance by proof (certificate.ts) or by prediction (sampling.ts); the exact engine always closes the list
// of `method: 'auto'`. What runs is checked again afterwards (attention.ts), so a wrong prediction costs time, never accuracy.

import { certifyHead, certifySpread, hasSpread, queryGain, scoreRadius } from './certificate.js';
import {
  columnsCost,
  cost,
  countable,
  DISTANCE_OF_GRADIENTS,
  exactFlops,
  LEAST_REFUSAL,
  NO_OUTLIERS,
  outliersCost,
  PLAN,
  polynomialFlops,
  portionCost,
  prepareCost,
  rankCost,
  SAMPLE_ROWS,
  samplingCost,
  spreadCost,
  toeplitzFlops,
  trialCost,
  type OutlierCounts,
  type Pass,
} from './cost.js';
import type { Bounds, Session } from './kernel.js';
import { choicesOf, rank, splitOff, type Choice, type Ranking, type Split } from './outliers.js';
import { MAX_DEGREE, minimax, tangent, unbiased } from './polynomial.js';
import { Sampler, survey } from './sampling.js';
import { featuresOf, foreignTo, hasSides, type Features } from './scores.js';
import { worse, type Measured } from './tally.js';
import type { Problem } from './validate.js';

/** One engine to try: exact, or a polynomial with its error as far as it is known before the run. */
export interface Attempt {
  /** null: exact. */
  degree: number | null;
  /** Those to run, in order: without 'forward' gradients go by the output and lse that were given. */
  passes: readonly Pass[];
  /** [heads][degree + 1]; null where they are still to be fitted, and for exact. */
  coefficients: Float32Array | null;
  /** Proved bound of the output error; null when there is none or when it was not asked for. */
  bound: number | null;
  /** The bound keeps the tolerance of a call that asked for no proof: nothing is sampled, before or after the run. */
  proved: boolean;
  predicted: Measured | null;
  /** The degree of the weights of dv. */
  dvDegree: number;
  /** So cheap that it may run without a closer look. */
  trial: boolean;
  /** Rows that are exact beside the polynomial; all of them ordinary for exact. */
  split: Split;
}

export interface Plan {
  /** Not empty. */
  attempts: readonly Attempt[];
  /** Why the polynomials are on the list, or why there are none: the middle of the report's sentence. */
  because: string;
  /** What a polynomial may have taken, as Session.spent, by the time that it must be known to do. */
  budget: number;
}

/** What the plan is for. `passes`: those that have to run as far as the call goes, in order; the last one is the call's. */
export interface Task {
  name: string;
  problem: Problem;
  pass: Pass;
  passes: readonly Pass[];
  hasValues: boolean;
  /** Predict the error of a forced degree too, although the run will measure it. */
  predict: boolean;
  /** One piece of a call: gradients by the output and lse of the whole, whose check is that of the piece. */
  part: boolean;
}

/**
 * Shares of the tolerance that sampled errors may take before and after the run: a sample does not see the worst row, and
 * sampled columns of gradients are taken with the lse and output that the polynomial gave.
 */
const ROOM = { forward: { pilot: 0.7, check: 0.75 }, backward: { pilot: 0.66, check: 0.72 } } as const;

/** Of that, beside outliers, where errors differ more from row to row. */
const BESIDE = 0.6;

/** Of that, before the run of gradients: only dq is predicted, and with outliers the error of dk may be larger. */
const ONLY_DQ = 1 / 3;

/**
 * Shares of the exact engine's cost that may be lost: to all that is done before it is found that it must run; of that to a polynomial
 * that runs and misses, without having been looked at closely; to rows of the output and lse that were given; and to making heads ready for that.
 */
const [LOSS, LOSS_KEYS, TRIAL_RUN, GIVEN, GIVEN_HEADS] = [0.078, 0.015, 0.03, 0.004, 0.03];

/** And to rows of these that a polynomial is likely to have wrong. */
const LOOK_CLOSELY = { always: 0.003, most: 0.01 } as const;

/** Of the same for a look at the next degree after one that ran and missed: it is so much better that it nearly always will do. */
const LOSS_NEXT = 0.02;

/** So far below what would do mean squares of scores are guessed where there is no time to be wrong. */
const LIKELY = 1.25;

/**
 * Shares that more rows may take where chance decides about a polynomial: of what goes on to the next engine would cost, and, once it ran, of
 * exact, if that is left.
 */
const [SPARED, LOSS_MORE] = [0.5, 0.02];

/** Polynomials below this share of exact are about as good as one another, where time is short. */
const ALIKE = 0.05;

/** Any look at given output and lse takes up to 9 us, in operations as cost.ts counts them; more than so much of exact would show. */
const [LOOK, SHOWS] = [6e5, 0.06];

/** Rows of given output and lse that are looked at: of a head, and of all. */
const GIVEN_ROWS = { least: 2, most: 4 * SAMPLE_ROWS };

/** Polynomials with outliers are looked for where one would save a fifth, three times at most, as long as there is time. */
const [GAIN, TRIALS] = [0.8, 3];

/** The radius of all scores over that of typical ones: from here on a few rows are likely to be in the way of all others. */
const STANDS_OUT = 3;
/** And an error of all rows that is guessed so many times too large is out of the question. */
const HOPELESS = 4;

/** Guesses of an error are off by this factor now and then: the first find is to be safe, what may be cheaper yet is not. */
const [SAFE, SLACK] = [1 / 3, 2];

/** Sampled errors from this on say only that the polynomial fails; others are about `TYPICAL` times below `worstCase`. */
const [FAILED, TYPICAL] = [0.5, 400];

/** Bytes of workspace that an engine needs for all passes of a task; Infinity for more terms than it can count. */
export function workspaceOf(session: Session, passes: readonly Pass[], degree: number | null): number {
  if (degree !== null && session.features === 'toeplitz' && !countable(session.geometry, degree)) return Infinity;
  return Math.max(...passes.map((pass) => session.workspaceBytes(pass, degree)));
}

/**
 * Where the degree is free, gradients are to be near exact ones, and need not be the derivative of a forward pass: those of q and k have
 * weights of degree g - 1, by the derivative of p, and so does dv.
 */
function dvDegree(problem: Problem, degree: number | null): number {
  const free = problem.degree === null && problem.guarantee === 'sampled' && featuresFor(problem) === 'polynomial';
  return Math.max(0, (degree ?? 0) - Number(free));
}

/** Costs of a pass without outliers that were asked for before: a short call should not count its pairs ten times. */
const costs = new WeakMap<Problem, Map<number, number>>();
const features = new WeakMap<Problem, Features>();

/** As `featuresOf`, likewise. */
function featuresFor(problem: Problem): Features {
  let known = features.get(problem);
  if (!known) features.set(problem, (known = featuresOf(problem)));
  return known;
}

export function costOf(problem: Problem, passes: readonly Pass[], degree: number | null, outliers = NO_OUTLIERS): number {
  let known = costs.get(problem);
  if (!known) costs.set(problem, (known = new Map()));
  let all = 0;
  for (const pass of passes) {
    const name = 2 * (degree ?? -1) + Number(pass === 'forward');
    let found = known.get(name);
    if (found === undefined) known.set(name, (found = cost(problem, pass, degree, featuresFor(problem), dvDegree(problem, degree))));
    all += outliers === NO_OUTLIERS ? found : found + outliersCost(problem, pass, outliers);
  }
  return all;
}

export function flopsOf(
  problem: Problem,
  passes: readonly Pass[],
  degree: number | null,
  outliers: OutlierCounts,
  dvDegree: number,
): number {
  const flops = (pass: Pass) => {
    if (degree === null) return exactFlops(problem, pass);
    if (featuresFor(problem) === 'toeplitz') return toeplitzFlops(problem, pass, degree);
    return polynomialFlops(problem, pass, degree, outliers, dvDegree);
  };
  return passes.reduce((sum, pass) => sum + flops(pass), 0);
}

/**
 * Decides. Yields 0 between steps.
 *
 * @throws RangeError when a forced `method` with features cannot be served: inputs that are not finite, or no degree that meets the
 *   tolerance (unless `onMiss` is 'report').
 */
export function* choose(session: Session, task: Task): Generator<number, Plan> {
  const { name, problem, pass } = task;
  const bounds = yield* survey(session);
  const split: Split = { outliers: null, bounds, sampler: new Sampler(session, bounds, problem.seed) };
  const exact = attempt(task, null, split);
  const budget = budgetOf(session, task);
  const exactly = (because: string): Plan => ({ attempts: [exact], because, budget });

  if (problem.method === 'exact') return exactly('as asked');
  const foreign = foreignTo(featuresFor(problem), problem);
  if (foreign.length > 0) {
    const map = problem.relative || problem.relativePositions ? ', whose scores do not factorise' : '';
    const sides = hasSides(problem) ? ', and none is cheaper for the keys on either side of the queries' : '';
    return exactly(`no polynomial has ${foreign.join(' or ')}${map}${sides}`);
  }
  if (!bounds.every((one) => one.finite === 1)) {
    if (problem.method !== 'auto')
      throw new RangeError(`${name}: method '${problem.method}' needs finite inputs, found NaN or infinity`);
    return exactly('the inputs hold NaN or infinity, which no polynomial stands');
  }
  // -Infinity forbids
  if (problem.bias?.some((value) => !(value < Infinity))) {
    if (problem.method !== 'auto')
      throw new RangeError(`${name}: method '${problem.method}' needs a bias below Infinity, found NaN or Infinity`);
    return exactly('bias holds NaN or Infinity, which no Fourier transform stands');
  }
  if (problem.relative && !Number.isFinite(problem.relative.gain)) {
    if (problem.method !== 'auto')
      throw new RangeError(`${name}: method '${problem.method}' needs finite relative.weights, found NaN or Infinity`);
    return exactly('relative.weights hold NaN or Infinity, which no Fourier transform stands');
  }
  const degrees = candidates(session, task);
  const most =
    degrees.length === 0
      ? GAIN * costOf(problem, task.passes, null)
      : costOf(problem, task.passes, degrees[0]) + samplingCost(problem, pass, 1).all;
  const proved = yield* prove(session, task, split, most);
  if (proved) return { attempts: [proved, exact], because: '', budget };
  if (degrees.length === 0) {
    const which = problem.degree === null ? 'no polynomial is' : `the polynomial of degree ${problem.degree} is not`;
    return exactly(`${which} predicted cheaper at this size`);
  }
  session.spend(PLAN.any);
  if (problem.guarantee === 'certified') return yield* chooseCertified(session, task, split, degrees, budget);

  // A forced degree is run and measured, and predicted only where nothing is going to run.
  if (problem.method !== 'auto' && problem.degree !== null) {
    const known = task.predict ? yield* predict(task, split, degrees, 0, Infinity) : null;
    const predicted = known?.get(problem.degree) ?? null;
    return { attempts: [attempt(task, problem.degree, split, { predicted })], because: 'as asked', budget };
  }
  const auto = problem.method === 'auto';
  // Less than the check allows, since the engine sums in another order than the pilot.
  const room = roomOf(pass, 'pilot', split);
  // Rows are predicted with the bias itself: what decays make of it comes on top.
  const limit = Math.sqrt((room * problem.tolerance) ** 2 - (problem.decays?.error ?? 0) ** 2);
  const forLooks = budget - foreseenCost(task);
  if (auto && task.hasValues && takesOutliers(problem) && outliersStandOut(task, bounds, degrees, limit)) {
    const usual: (number | undefined)[] = [];
    const guess: Guess = ({ degree, shrinks }, radius) => {
      const byNorms = worstCase(degree, radius * shrinks) / TYPICAL / HOPELESS;
      if (byNorms > SLACK * limit) return byNorms; // out of the question without a fit
      return Math.max(byNorms, (usual[degree] ??= split.sampler.usualError(pass, degree)));
    };
    const found = yield* tryOutliers(session, task, split.sampler, degrees, limit, guess, null, forLooks);
    if (found.length > 0) return { attempts: [...found, exact], because: '', budget };
  }
  const predictions = yield* predict(task, split, degrees, limit, forLooks);
  if (predictions.size === 0) return exactly(`no cheaper polynomial was found in the ${100 * LOSS}% of its cost that looking may take`);
  const errorOf = (degree: number) => predictions.get(degree)?.error ?? Infinity;
  const upperOf = (degree: number) => predictions.get(degree)?.upper ?? Infinity;
  const attemptOf = (degree: number) => attempt(task, degree, split, { predicted: predictions.get(degree) ?? null });
  const first = degrees.find((degree) => upperOf(degree) <= limit) ?? null;
  const cheaper = yield* tryOutliers(session, task, split.sampler, degrees, limit, guessBy(pass, errorOf), first, forLooks);
  if (first !== null || cheaper.length > 0) {
    const others = first === null ? [] : degrees.filter((degree) => degree >= first);
    return {
      attempts: [...cheaper, ...others.map(attemptOf), ...(auto ? [exact] : [])],
      because: auto ? '' : 'as asked',
      budget,
    };
  }
  const best = degrees.reduce((a, b) => (errorOf(b) < errorOf(a) ? b : a));
  const what = `at best degree ${best} with ${missing(predictions.get(best) ?? null, 'predicted', room)}`;
  if (auto) return exactly(`no cheaper polynomial keeps the tolerance ${problem.tolerance}, ${what}`);
  refuseMiss(task, what);
  return { attempts: [attemptOf(leastBad(task, degrees, errorOf))], because: 'as asked', budget };
}

/**
 * A polynomial whose proved bound keeps the tolerance, if it costs less than `most`; null where there is none. Scores so small spare short calls the
 * rows that would be sampled, which may take longer than all the rest.
 */
function* prove(session: Session, task: Task, split: Split, most: number): Generator<number, Attempt | null> {
  const { problem, pass, passes } = task;
  if (pass === 'backward' || problem.method !== 'auto' || problem.guarantee === 'certified' || problem.degree !== null) return null;
  if (featuresFor(problem) !== 'polynomial' || problem.decays) return null;
  // gradients are to find out what they go by
  if (LOOK > SHOWS * costOf(problem, ['backward'], null)) return null;
  const lost = LOSS * costOf(problem, passes, null);
  const spread = session.heads * spreadCost(problem);
  const margin = spread > lost ? LIKELY : 1;
  const dear = spread / (problem.causal ? 4 : 2) > lost; // what it takes to see that scores are farther apart than guessed
  for (let degree = 0; degree <= MAX_DEGREE; degree++) {
    const left = most - costOf(problem, passes, degree) - PLAN.proof;
    if (left < 0) return null;
    if (!split.bounds.every((one) => worstCase(degree, scoreRadius(problem, one)) <= problem.tolerance)) {
      if (dear || left < spread) continue;
      const limits = split.bounds.map((one) => limitOfSpread(problem, one, degree, margin));
      if (limits.includes(0)) continue;
      for (const [head, limit] of limits.entries()) {
        if (!session.spread(head, limit)) return null; // scores are farther apart than guessed
        yield 0;
      }
    }
    session.spend(PLAN.proof);
    const found = yield* certified(session, task, split, degree);
    if (found.bound === null || !(found.bound <= problem.tolerance)) continue;
    return workspaceOf(session, passes, degree) <= session.free ? { ...found, proved: true } : null;
  }
  return null;
}

/** The mean square of scores up to which a degree is proved to keep the tolerance; 0 where a `margin` times what norms make likely is not. */
function limitOfSpread(problem: Problem, bounds: Bounds, degree: number, margin: number): number {
  if (!hasSpread(problem, bounds)) return 0;
  const { coefficients, error } = tangent(degree, scoreRadius(problem, bounds));
  const scores = margin * leastSpread(problem, bounds);
  const e = error * scores;
  if (!(2 * e <= problem.tolerance)) return 0;
  const guess = { scores, keys: bounds.k_squares / problem.keyLength, gain: 1 };
  const rounding = certifySpread(problem, coefficients, error, guess, bounds) - (2 * e) / (1 - e);
  const left = problem.tolerance - rounding;
  const limit = left > 0 ? left / (2 + left) / error : 0;
  return limit >= scores ? limit : 0;
}

/** Transforms take all rows; and states that stand for a bias have no outliers beside them. */
function takesOutliers(problem: Problem): boolean {
  return featuresFor(problem) === 'polynomial' && !problem.decays;
}

/** By norms alone: a few rows are so large that no polynomial has a chance with them. */
function outliersStandOut({ problem }: Task, bounds: readonly Bounds[], degrees: readonly number[], limit: number): boolean {
  return bounds.some((one) => {
    const radius = scoreRadius(problem, one);
    const typical = Math.abs(problem.scale) * queryGain(problem, one) * Math.sqrt(one.q_squares * one.k_squares);
    const rows = Math.sqrt((problem.heads / problem.kvHeads) * problem.queryLength * problem.keyLength);
    if (!(radius * rows > STANDS_OUT * typical)) return false;
    return degrees.every((degree) => worstCase(degree, radius) > HOPELESS * TYPICAL * limit);
  });
}

/** What may be lost, from here on, to all that is done before the exact engine runs; its look at what was given is kept back. */
function budgetOf(session: Session, task: Task): number {
  const { problem, passes } = task;
  if (problem.method !== 'auto') return Infinity;
  const { rows, heads } = passes.includes('forward') ? { rows: 0, heads: 0 } : rowsOfGiven(task);
  const given = heads * (Math.ceil(rows / SAMPLE_ROWS) * givenCost(problem) + (heads > 1 ? prepareCost(problem) : 0));
  return session.spent + LOSS * costOf(problem, passes, null) - given;
}

/** What is to be kept back for a first look at gradients of keys, which fails so rarely that it has `LOSS_KEYS` of its own. */
function foreseenCost({ problem, pass, passes }: Task): number {
  if (pass === 'forward') return 0;
  return Math.max(0, 2 * columnsCost(problem, [0]) - LOSS_KEYS * costOf(problem, passes, null));
}

/** Of a portion: rows of the output, and of dq. */
function givenCost(problem: Problem): number {
  return portionCost(problem, 'forward') + DISTANCE_OF_GRADIENTS * portionCost(problem, 'backward');
}

/** Errors of the degrees beside the outliers of a split, as Sampler.pilot. */
function* predict(
  task: Task,
  { sampler, outliers }: Split,
  degrees: readonly number[],
  limit: number,
  budget: number,
): Generator<number, Map<number, Measured>> {
  if (!task.hasValues) return yield* sampler.worstValues(degrees);
  const { problem, passes, pass } = task;
  const thorough = problem.method !== 'auto';
  const short = (degree: number) => mayMiss(task, degree, outliers?.counts);
  const alike = (next: number) =>
    costOf(problem, passes, next, outliers?.counts) < ALIKE * costOf(problem, passes, null);
  const worth = (degree: number) => {
    const next = degrees.find((one) => one > degree);
    if (next === undefined && thorough) return Infinity; // a refusal
    const costOfDegree = (one: number | null) => costOf(problem, passes, one, outliers?.counts);
    return SPARED * (costOfDegree(next ?? null) - costOfDegree(degree));
  };
  const surety = (degree: number) => suretyOf(task, degree, outliers?.counts);
  return yield* sampler.pilot(pass, degrees, limit, { thorough, short, alike, budget, worth, surety });
}

/** Of what passes for sure where not all was seen: less for a polynomial that would be dear to run in vain. */
export function suretyOf({ problem, passes }: Task, degree: number, outliers = NO_OUTLIERS): number {
  return 1 - Math.min(costOf(problem, passes, degree, outliers) / costOf(problem, passes, null), 0.5) ** 2;
}

/**
 * What more rows and keys may take to find that an attempt does, where chance decides.
 *
 * @param lost its passes that ran in vain then.
 * @param next what follows a miss; undefined: nothing.
 */
export function worthOfMore(
  session: Session,
  { problem, pass, passes }: Task,
  { degree, split }: Attempt,
  lost: readonly Pass[],
  next: Attempt | undefined,
  budget: number,
): number {
  if (!next) return Infinity;
  const worth = SPARED * costOf(problem, [pass], next.degree, next.split.outliers?.counts);
  if (next.degree !== null) return worth;
  const left = budget - session.spent - costOf(problem, lost, degree, split.outliers?.counts);
  return Math.min(worth, Math.max(left, LOSS_MORE * costOf(problem, passes, null)));
}

/** A degree beside some outliers. */
interface Candidate extends Choice {
  degree: number;
  cost: number;
}

/** Degrees and outliers that would be well cheaper than `than`, the cheapest first. */
function candidatesBeside(
  { problem, passes }: Task,
  choices: readonly Choice[],
  degrees: readonly number[],
  than: number,
): Candidate[] {
  const alone = degrees.map((degree) => costOf(problem, passes, degree));
  const all: Candidate[] = [];
  for (const { counts, shrinks } of choices) {
    const outliers = passes.reduce((sum, pass) => sum + outliersCost(problem, pass, counts), 0);
    for (const [n, degree] of degrees.entries()) {
      const cost = alone[n] + outliers;
      if (cost < GAIN * than) all.push({ counts, shrinks, degree, cost });
    }
  }
  return all.sort((a, b) => a.cost - b.cost);
}

/** The cost that outliers are to undercut: that of `degree` alone, null: of exact; any for a forced polynomial that has none. */
function costToBeat({ problem, passes }: Task, degree: number | null): number {
  return problem.method !== 'auto' && degree === null ? Infinity : costOf(problem, passes, degree);
}

/** The error of a candidate, given the radius of the scores of all rows. */
type Guess = (one: Candidate, radius: number) => number;

/**
 * By errors of the degrees without outliers, those of all that were looked at: that of degree g goes as the (g + 1)-th power of the scores, that of
 * gradients as the g-th. Not less than norms make likely, as rows that stand out may be among those that were not; and by norms where all rows together fail.
 */
function guessBy(pass: Pass, errorOf: (degree: number) => number): Guess {
  return ({ degree, shrinks }, radius) => {
    const typical = worstCase(degree, radius * shrinks) / TYPICAL;
    if (!(errorOf(degree) < FAILED)) return typical;
    return Math.max(errorOf(degree) * shrinks ** (pass === 'forward' ? degree + 1 : Math.max(degree, 1)), typical / HOPELESS);
  };
}

/**
 * A polynomial beside outliers that is predicted well cheaper than `degree` alone (null: than exact) and within `limit`, then higher
 * degrees beside the same; empty when none is found soon.
 */
function* tryOutliers(
  session: Session,
  task: Task,
  whole: Sampler,
  degrees: readonly number[],
  limit: number,
  guess: Guess,
  degree: number | null,
  all: number,
): Generator<number, Attempt[]> {
  const { problem, pass, passes } = task;
  if (!takesOutliers(problem)) return [];
  const than = costToBeat(task, degree);
  const ranks = session.heads * (rankCost(problem, 'queries') + rankCost(problem, 'keys'));
  // Not more than what there is to gain allows, nor than what is left
  const budget = Math.min(all, session.spent + LOSS * than);
  if (session.spent + ranks + PLAN.outliers + trialCost(problem, pass) > budget) return [];
  if (!degrees.some((one) => costOf(problem, passes, one) < GAIN * than)) return [];
  const ranking = yield* rank(session);
  session.spend(PLAN.outliers);
  let left = candidatesBeside(task, choicesOf(problem, session, ranking), degrees, than);
  const room = BESIDE * (pass === 'forward' ? 1 : ONLY_DQ) * limit;
  let best: Attempt[] = [];
  let worse = 1; // errors that were measured, over those that were guessed
  const radius = radiusOf(problem, ranking);
  for (let trial = 0; trial < TRIALS; trial++) {
    const within = (share: number) => left.find((one) => worse * guess(one, radius) <= share * room);
    const next = (best.length > 0 ? undefined : within(SAFE)) ?? within(SLACK);
    if (!next || session.spent + trialCost(problem, pass) > budget) break;
    const split = yield* splitOff(session, ranking, next.counts, problem.seed, session.wasGiven ? whole : null);
    session.spend(PLAN.trial);
    const together = left.filter((one) => one.counts === next.counts).map((one) => one.degree);
    const fitting = fittingOf(session, passes, together.sort((a, b) => a - b));
    const predictions = yield* predict(task, split, fitting, room, budget);
    const found = fitting.find((one) => (predictions.get(one)?.upper ?? Infinity) <= room);
    if (found !== undefined) {
      best = fitting
        .filter((one) => one >= found)
        .map((one) => attempt(task, one, split, { predicted: predictions.get(one) ?? null }));
      const cost = costOf(problem, passes, found, next.counts);
      left = left.filter((one) => one.cost < GAIN * cost);
    }
    worse = Math.max(worse, Math.min(predictions.get(next.degree)?.error ?? 1, 1) / guess(next, radius));
    left = left.filter((one) => one.counts !== next.counts);
  }
  return best;
}

/** About the least relative error of a polynomial on [-radius, radius], where that is small. */
function worstCase(degree: number, radius: number): number {
  let error = 2;
  for (let m = 1; m <= degree + 1; m++) error *= radius / 2 / m;
  return error;
}

/** The radius of the scores of all rows. */
function radiusOf(problem: Problem, { queries, keys }: Ranking): number {
  const largest = keys.reduce((most, own, head) => Math.max(most, queries[head].norms[0] * own.norms[0]), 0);
  return Math.abs(problem.scale) * problem.rotaryGain * largest;
}

/** A miss of a forced polynomial: an error, unless `onMiss` is 'report' and there is something to report. */
export function refuseMiss({ name, problem }: Pick<Task, 'name' | 'problem'>, what: string, nothing = false): void {
  if (problem.onMiss === 'report' && !nothing) return;
  throw new RangeError(`${name}: method '${problem.method}' misses the tolerance ${problem.tolerance}: ${what}`);
}

/** 0.000123 as 1.2e-4. */
export function short(error: number): string {
  return Number.isFinite(error) && error !== 0 ? error.toExponential(1) : String(error);
}

/**
 * Degrees to consider, ascending: for `auto` those predicted cheaper than exact, the sampling included, as long as it costs
 * little to find that none will do.
 */
function candidates(session: Session, { problem, pass, passes }: Task): number[] {
  const exact = costOf(problem, passes, null);
  const auto = problem.method === 'auto';
  if (auto && LEAST_REFUSAL > LOSS * exact) return []; // short calls have no time for more
  const all =
    problem.degree === null ? Array.from({ length: MAX_DEGREE + 1 }, (_, degree) => degree) : [problem.degree];
  if (!auto) {
    const some = fittingOf(session, passes, all);
    // One that does not fit fails where the memory is asked for, with the numbers.
    return some.length === 0 ? all.slice(0, 1) : some;
  }
  const { refusal, all: sampling } = samplingCost(problem, pass, 1);
  if (refusal > LOSS * exact) return [];
  const most = exact - sampling;
  // A constant has no gradient by q and k.
  const least = pass === 'backward' && problem.tolerance < 1 ? 1 : 0;
  // Costs rise with the degree, as degrees do here
  const dear = all.findIndex((degree) => costOf(problem, passes, degree) >= most);
  const some = all.slice(0, dear < 0 ? all.length : dear).filter((degree) => degree >= least);
  return fittingOf(session, passes, some);
}

/** Of ascending degrees those that there is memory for, which grows with the degree. */
function fittingOf(session: Session, passes: readonly Pass[], degrees: readonly number[]): number[] {
  let count = degrees.length;
  while (count > 0 && workspaceOf(session, passes, degrees[count - 1]) > session.free) count--;
  return degrees.slice(0, count);
}

/** Little is lost if this degree runs and misses. */
function mayMiss({ problem, passes }: Task, degree: number, outliers = NO_OUTLIERS): boolean {
  return problem.method === 'auto' && costOf(problem, passes, degree, outliers) < TRIAL_RUN * costOf(problem, passes, null);
}

/**
 * What is left to try after a miss: a degree must be predicted better by the factor that the one that missed turned out worse.
 * What closes the list stays: exact for `auto`, else the last resort.
 */
export function* promising(
  session: Session,
  { problem, pass, passes }: Task,
  list: readonly Attempt[],
  missed: Attempt,
  measured: Measured | null,
  budget: number,
): Generator<number, Attempt[]> {
  const { error, upper } = measured ?? { error: Infinity, upper: Infinity };
  // an error that there was no time to look at closely is what it was seen to be
  const factor = (upper === Infinity ? error : upper) / (missed.predicted?.error ?? 0);
  const most = Math.max(budget, session.spent + LOSS_NEXT * costOf(problem, passes, null));
  for (const [n, { degree, split }] of list.entries()) {
    const left = () => list.slice(n).map((one) => ({ ...one, trial: false })); // one is enough
    if (degree === null || n === list.length - 1) return left();
    const limit = (problem.tolerance * roomOf(pass, 'pilot', split)) / Math.max(factor, 1);
    const found = yield* split.sampler.pilot(pass, [degree], limit, { budget: most });
    if ((found.get(degree)?.upper ?? Infinity) <= limit) return left();
  }
  return [];
}

/** The share of the tolerance that a sampled error may take. */
export function roomOf(pass: Pass, when: 'pilot' | 'check', { outliers }: Pick<Split, 'outliers'>): number {
  return ROOM[pass][when] * (outliers ? BESIDE : 1);
}

/** An error that is above its room, a share of the tolerance; null: an error that nothing is known about. */
export function missing(measured: Measured | null, kind: 'predicted' | 'sampled', room: number, where = ''): string {
  const { error, upper } = measured ?? { error: Infinity, upper: Infinity };
  if (upper === Infinity && error < Infinity) return `a ${kind} error of ${short(error)}${where}, too near the tolerance for a closer look`;
  const hidden = upper > error ? ` (${short(upper)} with what chance may hide)` : '';
  return `a ${kind} error of ${short(error)}${where}${hidden}, more than ${Number(room.toFixed(2))} of the tolerance`;
}

/**
 * Rows on which `auto` compares an output and lse that were given with exact ones, of each of so many key/value heads: of all, unless these are so
 * short that making them ready would show. None in so short a call that any look would.
 */
export function rowsOfGiven({ problem, passes }: Task): { rows: number; heads: number } {
  const exact = costOf(problem, passes, null);
  if (LOOK > SHOWS * exact) return { rows: 0, heads: 0 };
  const all = problem.batch * problem.kvHeads;
  const ready = (GIVEN_HEADS * exact) / (prepareCost(problem) + portionCost(problem, 'forward'));
  const heads = all === 1 ? 1 : Math.max(1, Math.min(all, Math.floor(ready)));
  const affordable = (GIVEN * SAMPLE_ROWS * exact) / portionCost(problem, 'forward');
  return { rows: Math.max(GIVEN_ROWS.least, Math.floor(Math.min(GIVEN_ROWS.most, affordable) / heads)), heads };
}

/** What a look at more of these may take: next to nothing, or of what was not spent otherwise. */
export function budgetOfGiven(session: Session, { problem, passes }: Task, budget: number): number {
  const exact = costOf(problem, passes, null);
  return Math.max(LOOK_CLOSELY.always * exact, Math.min(LOOK_CLOSELY.most * exact, budget - session.spent));
}

/** Polynomials with a proved bound; nothing is known about gradients. */
function* chooseCertified(
  session: Session,
  task: Task,
  split: Split,
  degrees: readonly number[],
  budget: number,
): Generator<number, Plan> {
  const { problem, pass } = task;
  const auto = problem.method === 'auto';
  if (pass === 'backward' && auto) {
    return { attempts: [attempt(task, null, split)], because: 'there is no certificate for gradients of a polynomial', budget };
  }
  if (pass === 'backward') refuseMiss(task, "guarantee 'certified' has no certificate for gradients");

  const exact = attempt(task, null, split);
  const kept = (one: Attempt) => one.bound !== null && one.bound <= problem.tolerance;
  const tried: Attempt[] = [];
  for (const degree of degrees) {
    tried.push(yield* certified(session, task, split, degree));
    if (kept(tried[tried.length - 1])) break;
  }
  const plain = tried.find(kept) ?? null;
  const splits = pass === 'forward' && featuresFor(problem) === 'polynomial';
  const cheaper = splits ? yield* certifyOutliers(session, task, degrees, plain?.degree ?? null) : null;
  const found = cheaper ?? plain;
  if (found) return { attempts: auto ? [found, exact] : [found], because: auto ? '' : 'as asked', budget };
  const boundOf = (one: Attempt) => one.bound ?? Infinity;
  const best = tried.reduce((a, b) => (boundOf(b) < boundOf(a) ? b : a));
  const what = `degree ${best.degree} is certified to ${best.bound === null ? 'nothing' : short(best.bound)}`;
  if (auto)
    return {
      attempts: [exact],
      because: `no cheaper polynomial is certified within ${problem.tolerance}, at best ${what}`,
      budget,
    };
  refuseMiss(task, `at best ${what}`);
  const least = leastBad(task, degrees, (degree) => boundOf(tried.find((one) => one.degree === degree)!));
  return { attempts: [tried.find((one) => one.degree === least)!], because: 'as asked', budget };
}

/**
 * The polynomial of a degree with its certificate, rows that are exact apart: in each head minimax on its interval, or where that misses the tolerance
 * `tangent`, if its bound by the mean square of scores is smaller.
 */
function* certified(session: Session, task: Task, split: Split, degree: number): Generator<number, Attempt> {
  const { problem } = task;
  const coefficients = new Float32Array(session.heads * (degree + 1));
  const features = featuresFor(problem);
  let bound = 0;
  for (const [head, one] of split.bounds.entries()) {
    const radius = Math.min(scoreRadius(problem, one), Number.MAX_VALUE);
    let best = unbiased(minimax(degree, radius).coefficients, radius, usualSpread(problem, one));
    let least = certifyHead(problem, best, one, split.outliers?.counts, features);
    const other = features === 'polynomial' && least > problem.tolerance ? tangent(degree, radius) : null;
    if (other && other.error < Infinity && 2 * other.error * leastSpread(problem, one) < least) {
      session.setOutliers(split.outliers);
      const spread = session.spread(head);
      const bySpread = spread ? certifySpread(problem, other.coefficients, other.error, spread, one, split.outliers?.counts) : Infinity;
      if (bySpread < least) [best, least] = [other.coefficients, bySpread];
    }
    coefficients.set(best, head * (degree + 1));
    bound = worse(bound, least);
    yield 0;
  }
  return attempt(task, degree, split, { coefficients, bound: Number.isFinite(bound) ? bound : null });
}

/** The mean square of the scores of a query whose own sum of squares is given: that of one like all others in its directions. */
function spreadOf(problem: Problem, bounds: Bounds, querySquares: number): number {
  return ((problem.scale * queryGain(problem, bounds)) ** 2 * querySquares * bounds.k_squares) / (problem.keyLength * problem.headDim);
}

/** Of all queries, what norms make likely. */
function usualSpread(problem: Problem, bounds: Bounds): number {
  return spreadOf(problem, bounds, (bounds.q_squares * problem.kvHeads) / (problem.heads * problem.queryLength));
}

/** Of the largest query, what it is at least, about. */
function leastSpread(problem: Problem, bounds: Bounds): number {
  return spreadOf(problem, bounds, bounds.q_plain_norm ** 2);
}

/** A certified polynomial beside outliers that is well cheaper than `degree` alone, or than exact; null when none is found soon. */
function* certifyOutliers(
  session: Session,
  task: Task,
  degrees: readonly number[],
  degree: number | null,
): Generator<number, Attempt | null> {
  const { problem, passes } = task;
  const than = costToBeat(task, degree);
  if (!degrees.some((one) => costOf(problem, passes, one) < GAIN * than)) return null;
  const ranking = yield* rank(session);
  const choices = choicesOf(problem, session, ranking);
  const radius = radiusOf(problem, ranking);
  let trials = TRIALS;
  for (const one of candidatesBeside(task, choices, degrees, than)) {
    const left = Math.min(radius * one.shrinks, Number.MAX_VALUE);
    // as many small scores as in any two directions, but for the largest ones
    const bySpread = (2 * tangent(one.degree, left).error * left ** 2) / problem.headDim;
    if (Math.min(minimax(one.degree, left).error, bySpread) > problem.tolerance) continue;
    const split = yield* splitOff(session, ranking, one.counts, problem.seed);
    const got = yield* certified(session, task, split, one.degree);
    const fits = workspaceOf(session, passes, one.degree) <= session.free;
    if (fits && got.bound !== null && got.bound <= problem.tolerance) return got;
    if (--trials === 0) return null;
  }
  return null;
}

/** Of degrees that all miss: the smallest error among those not dearer than exact; the smallest degree when all are. */
function leastBad({ problem, passes }: Task, degrees: readonly number[], errorOf: (degree: number) => number): number {
  const exact = costOf(problem, passes, null);
  const cheap = degrees.filter((degree) => costOf(problem, passes, degree) <= exact);
  return cheap.length === 0 ? degrees[0] : cheap.reduce((a, b) => (errorOf(b) < errorOf(a) ? b : a));
}

function attempt(task: Task, degree: number | null, split: Split, known: Partial<Attempt> = {}): Attempt {
  const trial = degree !== null && mayMiss(task, degree, split.outliers?.counts);
  const own = dvDegree(task.problem, degree);
  return { degree, dvDegree: own, passes: task.passes, coefficients: null, bound: null, proved: false, predicted: null, trial, split, ...known };
}
