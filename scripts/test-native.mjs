// test-native.mjs RESULT PROGRAM...: runs each test program, which prints what it likes and ends with
// `N passed, N failed`; writes the sums to RESULT. A program that dies or prints no such line is one more failure.

import { spawnSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';

const [result, ...programs] = process.argv.slice(2);
const env = {
  ASAN_OPTIONS: 'detect_stack_use_after_return=1',
  UBSAN_OPTIONS: 'print_stacktrace=1',
  ...process.env,
};

let passed = 0;
let failed = 0;
for (const program of programs) {
  console.log(`\n${program}`);
  const run = spawnSync(program, { encoding: 'utf8', env, stdio: ['ignore', 'pipe', 'inherit'], maxBuffer: 2 ** 28 });
  process.stdout.write(run.stdout ?? '');
  const counts = /^(\d+) passed, (\d+) failed\s*$/m.exec((run.stdout ?? '').trimEnd().split('\n').at(-1));
  passed += Number(counts?.[1] ?? 0);
  failed += Number(counts?.[2] ?? 0);
  if (!counts || (run.status !== 0 && counts[2] === '0')) {
    console.log(`${program}: ${counts ? '' : 'no count, '}${run.signal ?? run.error ?? `exit status ${run.status}`}`);
    failed++;
  }
}
if (programs.length === 0) console.log('no native tests');
console.log(`\nnative: ${passed} passed, ${failed} failed`);
writeFileSync(result, JSON.stringify({ passed, failed }));
process.exit(failed > 0 ? 1 : 0);
