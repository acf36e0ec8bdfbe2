// test-summary.mjs RESULT...: adds what the native tests and Jest counted. The last line is `N passed, N failed`, also
// written to build/test.txt. A result that is missing is a failure, and so is one with nothing in it.

import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';

let passed = 0;
let failed = 0;
for (const file of process.argv.slice(2)) {
  let ran = 0;
  if (existsSync(file)) {
    const result = JSON.parse(readFileSync(file, 'utf8'));
    // Jest: a suite that does not load has no tests to count
    const good = result.passed ?? result.numPassedTests;
    const bad = result.failed ?? result.numFailedTests + result.numRuntimeErrorTestSuites;
    passed += good;
    failed += bad;
    ran = good + bad;
  }
  if (ran === 0) {
    console.log(`${file}: nothing ran`);
    failed++;
  }
}
const line = `${passed} passed, ${failed} failed\n`;
mkdirSync('build', { recursive: true });
writeFileSync('build/test.txt', line);
process.stdout.write(line);
process.exit(failed > 0 ? 1 : 0);
