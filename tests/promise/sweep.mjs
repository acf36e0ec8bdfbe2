// SPDX-License-Identifier: MIT
//
// How the tolerance is kept, as a table: run by `make sweep`, arguments by ARGS="...":
//
//   --instances 3000   --from 0   --tolerances 3 (of the 41, others for each instance)   --lengths 33,64,100,200,333
//   --binary simd128 | relaxed-simd   --worst 5   --json build/sweep.json
//   --long   sequences of 2,048 to 16,384 tokens by `auto`, with tolerances to 1e-4 (--instances 200, about a second each)
//
// Each instance is a call of each kind: certified output, sampled output, sampled gradients, by themselves and by the output and lse of a
// forward call. `given` are the calls that promised something, that is returned a polynomial's result, neither a RangeError nor what is exact
// throughout; `above 1`, `above 2` those whose error, measured on all rows against float64 (long sequences: see promise.mjs), is that many
// times the tolerance; slack is the certified bound over that error.

import { mkdirSync, writeFileSync } from 'node:fs';
import { dirname } from 'node:path';
import { parseArgs } from 'node:util';
import { createRopeAttention } from '../../dist/index.js';
import { KINDS } from './instances.mjs';
import { LONG, SHORT, exactOf, expectedOf, methodOf, numbered, promised } from './promise.mjs';

const { values: given } = parseArgs({
  options: {
    long: { type: 'boolean', default: false },
    instances: { type: 'string' },
    from: { type: 'string', default: '0' },
    tolerances: { type: 'string', default: '3' },
    lengths: { type: 'string' },
    binary: { type: 'string', default: 'auto' },
    worst: { type: 'string', default: '5' },
    json: { type: 'string', default: 'build/sweep.json' },
  },
});
const set = given.long ? LONG : SHORT;
const instances = { ...set, ...(given.lengths && { lengths: given.lengths.split(',').map(Number) }) };
const [count, from, each] = [given.instances ?? (given.long ? 200 : 3000), given.from, given.tolerances].map(Number);
const attention = await createRopeAttention({ relaxedSimd: given.binary === 'auto' ? 'auto' : given.binary === 'relaxed-simd' });
const LABELS = {
  certified: 'certified output',
  forward: 'sampled output',
  backward: 'sampled gradients',
  training: 'sampled gradients, saved output',
};
const kept = [];
for (let n = from; n < from + count; n++) {
  const { name, kind, setting, args } = numbered(n, instances);
  const expected = given.long ? exactOf(attention, args) : expectedOf(args);
  const all = instances.tolerances;
  const some = Array.from({ length: each }, (_, step) => all[(3 * n + Math.floor((step * all.length) / each)) % all.length]);
  for (const how of Object.keys(LABELS)) {
    const options = { method: given.long ? 'auto' : methodOf(args) };
    for (let one of promised(attention, args, how, some, expected, options)) {
      if (one.exact) one.ratio = null;
      // gradients of which the exact engine itself may have lost as much
      const doubtful = given.long && how !== 'forward' && one.ratio > 1;
      if (doubtful) [one] = promised(attention, args, how, [one.tolerance], expectedOf(args), options);
      kept.push({ name, kind, setting, how, ...one });
    }
  }
  if ((n - from + 1) % (given.long ? 20 : 500) === 0) console.error(`${n - from + 1} of ${count}`);
}

const quantile = (values, share) => [...values].sort((a, b) => a - b)[Math.floor(share * (values.length - 1))];
const figure = (x) => (x === undefined ? '' : x >= 1000 ? x.toExponential(1) : x.toPrecision(2));
function row(label, calls) {
  const promises = calls.filter(({ ratio }) => ratio !== null);
  const ratios = promises.map(({ ratio }) => ratio);
  const slack = promises.flatMap((one) => one.slack ?? []);
  const above = (limit) => ratios.filter((ratio) => !(ratio <= limit)).length;
  const slacks = slack.length === 0 ? ['', '', ''] : [0, 0.1, 0.5].map((share) => figure(quantile(slack, share)));
  return [...label, calls.length, ratios.length, above(1), above(2), figure(Math.max(0, ...ratios)), figure(quantile(ratios, 0.5)), ...slacks];
}

const head = ['promise', 'input', 'calls', 'given', 'above 1', 'above 2', 'worst', 'median', 'slack: least', 'tenth', 'median'];
console.log(`${attention.simd}; ${count} instances from number ${from}; errors over tolerances\n`);
console.log(`| ${head.join(' | ')} |\n|${head.map(() => ' --- |').join('')}`);
for (const [how, label] of Object.entries(LABELS)) {
  const own = kept.filter((one) => one.how === how);
  console.log(`| ${row([label, 'all'], own).join(' | ')} |`);
  for (const kind of Object.keys(KINDS)) console.log(`| ${row([label, kind], own.filter((one) => one.kind === kind)).join(' | ')} |`);
}
console.log('\nthe worst:');
const ranked = kept.filter(({ ratio }) => ratio !== null).sort((a, b) => b.ratio - a.ratio);
for (const { how, name, tolerance, degree, ratio } of ranked.slice(0, Number(given.worst))) {
  console.log(`  ${ratio.toFixed(2)} of ${tolerance.toExponential(1)}, ${how}, degree ${degree}; ${name}`);
}
mkdirSync(dirname(given.json), { recursive: true });
writeFileSync(given.json, `${JSON.stringify({ simd: attention.simd, from, count, calls: kept })}\n`);
