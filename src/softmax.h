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

// 2^x for -127 <= x < 128, or NaN; anything elsewhere.
RA_INLINE f32x4 ra_exp2_near(f32x4 x, const ra_exp2_constants *k) {
  f32x4 shifted = f32x4_add(x, f32x4_load(k->magic));
  f32x4 f = f32x4_sub(x, f32x4_sub(shifted, f32x4_load(k->magic)));
  f32x4 q = f32x4_madd(f32x4_load(k->c6), f, f32x4_load(k->c5));
  q = f32x4_madd(q, f, f32x4_load(k->c4));
  q = f32x4_madd(q, f, f32x4_load(k->c3));
  q = f32x4_madd(q, f, f32x4_load(k->c2));
  q = f32x4_madd(q, f, f32x4_load(k->c1));
  return f32x4_mul(f32x4_madd(q, f, f32x4_load(k->c0)), f32x4_bits_to_exponent(shifted));
}

// 2^x for x < 128; 0 for x <= -127; NaN for NaN.
RA_INLINE f32x4 ra_exp2(f32x4 x, const ra_exp2_constants *k) {
  return ra_exp2_near(f32x4_max(f32x4_load(k->low), x), k);
}

// log of m in [1, 2), and 2^whole times as much, for a whole number: an absolute error of 1e-7, of results above 1 a
// relative one. t = m - 1, or m / 2 - 1 from sqrt 2 on: log(1 + t) = t - t^2 / 2 + t^3 q(t), q of degree 7: relative
// error 5.8e-9 before rounding (weighted least squares, weights by Lawson, coefficients rounded one after another).
RA_INLINE f32x4 ra_log(f32x4 m, f32x4 whole) {
  static const float c[8] = {0x1.555554p-2f, -0x1.000226p-2f, 0x1.99a01ep-3f, -0x1.54728cp-3f,
                             0x1.22d8fap-3f, -0x1.0d81f4p-3f, 0x1.05600cp-3f, -0x1.38cea0p-4f};
  static const float ln_2[2] = {0x1.63p-1f, -0x1.bd0106p-13f}; // in two parts, of which the first makes exact products
  f32x4 one = f32x4_splat(1), half = f32x4_splat(0.5f), root = f32x4_splat(0x1.6a09e6p0f);
  f32x4 n = f32x4_where_less(m, root, whole, f32x4_add(whole, one));
  f32x4 t = f32x4_sub(f32x4_where_less(m, root, m, f32x4_mul(m, half)), one), square = f32x4_mul(t, t);
  f32x4 q = f32x4_load_splat(c + 7);
  RA_ROLLED
  for (int i = 7; i-- > 0;) q = f32x4_madd(q, t, f32x4_load_splat(c + i));
  q = f32x4_mul(square, f32x4_sub(f32x4_mul(t, q), half));
  q = f32x4_add(t, f32x4_madd(n, f32x4_load_splat(ln_2 + 1), q));
  return f32x4_madd(n, f32x4_load_splat(ln_2), q);
}

// Constants of tanh: c_m of x^(2m + 1) in ra_tanh_near; p_m and q_m of the quotient in ra_tanh.
typedef struct ra_tanh_constants {
  float c4[4], c3[4], c2[4], c1[4], one[4];
  float p4[4], p3[4], p2[4], p1[4], q4[4], q3[4], q2[4], q1[4], low[4], high[4];
} ra_tanh_constants;

static const ra_tanh_constants ra_tanh_table = {
    .c4 = RA_FOUR(0x1.18bd9ap-6f),
    .c3 = RA_FOUR(-0x1.b20fe6p-5f),
    .c2 = RA_FOUR(0x1.10e438p-3f),
    .c1 = RA_FOUR(-0x1.5554a4p-2f),
    .one = RA_FOUR(1.0f),
    .p4 = RA_FOUR(0x1.cae0e8p-27f),
    .p3 = RA_FOUR(0x1.59c4eep-16f),
    .p2 = RA_FOUR(0x1.ca2d4ap-9f),
    .p1 = RA_FOUR(0x1.120b38p-3f),
    .q4 = RA_FOUR(0x1.a182f4p-21f),
    .q3 = RA_FOUR(0x1.58871ep-12f),
    .q2 = RA_FOUR(0x1.a7f854p-6f),
    .q1 = RA_FOUR(0x1.de5ae6p-2f),
    .low = RA_FOUR(-9.0f),
    .high = RA_FOUR(9.0f),
};

// As ra_exp2_load.
RA_INLINE const ra_tanh_constants *ra_tanh_load(void) {
  const ra_tanh_constants *table = &ra_tanh_table;
  __asm__("" : "+r"(table));
  return table;
}

#define RA_TANH_NEAR 0.5f

// (tanh x) / x for |x| <= RA_TANH_NEAR: degree 4 in x^2, minimax, relative error 1.3e-8 before rounding (Remez in 40 digits).
RA_INLINE f32x4 ra_tanh_near(f32x4 x, const ra_tanh_constants *k) {
  f32x4 u = f32x4_mul(x, x), q = f32x4_madd(f32x4_load(k->c4), u, f32x4_load(k->c3));
  q = f32x4_madd(q, u, f32x4_load(k->c2));
  q = f32x4_madd(q, u, f32x4_load(k->c1));
  return f32x4_madd(q, u, f32x4_load(k->one));
}

// tanh x = x P(x^2) / Q(x^2), both of degree 4: minimax on |x| <= 9, relative error 2.1e-8 before rounding (weighted
// least squares, weights by Lawson). What is beyond stays at tanh 9, which is 1 to 3e-8; NaN for NaN.
RA_INLINE f32x4 ra_tanh(f32x4 x, const ra_tanh_constants *k) {
  x = f32x4_max(f32x4_load(k->low), f32x4_min(f32x4_load(k->high), x));
  f32x4 u = f32x4_mul(x, x), one = f32x4_load(k->one);
  f32x4 p = f32x4_madd(f32x4_load(k->p4), u, f32x4_load(k->p3)),
        q = f32x4_madd(f32x4_load(k->q4), u, f32x4_load(k->q3));
  p = f32x4_madd(p, u, f32x4_load(k->p2)), q = f32x4_madd(q, u, f32x4_load(k->q2));
  p = f32x4_madd(p, u, f32x4_load(k->p1)), q = f32x4_madd(q, u, f32x4_load(k->q1));
  p = f32x4_madd(p, u, one), q = f32x4_madd(q, u, one);
  return f32x4_div(f32x4_mul(x, p), q);
}

#endif
