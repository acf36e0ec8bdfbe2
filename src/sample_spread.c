// SPDX-License-Identifier: MIT
//
// Mean squares of scores, of every query against the keys that the polynomial engine takes through its state, without a
// single score:
// sum_j (x.y_j)^2 = x^T G x, G the sum of the keys' products. For the certificate of MATH.md section 6; see sample.h.

#include <math.h>

#include "elementary.h"
#include "pack.h"
#include "products.h"
#include "sample.h"

// Sums over some keys but outliers: of themselves, of their squares, and in e->gram of their products. count: without
// outliers; gone: that have left since the sums were made anew; seen: that joined or left in all.
typedef struct key_sums {
  ra_range keys;
  uint32_t count, gone, seen;
  double sum[RA_MAX_HEAD_DIM + 3], squares;
} key_sums;

// The keys from .. to - 1, up to RA_CHUNK, join with sign 1, leave with sign -1.
static void add_products(const ra_sample *e, size_t kv_head, uint32_t from, uint32_t to, int sign, key_sums *sums) {
  const float *k = e->k_rows + (size_t)from * e->Dp;
  uint32_t count = to - from, outliers = ra_sample_key_outliers(e, kv_head, from);
  for (uint32_t j = 0; j < count; j++) {
    float *row = e->rows + j * e->Dp, factor = outliers >> j & 1 ? 0 : (float)sign;
    for (size_t d = 0; d < e->Dp; d++) row[d] = factor * k[j * e->Dp + d];
    if (factor == 0) continue;
    sums->squares += sign * (double)e->k_squares[from + j];
    sums->count += (uint32_t)sign;
  }
  ra_sum_rows(e->rows, e->Dp, count, e->Dp, 0, sums->sum);
  for (size_t c = 0; c < e->D; c += RA_LANES) // lanes from D on are of what follows, and not read
    ra_add_columns(e->rows, e->Dp, (uint32_t)e->D, k + c, e->Dp, count, e->gram + c * e->D, RA_LANES);
  sums->seen += count;
}

static void add_all_products(const ra_sample *e, size_t kv_head, ra_range keys, int sign, key_sums *sums) {
  for (uint32_t j = keys.first, to; j < keys.end; j = to) {
    to = ra_min_u32(j + RA_CHUNK, keys.end);
    add_products(e, kv_head, j, to, sign, sums);
  }
}

// The sums become those over these keys, whose ends rise from call to call; made anew as the polynomial engine makes
// its states.
static void move_sums(const ra_sample *e, size_t kv_head, ra_range keys, key_sums *sums) {
  ra_range *held = &sums->keys;
  uint32_t leaving = keys.first - held->first, staying = held->end > keys.first ? held->end - keys.first : 0;
  if (staying == 0 || (leaving > 0 && ra_is_worn(sums->gone, leaving, staying))) {
    ra_fill(e->gram, (e->D + RA_LANES - 1) / RA_LANES * e->D * RA_LANES, 0);
    *sums = (key_sums){.keys = {keys.first, keys.first}, .seen = sums->seen};
  } else {
    add_all_products(e, kv_head, (ra_range){held->first, keys.first}, -1, sums);
    sums->gone += leaving;
  }
  add_all_products(e, kv_head, (ra_range){held->end, keys.end}, 1, sums);
  *held = keys;
}

// squares[i] = s.s of each query in e->rows against the keys of the sums: x^T G x.
RA_KERNEL void score_squares(const ra_sample *e, uint32_t count, float *squares) {
  f32x4 sum[RA_CHUNK];
  for (uint32_t i = 0; i < count; i++) sum[i] = f32x4_splat(0), squares[i] = 0;
  for (size_t c = 0; c < e->D; c += RA_LANES) {
    ra_set_rows(e->rows, e->Dp, count, e->gram + c * e->D, RA_LANES, (uint32_t)e->D, e->s, RA_LANES);
    for (size_t m = 0; m < RA_LANES && c + m < e->D; m += 4)
      for (uint32_t i = 0; i < count; i++) {
        const float *x = e->rows + i * e->Dp + c + m, *y = e->s + i * RA_LANES + m;
        if (c + m + 4 <= e->D) sum[i] = f32x4_madd(f32x4_load(x), f32x4_load(y), sum[i]);
        else
          for (size_t d = 0; c + m + d < e->D; d++) squares[i] += x[d] * y[d];
      }
  }
  for (uint32_t i = 0; i < count; i++) squares[i] += f32x4_sum(sum[i]);
}

// The largest of those queries, but outliers, against these keys; *lowest: the least mean score so far.
static void look_at_spread(const ra_sample *e, uint32_t count, uint32_t outliers, const key_sums *sums, ra_spread *most,
                           double *lowest) {
  float squares[RA_CHUNK], mean[RA_MAX_HEAD_DIM];
  uint32_t n = sums->count;
  for (size_t d = 0; d < e->D; d++) mean[d] = (float)(sums->sum[d] / n);
  score_squares(e, count, squares);
  for (uint32_t i = 0; i < count; i++) {
    if (outliers >> i & 1) continue;
    double x = -(double)ra_dot(e->rows + i * e->Dp, mean, e->D), square = squares[i] / n;
    if (-x < *lowest) *lowest = -x;
    if (x < 1 && square <= most->scores * (1 - x)) continue; // exp(x) <= 1 / (1 - x)
    most->scores = fmaxf(most->scores, (float)(square * ra_exp_f64(x)));
  }
}

int ra_sample_spread(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, float limit, ra_spread *spread,
                     void *workspace) {
  if (ra_check(p) != RA_OK || kv_head >= p->batch * p->kv_heads) return RA_ERROR_PROBLEM;
  ra_workspace_cursor cursor = {workspace, 0, 0};
  ra_sample e = ra_sample_arrange(p, &cursor);
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
      ra_sample_rotate_queries(&e, x->q, kv_head * e.group + h, i, end - i, p->scale);
      look_at_spread(&e, end - i, ra_sample_query_outliers(&e, kv_head, h, i), &sums, spread, &lowest);
      spread->rows += end - i;
    }
  }
  spread->rows += sums.seen;
  spread->gain = (float)ra_exp_f64(-lowest);
  return RA_OK;
}
