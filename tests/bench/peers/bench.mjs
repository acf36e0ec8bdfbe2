// SPDX-License-Identifier: MIT
//
// Exact attention of this package against what a web developer would load instead: onnxruntime-web, TensorFlow.js and jax-js on
// their WebAssembly backends, one thread each, in the same process and in turns. Run by `make bench-peers`; prints Markdown,
// writes the same as JSON. Arguments by ARGS="...":
//
//   --where node,chromium   --lengths 256,1024,2048,4096,8192,16384   --dims 16,32,64   --heads 1,4   --masks full,causal
//   --peers onnxruntime-web,@tensorflow/tfjs,@jax-js/jax (or parts of these names)   --parts check,times,cold,memory
//   --seconds 0.3 (of samples for each contender)   --heads-up-to 4096 (more heads than one only to this length)
//   --json build/bench-peers.json   --quick (Node, D = 16 and 64, N = 1,024 and 2,048, one head, without memory)
//
// What is counted: our calls with their copies in and out and with their own rotary tables; the peers' with rotation and the
// reading of the results, but their inputs, tables and compiled graphs are made beforehand. forward+backward is one forward
// and one backward call that uses its output. Every contender is first compared with the float64 reference at N = 161, and its
// timed results with ours. Times are medians. Ratios are theirs over ours in the rounds that both ran. A peer's `best` is the
// fastest of all its forms, `ordinary` the fastest of those that one writes first (see the heads of onnxruntime.mjs,
// tfjs.mjs, jax.mjs). Useful operations: 4 D a pair of allowed tokens forward, 14 D forward+backward; `peak` is the
// multiply-add rate of our own binary, the best of samples before and between the rounds of the same case.
//
// A form that fails beside others of its library is tried again with only ours beside it (marked *). One that would take more
// than 20 s a call is not run. What was not run or failed is listed with the reason.

import { spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { arch, cpus, platform, totalmem } from 'node:os';
import { dirname } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { relaxedSimdFlags } from '../../../scripts/relaxed-simd.mjs';
import { openChromium } from './chromium.mjs';
import { OURS, canRun, contenderOf, contenders, peers } from './contenders.mjs';
import { shareOfPeak } from './jobs.mjs';
import { coldTable, memoryTable, notes, summaryTable, timesHead, timesLine } from './report.mjs';

const { values: given } = parseArgs({
  options: {
    where: { type: 'string' },
    lengths: { type: 'string' },
    dims: { type: 'string' },
    heads: { type: 'string' },
    masks: { type: 'string', default: 'full,causal' },
    peers: { type: 'string', default: peers.map(({ name }) => name).join() },
    parts: { type: 'string' },
    seconds: { type: 'string', default: '0.3' },
    'heads-up-to': { type: 'string', default: '4096' },
    json: { type: 'string', default: 'build/bench-peers.json' },
    quick: { type: 'boolean', default: false },
  },
});
const standard = given.quick
  ? { where: 'node', lengths: '1024,2048', dims: '16,64', heads: '1', parts: 'check,times,cold' }
  : {
      where: 'node,chromium',
      lengths: '256,1024,2048,4096,8192,16384',
      dims: '16,32,64',
      heads: '1,4',
      parts: 'check,times,cold,memory',
    };
const words = (name) => (given[name] ?? standard[name]).split(',');
const numbers = (name) => words(name).map(Number);
const masks = words('masks').map((mask) => mask === 'causal');
const parts = words('parts');
const taking = contenders.filter(({ id, library }) => id === OURS || words('peers').some((peer) => library.includes(peer)));

const CHECK = { length: 161, bound: 1e-5 };
const PATIENCE = 20_000; // ms: the longest call of a peer that is run
const LIMIT = 900_000; // ms: of one job
const MEMORY_LENGTH = 8192;
const LONGEST = 32768;
const COLD_LENGTH = 1024;

// --- hosts -----------------------------------------------------------------------------------------------------------

const packaged = fileURLToPath(new URL('../../../node_modules/node/bin/node', import.meta.url));
const node = existsSync(packaged) ? packaged : process.execPath;
const flags = relaxedSimdFlags(node);
const script = fileURLToPath(new URL('node.mjs', import.meta.url));

/** { result }, or { failed, note, died }: note says what was being done. */
function runInNode(job, milliseconds) {
  return new Promise((done) => {
    const child = spawn(node, [...flags, script, JSON.stringify(job)], { stdio: ['ignore', 'pipe', 'ignore'] });
    let text = '';
    let late = false;
    const timer = setTimeout(() => {
      late = true;
      child.kill('SIGKILL');
    }, milliseconds);
    child.stdout.setEncoding('utf8').on('data', (piece) => (text += piece));
    child.on('close', (code, signal) => {
      clearTimeout(timer);
      const answer = { note: null };
      for (const line of text.split('\n')) {
        // A line that is cut short, or from a library
        if (line.startsWith('{') && line.endsWith('}')) Object.assign(answer, JSON.parse(line));
      }
      const reason = late ? `no end within ${milliseconds / 1000} s` : `the process ended with ${signal ?? `status ${code}`}`;
      done(answer.result || answer.failed ? answer : { ...answer, failed: reason, died: true });
    });
  });
}

const hosts = {
  node() {
    const ask = '`Node ${process.versions.node} (V8 ${process.versions.v8})`';
    const { stdout } = spawnSync(node, ['-p', ask], { encoding: 'utf8' });
    return { version: stdout.trim(), run: runInNode, close() {} };
  },
  chromium: openChromium,
};

// --- what is kept ----------------------------------------------------------------------------------------------------

const json = (address) => JSON.parse(readFileSync(new URL(address, import.meta.url), 'utf8'));
const git = spawnSync('git', ['rev-parse', '--short', 'HEAD'], { encoding: 'utf8' });
const cpu = cpus()[0].model.trim();
const report = {
  machine: `${cpu}, ${cpus().length} cores, ${(totalmem() / 2 ** 30).toFixed(0)} GiB, ${platform()} ${arch()}, one thread`,
  date: new Date().toISOString(),
  command: `make bench-peers${process.argv.length > 2 ? ` ARGS="${process.argv.slice(2).join(' ')}"` : ''}`,
  versions: { 'rope-attention': json('../../../package.json').version, ...json('package.json').dependencies },
  commit: git.status === 0 ? git.stdout.trim() : null,
  hosts: {},
  checks: [],
  times: [],
  cold: [],
  memory: [],
};

function keep() {
  mkdirSync(dirname(given.json), { recursive: true });
  writeFileSync(given.json, `${JSON.stringify(report, null, 1)}\n`);
}

// --- check -----------------------------------------------------------------------------------------------------------

async function check(where, host) {
  for (const headDim of numbers('dims')) {
    for (const heads of numbers('heads')) {
      for (const causal of masks) {
        const shape = { length: CHECK.length, headDim, heads, causal };
        const ids = taking.filter((contender) => canRun(contender, 'forward', heads) || canRun(contender, 'both', heads));
        let left = ids.map(({ id }) => id);
        while (left.length > 0) {
          const job = { kind: 'check', ...shape, contenders: left, passes: ['forward', 'both'] };
          const { result, failed, note } = await host.run(job, LIMIT);
          if (!result && !note) throw new Error(`check: ${failed}`);
          const rows = result?.rows ?? [{ ...note, failed }];
          report.checks.push(...rows.map((row) => ({ where, ...shape, ...row })));
          left = result ? [] : left.filter((id) => id !== note.contender);
        }
      }
    }
  }
  const here = report.checks.filter((row) => row.where === where);
  const wrong = here.filter(isWrong);
  const worst = Math.max(...here.filter((row) => !isWrong(row)).map(({ error }) => error));
  const right = `${here.length - wrong.length} of ${here.length} within ${worst.toExponential(1)} of the float64 reference`;
  console.log(`${right} (N = ${CHECK.length}, largest error over largest value)`);
  for (const row of wrong) console.log(`wrong: ${JSON.stringify(row)}`);
  if (wrong.some(({ contender }) => contender === OURS)) throw new Error('our own results are wrong');
}

const isWrong = ({ error, failed }) => Boolean(failed) || !(error <= CHECK.bound);

// --- times -----------------------------------------------------------------------------------------------------------

const same = (a, b, names) => names.every((name) => a[name] === b[name]);

/** Why a contender is not run in this case, or null. */
function reasonToSkip(where, shape, pass, id) {
  const checked = { ...shape, where, pass, contender: id };
  const names = ['where', 'headDim', 'heads', 'causal', 'contender', 'pass'];
  const wrong = report.checks.find((row) => same(row, checked, names) && isWrong(row));
  if (wrong) return { skipped: `wrong at N = ${wrong.length}`, message: wrong.failed ?? `error ${wrong.error}` };
  if (id === OURS) return null;
  const earlier = report.times
    .filter((row) => row.where === where && row.pass === pass && same(row, shape, ['headDim', 'causal']))
    .flatMap((row) => row.contenders.filter(({ contender }) => contender === id).map((entry) => ({ ...row, ...entry })))
    .filter((row) => row.length <= shape.length && row.heads <= shape.heads);
  const failed = earlier.find((row) => row.failed);
  if (failed) return { skipped: `failed at N = ${failed.length}`, message: failed.failed };
  const known = earlier.filter((row) => row.milliseconds).pop();
  const expected = known ? known.milliseconds * (shape.length / known.length) ** 2 * (shape.heads / known.heads) : 0;
  if (expected <= PATIENCE) return null;
  return { skipped: `> ${PATIENCE / 1000} s`, message: `about ${(expected / 1000).toFixed(0)} s a call` };
}

/** Runs a race until nobody kills it; those that failed beside other forms of their library run again with ours only. */
async function race(host, shape, runs) {
  const rows = [];
  const job = { kind: 'race', ...shape, passes: Object.keys(runs), contenders: runs, seconds: Number(given.seconds) };
  let result = null;
  while (!result) {
    const answer = await host.run(job, LIMIT);
    result = answer.result;
    if (result) break;
    const { failed, note } = answer;
    if (!note?.contender || note.contender === OURS) throw new Error(`${JSON.stringify({ ...shape, ...note })}: ${failed}`);
    rows.push({ ...note, failed, died: true });
    job.contenders = { ...job.contenders, [note.pass]: job.contenders[note.pass].filter((id) => id !== note.contender) };
  }
  rows.push(...result.rows);
  for (const [n, { contender, pass, failed, died }] of rows.entries()) {
    const { library } = contenderOf(contender);
    const beside = [...new Set(Object.values(runs).flat())].filter((id) => contenderOf(id).library === library);
    if (!failed || contender === OURS || (beside.length === 1 && !died)) continue;
    const again = await host.run({ ...job, passes: [pass], contenders: { [pass]: [contender, OURS] } }, LIMIT);
    const row = again.result?.rows.find((row) => row.contender === contender) ?? { contender, pass, failed: again.failed };
    rows[n] = row.failed ? row : { ...row, apart: true };
  }
  return { ...result, rows };
}

async function times(where, host) {
  console.log(`\n${timesHead}`);
  for (const heads of numbers('heads')) {
    for (const headDim of numbers('dims')) {
      for (const causal of masks) {
        for (const length of numbers('lengths')) {
          if (heads > 1 && length > Number(given['heads-up-to'])) continue;
          const shape = { heads, headDim, length, causal };
          const runs = { forward: [], both: [] };
          const left = { forward: [], both: [] };
          for (const pass of Object.keys(runs)) {
            for (const contender of taking.filter((contender) => canRun(contender, pass, heads))) {
              const reason = reasonToSkip(where, shape, pass, contender.id);
              if (reason) left[pass].push({ contender: contender.id, ...reason });
              else runs[pass].push(contender.id);
            }
          }
          const { rows, peak, simd, memoryBytes } = await race(host, shape, runs);
          for (const pass of Object.keys(runs)) {
            const entries = rows.filter((row) => row.pass === pass).map(({ pass: _, ...entry }) => entry);
            const ours = entries.find(({ contender }) => contender === OURS);
            if (!ours?.milliseconds) throw new Error(`${JSON.stringify({ ...shape, pass })}: ${ours?.failed ?? 'not run'}`);
            const ofPeak = shareOfPeak(shape, pass, ours.milliseconds, peak);
            const row = { where, ...shape, pass, peak, simd, memoryBytes, ofPeak, contenders: [...entries, ...left[pass]] };
            report.times.push(row);
            console.log(timesLine(row));
          }
          keep();
        }
      }
    }
  }
}

// --- the first calls, memory -----------------------------------------------------------------------------------------

async function cold(where, host) {
  const rows = [];
  for (const contender of taking.filter(({ id, expert }) => id === OURS || (expert && where === 'node'))) {
    for (const headDim of contender.id === OURS ? numbers('dims') : numbers('dims').slice(-1)) {
      for (const causal of masks) {
        for (const pass of contender.passes.filter((pass) => canRun(contender, pass, 1))) {
          const shape = { length: COLD_LENGTH, headDim, heads: 1, causal };
          const runs = [];
          for (let n = 0; n < (contender.id === OURS ? 3 : 1); n++) {
            runs.push(await host.run({ kind: 'cold', ...shape, contender: contender.id, pass }, LIMIT));
          }
          const good = runs.filter(({ result }) => result).map(({ result }) => result);
          // The middle one of the processes
          const middle = good.sort((a, b) => a.first / a.steady - b.first / b.steady)[good.length >> 1];
          rows.push({ where, ...shape, pass, contender: contender.id, ...(middle ?? { failed: runs[0].failed }) });
        }
      }
    }
  }
  report.cold.push(...rows);
  console.log(`\n${coldTable(rows)}`);
}

/** One call in a process of its own: at the length where memory is compared, and ours (in Node everybody) at the longest. */
async function memory(where, host) {
  const rows = [];
  const measure = async (contender, shape, pass) => {
    const reason = reasonToSkip(where, { ...shape, length: Math.min(shape.length, MEMORY_LENGTH) }, pass, contender.id);
    const answer = reason ? {} : await host.run({ kind: 'alone', ...shape, contender: contender.id, pass }, LIMIT);
    const { peakBytes, residentBytes, ...rest } = answer.result ?? { failed: reason?.skipped ?? answer.failed };
    rows.push({ where, ...shape, pass, contender: contender.id, peakBytes, grownBytes: peakBytes - residentBytes, ...rest });
  };
  for (const length of [MEMORY_LENGTH, LONGEST]) {
    for (const causal of masks) {
      for (const pass of length === LONGEST ? ['both'] : ['forward', 'both']) {
        for (const contender of taking.filter((contender) => canRun(contender, pass, 1))) {
          const worthwhile = contender.expert && where === 'node' && causal;
          if (length === LONGEST && contender.id !== OURS && !worthwhile) continue;
          await measure(contender, { length, headDim: 64, heads: 1, causal }, pass);
        }
      }
    }
  }
  report.memory.push(...rows);
  console.log(`\n${memoryTable(rows)}`);
}

const run = { check, times, cold, memory };

console.log(`${report.machine}; ${Object.entries(report.versions).map((pair) => pair.join(' ')).join(', ')}`);
const start = performance.now();
for (const where of words('where')) {
  const host = await hosts[where]();
  report.hosts[where] = host.version;
  console.log(`\n## ${host.version}\n`);
  try {
    for (const part of ['check', 'times', 'cold', 'memory'].filter((name) => parts.includes(name))) {
      await run[part](where, host);
      keep();
    }
  } finally {
    host.close();
  }
}
report.minutes = (performance.now() - start) / 60_000;
keep();
if (report.times.length > 0) {
  console.log(`\n## Least ratios and shares, N from 1,024 up\n\n${summaryTable(report.times)}`);
  if (words('heads').some((heads) => Number(heads) > 1) && Math.max(...numbers('lengths')) > Number(given['heads-up-to'])) {
    console.log(`\nMore heads than one were run up to N = ${given['heads-up-to']} only (--heads-up-to).`);
  }
  const text = notes(report.times);
  if (text) console.log(`\nNot run, or failed:\n\n${text}`);
}
console.log(`\n${report.minutes.toFixed(1)} minutes; written: ${given.json}`);
