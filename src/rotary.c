// SPDX-License-Identifier: MIT
//
// Rotation of rows and its inverse; see rotary.h. Cost O(D) a row, about six multiplications a dimension.
//
// This work is based on:
//   Su et al. RoFormer: Enhanced Transformer with Rotary Position Embedding. 2021 (2104.09864)

#include "rotary.h"

#include <math.h>

#include "elementary.h"
#include "engines.h"
#include "simd.h"

// One layout for the size and for the pointers.
static size_t layout(ra_rotary *r, const ra_problem *p, void *space) {
  size_t half = p->rotary_dim / 2;
  ra_workspace_cursor w = {space, 0, 0};
  r->turn = ra_take(&w, half, 2, sizeof(double));
  r->step = ra_take(&w, half, 2, sizeof(double));
  r->coarse = ra_take_floats(&w, half, 2);
  r->fine = ra_take_floats(&w, half, 2 * RA_ROTARY_BLOCK);
  return w.used;
}

size_t ra_rotary_bytes(const ra_problem *p) {
  ra_rotary r;
  return layout(&r, p, NULL);
}

void ra_rotary_batch(ra_rotary *r, const ra_problem *p, int queries, uint32_t batch) {
  const double *positions = queries ? p->query_positions : p->key_positions;
  size_t length = queries ? p->query_length : p->key_length;
  r->positions = positions ? positions + (p->position_batches > 1 ? batch * length : 0) : NULL;
  r->first = queries ? p->query_offset : 0;
}

// step, and as many rows of fine as may be asked for: powers of the turn by theta, in double precision.
static void fill_tables(ra_rotary *r, const ra_problem *p) {
  size_t half = r->half, rows = RA_ROTARY_BLOCK;
  if (!p->query_positions && !p->key_positions && p->query_length < rows && p->key_length < rows)
    rows = p->query_length > p->key_length ? p->query_length : p->key_length;
  for (size_t i = 0; i < half; i++) {
    double theta = r->frequencies[i], c_theta, s_theta, c = 1, s = 0;
    ra_cos_sin_f64(theta, &c_theta, &s_theta);
    ra_cos_sin_f64(RA_ROTARY_BLOCK * theta, &r->step[2 * i], &r->step[2 * i + 1]);
    for (size_t m = 0; m < rows; m++) {
      r->fine[2 * half * m + i] = (float)c, r->fine[2 * half * m + half + i] = (float)s;
      double turned = c * c_theta - s * s_theta;
      s = s * c_theta + c * s_theta;
      c = turned;
    }
  }
}

void ra_rotary_init(ra_rotary *r, const ra_problem *p, int queries, const ra_rotary *like, void *space) {
  size_t half = p->rotary_dim / 2;
  layout(r, p, space);
  r->half = (uint32_t)half;
  r->interleaved = p->interleaved;
  r->head_dim = p->head_dim;
  r->frequencies = p->frequencies;
  r->cos_table = p->cos_table;
  r->sin_table = p->sin_table;
  r->table_rows = p->table_rows;
  r->factor = p->rotary_factor;
  r->anchor = 0;
  ra_rotary_batch(r, p, queries, 0);
  for (size_t i = 0; i < half; i++) r->fine[i] = 1, r->fine[half + i] = 0;
  if (r->cos_table) return;
  for (size_t i = 0; i < half; i++) {
    r->turn[2 * i] = 1, r->turn[2 * i + 1] = 0;
    r->coarse[i] = 1, r->coarse[half + i] = 0;
  }
  if (like) r->step = like->step, r->fine = like->fine;
  else fill_tables(r, p);
}

// Moves the anchor: by a rotation when it is one block away, by sin and cos otherwise.
RA_KERNEL void seek(ra_rotary *r, double position) {
  double distance = position - r->anchor;
  if (distance == 0) return;
  r->anchor = position;
  for (size_t i = 0; i < r->half; i++) {
    double *turn = r->turn + 2 * i, c = turn[0], s = turn[1];
    if (distance == RA_ROTARY_BLOCK || distance == -RA_ROTARY_BLOCK) {
      double c_step = r->step[2 * i], s_step = distance > 0 ? r->step[2 * i + 1] : -r->step[2 * i + 1];
      turn[0] = c * c_step - s * s_step;
      turn[1] = s * c_step + c * s_step;
    } else {
      ra_cos_sin_f64(position * r->frequencies[i], &turn[0], &turn[1]);
    }
    r->coarse[i] = (float)turn[0], r->coarse[r->half + i] = (float)turn[1];
  }
}

// The row of the table; past its end the last one, so that nothing outside is read whatever the positions are.
static size_t table_row(const ra_rotary *r, uint32_t row) {
  double position = r->positions ? r->positions[row] : (double)(r->first + row);
  return position >= r->table_rows ? r->table_rows - 1 : position > 0 ? (size_t)position : 0;
}

// Four pairs of `rows` rows, x1 and x2 at x + first and x + second: turned by (c1, s1) + (c2, s2), by the
// angle-addition theorem; c2 [4], s2 [4] go on by `fine` floats a row.
RA_INLINE void turn_four(const float *x, size_t x_row, float *y, size_t y_row, uint32_t rows, size_t first,
                         size_t second, const int interleaved, f32x4 c1, f32x4 s1, const float *c2, const float *s2,
                         size_t fine, f32x4 sign) {
  RA_ROLLED
  for (uint32_t n = 0; n < rows; n++, x += x_row, y += y_row, c2 += fine, s2 += fine) {
    f32x4 c2_n = f32x4_load(c2), s2_n = f32x4_load(s2);
    f32x4 c = f32x4_nmadd(s1, s2_n, f32x4_mul(c1, c2_n));
    f32x4 s = f32x4_mul(sign, f32x4_madd(c1, s2_n, f32x4_mul(s1, c2_n)));
    f32x4 low = f32x4_load(x + first), high = f32x4_load(x + second);
    f32x4 x1 = interleaved ? f32x4_even(low, high) : low, x2 = interleaved ? f32x4_odd(low, high) : high;
    f32x4 y1 = f32x4_nmadd(x2, s, f32x4_mul(x1, c)), y2 = f32x4_madd(x1, s, f32x4_mul(x2, c));
    f32x4_store(y + first, interleaved ? f32x4_zip_low(y1, y2) : y1);
    f32x4_store(y + second, interleaved ? f32x4_zip_high(y1, y2) : y2);
  }
}

// Turns `rows` rows by the angles of (c1, s1) + (c2, s2), [half] each; c2, s2 go on by a row of fine.
RA_KERNEL void turn_rows(const float *x, size_t x_row, float *y, size_t y_row, uint32_t rows, size_t half,
                         int interleaved, const float *c1, const float *s1, const float *c2, float sign, float factor) {
  f32x4 factors = f32x4_splat(factor), signs = f32x4_splat(sign);
  const float *s2 = c2 + half;
  size_t p = 0;
  for (; p + 4 <= half; p += 4) {
    f32x4 c1_p = f32x4_mul(factors, f32x4_load(c1 + p)), s1_p = f32x4_mul(factors, f32x4_load(s1 + p));
#define TURN(FIRST, SECOND, INTERLEAVED)                                                                               \
  turn_four(x, x_row, y, y_row, rows, FIRST, SECOND, INTERLEAVED, c1_p, s1_p, c2 + p, s2 + p, 2 * half, signs)
    if (interleaved) TURN(2 * p, 2 * p + 4, 1);
    else TURN(p, half + p, 0);
#undef TURN
  }
  for (; p < half; p++)
    for (size_t n = 0; n < rows; n++) {
      float c2_n = c2[2 * half * n + p], s2_n = s2[2 * half * n + p];
      float c = factor * (c1[p] * c2_n - s1[p] * s2_n), s = sign * factor * (s1[p] * c2_n + c1[p] * s2_n);
      size_t first = interleaved ? 2 * p : p, second = interleaved ? 2 * p + 1 : half + p;
      float x1 = x[n * x_row + first], x2 = x[n * x_row + second];
      y[n * y_row + first] = x1 * c - x2 * s;
      y[n * y_row + second] = x1 * s + x2 * c;
    }
}

// Rows row .. row + count - 1, where they follow one another, as one run: sets *m to where the run begins in `fine`, and
// moves the anchor if need be. It moves at the first row of a block, and where a row is not within a block behind it.
static uint32_t next_run(ra_rotary *r, uint32_t row, uint32_t count, int first, size_t *m) {
  double position = r->positions ? r->positions[row] : (double)(r->first + row), ahead = position - r->anchor;
  if (first || !(ahead >= 0 && ahead < RA_ROTARY_BLOCK && ahead == floor(ahead))) seek(r, position), ahead = 0;
  *m = (size_t)ahead;
  uint32_t most = ra_min_u32(count, RA_ROTARY_BLOCK - (uint32_t)ahead), run = 1;
  while (r->positions && run < most && r->positions[row + run] == position + run) run++;
  return r->positions ? run : most;
}

void ra_rotary_rows(ra_rotary *r, const float *x, size_t x_row, float *y, size_t y_row, uint32_t rows, uint32_t row,
                    int direction, float scale) {
  size_t half = r->half, D = r->head_dim;
  float sign = direction == RA_ROTATE ? 1.0f : -1.0f;
  float factor = direction == RA_ROTATE_INVERSE ? scale / r->factor : scale * r->factor;
  for (uint32_t n = 0, run; half > 0 && n < rows; n += run) {
    const float *c1 = r->coarse, *s1 = c1 + half, *c2 = r->fine;
    if (r->cos_table) {
      c1 = r->cos_table + table_row(r, row + n) * half, s1 = r->sin_table + table_row(r, row + n) * half;
      run = 1; // and c2, s2 are 1, 0
    } else {
      size_t m;
      uint32_t block = n % RA_ROTARY_BLOCK;
      run = next_run(r, row + n, ra_min_u32(rows - n, RA_ROTARY_BLOCK - block), block == 0, &m);
      c2 += 2 * half * m;
    }
    turn_rows(x + n * x_row, x_row, y + n * y_row, y_row, run, half, r->interleaved, c1, s1, c2, sign, factor);
  }
  for (uint32_t n = 0; 2 * half < D && n < rows; n++)
    for (size_t d = 2 * half; d < D; d++) y[n * y_row + d] = scale * x[n * x_row + d];
}

// Relative maps turn pairs, not rows.
static int is_rotation(const ra_problem *p) { return ra_check(p) == RA_OK && !ra_is_relative(p); }

size_t ra_rotate_workspace(const ra_problem *p) { return is_rotation(p) ? ra_rotary_bytes(p) : 0; }

int ra_rotate(const ra_problem *p, float *x, uint32_t inverse, void *workspace) {
  if (!is_rotation(p) || (inverse && p->rotary_factor == 0)) return RA_ERROR_PROBLEM;
  ra_rotary r;
  size_t D = p->head_dim, row = ra_row(p, p->heads, D);
  ra_rotary_init(&r, p, 1, NULL, workspace);
  for (uint32_t head = 0; head < p->batch * p->heads; head++) {
    float *x_head = x + ra_head(p, head, p->heads, p->query_length, D);
    ra_rotary_batch(&r, p, 1, head / p->heads);
    ra_rotary_rows(&r, x_head, row, x_head, row, p->query_length, 0, inverse ? RA_ROTATE_INVERSE : RA_ROTATE, 1.0f);
  }
  return RA_OK;
}
