// SPDX-License-Identifier: MIT
//
// The instruction counts that `make profile` prints.

import { expect, test } from '@jest/globals';

import { KINDS, loopsOf } from './profile/loops.mjs';

const section = (id: number, ...bytes: number[]) => [id, bytes.length, ...bytes];
const text = (value: string) => [value.length, ...Buffer.from(value)];

/** A module of functions without arguments and results, by name, whose bodies are these instructions. */
function moduleOf(functions: Record<string, number[]>): Buffer {
  const bodies = Object.values(functions).map((code) => [code.length + 4, 1, 1, 0x7b, ...code, 0x0b]); // one local, v128
  const names = Object.keys(functions).flatMap((name, n) => [n, ...text(name)]);
  const count = bodies.length;
  return Buffer.from([
    ...[0, 0x61, 0x73, 0x6d, 1, 0, 0, 0],
    ...section(1, 1, 0x60, 0, 0),
    ...section(3, count, ...bodies.map(() => 0)),
    ...section(5, 1, 0, 1),
    ...section(10, count, ...bodies.flat()),
    ...section(0, ...text('name'), 1, names.length + 1, count, ...names),
  ]);
}

const zero = [0x41, 0]; // i32.const 0
const load = [0xfd, 0, 4, 0];
const splat = [0xfd, 9, 2, 0];
const madd = [0xfd, 0x85, 2];
const store = [0xfd, 11, 4, 0];
const again = [0x41, 0, 0x45, 0x0d, 0]; // i32.const, i32.eqz, br_if 0
const loop = (...code: number[]) => [0x03, 0x40, ...code, 0x0b];

test('instructions of inner loops are counted by kind, constants and locals not at all', () => {
  const sum = loop(...zero, ...zero, ...load, ...zero, ...splat, ...zero, ...load, ...madd, ...store, ...again);
  const bytes = moduleOf({
    nested: [...zero, ...zero, ...load, ...store, ...loop(...sum, ...again)],
    shuffles: loop(...zero, ...load, ...zero, ...load, 0xfd, 13, ...Array.from({ length: 16 }, (_, n) => n), 0x21, 0),
    scalar: loop(...again),
  });
  const loops = loopsOf(bytes);
  expect(loops.get('nested')).toEqual([{ load: 2, 'splat load': 1, 'multiply-add': 1, store: 1, scalar: 2 }]);
  expect(loops.get('shuffles')).toEqual([{ load: 2, 'other vector': 1 }]);
  expect(loops.get('scalar')).toEqual([]);
  for (const counts of [...loops.values()].flat()) for (const kind of Object.keys(counts)) expect(KINDS).toContain(kind);
});

test('loops come by their vector instructions, the most first', () => {
  const small = loop(...zero, ...zero, ...load, ...store);
  const large = loop(...zero, ...zero, ...load, ...zero, ...load, ...zero, ...splat, ...madd, ...store);
  expect(loopsOf(moduleOf({ both: [...small, ...large] })).get('both')).toEqual([
    { load: 2, 'splat load': 1, 'multiply-add': 1, store: 1 },
    { load: 1, store: 1 },
  ]);
});
