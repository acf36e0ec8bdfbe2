// SPDX-License-Identifier: MIT
//
// The matrix micro-kernel. Everything that costs time in this folder is one product of small tiles:
//
//   C[r][0..7] = init[0..7] + sum_n A(n, r) * B[n][0..7]        r = 0 .. R-1, n = 0 .. count-1
//
// A(n, r) is read as a scalar at a[n * a_step + r * a_row] and spread over the lanes, B as two vectors. R accumulators of
// two vectors stay in registers: R = 4 (8 accumulators, 3 to 5 more live) and R = 6 (12) run at 0.84-0.93 of the
// multiply-add peak; larger tiles spill. The sum is over one tile only: callers add tiles to what they have, which makes
// every sum two-level (error grows with count + tiles instead of count * tiles).
//
// R, a_row and, where possible, a_step and b_row are constants at the call, so that the inner loop has one bumped
// pointer for each operand and constant offsets.

#ifndef RA_TILE_H
#define RA_TILE_H

#include "simd.h"

// Accumulators, two vectors a row.
typedef struct ra_tile {
  f32x4 c[6][2];
} ra_tile;

// From what the tile holds: init[r][0..7] instead of init[0..7].
RA_INLINE void ra_tile_accumulate(ra_tile *t, const int R, size_t count, const float *a, size_t a_step, size_t a_row,
                                  const float *b, size_t b_row) {
  f32x4 c[6][2];
  RA_UNROLLED
  for (int r = 0; r < R; r++) c[r][0] = t->c[r][0], c[r][1] = t->c[r][1];
  RA_ROLLED
  for (size_t n = 0; n < count; n++) {
    f32x4 b0 = f32x4_load(b), b1 = f32x4_load(b + 4);
    RA_UNROLLED
    for (int r = 0; r < R; r++) {
      f32x4 x = f32x4_load_splat(a + (size_t)r * a_row);
      c[r][0] = f32x4_madd(x, b0, c[r][0]);
      c[r][1] = f32x4_madd(x, b1, c[r][1]);
    }
    a += a_step;
    b += b_row;
  }
  RA_UNROLLED
  for (int r = 0; r < R; r++) t->c[r][0] = c[r][0], t->c[r][1] = c[r][1];
}

RA_INLINE void ra_tile_multiply(ra_tile *t, const int R, f32x4 init0, f32x4 init1, size_t count, const float *a,
                                size_t a_step, size_t a_row, const float *b, size_t b_row) {
  RA_UNROLLED
  for (int r = 0; r < R; r++) t->c[r][0] = init0, t->c[r][1] = init1;
  ra_tile_accumulate(t, R, count, a, a_step, a_row, b, b_row);
}

// C[r] = tile row r
RA_INLINE void ra_tile_store(const ra_tile *t, const int R, float *c, size_t c_row) {
  RA_UNROLLED
  for (int r = 0; r < R; r++) {
    f32x4_store(c + (size_t)r * c_row, t->c[r][0]);
    f32x4_store(c + (size_t)r * c_row + 4, t->c[r][1]);
  }
}

// C[r] += tile row r
RA_INLINE void ra_tile_add(const ra_tile *t, const int R, float *c, size_t c_row) {
  RA_UNROLLED
  for (int r = 0; r < R; r++) {
    float *c_r = c + (size_t)r * c_row;
    f32x4_store(c_r, f32x4_add(f32x4_load(c_r), t->c[r][0]));
    f32x4_store(c_r + 4, f32x4_add(f32x4_load(c_r + 4), t->c[r][1]));
  }
}

#endif
