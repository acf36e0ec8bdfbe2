// Runs Jest on ES modules with the Node that is running, relaxed SIMD switched on where that takes a flag. Arguments go to
// Jest. Jest's worker processes get the same flags.

import { spawnSync } from 'node:child_process';
import { createRequire } from 'node:module';
import { relaxedSimdFlags } from './relaxed-simd.mjs';

const jest = createRequire(import.meta.url).resolve('jest/bin/jest');
const flags = ['--experimental-vm-modules', '--disable-warning=ExperimentalWarning', ...relaxedSimdFlags()];
const { status } = spawnSync(process.execPath, [...flags, jest, ...process.argv.slice(2)], { stdio: 'inherit' });
process.exit(status ?? 1);
