// SPDX-License-Identifier: MIT
//
// See elementary.h. Arguments are reduced to a small interval, where a power series is as good as a minimax polynomial
// but for two or three terms, and has coefficients that are known.
//
// This work is based on:
//   Cody, Waite. Software Manual for the Elementary Functions. 1980

#include "elementary.h"

#include <float.h>
#include <math.h>

// a = 1/2! + y/4! + y^2/6! + .., b = 1/3! + y/5! + .., from which cos, sin, cosh and sinh of r follow, y = -r^2 or r^2.
// With 4 terms what is left out of these is below (pi/4)^18 / 18! = 2e-18, with 3, for |r| < 0.35, below 0.35^14 / 14!
// = 5e-18. Each term of the four sums in y^2 is a pair of a and a pair of b: they wait for one another half as long.
static void factorial_series(double y, int terms, double *a, double *b) {
  static const double c[4][4] = {
      {1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120},
      {1.0 / 720, 1.0 / 5040, 1.0 / 40320, 1.0 / 362880},
      {1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800},
      {1.0 / 87178291200, 1.0 / 1307674368000, 1.0 / 20922789888000, 1.0 / 355687428096000},
  };
  const double *last = c[terms - 1];
  double square = y * y, a0 = last[0], b0 = last[1], a1 = last[2], b1 = last[3];
  for (int k = terms - 1; k-- > 0;) {
    a0 = a0 * square + c[k][0], b0 = b0 * square + c[k][1];
    a1 = a1 * square + c[k][2], b1 = b1 * square + c[k][3];
  }
  *a = a0 + y * a1, *b = b0 + y * b1;
}

// angle = n pi/2 + r. pi/2 is in three parts, of which the first two have 21 bits: their products with |n| < 2^32 are
// exact, and so are the differences. What remains is the last product's error, 2^-53 2^-43 n, and the rounding of r.
// Larger angles leave a larger r, by rounding of the products: that is taken once more.
void ra_cos_sin_f64(double angle, double *cosine, double *sine) {
  double quarters = 0;
  do {
    double n = rint(angle * 0x1.45f306dc9c883p-1);
    angle = ((angle - n * 0x1.921fbp0) - n * 0x1.5110bp-22) - n * 0x1.18469898cc517p-44;
    quarters += n - 4 * floor(n / 4);
  } while (fabs(angle) > 0.8); // pi/4 is 0.785

  double a, b, y = -angle * angle;
  factorial_series(y, 4, &a, &b);
  double even = 1 + y * a, odd = angle + angle * y * b;

  quarters -= 4 * floor(quarters / 4); // no integer: NaN comes here as well
  int swap = quarters == 1 || quarters == 3;
  double c = swap ? odd : even, s = swap ? even : odd;
  *cosine = quarters == 1 || quarters == 2 ? -c : c;
  *sine = quarters >= 2 ? -s : s;
}

// log 2 in two parts: products of the first with exponents are exact.
#define LN_2_HIGH 0x1.62e42fefa3p-1
#define LN_2_LOW 0x1.3de6af278ece6p-42

static double power_of_two(int n) {
  uint64_t bits = (uint64_t)(n + 1023) << 52;
  double power;
  memcpy(&power, &bits, sizeof power);
  return power;
}

// x = n log 2 + r, |r| < 0.35. 2^n is two factors, so that results may be denormal or infinite.
double ra_exp_f64(double x) {
  const double magic = 0x1.8p52; // adding it rounds to an integer, whose low bits are n
  x = x < -1000 ? -1000 : x > 1000 ? 1000 : x;
  double shifted = x * 0x1.71547652b82fep0 + magic, n = shifted - magic;
  double r = (x - n * LN_2_HIGH) - n * LN_2_LOW, y = r * r, a, b;
  factorial_series(y, 3, &a, &b);
  int32_t low;
  memcpy(&low, &shifted, sizeof low);
  double first = power_of_two(low >> 1), second = power_of_two(low - (low >> 1));
  return (1 + (r + y * (a + r * b))) * first * second;
}

// x = 2^n (1 + f), sqrt 1/2 <= 1 + f < sqrt 2; with s = f / (2 + f), |s| < 0.172,
//   log(1 + f) = 2 artanh s = f - s (f - 2 (s^2/3 + s^4/5 + ..)),
// the form whose largest term is exact; what is left out is below 2 * 0.172^22 / 23 = 2e-18.
double ra_log_f64(double x) {
  static const double c[5][2] = {
      {1.0 / 3, 1.0 / 5}, {1.0 / 7, 1.0 / 9}, {1.0 / 11, 1.0 / 13}, {1.0 / 15, 1.0 / 17}, {1.0 / 19, 1.0 / 21}};
  if (!(x > 0 && x < INFINITY)) return x == 0 ? -INFINITY : x < 0 ? NAN : x;
  int64_t bits;
  double n = 0;
  if (x < DBL_MIN) x *= 0x1p54, n = -54;
  memcpy(&bits, &x, sizeof bits);
  int64_t above = (bits - 0x3fe6a09e667f3bcd) >> 52; // the bits of sqrt 1/2
  n += (double)above;
  bits -= above * ((int64_t)1 << 52);
  memcpy(&x, &bits, sizeof x);
  double f = x - 1, s = f / (2 + f), y = s * s, low = c[4][0], high = c[4][1];
  for (int k = 4; k-- > 0;) low = low * (y * y) + c[k][0], high = high * (y * y) + c[k][1];
  return n * LN_2_HIGH + (f - (s * (f - 2 * y * (low + y * high)) - n * LN_2_LOW));
}
