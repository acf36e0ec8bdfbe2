// SPDX-License-Identifier: MIT
//
// Four float lanes: the one vocabulary that every kernel is written in, with three bodies: WebAssembly SIMD,
// WebAssembly relaxed SIMD (RA_RELAXED: multiply-add is one rounding) and plain C for native tests.

#ifndef RA_SIMD_H
#define RA_SIMD_H

#include <stddef.h>
#include <stdint.h>

#define RA_INLINE static inline __attribute__((always_inline))
// Kernels stay functions of their own: engines compile them one by one, so that the first call is fast soon.
#define RA_KERNEL static __attribute__((noinline))

#if defined(__clang__)
// Loops over vectors that must stay loops: unrolled by the compiler they need more than the 15 registers that engines
// give them (0.53 instead of 0.86 of the multiply-add peak).
#define RA_ROLLED _Pragma("clang loop unroll(disable) vectorize(disable) interleave(disable)")
// Loops over the rows of a tile, which must not stay loops: their vectors are to be registers.
#define RA_UNROLLED _Pragma("clang loop unroll(full)")
#else
#define RA_ROLLED
#define RA_UNROLLED
#endif

#ifdef __wasm_simd128__

#include <wasm_simd128.h>

typedef v128_t f32x4;

RA_INLINE f32x4 f32x4_load(const float *p) { return wasm_v128_load(p); }
RA_INLINE void f32x4_store(float *p, f32x4 a) { wasm_v128_store(p, a); }
RA_INLINE f32x4 f32x4_load_splat(const float *p) { return wasm_v128_load32_splat(p); }
RA_INLINE f32x4 f32x4_splat(float a) { return wasm_f32x4_splat(a); }
RA_INLINE f32x4 f32x4_add(f32x4 a, f32x4 b) { return wasm_f32x4_add(a, b); }
RA_INLINE f32x4 f32x4_sub(f32x4 a, f32x4 b) { return wasm_f32x4_sub(a, b); }
RA_INLINE f32x4 f32x4_mul(f32x4 a, f32x4 b) { return wasm_f32x4_mul(a, b); }
RA_INLINE f32x4 f32x4_div(f32x4 a, f32x4 b) { return wasm_f32x4_div(a, b); }
RA_INLINE f32x4 f32x4_abs(f32x4 a) { return wasm_f32x4_abs(a); }

// a * b + c; one rounding when relaxed, two otherwise.
RA_INLINE f32x4 f32x4_madd(f32x4 a, f32x4 b, f32x4 c) {
#ifdef RA_RELAXED
  return wasm_f32x4_relaxed_madd(a, b, c);
#else
  return wasm_f32x4_add(wasm_f32x4_mul(a, b), c);
#endif
}

// The larger lane; b < a ? a : b, so that a NaN in b stays and one in a is lost (one instruction on x86).
RA_INLINE f32x4 f32x4_max(f32x4 a, f32x4 b) { return wasm_f32x4_pmax(b, a); }
RA_INLINE f32x4 f32x4_min(f32x4 a, f32x4 b) { return wasm_f32x4_pmin(b, a); }

// a > b in some lane; a lane with a NaN does not count.
RA_INLINE int f32x4_any_greater(f32x4 a, f32x4 b) { return wasm_v128_any_true(wasm_f32x4_gt(a, b)); }

// Lanes of a where x < y, else of b.
RA_INLINE f32x4 f32x4_where_less(f32x4 x, f32x4 y, f32x4 a, f32x4 b) {
  return wasm_v128_bitselect(a, b, wasm_f32x4_lt(x, y));
}

// 2^n in each lane, n being the low 8 bits of the float's bits less 127 (see ra_exp2): the bits move to the exponent.
RA_INLINE f32x4 f32x4_bits_to_exponent(f32x4 a) { return wasm_i32x4_shl(a, 23); }

// (a0, b0, a1, b1) and (a2, b2, a3, b3)
RA_INLINE f32x4 f32x4_zip_low(f32x4 a, f32x4 b) { return wasm_i32x4_shuffle(a, b, 0, 4, 1, 5); }
RA_INLINE f32x4 f32x4_zip_high(f32x4 a, f32x4 b) { return wasm_i32x4_shuffle(a, b, 2, 6, 3, 7); }
// (a0, a1) and (a2, a3)
RA_INLINE void f32x4_store_halves(float *low, float *high, f32x4 a) {
  wasm_v128_store64_lane(low, a, 0), wasm_v128_store64_lane(high, a, 1);
}
// (a0, a2, b0, b2) and (a1, a3, b1, b3)
RA_INLINE f32x4 f32x4_even(f32x4 a, f32x4 b) { return wasm_i32x4_shuffle(a, b, 0, 2, 4, 6); }
RA_INLINE f32x4 f32x4_odd(f32x4 a, f32x4 b) { return wasm_i32x4_shuffle(a, b, 1, 3, 5, 7); }
// (a0, a1, b0, b1) and (a2, a3, b2, b3)
RA_INLINE f32x4 f32x4_low_halves(f32x4 a, f32x4 b) { return wasm_i32x4_shuffle(a, b, 0, 1, 4, 5); }
RA_INLINE f32x4 f32x4_high_halves(f32x4 a, f32x4 b) { return wasm_i32x4_shuffle(a, b, 2, 3, 6, 7); }

#else

#include <string.h>

typedef struct f32x4 {
  float lane[4];
} f32x4;

#define RA_LANES(expression)                                                                                           \
  f32x4 r;                                                                                                             \
  for (int i = 0; i < 4; i++) r.lane[i] = (expression);                                                                \
  return r

RA_INLINE f32x4 f32x4_load(const float *p) { RA_LANES(p[i]); }
RA_INLINE void f32x4_store(float *p, f32x4 a) { memcpy(p, a.lane, sizeof a.lane); }
RA_INLINE f32x4 f32x4_load_splat(const float *p) { RA_LANES(*p); }
RA_INLINE f32x4 f32x4_splat(float a) { RA_LANES(a); }
RA_INLINE f32x4 f32x4_add(f32x4 a, f32x4 b) { RA_LANES(a.lane[i] + b.lane[i]); }
RA_INLINE f32x4 f32x4_sub(f32x4 a, f32x4 b) { RA_LANES(a.lane[i] - b.lane[i]); }
RA_INLINE f32x4 f32x4_mul(f32x4 a, f32x4 b) { RA_LANES(a.lane[i] * b.lane[i]); }
RA_INLINE f32x4 f32x4_div(f32x4 a, f32x4 b) { RA_LANES(a.lane[i] / b.lane[i]); }
RA_INLINE f32x4 f32x4_abs(f32x4 a) { RA_LANES(a.lane[i] < 0 ? -a.lane[i] : a.lane[i]); }
RA_INLINE f32x4 f32x4_madd(f32x4 a, f32x4 b, f32x4 c) { RA_LANES(a.lane[i] * b.lane[i] + c.lane[i]); }
RA_INLINE f32x4 f32x4_max(f32x4 a, f32x4 b) { RA_LANES(b.lane[i] < a.lane[i] ? a.lane[i] : b.lane[i]); }
RA_INLINE f32x4 f32x4_min(f32x4 a, f32x4 b) { RA_LANES(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }

RA_INLINE int f32x4_any_greater(f32x4 a, f32x4 b) {
  int any = 0;
  for (int i = 0; i < 4; i++) any |= a.lane[i] > b.lane[i];
  return any;
}

RA_INLINE f32x4 f32x4_where_less(f32x4 x, f32x4 y, f32x4 a, f32x4 b) {
  RA_LANES(x.lane[i] < y.lane[i] ? a.lane[i] : b.lane[i]);
}

RA_INLINE f32x4 f32x4_bits_to_exponent(f32x4 a) {
  uint32_t bits[4];
  memcpy(bits, a.lane, sizeof bits);
  for (int i = 0; i < 4; i++) bits[i] <<= 23;
  memcpy(a.lane, bits, sizeof bits);
  return a;
}

RA_INLINE void f32x4_store_halves(float *low, float *high, f32x4 a) {
  memcpy(low, a.lane, 2 * sizeof *low), memcpy(high, a.lane + 2, 2 * sizeof *high);
}

#define RA_PICK(c0, c1, c2, c3)                                                                                        \
  f32x4 r = {{c0, c1, c2, c3}};                                                                                        \
  return r

RA_INLINE f32x4 f32x4_zip_low(f32x4 a, f32x4 b) { RA_PICK(a.lane[0], b.lane[0], a.lane[1], b.lane[1]); }
RA_INLINE f32x4 f32x4_zip_high(f32x4 a, f32x4 b) { RA_PICK(a.lane[2], b.lane[2], a.lane[3], b.lane[3]); }
RA_INLINE f32x4 f32x4_even(f32x4 a, f32x4 b) { RA_PICK(a.lane[0], a.lane[2], b.lane[0], b.lane[2]); }
RA_INLINE f32x4 f32x4_odd(f32x4 a, f32x4 b) { RA_PICK(a.lane[1], a.lane[3], b.lane[1], b.lane[3]); }
RA_INLINE f32x4 f32x4_low_halves(f32x4 a, f32x4 b) { RA_PICK(a.lane[0], a.lane[1], b.lane[0], b.lane[1]); }
RA_INLINE f32x4 f32x4_high_halves(f32x4 a, f32x4 b) { RA_PICK(a.lane[2], a.lane[3], b.lane[2], b.lane[3]); }

#endif

// Sum of the four lanes, pairwise.
RA_INLINE float f32x4_sum(f32x4 a) {
  float lane[4];
  f32x4_store(lane, a);
  return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

// Rows a b c d become columns.
RA_INLINE void f32x4_transpose(f32x4 *a, f32x4 *b, f32x4 *c, f32x4 *d) {
  f32x4 ab_low = f32x4_zip_low(*a, *b), ab_high = f32x4_zip_high(*a, *b);
  f32x4 cd_low = f32x4_zip_low(*c, *d), cd_high = f32x4_zip_high(*c, *d);
  *a = f32x4_low_halves(ab_low, cd_low);
  *b = f32x4_high_halves(ab_low, cd_low);
  *c = f32x4_low_halves(ab_high, cd_high);
  *d = f32x4_high_halves(ab_high, cd_high);
}

#endif
