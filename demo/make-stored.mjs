// make-stored.mjs: measures the curves that the page shows before it has computed any, with the built package in this
// Node.js, and writes stored.json. Run it after a change of the kernels: make build && node demo/make-stored.mjs
//
// Under a Node.js without relaxed SIMD (20) it starts again under the one of the npm package `node`, so that the times are
// those of a current browser. Each time is the best of three rounds.

import { spawnSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { runnerImport } from 'vite';

const here = (path) => fileURLToPath(new URL(path, import.meta.url));

if (Number(process.versions.node.split('.')[0]) < 22) {
  const { status } = spawnSync(here('../node_modules/node/bin/node'), process.argv.slice(1), { stdio: 'inherit' });
  process.exit(status ?? 1);
}

const load = async (path) => (await runnerImport(here(path), { root: here('.'), configFile: false, logLevel: 'error' })).module;
const { measure } = await load('src/measure.ts');
const { pack } = await load('src/stored.ts');
const { DEFAULTS } = await load('src/state.ts');
const { createRopeAttention } = await import('../dist/index.js');

const attention = await createRopeAttention();
const engine = {
  forward: async ({ signal: _, ...args }) => attention.forward(args),
  backward: async ({ signal: _, ...args }) => attention.backward(args),
};

/** All points of these settings, or the times only. */
async function points(settings, timesOnly) {
  const found = [];
  const controller = new AbortController();
  const running = measure(settings, engine, {
    signal: controller.signal,
    panelInView: () => 'time',
    onPoints: (more) => found.push(...more),
    onProgress: () => controller.signal.throwIfAborted(),
    onPanel: () => timesOnly && controller.abort(),
    onOmission: () => {},
  });
  await running.catch((error) => {
    if (error.name !== 'AbortError') throw error;
  });
  return found;
}

/** Whatever disturbs a measurement makes it longer, so the shorter of two is the better. */
const total = (point) => point.forward + point.backward;
const better = (a, b) => (b && total(b) < total(a) ? b : a);

const { panel: _, ...settings } = DEFAULTS;
const sets = [];
for (const change of [{}, { certified: true }, { causal: true }, { headDim: 8 }, { headDim: 32, maxDegree: 3 }, { headDim: 64, maxDegree: 2 }]) {
  const of = { ...settings, ...change };
  let all = await points(of, false);
  for (let pass = 1; pass < 3; pass++) {
    const again = await points(of, true);
    const same = (a) => again.find((b) => b.length === a.length && b.degree === a.degree);
    all = all.map((point) => (point.kind === 'time' ? better(point, same(point)) : point));
  }
  console.log(JSON.stringify(of), all.length, 'points');
  sets.push(pack(of, all));
}

const about = `Stored curves were measured with Node.js ${process.versions.node.split('.')[0]} (${attention.simd}) on a build machine.`;
const lines = sets.map(({ settings, errors, times }) => {
  const rows = (of) => of.map((row) => `   ${JSON.stringify(row)}`).join(',\n');
  return ` {"settings": ${JSON.stringify(settings)},\n  "errors": [\n${rows(errors)}],\n  "times": [\n${rows(times)}]}`;
});
writeFileSync(here('stored.json'), `{"about": ${JSON.stringify(about)},\n"sets": [\n${lines.join(',\n')}]}\n`);
