// SPDX-License-Identifier: MIT
//
// Four float lanes: the one vocabulary that every kernel is written in, with three bodies: WebAssembly SIMD,
// WebAssembly relaxed SIMD (RA_RELAXED: multiply-add is one rounding), and vectors of gcc and clang for native tests.

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
RA_INLINE f32x4 f32x4_floor(f32x4 a) { return wasm_f32x4_floor(a); }

// a * b + c; one rounding when relaxed, two otherwise.
RA_INLINE f32x4 f32x4_madd(f32x4 a, f32x4 b, f32x4 c) {
#ifdef RA_RELAXED
  return wasm_f32x4_relaxed_madd(a, b, c);
#else
  return wasm_f32x4_add(wasm_f32x4_mul(a, b), c);
#endif
}

// c - a * b; as f32x4_madd.
RA_INLINE f32x4 f32x4_nmadd(f32x4 a, f32x4 b, f32x4 c) {
#ifdef RA_RELAXED
  return wasm_f32x4_relaxed_nmadd(a, b, c);
#else
  return wasm_f32x4_sub(c, wasm_f32x4_mul(a, b));
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

// x = m 2^n for positive lanes that are not subnormal: m in [1, 2), and n as a float.
RA_INLINE f32x4 f32x4_mantissa(f32x4 a) {
  return wasm_v128_or(wasm_v128_and(a, wasm_i32x4_splat(0x7fffff)), wasm_f32x4_splat(1));
}
RA_INLINE f32x4 f32x4_exponent(f32x4 a) {
  return wasm_f32x4_convert_i32x4(wasm_i32x4_sub(wasm_u32x4_shr(a, 23), wasm_i32x4_splat(127)));
}

// Four bytes of each of four rows, as the bits of four lanes; and the lanes of a whose byte n of these is 0, else 0.
RA_INLINE f32x4 f32x4_load_bytes(const uint8_t *p, size_t row) {
  v128_t a = wasm_v128_load32_lane(p + row, wasm_v128_load32_zero(p), 1);
  return wasm_v128_load32_lane(p + 3 * row, wasm_v128_load32_lane(p + 2 * row, a, 2), 3);
}
RA_INLINE f32x4 f32x4_where_no_byte(f32x4 bytes, int n, f32x4 a) {
  v128_t byte = wasm_v128_and(bytes, wasm_u32x4_splat(0xffu << 8 * n));
  return wasm_v128_and(a, wasm_i32x4_eq(byte, wasm_i32x4_splat(0)));
}

RA_INLINE f32x4 f32x4_reverse(f32x4 a) { return wasm_i32x4_shuffle(a, a, 3, 2, 1, 0); }

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

#include <math.h>
#include <string.h>

// Vectors of the compiler: gcc, clang.
typedef __attribute__((vector_size(16))) float f32x4;
typedef __attribute__((vector_size(16))) int32_t ra_mask;

RA_INLINE f32x4 f32x4_load(const float *p) {
  f32x4 r;
  memcpy(&r, p, sizeof r);
  return r;
}
RA_INLINE void f32x4_store(float *p, f32x4 a) { memcpy(p, &a, sizeof a); }
RA_INLINE f32x4 f32x4_splat(float a) { return (f32x4){a, a, a, a}; }
RA_INLINE f32x4 f32x4_load_splat(const float *p) { return f32x4_splat(*p); }
RA_INLINE f32x4 f32x4_add(f32x4 a, f32x4 b) { return a + b; }
RA_INLINE f32x4 f32x4_sub(f32x4 a, f32x4 b) { return a - b; }
RA_INLINE f32x4 f32x4_mul(f32x4 a, f32x4 b) { return a * b; }
RA_INLINE f32x4 f32x4_div(f32x4 a, f32x4 b) { return a / b; }
RA_INLINE f32x4 f32x4_madd(f32x4 a, f32x4 b, f32x4 c) { return a * b + c; }
RA_INLINE f32x4 f32x4_nmadd(f32x4 a, f32x4 b, f32x4 c) { return c - a * b; }

RA_INLINE f32x4 ra_select(ra_mask where, f32x4 a, f32x4 b) {
  return (f32x4)(((ra_mask)a & where) | ((ra_mask)b & ~where));
}

RA_INLINE f32x4 f32x4_abs(f32x4 a) {
  return (f32x4)((ra_mask)a & (ra_mask){INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX});
}
RA_INLINE f32x4 f32x4_floor(f32x4 a) { return (f32x4){floorf(a[0]), floorf(a[1]), floorf(a[2]), floorf(a[3])}; }
RA_INLINE f32x4 f32x4_max(f32x4 a, f32x4 b) { return ra_select(b < a, a, b); }
RA_INLINE f32x4 f32x4_min(f32x4 a, f32x4 b) { return ra_select(a < b, a, b); }
RA_INLINE f32x4 f32x4_where_less(f32x4 x, f32x4 y, f32x4 a, f32x4 b) { return ra_select(x < y, a, b); }

RA_INLINE int f32x4_any_greater(f32x4 a, f32x4 b) {
  ra_mask greater = a > b;
  return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
}

RA_INLINE f32x4 f32x4_bits_to_exponent(f32x4 a) {
  uint32_t bits[4];
  memcpy(bits, &a, sizeof bits);
  for (int i = 0; i < 4; i++) bits[i] <<= 23;
  memcpy(&a, bits, sizeof bits);
  return a;
}

RA_INLINE f32x4 f32x4_exponent(f32x4 a) { return (f32x4){logbf(a[0]), logbf(a[1]), logbf(a[2]), logbf(a[3])}; }
RA_INLINE f32x4 f32x4_mantissa(f32x4 a) {
  f32x4 n = f32x4_exponent(a);
  for (int i = 0; i < 4; i++) a[i] = ldexpf(a[i], -(int)n[i]);
  return a;
}

RA_INLINE void f32x4_store_halves(float *low, float *high, f32x4 a) {
  float lane[4];
  memcpy(lane, &a, sizeof lane);
  memcpy(low, lane, 2 * sizeof *low), memcpy(high, lane + 2, 2 * sizeof *high);
}

RA_INLINE f32x4 f32x4_load_bytes(const uint8_t *p, size_t row) {
  f32x4 a;
  for (int i = 0; i < 4; i++) memcpy((char *)&a + 4 * i, p + (size_t)i * row, 4);
  return a;
}
RA_INLINE f32x4 f32x4_where_no_byte(f32x4 bytes, int n, f32x4 a) {
  uint8_t lane[4][4];
  memcpy(lane, &bytes, sizeof lane);
  for (int i = 0; i < 4; i++) a[i] = lane[i][n] ? 0 : a[i];
  return a;
}

RA_INLINE f32x4 f32x4_reverse(f32x4 a) { return (f32x4){a[3], a[2], a[1], a[0]}; }
RA_INLINE f32x4 f32x4_zip_low(f32x4 a, f32x4 b) { return (f32x4){a[0], b[0], a[1], b[1]}; }
RA_INLINE f32x4 f32x4_zip_high(f32x4 a, f32x4 b) { return (f32x4){a[2], b[2], a[3], b[3]}; }
RA_INLINE f32x4 f32x4_even(f32x4 a, f32x4 b) { return (f32x4){a[0], a[2], b[0], b[2]}; }
RA_INLINE f32x4 f32x4_odd(f32x4 a, f32x4 b) { return (f32x4){a[1], a[3], b[1], b[3]}; }
RA_INLINE f32x4 f32x4_low_halves(f32x4 a, f32x4 b) { return (f32x4){a[0], a[1], b[0], b[1]}; }
RA_INLINE f32x4 f32x4_high_halves(f32x4 a, f32x4 b) { return (f32x4){a[2], a[3], b[2], b[3]}; }

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
