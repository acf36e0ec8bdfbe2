// SPDX-License-Identifier: MIT
//
// A look at the data: bounds of one key/value head, scores of a few queries, a few exact rows of the output and of the
// gradients. O(N D) to prepare, O(N (D + Dv)) a row. A planner decides by these what to run, and checks what was run.
//
// sample_bounds.c     norms, entries, means: the first look, which all others need
// sample_spread.c     mean squares of scores, for a proof
// sample_extremes.c   rows that stand out
// sample_rows.c       rows of the output and of dq
// sample_columns.c    rows of dk and dv
// sample_lags.c       entries of the gradient of a bias
//
// Up to eight rows go together, as lanes. Keys are taken with their mean subtracted, as the polynomial engine does; not
// so with a relative map, whose scores with a mean key would differ from key to key. There a row costs O(N (|S| + Dv)).
// Where the mean query m says much, scores of key j are taken less m.y_j, and weighed exp(m.y_j) times, as there.

#ifndef RA_SAMPLE_H
#define RA_SAMPLE_H

#include <math.h>

#include "engines.h"
#include "monomials.h"
#include "relative.h"
#include "rotary.h"
#include "simd.h"

enum {
  RA_LANES = 8,
  RA_SAMPLE_TILE = 128, // keys, or queries, that are weighed together
  RA_SAMPLE_GROUPS = RA_SAMPLE_KEYS / RA_LANES,
  RA_WAYS = 2,                                // that rows or columns are weighed in at a time
  RA_SAMPLE_SUMS = RA_WAYS * RA_SAMPLE_GROUPS // eight lanes each
};

typedef struct ra_sample_state {
  ra_rotary q_rotary, k_rotary;
  ra_relative map;
  int map_ready;
  float reach; // the largest norm of k_rows
  int centred; // queries are
} ra_sample_state;

// What is known of one key/value head, and space for a look.
typedef struct ra_sample {
  const ra_problem *p;
  ra_sample_state *state;
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
  float *rows;             // [RA_SAMPLE_TILE][Dp]
  float *strip;            // [Dp][8] the eight rows as lanes; of columns four times that, as of v_strip
  float *v_strip;          // [Dv][8] their values, or their dout
  float *s;                // [max(Nk, RA_SAMPLE_TILE)][8]
  float *weight, *ds, *dp; // [RA_SAMPLE_TILE][8]
  float *sum_t, *d_t;      // [Dv][8], [Dp][8], of all that is summed at a time RA_SAMPLE_SUMS times
  float *scaled;           // [Dv] one row of dout
  float *gram;             // [D / 8][D][8] sums of products of keys
  // with a relative map
  char *map_space;
  float *columns; // [Dp][RA_SAMPLE_TILE] keys, or queries, of a tile
  float *lines;   // [8][RA_SAMPLE_TILE] their scores, or the gradients of these
} ra_sample;

ra_sample ra_sample_arrange(const ra_problem *p, ra_workspace_cursor *w);

// Query i of a head (flat, in [B][H]) of q.
const float *ra_sample_query(const ra_sample *e, const float *q, size_t head, size_t i);

// Such queries from i on, up to RA_SAMPLE_TILE, rotated and times scale, as e->rows.
void ra_sample_rotate_queries(const ra_sample *e, const float *q, size_t head, uint32_t i, uint32_t count, float scale);

// The outliers among up to 32 rows from `first` on, bit n: of queries of the h-th head of the group, of keys.
uint32_t ra_sample_query_outliers(const ra_sample *e, size_t kv_head, size_t h, uint32_t first);
uint32_t ra_sample_key_outliers(const ra_sample *e, size_t kv_head, uint32_t first);

// The relative map; its table is filled when it is first needed.
const ra_relative *ra_sample_map(const ra_sample *e);

// Where the pair (i, j) is in what goes by i - j.
static inline size_t ra_sample_diagonal(const ra_sample *e, uint32_t i, uint32_t j) {
  return (size_t)i + e->Nk - 1 - j;
}

// The bias of query i of a flat head to key 0, or NULL; to key j, j entries before.
const float *ra_sample_bias(const ra_problem *p, size_t head, uint32_t i);

// s[n][8] of the queries i .. i + count - 1, whose rows scale R q are in e->rows, against eight keys: lanes of e->strip.
void ra_sample_score_queries(const ra_sample *e, uint32_t i, uint32_t count, const uint32_t *keys, float *s);

// What weighs a score: exp(s + bias - reference), or p(s) exp(bias - reference) for the keys of the state but outliers.
typedef struct ra_weigher {
  int polynomial; // there is one, of this degree; else all is exp
  uint32_t degree;
  float c[2][RA_MAX_DEGREE + 1]; // its coefficients, those of its derivative
  ra_outliers outliers;          // keys
  float reference[RA_LANES];
  int seen[RA_LANES]; // some key counts
} ra_weigher;

// The polynomial, or exp where coefficients are NULL, and if `beside` exp as well; how many ways that is.
int ra_weighers_of(const ra_problem *p, uint32_t kv_head, const float *coefficients, uint32_t degree, uint32_t beside,
                   ra_weigher w[RA_WAYS]);

// p(s), or p'(s)
RA_INLINE f32x4 ra_weigher_polynomial(const ra_weigher *w, int derivative, f32x4 s) {
  const float *c = w->c[derivative];
  f32x4 sum = f32x4_splat(0);
  RA_ROLLED
  for (uint32_t m = w->degree + 1; m-- > 0;) sum = f32x4_madd(sum, s, f32x4_load_splat(c + m));
  return sum;
}

#define RA_TINY 1e-30f // what is lost of larger sums of squares is far below their rounding

// |x| from its sum of squares, or a bound of it where they are so small that a float does not hold them. `entry` bounds
// |x_d|.
static inline float ra_norm(float squares, float entry, size_t columns) {
  return squares < RA_TINY ? entry * sqrtf((float)columns) : sqrtf(squares);
}

// Sums of squares of four rows, less a mean if there is one, as lanes; and into `most`, if that is asked for, the
// largest entries.
RA_INLINE f32x4 ra_squares_of_four(const float *const rows[4], const float *mean, size_t columns, f32x4 most[4]) {
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
RA_INLINE void ra_four_rows(const float *x, size_t x_row, uint32_t n, uint32_t count, const float *rows[4]) {
  RA_UNROLLED
  for (uint32_t m = 0; m < 4; m++) rows[m] = x + ra_min_u32(n + m, count - 1) * x_row;
}

#endif
