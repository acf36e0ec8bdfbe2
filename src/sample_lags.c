// SPDX-License-Identifier: MIT
//
// Some entries of the gradient of a bias: diagonals of the scores. See sample.h.

#include <math.h>

#include "pack.h"
#include "sample.h"
#include "softmax.h"

// What query i gives to the distances of some entries.
typedef struct lag_terms {
  // x.y, dP - delta, all but x.y of log P in powers of two
  float s[RA_SAMPLE_LAGS], dp[RA_SAMPLE_LAGS], offset[RA_SAMPLE_LAGS];
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
static void set_lag_terms(const ra_sample *e, const ra_arrays *x, size_t head, uint32_t i, const float *x_i, float lse,
                          const float *out, float sign, const uint32_t *entries, uint32_t count, lag_terms *t) {
  const float *dout = x->dout + ra_head(e->p, head, e->p->heads, e->Nq, e->Dv) + i * e->out_row;
  const float *v = x->v + ra_head(e->p, head / e->group, e->p->kv_heads, e->Nk, e->Dv),
              *own = ra_sample_bias(e->p, head, i);
  ra_range keys = ra_keys_of(e->p, i);
  float delta = ra_dot(dout, out, e->Dv), shift = ra_dot(x_i, e->k_mean, e->D);
  for (uint32_t l = 0; l < count; l++) {
    int64_t j = (int64_t)i + e->p->key_length - 1 - entries[l];
    t->dp[l] = 0, t->s[l] = 0, t->offset[l] = 0;
    if (j < keys.first || j >= keys.end) continue;
    t->s[l] = ra_dot(x_i, e->k_rows + j * (int64_t)e->Dp, e->D);
    t->dp[l] = sign * (ra_dot(dout, v + j * (int64_t)e->v_row, e->Dv) - delta);
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
  ra_sample e = ra_sample_arrange(p, &cursor);
  double total[4 * RA_SAMPLE_LAGS] = {0};
  lag_terms t = {{0}, {0}, {0}};
  for (uint32_t i = 0; i < p->query_length; i++) {
    const float *out = x->out + ra_head(p, head, p->heads, e.Nq, e.Dv) + i * e.out_row;
    float lse = x->lse[head * e.Nq + i];
    if (i % RA_SAMPLE_TILE == 0)
      ra_sample_rotate_queries(&e, x->q, head, i, ra_min_u32(RA_SAMPLE_TILE, p->query_length - i), p->scale);
    if (lse == -INFINITY) continue;
    set_lag_terms(&e, x, head, i, e.rows + i % RA_SAMPLE_TILE * e.Dp, lse, out, 1, entries, count, &t);
    add_lag_terms(&t, count, coefficients, total);
  }
  for (uint32_t n = 0; n < 4 * count; n++) sums[n] = (float)total[n];
  return RA_OK;
}

int ra_sample_lag_changes(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, uint32_t row, float lse,
                          const float *out, const uint32_t *entries, uint32_t count, float *changes, void *workspace) {
  ra_workspace_cursor cursor = {workspace, 0, 0};
  if (!are_lags(p, entries, count)) return RA_ERROR_PROBLEM;
  ra_sample e = ra_sample_arrange(p, &cursor);
  if (kv_head >= p->batch * p->kv_heads || row >= e.group * e.Nq) return RA_ERROR_PROBLEM;
  size_t head = kv_head * e.group + row / e.Nq, i = row % e.Nq;
  const float *there = x->out + ra_head(p, head, p->heads, e.Nq, e.Dv) + i * e.out_row;
  static const float none[9];
  double total[4 * RA_SAMPLE_LAGS] = {0};
  lag_terms t = {{0}, {0}, {0}};
  ra_sample_rotate_queries(&e, x->q, head, (uint32_t)i, 1, p->scale);
  set_lag_terms(&e, x, head, (uint32_t)i, e.rows, lse, out, 1, entries, count, &t);
  add_lag_terms(&t, count, none, total);
  set_lag_terms(&e, x, head, (uint32_t)i, e.rows, x->lse[head * e.Nq + i], there, -1, entries, count, &t);
  add_lag_terms(&t, count, none, total);
  for (uint32_t n = 0; n < count; n++) changes[n] = (float)total[4 * n];
  return RA_OK;
}
