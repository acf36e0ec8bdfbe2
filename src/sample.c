// SPDX-License-Identifier: MIT
//
// A look at the data: bounds of one key/value head, scores of a few queries, a few exact rows of the output and of the
// gradients. O(N D) to prepare, O(N (D + Dv)) a row. A planner decides by these what to run, and checks what was run.
//
// Up to eight rows go together, as lanes. Keys are taken with their mean subtracted, as the polynomial engine does; not so with a
// relative map, whose scores with a mean key would differ from key to key. There a row costs O(N (|S| + Dv)). Where the mean query m
// says much, scores of key j are taken less m.y_j, and weighed exp(m.y_j) times, as there.

#include <float.h>
#include <math.h>
#include <string.h>

#include "elementary.h"
#include "engines.h"
#include "monomials.h"
#include "pack.h"
#include "products.h"
#include "relative.h"
#include "rotary.h"
#include "softmax.h"

enum {
  LANES = 8,
  TILE = 128, // keys, or queries, that are weighed together
  FAR = 128,  // keys so far away need not be looked at where weights fall by e, or more, until then
  GROUPS = RA_SAMPLE_KEYS / LANES,
  WAYS = 2,             // that rows or columns are weighed in at a time
  SUMS = WAYS * GROUPS, // eight lanes each
  SMALL = 40,           // exp of scores as large, 2^22 of them, and times values up to 2^40, still fits a float
  LOOKED = 256,         // queries by which the mean of all is guessed
  LARGEST = 20,         // that a mean query may give to a score
};

typedef struct sample_state {
  ra_rotary q_rotary, k_rotary;
  ra_relative map;
  int map_ready;
  float reach; // the largest norm of k_rows
  int centred; // queries are
} sample_state;

typedef struct sample {
  const ra_problem *p;
  sample_state *state;
  size_t Nq, Nk, D, Dv, Dp; // Dp: D padded to 4
  size_t group;
  size_t q_row, k_row, v_row, out_row; // floats from token to token in the arrays
  char *q_space, *k_space;
  float *k_mean;           // [Dp]
  float *k_rows;           // [Nk][Dp] rotated, centred
  float *k_squares;        // [Nk] their sums of squares
  float *q_squares;        // [group][Nq] those of queries
  float *q_mean;           // [Dp] of rotated queries, and
  float *k_shift, *k_gain; // [Nk] what it gives to scores of a key, exp of that; where queries are centred
  float *rows;             // [TILE][Dp]
  float *strip;            // [Dp][8] the eight rows as lanes; of columns four times that, as of v_strip
  float *v_strip;          // [Dv][8] their values, or their dout
  float *s;                // [max(Nk, TILE)][8]
  float *weight, *ds, *dp; // [TILE][8]
  float *sum_t, *d_t;      // [Dv][8], [Dp][8], of all that is summed at a time SUMS times
  float *scaled;           // [Dv] one row of dout
  float *gram;             // [D / 8][D][8] sums of products of keys
  // with a relative map
  char *map_space;
  float *columns; // [Dp][TILE] keys, or queries, of a tile
  float *lines;   // [8][TILE] their scores, or the gradients of these
} sample;

static sample arrange(const ra_problem *p, ra_workspace_cursor *w) {
  sample e = {.p = p, .Nq = p->query_length, .Nk = p->key_length, .D = p->head_dim, .Dv = p->value_dim};
  e.Dp = (e.D + 3) / 4 * 4;
  e.group = ra_group(p);
  e.q_row = ra_row(p, p->heads, e.D);
  e.k_row = ra_row(p, p->kv_heads, e.D);
  e.v_row = ra_row(p, p->kv_heads, e.Dv);
  e.out_row = ra_row(p, p->heads, e.Dv);
  e.state = ra_take(w, 1, 1, sizeof(sample_state));
  e.q_space = ra_take(w, 1, ra_rotary_bytes(p), 1);
  e.k_space = ra_take(w, 1, ra_rotary_bytes(p), 1);
  e.k_mean = ra_take_floats(w, 1, e.Dp);
  e.k_rows = ra_take_floats(w, e.Nk, e.Dp);
  e.k_squares = ra_take_floats(w, 1, e.Nk);
  e.q_squares = ra_take_floats(w, e.group, e.Nq);
  e.q_mean = ra_take_floats(w, 1, e.Dp);
  e.k_shift = ra_take_floats(w, 1, e.Nk);
  e.k_gain = ra_take_floats(w, 1, e.Nk);
  e.rows = ra_take_floats(w, TILE, e.Dp);
  e.strip = ra_take_floats(w, e.Dp, RA_SAMPLE_KEYS);
  e.v_strip = ra_take_floats(w, e.Dv, RA_SAMPLE_KEYS);
  e.s = ra_take_floats(w, e.Nk > TILE ? e.Nk : TILE, LANES);
  e.weight = ra_take_floats(w, TILE, LANES);
  e.ds = ra_take_floats(w, TILE, LANES);
  e.dp = ra_take_floats(w, TILE, LANES);
  e.sum_t = ra_take_floats(w, e.Dv, SUMS * LANES);
  e.d_t = ra_take_floats(w, e.Dp, SUMS * LANES);
  e.scaled = ra_take_floats(w, 1, e.Dv);
  e.gram = ra_take_floats(w, (e.D + LANES - 1) / LANES, e.D * LANES);
  if (ra_is_relative(p)) {
    e.map_space = ra_take(w, 1, ra_relative_bytes(p, 1, 1), 1);
    e.columns = ra_take_floats(w, e.Dp, TILE);
    e.lines = ra_take_floats(w, LANES, TILE);
  }
  return e;
}

size_t ra_sample_workspace(const ra_problem *p) {
  if (ra_check(p) != RA_OK) return 0;
  ra_workspace_cursor w = {NULL, 0, 0};
  arrange(p, &w);
  return w.overflow ? RA_SIZE_OVERFLOW : w.used;
}

// --- Bounds -------------------------------------------------------------------------------------------------------

// Of some rows: sums of squares, all of them and the largest, where that is, and the largest of outliers, which are not in those;
// of all rows max |x| in lanes, and zeros, or NaN once there was a NaN.
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

// Sums of squares of four rows, less a mean if there is one, as lanes; and into `most`, if that is asked for, the largest entries.
RA_INLINE f32x4 squares_of_four(const float *const rows[4], const float *mean, size_t columns, f32x4 most[4]) {
  f32x4 sum[4];
  size_t d = 0;
  RA_UNROLLED
  for (int m = 0; m < 4; m++) sum[m] = f32x4_splat(0);
  RA_ROLLED
  for (; d + 4 <= columns; d += 4) {
    RA_UNROLLED
    for (int m = 0; m < 4; m++) {
      f32x4 value = f32x4_load(rows[m] + d);
      if (mean) value = f32x4_sub(value, f32x4_load(mean + d));
      if (most) most[m] = f32x4_max(most[m], f32x4_abs(value));
      sum[m] = f32x4_madd(value, value, sum[m]);
    }
  }
  RA_ROLLED
  for (; d < columns; d++) {
    RA_UNROLLED
    for (int m = 0; m < 4; m++) {
      float lane[4] = {mean ? rows[m][d] - mean[d] : rows[m][d]};
      f32x4 value = f32x4_load(lane);
      if (most) most[m] = f32x4_max(most[m], f32x4_abs(value));
      sum[m] = f32x4_madd(value, value, sum[m]);
    }
  }
  f32x4_transpose(sum, sum + 1, sum + 2, sum + 3);
  return f32x4_add(f32x4_add(sum[0], sum[1]), f32x4_add(sum[2], sum[3]));
}

// Four rows from n on of `count`, the last again where there are fewer.
RA_INLINE void four_rows(const float *x, size_t x_row, uint32_t n, uint32_t count, const float *rows[4]) {
  RA_UNROLLED
  for (uint32_t m = 0; m < 4; m++) rows[m] = x + ra_min_u32(n + m, count - 1) * x_row;
}

// squares[count] of rows, up to 32.
RA_KERNEL void measure_rows(const float *x, size_t x_row, uint32_t count, size_t columns, float *squares, extent *t) {
  f32x4 zero = f32x4_splat(0), nothing = t->nothing, most[4] = {t->most, zero, zero, zero};
  const float *rows[4];
  for (uint32_t n = 0; n < count; n += 4) {
    float lane[4];
    four_rows(x, x_row, n, count, rows);
    f32x4 all = squares_of_four(rows, NULL, columns, most);
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

// |x| from the sum of squares, or a bound of it where squares fall below what a float holds (1e-30: what is lost of larger
// sums is far below their rounding). `entry` bounds |x_d|.
static float norm(float squares, float entry, size_t columns) {
  return squares < 1e-30f ? entry * sqrtf((float)columns) : sqrtf(squares);
}

// The outliers among up to 32 rows from `first` on, bit n: of queries of the h-th head of the group, of keys.
static uint32_t query_outliers(const sample *e, size_t kv_head, size_t h, uint32_t first) {
  uint32_t count = ra_min_u32(32, e->p->query_length - first);
  return ra_outlier_bits(ra_outlier_queries(e->p, kv_head), (uint32_t)e->group, (uint32_t)h, first, count);
}

static uint32_t key_outliers(const sample *e, size_t kv_head, uint32_t first) {
  return ra_outlier_bits(ra_outlier_keys(e->p, kv_head), 1, 0, first, ra_min_u32(32, e->p->key_length - first));
}

static const float *query_at(const sample *e, const float *q, size_t head, size_t i) {
  return q + ra_head(e->p, head, e->p->heads, e->Nq, e->D) + i * e->q_row;
}

// x [rows][Dp] less the mean
RA_KERNEL void subtract(const float *mean, size_t Dp, size_t rows, float *x) {
  for (size_t n = 0; n < rows; n++, x += Dp)
    for (size_t d = 0; d < Dp; d += 4) f32x4_store(x + d, f32x4_sub(f32x4_load(x + d), f32x4_load(mean + d)));
}

// Queries of a head (flat, in [B][H]), up to TILE, as e->rows.
static void rotate_queries(const sample *e, const float *q, size_t head, uint32_t i, uint32_t count, float scale) {
  ra_rotary_rows(&e->state->q_rotary, query_at(e, q, head, i), e->q_row, e->rows, e->Dp, count, i, RA_ROTATE, scale);
}

// Their sums of squares: of queries as they are, rotated less their mean, or those that are there.
enum { AS_THEY_ARE, CENTRED, KNOWN };

static void measure_queries(const sample *e, const float *q, size_t kv_head, int how, ra_bounds *b) {
  extent t = no_extent();
  for (size_t h = 0; h < e->group; h++)
    for (uint32_t i = 0; i < e->Nq; i += RA_CHUNK) {
      uint32_t count = ra_min_u32(RA_CHUNK, e->p->query_length - i), row = (uint32_t)(h * e->Nq) + i;
      const float *q_i = query_at(e, q, kv_head * e->group + h, i);
      float *squares = e->q_squares + row;
      if (how == AS_THEY_ARE) measure_rows(q_i, e->q_row, count, e->D, squares, &t);
      if (how == CENTRED) {
        rotate_queries(e, q, kv_head * e->group + h, i, count, 1);
        subtract(e->q_mean, e->Dp, count, e->rows);
        measure_rows(e->rows, e->Dp, count, e->D, squares, &t);
      }
      extend(&t, squares, row, count, query_outliers(e, kv_head, h, i));
    }
  if (how == AS_THEY_ARE) {
    b->finite = is_finite(&t);
    b->q_entry = entry_of(&t);
    b->q_norm = norm(fmaxf(t.squares, t.far), b->q_entry, e->D);
  }
  b->q_argmax = t.at;
  b->q_plain_norm = norm(t.squares, b->q_entry, e->D);
  b->q_squares = (float)t.sum;
}

// Ranges and means, as sums of shares so that they stay finite, of 4 `vectors` columns of v [Nk]. `mean` may be NULL.
RA_INLINE void measure_columns(const float *v, size_t v_row, size_t Nk, const int vectors, ra_bounds *b, float *mean) {
  f32x4 low[4], high[4], sum[4], zero = f32x4_splat(0),
                                 nothing = zero; // nothing: 0, or NaN once a value was not finite
  f32x4 share = f32x4_splat(1 / (float)Nk);
  RA_UNROLLED
  for (int n = 0; n < vectors; n++) low[n] = high[n] = f32x4_load(v + 4 * n), sum[n] = zero;
  for (size_t j = 0; j < Nk; j++, v += v_row) RA_UNROLLED
  for (int n = 0; n < vectors; n++) {
    f32x4 value = f32x4_load(v + 4 * n);
    low[n] = f32x4_min(value, low[n]), high[n] = f32x4_max(value, high[n]);
    sum[n] = f32x4_madd(value, share, sum[n]);
  }
  RA_UNROLLED
  for (int n = 0; n < vectors; n++) nothing = f32x4_madd(sum[n], zero, nothing);
  for (int n = 0; n < vectors && mean; n++) f32x4_store(mean + 4 * n, sum[n]);
  if (f32x4_sum(nothing) != 0) b->finite = 0;
  for (int n = 0; n < vectors; n++) {
    f32x4 half = f32x4_sub(f32x4_mul(high[n], f32x4_splat(0.5f)), f32x4_mul(low[n], f32x4_splat(0.5f)));
    float lane[4], entry[4];
    f32x4_store(lane, half);
    f32x4_store(entry, f32x4_max(f32x4_abs(low[n]), f32x4_abs(high[n])));
    for (int i = 0; i < 4; i++) {
      if (lane[i] > b->v_half_range) b->v_half_range = lane[i];
      if (entry[i] > b->v_entry) b->v_entry = entry[i];
    }
  }
}

static void measure_values(const float *v, size_t v_row, size_t Nk, size_t Dv, ra_bounds *b, float *means) {
  size_t d = 0;
  for (; d + 16 <= Dv; d += 16) measure_columns(v + d, v_row, Nk, 4, b, means ? means + d : NULL);
  for (; d + 4 <= Dv; d += 4) measure_columns(v + d, v_row, Nk, 1, b, means ? means + d : NULL);
  for (; d < Dv; d++) {
    float low = v[d], high = low, sum = 0;
    for (size_t j = 0; j < Nk; j++) {
      float value = v[j * v_row + d];
      sum += value / (float)Nk;
      if (!(fabsf(value) <= FLT_MAX)) b->finite = 0;
      low = value < low ? value : low, high = value > high ? value : high;
    }
    if (means) means[d] = sum;
    if (high / 2 - low / 2 > b->v_half_range) b->v_half_range = high / 2 - low / 2;
    if (high > b->v_entry) b->v_entry = high;
    if (-low > b->v_entry) b->v_entry = -low;
  }
}

// Rotates the keys and finds their mean, without outliers (float sums of 32 rows, double sums of those); none with a relative map.
static void rotate_keys(const sample *e, const float *k, size_t kv_head) {
  size_t plain = e->Nk - e->p->outlier_key_count;
  double sum[RA_MAX_HEAD_DIM + 3] = {0};
  if (e->Dp != e->D) ra_fill(e->k_rows, e->Nk * e->Dp, 0);
  for (size_t j = 0; j < e->Nk; j += RA_CHUNK) {
    size_t count = e->Nk - j < RA_CHUNK ? e->Nk - j : RA_CHUNK;
    ra_rotary_rows(&e->state->k_rotary, k + j * e->k_row, e->k_row, e->k_rows + j * e->Dp, e->Dp, (uint32_t)count,
                   (uint32_t)j, RA_ROTATE, 1.0f);
    ra_sum_rows(e->k_rows + j * e->Dp, e->Dp, (uint32_t)count, e->Dp, key_outliers(e, kv_head, (uint32_t)j), sum);
  }
  for (size_t d = 0; d < e->Dp; d++)
    e->k_mean[d] = plain > 0 && !ra_is_relative(e->p) ? (float)(sum[d] / (double)plain) : 0;
}

static float dot(const float *x, const float *y, size_t count) {
  f32x4 four = f32x4_splat(0);
  size_t d = 0;
  for (; d + 4 <= count; d += 4) four = f32x4_madd(f32x4_load(x + d), f32x4_load(y + d), four);
  float sum = f32x4_sum(four);
  for (; d < count; d++) sum += x[d] * y[d];
  return sum;
}

// Whether the mean of these queries may be a good part of them: by some, and before rotation, which spreads what they have in common.
static int may_be_centred(const sample *e, const float *q, size_t kv_head) {
  size_t total = e->group * e->Nq, count = total < LOOKED ? total : LOOKED;
  double squares = 0, length = 0;
  float sum[RA_MAX_HEAD_DIM] = {0};
  for (size_t n = 0; n < count; n++) {
    size_t row = (size_t)((uint64_t)n * total / count);
    ra_add(query_at(e, q, kv_head * e->group + row / e->Nq, row % e->Nq), (uint32_t)e->D, sum);
    squares += e->q_squares[row];
  }
  for (size_t d = 0; d < e->D; d++) length += (double)sum[d] * sum[d];
  return length > RA_WORTH_CENTRING * squares * (double)count; // not of NaN
}

// The mean of the rotated queries, where that is a good part of them and gives no score too much: exp(scores) = exp(those of centred
// queries) times a number of the key.
static int find_mean_query(const sample *e, const float *q, size_t kv_head) {
  double sum[RA_MAX_HEAD_DIM + 3] = {0}, total = (double)e->group * (double)e->Nq, squares = 0;
  const ra_problem *p = e->p;
  if (ra_is_relative(p) || p->bias || p->alibi || !may_be_centred(e, q, kv_head)) return 0;
  if (e->Dp != e->D) ra_fill(e->rows, RA_CHUNK * e->Dp, 0);
  for (size_t h = 0; h < e->group; h++)
    for (uint32_t i = 0; i < e->Nq; i += RA_CHUNK) {
      uint32_t count = ra_min_u32(RA_CHUNK, p->query_length - i);
      rotate_queries(e, q, kv_head * e->group + h, i, count, 1);
      ra_sum_rows(e->rows, e->Dp, count, e->Dp, 0, sum);
      for (uint32_t n = 0; n < count; n++) squares += e->q_squares[h * e->Nq + i + n];
    }
  for (size_t d = 0; d < e->Dp; d++) e->q_mean[d] = (float)(sum[d] / total);
  float square = dot(e->q_mean, e->q_mean, e->Dp), most = fabsf(p->scale) * sqrtf(square) * e->state->reach;
  return square * total > RA_WORTH_CENTRING * squares && most < LARGEST;
}

// Queries are centred, or not; once for a head.
static void centre_queries(const sample *e, const float *q, size_t kv_head, int again, ra_bounds *b) {
  if (!again) {
    e->state->centred = find_mean_query(e, q, kv_head);
    if (e->state->centred) measure_queries(e, q, kv_head, CENTRED, b);
  }
  b->q_mean_norm = e->state->centred ? sqrtf(dot(e->q_mean, e->q_mean, e->Dp)) : 0;
  for (size_t j = 0; j < e->Nk && e->state->centred; j++) {
    e->k_shift[j] = e->p->scale * dot(e->q_mean, e->k_rows + j * e->Dp, e->Dp);
    e->k_gain[j] = (float)ra_exp_f64(e->k_shift[j]);
  }
}

int ra_sample_prepare(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, uint32_t again, ra_bounds *bounds,
                      void *workspace) {
  if (ra_check(p) != RA_OK || kv_head >= p->batch * p->kv_heads) return RA_ERROR_PROBLEM;
  ra_workspace_cursor cursor = {workspace, 0, 0};
  sample e = arrange(p, &cursor);
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
    if (x->v) measure_values(x->v + v, e.v_row, e.Nk, e.Dv, bounds, means ? means + e.D : NULL);
    for (uint32_t j = 0; j < e.Nk; j += RA_CHUNK) {
      uint32_t count = ra_min_u32(RA_CHUNK, p->key_length - j);
      measure_rows(k + j * e.k_row, e.k_row, count, e.D, e.k_squares + j, &t);
      extend(&t, e.k_squares + j, j, count, 0);
    }
    if (!is_finite(&t)) bounds->finite = 0;
    bounds->k_entry = entry_of(&t);
    bounds->k_norm = norm(t.squares, bounds->k_entry, e.D);
  }
  rotate_keys(&e, k, kv_head);
  if (means) memcpy(means, e.k_mean, e.D * sizeof *means);
  extent t = no_extent();
  for (uint32_t j = 0; j < e.Nk; j += RA_CHUNK) {
    uint32_t count = ra_min_u32(RA_CHUNK, p->key_length - j);
    float *k_j = e.k_rows + j * e.Dp;
    subtract(e.k_mean, e.Dp, count, k_j);
    measure_rows(k_j, e.Dp, count, e.D, e.k_squares + j, &t);
    extend(&t, e.k_squares + j, j, count, key_outliers(&e, kv_head, j));
  }
  bounds->k_argmax = t.at;
  bounds->k_centred_norm = norm(t.squares, entry_of(&t), e.D);
  bounds->k_squares = (float)t.sum;
  e.state->reach = norm(fmaxf(t.squares, t.far), entry_of(&t), e.D);
  if (!means) e.state->centred = 0, bounds->q_mean_norm = 0; // nobody would know
  else {
    centre_queries(&e, x->q, kv_head, again, bounds);
    for (size_t d = 0; d < e.D; d++) means[e.D + e.Dv + d] = e.state->centred ? e.q_mean[d] : 0;
  }
  return RA_OK;
}

// The norm of a row whose sum of squares is known.
static float norm_of(const sample *e, const float *x, float squares) {
  if (squares >= 1e-30f) return sqrtf(squares);
  extent own = no_extent();
  measure_rows(x, 0, 1, e->D, &squares, &own);
  return norm(squares, entry_of(&own), e->D);
}

// A heap whose least norm is on top: in its place comes a larger one.
static void keep_in_heap(uint32_t *rows, float *norms, uint32_t count, uint32_t row, float value) {
  if (!(value > norms[0])) return;
  uint32_t at = 0;
  for (uint32_t child; (child = 2 * at + 1) < count; at = child) {
    if (child + 1 < count && norms[child + 1] < norms[child]) child++;
    if (!(norms[child] < value)) break;
    norms[at] = norms[child], rows[at] = rows[child];
  }
  norms[at] = value, rows[at] = row;
}

int ra_sample_largest(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, uint32_t queries, uint32_t count,
                      uint32_t *rows, float *norms, void *workspace) {
  if (ra_check(p) != RA_OK || kv_head >= p->batch * p->kv_heads) return RA_ERROR_PROBLEM;
  ra_workspace_cursor cursor = {workspace, 0, 0};
  sample e = arrange(p, &cursor);
  uint64_t total = queries ? (uint64_t)e.group * e.Nq : e.Nk;
  if (count == 0 || count > total) return RA_ERROR_PROBLEM;
  ra_fill(norms, count, -1);
  uint32_t length = queries ? p->query_length : p->key_length, group = queries ? (uint32_t)e.group : 1;
  size_t row = queries ? e.q_row : e.Dp;
  for (uint32_t i = 0; i < length; i += RA_CHUNK)
    for (uint32_t h = 0; h < group; h++) {
      const float *some = queries ? query_at(&e, x->q, kv_head * group + h, i) : e.k_rows + i * e.Dp;
      const float *squares = queries ? e.q_squares + h * e.Nq + i : e.k_squares + i;
      for (uint32_t n = 0; n < ra_min_u32(RA_CHUNK, length - i); n++)
        keep_in_heap(rows, norms, count, (i + n) * group + h, norm_of(&e, some + n * row, squares[n]));
    }
  return RA_OK;
}

// --- Spread -------------------------------------------------------------------------------------------------------

// Sums over some keys but outliers: of themselves, of their squares, and in e->gram of their products. count: without outliers; gone: that
// have left since the sums were made anew; seen: that joined or left in all.
typedef struct key_sums {
  ra_range keys;
  uint32_t count, gone, seen;
  double sum[RA_MAX_HEAD_DIM + 3], squares;
} key_sums;

// The keys from .. to - 1, up to RA_CHUNK, join with sign 1, leave with sign -1.
static void add_products(const sample *e, size_t kv_head, uint32_t from, uint32_t to, int sign, key_sums *sums) {
  const float *k = e->k_rows + (size_t)from * e->Dp;
  uint32_t count = to - from, outliers = key_outliers(e, kv_head, from);
  for (uint32_t j = 0; j < count; j++) {
    float *row = e->rows + j * e->Dp, factor = outliers >> j & 1 ? 0 : (float)sign;
    for (size_t d = 0; d < e->Dp; d++) row[d] = factor * k[j * e->Dp + d];
    if (factor == 0) continue;
    sums->squares += sign * (double)e->k_squares[from + j];
    sums->count += (uint32_t)sign;
  }
  ra_sum_rows(e->rows, e->Dp, count, e->Dp, 0, sums->sum);
  for (size_t c = 0; c < e->D; c += LANES) // lanes from D on are of what follows, and not read
    ra_add_columns(e->rows, e->Dp, (uint32_t)e->D, k + c, e->Dp, count, e->gram + c * e->D, LANES);
  sums->seen += count;
}

static void add_all_products(const sample *e, size_t kv_head, ra_range keys, int sign, key_sums *sums) {
  for (uint32_t j = keys.first, to; j < keys.end; j = to) {
    to = ra_min_u32(j + RA_CHUNK, keys.end);
    add_products(e, kv_head, j, to, sign, sums);
  }
}

// The sums become those over these keys, whose ends rise from call to call; made anew as the polynomial engine makes its states.
static void move_sums(const sample *e, size_t kv_head, ra_range keys, key_sums *sums) {
  ra_range *held = &sums->keys;
  uint32_t leaving = keys.first - held->first, staying = held->end > keys.first ? held->end - keys.first : 0;
  if (staying == 0 || (leaving > 0 && ra_is_worn(sums->gone, leaving, staying))) {
    ra_fill(e->gram, (e->D + LANES - 1) / LANES * e->D * LANES, 0);
    *sums = (key_sums){.keys = {keys.first, keys.first}, .seen = sums->seen};
  } else {
    add_all_products(e, kv_head, (ra_range){held->first, keys.first}, -1, sums);
    sums->gone += leaving;
  }
  add_all_products(e, kv_head, (ra_range){held->end, keys.end}, 1, sums);
  *held = keys;
}

// squares[i] = s.s of each query in e->rows against the keys of the sums: x^T G x.
RA_KERNEL void score_squares(const sample *e, uint32_t count, float *squares) {
  f32x4 sum[RA_CHUNK];
  for (uint32_t i = 0; i < count; i++) sum[i] = f32x4_splat(0), squares[i] = 0;
  for (size_t c = 0; c < e->D; c += LANES) {
    ra_set_rows(e->rows, e->Dp, count, e->gram + c * e->D, LANES, (uint32_t)e->D, e->s, LANES);
    for (size_t m = 0; m < LANES && c + m < e->D; m += 4)
      for (uint32_t i = 0; i < count; i++) {
        const float *x = e->rows + i * e->Dp + c + m, *y = e->s + i * LANES + m;
        if (c + m + 4 <= e->D) sum[i] = f32x4_madd(f32x4_load(x), f32x4_load(y), sum[i]);
        else
          for (size_t d = 0; c + m + d < e->D; d++) squares[i] += x[d] * y[d];
      }
  }
  for (uint32_t i = 0; i < count; i++) squares[i] += f32x4_sum(sum[i]);
}

// The largest of those queries, but outliers, against these keys; *lowest: the least mean score so far.
static void look_at_spread(const sample *e, uint32_t count, uint32_t outliers, const key_sums *sums, ra_spread *most,
                           double *lowest) {
  float squares[RA_CHUNK], mean[RA_MAX_HEAD_DIM];
  uint32_t n = sums->count;
  for (size_t d = 0; d < e->D; d++) mean[d] = (float)(sums->sum[d] / n);
  score_squares(e, count, squares);
  for (uint32_t i = 0; i < count; i++) {
    if (outliers >> i & 1) continue;
    double x = -(double)dot(e->rows + i * e->Dp, mean, e->D), square = squares[i] / n;
    if (-x < *lowest) *lowest = -x;
    if (x < 1 && square <= most->scores * (1 - x)) continue; // exp(x) <= 1 / (1 - x)
    most->scores = fmaxf(most->scores, (float)(square * ra_exp_f64(x)));
  }
}

int ra_sample_spread(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, float limit, ra_spread *spread,
                     void *workspace) {
  if (ra_check(p) != RA_OK || kv_head >= p->batch * p->kv_heads) return RA_ERROR_PROBLEM;
  ra_workspace_cursor cursor = {workspace, 0, 0};
  sample e = arrange(p, &cursor);
  int scored =
      ra_is_relative(p) || p->bias || p->alibi || p->decay_count > 0 || p->softcap > 0 || p->mask || p->allowed;
  if (scored || e.state->centred) return RA_ERROR_PROBLEM;
  double lowest = INFINITY;
  key_sums sums = {.count = 0};
  *spread = (ra_spread){0, 0, 0, 0};
  for (uint32_t i = 0, end; i < e.Nq && spread->scores <= limit; i = end) {
    end = ra_chunk_end(p, i);
    ra_range keys = ra_state_keys(p, i);
    if (keys.first >= keys.end) continue;
    move_sums(&e, kv_head, keys, &sums);
    if (sums.count == 0) continue;
    spread->keys = fmaxf(spread->keys, (float)(sums.squares / sums.count));
    for (size_t h = 0; h < e.group; h++) {
      rotate_queries(&e, x->q, kv_head * e.group + h, i, end - i, p->scale);
      look_at_spread(&e, end - i, query_outliers(&e, kv_head, h, i), &sums, spread, &lowest);
      spread->rows += end - i;
    }
  }
  spread->rows += sums.seen;
  spread->gain = (float)ra_exp_f64(-lowest);
  return RA_OK;
}

// --- Scores -------------------------------------------------------------------------------------------------------

// The relative map; its table is filled when it is first needed.
static const ra_relative *map_of(const sample *e) {
  if (!e->state->map_ready) ra_relative_init(&e->state->map, e->p, 1, 1, e->map_space);
  e->state->map_ready = 1;
  return &e->state->map;
}

// Where the pair (i, j) is in what goes by i - j.
static size_t diagonal_of(const sample *e, uint32_t i, uint32_t j) { return (size_t)i + e->Nk - 1 - j; }

// s[n][8] of the queries i .. i + count - 1, whose rows scale R q are in e->rows, against eight keys: lanes of e->strip.
static void score_queries(const sample *e, uint32_t i, uint32_t count, const uint32_t *keys, float *s) {
  if (!ra_is_relative(e->p)) {
    float shift[LANES];
    ra_set_rows(e->rows, e->Dp, count, e->strip, LANES, (uint32_t)e->D, s, LANES);
    for (int m = 0; m < LANES && e->state->centred; m++) shift[m] = -e->k_shift[keys[m]];
    for (uint32_t n = 0; n < count && e->state->centred; n++) ra_add(shift, LANES, s + n * LANES);
    return;
  }
  const ra_relative *map = map_of(e);
  ra_transpose(e->rows, e->Dp, count, e->D, e->columns, TILE);
  for (int m = 0; m < LANES; m++)
    ra_relative_row(map, 1, e->k_rows + keys[m] * e->Dp, e->columns, TILE, diagonal_of(e, i, keys[m]), count,
                    e->lines + m * TILE);
  ra_transpose(e->lines, TILE, LANES, count, s, LANES);
}

// Of those scores the gradient by the keys, d_t [D][8] += sum_n ds[n][8] x_n.
static void add_key_gradients(const sample *e, uint32_t i, uint32_t count, const uint32_t *keys, const float *ds) {
  if (!ra_is_relative(e->p)) {
    ra_add_columns(e->rows, e->Dp, (uint32_t)e->D, ds, LANES, count, e->d_t, LANES);
    return;
  }
  ra_transpose(ds, LANES, count, LANES, e->lines, TILE);
  for (int m = 0; m < LANES; m++) // e->columns are those of the scores
    ra_relative_row_gradient(map_of(e), 1, e->lines + m * TILE, e->columns, TILE, diagonal_of(e, i, keys[m]), count,
                             e->d_t + m, LANES);
}

// One of RA_EXTREMES falling values, and of where they were, makes room for a larger one.
RA_KERNEL void insert(uint32_t *where, float *values, uint32_t n, float value) {
  uint32_t at = RA_EXTREMES - 1;
  for (; at > 0 && value > values[at - 1]; at--) values[at] = values[at - 1], where[at] = where[at - 1];
  values[at] = value, where[at] = n;
}

// The largest values seen so far, falling, and where they were.
static void keep_largest(uint32_t *where, float *values, uint32_t n, float value) {
  if (value > values[RA_EXTREMES - 1]) insert(where, values, n, value);
}

// The same for the largest of four values, if that is among them.
static void keep_largest_of(uint32_t *where, float *values, uint32_t n, f32x4 some) {
  if (!f32x4_any_greater(some, f32x4_splat(values[RA_EXTREMES - 1]))) return;
  float lane[4];
  f32x4_store(lane, some);
  keep_largest(where, values, n, fmaxf(fmaxf(lane[0], lane[1]), fmaxf(lane[2], lane[3])));
}

// Of some keys, but outliers, those by which an output is likely to be off by most: by |k| and what weighs it, |v - mean| (1 for gradients,
// or where no means are known) times what is left of exp(score) at the end of these keys, `decay` from key to key. Weight 0 where there are fewer.
RA_KERNEL void find_keys(const sample *e, const ra_arrays *x, uint32_t kv_head, ra_range among, float decay,
                         uint32_t *keys, float *weights) {
  ra_outliers outliers = ra_outlier_keys(e->p, kv_head);
  const float *mean = x->v && x->means && !x->dout ? x->means + kv_head * ra_means(e->p) + e->D : NULL;
  const float *v = mean ? x->v + ra_head(e->p, kv_head, e->p->kv_heads, e->Nk, e->Dv) : NULL;
  float left = 1, sizes[RA_EXTREMES];
  for (int m = 0; m < RA_EXTREMES; m++) sizes[m] = -1, keys[m] = 0;
  for (uint32_t end = (uint32_t)among.end, first; end > among.first; end = first) { // the last four first
    first = end - ra_min_u32(4, end - (uint32_t)among.first);
    float size[4];
    const float *rows[4];
    if (mean) four_rows(v + first * e->v_row, e->v_row, 0, end - first, rows);
    f32x4_store(size, mean ? squares_of_four(rows, mean, e->Dv, NULL) : f32x4_splat(1));
    for (uint32_t j = end; j-- > first;) {
      left *= decay * decay;
      if (outliers.count > 0 && ra_outlier_bits(outliers, 1, 0, j, 1)) continue;
      keep_largest(keys, sizes, j, e->k_squares[j] * left * size[j - first]);
    }
  }
  for (int m = 0; m < RA_EXTREMES; m++) weights[m] = sizes[m] > 0 ? sqrtf(sizes[m] / e->k_squares[keys[m]]) : 0;
}

// These weights of keys that the queries of the chunk that begins at i see through the state; 0 of others.
static void weights_in_state(const ra_problem *p, uint32_t i, const uint32_t *keys, const float *weights, float *live) {
  ra_range state = ra_state_keys(p, i);
  for (int m = 0; m < RA_EXTREMES; m++) live[m] = state.first <= keys[m] && keys[m] < state.end ? weights[m] : 0;
}

// By how much a slope, or the slowest of the decays that stand for a bias, lowers scores of a head from key to key; 0 where far keys count.
static float fall_of(const ra_problem *p, size_t head) {
  size_t decays = p->bias_heads > 1 ? head % p->heads * p->decay_count : 0;
  double fall = p->alibi ? p->alibi[head % p->heads] : p->decay_count > 0 ? p->decay_rates[decays] : 0;
  for (uint32_t n = 1; n < p->decay_count; n++)
    if (p->decay_rates[decays + n] < fall) fall = p->decay_rates[decays + n];
  return p->causal && fall * FAR > 1 ? (float)fall : 0;
}

int ra_sample_extremes(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, uint32_t *large, uint32_t *aligned,
                       uint32_t *opposed, uint32_t *keys, void *workspace) {
  if (ra_check(p) != RA_OK || kv_head >= p->batch * p->kv_heads) return RA_ERROR_PROBLEM;
  ra_workspace_cursor cursor = {workspace, 0, 0};
  sample e = arrange(p, &cursor);
  float norms[RA_EXTREMES], highest[RA_EXTREMES], lowest[RA_EXTREMES], weights[2][RA_EXTREMES];
  uint32_t near_keys[RA_EXTREMES];
  for (int n = 0; n < RA_EXTREMES; n++)
    norms[n] = -1, highest[n] = lowest[n] = 0, large[n] = aligned[n] = opposed[n] = 0;
  find_keys(&e, x, kv_head, (ra_range){0, p->key_length}, 1, keys, weights[0]);
  for (size_t h = 0; h < e.group; h++) {
    float fall = fall_of(p, kv_head * e.group + h), decay = (float)ra_exp_f64(-fall);
    const uint32_t *own = fall > 0 ? near_keys : keys;
    for (uint32_t i = 0; i < p->query_length; i += RA_CHUNK) {
      uint32_t count = ra_min_u32(RA_CHUNK, p->query_length - i), start = ra_chunk_start(p, i);
      if (fall > 0) {
        ra_range near = ra_state_keys(p, start);
        if (near.end > near.first + RA_CHUNK) near.first = near.end - RA_CHUNK;
        find_keys(&e, x, kv_head, near, decay, near_keys, weights[1]);
      }
      if (fall > 0 || i == 0) {
        for (int m = 0; m < RA_EXTREMES; m++) memcpy(e.rows + m * e.Dp, e.k_rows + own[m] * e.Dp, e.D * sizeof(float));
        ra_transpose(e.rows, e.Dp, LANES, e.D, e.strip, LANES);
      }
      uint32_t outliers = query_outliers(&e, kv_head, h, i);
      rotate_queries(&e, x->q, kv_head * e.group + h, i, count, p->scale);
      score_queries(&e, i, count, own, e.s);
      float live[LANES], left = 1;
      weights_in_state(p, start, own, weights[fall > 0], live);
      for (uint32_t n = 0; n < count; n++, left *= decay) {
        if (outliers >> n & 1) continue;
        if (p->segments && ra_chunk_start(p, i + n) != start) {
          start = ra_chunk_start(p, i + n);
          weights_in_state(p, start, own, weights[fall > 0], live);
        }
        uint32_t row = (uint32_t)(h * e.Nq + i + n);
        f32x4 off[2];
        RA_UNROLLED
        for (int m = 0; m < 2; m++) { // as s^3: errors of a polynomial rise faster than scores
          f32x4 s = f32x4_load(e.s + n * LANES + 4 * m), weight = f32x4_load(live + 4 * m);
          off[m] = f32x4_mul(f32x4_mul(s, s), f32x4_mul(s, f32x4_mul(weight, f32x4_splat(left))));
        }
        f32x4 high = f32x4_max(off[0], off[1]), low = f32x4_sub(f32x4_splat(0), f32x4_min(off[0], off[1]));
        float least = fminf(highest[RA_EXTREMES - 1], lowest[RA_EXTREMES - 1]);
        if (f32x4_any_greater(f32x4_max(high, low), f32x4_splat(least))) {
          keep_largest_of(aligned, highest, row, high);
          keep_largest_of(opposed, lowest, row, low);
        }
        keep_largest(large, norms, row, e.q_squares[row]);
      }
    }
  }
  return RA_OK;
}

// --- Rows ---------------------------------------------------------------------------------------------------------

// Eight queries: where they are, what they see, and x = scale R q as lanes. Lanes past `count` repeat the last one.
typedef struct lanes {
  uint32_t i[LANES];
  ra_range keys[LANES], state[LANES]; // state: keys that the polynomial engine takes through its state, but outliers
  size_t head[LANES];                 // flat head in [B][H]
  const float *bias[LANES];           // entry of key 0, those of the others before it; NULL without bias
  uint32_t count, end;                // different ones; of all their keys
  int sloped;                         // there are slopes:
  float slope[LANES], near[LANES];    // adds slope (near - |position - j|), near being the least |position - j|
  int64_t position[LANES];
} lanes;

// The bias of query i of a flat head to key 0; to key j, j entries before.
static const float *bias_of(const ra_problem *p, size_t head, uint32_t i) {
  size_t own = p->bias_heads > 1 ? head % p->heads * ((size_t)p->query_length + p->key_length - 1) : 0;
  return p->bias ? p->bias + own + i + p->key_length - 1 : NULL;
}

// From a position to the nearest of these keys.
static int64_t distance_to(int64_t position, ra_range keys) {
  if (position < keys.first) return keys.first - position;
  return position < keys.end ? 0 : position - keys.end + 1;
}

static lanes load_lanes(const sample *e, const ra_arrays *x, uint32_t kv_head, const uint32_t *rows, uint32_t count) {
  lanes l = {.count = count, .end = 0, .sloped = e->p->alibi != NULL};
  for (uint32_t n = 0; n < LANES; n++) {
    uint32_t row = rows[n < count ? n : count - 1];
    l.i[n] = row % e->p->query_length;
    l.head[n] = kv_head * e->group + row / e->p->query_length;
    l.keys[n] = ra_keys_of(e->p, l.i[n]);
    l.bias[n] = bias_of(e->p, l.head[n], l.i[n]);
    size_t h = row / e->p->query_length;
    int outlier = ra_outlier_bits(ra_outlier_queries(e->p, kv_head), (uint32_t)e->group, (uint32_t)h, l.i[n], 1) != 0;
    l.state[n] = outlier ? (ra_range){0, 0} : ra_state_keys(e->p, ra_chunk_start(e->p, l.i[n]));
    if (l.keys[n].end > l.end) l.end = l.keys[n].end;
    l.position[n] = (int64_t)l.i[n] + e->p->query_offset;
    l.near[n] = (float)distance_to(l.position[n], l.keys[n]);
    l.slope[n] = e->p->alibi ? e->p->alibi[l.head[n] % e->p->heads] : 0;
  }
  for (uint32_t n = 0, run; n < count; n += run) { // rows that follow one another turn together
    run = 1;
    while (n + run < count && l.head[n + run] == l.head[n] && l.i[n + run] == l.i[n] + run) run++;
    const float *q_n = x->q + ra_head(e->p, l.head[n], e->p->heads, e->Nq, e->D) + l.i[n] * e->q_row;
    ra_rotary_rows(&e->state->q_rotary, q_n, e->q_row, e->rows + n * e->Dp, e->Dp, run, l.i[n], RA_ROTATE, e->p->scale);
  }
  for (uint32_t n = count; n < LANES; n++) memcpy(e->rows + n * e->Dp, e->rows + (n - 1) * e->Dp, e->D * sizeof(float));
  ra_transpose(e->rows, e->Dp, LANES, e->D, e->strip, LANES);
  return l;
}

// s[n][8] of the lanes against keys j .. j + count - 1.
static void score_keys(const sample *e, const lanes *l, uint32_t j, uint32_t count, float *s) {
  const float *k = e->k_rows + (size_t)j * e->Dp;
  if (!ra_is_relative(e->p)) {
    ra_set_rows(k, e->Dp, count, e->strip, LANES, (uint32_t)e->D, s, LANES);
    for (uint32_t n = 0; n < count * LANES && e->state->centred; n += 4)
      f32x4_store(s + n, f32x4_sub(f32x4_load(s + n), f32x4_load_splat(e->k_shift + j + n / LANES)));
    return;
  }
  const ra_relative *map = map_of(e);
  ra_transpose(k, e->Dp, count, e->D, e->columns, TILE);
  for (uint32_t n = 0; n < LANES; n++) {
    float *line = e->lines + n * TILE;
    if (n < l->count)
      ra_relative_row(map, 0, e->rows + n * e->Dp, e->columns, TILE, diagonal_of(e, l->i[n], j), count, line);
    else memcpy(line, line - TILE, count * sizeof(float));
  }
  ra_transpose(e->lines, TILE, LANES, count, s, LANES);
}

// Of those scores the gradient by the queries, d_t [D][8] += sum_n ds[n][8] k_n.
static void add_query_gradients(const sample *e, const lanes *l, uint32_t j, uint32_t count, const float *ds) {
  const float *k = e->k_rows + (size_t)j * e->Dp;
  if (!ra_is_relative(e->p)) {
    ra_add_columns(k, e->Dp, (uint32_t)e->D, ds, LANES, count, e->d_t, LANES);
    return;
  }
  ra_transpose(k, e->Dp, count, e->D, e->columns, TILE);
  ra_transpose(ds, LANES, count, LANES, e->lines, TILE);
  for (uint32_t n = 0; n < l->count; n++)
    ra_relative_row_gradient(map_of(e), 0, e->lines + n * TILE, e->columns, TILE, diagonal_of(e, l->i[n], j), count,
                             e->d_t + n, LANES);
}

// The first tile at key j or behind it, both multiples of TILE, that some lane sees a key of; at least l->end when there is none.
static uint32_t next_tile(const lanes *l, uint32_t j) {
  uint32_t next = UINT32_MAX;
  for (int i = 0; i < LANES; i++)
    if (l->keys[i].first < l->keys[i].end && l->keys[i].end > j)
      next = ra_min_u32(next, l->keys[i].first > j ? l->keys[i].first / TILE * TILE : j);
  return next;
}

uint32_t ra_sample_scores(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, const uint32_t *rows,
                          uint32_t count, uint32_t stride, float *scores, void *workspace) {
  if (ra_check(p) != RA_OK || count == 0 || count > LANES || stride == 0) return 0;
  ra_workspace_cursor cursor = {workspace, 0, 0};
  sample e = arrange(p, &cursor);
  lanes l = load_lanes(&e, x, kv_head, rows, count);
  uint32_t written = 0;
  for (uint64_t j = 0; j < l.end; j += stride) {
    float s[LANES];
    uint64_t tile = next_tile(&l, (uint32_t)j / TILE * TILE);
    if (tile > j) j = (tile + stride - 1) / stride * stride;
    if (j >= l.end) break;
    if (ra_outlier_bits(ra_outlier_keys(p, kv_head), 1, 0, (uint32_t)j, 1)) continue;
    score_keys(&e, &l, (uint32_t)j, 1, s);
    for (uint32_t n = 0; n < count; n++)
      if (l.keys[n].first <= j && j < l.keys[n].end) scores[written++] = s[n];
  }
  return written;
}

// What the scores of a tile that begins at key j0 have added to them: of slopes less than what the nearest key has, so that it is 0 or
// less where a key is seen. Differences of positions are exact as floats up to 2^24, and weigh nothing from there on.
typedef struct added {
  const lanes *l;
  uint32_t j0;
  float position[LANES]; // less j0
} added;

static added added_from(const lanes *l, uint32_t j0) {
  added a = {.l = l, .j0 = j0};
  for (int i = 0; l->sloped && i < LANES; i++) a.position[i] = (float)(l->position[i] - j0);
  return a;
}

// Of key number n, lanes h .. h + 3.
RA_INLINE f32x4 added_to(const added *a, int h, uint32_t n) {
  const lanes *l = a->l;
  f32x4 sum = f32x4_splat(0);
  if (l->sloped) {
    f32x4 ahead = f32x4_sub(f32x4_load(a->position + h), f32x4_splat((float)n));
    f32x4 distance = f32x4_max(ahead, f32x4_sub(f32x4_splat(0), ahead));
    sum = f32x4_mul(f32x4_load(l->slope + h), f32x4_sub(f32x4_load(l->near + h), distance));
  }
  if (!l->bias[0]) return sum;
  float bias[4];
  for (int i = 0; i < 4; i++) bias[i] = *(l->bias[h + i] - a->j0 - n);
  return f32x4_add(sum, f32x4_load(bias));
}

// What weighs a score: exp(s + bias - reference), or p(s) exp(bias - reference) for the keys of the state but outliers.
typedef struct weigher {
  int polynomial; // there is one, of this degree; else all is exp
  uint32_t degree;
  float c[2][RA_MAX_DEGREE + 1]; // its coefficients, those of its derivative
  ra_outliers outliers;          // keys
  float reference[LANES];
  int seen[LANES]; // some key counts
} weigher;

static weigher weigher_of(const ra_problem *p, uint32_t kv_head, const float *coefficients, uint32_t degree) {
  weigher w = {.polynomial = coefficients != NULL, .degree = degree, .outliers = ra_outlier_keys(p, kv_head)};
  for (uint32_t m = 0; coefficients && m <= degree; m++) {
    w.c[0][m] = coefficients[m];
    if (m > 0) w.c[1][m - 1] = (float)m * coefficients[m];
  }
  return w;
}

// p(s), or p'(s)
RA_INLINE f32x4 polynomial_of(const weigher *w, int derivative, f32x4 s) {
  const float *c = w->c[derivative];
  f32x4 sum = f32x4_splat(0);
  RA_ROLLED
  for (uint32_t m = w->degree + 1; m-- > 0;) sum = f32x4_madd(sum, s, f32x4_load_splat(c + m));
  return sum;
}

enum { MIXED, BY_EXP, BY_POLYNOMIAL };

// Of a tile the keys that each lane sees, first .. end - 1, and among these those of its state, from .. to - 1.
typedef struct spans {
  float first[LANES], end[LANES], from[LANES], to[LANES];
} spans;

// Those of keys j0 .. j0 + count - 1, and how these, but outliers, are weighed by all lanes that see any: by exp, by the polynomial,
// or as it comes.
static int weighed_how(const lanes *l, const weigher *w, uint32_t j0, uint32_t count, spans *t) {
  int by_exp = 0, by_polynomial = 0, mixed = l->bias[0] || l->sloped;
  for (int i = 0; i < LANES; i++) {
    t->first[i] = (float)ra_place(l->keys[i].first, j0, count), t->end[i] = (float)ra_place(l->keys[i].end, j0, count);
    ra_range state = w->polynomial ? l->state[i] : (ra_range){0, 0};
    t->from[i] = (float)ra_place(state.first, j0, count), t->to[i] = (float)ra_place(state.end, j0, count);
    if (!(t->first[i] < t->end[i])) continue;
    if (!(t->from[i] < t->to[i])) by_exp = 1;
    else if (t->from[i] > t->first[i] || t->to[i] < t->end[i]) mixed = 1;
    else by_polynomial = 1;
  }
  return mixed || (by_exp && by_polynomial) ? MIXED : by_exp ? BY_EXP : BY_POLYNOMIAL;
}

// x for the lanes that see key n of a tile, else y.
RA_INLINE f32x4 where_seen(f32x4 n, const float *first, const float *end, f32x4 x, f32x4 y) {
  return f32x4_where_less(n, f32x4_load(first), y, f32x4_where_less(n, f32x4_load(end), x, y));
}

// Of keys first .. end - 1.
RA_KERNEL void weigh_by_exp(const lanes *l, const weigher *w, const spans *t, const float *s, uint32_t first,
                            uint32_t end, float *weight) {
  const ra_exp2_constants *constants = ra_exp2_load();
  f32x4 to_log2 = f32x4_splat((float)RA_LOG2_E), zero = f32x4_splat(0), most = f32x4_splat(128);
  for (int h = 0; h < (int)l->count; h += 4) {
    f32x4 reference = f32x4_load(w->reference + h), key = f32x4_splat((float)first);
    RA_ROLLED
    for (uint32_t n = first; n < end; n++, key = f32x4_add(key, f32x4_splat(1))) {
      f32x4 x = f32x4_mul(f32x4_sub(f32x4_load(s + n * LANES + h), reference), to_log2);
      x = ra_exp2(f32x4_min(most, x), constants); // from 2^128 on: infinity
      f32x4_store(weight + n * LANES + h, where_seen(key, t->first + h, t->end + h, x, zero));
    }
  }
}

// divided: exp(-reference).
RA_KERNEL void weigh_by_polynomial(const lanes *l, const weigher *w, const spans *t, const f32x4 *divided,
                                   const float *s, uint32_t count, int derivative, float *weight) {
  f32x4 zero = f32x4_splat(0);
  for (int h = 0; h < (int)l->count; h += 4) {
    f32x4 key = zero;
    for (uint32_t n = 0; n < count; n++, key = f32x4_add(key, f32x4_splat(1))) {
      f32x4 x = f32x4_mul(polynomial_of(w, derivative, f32x4_load(s + n * LANES + h)), divided[h / 4]);
      f32x4_store(weight + n * LANES + h, where_seen(key, t->first + h, t->end + h, x, zero));
    }
  }
}

// weight[n][8] of keys j0 .. j0 + count - 1 (derivative: of the weight by the score), of the different lanes at least; 0 where not
// allowed. May be s.
static void weigh(const lanes *l, const weigher *w, const float *s, uint32_t j0, uint32_t count, int derivative,
                  float *weight) {
  const ra_exp2_constants *constants = ra_exp2_load();
  f32x4 to_log2 = f32x4_splat((float)RA_LOG2_E), zero = f32x4_splat(0);
  spans t;
  f32x4 divided[LANES / 4]; // exp(-reference)
  for (int h = 0; w->polynomial && h < LANES; h += 4)
    divided[h / 4] = ra_exp2(f32x4_mul(f32x4_sub(zero, f32x4_load(w->reference + h)), to_log2), constants);
  int how = weighed_how(l, w, j0, count, &t);
  if (how == BY_EXP) weigh_by_exp(l, w, &t, s, 0, count, weight);
  if (how == BY_POLYNOMIAL) {
    weigh_by_polynomial(l, w, &t, divided, s, count, derivative, weight);
    ra_outliers exact = ra_outliers_within(w->outliers, j0, j0 + count);
    for (uint32_t m = 0; m < exact.count; m++)
      weigh_by_exp(l, w, &t, s, exact.rows[m] - j0, exact.rows[m] - j0 + 1, weight);
  }
  if (how != MIXED) return;
  added extra = added_from(l, j0);
  for (uint32_t n = 0, outliers = 0; n < count; n++, outliers >>= 1) {
    if (n % 32 == 0) outliers = ra_outlier_bits(w->outliers, 1, 0, j0 + n, ra_min_u32(32, count - n));
    for (int h = 0; h < (int)l->count; h += 4) {
      f32x4 key = f32x4_splat((float)n), s_n = f32x4_load(s + n * LANES + h);
      f32x4 b = added_to(&extra, h, n), reference = f32x4_load(w->reference + h);
      f32x4 exponent = f32x4_mul(f32x4_sub(f32x4_add(s_n, b), reference), to_log2);
      f32x4 value = ra_exp2(f32x4_min(f32x4_splat(128), exponent), constants);
      if (w->polynomial && !(outliers & 1)) {
        f32x4 factor = divided[h / 4];
        if (l->bias[0] || l->sloped)
          factor = ra_exp2(f32x4_mul(f32x4_min(zero, f32x4_sub(b, reference)), to_log2), constants);
        f32x4 polynomial = f32x4_mul(polynomial_of(w, derivative, s_n), factor);
        value = where_seen(key, t.from + h, t.to + h, polynomial, value);
      }
      f32x4_store(weight + n * LANES + h, where_seen(key, t.first + h, t.end + h, value, zero));
    }
  }
}

// The same of all keys, those that the mean query weighs included.
static void weigh_keys(const sample *e, const lanes *l, const weigher *w, const float *s, uint32_t j0, uint32_t count,
                       int derivative, float *weight) {
  weigh(l, w, s, j0, count, derivative, weight);
  for (uint32_t n = 0; n < count * LANES && e->state->centred; n += 4)
    f32x4_store(weight + n, f32x4_mul(f32x4_load(weight + n), f32x4_load_splat(e->k_gain + j0 + n / LANES)));
}

// What the largest scores of a tile, bias included, are: most[8] of keys that exp weighs; top[8] of the bias, or 0, of the others.
static void look_at_scores(const lanes *l, const weigher *w, const float *s, uint32_t j0, uint32_t count, float *most,
                           float *top) {
  spans t;
  f32x4 none = f32x4_splat(-FLT_MAX);
  int how = weighed_how(l, w, j0, count, &t), plain = !l->bias[0] && !l->sloped;
  added extra = added_from(l, j0);
  for (int h = 0; how != BY_POLYNOMIAL && h < (int)l->count; h += 4) {
    f32x4 x = f32x4_load(most + h), y = f32x4_load(top + h);
    for (uint32_t n = 0, outliers = 0; n < count; n++, outliers >>= 1) {
      if (!plain && n % 32 == 0) outliers = ra_outlier_bits(w->outliers, 1, 0, j0 + n, ra_min_u32(32, count - n));
      f32x4 key = f32x4_splat((float)n), s_n = f32x4_load(s + n * LANES + h);
      if (!plain) {
        f32x4 b = added_to(&extra, h, n),
              in_state = outliers & 1 ? none : where_seen(key, t.from + h, t.to + h, b, none);
        s_n = f32x4_add(s_n, b);
        y = f32x4_max(where_seen(key, t.first + h, t.end + h, in_state, none), y);
      }
      if (how == MIXED && !(outliers & 1)) s_n = where_seen(key, t.from + h, t.to + h, none, s_n);
      x = f32x4_max(where_seen(key, t.first + h, t.end + h, s_n, none), x);
    }
    f32x4_store(most + h, x), f32x4_store(top + h, y);
  }
  ra_outliers exact = ra_outliers_within(w->outliers, j0, j0 + count);
  for (int i = 0; plain && i < (int)l->count; i++) {
    if (t.from[i] < t.to[i] && top[i] < 0) top[i] = 0;
    for (uint32_t m = 0; w->polynomial && m < exact.count; m++) {
      uint32_t n = exact.rows[m] - j0;
      if (t.first[i] <= (float)n && (float)n < t.end[i] && s[n * LANES + i] > most[i]) most[i] = s[n * LANES + i];
    }
  }
}

// Whether scores are small enough, in all lanes and whatever the key, to be measured by 0.
static int are_small(const sample *e, const lanes *l) {
  if (l->bias[0] || l->sloped || ra_is_relative(e->p)) return 0;
  float squares[LANES];
  extent ignored = no_extent();
  measure_rows(e->rows, e->Dp, LANES, e->D, squares, &ignored);
  for (int i = 0; i < LANES; i++)
    if (!(sqrtf(squares[i]) * e->state->reach < SMALL)) return 0;
  return 1;
}

// Scores of all tiles, and what to measure them by in each way: the largest that exp weighs; where a polynomial is beside it and
// that is not large the largest bias, or 0.
static void score_all(const sample *e, const lanes *l, weigher *w, int ways) {
  float most[WAYS][LANES], top[WAYS][LANES];
  ra_fill(most[0], WAYS * LANES, -FLT_MAX), ra_fill(top[0], WAYS * LANES, -FLT_MAX);
  for (uint32_t j = next_tile(l, 0); j < l->end; j = next_tile(l, j + TILE)) {
    uint32_t keys = ra_min_u32(TILE, l->end - j);
    float *s = e->s + (size_t)j * LANES;
    score_keys(e, l, j, keys, s);
    for (int n = 0; n < ways; n++) look_at_scores(l, w + n, s, j, keys, most[n], top[n]);
  }
  for (int n = 0; n < ways; n++, w++)
    for (int i = 0; i < LANES; i++) {
      if (most[n][i] < top[n][i] + 20) most[n][i] = top[n][i];
      w->seen[i] = most[n][i] > RA_FORBIDDEN / (float)RA_LOG2_E;
      w->reference[i] = w->seen[i] ? most[n][i] : 0;
    }
}

// sum[8] += the weights of a tile
static void add_weights(const float *weight, uint32_t count, double *sum) {
  float tile[LANES];
  f32x4 t0 = f32x4_splat(0), t1 = t0;
  for (uint32_t n = 0; n < count; n++, weight += LANES)
    t0 = f32x4_add(t0, f32x4_load(weight)), t1 = f32x4_add(t1, f32x4_load(weight + 4));
  f32x4_store(tile, t0), f32x4_store(tile + 4, t1);
  for (int i = 0; i < LANES; i++) sum[i] += tile[i];
}

// The larger of `most` and |x|; NaN counts as infinity.
static float larger(float most, float x) { return fabsf(x) > most ? fabsf(x) : x == x ? most : INFINITY; }

// How far rows are from x->out and x->lse.
static void add_distance(const sample *e, const ra_arrays *x, const lanes *l, const float *out, const float *lse,
                         ra_distance *distance) {
  ra_distance most = *distance;
  for (uint32_t n = 0; n < l->count; n++, out += e->Dv) {
    const float *there = x->out + ra_head(e->p, l->head[n], e->p->heads, e->Nq, e->Dv) + l->i[n] * e->out_row;
    for (size_t d = 0; d < e->Dv; d++) {
      most.out = larger(most.out, out[d] - there[d]);
      most.out_entry = larger(most.out_entry, out[d]);
    }
    float lse_there = x->lse[l->head[n] * e->Nq + l->i[n]];
    if (lse[n] == lse_there) continue; // -infinity where nothing is seen
    most.lse = larger(most.lse, lse[n] - lse_there);
    most.lse_entry = larger(most.lse_entry, lse[n]);
  }
  *distance = most;
}

// How far gradients by x->out and x->lse are from those of rows, in d_t, whose out.dout is delta: with r = exp(lse - lse there),
// dS by these is r P (dP - delta there), and so dq is r (dq + (delta - delta there) mean), mean being that of the keys by the derivatives
// of weights, in the last d_t; with exp the mean key as well, which has no part in dq itself.
static void add_gradient_distance(const sample *e, const ra_arrays *x, const lanes *l, int by_exp, const float *lse,
                                  const float *delta, const float *inverse, ra_distance *distance) {
  const float *means = e->d_t + WAYS * e->Dp * LANES;
  double difference = (double)distance->dq * distance->dq, size = (double)distance->dq_size * distance->dq_size;
  for (uint32_t n = 0; n < l->count; n++) {
    size_t row = ra_head(e->p, l->head[n], e->p->heads, e->Nq, e->Dv) + l->i[n] * e->out_row;
    double lse_there = x->lse[l->head[n] * e->Nq + l->i[n]], delta_there = 0;
    if (lse[n] == -INFINITY && lse_there == lse[n]) continue; // nothing is seen
    for (size_t d = 0; d < e->Dv; d++) delta_there += (double)x->dout[row + d] * x->out[row + d];
    double ratio = ra_exp_f64(lse[n] - lse_there);
    for (size_t d = 0; d < e->D; d++) {
      double dq = e->d_t[d * LANES + n], mean = means[d * LANES + n] * (double)inverse[n] + (by_exp ? e->k_mean[d] : 0);
      double off = ratio * (dq + (delta[n] - delta_there) * mean) - dq;
      difference += off * off, size += dq * dq;
    }
  }
  distance->dq = larger(0, (float)sqrt(difference));
  distance->dq_size = (float)sqrt(size);
}

// What is wanted of some rows; dq NULL for nothing of gradients.
typedef struct row_results {
  float *out, *lse, *dq;
} row_results;

// Output and lse of rows whose weights have these sums, and inverse[8], their reciprocals or 0.
static int finish_rows(const sample *e, const lanes *l, const weigher *w, const double *sum, row_results to,
                       float *inverse) {
  int status = RA_OK;
  for (uint32_t n = 0; n < l->count; n++) {
    double shift = 0, reciprocal = sum[n] > 0 ? 1 / sum[n] : 0;
    if (w->polynomial && w->seen[n] && !(sum[n] > 0 && sum[n] <= (double)FLT_MAX)) status = RA_NOT_POSITIVE;
    for (size_t d = 0; d < e->D; d++) shift += (double)e->rows[n * e->Dp + d] * e->k_mean[d];
    shift -= l->slope[n] * (double)l->near[n];
    inverse[n] = (float)reciprocal;
    to.lse[n] = sum[n] > 0 ? (float)(ra_log_f64(sum[n]) + w->reference[n] + shift) : -INFINITY;
    for (size_t d = 0; d < e->Dv; d++) to.out[n * e->Dv + d] = (float)(e->sum_t[d * LANES + n] * reciprocal);
  }
  return status;
}

// Up to eight rows in one or two ways; distance is that of the first.
static int sample_lanes(const sample *e, const ra_arrays *x, uint32_t kv_head, const uint32_t *rows, uint32_t count,
                        weigher *w, int ways, const row_results *to, ra_distance *distance) {
  const ra_problem *p = e->p;
  lanes l = load_lanes(e, x, kv_head, rows, count);
  const float *v = x->v + ra_head(p, kv_head, p->kv_heads, e->Nk, e->Dv);
  double sum[WAYS][LANES] = {{0}};
  float delta[WAYS][LANES] = {{0}}, inverse[WAYS][LANES] = {{0}};
  sample own[WAYS + 1]; // sums apart; the last one's are of what distances need
  for (size_t n = 0; n <= WAYS; n++) own[n] = *e, own[n].sum_t += n * e->Dv * LANES, own[n].d_t += n * e->Dp * LANES;

  // pass 1: scores; small ones come with pass 2
  int small = are_small(e, &l), in_place = ways == 1 && !w->polynomial; // weights, in the place of scores
  for (int n = 0; n < ways && small; n++)
    for (int i = 0; i < LANES; i++) w[n].reference[i] = 0, w[n].seen[i] = l.keys[i].first < l.keys[i].end;
  if (!small) score_all(e, &l, w, ways);

  // pass 2: weights, their sums, weighted values; exp being its own derivative, pass 3 finds its weights in the place of scores
  ra_fill(e->sum_t, WAYS * e->Dv * LANES, 0);
  for (uint32_t j = next_tile(&l, 0); j < l.end; j = next_tile(&l, j + TILE)) {
    uint32_t keys = ra_min_u32(TILE, l.end - j);
    float *s = e->s + (small && !to->dq ? 0 : (size_t)j * LANES), *weight = in_place ? s : e->weight;
    if (small) score_keys(e, &l, j, keys, s);
    for (int n = 0; n < ways; n++) {
      weigh_keys(e, &l, w + n, s, j, keys, 0, weight);
      add_weights(weight, keys, sum[n]);
      ra_add_columns(v + j * e->v_row, e->v_row, (uint32_t)e->Dv, weight, LANES, keys, own[n].sum_t, LANES);
    }
  }
  int status = RA_OK;
  for (int n = 0; n < ways; n++)
    if (finish_rows(own + n, &l, w + n, sum[n], to[n], inverse[n]) != RA_OK) status = RA_NOT_POSITIVE;
  if (distance) add_distance(e, x, &l, to->out, to->lse, distance);
  if (!to->dq) return status;

  // pass 3: dS = weight' / sum (dout.v - dout.out), dq = scale R^T sum_j dS k
  ra_fill(e->v_strip, e->Dv * LANES, 0);
  ra_fill(e->d_t, (WAYS + 1) * e->Dp * LANES, 0);
  for (uint32_t n = 0; n < count; n++) {
    const float *dout = x->dout + ra_head(p, l.head[n], p->heads, e->Nq, e->Dv) + l.i[n] * e->out_row;
    for (size_t d = 0; d < e->Dv; d++) e->v_strip[d * LANES + n] = dout[d];
    for (int m = 0; m < ways; m++) {
      double dot = 0;
      for (size_t d = 0; d < e->Dv; d++) dot += (double)dout[d] * to[m].out[n * e->Dv + d];
      delta[m][n] = (float)dot;
    }
  }
  for (uint32_t j = next_tile(&l, 0); j < l.end; j = next_tile(&l, j + TILE)) {
    uint32_t keys = ra_min_u32(TILE, l.end - j);
    float *s = e->s + (size_t)j * LANES, *weight = in_place ? s : e->weight;
    ra_set_rows(v + j * e->v_row, e->v_row, keys, e->v_strip, LANES, (uint32_t)e->Dv, e->dp, LANES);
    for (int m = 0; m < ways; m++) {
      if (!in_place) weigh_keys(e, &l, w + m, s, j, keys, 1, weight);
      if (distance && m == 0) add_query_gradients(own + WAYS, &l, j, keys, weight);
      for (uint32_t n = 0; n < keys * LANES; n += 4) {
        f32x4 share = f32x4_mul(f32x4_load(weight + n), f32x4_load(inverse[m] + n % LANES));
        f32x4_store(weight + n, f32x4_mul(share, f32x4_sub(f32x4_load(e->dp + n), f32x4_load(delta[m] + n % LANES))));
      }
      add_query_gradients(own + m, &l, j, keys, weight);
    }
  }
  if (distance) add_gradient_distance(own, x, &l, !w->polynomial, to->lse, delta[0], inverse[0], distance);
  for (int m = 0; m < ways; m++) {
    ra_transpose(own[m].d_t, LANES, e->D, LANES, e->rows, e->Dp);
    for (uint32_t n = 0; n < count; n++)
      ra_rotary_rows(&e->state->q_rotary, e->rows + n * e->Dp, e->Dp, to[m].dq + n * e->D, e->D, 1, l.i[n],
                     RA_ROTATE_TRANSPOSE, p->scale);
  }
  return status;
}

// The polynomial, or exp where there is none, and exp beside it; how many ways that is.
static int weighers_of(const ra_problem *p, uint32_t kv_head, const float *coefficients, uint32_t degree,
                       uint32_t beside, weigher *w) {
  w[0] = weigher_of(p, kv_head, coefficients, degree);
  w[1] = weigher_of(p, kv_head, NULL, 0);
  return beside ? WAYS : 1;
}

int ra_sample_rows(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, const uint32_t *rows, uint32_t count,
                   const float *coefficients, uint32_t degree, uint32_t beside, float *out, float *lse, float *dq,
                   ra_distance *distance, void *workspace) {
  if (ra_check(p) != RA_OK || count == 0 || degree > RA_MAX_DEGREE) return RA_ERROR_PROBLEM;
  ra_workspace_cursor cursor = {workspace, 0, 0};
  sample e = arrange(p, &cursor);
  weigher w[WAYS];
  int status = RA_OK, ways = weighers_of(p, kv_head, coefficients, degree, beside, w);
  if (distance) *distance = (ra_distance){0, 0, 0, 0, 0, 0};
  for (uint32_t n = 0; n < count; n += LANES) {
    row_results to[WAYS];
    for (size_t m = 0; m < WAYS; m++) {
      size_t row = m * count + n;
      to[m] = (row_results){out + row * e.Dv, lse + row, dq ? dq + row * e.D : NULL};
    }
    int some = sample_lanes(&e, x, kv_head, rows + n, ra_min_u32(LANES, count - n), w, ways, to, distance);
    if (some != RA_OK) status = some;
  }
  return status;
}

// --- Columns ------------------------------------------------------------------------------------------------------

// Eight keys, and what weighs their scores.
typedef struct columns {
  uint32_t keys[LANES], outlier[LANES];
  const weigher *w;
} columns;

// Queries i0 .. i0 + count - 1 of one head, count up to TILE, and what their scores are measured by.
typedef struct queries {
  size_t head;
  uint32_t i0, count;
  // [count] x.mean key - lse; dout.out; exp of the first
  float offset[TILE], delta[TILE], factor[TILE];
} queries;

// How each of these queries weighs the eight keys, alike for all queries: live[8] and through[8] (through the state) are 1 or 0 then.
static int weighs_alike(const sample *e, const queries *t, const columns *c, float *live, float *through) {
  const ra_problem *p = e->p;
  uint32_t last = t->i0 + t->count - 1;
  ra_outliers outliers = ra_outlier_queries(p, t->head / e->group);
  uint64_t from = (uint64_t)t->i0 * e->group, to = ((uint64_t)last + 1) * e->group;
  if (p->bias || p->alibi || (c->w->polynomial && ra_outliers_within(outliers, from, to).count > 0)) return 0;
  ra_range a = ra_keys_of(p, t->i0), b = ra_keys_of(p, last); // both ends of ranges rise with i
  ra_range a_state = ra_state_keys(p, ra_chunk_start(p, t->i0)), b_state = ra_state_keys(p, ra_chunk_start(p, last));
  for (int n = 0; n < LANES; n++) {
    uint32_t j = c->keys[n];
    int all = b.first <= j && j < a.end, none = j < a.first || b.end <= j;
    int all_state = b_state.first <= j && j < a_state.end, no_state = j < a_state.first || b_state.end <= j;
    if (!c->w->polynomial || c->outlier[n]) all_state = 0, no_state = 1;
    if (!(all || none) || (all && !(all_state || no_state))) return 0;
    live[n] = all ? 1.0f : 0.0f;
    through[n] = all && all_state ? 1.0f : 0.0f;
  }
  return 1;
}

// Weights and, dP being there, the gradients by scores of all these queries, in e->weight and e->ds.
RA_KERNEL void weigh_alike(const sample *e, const queries *t, const columns *c, const float *live,
                           const float *through) {
  const ra_exp2_constants *constants = ra_exp2_load();
  f32x4 to_log2 = f32x4_splat((float)RA_LOG2_E), zero = f32x4_splat(0);
  for (int h = 0; h < LANES; h += 4) {
    f32x4 seen = f32x4_load(live + h), by_state = f32x4_load(through + h);
    int some_state = f32x4_any_greater(by_state, zero), some_exp = f32x4_any_greater(seen, by_state);
    for (uint32_t n = 0; n < t->count; n++) {
      float *weight = e->weight + n * LANES + h, *ds = e->ds + n * LANES + h;
      f32x4 dp = f32x4_load(e->dp + n * LANES + h), s = f32x4_load(e->s + n * LANES + h), value = zero, slope = zero;
      if (some_exp) {
        f32x4 x = f32x4_mul(f32x4_add(s, f32x4_load_splat(t->offset + n)), to_log2);
        value = slope = ra_exp2(x, constants);
      }
      if (some_state) {
        f32x4 factor = f32x4_load_splat(t->factor + n);
        value = f32x4_where_less(zero, by_state, f32x4_mul(polynomial_of(c->w, 0, s), factor), value);
        slope = f32x4_where_less(zero, by_state, f32x4_mul(polynomial_of(c->w, 1, s), factor), slope);
      }
      slope = f32x4_where_less(zero, seen, slope, zero);
      f32x4_store(weight, f32x4_where_less(zero, seen, value, zero));
      f32x4_store(ds, f32x4_mul(slope, f32x4_sub(dp, f32x4_load_splat(t->delta + n))));
    }
  }
}

// The same for one of them, which weighs in its own way.
static void weigh_apart(const sample *e, const queries *t, const columns *c, uint32_t n) {
  const ra_exp2_constants *constants = ra_exp2_load();
  uint32_t i = t->i0 + n, h = (uint32_t)(t->head % e->group);
  ra_range range = ra_keys_of(e->p, i), state = ra_state_keys(e->p, ra_chunk_start(e->p, i));
  int outlier = ra_outlier_bits(ra_outlier_queries(e->p, t->head / e->group), (uint32_t)e->group, h, i, 1) != 0;
  const float *own = bias_of(e->p, t->head, i);
  float live[LANES], polynomial[LANES], bias[LANES] = {0};
  for (int m = 0; m < LANES; m++) {
    uint32_t j = c->keys[m];
    live[m] = range.first <= j && j < range.end ? 1.0f : 0.0f;
    int through = c->w->polynomial && !outlier && !c->outlier[m] && state.first <= j && j < state.end;
    polynomial[m] = through ? 1.0f : 0.0f;
    if (own) bias[m] = *(own - j);
    if (e->p->alibi) bias[m] -= (float)ra_alibi(e->p, t->head, (size_t)i + e->p->key_length - 1 - j);
  }
  f32x4 zero = f32x4_splat(0), to_log2 = f32x4_splat((float)RA_LOG2_E);
  for (int m = 0; m < LANES; m += 4) {
    float *weight = e->weight + n * LANES + m, *ds = e->ds + n * LANES + m;
    f32x4 s = f32x4_load(e->s + n * LANES + m), by_state = f32x4_load(polynomial + m);
    f32x4 offset = f32x4_add(f32x4_splat(t->offset[n]), f32x4_load(bias + m));
    f32x4 value = ra_exp2(f32x4_mul(f32x4_add(s, offset), to_log2), constants), slope = value;
    if (c->w->polynomial) {
      f32x4 divided = ra_exp2(f32x4_mul(offset, to_log2), constants);
      value = f32x4_where_less(zero, by_state, f32x4_mul(polynomial_of(c->w, 0, s), divided), value);
      slope = f32x4_where_less(zero, by_state, f32x4_mul(polynomial_of(c->w, 1, s), divided), slope);
    }
    f32x4_store(weight, f32x4_where_less(zero, f32x4_load(live + m), value, zero));
    slope = f32x4_where_less(zero, f32x4_load(live + m), slope, zero);
    f32x4_store(ds, f32x4_mul(slope, f32x4_sub(f32x4_load(e->dp + n * LANES + m), f32x4_splat(t->delta[n]))));
  }
}

static int some_between(const uint32_t *keys, uint32_t first, uint32_t end) {
  int some = 0;
  for (int n = 0; n < LANES; n++) some |= keys[n] >= first && keys[n] < end;
  return some;
}

// Groups of eight keys, the same for every way that they are weighed in.
typedef struct groups {
  uint32_t count;
  int ways;
  columns c[WAYS][GROUPS];
  sample own[WAYS][GROUPS]; // their lanes in strip and v_strip; sums apart
} groups;

// What the mean query makes of these weights and gradients by scores; its own part of the gradient by keys has the weights, not their
// derivatives.
RA_KERNEL void weigh_centred(const sample *e, const queries *t, const columns *c) {
  for (uint32_t h = 0; h < LANES; h += 4) {
    float gain[4];
    f32x4 lacking = f32x4_splat(0);
    for (uint32_t m = 0; m < 4; m++) gain[m] = e->k_gain[c->keys[h + m]];
    for (uint32_t n = h; n < t->count * LANES; n += LANES) {
      f32x4 weight = f32x4_mul(f32x4_load(e->weight + n), f32x4_load(gain));
      f32x4 ds = f32x4_mul(f32x4_load(e->ds + n), f32x4_load(gain));
      f32x4_store(e->weight + n, weight), f32x4_store(e->ds + n, ds);
      f32x4 whole = f32x4_mul(weight, f32x4_sub(f32x4_load(e->dp + n), f32x4_load_splat(t->delta + n / LANES)));
      lacking = f32x4_add(lacking, f32x4_sub(whole, ds));
    }
    for (size_t d = 0; d < e->D; d++) {
      float *d_t = e->d_t + d * LANES + h;
      f32x4_store(d_t, f32x4_madd(f32x4_splat(e->p->scale * e->q_mean[d]), lacking, f32x4_load(d_t)));
    }
  }
}

// These queries, with rows of dout for them, against all groups; t lacks all but delta.
static void add_weighed(const groups *g, const ra_arrays *x, queries *t, const float *dout) {
  const sample *e = g->own[0];
  int polynomial = g->c[0]->w->polynomial;
  uint32_t i0 = t->i0, count = t->count, first = ra_keys_of(e->p, i0).first, end = ra_key_limit(e->p, i0 + count - 1);
  const float *lse = x->lse + t->head * e->Nq + i0;
  rotate_queries(e, x->q, t->head, i0, count, e->p->scale);
  for (uint32_t n = 0; n < count; n++)
    t->offset[n] = dot(e->rows + n * e->Dp, e->k_mean, e->D) - (lse[n] == -INFINITY ? 0 : lse[n]);
  for (uint32_t n = 0; n < TILE && polynomial; n += 4) {
    f32x4 offset = f32x4_mul(f32x4_load(t->offset + n), f32x4_splat((float)RA_LOG2_E));
    f32x4_store(t->factor + n, ra_exp2(offset, ra_exp2_load()));
  }
  for (uint32_t m = 0; m < g->count; m++) {
    if (!some_between(g->c[0][m].keys, first, end)) continue;
    score_queries(g->own[0] + m, i0, count, g->c[0][m].keys, e->s);
    ra_set_rows(dout, e->out_row, count, g->own[0][m].v_strip, LANES, (uint32_t)e->Dv, e->dp, LANES);
    for (int way = 0; way < g->ways; way++) {
      const columns *c = g->c[way] + m;
      const sample *own = g->own[way] + m;
      float live[LANES], through[LANES];
      if (weighs_alike(e, t, c, live, through)) weigh_alike(e, t, c, live, through);
      else
        for (uint32_t n = 0; n < count; n++) weigh_apart(e, t, c, n);
      if (e->state->centred) weigh_centred(own, t, c);
      ra_add_columns(dout, e->out_row, (uint32_t)e->Dv, e->weight, LANES, count, own->sum_t, LANES);
      add_key_gradients(own, i0, count, c->keys, e->ds);
    }
  }
}

// Queries i0 .. i0 + count - 1 of one head with the dout, out and lse that are there.
static void add_queries(const sample *e, const ra_arrays *x, size_t head, uint32_t i0, uint32_t count,
                        const groups *g) {
  size_t row = ra_head(e->p, head, e->p->heads, e->Nq, e->Dv) + i0 * e->out_row;
  const float *dout = x->dout + row, *out = x->out + row;
  queries t = {.head = head, .i0 = i0, .count = count};
  for (uint32_t n = 0; n < count; n++) t.delta[n] = dot(dout + n * e->out_row, out + n * e->out_row, e->Dv);
  add_weighed(g, x, &t, dout);
}

// What changes when the lse and out of query i become those given, `share` times. P~ being the weight by what is there, the weight
// becomes r P~, r = exp(lse there - lse), and dS = P~ (dP - delta~) becomes r P~ (dP - delta): differences are those of a query with
// share (r - 1) dout for its dout and share (r delta - delta~) for its delta.
static void add_change(const sample *e, const ra_arrays *x, size_t head, uint32_t i, float lse, const float *out,
                       float share, const groups *g) {
  size_t row = ra_head(e->p, head, e->p->heads, e->Nq, e->Dv) + i * e->out_row;
  const float *dout = x->dout + row;
  double ratio = ra_exp_f64((double)x->lse[head * e->Nq + i] - lse);
  if (lse == -INFINITY) return; // it sees nothing
  queries t = {.head = head, .i0 = i, .count = 1};
  t.delta[0] = (float)(share * (ratio * dot(dout, out, e->Dv) - dot(dout, x->out + row, e->Dv)));
  for (size_t d = 0; d < e->Dv; d++) e->scaled[d] = (float)(share * (ratio - 1) * dout[d]);
  add_weighed(g, x, &t, e->scaled);
}

// Groups of eight of `count` keys, with their rows and values in the lanes of strip and v_strip; sums begin at zero. Lanes past the last
// key repeat it.
static void load_columns(const sample *e, const ra_arrays *x, uint32_t kv_head, const uint32_t *keys, uint32_t count,
                         const weigher *w, int ways, groups *g) {
  const float *v = x->v + ra_head(e->p, kv_head, e->p->kv_heads, e->Nk, e->Dv);
  g->count = ra_ceil_div(count, LANES), g->ways = ways;
  ra_fill(e->sum_t, e->Dv * SUMS * LANES, 0);
  ra_fill(e->d_t, e->Dp * SUMS * LANES, 0);
  for (uint32_t m = 0; m < g->count; m++) {
    for (size_t way = 0; way < WAYS; way++) {
      sample *own = g->own[way] + m;
      size_t at = way * GROUPS + m;
      *own = *e;
      own->strip += m * e->Dp * LANES, own->v_strip += m * e->Dv * LANES;
      own->sum_t += at * e->Dv * LANES, own->d_t += at * e->Dp * LANES;
      g->c[way][m].w = w + way;
    }
    for (uint32_t n = 0; n < LANES; n++) {
      uint32_t j = keys[ra_min_u32(m * LANES + n, count - 1)];
      uint32_t outlier = ra_outlier_bits(ra_outlier_keys(e->p, kv_head), 1, 0, j, 1);
      for (int way = 0; way < WAYS; way++) g->c[way][m].keys[n] = j, g->c[way][m].outlier[n] = outlier;
      ra_transpose(e->k_rows + j * e->Dp, e->Dp, 1, e->D, g->own[0][m].strip + n, LANES);
      ra_transpose(v + j * e->v_row, e->v_row, 1, e->Dv, g->own[0][m].v_strip + n, LANES);
    }
  }
}

// Of all ways, one after the other.
static void store_columns(const groups *g, const uint32_t *keys, uint32_t count, float *dk, float *dv) {
  for (int way = 0; way < g->ways; way++)
    for (uint32_t n = 0; n < count; n++) {
      const sample *e = g->own[way] + n / LANES;
      ra_transpose(e->d_t + n % LANES, LANES, e->D, 1, e->rows, e->Dp);
      ra_transpose(e->sum_t + n % LANES, LANES, e->Dv, 1, dv, e->Dv);
      ra_rotary_rows(&e->state->k_rotary, e->rows, e->Dp, dk, e->D, 1, keys[n], RA_ROTATE_TRANSPOSE, 1.0f);
      dk += e->D, dv += e->Dv;
    }
}

int ra_sample_columns(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, const uint32_t *keys, uint32_t count,
                      const float *coefficients, uint32_t degree, uint32_t beside, float *dk, float *dv,
                      void *workspace) {
  if (ra_check(p) != RA_OK || count == 0 || count > RA_SAMPLE_KEYS || degree > RA_MAX_DEGREE) return RA_ERROR_PROBLEM;
  ra_workspace_cursor cursor = {workspace, 0, 0};
  sample e = arrange(p, &cursor);
  groups g;
  weigher w[WAYS];
  int ways = weighers_of(p, kv_head, coefficients, degree, beside, w);
  if (p->dv_by_derivative && degree > 0) memcpy(w->c[0], w->c[1], sizeof w->c[0]);
  load_columns(&e, x, kv_head, keys, count, w, ways, &g);
  for (size_t head = kv_head * e.group; head < (kv_head + 1) * e.group; head++)
    for (uint32_t i = ra_query_start(p, keys[0]), end = ra_query_end(p, keys[count - 1]), some; i < end; i += some) {
      some = ra_min_u32(TILE, end - i);
      uint32_t first = ra_keys_of(p, i).first, limit = ra_key_limit(p, i + some - 1), seen = 0;
      for (uint32_t m = 0; m < g.count; m++) seen |= (uint32_t)some_between(g.c[0][m].keys, first, limit);
      if (seen) add_queries(&e, x, head, i, some, &g);
    }
  store_columns(&g, keys, count, dk, dv);
  return RA_OK;
}

int ra_sample_changes(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, const uint32_t *rows, uint32_t count,
                      const float *lse, const float *out, const float *shares, const uint32_t *keys, uint32_t key_count,
                      float *dk, float *dv, void *workspace) {
  if (ra_check(p) != RA_OK || key_count == 0 || key_count > RA_SAMPLE_KEYS) return RA_ERROR_PROBLEM;
  ra_workspace_cursor cursor = {workspace, 0, 0};
  sample e = arrange(p, &cursor);
  groups g;
  for (uint32_t n = 0; n < count; n++)
    if (rows[n] >= e.group * e.Nq) return RA_ERROR_PROBLEM;
  weigher w[WAYS];
  load_columns(&e, x, kv_head, keys, key_count, w, weighers_of(p, kv_head, NULL, 0, 0, w), &g);
  for (uint32_t n = 0; n < count; n++)
    add_change(&e, x, kv_head * e.group + rows[n] / e.Nq, (uint32_t)(rows[n] % e.Nq), lse[n], out + n * e.Dv, shares[n],
               &g);
  store_columns(&g, keys, key_count, dk, dv);
  return RA_OK;
}

// --- Gradients of a bias ----------------------------------------------------------------------------------------------------

// What query i gives to the distances of some entries.
typedef struct lag_terms {
  float s[RA_SAMPLE_LAGS], dp[RA_SAMPLE_LAGS],
      offset[RA_SAMPLE_LAGS]; // x.y, dP - delta, all but x.y of log P in powers of two
} lag_terms;

// sums[count][4] += dS with exp and with the three polynomials
RA_KERNEL void add_lag_terms(const lag_terms *t, uint32_t count, const float *coefficients, double *sums) {
  const ra_exp2_constants *constants = ra_exp2_load();
  f32x4 to_log2 = f32x4_splat((float)RA_LOG2_E), most = f32x4_splat(127);
  for (uint32_t n = 0; n < count; n += 4) {
    f32x4 s = f32x4_load(t->s + n), dp = f32x4_load(t->dp + n), offset = f32x4_load(t->offset + n);
    float lane[4][4];
    f32x4_store(lane[0], f32x4_mul(dp, ra_exp2(f32x4_min(most, f32x4_madd(s, to_log2, offset)), constants)));
    f32x4 factor = f32x4_mul(dp, ra_exp2(f32x4_min(most, offset), constants));
    for (int g = 0; g < 3; g++) {
      const float *c = coefficients + 3 * g;
      f32x4 p = f32x4_madd(f32x4_madd(f32x4_splat(c[2]), s, f32x4_splat(c[1])), s, f32x4_splat(c[0]));
      f32x4_store(lane[g + 1], f32x4_mul(factor, p));
    }
    for (uint32_t i = 0; i < 4 && n + i < count; i++)
      for (int g = 0; g < 4; g++) sums[4 * (n + i) + (size_t)g] += lane[g][i];
  }
}

// Query i with x_i = scale R q_i, by such lse and out, at entries of bias; times `sign`.
static void set_lag_terms(const sample *e, const ra_arrays *x, size_t head, uint32_t i, const float *x_i, float lse,
                          const float *out, float sign, const uint32_t *entries, uint32_t count, lag_terms *t) {
  const float *dout = x->dout + ra_head(e->p, head, e->p->heads, e->Nq, e->Dv) + i * e->out_row;
  const float *v = x->v + ra_head(e->p, head / e->group, e->p->kv_heads, e->Nk, e->Dv), *own = bias_of(e->p, head, i);
  ra_range keys = ra_keys_of(e->p, i);
  float delta = dot(dout, out, e->Dv), shift = dot(x_i, e->k_mean, e->D);
  for (uint32_t l = 0; l < count; l++) {
    int64_t j = (int64_t)i + e->p->key_length - 1 - entries[l];
    t->dp[l] = 0, t->s[l] = 0, t->offset[l] = 0;
    if (j < keys.first || j >= keys.end) continue;
    t->s[l] = dot(x_i, e->k_rows + j * (int64_t)e->Dp, e->D);
    t->dp[l] = sign * (dot(dout, v + j * (int64_t)e->v_row, e->Dv) - delta);
    t->offset[l] = (float)(((double)*(own - j) + shift - lse) * RA_LOG2_E);
  }
}

static int are_lags(const ra_problem *p, const uint32_t *entries, uint32_t count) {
  if (ra_check(p) != RA_OK || ra_is_relative(p) || !p->bias || count == 0 || count > RA_SAMPLE_LAGS) return 0;
  for (uint32_t l = 0; l < count; l++)
    if (entries[l] >= ra_diagonals(p)) return 0;
  return 1;
}

int ra_sample_lags(const ra_problem *p, const ra_arrays *x, uint32_t head, const uint32_t *entries, uint32_t count,
                   const float *coefficients, float *sums, void *workspace) {
  if (!are_lags(p, entries, count) || head >= p->batch * p->heads) return RA_ERROR_PROBLEM;
  ra_workspace_cursor cursor = {workspace, 0, 0};
  sample e = arrange(p, &cursor);
  double total[4 * RA_SAMPLE_LAGS] = {0};
  lag_terms t = {{0}, {0}, {0}};
  for (uint32_t i = 0; i < p->query_length; i++) {
    const float *out = x->out + ra_head(p, head, p->heads, e.Nq, e.Dv) + i * e.out_row;
    float lse = x->lse[head * e.Nq + i];
    if (i % TILE == 0) rotate_queries(&e, x->q, head, i, ra_min_u32(TILE, p->query_length - i), p->scale);
    if (lse == -INFINITY) continue;
    set_lag_terms(&e, x, head, i, e.rows + i % TILE * e.Dp, lse, out, 1, entries, count, &t);
    add_lag_terms(&t, count, coefficients, total);
  }
  for (uint32_t n = 0; n < 4 * count; n++) sums[n] = (float)total[n];
  return RA_OK;
}

int ra_sample_lag_changes(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, uint32_t row, float lse,
                          const float *out, const uint32_t *entries, uint32_t count, float *changes, void *workspace) {
  ra_workspace_cursor cursor = {workspace, 0, 0};
  if (!are_lags(p, entries, count)) return RA_ERROR_PROBLEM;
  sample e = arrange(p, &cursor);
  if (kv_head >= p->batch * p->kv_heads || row >= e.group * e.Nq) return RA_ERROR_PROBLEM;
  size_t head = kv_head * e.group + row / e.Nq, i = row % e.Nq;
  const float *there = x->out + ra_head(p, head, p->heads, e.Nq, e.Dv) + i * e.out_row;
  static const float none[9];
  double total[4 * RA_SAMPLE_LAGS] = {0};
  lag_terms t = {{0}, {0}, {0}};
  rotate_queries(&e, x->q, head, (uint32_t)i, 1, p->scale);
  set_lag_terms(&e, x, head, (uint32_t)i, e.rows, lse, out, 1, entries, count, &t);
  add_lag_terms(&t, count, none, total);
  set_lag_terms(&e, x, head, (uint32_t)i, e.rows, x->lse[head * e.Nq + i], there, -1, entries, count, &t);
  add_lag_terms(&t, count, none, total);
  for (uint32_t n = 0; n < count; n++) changes[n] = (float)total[4 * n];
  return RA_OK;
}

// --- Outputs ------------------------------------------------------------------------------------------------------

// Widens the ranges of 4 `vectors` columns by rows; those whose lse is -Infinity, if there is any, do not count.
RA_INLINE void widen(const float *rows, size_t row, size_t count, const float *lse, const int vectors, float *low,
                     float *high) {
  f32x4 least[4], most[4];
  RA_UNROLLED
  for (int m = 0; m < vectors; m++) least[m] = f32x4_load(low + 4 * m), most[m] = f32x4_load(high + 4 * m);
  for (size_t n = 0; n < count; n++, rows += row) {
    if (lse && lse[n] == -INFINITY) continue;
    RA_UNROLLED
    for (int m = 0; m < vectors; m++) {
      f32x4 value = f32x4_load(rows + 4 * m);
      least[m] = f32x4_min(value, least[m]), most[m] = f32x4_max(value, most[m]);
    }
  }
  RA_UNROLLED
  for (int m = 0; m < vectors; m++) f32x4_store(low + 4 * m, least[m]), f32x4_store(high + 4 * m, most[m]);
}

RA_KERNEL void widen_16(const float *rows, size_t row, size_t count, const float *lse, float *low, float *high) {
  widen(rows, row, count, lse, 4, low, high);
}

RA_KERNEL void widen_4(const float *rows, size_t row, size_t count, const float *lse, float *low, float *high) {
  widen(rows, row, count, lse, 1, low, high);
}

// Likewise of all `width` columns.
static void widen_ranges(const float *rows, size_t row, size_t count, size_t width, const float *lse, float *low,
                         float *high) {
  size_t d = 0;
  for (; d + 16 <= width; d += 16) widen_16(rows + d, row, count, lse, low + d, high + d);
  for (; d + 4 <= width; d += 4) widen_4(rows + d, row, count, lse, low + d, high + d);
  for (size_t n = 0; d < width && n < count; n++)
    for (size_t c = d; c < width && !(lse && lse[n] == -INFINITY); c++) {
      float value = rows[n * row + c];
      low[c] = value < low[c] ? value : low[c], high[c] = value > high[c] ? value : high[c];
    }
}

float ra_sample_outside(const ra_problem *p, const ra_arrays *x, uint32_t kv_head) {
  if (ra_check(p) != RA_OK || kv_head >= p->batch * p->kv_heads) return NAN;
  size_t Nq = p->query_length, Nk = p->key_length, Dv = p->value_dim, group = ra_group(p);
  float low[RA_MAX_HEAD_DIM], high[RA_MAX_HEAD_DIM], out_low[RA_MAX_HEAD_DIM], out_high[RA_MAX_HEAD_DIM], most = 0;
  for (size_t d = 0; d < Dv; d++) low[d] = out_low[d] = INFINITY, high[d] = out_high[d] = -INFINITY;
  widen_ranges(x->v + ra_head(p, kv_head, p->kv_heads, Nk, Dv), ra_row(p, p->kv_heads, Dv), Nk, Dv, NULL, low, high);
  for (size_t head = kv_head * group; head < (kv_head + 1) * group; head++)
    widen_ranges(x->out + ra_head(p, head, p->heads, Nq, Dv), ra_row(p, p->heads, Dv), Nq, Dv, x->lse + head * Nq,
                 out_low, out_high);
  for (size_t d = 0; d < Dv; d++) { // -Infinity both, where no row counts
    float above = out_high[d] - high[d], below = low[d] - out_low[d];
    most = above > most ? above : most, most = below > most ? below : most;
  }
  return most;
}
