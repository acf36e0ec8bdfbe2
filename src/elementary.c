// SPDX-License-Identifier: MIT
//
// See elementary.h. Arguments are reduced to a small interval, where a Taylor polynomial is as good as any: its coefficients are known,
// and the three terms more than of a minimax polynomial cost nothing that shows.
//
// This work is based on:
//   Cody, Waite. Software Manual for the Elementary Functions. 1980

#include "elementary.h"

#include <math.h>

// cos r = 1 + r^2 (C_0 + C_1 r^2 + ..), sin r = r + r^3 (S_0 + S_1 r^2 + ..): what is left out is below (pi/4)^18 / 18! = 2e-18.
enum { TERMS = 8 };
static const double taylor[TERMS][2] = {
    {-1.0 / 2, -1.0 / 6},
    {1.0 / 24, 1.0 / 120},
    {-1.0 / 720, -1.0 / 5040},
    {1.0 / 40320, 1.0 / 362880},
    {-1.0 / 3628800, -1.0 / 39916800},
    {1.0 / 479001600, 1.0 / 6227020800},
    {-1.0 / 87178291200, -1.0 / 1307674368000},
    {1.0 / 20922789888000, 1.0 / 355687428096000},
};

// angle = n pi/2 + r. pi/2 is in three parts, of which the first two have 21 bits: their products with |n| < 2^32 are exact, and
// so are the differences. What remains is the last product's error, 2^-53 2^-43 n, and the rounding of r. Larger angles
// leave a larger r, by rounding of the products: that is taken once more.
void ra_cos_sin_f64(double angle, double *cosine, double *sine) {
  double quarters = 0;
  do {
    double n = rint(angle * 0x1.45f306dc9c883p-1);
    angle = ((angle - n * 0x1.921fbp0) - n * 0x1.5110bp-22) - n * 0x1.18469898cc517p-44;
    quarters += n - 4 * floor(n / 4);
  } while (fabs(angle) > 0.8); // pi/4 is 0.785

  double square = angle * angle, even = 0, odd = 0;
  for (int k = TERMS; k-- > 0;) even = even * square + taylor[k][0], odd = odd * square + taylor[k][1];
  even = 1 + square * even, odd = angle + angle * square * odd;

  quarters -= 4 * floor(quarters / 4); // no integer: NaN comes here as well
  int swap = quarters == 1 || quarters == 3;
  double c = swap ? odd : even, s = swap ? even : odd;
  *cosine = quarters == 1 || quarters == 2 ? -c : c;
  *sine = quarters >= 2 ? -s : s;
}
