// SPDX-License-Identifier: MIT
//
// Some rows of the output, its lse and dq: exact, and as a polynomial would have them. See sample.h.

#include <float.h>
#include <math.h>
#include <string.h>

#include "elementary.h"
#include "pack.h"
#include "products.h"
#include "sample.h"
#include "softmax.h"

enum { SMALL = 40 }; // exp of scores as large, 2^22 of them, and times values up to 2^40, still fits a float

// Eight queries: where they are, what they see, and x = scale R q as lanes. Lanes past `count` repeat the last one.
typedef struct lanes {
  uint32_t i[RA_LANES];
  ra_range keys[RA_LANES];
  ra_range state[RA_LANES];    // keys that the polynomial engine takes through its state, but outliers
  size_t head[RA_LANES];       // flat head in [B][H]
  const float *bias[RA_LANES]; // entry of key 0, those of the others before it; NULL without bias
  uint32_t count, end;         // different ones; of all their keys
  int sloped;                  // there are slopes:
  float slope[RA_LANES];       // adds slope (near - |position - j|), near being the least |position - j|
  float near[RA_LANES];
  int64_t position[RA_LANES];
} lanes;

// From a position to the nearest of these keys.
static int64_t distance_to(int64_t position, ra_range keys) {
  if (position < keys.first) return keys.first - position;
  return position < keys.end ? 0 : position - keys.end + 1;
}

static lanes load_lanes(const ra_sample *e, const ra_arrays *x, uint32_t kv_head, const uint32_t *rows,
                        uint32_t count) {
  lanes l = {.count = count, .end = 0, .sloped = e->p->alibi != NULL};
  for (uint32_t n = 0; n < RA_LANES; n++) {
    uint32_t row = rows[n < count ? n : count - 1];
    l.i[n] = row % e->p->query_length;
    l.head[n] = kv_head * e->group + row / e->p->query_length;
    l.keys[n] = ra_keys_of(e->p, l.i[n]);
    l.bias[n] = ra_sample_bias(e->p, l.head[n], l.i[n]);
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
  for (uint32_t n = count; n < RA_LANES; n++)
    memcpy(e->rows + n * e->Dp, e->rows + (n - 1) * e->Dp, e->D * sizeof(float));
  ra_transpose(e->rows, e->Dp, RA_LANES, e->D, e->strip, RA_LANES);
  return l;
}

// s[n][8] of the lanes against keys j .. j + count - 1.
static void score_keys(const ra_sample *e, const lanes *l, uint32_t j, uint32_t count, float *s) {
  const float *k = e->k_rows + (size_t)j * e->Dp;
  if (!ra_is_relative(e->p)) {
    ra_set_rows(k, e->Dp, count, e->strip, RA_LANES, (uint32_t)e->D, s, RA_LANES);
    for (uint32_t n = 0; n < count * RA_LANES && e->state->centred; n += 4)
      f32x4_store(s + n, f32x4_sub(f32x4_load(s + n), f32x4_load_splat(e->k_shift + j + n / RA_LANES)));
    return;
  }
  const ra_relative *map = ra_sample_map(e);
  ra_transpose(k, e->Dp, count, e->D, e->columns, RA_SAMPLE_TILE);
  for (uint32_t n = 0; n < RA_LANES; n++) {
    float *line = e->lines + n * RA_SAMPLE_TILE;
    if (n < l->count)
      ra_relative_row(map, 0, e->rows + n * e->Dp, e->columns, RA_SAMPLE_TILE, ra_sample_diagonal(e, l->i[n], j), count,
                      line);
    else memcpy(line, line - RA_SAMPLE_TILE, count * sizeof(float));
  }
  ra_transpose(e->lines, RA_SAMPLE_TILE, RA_LANES, count, s, RA_LANES);
}

// Of those scores the gradient by the queries, d_t [D][8] += sum_n ds[n][8] k_n.
static void add_query_gradients(const ra_sample *e, const lanes *l, uint32_t j, uint32_t count, const float *ds) {
  const float *k = e->k_rows + (size_t)j * e->Dp;
  if (!ra_is_relative(e->p)) {
    ra_add_columns(k, e->Dp, (uint32_t)e->D, ds, RA_LANES, count, e->d_t, RA_LANES);
    return;
  }
  ra_transpose(k, e->Dp, count, e->D, e->columns, RA_SAMPLE_TILE);
  ra_transpose(ds, RA_LANES, count, RA_LANES, e->lines, RA_SAMPLE_TILE);
  for (uint32_t n = 0; n < l->count; n++)
    ra_relative_row_gradient(ra_sample_map(e), 0, e->lines + n * RA_SAMPLE_TILE, e->columns, RA_SAMPLE_TILE,
                             ra_sample_diagonal(e, l->i[n], j), count, e->d_t + n, RA_LANES);
}

// The first tile at key j or behind it, both multiples of RA_SAMPLE_TILE, that some lane sees a key of; at least l->end
// when there is none.
static uint32_t next_tile(const lanes *l, uint32_t j) {
  uint32_t next = UINT32_MAX;
  for (int i = 0; i < RA_LANES; i++)
    if (l->keys[i].first < l->keys[i].end && l->keys[i].end > j)
      next = ra_min_u32(next, l->keys[i].first > j ? l->keys[i].first / RA_SAMPLE_TILE * RA_SAMPLE_TILE : j);
  return next;
}

uint32_t ra_sample_scores(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, const uint32_t *rows,
                          uint32_t count, uint32_t stride, float *scores, void *workspace) {
  if (ra_check(p) != RA_OK || count == 0 || count > RA_LANES || stride == 0) return 0;
  ra_workspace_cursor cursor = {workspace, 0, 0};
  ra_sample e = ra_sample_arrange(p, &cursor);
  lanes l = load_lanes(&e, x, kv_head, rows, count);
  uint32_t written = 0;
  for (uint64_t j = 0; j < l.end; j += stride) {
    float s[RA_LANES];
    uint64_t tile = next_tile(&l, (uint32_t)j / RA_SAMPLE_TILE * RA_SAMPLE_TILE);
    if (tile > j) j = (tile + stride - 1) / stride * stride;
    if (j >= l.end) break;
    if (ra_outlier_bits(ra_outlier_keys(p, kv_head), 1, 0, (uint32_t)j, 1)) continue;
    score_keys(&e, &l, (uint32_t)j, 1, s);
    for (uint32_t n = 0; n < count; n++)
      if (l.keys[n].first <= j && j < l.keys[n].end) scores[written++] = s[n];
  }
  return written;
}

// What the scores of a tile that begins at key j0 have added to them: of slopes less than what the nearest key has, so
// that it is 0 or less where a key is seen. Differences of positions are exact as floats up to 2^24, and weigh nothing
// from there on.
typedef struct added {
  const lanes *l;
  uint32_t j0;
  float position[RA_LANES]; // less j0
} added;

static added added_from(const lanes *l, uint32_t j0) {
  added a = {.l = l, .j0 = j0};
  for (int i = 0; l->sloped && i < RA_LANES; i++) a.position[i] = (float)(l->position[i] - j0);
  return a;
}

// Of key number n, lanes h .. h + 3.
RA_INLINE f32x4 added_to(const added *a, int h, uint32_t n) {
  const lanes *l = a->l;
  f32x4 sum = f32x4_splat(0);
  if (l->sloped) {
    f32x4 ahead = f32x4_sub(f32x4_load(a->position + h), f32x4_splat((float)n));
    sum = f32x4_mul(f32x4_load(l->slope + h), f32x4_sub(f32x4_load(l->near + h), f32x4_abs(ahead)));
  }
  if (!l->bias[0]) return sum;
  float bias[4];
  for (int i = 0; i < 4; i++) bias[i] = *(l->bias[h + i] - a->j0 - n);
  return f32x4_add(sum, f32x4_load(bias));
}

enum { MIXED, BY_EXP, BY_POLYNOMIAL };

// Of a tile the keys that each lane sees, first .. end - 1, and among these those of its state, from .. to - 1.
typedef struct spans {
  float first[RA_LANES], end[RA_LANES], from[RA_LANES], to[RA_LANES];
} spans;

// Those of keys j0 .. j0 + count - 1, and how these, but outliers, are weighed by all lanes that see any: by exp, by the
// polynomial, or as it comes.
static int weighed_how(const lanes *l, const ra_weigher *w, uint32_t j0, uint32_t count, spans *t) {
  int by_exp = 0, by_polynomial = 0, mixed = 0;
  for (int i = 0; i < RA_LANES; i++) {
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

// exp(s + b - reference), from 2^128 on infinity.
RA_INLINE f32x4 exp_of(const ra_weigher *w, int h, f32x4 s, f32x4 b) {
  f32x4 x = f32x4_sub(f32x4_add(s, b), f32x4_load(w->reference + h));
  x = f32x4_mul(x, f32x4_splat((float)RA_LOG2_E));
  return ra_exp2(f32x4_min(f32x4_splat(128), x), ra_exp2_load());
}

// exp(b - reference), at most 1, for what the polynomial gives.
RA_INLINE f32x4 factor_of(const ra_weigher *w, int h, f32x4 b) {
  f32x4 x = f32x4_min(f32x4_splat(0), f32x4_sub(b, f32x4_load(w->reference + h)));
  return ra_exp2(f32x4_mul(x, f32x4_splat((float)RA_LOG2_E)), ra_exp2_load());
}

// Of keys first .. end - 1, with something added to their scores, or not.
RA_INLINE void by_exp(const lanes *l, const ra_weigher *w, const spans *t, const float *s, const added *a,
                      uint32_t first, uint32_t end, float *weight) {
  f32x4 zero = f32x4_splat(0);
  for (int h = 0; h < (int)l->count; h += 4) {
    f32x4 key = f32x4_splat((float)first);
    RA_ROLLED
    for (uint32_t n = first; n < end; n++, key = f32x4_add(key, f32x4_splat(1))) {
      f32x4 x = exp_of(w, h, f32x4_load(s + n * RA_LANES + h), a ? added_to(a, h, n) : zero);
      f32x4_store(weight + n * RA_LANES + h, where_seen(key, t->first + h, t->end + h, x, zero));
    }
  }
}

RA_KERNEL void weigh_by_exp(const lanes *l, const ra_weigher *w, const spans *t, const float *s, const added *a,
                            uint32_t first, uint32_t end, float *weight) {
  if (a) by_exp(l, w, t, s, a, first, end, weight);
  else by_exp(l, w, t, s, NULL, first, end, weight);
}

// Likewise of all keys.
RA_INLINE void by_polynomial(const lanes *l, const ra_weigher *w, const spans *t, const float *s, const added *a,
                             uint32_t count, int derivative, float *weight) {
  f32x4 zero = f32x4_splat(0);
  for (int h = 0; h < (int)l->count; h += 4) {
    f32x4 key = zero, factor = factor_of(w, h, zero);
    for (uint32_t n = 0; n < count; n++, key = f32x4_add(key, f32x4_splat(1))) {
      if (a) factor = factor_of(w, h, added_to(a, h, n));
      f32x4 x = f32x4_mul(ra_weigher_polynomial(w, derivative, f32x4_load(s + n * RA_LANES + h)), factor);
      f32x4_store(weight + n * RA_LANES + h, where_seen(key, t->first + h, t->end + h, x, zero));
    }
  }
}

RA_KERNEL void weigh_by_polynomial(const lanes *l, const ra_weigher *w, const spans *t, const float *s, const added *a,
                                   uint32_t count, int derivative, float *weight) {
  if (a) by_polynomial(l, w, t, s, a, count, derivative, weight);
  else by_polynomial(l, w, t, s, NULL, count, derivative, weight);
}

// weight[n][8] of keys j0 .. j0 + count - 1 (derivative: of the weight by the score), of the different lanes at least;
// 0 where not allowed. May be s.
static void weigh(const lanes *l, const ra_weigher *w, const float *s, uint32_t j0, uint32_t count, int derivative,
                  float *weight) {
  f32x4 zero = f32x4_splat(0);
  spans t;
  int how = weighed_how(l, w, j0, count, &t);
  added extra = added_from(l, j0);
  const added *a = l->bias[0] || l->sloped ? &extra : NULL;
  if (how == BY_EXP) weigh_by_exp(l, w, &t, s, a, 0, count, weight);
  if (how == BY_POLYNOMIAL) {
    weigh_by_polynomial(l, w, &t, s, a, count, derivative, weight);
    ra_outliers exact = ra_outliers_within(w->outliers, j0, j0 + count);
    for (uint32_t m = 0; m < exact.count; m++)
      weigh_by_exp(l, w, &t, s, a, exact.rows[m] - j0, exact.rows[m] - j0 + 1, weight);
  }
  if (how != MIXED) return;
  for (uint32_t n = 0, outliers = 0; n < count; n++, outliers >>= 1) {
    if (n % 32 == 0) outliers = ra_outlier_bits(w->outliers, 1, 0, j0 + n, ra_min_u32(32, count - n));
    for (int h = 0; h < (int)l->count; h += 4) {
      f32x4 key = f32x4_splat((float)n), s_n = f32x4_load(s + n * RA_LANES + h);
      f32x4 b = added_to(&extra, h, n), value = exp_of(w, h, s_n, b);
      if (!(outliers & 1)) {
        f32x4 polynomial = f32x4_mul(ra_weigher_polynomial(w, derivative, s_n), factor_of(w, h, b));
        value = where_seen(key, t.from + h, t.to + h, polynomial, value);
      }
      f32x4_store(weight + n * RA_LANES + h, where_seen(key, t.first + h, t.end + h, value, zero));
    }
  }
}

// The same of all keys, those that the mean query weighs included.
static void weigh_keys(const ra_sample *e, const lanes *l, const ra_weigher *w, const float *s, uint32_t j0,
                       uint32_t count, int derivative, float *weight) {
  weigh(l, w, s, j0, count, derivative, weight);
  for (uint32_t n = 0; n < count * RA_LANES && e->state->centred; n += 4)
    f32x4_store(weight + n, f32x4_mul(f32x4_load(weight + n), f32x4_load_splat(e->k_gain + j0 + n / RA_LANES)));
}

// What the largest scores of a tile, bias included, are: most[8] of keys that exp weighs; top[8] of the bias, or 0, of
// the others.
static void look_at_scores(const lanes *l, const ra_weigher *w, const float *s, uint32_t j0, uint32_t count,
                           float *most, float *top) {
  spans t;
  f32x4 none = f32x4_splat(-FLT_MAX);
  int how = weighed_how(l, w, j0, count, &t), plain = !l->bias[0] && !l->sloped;
  added extra = added_from(l, j0);
  for (int h = 0; !(plain && how == BY_POLYNOMIAL) && h < (int)l->count; h += 4) {
    f32x4 x = f32x4_load(most + h), y = f32x4_load(top + h);
    for (uint32_t n = 0, outliers = 0; n < count; n++, outliers >>= 1) {
      if (!plain && n % 32 == 0) outliers = ra_outlier_bits(w->outliers, 1, 0, j0 + n, ra_min_u32(32, count - n));
      f32x4 key = f32x4_splat((float)n), s_n = f32x4_load(s + n * RA_LANES + h);
      if (!plain) {
        f32x4 b = added_to(&extra, h, n),
              in_state = outliers & 1 ? none : where_seen(key, t.from + h, t.to + h, b, none);
        s_n = f32x4_add(s_n, b);
        y = f32x4_max(where_seen(key, t.first + h, t.end + h, in_state, none), y);
      }
      if (how != BY_EXP && !(outliers & 1)) s_n = where_seen(key, t.from + h, t.to + h, none, s_n);
      x = f32x4_max(where_seen(key, t.first + h, t.end + h, s_n, none), x);
    }
    f32x4_store(most + h, x), f32x4_store(top + h, y);
  }
  ra_outliers exact = ra_outliers_within(w->outliers, j0, j0 + count);
  for (int i = 0; plain && i < (int)l->count; i++) {
    if (t.from[i] < t.to[i] && top[i] < 0) top[i] = 0;
    for (uint32_t m = 0; w->polynomial && m < exact.count; m++) {
      uint32_t n = exact.rows[m] - j0;
      if (t.first[i] <= (float)n && (float)n < t.end[i] && s[n * RA_LANES + i] > most[i]) most[i] = s[n * RA_LANES + i];
    }
  }
}

// Whether scores are small enough, in all lanes and whatever the key, to be measured by 0; slopes take nothing off the
// nearest key.
static int are_small(const ra_sample *e, const lanes *l) {
  if (l->bias[0] || ra_is_relative(e->p)) return 0;
  float most[RA_LANES];
  for (int h = 0; h < RA_LANES; h += 4) {
    f32x4 squares = f32x4_splat(0);
    for (size_t d = 0; d < e->D; d++) {
      f32x4 x = f32x4_load(e->strip + d * RA_LANES + h);
      squares = f32x4_madd(x, x, squares);
    }
    f32x4_store(most + h, squares);
  }
  for (int i = 0; i < RA_LANES; i++)
    if (!(sqrtf(most[i]) * e->state->reach < SMALL)) return 0;
  return 1;
}

// Scores of all tiles, and what to measure them by in each way: the largest that exp weighs; where a polynomial is
// beside it and that is not large the largest bias, or 0.
static void score_all(const ra_sample *e, const lanes *l, ra_weigher *w, int ways) {
  float most[RA_WAYS][RA_LANES], top[RA_WAYS][RA_LANES];
  ra_fill(most[0], RA_WAYS * RA_LANES, -FLT_MAX), ra_fill(top[0], RA_WAYS * RA_LANES, -FLT_MAX);
  for (uint32_t j = next_tile(l, 0); j < l->end; j = next_tile(l, j + RA_SAMPLE_TILE)) {
    uint32_t keys = ra_min_u32(RA_SAMPLE_TILE, l->end - j);
    float *s = e->s + (size_t)j * RA_LANES;
    score_keys(e, l, j, keys, s);
    for (int n = 0; n < ways; n++) look_at_scores(l, w + n, s, j, keys, most[n], top[n]);
  }
  for (int n = 0; n < ways; n++, w++)
    for (int i = 0; i < RA_LANES; i++) {
      if (most[n][i] < top[n][i] + 20) most[n][i] = top[n][i];
      w->seen[i] = most[n][i] > RA_FORBIDDEN / (float)RA_LOG2_E;
      w->reference[i] = w->seen[i] ? most[n][i] : 0;
    }
}

// sum[8] += the weights of a tile
static void add_weights(const float *weight, uint32_t count, double *sum) {
  float tile[RA_LANES];
  f32x4 t0 = f32x4_splat(0), t1 = t0;
  for (uint32_t n = 0; n < count; n++, weight += RA_LANES)
    t0 = f32x4_add(t0, f32x4_load(weight)), t1 = f32x4_add(t1, f32x4_load(weight + 4));
  f32x4_store(tile, t0), f32x4_store(tile + 4, t1);
  for (int i = 0; i < RA_LANES; i++) sum[i] += tile[i];
}

// The larger of `most` and |x|; NaN counts as infinity.
static float larger(float most, float x) { return fabsf(x) > most ? fabsf(x) : x == x ? most : INFINITY; }

// How far rows are from x->out and x->lse.
static void add_distance(const ra_sample *e, const ra_arrays *x, const lanes *l, const float *out, const float *lse,
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

// How far gradients by x->out and x->lse are from those of rows, in d_t, whose out.dout is delta: with r = exp(lse -
// lse there), dS by these is r P (dP - delta there), and so dq is r (dq + (delta - delta there) mean), mean being that
// of the keys by the derivatives of weights, in the last d_t; with exp the mean key as well, which has no part in dq
// itself.
static void add_gradient_distance(const ra_sample *e, const ra_arrays *x, const lanes *l, int by_exp, const float *lse,
                                  const float *delta, const float *inverse, ra_distance *distance) {
  const float *means = e->d_t + RA_WAYS * e->Dp * RA_LANES;
  double difference = (double)distance->dq * distance->dq, size = (double)distance->dq_size * distance->dq_size;
  for (uint32_t n = 0; n < l->count; n++) {
    size_t row = ra_head(e->p, l->head[n], e->p->heads, e->Nq, e->Dv) + l->i[n] * e->out_row;
    double lse_there = x->lse[l->head[n] * e->Nq + l->i[n]], delta_there = 0;
    if (lse[n] == -INFINITY && lse_there == lse[n]) continue; // nothing is seen
    for (size_t d = 0; d < e->Dv; d++) delta_there += (double)x->dout[row + d] * x->out[row + d];
    double ratio = ra_exp_f64(lse[n] - lse_there);
    for (size_t d = 0; d < e->D; d++) {
      double dq = e->d_t[d * RA_LANES + n],
             mean = means[d * RA_LANES + n] * (double)inverse[n] + (by_exp ? e->k_mean[d] : 0);
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
static int finish_rows(const ra_sample *e, const lanes *l, const ra_weigher *w, const double *sum, row_results to,
                       float *inverse) {
  int status = RA_OK;
  for (uint32_t n = 0; n < l->count; n++) {
    double shift = 0, reciprocal = sum[n] > 0 ? 1 / sum[n] : 0;
    if (w->polynomial && w->seen[n] && !(sum[n] > 0 && sum[n] <= (double)FLT_MAX)) status = RA_NOT_POSITIVE;
    for (size_t d = 0; d < e->D; d++) shift += (double)e->rows[n * e->Dp + d] * e->k_mean[d];
    shift -= l->slope[n] * (double)l->near[n];
    inverse[n] = (float)reciprocal;
    to.lse[n] = sum[n] > 0 ? (float)(ra_log_f64(sum[n]) + w->reference[n] + shift) : -INFINITY;
    for (size_t d = 0; d < e->Dv; d++) to.out[n * e->Dv + d] = (float)(e->sum_t[d * RA_LANES + n] * reciprocal);
  }
  return status;
}

// Up to eight rows in one or two ways; distance is that of the first.
static int sample_lanes(const ra_sample *e, const ra_arrays *x, uint32_t kv_head, const uint32_t *rows, uint32_t count,
                        ra_weigher *w, int ways, const row_results *to, ra_distance *distance) {
  const ra_problem *p = e->p;
  lanes l = load_lanes(e, x, kv_head, rows, count);
  const float *v = x->v + ra_head(p, kv_head, p->kv_heads, e->Nk, e->Dv);
  double sum[RA_WAYS][RA_LANES] = {{0}};
  float delta[RA_WAYS][RA_LANES] = {{0}}, inverse[RA_WAYS][RA_LANES] = {{0}};
  ra_sample own[RA_WAYS + 1]; // sums apart; the last one's are of what distances need
  for (size_t n = 0; n <= RA_WAYS; n++)
    own[n] = *e, own[n].sum_t += n * e->Dv * RA_LANES, own[n].d_t += n * e->Dp * RA_LANES;

  // pass 1: scores; small ones come with pass 2
  int small = are_small(e, &l), in_place = ways == 1 && !w->polynomial; // weights, in the place of scores
  for (int n = 0; n < ways && small; n++)
    for (int i = 0; i < RA_LANES; i++) w[n].reference[i] = 0, w[n].seen[i] = l.keys[i].first < l.keys[i].end;
  if (!small) score_all(e, &l, w, ways);

  // pass 2: weights, their sums, weighted values; exp being its own derivative, pass 3 finds its weights in the place of scores
  ra_fill(e->sum_t, RA_WAYS * e->Dv * RA_LANES, 0);
  for (uint32_t j = next_tile(&l, 0); j < l.end; j = next_tile(&l, j + RA_SAMPLE_TILE)) {
    uint32_t keys = ra_min_u32(RA_SAMPLE_TILE, l.end - j);
    float *s = e->s + (small && !to->dq ? 0 : (size_t)j * RA_LANES), *weight = in_place ? s : e->weight;
    if (small) score_keys(e, &l, j, keys, s);
    for (int n = 0; n < ways; n++) {
      weigh_keys(e, &l, w + n, s, j, keys, 0, weight);
      add_weights(weight, keys, sum[n]);
      ra_add_columns(v + j * e->v_row, e->v_row, (uint32_t)e->Dv, weight, RA_LANES, keys, own[n].sum_t, RA_LANES);
    }
  }
  int status = RA_OK;
  for (int n = 0; n < ways; n++)
    if (finish_rows(own + n, &l, w + n, sum[n], to[n], inverse[n]) != RA_OK) status = RA_NOT_POSITIVE;
  if (distance) add_distance(e, x, &l, to->out, to->lse, distance);
  if (!to->dq) return status;

  // pass 3: dS = weight' / sum (dout.v - dout.out), dq = scale R^T sum_j dS k
  ra_fill(e->v_strip, e->Dv * RA_LANES, 0);
  ra_fill(e->d_t, (RA_WAYS + 1) * e->Dp * RA_LANES, 0);
  for (uint32_t n = 0; n < count; n++) {
    const float *dout = x->dout + ra_head(p, l.head[n], p->heads, e->Nq, e->Dv) + l.i[n] * e->out_row;
    for (size_t d = 0; d < e->Dv; d++) e->v_strip[d * RA_LANES + n] = dout[d];
    for (int m = 0; m < ways; m++) {
      double ra_dot = 0;
      for (size_t d = 0; d < e->Dv; d++) ra_dot += (double)dout[d] * to[m].out[n * e->Dv + d];
      delta[m][n] = (float)ra_dot;
    }
  }
  for (uint32_t j = next_tile(&l, 0); j < l.end; j = next_tile(&l, j + RA_SAMPLE_TILE)) {
    uint32_t keys = ra_min_u32(RA_SAMPLE_TILE, l.end - j);
    float *s = e->s + (size_t)j * RA_LANES, *weight = in_place ? s : e->weight;
    ra_set_rows(v + j * e->v_row, e->v_row, keys, e->v_strip, RA_LANES, (uint32_t)e->Dv, e->dp, RA_LANES);
    for (int m = 0; m < ways; m++) {
      if (!in_place) weigh_keys(e, &l, w + m, s, j, keys, 1, weight);
      if (distance && m == 0) add_query_gradients(own + RA_WAYS, &l, j, keys, weight);
      for (uint32_t n = 0; n < keys * RA_LANES; n += 4) {
        f32x4 share = f32x4_mul(f32x4_load(weight + n), f32x4_load(inverse[m] + n % RA_LANES));
        f32x4_store(weight + n,
                    f32x4_mul(share, f32x4_sub(f32x4_load(e->dp + n), f32x4_load(delta[m] + n % RA_LANES))));
      }
      add_query_gradients(own + m, &l, j, keys, weight);
    }
  }
  if (distance) add_gradient_distance(own, x, &l, !w->polynomial, to->lse, delta[0], inverse[0], distance);
  for (int m = 0; m < ways; m++) {
    ra_transpose(own[m].d_t, RA_LANES, e->D, RA_LANES, e->rows, e->Dp);
    for (uint32_t n = 0; n < count; n++)
      ra_rotary_rows(&e->state->q_rotary, e->rows + n * e->Dp, e->Dp, to[m].dq + n * e->D, e->D, 1, l.i[n],
                     RA_ROTATE_TRANSPOSE, p->scale);
  }
  return status;
}

int ra_sample_rows(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, const uint32_t *rows, uint32_t count,
                   const float *coefficients, uint32_t degree, uint32_t beside, float *out, float *lse, float *dq,
                   ra_distance *distance, void *workspace) {
  if (ra_check(p) != RA_OK || count == 0 || degree > RA_MAX_DEGREE) return RA_ERROR_PROBLEM;
  ra_workspace_cursor cursor = {workspace, 0, 0};
  ra_sample e = ra_sample_arrange(p, &cursor);
  ra_weigher w[RA_WAYS];
  int status = RA_OK, ways = ra_weighers_of(p, kv_head, coefficients, degree, beside, w);
  if (distance) *distance = (ra_distance){0, 0, 0, 0, 0, 0};
  for (uint32_t n = 0; n < count; n += RA_LANES) {
    row_results to[RA_WAYS];
    for (size_t m = 0; m < RA_WAYS; m++) {
      size_t row = m * count + n;
      to[m] = (row_results){out + row * e.Dv, lse + row, dq ? dq + row * e.D : NULL};
    }
    int some = sample_lanes(&e, x, kv_head, rows + n, ra_min_u32(RA_LANES, count - n), w, ways, to, distance);
    if (some != RA_OK) status = some;
  }
  return status;
}
