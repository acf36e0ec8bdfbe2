// SPDX-License-Identifier: MIT
//
// The arena: its arithmetic at sizes that no test can allocate, with a memory that only pretends, and the kernels at
// addresses past 2 GiB, where pointers are negative as 32-bit integers.

import { readFileSync } from 'node:fs';
import { describe, expect, test } from '@jest/globals';

import { Session } from '../dist/kernel.js';
import { Arena, MEMORY_LIMIT } from '../dist/memory.js';
import { readCall } from '../dist/validate.js';
import { problem } from './support.js';
import type { Setting } from './support.js';

const GIB = 2 ** 30;

/** A memory of `bytes` bytes that grows to at most `most`; nothing can be read or written. */
function pretended(bytes: number, most: number): { memory: WebAssembly.Memory; grown: number[] } {
  const grown: number[] = [];
  const memory = {
    buffer: { byteLength: bytes },
    grow(pages: number) {
      if (this.buffer.byteLength + pages * 65536 > most) throw new RangeError('Unable to grow');
      this.buffer.byteLength += pages * 65536;
      grown.push(pages);
    },
  };
  return { memory: memory as unknown as WebAssembly.Memory, grown };
}

describe('the arena', () => {
  test('hands out addresses that are multiples of 16, past 2 GiB too', () => {
    const arena = new Arena(pretended(65536, 4 * GIB).memory, 1001, Infinity);
    const addresses = [1, 16, 3 * GIB, 17, 0, 5].map((bytes) => arena.reserve(bytes));
    expect(addresses).toEqual([1008, 1024, 1040, 1040 + 3 * GIB, 1072 + 3 * GIB, 1072 + 3 * GIB]);
    expect(arena.needed).toBe(1088 + 3 * GIB);
  });

  test('grows once, by whole pages, and not again for less', () => {
    const { memory, grown } = pretended(65536, 4 * GIB);
    const arena = new Arena(memory, 1024, Infinity);
    arena.reserve(100_000);
    arena.reserve(3 * GIB);
    expect(grown).toEqual([]);
    arena.commit('test');
    expect(grown).toEqual([Math.ceil(arena.needed / 65536) - 1]);
    arena.reset();
    arena.reserve(3 * GIB);
    arena.commit('test');
    expect(grown).toHaveLength(1);
  });

  test('an impossible size is a RangeError with both numbers, and nothing grows', () => {
    const { memory, grown } = pretended(65536, 4 * GIB);
    const arena = new Arena(memory, 0, Infinity);
    arena.reserve(3 * GIB);
    arena.reserve(GIB);
    expect(() => arena.commit('forward')).toThrow(
      new RangeError(`forward: needs ${4 * GIB} bytes of WebAssembly memory, the limit is ${MEMORY_LIMIT}`),
    );
    arena.reserve(2 ** 60);
    expect(() => arena.commit('forward')).toThrow(RangeError);
    arena.reserve(Infinity);
    expect(() => arena.commit('forward')).toThrow('forward: needs more than 4294967296 bytes');
    expect(grown).toEqual([]);
    arena.reset();
    expect(() => arena.commit('forward')).not.toThrow();
  });

  test('an engine that gives no more is a RangeError with both numbers', () => {
    const arena = new Arena(pretended(GIB, 2 * GIB).memory, 0, Infinity);
    arena.reserve(3 * GIB);
    expect(() => arena.commit('backward')).toThrow(RangeError);
    expect(() => arena.commit('backward')).toThrow(
      `backward: needs ${3 * GIB} bytes of WebAssembly memory, the engine gives no more than the present ${GIB}`,
    );
  });

  test('structs are four bytes a field, in order', () => {
    const memory = new WebAssembly.Memory({ initial: 1 });
    const arena = new Arena(memory, 0, Infinity);
    const fields = { a: 'u32', b: 'i32', c: 'f32', d: 'address' } as const;
    const values = { a: 2 ** 32 - 1, b: -(2 ** 31), c: -0.5, d: 3 * GIB };
    arena.writeStruct(16, fields, values);
    expect(Array.from(new Uint32Array(memory.buffer, 16, 4))).toEqual([0xffffffff, 0x80000000, 0xbf000000, 0xc0000000]);
    expect(arena.readStruct(16, fields)).toEqual(values);
  });
});

const shape = { heads: 2, queryLength: 70, headDim: 8 };
const everything = {
  rotary: { queryPositions: new Float32Array(70).fill(3), keyPositions: new Float32Array(70).fill(1) },
  segments: [0, 30],
  bias: new Float32Array(139).fill(0.5),
  mask: Float32Array.from({ length: 4900 }, (_, n) => n % 3),
  sinks: Float32Array.of(1, 2),
};
const relative = { support: Uint32Array.of(0, 1, 1, 0, 1, 1), weights: Float32Array.from({ length: 417 }, (_, n) => n % 5) };
test.each<[string, Partial<Setting>, (number | null)[]]>([
  ['both engines', {}, [null, 2]],
  ['with all options', everything, [null]],
  ['with positions that differ otherwise', { relativePositions: relative.weights.subarray(0, 139) }, [null]],
  ['with a relative map', { ...everything, rotary: undefined, relative }, [null]],
])('the kernels work past 2 GiB as below: %s', (_, options, degrees) => {
  const bytes = new Uint8Array(readFileSync(new URL('../dist/rope-attention.wasm', import.meta.url)));
  const { problem: settled, inputs } = readCall(
    'backward',
    problem({ shape, causal: true, ...options }, 1),
  );
  const coefficients = Float32Array.of(1, 1, 0.5, 1, 1, 0.5);
  const rows = [0, 33, 69];

  const results = [0, 2 * GIB - 4096, 3 * GIB].map((shift) => {
    const exports = new WebAssembly.Instance(new WebAssembly.Module(bytes)).exports as never as ConstructorParameters<
      typeof Session
    >[2];
    const arena = new Arena(exports.memory, (exports.__heap_base.value as number) + shift, MEMORY_LIMIT);
    const session = new Session('backward', settled, exports, arena);
    session.load(inputs, 'backward', 0);
    const found: unknown[] = [session.prepare(1), session.scores(1, rows, 3), session.rows(1, rows, true)];
    for (const degree of degrees) {
      for (const pass of ['forward', 'backward'] as const) {
        session.setWorkspace(session.workspaceBytes(pass, degree));
        session.setEngine(degree, degree === null ? undefined : coefficients);
        expect(session.run(pass, 0, session.units(pass))).toBe(true);
      }
      for (const name of ['out', 'lse', 'dq', 'dk', 'dv'] as const) found.push(session.result(name));
      found.push(session.columns(1, rows));
      found.push(...(['dbias', 'dsinks', 'dweights'] as const).map((name) => session.vector(name)));
    }
    expect(session.bytes).toBeGreaterThan(shift);
    session.close();
    return found;
  });
  expect(results[1]).toEqual(results[0]);
  expect(results[2]).toEqual(results[0]);
});
