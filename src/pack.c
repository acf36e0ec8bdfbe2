// SPDX-License-Identifier: MIT
//
// See pack.h. Four rows at a time by four columns, then two, then one.

#include "pack.h"

void ra_transpose(const float *x, size_t x_row, size_t rows, size_t columns, float *y, size_t y_row) {
  size_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    size_t c = 0;
    for (; c + 4 <= columns; c += 4) {
      const float *from = x + r * x_row + c;
      float *to = y + c * y_row + r;
      f32x4 x0 = f32x4_load(from), x1 = f32x4_load(from + x_row);
      f32x4 x2 = f32x4_load(from + 2 * x_row), x3 = f32x4_load(from + 3 * x_row);
      f32x4_transpose(&x0, &x1, &x2, &x3);
      f32x4_store(to, x0), f32x4_store(to + y_row, x1);
      f32x4_store(to + 2 * y_row, x2), f32x4_store(to + 3 * y_row, x3);
    }
    RA_ROLLED
    for (; c < columns; c++)
      for (size_t i = r; i < r + 4; i++) y[c * y_row + i] = x[i * x_row + c];
  }
  for (; r + 2 <= rows; r += 2) {
    size_t c = 0;
    for (; c + 4 <= columns; c += 4) {
      const float *from = x + r * x_row + c;
      float *to = y + c * y_row + r;
      f32x4 x0 = f32x4_load(from), x1 = f32x4_load(from + x_row);
      f32x4_store_halves(to, to + y_row, f32x4_zip_low(x0, x1));
      f32x4_store_halves(to + 2 * y_row, to + 3 * y_row, f32x4_zip_high(x0, x1));
    }
    RA_ROLLED
    for (; c < columns; c++)
      for (size_t i = r; i < r + 2; i++) y[c * y_row + i] = x[i * x_row + c];
  }
  for (; r < rows; r++) {
    RA_ROLLED
    for (size_t c = 0; c < columns; c++) y[c * y_row + r] = x[r * x_row + c];
  }
}

void ra_fill(float *y, size_t count, float value) {
  for (size_t i = 0; i < count; i++) y[i] = value;
}

// Of 4 `vectors` columns, whose sums do not wait for one another.
RA_INLINE void sum_columns(const float *x, size_t x_row, uint32_t count, uint32_t skipped, const int vectors,
                           double *sum) {
  f32x4 some[4];
  float lane[16];
  RA_UNROLLED
  for (int m = 0; m < vectors; m++) some[m] = f32x4_splat(0);
  RA_ROLLED
  for (uint32_t n = 0; n < count; n++, x += x_row) {
    if (skipped >> n & 1) continue;
    RA_UNROLLED
    for (int m = 0; m < vectors; m++) some[m] = f32x4_add(some[m], f32x4_load(x + 4 * m));
  }
  RA_UNROLLED
  for (int m = 0; m < vectors; m++) f32x4_store(lane + 4 * m, some[m]);
  for (int i = 0; i < 4 * vectors; i++) sum[i] += lane[i];
}

void ra_sum_rows(const float *x, size_t x_row, uint32_t count, size_t columns, uint32_t skipped, double *sum) {
  size_t d = 0;
  for (; d + 16 <= columns; d += 16) sum_columns(x + d, x_row, count, skipped, 4, sum + d);
  for (; d + 4 <= columns; d += 4) sum_columns(x + d, x_row, count, skipped, 1, sum + d);
  for (; d < columns; d++) {
    float some = 0;
    RA_ROLLED
    for (uint32_t n = 0; n < count; n++)
      if (!(skipped >> n & 1)) some += x[n * x_row + d];
    sum[d] += some;
  }
}

float ra_dot(const float *x, const float *y, size_t count) {
  f32x4 four = f32x4_splat(0);
  size_t d = 0;
  for (; d + 4 <= count; d += 4) four = f32x4_madd(f32x4_load(x + d), f32x4_load(y + d), four);
  float sum = f32x4_sum(four);
  for (; d < count; d++) sum += x[d] * y[d];
  return sum;
}
