// SPDX-License-Identifier: MIT
//
// The oracle: RoPE attention and its gradient as the formulas of rope_attention.h say it, one row at a time, plain loops,
// one float sum each. Never optimised. O(N^2 (D + Dv)) time, with a relative map O(N^2 (D + |S| + Dv)); workspace two rows of
// length Nk and rotated copies of one head. A unit is one query head.

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engines.h"

typedef struct naive_workspace {
  float *q, *k;   // [Nq][D], [Nk][D] rotated
  float *dq, *dk; // the same, gradients
  float *s, *ds;  // [Nk] one row of scores and of their gradient
  float *slope;   // [Nk] derivative of a score by the product that it came from
  float *mapped;  // [D] q W_t, or k W_t^T
} naive_workspace;

static naive_workspace arrange(const ra_problem *p, ra_workspace_cursor *w) {
  return (naive_workspace){
      .q = ra_take_floats(w, p->query_length, p->head_dim),
      .k = ra_take_floats(w, p->key_length, p->head_dim),
      .dq = ra_take_floats(w, p->query_length, p->head_dim),
      .dk = ra_take_floats(w, p->key_length, p->head_dim),
      .s = ra_take_floats(w, p->key_length, 1),
      .ds = ra_take_floats(w, p->key_length, 1),
      .slope = ra_take_floats(w, p->key_length, 1),
      .mapped = ra_take_floats(w, p->head_dim, 1),
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

// y = R x at a position, or R^T x (sign -1).
static void turn(const ra_problem *p, double position, double factor, double sign, const float *x, float *y) {
  size_t half = p->rotary_dim / 2;
  for (size_t i = 0; i < half; i++) {
    size_t first = p->interleaved ? 2 * i : i, second = p->interleaved ? 2 * i + 1 : half + i;
    double cosine, sine;
    if (p->cos_table) {
      double row = position < 0 ? 0 : position < p->table_rows ? position : p->table_rows - 1;
      cosine = p->cos_table[(size_t)row * half + i], sine = p->sin_table[(size_t)row * half + i];
    } else {
      cosine = cos(position * p->frequencies[i]), sine = sin(position * p->frequencies[i]);
    }
    float c = (float)(factor * cosine), s = (float)(sign * factor * sine);
    float x1 = x[first], x2 = x[second];
    y[first] = x1 * c - x2 * s;
    y[second] = x1 * s + x2 * c;
  }
  for (size_t d = 2 * half; d < p->head_dim; d++) y[d] = x[d];
}

// The same for the queries or keys of a batch; copies where a relative map takes the place of R.
static void rotate(const ra_problem *p, int queries, size_t batch, const float *x, size_t x_row, float *y, size_t y_row,
                   double sign) {
  size_t rows = queries ? p->query_length : p->key_length;
  const double *positions = queries ? p->query_positions : p->key_positions;
  if (positions && p->position_batches > 1) positions += batch * rows;
  for (size_t n = 0; n < rows; n++) {
    double position = positions ? positions[n] : (double)((int64_t)n + (queries ? p->query_offset : 0));
    if (ra_is_relative(p)) memcpy(y + n * y_row, x + n * x_row, sizeof(float) * p->head_dim);
    else turn(p, position, p->rotary_factor, sign, x + n * x_row, y + n * y_row);
  }
}

// What a key at distance t of query q is multiplied with, q W_t; transposed: what q is, k W_t^T. Without a relative map x.
static const float *map(const ra_problem *p, const naive_workspace *w, uint32_t i, uint32_t j, int transposed,
                        const float *x) {
  size_t diagonal = (size_t)i + p->key_length - 1 - j;
  if (!ra_is_relative(p)) return x;
  if (p->relative_positions) {
    double factor = (double)p->rotary_factor * p->rotary_factor; // of queries and of keys
    turn(p, p->relative_positions[diagonal], factor, transposed ? -1 : 1, x, w->mapped);
    return w->mapped;
  }
  memset(w->mapped, 0, sizeof(float) * p->head_dim);
  for (size_t n = 0; n < p->support_count; n++) {
    uint32_t a = p->support[2 * n], b = p->support[2 * n + 1];
    w->mapped[transposed ? a : b] += p->weights[n * ra_diagonals(p) + diagonal] * x[transposed ? b : a];
  }
  return w->mapped;
}

static float dot(const float *a, const float *b, size_t count) {
  float sum = 0;
  for (size_t n = 0; n < count; n++) sum += a[n] * b[n];
  return sum;
}

// Scores of query i, as the modifiers leave them; slope[j] = ds_ij / d(scale q.k).
static void scores(const ra_problem *p, const naive_workspace *w, size_t head, uint32_t i, ra_range keys, float *s,
                   float *slope) {
  const float *q_i = w->q + (size_t)i * p->head_dim;
  size_t batch = head / p->heads, h = head % p->heads;
  for (uint32_t j = keys.first; j < keys.end; j++) {
    size_t at = batch * p->mask_batch + h * p->mask_head + i * p->mask_row + j;
    s[j] = p->scale * dot(map(p, w, i, j, 0, q_i), w->k + (size_t)j * p->head_dim, p->head_dim);
    slope[j] = 1;
    if (p->softcap > 0) {
      float t = tanhf(s[j] / p->softcap);
      s[j] = p->softcap * t, slope[j] = 1 - t * t;
    }
    if (p->bias) s[j] += p->bias[(p->bias_heads > 1 ? h : 0) * ra_diagonals(p) + i + p->key_length - 1 - j];
    if (p->alibi) s[j] -= (float)ra_alibi(p, h, (size_t)i + p->key_length - 1 - j);
    if (p->mask) s[j] = p->mask[at] < -3.4657e29f ? -INFINITY : s[j] + p->mask[at];
    if (p->allowed && !p->allowed[at]) s[j] = -INFINITY;
  }
}

static void forward_head(const ra_problem *p, const naive_workspace *w, size_t head, const float *v, size_t v_row,
                         float *out, size_t out_row, float *lse) {
  size_t Dv = p->value_dim;
  for (uint32_t i = 0; i < p->query_length; i++) {
    float *out_i = out + i * out_row, sum = 0, max = p->sinks ? p->sinks[head % p->heads] : -INFINITY;
    ra_range keys = ra_keys_of(p, i);
    for (size_t d = 0; d < Dv; d++) out_i[d] = 0;

    // pass 1: scores and their maximum
    scores(p, w, head, i, keys, w->s, w->ds);
    for (uint32_t j = keys.first; j < keys.end; j++)
      if (!(w->s[j] <= max)) max = w->s[j];
    lse[i] = -INFINITY;
    if (max == -INFINITY) continue;

    // pass 2: weights, their sum, the weighted values
    if (p->sinks) sum = expf(p->sinks[head % p->heads] - max);
    for (uint32_t j = keys.first; j < keys.end; j++) {
      float weight = expf(w->s[j] - max);
      if (weight == 0) continue; // not allowed: whatever the value is, it does not count
      sum += weight;
      for (size_t d = 0; d < Dv; d++) out_i[d] += weight * v[j * v_row + d];
    }
    for (size_t d = 0; d < Dv; d++) out_i[d] /= sum;
    lse[i] = max + logf(sum);
  }
}

static void backward_head(const ra_problem *p, const naive_workspace *w, size_t head, const ra_arrays *x,
                          const float *v, size_t v_row, const float *out, size_t out_row, const float *lse,
                          const float *dout, float *dv) {
  size_t D = p->head_dim, Dv = p->value_dim, h = head % p->heads;
  float *dbias = x->dbias ? x->dbias + (p->bias_heads > 1 ? h : 0) * ra_diagonals(p) : NULL;
  double dslope = 0; // of all pairs, times distances: a float sum would be the largest error of a comparison
  memset(w->dq, 0, sizeof(float) * p->query_length * D);
  memset(w->dk, 0, sizeof(float) * p->key_length * D);
  for (uint32_t i = 0; i < p->query_length; i++) {
    const float *dout_i = dout + i * out_row;
    ra_range keys = ra_keys_of(p, i);
    if (lse[i] == -INFINITY) continue;
    float delta = dot(dout_i, out + i * out_row, Dv);
    if (p->sinks && x->dsinks) x->dsinks[h] -= expf(p->sinks[h] - lse[i]) * delta;

    // undoes pass 1: in the forward pass this was s = scale q.k, then softcap and bias
    scores(p, w, head, i, keys, w->s, w->slope);
    for (uint32_t j = keys.first; j < keys.end; j++) {
      float weight = expf(w->s[j] - lse[i]), ds = 0;
      if (weight != 0) {
        ds = weight * (dot(dout_i, v + j * v_row, Dv) - delta);
        // undoes pass 2: in the forward pass this was out_i += P_ij v_j
        for (size_t d = 0; d < Dv; d++) dv[j * v_row + d] += weight * dout_i[d];
      }
      if (dbias) dbias[i + p->key_length - 1 - j] += ds;
      dslope -= ds * (double)llabs((int64_t)i + p->query_offset - j);
      w->ds[j] = p->scale * ds * w->slope[j];
    }
    for (uint32_t j = keys.first; j < keys.end; j++) {
      const float *q_i = w->q + i * D, *k_j = w->k + j * D;
      const float *k_mapped = map(p, w, i, j, 1, k_j);
      for (size_t d = 0; d < D; d++) w->dq[i * D + d] += w->ds[j] * k_mapped[d];
      const float *q_mapped = map(p, w, i, j, 0, q_i);
      for (size_t d = 0; d < D; d++) w->dk[j * D + d] += w->ds[j] * q_mapped[d];
      for (size_t n = 0; x->dweights && n < p->support_count; n++)
        x->dweights[n * ra_diagonals(p) + i + p->key_length - 1 - j] +=
            w->ds[j] * q_i[p->support[2 * n]] * k_j[p->support[2 * n + 1]];
    }
  }
  if (x->dalibi) x->dalibi[h] += (float)dslope;
}

static int run(const ra_problem *p, const ra_arrays *x, uint32_t pass, void *workspace, uint32_t first, uint32_t last) {
  ra_workspace_cursor cursor = {workspace, 0, 0};
  naive_workspace w = arrange(p, &cursor);
  size_t Nq = p->query_length, Nk = p->key_length, D = p->head_dim, Dv = p->value_dim, group = ra_group(p);
  size_t q_row = ra_row(p, p->heads, D), k_row = ra_row(p, p->kv_heads, D);
  size_t out_row = ra_row(p, p->heads, Dv), v_row = ra_row(p, p->kv_heads, Dv);
  if (first == 0 && pass == RA_BACKWARD) {
    if (x->dbias) memset(x->dbias, 0, sizeof(float) * p->bias_heads * ra_diagonals(p));
    if (x->dweights) memset(x->dweights, 0, sizeof(float) * p->support_count * ra_diagonals(p));
    if (x->dalibi) memset(x->dalibi, 0, sizeof(float) * p->heads);
    if (x->dsinks) memset(x->dsinks, 0, sizeof(float) * p->heads);
  }
  for (size_t head = first; head < last; head++) {
    size_t kv = head / group, batch = head / p->heads; // group divides heads, so kv counts batches too
    size_t q_head = ra_head(p, head, p->heads, Nq, D), out_head = ra_head(p, head, p->heads, Nq, Dv);
    size_t k_head = ra_head(p, kv, p->kv_heads, Nk, D), v_head = ra_head(p, kv, p->kv_heads, Nk, Dv);
    rotate(p, 1, batch, x->q + q_head, q_row, w.q, D, 1);
    rotate(p, 0, batch, x->k + k_head, k_row, w.k, D, 1);
    if (pass == RA_FORWARD) {
      forward_head(p, &w, head, x->v + v_head, v_row, x->out + out_head, out_row, x->lse + head * Nq);
      continue;
    }
    float *dk = x->dk + k_head, *dv = x->dv + v_head;
    for (size_t j = 0; j < Nk && head % group == 0; j++) {
      memset(dk + j * k_row, 0, sizeof(float) * D);
      memset(dv + j * v_row, 0, sizeof(float) * Dv);
    }
    backward_head(p, &w, head, x, x->v + v_head, v_row, x->out + out_head, out_row, x->lse + head * Nq,
                  x->dout + out_head, dv);
    rotate(p, 1, batch, w.dq, D, x->dq + q_head, q_row, -1);
    rotate(p, 0, batch, w.dk, D, w.k, D, -1);
    for (size_t j = 0; j < Nk; j++)
      for (size_t d = 0; d < D; d++) dk[j * k_row + d] += w.k[j * D + d];
  }
  return RA_OK;
}

const ra_engine ra_naive_engine = {layout, units, run};
