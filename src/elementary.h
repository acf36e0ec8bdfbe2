// SPDX-License-Identifier: MIT
//
// Elementary functions in double precision, for what is computed once a row, a distance or a frequency. libm's are right to the
// last bit or nearly so, by kilobytes of tables and reductions; these may be a unit in the last place behind.

#ifndef RA_ELEMENTARY_H
#define RA_ELEMENTARY_H

#include <stdint.h>
#include <string.h>

// cos and sin of one angle: errors below 2e-16 while |angle| < 2^32, and below 2e-16 + 2^-53 |angle|, which is what rounding of
// the angle itself may be, beyond. NaN for an infinite angle. Rotation at scattered positions takes a fifth less than
// with libm's two.
void ra_cos_sin_f64(double angle, double *cosine, double *sine);

// e^x and the logarithm of x, errors below 2e-16 of what they are; infinities, NaN and zeros as libm's.
double ra_exp_f64(double x);
double ra_log_f64(double x);

// 2^n for a whole number n below 128; 0 below -126.
static inline float ra_power_of_two(float n) {
  uint32_t bits = n < -126 ? 0 : (uint32_t)((int32_t)n + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return power;
}

// The whole number n with 2^(n-1) <= x < 2^n of a float x that is normal and positive; -126 of smaller ones, 129 of infinity.
static inline int ra_exponent(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (int)(bits >> 23) - 126;
}

#endif
