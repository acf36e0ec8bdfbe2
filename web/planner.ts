// SPDX-License-Identifier: MIT
//
// The choice: which engines to try, in order, and why. Cheapest first by the cost model of cost.ts, among the polynomials
// that meet the tolerance by proof (certificate.ts) or by prediction (sampling.ts); the exact engine always closes the list
// of `method: 'auto'`. What runs is checked again afterwards (attention.ts), so a wrong prediction costs time, never accuracy.

import { certify, scoreRadius } from './certificate.js';
import { cost, exactFlops, polynomialFlops, portionCost, samplingCost, toeplitzFlops, type Pass } from './cost.js';
import type { Bounds, Session } from './kernel.js';
import { MAX_DEGREE, minimax } from './polynomial.js';
import { Sampler, survey, type Measured } from './sampling.js';
import { featuresOf, foreignTo } from './scores.js';
import type { Problem } from './validate.js';

/** One engine to try: exact, or a polynomial with its error as far as it is known before the run. */
export interface Attempt {
  /** null: exact. */
  degree: number | null;
  /** [heads][degree + 1]; null where they are still to be fitted, and for exact. */
  coefficients: Float32Array | null;
  /** Proved bound of the output error; null when there is none or when it was not asked for. */
  bound: number | null;
  predicted: Measured | null;
}

export interface Plan {
  bounds: readonly Bounds[];
  sampler: Sampler;
  /** Not empty. */
  attempts: readonly Attempt[];
  /** Why the polynomials are on the list, or why there are none: the middle of the report's sentence. */
  because: string;
}

/** What the plan is for. `passes`: those that have to run, in order; the last one is the call's. */
export interface Task {
  name: string;
  problem: Problem;
  pass: Pass;
  passes: readonly Pass[];
  hasValues: boolean;
  /** Predict the error of a forced degree too, although the run will measure it. */
  predict: boolean;
}

/**
 * Shares of the tolerance that sampled errors may take before and after the run: a sample does not see the worst row, and
 * sampled columns of gradients are taken with the lse and output that the polynomial gave.
 */
export const ROOM = { forward: { pilot: 0.7, check: 0.75 }, backward: { pilot: 0.6, check: 0.65 } } as const;

/** Share of the exact engine's cost that may be lost to looking for a polynomial, or to one that misses. */
const LOSS = 0.08;

const EXACT: Attempt = { degree: null, coefficients: null, bound: null, predicted: null };

/** Bytes of workspace that an engine needs for all passes of a task. */
export function workspaceOf(session: Session, passes: readonly Pass[], degree: number | null): number {
  return Math.max(...passes.map((pass) => session.workspaceBytes(pass, degree)));
}

export function costOf(problem: Problem, passes: readonly Pass[], degree: number | null): number {
  const features = featuresOf(problem);
  return passes.reduce((sum, pass) => sum + cost(problem, pass, degree, undefined, features), 0);
}

export function flopsOf(problem: Problem, passes: readonly Pass[], degree: number | null): number {
  const ofFeatures = featuresOf(problem) === 'toeplitz' ? toeplitzFlops : polynomialFlops;
  const flops = (pass: Pass) => (degree === null ? exactFlops(problem, pass) : ofFeatures(problem, pass, degree));
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
  const sampler = new Sampler(session, bounds, problem.seed);
  const exactly = (because: string): Plan => ({ bounds, sampler, attempts: [EXACT], because });

  if (problem.method === 'exact') return exactly('as asked');
  const foreign = foreignTo(featuresOf(problem), problem);
  if (foreign.length > 0) {
    const map = problem.relative || problem.relativePositions ? ', whose scores do not factorise' : '';
    return exactly(`no polynomial has ${foreign.join(' or ')}${map}`);
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
  const degrees = candidates(session, task);
  if (degrees.length === 0) {
    const which = problem.degree === null ? 'no polynomial is' : `the polynomial of degree ${problem.degree} is not`;
    return exactly(`${which} predicted cheaper at this size`);
  }
  if (problem.guarantee === 'certified') return yield* chooseCertified(session, task, bounds, sampler, degrees);

  // A forced degree is run and measured, unless nothing is going to run.
  if (problem.method !== 'auto' && problem.degree !== null && !task.predict) {
    return { bounds, sampler, attempts: [attempt(problem.degree)], because: 'as asked' };
  }
  const auto = problem.method === 'auto';
  // Less than the check allows, since the engine sums in another order than the pilot.
  const limit = problem.tolerance * ROOM[pass].pilot;
  const predictions = yield* task.hasValues
    ? sampler.pilot(pass, degrees, limit, !auto, new Set(auto ? degrees.filter((degree) => mayMiss(task, degree)) : []))
    : sampler.worstValues(degrees);
  const errorOf = (degree: number) => predictions.get(degree)?.error ?? Infinity;
  const upperOf = (degree: number) => predictions.get(degree)?.upper ?? Infinity;
  const attemptOf = (degree: number) => attempt(degree, { predicted: predictions.get(degree) ?? null });
  const first = degrees.find((degree) => upperOf(degree) <= limit);
  if (first !== undefined) {
    const others = degrees.filter((degree) => degree > first);
    return {
      bounds,
      sampler,
      attempts: [...[first, ...others].map(attemptOf), ...(auto ? [EXACT] : [])],
      because: auto ? '' : 'as asked',
    };
  }
  const best = degrees.reduce((a, b) => (errorOf(b) < errorOf(a) ? b : a));
  const what = `at best degree ${best} with a predicted error of ${short(errorOf(best))}`;
  if (auto) return exactly(`no cheaper polynomial keeps the tolerance ${problem.tolerance}, ${what}`);
  refuseMiss(task, what);
  return { bounds, sampler, attempts: [attemptOf(leastBad(task, degrees, errorOf))], because: 'as asked' };
}

/** A miss of a forced polynomial: an error, unless `onMiss` is 'report'. */
export function refuseMiss({ name, problem }: Pick<Task, 'name' | 'problem'>, what: string): void {
  if (problem.onMiss === 'report') return;
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
  const all =
    problem.degree === null ? Array.from({ length: MAX_DEGREE + 1 }, (_, degree) => degree) : [problem.degree];
  const fitting = (degrees: number[]) =>
    degrees.filter((degree) => workspaceOf(session, passes, degree) <= session.free);
  if (problem.method !== 'auto') {
    const some = fitting(all);
    // One that does not fit fails where the memory is asked for, with the numbers.
    return some.length === 0 ? all.slice(0, 1) : some;
  }
  const exact = costOf(problem, passes, null);
  const { refusal, all: sampling } = samplingCost(problem, pass, 1);
  if (refusal > LOSS * exact) return [];
  return fitting(all.filter((degree) => costOf(problem, passes, degree) + sampling < exact));
}

/** Little is lost if this degree runs and misses. */
function mayMiss({ problem, passes }: Task, degree: number): boolean {
  return costOf(problem, passes, degree) < LOSS * costOf(problem, passes, null);
}

/** Whether a degree may run after another missed: it must be predicted better by the factor that this one turned out worse. */
export function* promising(
  { problem, pass }: Task,
  sampler: Sampler,
  degree: number,
  missed: { predicted: Measured | null; measured: Measured | null },
): Generator<number, boolean> {
  const factor = (missed.measured?.upper ?? Infinity) / (missed.predicted?.error ?? 0);
  const limit = (problem.tolerance * ROOM[pass].pilot) / Math.max(factor, 1);
  const found = yield* sampler.pilot(pass, [degree], limit, false, new Set());
  return found.get(degree)!.upper <= limit;
}

/** Portions of rows on which `auto` compares an output and lse that were given with exact ones: at least one. */
export function portionsOfGiven({ problem, passes }: Task): number {
  return Math.max(1, Math.floor((LOSS / 2) * (costOf(problem, passes, null) / portionCost(problem))));
}

/** Relative-minimax polynomials on the proved interval of every head; nothing is known about gradients. */
function* chooseCertified(
  session: Session,
  task: Task,
  bounds: readonly Bounds[],
  sampler: Sampler,
  degrees: readonly number[],
): Generator<number, Plan> {
  const { problem, pass } = task;
  const auto = problem.method === 'auto';
  if (pass === 'backward' && auto) {
    return { bounds, sampler, attempts: [EXACT], because: 'there is no certificate for gradients of a polynomial' };
  }
  if (pass === 'backward') refuseMiss(task, "guarantee 'certified' has no certificate for gradients");
  if (featuresOf(problem) === 'toeplitz') {
    const what = 'the rounding of Fourier transforms has no certificate';
    if (auto) return { bounds, sampler, attempts: [EXACT], because: what };
    if (pass === 'forward') refuseMiss(task, what);
  }

  const tried: Attempt[] = [];
  for (const degree of degrees) {
    const coefficients = new Float32Array(session.heads * (degree + 1));
    for (const [head, one] of bounds.entries()) {
      coefficients.set(
        minimax(degree, Math.min(scoreRadius(problem, one), Number.MAX_VALUE)).coefficients,
        head * (degree + 1),
      );
      yield 0;
    }
    const one = attempt(degree, { coefficients, bound: certify(problem, coefficients, degree, bounds) });
    if (one.bound !== null && one.bound <= problem.tolerance) {
      return { bounds, sampler, attempts: auto ? [one, EXACT] : [one], because: auto ? '' : 'as asked' };
    }
    tried.push(one);
  }
  const boundOf = (one: Attempt) => one.bound ?? Infinity;
  const best = tried.reduce((a, b) => (boundOf(b) < boundOf(a) ? b : a));
  const what = `degree ${best.degree} is certified to ${best.bound === null ? 'nothing' : short(best.bound)}`;
  if (auto)
    return {
      bounds,
      sampler,
      attempts: [EXACT],
      because: `no cheaper polynomial is certified within ${problem.tolerance}, at best ${what}`,
    };
  refuseMiss(task, `at best ${what}`);
  const least = leastBad(task, degrees, (degree) => boundOf(tried.find((one) => one.degree === degree)!));
  return { bounds, sampler, attempts: [tried.find((one) => one.degree === least)!], because: 'as asked' };
}

/** Of degrees that all miss: the smallest error among those not dearer than exact; the smallest degree when all are. */
function leastBad({ problem, passes }: Task, degrees: readonly number[], errorOf: (degree: number) => number): number {
  const exact = costOf(problem, passes, null);
  const cheap = degrees.filter((degree) => costOf(problem, passes, degree) <= exact);
  return cheap.length === 0 ? degrees[0] : cheap.reduce((a, b) => (errorOf(b) < errorOf(a) ? b : a));
}

function attempt(degree: number, known: Partial<Attempt> = {}): Attempt {
  return { degree, coefficients: null, bound: null, predicted: null, ...known };
}
