// SPDX-License-Identifier: MIT
//
// See products.h. Two floating-point operations for every r, n and lane; 0.9 of the multiply-add peak and more from about 32
// terms on.

#include "products.h"

#include "tile.h"

void ra_add_columns(const float *a, size_t a_row, uint32_t rows, const float *b, size_t b_row, uint32_t count, float *c,
                    size_t c_row) {
  f32x4 zero = f32x4_splat(0);
  ra_tile t;
#define STEP(R)                                                                                                        \
  ra_tile_multiply(&t, R, zero, zero, count, a + r, a_row, 1, b, b_row);                                               \
  ra_tile_add(&t, R, c + r * c_row, c_row)
  RA_IN_STEPS(r, rows, STEP);
#undef STEP
}

void ra_set_rows(const float *a, size_t a_row, uint32_t rows, const float *b, size_t b_row, uint32_t columns, float *c,
                 size_t c_row) {
  f32x4 zero = f32x4_splat(0);
  ra_tile t;
#define STEP(R)                                                                                                        \
  ra_tile_multiply(&t, R, zero, zero, columns, a + r * a_row, 1, a_row, b, b_row);                                     \
  ra_tile_store(&t, R, c + r * c_row, c_row)
  RA_IN_STEPS(r, rows, STEP);
#undef STEP
}
