// SPDX-License-Identifier: MIT
//
// What is computed for the figures, in which order, and the measuring itself. No DOM; the engine comes from outside (the
// package's worker on the page, an instance in Node for the stored curves).
//
// Errors: the polynomial method with forced degree against the exact method of the same package on the same inputs, one
// head, everything in float32. Time: forward and backward, per head.

import type { BackwardArgs, BackwardResult, ForwardArgs, ForwardResult, RemoteControls } from 'rope-attention';
import { InputSource } from './inputs.js';
import { BOUNDS, degreesOf, type Panel, PANELS, type Settings } from './state.js';
import { median, outputError, relativeError } from './statistics.js';

export interface Engine {
  forward(args: ForwardArgs & RemoteControls): Promise<ForwardResult>;
  backward(args: BackwardArgs & RemoteControls): Promise<BackwardResult>;
}

/** Errors of one degree at one length and entry bound. Not finite where the approximation broke down. */
export interface ErrorPoint {
  readonly kind: 'error';
  readonly length: number;
  readonly entryBound: number;
  readonly degree: number;
  readonly output: number;
  readonly dq: number;
  readonly dk: number;
  readonly dv: number;
  /** Proved bound of `output`, null where nothing can be promised. */
  readonly certified: number | null;
}

/** Milliseconds per head. */
export interface TimePoint {
  readonly kind: 'time';
  readonly length: number;
  /** null: the exact method. */
  readonly degree: number | null;
  readonly forward: number;
  readonly backward: number;
}

export type Point = ErrorPoint | TimePoint;

/** A curve that stops early, and why the page must say so. */
export interface Omission {
  readonly panel: Panel;
  readonly degree: number | null;
  /** The first length that was left out. */
  readonly length: number;
}

interface ErrorJob {
  readonly kind: 'error';
  readonly length: number;
  readonly entryBound: number;
  readonly degrees: readonly number[];
}

interface TimeJob {
  readonly kind: 'time';
  readonly length: number;
  readonly degree: number | null;
}

export type Job = ErrorJob | TimeJob;

const SHORTEST = 64;
const SHORTEST_TIMED = 256;
export const LONGEST_TIMED = 65536;
/** A call shorter than this is timed on several heads at once, because browsers round their clock to 0.1 ms. */
const SHORT_CALL_MS = 10;
const MOST_HEADS = 16;
/** A method's first point comes after this much work, because browsers compile what runs often once more, and better. */
const WARM_UP_MS = 100;

// Floating-point operations that one point may cost. The second figure has many points.
const BUDGET: Record<'length' | 'bound', number> = { length: 3e10, bound: 9e9 };
/** No forward and backward longer than this. */
const LONGEST_RUN_MS = 2000;

/** Features of degree at most g in D variables: C(D + g, g). */
export function rank(headDim: number, degree: number): number {
  let result = 1;
  for (let i = 1; i <= degree; i++) result = (result * (headDim + i)) / i;
  return Math.round(result);
}

/** Operations of forward and backward: 4 + 10 for each score and column, or for each feature and column. */
export function cost(settings: Settings, length: number, degree: number | null): number {
  const { headDim } = settings;
  if (degree === null) return 14 * length * length * headDim * (settings.causal ? 0.5 : 1);
  return 14 * length * rank(headDim, degree) * (headDim + 1);
}

function powersOfTwo(from: number, to: number): number[] {
  const result = [];
  for (let n = from; n <= to; n *= 2) result.push(n);
  return result;
}

/** Ends first, then halves, quarters, ...: a curve shows its shape early. */
export function coarseToFine<T>(values: readonly T[]): T[] {
  const taken = new Set<number>();
  let step = 1;
  while (step * 2 < values.length) step *= 2;
  for (; step >= 1; step /= 2) for (let i = 0; i < values.length; i += step) taken.add(i);
  return [...taken].map((i) => values[i]!);
}

/** The abscissae of the third figure. */
export const timedLengths = (settings: Settings): number[] =>
  powersOfTwo(SHORTEST_TIMED, Math.min(4 * settings.length, LONGEST_TIMED));

function jobsOf(panel: Panel, settings: Settings, omissions: Omission[]): Job[] {
  const degrees = degreesOf(settings);
  if (panel === 'time') {
    return timedLengths(settings).flatMap((length) => [null, ...degrees].map((degree) => ({ kind: 'time' as const, length, degree })));
  }
  const affordable = (length: number) =>
    degrees.filter((degree) => {
      if (cost(settings, length, degree) <= BUDGET[panel]) return true;
      if (!omissions.some((o) => o.panel === panel && o.degree === degree)) omissions.push({ panel, degree, length });
      return false;
    });
  const job = (length: number, entryBound: number): Job => ({ kind: 'error', length, entryBound, degrees: affordable(length) });
  return panel === 'length'
    ? powersOfTwo(SHORTEST, settings.length).map((length) => job(length, settings.entryBound))
    : coarseToFine(BOUNDS).map((entryBound) => job(settings.length, entryBound));
}

/** Everything to do for these settings, and what is too much to do. */
export function jobsFor(settings: Settings): { queues: Record<Panel, Job[]>; omissions: Omission[] } {
  const omissions: Omission[] = [];
  const queue = (panel: Panel) => jobsOf(panel, settings, omissions);
  return { queues: { length: queue('length'), bound: queue('bound'), time: queue('time') }, omissions };
}

/** For the progress bar: milliseconds, roughly. */
function expected(settings: Settings, job: Job): number {
  const ms = (degree: number | null) => 1 + guess(settings, job.length, degree);
  if (job.kind === 'error') return ms(null) + job.degrees.reduce((sum, degree) => sum + ms(degree), 0);
  const once = ms(job.degree);
  return once > LONGEST_RUN_MS ? 0 : once * (1 + runsFor(once)) * headsFor(settings, job);
}

/** Milliseconds of forward and backward, at a rate that most machines reach. */
const guess = (settings: Settings, length: number, degree: number | null): number => cost(settings, length, degree) / 2e7;

const headsFor = (settings: Settings, { length, degree }: TimeJob): number =>
  Math.min(MOST_HEADS, Math.ceil(SHORT_CALL_MS / guess(settings, length, degree)));

const runsFor = (ms: number): number => (ms > 300 ? 1 : ms > 20 ? 3 : 5);

export interface Hooks {
  readonly signal: AbortSignal;
  /** The figure to work for next, as long as it lacks anything. */
  panelInView(): Panel;
  onPoints(points: readonly Point[]): void;
  /** The fraction done, 0 to 1, and what is being done. */
  onProgress(fraction: number, panel: Panel, job: Job): void;
  /** All of a figure is there. */
  onPanel(panel: Panel): void;
  onOmission(omission: Omission): void;
}

/** Measures everything for these settings; rejects with the signal's reason when stopped. */
export async function measure(settings: Settings, engine: Engine, hooks: Hooks): Promise<void> {
  const { queues, omissions } = jobsFor(settings);
  omissions.forEach((omission) => hooks.onOmission(omission));
  const inputs = new InputSource(settings.seed);
  const total = PANELS.flatMap((panel) => queues[panel]).reduce((sum, job) => sum + expected(settings, job), 0);
  const measured = new Set<string>();
  const times = new Map<string, number>();
  let done = 0;
  for (;;) {
    const panel = [hooks.panelInView(), ...PANELS].find((candidate) => queues[candidate].length > 0);
    if (panel === undefined) return;
    const job = queues[panel].shift()!;
    const share = expected(settings, job);
    const progress = (fraction: number) => hooks.onProgress(Math.min(1, (done + fraction * share) / total), panel, job);
    progress(0);
    if (job.kind === 'error') {
      const key = (degree: number) => `${job.length} ${job.entryBound} ${degree}`;
      const degrees = job.degrees.filter((degree) => !measured.has(key(degree)));
      degrees.forEach((degree) => measured.add(key(degree)));
      if (degrees.length > 0) await measureErrors(settings, { ...job, degrees }, engine, inputs, hooks, progress);
    } else {
      const key = (length: number) => `${length} ${job.degree}`;
      const before = times.get(key(job.length / 2));
      // A curve that has stopped does not begin again
      const next = job.length === SHORTEST_TIMED ? 0 : before === undefined ? Infinity : before * (job.degree === null ? 4 : 2);
      if (next <= LONGEST_RUN_MS) {
        const point = await measureTime(settings, job, next, engine, inputs, hooks.signal, progress);
        times.set(key(job.length), point.forward + point.backward);
        hooks.onPoints([point]);
      } else if (before !== undefined) hooks.onOmission({ panel: 'time', degree: job.degree, length: job.length });
    }
    done += share;
    if (queues[panel].length === 0) hooks.onPanel(panel);
  }
}

type Progress = (fraction: number) => void;

/** This degree and no other, whatever its error. */
const polynomialOf = ({ certified }: Settings, degree: number) =>
  ({ method: 'polynomial', degree, onMiss: 'report', guarantee: certified ? 'certified' : 'sampled' }) as const;

async function measureErrors(
  settings: Settings,
  job: ErrorJob,
  engine: Engine,
  inputs: InputSource,
  hooks: Hooks,
  progress: Progress,
): Promise<void> {
  const { headDim, causal } = settings;
  const { signal } = hooks;
  const { q, k, v, dOutput } = inputs.take(job.length * headDim, job.entryBound);
  const shape = { heads: 1, queryLength: job.length, headDim };
  const exact = { q, k, v, shape, causal, method: 'exact', signal } as const;
  const reference = await engine.forward(exact);
  const gradients = await engine.backward({ ...exact, dOutput, output: reference.output, lse: reference.lse });
  for (const [i, degree] of job.degrees.entries()) {
    progress((i + 1) / (job.degrees.length + 1));
    const polynomial = { ...exact, ...polynomialOf(settings, degree) };
    const forward = await engine.forward(polynomial);
    const backward = await engine.backward({ ...polynomial, dOutput, output: forward.output, lse: forward.lse });
    hooks.onPoints([
      {
        kind: 'error',
        length: job.length,
        entryBound: job.entryBound,
        degree,
        output: outputError(forward.output, reference.output, v, headDim),
        dq: relativeError(backward.dq, gradients.dq),
        dk: relativeError(backward.dk, gradients.dk),
        dv: relativeError(backward.dv, gradients.dv),
        certified: forward.report.errorBound,
      },
    ]);
  }
}

async function measureTime(
  settings: Settings,
  job: TimeJob,
  next: number,
  engine: Engine,
  inputs: InputSource,
  signal: AbortSignal,
  progress: Progress,
): Promise<TimePoint> {
  const { headDim, causal } = settings;
  const heads = headsFor(settings, job);
  const { q, k, v, dOutput } = inputs.take(heads * job.length * headDim, settings.entryBound);
  const method = job.degree === null ? ({ method: 'exact' } as const) : polynomialOf(settings, job.degree);
  const args = { q, k, v, shape: { heads, queryLength: job.length, headDim }, causal, signal, ...method };
  const once = async () => {
    const first = await engine.forward(args);
    const second = await engine.backward({ ...args, dOutput, output: first.output, lse: first.lse });
    return { forward: first.report.milliseconds ?? NaN, backward: second.report.milliseconds ?? NaN };
  };
  const runs = runsFor(next);
  let spent = 0;
  for (let calls = 0; runs > 1 && calls < 10 && (calls === 0 || (next === 0 && spent < WARM_UP_MS)); calls++) {
    const { forward, backward } = await once();
    spent += forward + backward;
  }
  const forward: number[] = [];
  const backward: number[] = [];
  for (let run = 0; run < runs; run++) {
    const time = await once();
    forward.push(time.forward / heads);
    backward.push(time.backward / heads);
    progress((run + 1) / runs);
  }
  return { kind: 'time', length: job.length, degree: job.degree, forward: median(forward), backward: median(backward) };
}
