// SPDX-License-Identifier: MIT
//
// Rotary position embedding: pair p of the row at position m turns by m * theta_p,
//   (x1, x2) -> (x1 cos - x2 sin, x1 sin + x2 cos).
// Su et al. RoFormer. 2021.
//
// cos and sin are not evaluated for every position: position = anchor + r with r < 32, the angle-addition theorem joins a
// table over r with one row for the anchor. Anchors 32 apart follow from one another by a rotation in double precision, so
// rows taken in order, upwards or downwards, cost no cos or sin at all. Error of cos and sin: below 2e-7 at any
// position up to 2^31 (double-precision angles; two float products).

#ifndef RA_ROTARY_H
#define RA_ROTARY_H

#include "rope_attention.h"

#define RA_ROTARY_BLOCK 32

typedef struct ra_rotary {
  uint32_t half, interleaved, head_dim; // 2 half of head_dim dimensions rotate
  const double *frequencies;            // [half]
  const double *positions;              // of the rows of a head, or NULL: row n is at first + n
  int64_t first;
  const float *cos_table, *sin_table; // [table_rows][half], or NULL
  uint32_t table_rows;
  float factor;  // on the rotated dimensions
  double anchor; // position that `turn` stands at
  double *turn;  // [half][2] cos, sin of anchor * theta
  float *coarse; // [2][half] the same as floats
  double *step;  // [half][2] cos, sin of 32 * theta
  float *fine;   // [32][2][half] cos, sin of r * theta
} ra_rotary;

// Bytes that ra_rotary_init needs, a multiple of 16.
size_t ra_rotary_bytes(const ra_problem *p);

// Fills *r for the queries, or the keys, of the first batch; `space` stays in use. `like`, filled before from the same
// problem, or NULL, shares its tables. Cost O(D), two evaluations of cos and sin a pair.
void ra_rotary_init(ra_rotary *r, const ra_problem *p, int queries, const ra_rotary *like, void *space);

// Goes on to the positions of another batch.
void ra_rotary_batch(ra_rotary *r, const ra_problem *p, int queries, uint32_t batch);

// What is done to rows: R, its transpose (for gradients), its inverse (which differs by the square of the factor).
enum { RA_ROTATE, RA_ROTATE_TRANSPOSE, RA_ROTATE_INVERSE };

// y[n] = scale * R^(..) x[n] for rows row .. row + rows - 1 of a head; columns head_dim .. y_row - 1 of y are left alone. y
// may be x. Cost O(rows D).
void ra_rotary_rows(ra_rotary *r, const float *x, size_t x_row, float *y, size_t y_row, uint32_t rows, uint32_t row,
                    int direction, float scale);

#endif
