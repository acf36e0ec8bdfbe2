// SPDX-License-Identifier: MIT
//
// Bounds of one key/value head and its queries by one look at all rows: norms, entries, means, ranges of values; and
// what outputs tell by being outside of these. See sample.h.

#include <float.h>
#include <math.h>
#include <string.h>

#include "elementary.h"
#include "pack.h"
#include "sample.h"

enum {
  LOOKED = 256, // queries by which the mean of all is guessed
  LARGEST = 20  // that a mean query may give to a score
};

// Of some rows: sums of squares, all of them and the largest, where that is, and the largest of outliers, which are not
// in those; of all rows max |x| in lanes, and zeros, or NaN once there was a NaN.
typedef struct extent {
  double sum;
  float squares, far;
  uint32_t at;
  f32x4 most, nothing;
} extent;

static extent no_extent(void) { return (extent){0, 0, 0, 0, f32x4_splat(0), f32x4_splat(0)}; }

static float entry_of(const extent *t) {
  float lane[4];
  f32x4_store(lane, t->most);
  return fmaxf(fmaxf(lane[0], lane[1]), fmaxf(lane[2], lane[3]));
}

static int is_finite(const extent *t) { return entry_of(t) <= FLT_MAX && f32x4_sum(t->nothing) == 0; }

// squares[count] of rows, up to 32.
RA_KERNEL void measure_rows(const float *x, size_t x_row, uint32_t count, size_t columns, float *squares, extent *t) {
  f32x4 zero = f32x4_splat(0), nothing = t->nothing, most[4] = {t->most, zero, zero, zero};
  const float *rows[4];
  for (uint32_t n = 0; n < count; n += 4) {
    float lane[4];
    ra_four_rows(x, x_row, n, count, rows);
    f32x4 all = ra_squares_of_four(rows, NULL, columns, most);
    nothing = f32x4_madd(f32x4_min(f32x4_splat(FLT_MAX), all), zero, nothing); // infinity is no NaN
    if (n + 4 <= count) {
      f32x4_store(squares + n, all);
      continue;
    }
    f32x4_store(lane, all);
    for (uint32_t m = 0; m < count - n; m++) squares[n + m] = lane[m];
  }
  t->most = f32x4_max(f32x4_max(most[0], most[1]), f32x4_max(most[2], most[3])), t->nothing = nothing;
}

// Sums of squares of rows `first` .. first + count - 1, up to 32; bit n of `outliers` is row first + n.
RA_KERNEL void extend(extent *t, const float *squares, uint32_t first, uint32_t count, uint32_t outliers) {
  float sum = 0, most = t->squares; // of so few rows
  uint32_t at = t->at, n = 0;
  for (; outliers == 0 && n + 8 <= count; n += 8) {
    f32x4 low = f32x4_load(squares + n), high = f32x4_load(squares + n + 4);
    sum += f32x4_sum(f32x4_add(low, high));
    if (!f32x4_any_greater(f32x4_max(low, high), f32x4_splat(most))) continue;
    for (uint32_t m = n; m < n + 8; m++)
      if (squares[m] > most) most = squares[m], at = first + m;
  }
  for (; n < count; n++) {
    float square = squares[n];
    if (outliers >> n & 1) t->far = fmaxf(t->far, square);
    else {
      sum += square;
      if (square > most) most = square, at = first + n;
    }
  }
  t->sum += sum, t->squares = most, t->at = at;
}

// x [rows][Dp] less the mean
RA_KERNEL void subtract(const float *mean, size_t Dp, size_t rows, float *x) {
  for (size_t n = 0; n < rows; n++, x += Dp)
    for (size_t d = 0; d < Dp; d += 4) f32x4_store(x + d, f32x4_sub(f32x4_load(x + d), f32x4_load(mean + d)));
}

// Of which rows sums of squares are: of queries as they are, rotated less their mean, or those that are there.
enum { AS_THEY_ARE, CENTRED, KNOWN };

static void measure_queries(const ra_sample *e, const float *q, size_t kv_head, int how, ra_bounds *b) {
  extent t = no_extent();
  for (size_t h = 0; h < e->group; h++)
    for (uint32_t i = 0; i < e->Nq; i += RA_CHUNK) {
      uint32_t count = ra_min_u32(RA_CHUNK, e->p->query_length - i), row = (uint32_t)(h * e->Nq) + i;
      const float *q_i = ra_sample_query(e, q, kv_head * e->group + h, i);
      float *squares = e->q_squares + row;
      if (how == AS_THEY_ARE) measure_rows(q_i, e->q_row, count, e->D, squares, &t);
      if (how == CENTRED) {
        ra_sample_rotate_queries(e, q, kv_head * e->group + h, i, count, 1);
        subtract(e->q_mean, e->Dp, count, e->rows);
        measure_rows(e->rows, e->Dp, count, e->D, squares, &t);
      }
      extend(&t, squares, row, count, ra_sample_query_outliers(e, kv_head, h, i));
    }
  if (how == AS_THEY_ARE) {
    b->finite = is_finite(&t);
    b->q_entry = entry_of(&t);
    b->q_norm = ra_norm(fmaxf(t.squares, t.far), b->q_entry, e->D);
  }
  b->q_argmax = t.at;
  b->q_plain_norm = ra_norm(t.squares, b->q_entry, e->D);
  b->q_squares = (float)t.sum;
}

// Of columns of some rows: the least and the largest value, and the sum of shares of values, so that it stays finite.
typedef struct ranges {
  float low[RA_MAX_HEAD_DIM], high[RA_MAX_HEAD_DIM], sum[RA_MAX_HEAD_DIM];
} ranges;

static void no_ranges(size_t width, ranges *t) {
  ra_fill(t->low, width, INFINITY), ra_fill(t->high, width, -INFINITY), ra_fill(t->sum, width, 0);
}

// Rows, but those whose lse, if there is any, is -Infinity, join the ranges of 4 `vectors` columns from d on; NaN does
// so in the sum.
RA_INLINE void widen(const float *rows, size_t row, size_t count, const float *lse, float share, size_t d,
                     const int vectors, ranges *t) {
  f32x4 low[4], high[4], sum[4];
  RA_UNROLLED
  for (int m = 0; m < vectors; m++) {
    low[m] = f32x4_load(t->low + d + 4 * m), high[m] = f32x4_load(t->high + d + 4 * m);
    sum[m] = f32x4_load(t->sum + d + 4 * m);
  }
  rows += d;
  for (size_t n = 0; n < count; n++, rows += row) {
    if (lse && lse[n] == -INFINITY) continue;
    RA_UNROLLED
    for (int m = 0; m < vectors; m++) {
      f32x4 value = f32x4_load(rows + 4 * m);
      low[m] = f32x4_min(value, low[m]), high[m] = f32x4_max(value, high[m]);
      sum[m] = f32x4_madd(value, f32x4_splat(share), sum[m]);
    }
  }
  RA_UNROLLED
  for (int m = 0; m < vectors; m++) {
    f32x4_store(t->low + d + 4 * m, low[m]), f32x4_store(t->high + d + 4 * m, high[m]);
    f32x4_store(t->sum + d + 4 * m, sum[m]);
  }
}

RA_KERNEL void widen_16(const float *rows, size_t row, size_t count, const float *lse, float share, size_t d,
                        ranges *t) {
  widen(rows, row, count, lse, share, d, 4, t);
}

RA_KERNEL void widen_4(const float *rows, size_t row, size_t count, const float *lse, float share, size_t d,
                       ranges *t) {
  widen(rows, row, count, lse, share, d, 1, t);
}

// The same of all `width` columns.
static void widen_ranges(const float *rows, size_t row, size_t count, size_t width, const float *lse, float share,
                         ranges *t) {
  size_t d = 0;
  for (; d + 16 <= width; d += 16) widen_16(rows, row, count, lse, share, d, t);
  for (; d + 4 <= width; d += 4) widen_4(rows, row, count, lse, share, d, t);
  for (size_t n = 0; d < width && n < count; n++)
    for (size_t c = d; c < width && !(lse && lse[n] == -INFINITY); c++) {
      float value = rows[n * row + c];
      t->low[c] = value < t->low[c] ? value : t->low[c], t->high[c] = value > t->high[c] ? value : t->high[c];
      t->sum[c] += value * share;
    }
}

// `means` [Dv] may be NULL.
static void measure_values(const ra_sample *e, const float *v, ra_bounds *b, float *means) {
  ranges t;
  no_ranges(e->Dv, &t);
  widen_ranges(v, e->v_row, e->Nk, e->Dv, NULL, 1 / (float)e->Nk, &t);
  for (size_t d = 0; d < e->Dv; d++) {
    float half = t.high[d] / 2 - t.low[d] / 2, entry = fmaxf(t.high[d], -t.low[d]);
    if (!(fabsf(t.sum[d]) <= FLT_MAX)) b->finite = 0;
    if (half > b->v_half_range) b->v_half_range = half;
    if (entry > b->v_entry) b->v_entry = entry;
    if (means) means[d] = t.sum[d];
  }
}

// Rotates the keys and finds their mean, without outliers (float sums of 32 rows, double sums of those); none with a
// relative map.
static void rotate_keys(const ra_sample *e, const float *k, size_t kv_head) {
  size_t plain = e->Nk - e->p->outlier_key_count;
  double sum[RA_MAX_HEAD_DIM + 3] = {0};
  if (e->Dp != e->D) ra_fill(e->k_rows, e->Nk * e->Dp, 0);
  for (size_t j = 0; j < e->Nk; j += RA_CHUNK) {
    size_t count = e->Nk - j < RA_CHUNK ? e->Nk - j : RA_CHUNK;
    ra_rotary_rows(&e->state->k_rotary, k + j * e->k_row, e->k_row, e->k_rows + j * e->Dp, e->Dp, (uint32_t)count,
                   (uint32_t)j, RA_ROTATE, 1.0f);
    ra_sum_rows(e->k_rows + j * e->Dp, e->Dp, (uint32_t)count, e->Dp, ra_sample_key_outliers(e, kv_head, (uint32_t)j),
                sum);
  }
  for (size_t d = 0; d < e->Dp; d++)
    e->k_mean[d] = plain > 0 && !ra_is_relative(e->p) ? (float)(sum[d] / (double)plain) : 0;
}

// Whether the mean of these queries may be a good part of them: by some, and before rotation, which spreads what they
// have in common.
static int may_be_centred(const ra_sample *e, const float *q, size_t kv_head) {
  size_t total = e->group * e->Nq, count = total < LOOKED ? total : LOOKED;
  double squares = 0, length = 0;
  float sum[RA_MAX_HEAD_DIM] = {0};
  for (size_t n = 0; n < count; n++) {
    size_t row = (size_t)((uint64_t)n * total / count);
    ra_add(ra_sample_query(e, q, kv_head * e->group + row / e->Nq, row % e->Nq), (uint32_t)e->D, sum);
    squares += e->q_squares[row];
  }
  for (size_t d = 0; d < e->D; d++) length += (double)sum[d] * sum[d];
  return length > RA_WORTH_CENTRING * squares * (double)count; // not of NaN
}

// The mean of the rotated queries, where that is a good part of them and gives no score too much: exp(scores) =
// exp(those of centred queries) times a number of the key.
static int find_mean_query(const ra_sample *e, const float *q, size_t kv_head) {
  double sum[RA_MAX_HEAD_DIM + 3] = {0}, total = (double)e->group * (double)e->Nq, squares = 0;
  const ra_problem *p = e->p;
  if (ra_is_relative(p) || p->bias || p->alibi || !may_be_centred(e, q, kv_head)) return 0;
  if (e->Dp != e->D) ra_fill(e->rows, RA_CHUNK * e->Dp, 0);
  for (size_t h = 0; h < e->group; h++)
    for (uint32_t i = 0; i < e->Nq; i += RA_CHUNK) {
      uint32_t count = ra_min_u32(RA_CHUNK, p->query_length - i);
      ra_sample_rotate_queries(e, q, kv_head * e->group + h, i, count, 1);
      ra_sum_rows(e->rows, e->Dp, count, e->Dp, 0, sum);
      for (uint32_t n = 0; n < count; n++) squares += e->q_squares[h * e->Nq + i + n];
    }
  for (size_t d = 0; d < e->Dp; d++) e->q_mean[d] = (float)(sum[d] / total);
  float square = ra_dot(e->q_mean, e->q_mean, e->Dp), most = fabsf(p->scale) * sqrtf(square) * e->state->reach;
  return square * total > RA_WORTH_CENTRING * squares && most < LARGEST;
}

// Queries are centred, or not; once for a head.
static void centre_queries(const ra_sample *e, const float *q, size_t kv_head, int again, ra_bounds *b) {
  if (!again) {
    e->state->centred = find_mean_query(e, q, kv_head);
    if (e->state->centred) measure_queries(e, q, kv_head, CENTRED, b);
  }
  b->q_mean_norm = e->state->centred ? sqrtf(ra_dot(e->q_mean, e->q_mean, e->Dp)) : 0;
  for (size_t j = 0; j < e->Nk && e->state->centred; j++) {
    e->k_shift[j] = e->p->scale * ra_dot(e->q_mean, e->k_rows + j * e->Dp, e->Dp);
    e->k_gain[j] = (float)ra_exp_f64(e->k_shift[j]);
  }
}

int ra_sample_prepare(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, uint32_t again, ra_bounds *bounds,
                      void *workspace) {
  if (ra_check(p) != RA_OK || kv_head >= p->batch * p->kv_heads) return RA_ERROR_PROBLEM;
  ra_workspace_cursor cursor = {workspace, 0, 0};
  ra_sample e = ra_sample_arrange(p, &cursor);
  const float *k = x->k + ra_head(p, kv_head, p->kv_heads, e.Nk, e.D);
  float *means = x->means ? x->means + kv_head * ra_means(p) : NULL;
  ra_problem rows = *p; // with a relative map they stay as they are
  if (ra_is_relative(p)) rows.rotary_dim = 0;
  ra_rotary_init(&e.state->q_rotary, &rows, 1, NULL, e.q_space);
  ra_rotary_init(&e.state->k_rotary, &rows, 0, &e.state->q_rotary, e.k_space);
  e.state->map_ready = 0;
  ra_rotary_batch(&e.state->q_rotary, p, 1, kv_head / p->kv_heads);
  ra_rotary_batch(&e.state->k_rotary, p, 0, kv_head / p->kv_heads);
  measure_queries(&e, x->q, kv_head, again ? KNOWN : AS_THEY_ARE, bounds);
  if (!again) {
    extent t = no_extent();
    bounds->v_entry = bounds->v_half_range = 0;
    size_t v = ra_head(p, kv_head, p->kv_heads, e.Nk, e.Dv);
    if (x->v) measure_values(&e, x->v + v, bounds, means ? means + e.D : NULL);
    for (uint32_t j = 0; j < e.Nk; j += RA_CHUNK) {
      uint32_t count = ra_min_u32(RA_CHUNK, p->key_length - j);
      measure_rows(k + j * e.k_row, e.k_row, count, e.D, e.k_squares + j, &t);
      extend(&t, e.k_squares + j, j, count, 0);
    }
    if (!is_finite(&t)) bounds->finite = 0;
    bounds->k_entry = entry_of(&t);
    bounds->k_norm = ra_norm(t.squares, bounds->k_entry, e.D);
  }
  rotate_keys(&e, k, kv_head);
  if (means) memcpy(means, e.k_mean, e.D * sizeof *means);
  extent t = no_extent();
  for (uint32_t j = 0; j < e.Nk; j += RA_CHUNK) {
    uint32_t count = ra_min_u32(RA_CHUNK, p->key_length - j);
    float *k_j = e.k_rows + j * e.Dp;
    subtract(e.k_mean, e.Dp, count, k_j);
    measure_rows(k_j, e.Dp, count, e.D, e.k_squares + j, &t);
    extend(&t, e.k_squares + j, j, count, ra_sample_key_outliers(&e, kv_head, j));
  }
  bounds->k_argmax = t.at;
  bounds->k_centred_norm = ra_norm(t.squares, entry_of(&t), e.D);
  bounds->k_squares = (float)t.sum;
  e.state->reach = ra_norm(fmaxf(t.squares, t.far), entry_of(&t), e.D);
  if (!means) e.state->centred = 0, bounds->q_mean_norm = 0; // nobody would know
  else {
    centre_queries(&e, x->q, kv_head, again, bounds);
    for (size_t d = 0; d < e.D; d++) means[e.D + e.Dv + d] = e.state->centred ? e.q_mean[d] : 0;
  }
  return RA_OK;
}

float ra_sample_outside(const ra_problem *p, const ra_arrays *x, uint32_t kv_head) {
  if (ra_check(p) != RA_OK || kv_head >= p->batch * p->kv_heads) return NAN;
  size_t Nq = p->query_length, Nk = p->key_length, Dv = p->value_dim, group = ra_group(p);
  const float *v = x->v + ra_head(p, kv_head, p->kv_heads, Nk, Dv);
  float most = 0;
  ranges of, out;
  no_ranges(Dv, &of), no_ranges(Dv, &out);
  widen_ranges(v, ra_row(p, p->kv_heads, Dv), Nk, Dv, NULL, 0, &of);
  for (size_t head = kv_head * group; head < (kv_head + 1) * group; head++)
    widen_ranges(x->out + ra_head(p, head, p->heads, Nq, Dv), ra_row(p, p->heads, Dv), Nq, Dv, x->lse + head * Nq, 0,
                 &out);
  for (size_t d = 0; d < Dv; d++) { // -Infinity both, where no row counts
    float above = out.high[d] - of.high[d], below = of.low[d] - out.low[d];
    most = above > most ? above : most, most = below > most ? below : most;
  }
  return most;
}
