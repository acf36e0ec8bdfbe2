// SPDX-License-Identifier: MIT
//
// Rotation of rows and its inverse; see rotary.h. Cost O(D) a row, about six multiplications a dimension.
//
// This work is based on:
//   Su et al. RoFormer: Enhanced Transformer with Rotary Position Embedding. 2021 (2104.09864)

#include "rotary.h"

#include <math.h>

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
  r->row = ra_take_floats(&w, half, 2);
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

void ra_rotary_init(ra_rotary *r, const ra_problem *p, int queries, void *space) {
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
  if (r->cos_table) return;
  for (size_t i = 0; i < half; i++) {
    double theta = r->frequencies[i];
    r->turn[2 * i] = 1, r->turn[2 * i + 1] = 0;
    r->coarse[i] = 1, r->coarse[half + i] = 0;
    r->step[2 * i] = cos(RA_ROTARY_BLOCK * theta), r->step[2 * i + 1] = sin(RA_ROTARY_BLOCK * theta);
    for (size_t m = 0; m < RA_ROTARY_BLOCK; m++) {
      r->fine[2 * half * m + i] = (float)cos((double)m * theta);
      r->fine[2 * half * m + half + i] = (float)sin((double)m * theta);
    }
  }
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
      double angle = position * r->frequencies[i];
      turn[0] = cos(angle), turn[1] = sin(angle);
    }
    r->coarse[i] = (float)turn[0], r->coarse[r->half + i] = (float)turn[1];
  }
}

// The row of the table; past its end the last one, so that nothing outside is read whatever the positions are.
static size_t table_row(const ra_rotary *r, uint32_t row) {
  double position = r->positions ? r->positions[row] : (double)(r->first + row);
  return position >= r->table_rows ? r->table_rows - 1 : position > 0 ? (size_t)position : 0;
}

// cos and sin (times sign) of row anchor + m, both times factor.
RA_KERNEL void row_angles(const ra_rotary *r, size_t m, float sign, float factor) {
  size_t half = r->half, i = 0;
  const float *c1 = r->coarse, *s1 = c1 + half, *c2 = r->fine + 2 * half * m, *s2 = c2 + half;
  float *c = r->row, *s = c + half;
  f32x4 factor_c = f32x4_splat(factor), factor_s = f32x4_splat(sign * factor);
  for (; i + 4 <= half; i += 4) {
    f32x4 c1_i = f32x4_load(c1 + i), s1_i = f32x4_load(s1 + i), c2_i = f32x4_load(c2 + i), s2_i = f32x4_load(s2 + i);
    f32x4_store(c + i, f32x4_mul(factor_c, f32x4_sub(f32x4_mul(c1_i, c2_i), f32x4_mul(s1_i, s2_i))));
    f32x4_store(s + i, f32x4_mul(factor_s, f32x4_add(f32x4_mul(s1_i, c2_i), f32x4_mul(c1_i, s2_i))));
  }
  for (; i < half; i++) {
    c[i] = factor * (c1[i] * c2[i] - s1[i] * s2[i]);
    s[i] = sign * factor * (s1[i] * c2[i] + c1[i] * s2[i]);
  }
}

RA_KERNEL void rotate_half_split(const float *x, float *y, const float *c, const float *s, size_t half) {
  size_t p = 0;
  for (; p + 4 <= half; p += 4) {
    f32x4 x1 = f32x4_load(x + p), x2 = f32x4_load(x + half + p), cp = f32x4_load(c + p), sp = f32x4_load(s + p);
    f32x4_store(y + p, f32x4_sub(f32x4_mul(x1, cp), f32x4_mul(x2, sp)));
    f32x4_store(y + half + p, f32x4_add(f32x4_mul(x1, sp), f32x4_mul(x2, cp)));
  }
  for (; p < half; p++) {
    float x1 = x[p], x2 = x[half + p];
    y[p] = x1 * c[p] - x2 * s[p];
    y[half + p] = x1 * s[p] + x2 * c[p];
  }
}

RA_KERNEL void rotate_interleaved(const float *x, float *y, const float *c, const float *s, size_t half) {
  size_t p = 0;
  for (; p + 4 <= half; p += 4) {
    f32x4 low = f32x4_load(x + 2 * p), high = f32x4_load(x + 2 * p + 4);
    f32x4 x1 = f32x4_even(low, high), x2 = f32x4_odd(low, high), cp = f32x4_load(c + p), sp = f32x4_load(s + p);
    f32x4 y1 = f32x4_sub(f32x4_mul(x1, cp), f32x4_mul(x2, sp));
    f32x4 y2 = f32x4_add(f32x4_mul(x1, sp), f32x4_mul(x2, cp));
    f32x4_store(y + 2 * p, f32x4_zip_low(y1, y2));
    f32x4_store(y + 2 * p + 4, f32x4_zip_high(y1, y2));
  }
  for (; p < half; p++) {
    float x1 = x[2 * p], x2 = x[2 * p + 1];
    y[2 * p] = x1 * c[p] - x2 * s[p];
    y[2 * p + 1] = x1 * s[p] + x2 * c[p];
  }
}

// cos and sin (times sign) of a row, both times factor: from the table, or from the anchor, which moves at the first row of
// a block and where a row is not within a block behind it.
static void turn_to(ra_rotary *r, uint32_t row, int first, float sign, float factor) {
  size_t half = r->half;
  if (r->cos_table) {
    const float *c = r->cos_table + table_row(r, row) * half, *s = r->sin_table + table_row(r, row) * half;
    for (size_t i = 0; i < half; i++) r->row[i] = factor * c[i], r->row[half + i] = sign * factor * s[i];
    return;
  }
  double position = r->positions ? r->positions[row] : (double)(r->first + row), ahead = position - r->anchor;
  if (first || !(ahead >= 0 && ahead < RA_ROTARY_BLOCK && ahead == floor(ahead))) seek(r, position), ahead = 0;
  row_angles(r, (size_t)ahead, sign, factor);
}

void ra_rotary_rows(ra_rotary *r, const float *x, size_t x_row, float *y, size_t y_row, uint32_t rows, uint32_t row,
                    int direction, float scale) {
  size_t half = r->half, D = r->head_dim;
  float sign = direction == RA_ROTATE ? 1.0f : -1.0f;
  float factor = direction == RA_ROTATE_INVERSE ? scale / r->factor : scale * r->factor;
  for (uint32_t n = 0; n < rows; n++) {
    const float *x_n = x + n * x_row;
    float *y_n = y + n * y_row;
    if (half > 0) {
      turn_to(r, row + n, n % RA_ROTARY_BLOCK == 0, sign, factor);
      if (r->interleaved) rotate_interleaved(x_n, y_n, r->row, r->row + half, half);
      else rotate_half_split(x_n, y_n, r->row, r->row + half, half);
    }
    for (size_t d = 2 * half; d < D; d++) y_n[d] = scale * x_n[d];
  }
}

size_t ra_rotate_workspace(const ra_problem *p) { return ra_check(p) == RA_OK ? ra_rotary_bytes(p) : 0; }

int ra_rotate(const ra_problem *p, float *x, uint32_t inverse, void *workspace) {
  if (ra_check(p) != RA_OK || (inverse && p->rotary_factor == 0)) return RA_ERROR_PROBLEM;
  ra_rotary r;
  size_t D = p->head_dim, row = ra_row(p, p->heads, D);
  ra_rotary_init(&r, p, 1, workspace);
  for (uint32_t head = 0; head < p->batch * p->heads; head++) {
    float *x_head = x + ra_head(p, head, p->heads, p->query_length, D);
    ra_rotary_batch(&r, p, 1, head / p->heads);
    ra_rotary_rows(&r, x_head, row, x_head, row, p->query_length, 0, inverse ? RA_ROTATE_INVERSE : RA_ROTATE, 1.0f);
  }
  return RA_OK;
}
