// SPDX-License-Identifier: MIT
//
// Turning rows into lanes and back; filling, adding, summing and multiplying rows.

#ifndef RA_PACK_H
#define RA_PACK_H

#include "simd.h"

// y[c][r] = x[r][c] for r < rows, c < columns; nothing else of y is written. Cost O(rows columns).
void ra_transpose(const float *x, size_t x_row, size_t rows, size_t columns, float *y, size_t y_row);

// y[0 .. count - 1] = value.
void ra_fill(float *y, size_t count, float value);

// y[0 .. count - 1] += x.
static inline void ra_add(const float *x, size_t count, float *y) {
  size_t i = 0;
  RA_ROLLED
  for (; i + 4 <= count; i += 4) f32x4_store(y + i, f32x4_add(f32x4_load(y + i), f32x4_load(x + i)));
  RA_ROLLED
  for (; i < count; i++) y[i] += x[i];
}

// sum[d] += the sum of x[n][d], n < count <= 32, but those whose bit n is set in `skipped`: of these rows as floats.
void ra_sum_rows(const float *x, size_t x_row, uint32_t count, size_t columns, uint32_t skipped, double *sum);

// The sum of x[i] y[i], i < count.
float ra_dot(const float *x, const float *y, size_t count);

#endif
