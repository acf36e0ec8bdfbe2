// SPDX-License-Identifier: MIT
//
// Rows that stand out: the largest, which may be done as outliers, and those where a polynomial is likely to fail
// first. See sample.h.

#include <math.h>
#include <string.h>

#include "elementary.h"
#include "pack.h"
#include "sample.h"

enum { FAR = 128 }; // keys so far away need not be looked at where weights fall by e, or more, until then

static float norm_of(const ra_sample *e, const float *x, float squares) {
  float entry = 0;
  for (size_t d = 0; squares < RA_TINY && d < e->D; d++) entry = fmaxf(entry, fabsf(x[d]));
  return ra_norm(squares, entry, e->D);
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
  ra_sample e = ra_sample_arrange(p, &cursor);
  uint64_t total = queries ? (uint64_t)e.group * e.Nq : e.Nk;
  if (count == 0 || count > total) return RA_ERROR_PROBLEM;
  ra_fill(norms, count, -1);
  uint32_t length = queries ? p->query_length : p->key_length, group = queries ? (uint32_t)e.group : 1;
  size_t row = queries ? e.q_row : e.Dp;
  for (uint32_t i = 0; i < length; i += RA_CHUNK)
    for (uint32_t h = 0; h < group; h++) {
      const float *some = queries ? ra_sample_query(&e, x->q, kv_head * group + h, i) : e.k_rows + i * e.Dp;
      const float *squares = queries ? e.q_squares + h * e.Nq + i : e.k_squares + i;
      for (uint32_t n = 0; n < ra_min_u32(RA_CHUNK, length - i); n++)
        keep_in_heap(rows, norms, count, (i + n) * group + h, norm_of(&e, some + n * row, squares[n]));
    }
  return RA_OK;
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

// Of some keys, but outliers, those by which an output is likely to be off by most: by |k| and what weighs it, |v -
// mean| (1 for gradients, or where no means are known) times what is left of exp(score) at the end of these keys,
// `decay` from key to key. Weight 0 where there are fewer.
RA_KERNEL void find_keys(const ra_sample *e, const ra_arrays *x, uint32_t kv_head, ra_range among, float decay,
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
    if (mean) ra_four_rows(v + first * e->v_row, e->v_row, 0, end - first, rows);
    f32x4_store(size, mean ? ra_squares_of_four(rows, mean, e->Dv, NULL) : f32x4_splat(1));
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

// By how much a slope, or the slowest of the decays that stand for a bias, lowers scores of a head from key to key; 0
// where far keys count.
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
  ra_sample e = ra_sample_arrange(p, &cursor);
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
        ra_transpose(e.rows, e.Dp, RA_LANES, e.D, e.strip, RA_LANES);
      }
      uint32_t outliers = ra_sample_query_outliers(&e, kv_head, h, i);
      ra_sample_rotate_queries(&e, x->q, kv_head * e.group + h, i, count, p->scale);
      ra_sample_score_queries(&e, i, count, own, e.s);
      float live[RA_LANES], left = 1;
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
          f32x4 s = f32x4_load(e.s + n * RA_LANES + 4 * m), weight = f32x4_load(live + 4 * m);
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
