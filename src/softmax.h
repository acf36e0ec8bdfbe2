// SPDX-License-Identifier: MIT
//
// 2^x for softmax, four lanes. Scores are kept in units of log 2 (queries carry scale * log2 e), so that no kernel needs
// e^x itself.
//
// Cody, Waite: x = n + f with n = round(x), 2^x = 2^n p(f), p of degree 6 minimax on |f| <= 1/2 with p(0) = 1:
// relative error 3.0e-9 before rounding (Lawson iteration in double precision, coefficients rounded one after another).
// Degree 5 would leave 9.4e-8, which shows beside plain float32 attention.

#ifndef RA_SOFTMAX_H
#define RA_SOFTMAX_H

#include "simd.h"

#define RA_LOG2_E 1.44269504088896340736
#define RA_LN_2 0.69314718055994530942

// Where a masked score stands: far below every finite score that a float dot product of sane inputs gives, far above
// -infinity, so that differences of two of them are not NaN.
#define RA_MASKED (-1e30f)

// In powers of two like scores: what is below is as good as forbidden, -3.4657e29 in natural units.
#define RA_FORBIDDEN (RA_MASKED / 2)

// Constants of ra_exp2, four lanes each. They are read from memory inside the loops: as literals V8 rebuilds them at every
// use (5 to 10 points of the forward kernel at D = 16).
typedef struct ra_exp2_constants {
  float low[4], magic[4], c6[4], c5[4], c4[4], c3[4], c2[4], c1[4], c0[4];
} ra_exp2_constants;

#define RA_FOUR(x)                                                                                                     \
  { x, x, x, x }

static const ra_exp2_constants ra_exp2_table = {
    .low = RA_FOUR(-127.0f),       // below: 0
    .magic = RA_FOUR(12583039.0f), // 1.5 * 2^23 + 127: adding it rounds to an integer, whose low bits are n + 127
    .c6 = RA_FOUR(0x1.416b50p-13f),
    .c5 = RA_FOUR(0x1.5f082ep-10f),
    .c4 = RA_FOUR(0x1.3b2de0p-7f),
    .c3 = RA_FOUR(0x1.c6af7cp-5f),
    .c2 = RA_FOUR(0x1.ebfbdcp-3f),
    .c1 = RA_FOUR(0x1.62e430p-1f),
    .c0 = RA_FOUR(1.0f),
};

// The table's address, hidden from the compiler so that it does not turn loads into literals.
RA_INLINE const ra_exp2_constants *ra_exp2_load(void) {
  const ra_exp2_constants *table = &ra_exp2_table;
  __asm__("" : "+r"(table));
  return table;
}

// x = n + f for -127 <= x < 128: sets *f and *power = 2^n, returns (2^f - 1) / f.
RA_INLINE f32x4 ra_exp2_parts(f32x4 x, const ra_exp2_constants *k, f32x4 *f, f32x4 *power) {
  f32x4 shifted = f32x4_add(x, f32x4_load(k->magic));
  *f = f32x4_sub(x, f32x4_sub(shifted, f32x4_load(k->magic)));
  *power = f32x4_bits_to_exponent(shifted);
  f32x4 q = f32x4_madd(f32x4_load(k->c6), *f, f32x4_load(k->c5));
  q = f32x4_madd(q, *f, f32x4_load(k->c4));
  q = f32x4_madd(q, *f, f32x4_load(k->c3));
  q = f32x4_madd(q, *f, f32x4_load(k->c2));
  return f32x4_madd(q, *f, f32x4_load(k->c1));
}

// 2^x for -127 <= x < 128, or NaN; anything elsewhere.
RA_INLINE f32x4 ra_exp2_near(f32x4 x, const ra_exp2_constants *k) {
  f32x4 f, power, q = ra_exp2_parts(x, k, &f, &power);
  return f32x4_mul(f32x4_madd(q, f, f32x4_load(k->c0)), power);
}

// 2^x for x < 128; 0 for x <= -127; NaN for NaN.
RA_INLINE f32x4 ra_exp2(f32x4 x, const ra_exp2_constants *k) {
  return ra_exp2_near(f32x4_max(f32x4_load(k->low), x), k);
}

// tanh x = t / (t + 2) with t = e^2x - 1 = 2^n q(f) + (2^n - 1), q(f) = 2^f - 1: nothing cancels near 0.
// Relative error below 4e-7; +-1 at the ends; NaN for NaN.
RA_INLINE f32x4 ra_tanh(f32x4 x, const ra_exp2_constants *k) {
  x = f32x4_mul(f32x4_min(f32x4_splat(20), x), f32x4_splat((float)(2 * RA_LOG2_E)));
  f32x4 f, power, q = ra_exp2_parts(f32x4_max(f32x4_load(k->low), x), k, &f, &power);
  f32x4 t = f32x4_madd(power, f32x4_mul(q, f), f32x4_sub(power, f32x4_load(k->c0)));
  return f32x4_div(t, f32x4_add(t, f32x4_splat(2)));
}

#endif
