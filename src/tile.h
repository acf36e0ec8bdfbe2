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

// How many rows go next when `left` are left: as many as may be, so that no single rows remain (17 are 6 + 6 + 5, 9 are
// 5 + 4); a single row costs two thirds of six, as it waits for itself.
RA_INLINE uint32_t ra_tile_rows(uint32_t left) {
  if (left < 4) return 1;
  if (RA_TILE_ROWS == 4) return left == 5 ? 5 : 4;
  // after 6, or 5, there would be this many: 1 to 3 are single rows, and 7 is 6 + 1
  uint32_t bad = 1u << 1 | 1u << 2 | 1u << 3 | 1u << 7;
  if (left == 7 || (left > 5 && (left > 13 || !(bad >> (left - 6) & 1)))) return 6;
  return left == 5 || left == 9 || left == 13 ? 5 : 4;
}

// STEP(R) for R rows from r on.
#define RA_IN_STEPS(r, rows, STEP)                                                                                     \
  do {                                                                                                                 \
    RA_ROLLED                                                                                                          \
    for (uint32_t r = 0, ra_step; r < (rows); r += ra_step) {                                                          \
      ra_step = ra_tile_rows((rows)-r);                                                                                \
      if (RA_TILE_ROWS > 4 && ra_step == 6) {                                                                          \
        STEP(6);                                                                                                       \
      } else if (ra_step == 5) {                                                                                       \
        STEP(5);                                                                                                       \
      } else if (ra_step == 4) {                                                                                       \
        STEP(4);                                                                                                       \
      } else {                                                                                                         \
        STEP(1);                                                                                                       \
      }                                                                                                                \
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
