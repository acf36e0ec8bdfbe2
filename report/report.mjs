// SPDX-License-Identifier: MIT
//
// Runs the experiments and writes them as one HTML page and as JSON. Run by `make report`; arguments by ARGS="...":
//
//   --quick   small sizes, well under a minute   --only forward,rank   --seed 1   --out build/report
//
// Each experiment is a module: `title`, `about`, `sizes`, `run` (figures with their numbers and a sentence made from them) and
// `finding` (the shortest form). report.json is { machine, date, experiments: [{ id, finding, figures: [{ id, sentence, columns,
// rows }] }] }: rows are the numbers, columns what their keys mean. A few minutes on one core; nothing else should run beside it.

import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { cpus } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { createRopeAttention } from '../dist/index.js';
import { bundleScript, readStyle } from './bundle.mjs';
import { EXPERIMENTS } from './experiments.mjs';
import { buildPage } from './page.mjs';
import { duration } from './words.mjs';

const { values: given } = parseArgs({
  options: {
    quick: { type: 'boolean', default: false },
    only: { type: 'string' },
    seed: { type: 'string', default: '1' },
    out: { type: 'string', default: 'build/report' },
  },
});

const chosen = given.only ? given.only.split(',') : Object.keys(EXPERIMENTS);
const unknown = chosen.filter((id) => !(id in EXPERIMENTS));
if (unknown.length > 0) {
  console.error(`report: no experiment ${unknown.join(', ')}; there are ${Object.keys(EXPERIMENTS).join(', ')}`);
  process.exit(1);
}

const start = performance.now();
const elapsed = () => duration(performance.now() - start).padStart(7);
const experiments = [];
let simd = '';
for (const [n, id] of chosen.entries()) {
  const { title, about, sizes, run, finding } = EXPERIMENTS[id];
  const began = performance.now();
  const attention = await createRopeAttention();
  simd = attention.simd;
  const figures = run({
    attention,
    sizes: given.quick ? sizes.quick : sizes.full,
    seed: Number(given.seed),
    progress: (what, share) => {
      const percent = Math.round((100 * (n + share)) / chosen.length);
      console.log(`${elapsed()}  ${String(percent).padStart(3)} %  ${title}: ${what}`);
    },
  });
  attention.dispose();
  experiments.push({ id, title, about, finding: finding(figures), seconds: (performance.now() - began) / 1000, figures });
}

const { version } = JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8'));
const report = {
  title: 'Almost linear RoPE attention, measured',
  version,
  date: new Date().toISOString().slice(0, 10),
  machine: `${cpus()[0]?.model.trim() ?? 'unknown processor'}, Node ${process.versions.node}, ${simd}, one thread`,
  quick: given.quick,
  seed: Number(given.seed),
  seconds: (performance.now() - start) / 1000,
  experiments,
};

mkdirSync(given.out, { recursive: true });
const files = {
  'report.json': `${JSON.stringify(report, null, 1)}\n`,
  'index.html': buildPage({ report, script: await bundleScript(), style: readStyle() }),
};
for (const [name, content] of Object.entries(files)) {
  writeFileSync(join(given.out, name), content);
  console.log(`${elapsed()}  written: ${join(given.out, name)} (${Math.round(content.length / 1024)} KB)`);
}
