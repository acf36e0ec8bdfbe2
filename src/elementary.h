// SPDX-License-Identifier: MIT
//
// Elementary functions in double precision, for what is computed once a row, a distance or a frequency. libm's are right to the
// last bit or nearly so, by kilobytes of tables and reductions; these are one unit in the last place behind.

#ifndef RA_ELEMENTARY_H
#define RA_ELEMENTARY_H

// cos and sin of one angle: errors below 1.7e-16 while |angle| < 2^32, and below 1.7e-16 + 2^-53 |angle|, which is what rounding of
// the angle itself may be, beyond. NaN for an infinite angle. Rotation at scattered positions takes a fifth less than with libm's two.
void ra_cos_sin_f64(double angle, double *cosine, double *sine);

#endif
