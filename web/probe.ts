// SPDX-License-Identifier: MIT
//
// Which WebAssembly SIMD this engine knows: two modules of one instruction each, shown to WebAssembly.validate. An engine
// that lacks an instruction refuses the whole module that holds it, so this is asked before a binary is chosen.

/** (module (func (param v128) (result v128) (f32x4.add (local.get 0) (local.get 0)))) */
const SIMD128 = Uint8Array.of(
  ...[0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00], // "\0asm", version 1
  ...[0x01, 0x06, 0x01, 0x60, 0x01, 0x7b, 0x01, 0x7b], // type 0: v128 -> v128
  ...[0x03, 0x02, 0x01, 0x00], // function 0 has type 0
  ...[0x0a, 0x0b, 0x01, 0x09, 0x00], // code: one body of 9 bytes, no locals
  ...[0x20, 0x00, 0x20, 0x00, 0xfd, 0xe4, 0x01, 0x0b], // local.get 0, local.get 0, f32x4.add, end
);

/** (module (func (param v128 v128 v128) (result v128) (f32x4.relaxed_madd (local.get 0) (local.get 1) (local.get 2)))) */
const RELAXED = Uint8Array.of(
  ...[0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00], // "\0asm", version 1
  ...[0x01, 0x08, 0x01, 0x60, 0x03, 0x7b, 0x7b, 0x7b, 0x01, 0x7b], // type 0: v128 v128 v128 -> v128
  ...[0x03, 0x02, 0x01, 0x00], // function 0 has type 0
  ...[0x0a, 0x0d, 0x01, 0x0b, 0x00], // code: one body of 11 bytes, no locals
  ...[0x20, 0x00, 0x20, 0x01, 0x20, 0x02, 0xfd, 0x85, 0x02, 0x0b], // local.get 0, 1, 2, f32x4.relaxed_madd, end
);

/** Fixed-width SIMD, which every binary needs. */
export function hasSimd(): boolean {
  return typeof WebAssembly === 'object' && WebAssembly.validate(SIMD128);
}

/** Relaxed SIMD (fused multiply-add), which the faster binary needs. */
export function hasRelaxedSimd(): boolean {
  return typeof WebAssembly === 'object' && WebAssembly.validate(RELAXED);
}
