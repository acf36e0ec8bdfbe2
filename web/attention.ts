// SPDX-License-Identifier: MIT
//
// The instance: each call validates, plans (planner.ts), runs the first engine of the plan, checks the result on sampled
// rows, and goes on to the next engine when it misses.
//
// The work is written as generators that yield the fraction done between slices of about 30 ms. A synchronous call drains
// one; the worker drains it with pauses in which it hears of a cancellation. One that is left half done does no harm: the
// next call on the instance takes its memory over.
//
// NaN and infinity in q, k or v: `exact` spreads them to the rows that depend on them and to neighbours in the same tile, a few
// positions to either side; `auto` computes exactly (the report says so), a forced polynomial is a RangeError.

import { certify, scoreBound, scoreRadius } from './certificate.js';
import { NO_OUTLIERS, termsOf, type OutlierCounts, type Pass } from './cost.js';
import { MAX_DECAYS } from './decays.js';
import { Kernel, type Bounds, type Session } from './kernel.js';
import { LagSampler } from './lags.js';
import { loadModule } from './load.js';
import { backwardByPieces, forwardByPieces, planByPieces, rising, type Engines } from './pieces.js';
import {
  choose,
  costOf,
  flopsOf,
  missing,
  budgetOfGiven,
  rowsOfGiven,
  promising,
  refuseMiss,
  roomOf,
  short,
  suretyOf,
  workspaceOf,
  worthOfMore,
  type Attempt,
  type Plan,
  type Task,
} from './planner.js';
import { featuresOf, unsampledOnly } from './scores.js';
import { DecayFits } from './states.js';
import { StreamingState } from './streaming.js';
import type { Measured } from './tally.js';
import { lossSteps } from './training.js';
import type { BackwardArgs, BackwardResult, CreateOptions, ForwardArgs, ForwardResult, PlanArgs } from './types.js';
import type { AttentionLossArgs, AttentionLossResult, AttentionState, Report, RopeAttention } from './types.js';
import type { RotateArgs, StateOptions } from './types.js';
import { readCall, readCreate, readLoss, readRotate, type Call, type Problem } from './validate.js';

/** Milliseconds of work between two yields, about. */
const SLICE = 30;

const GIVEN = 'the given output and lse';

/** Operations below which a run says nothing about this machine's speed. */
const MEASURABLE = 1e8;

/**
 * An instance of the package: loads and compiles the WebAssembly (once per binary and page), takes its first memory, and warms
 * up for a few milliseconds so that the first call is not slow.
 *
 * @throws Error where WebAssembly SIMD is missing or the source cannot be loaded; TypeError and RangeError for wrong options.
 */
export async function createRopeAttention(options: CreateOptions = {}): Promise<RopeAttention> {
  return createAttention(options);
}

/** The same, typed with the generators that the worker uses. */
export async function createAttention(options: CreateOptions): Promise<Attention> {
  const name = 'createRopeAttention';
  const { relaxedSimd, maxMemoryBytes } = readCreate(name, options, ['wasm', 'relaxedSimd', 'maxMemoryBytes']);
  const module = await loadModule({ wasm: options.wasm, relaxedSimd });
  const kernel = await Kernel.create(name, module, maxMemoryBytes);
  if (typeof relaxedSimd === 'boolean' && relaxedSimd !== kernel.relaxed) {
    throw new RangeError(`${name}: relaxedSimd is ${relaxedSimd}, the given wasm is the ${simdOf(kernel)} binary`);
  }
  const attention = new Attention(kernel);
  attention.warmUp();
  return attention;
}

export class Attention implements RopeAttention {
  readonly simd: 'simd128' | 'relaxed-simd';
  readonly #kernel: Kernel;
  readonly #fits = new DecayFits();
  /** Operations at peak speed per millisecond, as the last run of some size had it. */
  #rate: number | null = null;

  constructor(kernel: Kernel) {
    this.#kernel = kernel;
    this.simd = simdOf(kernel);
  }

  get memoryBytes(): number {
    return this.#kernel.memoryBytes;
  }

  /** Takes both passes of one token once, so that no code is new to the JavaScript engine in the first real call. */
  warmUp(): void {
    this.#kernel.warmUp();
    const one = new Float32Array(2);
    const args = { q: one, k: one, v: one, shape: { heads: 1, queryLength: 1, headDim: 2 }, method: 'exact' } as const;
    this.backward({ ...args, dOutput: one });
    this.forward(args);
  }

  forward(args: ForwardArgs): ForwardResult {
    return drain(this.forwardSteps(args));
  }

  backward(args: BackwardArgs): BackwardResult {
    return drain(this.backwardSteps(args));
  }

  rotate(args: RotateArgs): Float32Array {
    return drain(this.rotateSteps(args));
  }

  plan(args: PlanArgs): Report {
    return drain(this.planSteps(args));
  }

  attentionLoss(args: AttentionLossArgs): AttentionLossResult {
    return drain(this.attentionLossSteps(args));
  }

  createState(options: StateOptions): AttentionState {
    return new StreamingState(this.#kernel, options);
  }

  dispose(): void {
    this.#fits.clear();
    this.#kernel.dispose();
  }

  *forwardSteps(args: ForwardArgs): Generator<number, ForwardResult> {
    return yield* this.#forward('forward', readCall('forward', args, this.#fits));
  }

  *backwardSteps(args: BackwardArgs): Generator<number, BackwardResult> {
    return yield* this.#backward('backward', readCall('backward', args, this.#fits));
  }

  *attentionLossSteps(args: AttentionLossArgs): Generator<number, AttentionLossResult> {
    const name = 'attentionLoss';
    return yield* lossSteps(name, readLoss(args, this.#fits), {
      kernel: this.#kernel,
      forward: (call) => this.#forward(name, call),
      backward: (call) => this.#backward(name, call),
    });
  }

  *rotateSteps(args: RotateArgs): Generator<number, Float32Array> {
    const { geometry, x, inverse } = readRotate(args);
    const session = this.#kernel.open('rotate', geometry);
    try {
      const rotated = session.rotate(x, inverse);
      yield 1;
      return rotated;
    } finally {
      session.close();
    }
  }

  *planSteps(args: PlanArgs): Generator<number, Report> {
    const call = readCall('plan', args, this.#fits);
    return (yield* planByPieces(call, this.#engines('plan'))) ?? (yield* this.#planWhole(call));
  }

  *#planWhole({ problem, inputs }: Call): Generator<number, Report> {
    const pass: Pass = inputs.dOutput ? 'backward' : 'forward';
    const passes: Pass[] = pass === 'backward' ? ['forward', 'backward'] : ['forward'];
    const task: Task = { name: 'plan', problem, pass, passes, hasValues: inputs.v !== null, predict: true, part: false };
    const session = this.#kernel.open('plan', problem, featuresOf(problem));
    try {
      const plan = yield* this.#plan(session, task, inputs);
      const chosen = plan.attempts[0];
      const coefficients =
        chosen.coefficients ?? (chosen.degree === null ? null : yield* chosen.split.sampler.coefficients(chosen.degree));
      if (problem.method !== 'auto' && chosen.degree !== null) refusePredicted(task, chosen);
      const bound = boundOf(task, { ...chosen, coefficients });
      session.setOutliers(chosen.split.outliers);
      const bytes = session.bytesWith(workspaceOf(session, passes, chosen.degree), chosen.degree === null);
      yield 1;
      const reason = explain(task, { ...chosen, bound }, chosen.predicted, 'predicted', plan.because, []);
      const cost = costOf(problem, passes, chosen.degree, countsOf(chosen));
      return reportOf(
        task,
        chosen,
        bound,
        chosen.predicted,
        bytes,
        this.#rate && cost / this.#rate,
        reason,
      );
    } finally {
      session.close();
    }
  }

  *#forward(name: string, call: Call): Generator<number, ForwardResult> {
    return (yield* rising(forwardByPieces(name, call, this.#engines(name)))) ?? (yield* this.#wholeForward(name, call));
  }

  *#backward(name: string, call: Call): Generator<number, BackwardResult> {
    return (yield* rising(backwardByPieces(name, call, this.#engines(name)))) ?? (yield* this.#wholeBackward(name, call, false));
  }

  /** What the pieces of a call are computed by. */
  #engines(name: string): Engines {
    return {
      kernel: this.#kernel,
      forward: (call) => this.#wholeForward(name, call),
      part: (call) => this.#wholeBackward(name, call, true),
      plan: (call) => this.#planWhole(call),
    };
  }

  *#wholeForward(name: string, call: Call): Generator<number, ForwardResult> {
    return yield* this.#compute(name, call, ['forward'], false, (session, report) => ({
      output: session.result('out'),
      lse: session.result('lse'),
      report,
    }));
  }

  *#wholeBackward(name: string, call: Call, part: boolean): Generator<number, BackwardResult> {
    const passes: Pass[] = call.inputs.output ? ['backward'] : ['forward', 'backward'];
    return yield* this.#compute(name, call, passes, part, (session, report) => {
      const [dBias, dAlibi, dSinks] = [session.vector('dbias'), session.vector('dalibi'), session.vector('dsinks')];
      const dWeights = session.vector('dweights');
      return {
        dq: session.result('dq'),
        dk: session.result('dk'),
        dv: session.result('dv'),
        ...(dBias && { dBias }),
        ...(dAlibi && { dAlibi }),
        ...(dSinks && { dSinks }),
        ...(dWeights && { dWeights }),
        report,
      };
    });
  }

  /** The whole of a pass for the call `name`: `read` copies the results out of the finished session. */
  *#compute<T>(
    name: string,
    call: Call,
    passes: readonly Pass[],
    part: boolean,
    read: (session: Session, report: Report) => T,
  ): Generator<number, T> {
    const start = performance.now();
    const { problem, inputs } = call;
    const task: Task = { name, problem, pass: passes[passes.length - 1], passes, hasValues: true, predict: false, part };
    const session = this.#kernel.open(name, problem, featuresOf(problem));
    try {
      const plan = yield* this.#plan(session, task, inputs);
      const list = [...plan.attempts];
      const notes: string[] = [];
      const withForward = (attempt: Attempt): Attempt => ({ ...attempt, passes: ['forward', 'backward'] });
      let progress = 0;
      let there = GIVEN; // what attempts without a forward pass go by
      let doubt = Infinity; // what of an error these may be the cause of
      for (let attempt = list.shift(); attempt; attempt = list.shift()) {
        if (goesByGiven(task, attempt)) {
          session.restoreOutput(inputs);
          const { fits, difference, note } = yield* this.#checkGiven(session, task, attempt, there, plan.budget);
          if (note !== null) notes.push(note);
          doubt = difference;
          if (!fits) {
            list.unshift(withForward(attempt));
            continue;
          }
        }
        // A polynomial may yet miss: it gets nine tenths of what is left. 1 is for the very end.
        const end = progress + (1 - progress) * (attempt.degree === null ? 0.99 : 0.9);
        const outcome = yield* this.#attempt(session, task, attempt, list[0], plan.budget, progress, end);
        progress = end;
        if (outcome.miss !== null) {
          const miss = `degree ${attempt.degree} ${outcome.miss}`;
          const room = roomOf(task.pass, 'check', attempt.split) * problem.tolerance;
          const inDv = missesInDv(outcome.dvDegree, attempt.degree, outcome.measured, room);
          const owed = doubt > 0 && !((outcome.measured?.error ?? 0) - doubt > room);
          if (outcome.coefficients && goesByGiven(task, attempt) && owed && !inDv) {
            list.unshift(withForward(attempt));
            notes.push(`${miss} with the given output and lse, which were computed again`);
            continue;
          }
          if (list.length === 0 && !inDv) refuseMiss(task, miss, !outcome.coefficients);
          notes.push(inDv ? `${miss}, all of it in dv, whose weights were those of degree ${outcome.dvDegree}` : miss);
          const left = inDv
            ? [{ ...attempt, dvDegree: attempt.degree! }, ...list]
            : yield* promising(session, task, list, attempt, outcome.measured, plan.budget);
          // A forward pass may serve others as well, if there is none that was given.
          const serves = outcome.sound && !inputs.output && task.pass === 'backward' && problem.method === 'auto';
          if (serves) there = `the output and lse of degree ${attempt.degree}`;
          list.splice(0, list.length, ...(serves ? left.map((one): Attempt => ({ ...one, passes: ['backward'] })) : left));
          if (list.length > 0) continue;
        }
        const ran = { ...attempt, coefficients: outcome.coefficients, dvDegree: outcome.dvDegree };
        const bound = outcome.positive ? boundOf(task, ran) : null;
        const reason = explain(task, { ...ran, bound }, outcome.measured, 'sampled', plan.because, notes);
        const report = reportOf(task, ran, bound, outcome.measured, session.bytes, null, reason);
        const result = read(session, report);
        report.milliseconds = performance.now() - start;
        yield 1;
        return result;
      }
      throw new Error(`${name}: internal error, the plan is empty`);
    } finally {
      session.close();
    }
  }

  /** Loads the arrays and chooses. */
  *#plan(session: Session, task: Task, inputs: Call['inputs']): Generator<number, Plan> {
    // Whatever is chosen, the exact engine must fit, unless only one degree may run.
    const fallback = task.problem.method === 'auto' ? null : task.problem.degree;
    session.load(inputs, task.pass, workspaceOf(session, task.passes, fallback), fallback === null);
    return yield* choose(session, task);
  }

  /**
   * Whether the output and lse that are there, given or of an attempt before, serve an attempt: gradients are only as good as these
   * are. With a tolerance to keep (`auto`) a few of their rows are compared with exact ones, or those of the polynomial: half the
   * tolerance serves gradients whose check is to come, as errors of rows differ in sign. `difference` is what may be owed to these of an
   * error: 0 up to a quarter. Not so where
   * scores are modified, which the sampling of rows does not know, nor in a call of some 150 us, whose own forward pass would be exact;
   * and a forced method finds out by the gradients.
   */
  *#checkGiven(
    session: Session,
    task: Task,
    { degree, split }: Attempt,
    there: string,
    budget: number,
  ): Generator<number, { fits: boolean; difference: number; note: string | null }> {
    const { problem } = task;
    if (problem.method !== 'auto') return { fits: true, difference: Infinity, note: null };
    const limit = problem.tolerance / 4;
    if (degree !== null) {
      const difference = yield* split.sampler.distance(degree, 2 * limit);
      const note = `${there} are not those of degree ${degree}: they were computed again`;
      const fits = difference <= 2 * limit;
      return { fits, difference: difference > limit ? difference : 0, note: fits ? null : note };
    }
    const unknown = unsampledOnly(problem);
    if (unknown.length > 0) {
      const note = `${there} were not checked, as sampled rows have no ${unknown.join(' or ')}`;
      return { fits: true, difference: 0, note };
    }
    const { rows, heads } = rowsOfGiven(task);
    if (rows === 0) return { fits: true, difference: 0, note: `${there} were not checked in so short a call` };
    const difference = yield* split.sampler.given(rows, heads, limit, budgetOfGiven(session, task, budget));
    const own = there === GIVEN ? null : `gradients go by ${there}`;
    const some = `${there} were checked in ${heads} of ${session.heads} key/value heads`;
    if (difference <= limit) return { fits: true, difference: 0, note: heads < session.heads ? [own, some].filter(Boolean).join('; ') : own };
    return { fits: false, difference: 0, note: `${there} are off by ${short(difference)} and were computed again` };
  }

  /** Runs one engine and, for a polynomial, checks it. */
  *#attempt(
    session: Session,
    task: Task,
    attempt: Attempt,
    next: Attempt | undefined,
    budget: number,
    from: number,
    to: number,
  ): Generator<number, Outcome> {
    const { problem, pass } = task;
    const { degree, passes, split } = attempt;
    const { sampler } = split;
    let { dvDegree } = attempt;
    session.setOutliers(split.outliers);
    const coefficients = degree === null ? null : (attempt.coefficients ?? (yield* sampler.coefficients(degree)));
    let positive = true;
    const ran: Pass[] = [];
    const missed = (miss: string | null, measured: Measured | null): Outcome => {
      if (miss !== null) session.spend(costOf(problem, ran, degree, countsOf(attempt)));
      return { coefficients, dvDegree, measured, miss, positive, sound: positive && measured !== null && passes.length > 1 };
    };
    if (degree !== null && !coefficients) return missed('has coefficients beyond float32', null);
    if (degree !== null) session.prepareAll();
    session.setWorkspace(workspaceOf(session, passes, degree), degree === null);
    session.setEngine(degree, coefficients ?? undefined, dvDegree < (degree ?? 0));
    if (degree === null) {
      session.boundScores(scoreBound(problem, split.bounds));
      yield* this.#run(session, task, attempt, passes, from, to);
      return missed(null, null);
    }

    const middle = passes.length > 1 ? from + 0.3 * (to - from) : from;
    if (passes.length > 1) {
      positive = yield* this.#run(session, task, attempt, ['forward'], from, middle);
      ran.push('forward');
    }
    // Gradients of keys are foreseen once output and lse are there; what would miss is not run to its end.
    const room = roomOf(pass, 'check', split);
    const limit = room * problem.tolerance;
    const worth = (lost: readonly Pass[]) => worthOfMore(session, task, attempt, lost, next, budget);
    if (pass === 'backward' && problem.method === 'auto' && !task.part) {
      const foreseen = yield* this.#foresee(session, task, { ...attempt, degree }, limit, budget, worth(positive ? [] : ran));
      dvDegree = foreseen.dvDegree;
      if (foreseen.measured && !(foreseen.measured.upper <= limit)) {
        return missed(`has ${missing(foreseen.measured, 'predicted', room, ' in the gradients of keys')}`, foreseen.measured);
      }
    }
    const lags = pass === 'backward' && problem.decays ? new LagSampler(session, problem, split.bounds) : null;
    if (lags) {
      const foreseen = yield* lags.choose(sampler, degree, limit);
      if (problem.method === 'auto' && !(foreseen.upper <= limit)) {
        return missed(`has ${missing(foreseen, 'predicted', room, ' in dBias')}`, foreseen);
      }
    }
    positive = (yield* this.#run(session, task, attempt, [pass], middle, to)) && positive;
    ran.push(pass);
    if (task.part || (attempt.proved && positive)) return missed(null, null);
    const measured = worst(yield* sampler.check(pass, limit, worth(ran), problem.method !== 'auto'), lags?.check(sampler, limit));
    if (!positive) return missed('has rows whose weights do not add up to a positive number', measured);
    return missed(measured.upper <= limit ? null : `has ${missing(measured, 'sampled', room)}`, measured);
  }

  /**
   * Errors to expect of the gradients of keys, and the degree of the weights of dv, set for the run: less than that of p only where
   * that will do. A trial is spared all but a first look, at the latter.
   */
  *#foresee(
    session: Session,
    task: Task,
    { degree, dvDegree, trial, split: { sampler, outliers } }: Attempt & { degree: number },
    limit: number,
    budget: number,
    worth: number,
  ): Generator<number, { measured: Measured | null; dvDegree: number }> {
    if (trial) {
      const lower = dvDegree < degree && (yield* sampler.foresee(degree, limit, 1, budget)).upper <= limit;
      if (!lower) session.setEngine(degree);
      return { measured: null, dvDegree: lower ? dvDegree : degree };
    }
    const surety = suretyOf(task, degree, outliers?.counts);
    const first = yield* sampler.foresee(degree, limit, Infinity, budget, worth, surety);
    if (!missesInDv(dvDegree, degree, first, limit)) return { measured: first, dvDegree };
    session.setEngine(degree);
    return { measured: yield* sampler.foreseeDv(degree, limit, budget, worth, surety), dvDegree: degree };
  }

  /** Runs all units of the passes; false when the polynomial's weights are not positive. */
  *#run(
    session: Session,
    { problem }: Task,
    attempt: Attempt,
    passes: readonly Pass[],
    from: number,
    to: number,
  ): Generator<number, boolean> {
    const costs = (passes: readonly Pass[]) => costOf(problem, passes, attempt.degree, countsOf(attempt));
    const total = costs(passes);
    let [done, milliseconds, positive] = [0, 0, true];
    for (const pass of passes) {
      const units = session.units(pass);
      const share = costs([pass]) / total;
      for (let unit = 0, slice = 1; unit < units;) {
        const last = Math.min(units, unit + slice);
        const start = performance.now();
        positive = session.run(pass, unit, last) && positive;
        const elapsed = performance.now() - start;
        milliseconds += elapsed;
        slice = Math.max(1, Math.min(4 * slice, Math.floor(((last - unit) * SLICE) / Math.max(elapsed, 1e-3))));
        unit = last;
        yield from + (to - from) * Math.min(1, done + (share * unit) / units);
      }
      done += share;
    }
    if (total >= MEASURABLE && milliseconds > 0) this.#rate = total / milliseconds;
    return positive;
  }
}

/** What came of an attempt. */
interface Outcome {
  /** null: exact, or nothing was run. */
  coefficients: Float32Array | null;
  /** As it was in the end. */
  dvDegree: number;
  measured: Measured | null;
  /** What went wrong; null when the tolerance is met. */
  miss: string | null;
  /** The weights of all rows added up to a positive number. */
  positive: boolean;
  /** It has computed output and lse before gradients. */
  sound: boolean;
}

function drain<T>(steps: Generator<number, T>): T {
  for (;;) {
    const step = steps.next();
    if (step.done) return step.value;
  }
}

function simdOf(kernel: Kernel): 'simd128' | 'relaxed-simd' {
  return kernel.relaxed ? 'relaxed-simd' : 'simd128';
}

/**
 * Whether gradients may be off because the output and lse that were given are: those of a lower degree may keep the tolerance of
 * an output and yet not serve gradients. A forced degree is taken to be that of the forward pass, forced `exact` likewise.
 */
function goesByGiven({ problem, pass, part }: Task, { passes }: Attempt): boolean {
  if (part) return false; // they are those of the whole
  const forced = problem.method === 'exact' || (problem.method !== 'auto' && problem.degree !== null);
  return pass === 'backward' && passes.length === 1 && !forced;
}

/** Whether gradients miss only in dv, whose weights were of a lower degree. */
function missesInDv(dvDegree: number, degree: number | null, measured: Measured | null, room: number): boolean {
  if (degree === null || dvDegree === degree || !measured) return false;
  return !(measured.upper <= room) && (measured.besideDv ?? Infinity) <= room;
}

/** A forced polynomial that would miss: by its proof where that was asked for, else by its prediction and the room of the check. */
function refusePredicted(task: Task, { degree, bound, predicted, split }: Attempt): void {
  const { problem, pass } = task;
  if (bound !== null) {
    if (!(bound <= problem.tolerance)) refuseMiss(task, `degree ${degree} is certified to ${short(bound)}`);
    return;
  }
  const room = roomOf(pass, 'check', split);
  if (!predicted || !(predicted.upper <= room * problem.tolerance)) {
    refuseMiss(task, `degree ${degree} has ${missing(predicted, 'predicted', room)}`);
  }
}

/** Proved bound of the output error of what runs; null for exact, for gradients, and where there is none. */
function boundOf(
  { problem, pass }: Task,
  { degree, coefficients, bound, split }: Attempt,
): number | null {
  if (degree === null || pass === 'backward') return null;
  if (bound !== null || !coefficients) return bound;
  return certify(problem, coefficients, degree, split.bounds, split.outliers?.counts, featuresOf(problem));
}

/** The report's sentence. */
function explain(
  task: Task,
  ran: Attempt,
  measured: Measured | null,
  kind: 'sampled' | 'predicted',
  because: string,
  notes: readonly string[],
): string {
  const { problem } = task;
  const parts: string[] = because === '' ? [] : [because];
  if (ran.degree === null) return `exact: ${parts.concat(notes).join('; ')}`;
  const ratio = costOf(problem, ran.passes, null) / costOf(problem, ran.passes, ran.degree, countsOf(ran));
  if (problem.decays) {
    const { count, near, error } = problem.decays;
    const states = count === 1 ? 'one decaying state fits' : `${count} decaying states fit`;
    parts.push(`${states} the bias beyond distance ${near}${error > 0 ? ` to ${short(error)}` : ''}`);
  } else if (problem.misfit !== null && featuresOf(problem) === 'toeplitz') {
    parts.push(`no ${MAX_DECAYS} decaying states fit the bias${problem.misfit < 1 ? `, at best to ${short(problem.misfit)}` : ''}`);
  }
  if (ratio === 0) parts.push('predicted dearer than exact, for which no query sees a key');
  else parts.push(`predicted ${ratio >= 1 ? `${figures(ratio)}x cheaper` : `${figures(1 / ratio)}x dearer`} than exact`);
  const within = (error: number) =>
    `${short(error)} ${error <= problem.tolerance ? 'within' : 'above'} ${problem.tolerance}`;
  if ((problem.guarantee === 'certified' || ran.proved) && ran.bound !== null) parts.push(`certified error ${within(ran.bound)}`);
  if (measured) parts.push(`${kind} error ${within(measured.error)}`);
  const { queries, keys } = countsOf(ran);
  const heads = problem.batch * problem.kvHeads > 1 ? ' of each key/value head' : '';
  const outliers = queries + keys > 0 ? ` beside ${queries} queries and ${keys} keys${heads} that are exact` : '';
  const sentence = `${featuresOf(problem)} of degree ${ran.degree} (${sizeOf(problem, ran.degree)})${outliers}: ${parts.join(', ')}`;
  return [sentence, ...notes].join('; ');
}

/** The larger of two errors. */
function worst(a: Measured, b: Measured | undefined): Measured {
  const larger = (of: (one: Measured) => number) => (b ? Math.max(of(a), of(b)) : of(a));
  return {
    error: larger((one) => one.error),
    upper: larger((one) => one.upper),
    relative: larger((one) => one.relative),
    besideDv: larger((one) => one.besideDv ?? one.upper),
  };
}

/** Terms of a polynomial, in words. */
function sizeOf(problem: Problem, degree: number): string {
  const { relative, relativePositions } = problem;
  const count = termsOf(problem, degree);
  if (!relative && !relativePositions) return `rank ${count}`;
  return `${count} ${relativePositions ? 'complex ' : ''}term${count === 1 ? '' : 's'}`;
}

/** Rows that are exact beside a polynomial, in each key/value head. */
function countsOf({ split }: Attempt): OutlierCounts {
  return split.outliers?.counts ?? NO_OUTLIERS;
}

/** Two significant figures. */
function figures(x: number): string {
  return x < 10 ? x.toFixed(1) : String(Math.round(x));
}

function reportOf(
  { problem, pass }: Task,
  attempt: Attempt,
  errorBound: number | null,
  measured: Measured | null,
  bytes: number,
  milliseconds: number | null,
  reason: string,
): Report {
  const { degree, passes, split } = attempt;
  const largest = (of: (one: Bounds) => number) => split.bounds.reduce((most, one) => Math.max(most, of(one)), 0);
  return {
    method: degree === null ? 'exact' : featuresOf(problem),
    degree,
    rank: degree === null ? null : termsOf(problem, degree),
    outliers: degree === null ? null : { ...countsOf(attempt) },
    entryBound: largest((one) => Math.max(one.q_entry, one.k_entry)),
    scoreBound: largest((one) => scoreRadius(problem, one)),
    errorBound,
    errorEstimate: measured && measured.error,
    gradientErrorEstimate: pass === 'backward' && measured ? measured.error : null,
    relativeErrorEstimate: measured && measured.relative,
    flops: flopsOf(problem, passes, degree, countsOf(attempt), attempt.dvDegree),
    bytes,
    milliseconds,
    reason,
  };
}
