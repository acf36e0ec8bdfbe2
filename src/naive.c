// SPDX-License-Identifier: MIT
//
// The oracle: RoPE attention and its gradient as the formulas of rope_attention.h say it, one row at a time, plain loops,
// one float sum each. Never optimised. O(N^2 (D + Dv)) time; workspace two rows of length Nk and rotated copies of one head.
// A unit is one query head.

#include <math.h>
#include <string.h>

#include "engines.h"

typedef struct naive_workspace {
  float *q, *k;   // [Nq][D], [Nk][D] rotated
  float *dq, *dk; // the same, gradients
  float *s, *ds;  // [Nk] one row of scores and of their gradient
} naive_workspace;

static naive_workspace arrange(const ra_problem *p, ra_workspace_cursor *w) {
  return (naive_workspace){
      .q = ra_take_floats(w, p->query_length, p->head_dim),
      .k = ra_take_floats(w, p->key_length, p->head_dim),
      .dq = ra_take_floats(w, p->query_length, p->head_dim),
      .dk = ra_take_floats(w, p->key_length, p->head_dim),
      .s = ra_take_floats(w, p->key_length, 1),
      .ds = ra_take_floats(w, p->key_length, 1),
  };
}

static void layout(const ra_problem *p, uint32_t pass, ra_workspace_cursor *w) {
  (void)pass;
  arrange(p, w);
}

static uint32_t units(const ra_problem *p, uint32_t pass) {
  (void)pass;
  return p->batch * p->heads;
}

// y = R^(+-1) x, rows at position, position + 1, ...
static void rotate(const ra_problem *p, const float *x, float *y, size_t rows, int64_t position, double sign) {
  size_t D = p->head_dim, half = p->rotary_dim / 2;
  for (size_t n = 0; n < rows; n++) {
    const float *x_n = x + n * D;
    float *y_n = y + n * D;
    for (size_t i = 0; i < half; i++) {
      size_t first = p->interleaved ? 2 * i : i, second = p->interleaved ? 2 * i + 1 : half + i;
      double angle = (double)(position + (int64_t)n) * p->frequencies[i];
      float c = (float)cos(angle), s = (float)(sign * sin(angle));
      float x1 = x_n[first], x2 = x_n[second];
      y_n[first] = x1 * c - x2 * s;
      y_n[second] = x1 * s + x2 * c;
    }
    for (size_t d = 2 * half; d < D; d++) y_n[d] = x_n[d];
  }
}

static float dot(const float *a, const float *b, size_t count) {
  float sum = 0;
  for (size_t n = 0; n < count; n++) sum += a[n] * b[n];
  return sum;
}

static void scores(const ra_problem *p, const float *q_i, const float *k, size_t limit, float *s) {
  for (size_t j = 0; j < limit; j++) s[j] = p->scale * dot(q_i, k + j * p->head_dim, p->head_dim);
}

static void forward_head(const ra_problem *p, const naive_workspace *w, const float *v, float *out, float *lse) {
  size_t D = p->head_dim, Dv = p->value_dim;
  for (uint32_t i = 0; i < p->query_length; i++) {
    float *out_i = out + i * Dv, max = -INFINITY, sum = 0;
    size_t limit = ra_key_limit(p, i);
    for (size_t d = 0; d < Dv; d++) out_i[d] = 0;
    lse[i] = -INFINITY;
    if (limit == 0) continue;

    // pass 1: scores and their maximum
    scores(p, w->q + i * D, w->k, limit, w->s);
    for (size_t j = 0; j < limit; j++)
      if (w->s[j] > max) max = w->s[j];

    // pass 2: weights, their sum, the weighted values
    for (size_t j = 0; j < limit; j++) {
      float weight = expf(w->s[j] - max);
      sum += weight;
      for (size_t d = 0; d < Dv; d++) out_i[d] += weight * v[j * Dv + d];
    }
    for (size_t d = 0; d < Dv; d++) out_i[d] /= sum;
    lse[i] = max + logf(sum);
  }
}

static void backward_head(const ra_problem *p, const naive_workspace *w, const float *v, const float *out,
                          const float *lse, const float *dout, float *dv) {
  size_t D = p->head_dim, Dv = p->value_dim;
  memset(w->dq, 0, sizeof(float) * p->query_length * D);
  memset(w->dk, 0, sizeof(float) * p->key_length * D);
  for (uint32_t i = 0; i < p->query_length; i++) {
    const float *dout_i = dout + i * Dv;
    size_t limit = ra_key_limit(p, i);
    if (limit == 0) continue;
    float delta = dot(dout_i, out + i * Dv, Dv);

    // undoes pass 1: in the forward pass this was s = scale q.k
    scores(p, w->q + i * D, w->k, limit, w->s);
    for (size_t j = 0; j < limit; j++) {
      float weight = expf(w->s[j] - lse[i]);
      w->ds[j] = p->scale * weight * (dot(dout_i, v + j * Dv, Dv) - delta);
      // undoes pass 2: in the forward pass this was out_i += P_ij v_j
      for (size_t d = 0; d < Dv; d++) dv[j * Dv + d] += weight * dout_i[d];
    }
    for (size_t j = 0; j < limit; j++) {
      for (size_t d = 0; d < D; d++) {
        w->dq[i * D + d] += w->ds[j] * w->k[j * D + d];
        w->dk[j * D + d] += w->ds[j] * w->q[i * D + d];
      }
    }
  }
}

static int run(const ra_problem *p, const ra_arrays *x, uint32_t pass, void *workspace, uint32_t first, uint32_t last) {
  ra_workspace_cursor cursor = {workspace, 0, 0};
  naive_workspace w = arrange(p, &cursor);
  size_t Nq = p->query_length, Nk = p->key_length, D = p->head_dim, Dv = p->value_dim, group = ra_group(p);
  for (size_t head = first; head < last; head++) {
    size_t kv = head / group; // group divides heads, so this counts batches too
    const float *v = x->v + kv * Nk * Dv;
    rotate(p, x->q + head * Nq * D, w.q, Nq, p->query_offset, 1);
    rotate(p, x->k + kv * Nk * D, w.k, Nk, 0, 1);
    if (pass == RA_FORWARD) {
      forward_head(p, &w, v, x->out + head * Nq * Dv, x->lse + head * Nq);
      continue;
    }
    float *dk = x->dk + kv * Nk * D, *dv = x->dv + kv * Nk * Dv;
    if (head % group == 0) {
      memset(dk, 0, sizeof(float) * Nk * D);
      memset(dv, 0, sizeof(float) * Nk * Dv);
    }
    backward_head(p, &w, v, x->out + head * Nq * Dv, x->lse + head * Nq, x->dout + head * Nq * Dv, dv);
    rotate(p, w.dq, x->dq + head * Nq * D, Nq, p->query_offset, -1);
    rotate(p, w.dk, w.k, Nk, 0, -1);
    for (size_t n = 0; n < Nk * D; n++) dk[n] += w.k[n];
  }
  return RA_OK;
}

const ra_engine ra_naive_engine = {layout, units, run};
