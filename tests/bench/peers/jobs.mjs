// SPDX-License-Identifier: MIT
//
// One job of the benchmark, in Node or in a page; the host says how to load things and is told what is being done, so that
// a job that dies can be blamed on somebody.
//
//   check    every contender at a small length against the float64 reference
//   race     contenders take turns; times, and the peak of the same minutes
//   alone    one call of one contender in a process of its own: time, memory
//   cold     the first calls of one contender in a process of its own, and the steady time after them

import { OURS, contenderOf, openedLibrary, prepare } from './contenders.mjs';
import { watchMemories } from './memories.mjs';
import { BASE, createProblem, operations, worstDifference } from './problem.mjs';

const WARM_UP = 250; // ms of calls before the first sample, at least one call
const SAMPLE = 4; // ms: shorter calls are timed by several; clocks of pages tick at 0.1 ms
const MOST_SAMPLES = 40;
const LONG = 3000; // ms: an ordinary form that takes longer is timed by its first call

/** The first line of an error, without the folders of whoever built the library. */
export const failureText = (error) =>
  String(error?.message ?? error)
    .split('\n')[0]
    .replace(/(\/[\w.-]+)+\//g, '')
    .slice(0, 200);

/** Between the two values on either side. */
function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  const place = share * (sorted.length - 1);
  const below = Math.floor(place);
  return sorted[below] + (place - below) * (sorted[Math.ceil(place)] - sorted[below]);
}

const median = (values) => quantile(values, 0.5);
const spread = (values) => (quantile(values, 0.75) - quantile(values, 0.25)) / median(values);

async function time(run, calls = 1) {
  const start = performance.now();
  for (let n = 0; n < calls; n++) await run();
  return (performance.now() - start) / calls;
}

/** GFLOP/s of multiply-adds that our own binary reaches in registers and in its micro-kernel: the best of all samples. */
async function peakMeter(host) {
  const binaries = [await host.binary('rope-attention.relaxed.wasm'), await host.binary('rope-attention.wasm')];
  const { instance } = await WebAssembly.instantiate(binaries.find((bytes) => WebAssembly.validate(bytes)));
  const best = { registers: 0, tiles: 0 };
  const sample = (what, kind, iterations, operations) => {
    const start = performance.now();
    instance.exports.ra_peak(kind, iterations);
    best[what] = Math.max(best[what], (iterations * operations) / (performance.now() - start) / 1e6);
  };
  const measure = () => {
    sample('registers', 0, 1_500_000, 96);
    sample('tiles', 1, 1_920_000, 64);
  };
  for (let n = 0; n < 6; n++) measure();
  return { best, measure };
}

async function check(host, { contenders, passes, ...shape }) {
  const problem = createProblem(shape);
  const { reference } = await host.libraries['rope-attention']();
  const { q, k, v, dOutput, heads, length, headDim, causal, scale } = problem;
  const call = { q, k, v, shape: { heads, queryLength: length, headDim }, causal, scale, rotary: { base: BASE } };
  const references = { output: reference.forward(call).output, ...reference.backward({ ...call, dOutput }) };
  const rows = [];
  for (const id of contenders) {
    for (const pass of passes.filter((pass) => contenderOf(id).passes.includes(pass))) {
      host.note({ contender: id, pass });
      try {
        const runner = await prepare(host, id, problem, pass);
        await runner.run();
        const { output, ...gradients } = references;
        const error = worstDifference(await runner.result(), pass === 'forward' ? { output } : { output, ...gradients });
        rows.push({ contender: id, pass, error });
        await runner.dispose();
      } catch (failure) {
        rows.push({ contender: id, pass, failed: failureText(failure) });
      }
    }
  }
  return { rows };
}

/** Set-up, warm-up, and what the race needs to know. */
async function enter(host, id, problem, pass) {
  host.note({ contender: id, pass });
  const start = performance.now();
  const runner = await prepare(host, id, problem, pass);
  const setUp = performance.now() - start;
  const first = await time(runner.run);
  let calls = 1;
  let last = first;
  for (let spent = first; spent < WARM_UP; spent += last, calls++) last = await time(runner.run);
  const expert = contenderOf(id).expert;
  const entry = { id, runner, setUp, first, samples: [], batch: Math.max(1, Math.ceil(SAMPLE / last)) };
  if (!expert && calls === 1 && first > LONG) entry.samples.push({ round: 0, milliseconds: first });
  // Fewer runs where one takes long; ours goes on until everybody is done
  entry.least = last < 200 ? 5 : last < 1000 ? 3 : last < LONG ? 2 : 1;
  return entry;
}

/** Our times in the rounds that another took part in; all of them when there were none. */
function timesBeside(samples, ours) {
  const rounds = new Set(samples.map(({ round }) => round));
  const together = ours.filter(({ round }) => rounds.has(round));
  return (together.length > 0 ? together : ours).map(({ milliseconds }) => milliseconds);
}

async function race(host, { contenders, passes, seconds, ...shape }) {
  const problem = createProblem(shape);
  const peak = await peakMeter(host);
  const rows = [];
  for (const pass of passes) {
    const entries = [];
    const failed = (id, failure) => rows.push({ contender: id, pass, failed: failureText(failure) });
    for (const id of contenders[pass]) {
      // Last in the list, ours only accompanies somebody
      if (id === OURS && entries.length === 0 && contenders[pass][0] !== OURS) continue;
      try {
        entries.push(await enter(host, id, problem, pass));
      } catch (failure) {
        failed(id, failure);
      }
    }
    const spent = ({ samples, batch }) => samples.reduce((sum, { milliseconds }) => sum + milliseconds * batch, 0);
    const done = (entry) => {
      const { samples, least, failed } = entry;
      return failed || samples.length >= MOST_SAMPLES || (samples.length >= least && spent(entry) > 1000 * seconds);
    };
    for (let round = 1; !entries.every(done); round++) {
      for (const entry of entries) {
        const { id, runner, batch } = entry;
        if (done(entry) && (id !== OURS || entry.failed)) continue;
        if (entry.first > 100) host.note({ contender: id, pass });
        try {
          entry.samples.push({ round, milliseconds: await time(runner.run, batch) });
        } catch (failure) {
          entry.failed = true;
          failed(id, failure);
        }
      }
      peak.measure();
    }
    const ours = entries.find(({ id, failed }) => id === OURS && !failed);
    const results = ours ? await ours.runner.result() : null;
    for (const { id, runner, setUp, first, samples } of entries.filter(({ failed }) => !failed)) {
      const times = samples.map(({ milliseconds }) => milliseconds);
      const figures = { milliseconds: median(times), spread: spread(times), samples: times.length };
      const row = { contender: id, pass, ...figures, setUp, first };
      if (ours && id !== OURS) {
        row.ratio = row.milliseconds / median(timesBeside(samples, ours.samples));
        row.difference = worstDifference(await runner.result(), results);
      }
      rows.push(row);
    }
    for (const { runner, failed } of entries) if (!failed) await runner.dispose();
  }
  const attention = openedLibrary('rope-attention');
  return { rows, peak: peak.best, simd: attention?.simd, memoryBytes: attention?.memoryBytes };
}

async function alone(host, { contender, pass, ...shape }) {
  const memories = watchMemories();
  host.note({ contender, pass });
  // Loaded and compiled before memory is counted
  const small = await prepare(host, contender, createProblem({ ...shape, length: 128 }), pass);
  await small.run();
  await small.dispose();
  const problem = createProblem(shape);
  const residentBytes = await host.residentBytes();
  const runner = await prepare(host, contender, problem, pass);
  const milliseconds = await time(runner.run);
  const results = Object.values(await runner.result());
  const finite = results.every((values) => values.length === problem.q.length && values.every(Number.isFinite));
  return { milliseconds, residentBytes, wasmBytes: memories.bytes(), finite };
}

/** Milliseconds of loading, set-up, the first call and later ones; for ours also those of the smallest call there is. */
async function cold(host, { contender, pass, ...shape }) {
  host.note({ contender, pass });
  const problem = createProblem(shape);
  const { library } = contenderOf(contender);
  const load = await time(host.libraries[library]);
  let runner;
  const setUp = await time(async () => {
    runner = await prepare(host, contender, problem, pass);
  });
  const first = await time(runner.run);
  const second = await time(runner.run);
  for (let spent = 0; spent < 1000; spent += await time(runner.run));
  const batch = Math.max(1, Math.ceil(SAMPLE / (await time(runner.run))));
  const times = [];
  for (let n = 0; n < 21; n++) times.push(await time(runner.run, batch));
  const result = { load, setUp, first, second, steady: median(times) };
  if (contender === OURS) {
    const least = await prepare(host, contender, createProblem({ ...shape, length: 1 }), pass);
    for (let n = 0; n < 1000; n++) least.run();
    const calls = [];
    for (let n = 0; n < 11; n++) calls.push(await time(least.run, 200));
    result.oneToken = median(calls);
  }
  return result;
}

const kinds = { check, race, alone, cold };

export const runJob = (host, { kind, ...job }) => kinds[kind](host, job);

/** FLOP/s over the better kind of peak. */
export const shareOfPeak = (shape, pass, milliseconds, { registers, tiles }) =>
  operations(shape, pass) / milliseconds / 1e6 / Math.max(registers, tiles);
