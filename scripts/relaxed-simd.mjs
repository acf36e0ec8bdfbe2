// Does this Node know relaxed SIMD? V8 of Node 20 has it behind a flag, Node 22 and later have it.

import { spawnSync } from 'node:child_process';

const flag = '--experimental-wasm-relaxed-simd';

// (module (func (result v128) (f32x4.relaxed_madd (v128.const 0) (v128.const 0) (v128.const 0))))
const zero = [0xfd, 0x0c, ...new Array(16).fill(0)];
const body = [0, ...zero, ...zero, ...zero, 0xfd, 0x85, 0x02, 0x0b];
const probe = Uint8Array.from([
  ...[0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00],
  ...[1, 5, 1, 0x60, 0, 1, 0x7b],
  ...[3, 2, 1, 0],
  ...[10, body.length + 2, 1, body.length, ...body],
]);

/** The flags that `node` (default: the one running) needs for relaxed SIMD: none, one, or none because it has none. */
export function relaxedSimdFlags(node = process.execPath) {
  const accepts = (flags) => {
    const script = `process.exit(WebAssembly.validate(Uint8Array.from([${probe}])) ? 0 : 1)`;
    return spawnSync(node, [...flags, '-e', script], { stdio: 'ignore' }).status === 0;
  };
  if (node === process.execPath ? WebAssembly.validate(probe) : accepts([])) return [];
  return accepts([flag]) ? [flag] : [];
}
