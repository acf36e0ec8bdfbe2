// SPDX-License-Identifier: MIT
//
// What all looks share; see sample.h.

#include "sample.h"
#include "pack.h"
#include "products.h"

ra_sample ra_sample_arrange(const ra_problem *p, ra_workspace_cursor *w) {
  ra_sample e = {.p = p, .Nq = p->query_length, .Nk = p->key_length, .D = p->head_dim, .Dv = p->value_dim};
  e.Dp = (e.D + 3) / 4 * 4;
  e.group = ra_group(p);
  e.q_row = ra_row(p, p->heads, e.D);
  e.k_row = ra_row(p, p->kv_heads, e.D);
  e.v_row = ra_row(p, p->kv_heads, e.Dv);
  e.out_row = ra_row(p, p->heads, e.Dv);
  e.state = ra_take(w, 1, 1, sizeof(ra_sample_state));
  e.q_space = ra_take(w, 1, ra_rotary_bytes(p), 1);
  e.k_space = ra_take(w, 1, ra_rotary_bytes(p), 1);
  e.k_mean = ra_take_floats(w, 1, e.Dp);
  e.k_rows = ra_take_floats(w, e.Nk, e.Dp);
  e.k_squares = ra_take_floats(w, 1, e.Nk);
  e.q_squares = ra_take_floats(w, e.group, e.Nq);
  e.q_mean = ra_take_floats(w, 1, e.Dp);
  e.k_shift = ra_take_floats(w, 1, e.Nk);
  e.k_gain = ra_take_floats(w, 1, e.Nk);
  e.rows = ra_take_floats(w, RA_SAMPLE_TILE, e.Dp);
  e.strip = ra_take_floats(w, e.Dp, RA_SAMPLE_KEYS);
  e.v_strip = ra_take_floats(w, e.Dv, RA_SAMPLE_KEYS);
  e.s = ra_take_floats(w, e.Nk > RA_SAMPLE_TILE ? e.Nk : RA_SAMPLE_TILE, RA_LANES);
  e.weight = ra_take_floats(w, RA_SAMPLE_TILE, RA_LANES);
  e.ds = ra_take_floats(w, RA_SAMPLE_TILE, RA_LANES);
  e.dp = ra_take_floats(w, RA_SAMPLE_TILE, RA_LANES);
  e.sum_t = ra_take_floats(w, e.Dv, RA_SAMPLE_SUMS * RA_LANES);
  e.d_t = ra_take_floats(w, e.Dp, RA_SAMPLE_SUMS * RA_LANES);
  e.scaled = ra_take_floats(w, 1, e.Dv);
  e.gram = ra_take_floats(w, (e.D + RA_LANES - 1) / RA_LANES, e.D * RA_LANES);
  if (ra_is_relative(p)) {
    e.map_space = ra_take(w, 1, ra_relative_bytes(p, 1, 1), 1);
    e.columns = ra_take_floats(w, e.Dp, RA_SAMPLE_TILE);
    e.lines = ra_take_floats(w, RA_LANES, RA_SAMPLE_TILE);
  }
  return e;
}

size_t ra_sample_workspace(const ra_problem *p) {
  if (ra_check(p) != RA_OK) return 0;
  ra_workspace_cursor w = {NULL, 0, 0};
  ra_sample_arrange(p, &w);
  return w.overflow ? RA_SIZE_OVERFLOW : w.used;
}

uint32_t ra_sample_query_outliers(const ra_sample *e, size_t kv_head, size_t h, uint32_t first) {
  uint32_t count = ra_min_u32(32, e->p->query_length - first);
  return ra_outlier_bits(ra_outlier_queries(e->p, kv_head), (uint32_t)e->group, (uint32_t)h, first, count);
}

uint32_t ra_sample_key_outliers(const ra_sample *e, size_t kv_head, uint32_t first) {
  return ra_outlier_bits(ra_outlier_keys(e->p, kv_head), 1, 0, first, ra_min_u32(32, e->p->key_length - first));
}

const float *ra_sample_query(const ra_sample *e, const float *q, size_t head, size_t i) {
  return q + ra_head(e->p, head, e->p->heads, e->Nq, e->D) + i * e->q_row;
}

void ra_sample_rotate_queries(const ra_sample *e, const float *q, size_t head, uint32_t i, uint32_t count,
                              float scale) {
  ra_rotary_rows(&e->state->q_rotary, ra_sample_query(e, q, head, i), e->q_row, e->rows, e->Dp, count, i, RA_ROTATE,
                 scale);
}

const ra_relative *ra_sample_map(const ra_sample *e) {
  if (!e->state->map_ready) ra_relative_init(&e->state->map, e->p, 1, 1, e->map_space);
  e->state->map_ready = 1;
  return &e->state->map;
}

void ra_sample_score_queries(const ra_sample *e, uint32_t i, uint32_t count, const uint32_t *keys, float *s) {
  if (!ra_is_relative(e->p)) {
    float shift[RA_LANES];
    ra_set_rows(e->rows, e->Dp, count, e->strip, RA_LANES, (uint32_t)e->D, s, RA_LANES);
    for (int m = 0; m < RA_LANES && e->state->centred; m++) shift[m] = -e->k_shift[keys[m]];
    for (uint32_t n = 0; n < count && e->state->centred; n++) ra_add(shift, RA_LANES, s + n * RA_LANES);
    return;
  }
  const ra_relative *map = ra_sample_map(e);
  ra_transpose(e->rows, e->Dp, count, e->D, e->columns, RA_SAMPLE_TILE);
  for (int m = 0; m < RA_LANES; m++)
    ra_relative_row(map, 1, e->k_rows + keys[m] * e->Dp, e->columns, RA_SAMPLE_TILE, ra_sample_diagonal(e, i, keys[m]),
                    count, e->lines + m * RA_SAMPLE_TILE);
  ra_transpose(e->lines, RA_SAMPLE_TILE, RA_LANES, count, s, RA_LANES);
}

const float *ra_sample_bias(const ra_problem *p, size_t head, uint32_t i) {
  size_t own = p->bias_heads > 1 ? head % p->heads * ((size_t)p->query_length + p->key_length - 1) : 0;
  return p->bias ? p->bias + own + i + p->key_length - 1 : NULL;
}

static ra_weigher weigher_of(const ra_problem *p, uint32_t kv_head, const float *coefficients, uint32_t degree) {
  ra_weigher w = {.polynomial = coefficients != NULL, .degree = degree, .outliers = ra_outlier_keys(p, kv_head)};
  for (uint32_t m = 0; coefficients && m <= degree; m++) {
    w.c[0][m] = coefficients[m];
    if (m > 0) w.c[1][m - 1] = (float)m * coefficients[m];
  }
  return w;
}

int ra_weighers_of(const ra_problem *p, uint32_t kv_head, const float *coefficients, uint32_t degree, uint32_t beside,
                   ra_weigher w[RA_WAYS]) {
  w[0] = weigher_of(p, kv_head, coefficients, degree);
  w[1] = weigher_of(p, kv_head, NULL, 0);
  return beside ? RA_WAYS : 1;
}
