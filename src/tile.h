// SPDX-License-Identifier: MIT
//
// The matrix micro-kernel. Everything that costs time in this folder is one product of small tiles:
//
//   C[r][0..7] = init[0..7] + sum_n A(n, r) * B[n][0..7]        r = 0 .. R-1, n = 0 .. count-1
//
// A(n, r) is read as a scalar at a[n * a_step + r * a_row] and spread over the lanes, B as two vectors. R accumulators of
// two vectors stay in registers. The sum is over one tile only: callers add tiles to what they have, which makes every sum
// two-level (error grows with count + tiles instead of count * tiles).
//
// R, a_row and, where possible, a_step and b_row are constants at the call, so that the inner loop has one bumped
// pointer for each operand and constant offsets.

#ifndef RA_TILE_H
#define RA_TILE_H

#include "simd.h"

// Rows of the tiles that products are cut into. x86 engines have 15 registers: with fused multiply-adds 12 accumulators, two
// vectors of B and one of A fit, and 6 rows run at the multiply-add peak where 4 reach 0.93 of it (8 accumulators, just as
// many as two multiply-adds of latency 4 a cycle need). Without, a product needs a register too: 6 rows spill (0.55 of the
// peak), 4 reach 0.9.
#if defined(__wasm_simd128__) && !defined(RA_RELAXED)
#define RA_TILE_ROWS 4
#else
#define RA_TILE_ROWS 6
#endif

// STEP(R) for R rows from r on: tiles of RA_TILE_ROWS, then of 4 (8 rows are 4 + 4 rather than 6 + 1 + 1), then single rows.
#define RA_IN_STEPS(r, rows, STEP)                                                                                     \
  do {                                                                                                                 \
    uint32_t r = 0;                                                                                                    \
    RA_ROLLED                                                                                                          \
    for (; RA_TILE_ROWS > 4 && (rows)-r >= RA_TILE_ROWS && (rows)-r != 8; r += RA_TILE_ROWS) {                         \
      STEP(RA_TILE_ROWS);                                                                                              \
    }                                                                                                                  \
    RA_ROLLED                                                                                                          \
    for (; r + 4 <= (rows); r += 4) {                                                                                  \
      STEP(4);                                                                                                         \
    }                                                                                                                  \
    RA_ROLLED                                                                                                          \
    for (; r < (rows); r++) {                                                                                          \
      STEP(1);                                                                                                         \
    }                                                                                                                  \
  } while (0)

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
