// SPDX-License-Identifier: MIT
//
// Some rows of dk and dv: columns of the scores, eight keys as lanes, exact and as a polynomial would have them. See sample.h.

#include <math.h>
#include <string.h>

#include "elementary.h"
#include "pack.h"
#include "products.h"
#include "sample.h"
#include "softmax.h"

// Of those scores the gradient by the keys, d_t [D][8] += sum_n ds[n][8] x_n.
static void add_key_gradients(const ra_sample *e, uint32_t i, uint32_t count, const uint32_t *keys, const float *ds) {
  if (!ra_is_relative(e->p)) {
    ra_add_columns(e->rows, e->Dp, (uint32_t)e->D, ds, RA_LANES, count, e->d_t, RA_LANES);
    return;
  }
  ra_transpose(ds, RA_LANES, count, RA_LANES, e->lines, RA_SAMPLE_TILE);
  for (int m = 0; m < RA_LANES; m++) // e->columns are those of the scores
    ra_relative_row_gradient(ra_sample_map(e), 1, e->lines + m * RA_SAMPLE_TILE, e->columns, RA_SAMPLE_TILE,
                             ra_sample_diagonal(e, i, keys[m]), count, e->d_t + m, RA_LANES);
}

// Eight keys, and what weighs their scores.
typedef struct columns {
  uint32_t keys[RA_LANES], outlier[RA_LANES];
  const ra_weigher *w;
} columns;

// Queries i0 .. i0 + count - 1 of one head, count up to RA_SAMPLE_TILE, and what their scores are measured by.
typedef struct queries {
  size_t head;
  uint32_t i0, count;
  int64_t position; // of the first one
  // [count] x.mean key - lse; dout.out; exp of the first
  float offset[RA_SAMPLE_TILE], delta[RA_SAMPLE_TILE], factor[RA_SAMPLE_TILE];
  // [count] keys that they see, first .. end - 1, and take through the state, from .. to - 1, less that position: exact
  // up to 2^24 (from there on an edge may be off by one)
  int ranged; // they are there
  float first[RA_SAMPLE_TILE], end[RA_SAMPLE_TILE], from[RA_SAMPLE_TILE], to[RA_SAMPLE_TILE];
} queries;

static queries queries_of(const ra_problem *p, size_t head, uint32_t i0, uint32_t count) {
  return (queries){.head = head, .i0 = i0, .count = count, .position = (int64_t)i0 + p->query_offset};
}

static void find_ranges(const ra_sample *e, queries *t) {
  const ra_problem *p = e->p;
  uint32_t h = (uint32_t)(t->head % e->group), chunk_end = 0, bits = 0;
  ra_range state = {0, 0};
  for (uint32_t n = 0; n < t->count; n++, bits >>= 1) {
    uint32_t i = t->i0 + n;
    ra_range keys = ra_keys_of(p, i);
    if (n % 32 == 0) bits = ra_sample_query_outliers(e, t->head / e->group, h, i);
    if (i >= chunk_end) state = ra_state_keys(p, ra_chunk_start(p, i)), chunk_end = ra_chunk_end(p, i);
    t->first[n] = (float)(keys.first - t->position), t->end[n] = (float)(keys.end - t->position);
    t->from[n] = (float)(state.first - t->position);
    t->to[n] = bits & 1 ? t->from[n] : (float)(state.end - t->position);
  }
  t->ranged = 1;
}

// How each of these queries weighs the eight keys, alike for all queries: live[8] and through[8] (through the state)
// are 1 or 0 then.
static int weighs_alike(const ra_sample *e, const queries *t, const columns *c, float *live, float *through) {
  const ra_problem *p = e->p;
  uint32_t last = t->i0 + t->count - 1;
  ra_outliers outliers = ra_outlier_queries(p, t->head / e->group);
  uint64_t from = (uint64_t)t->i0 * e->group, to = ((uint64_t)last + 1) * e->group;
  if (p->bias || p->alibi || (c->w->polynomial && ra_outliers_within(outliers, from, to).count > 0)) return 0;
  ra_range a = ra_keys_of(p, t->i0), b = ra_keys_of(p, last); // both ends of ranges rise with i
  ra_range a_state = ra_state_keys(p, ra_chunk_start(p, t->i0)), b_state = ra_state_keys(p, ra_chunk_start(p, last));
  for (int n = 0; n < RA_LANES; n++) {
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
RA_KERNEL void weigh_alike(const ra_sample *e, const queries *t, const columns *c, const float *live,
                           const float *through) {
  const ra_exp2_constants *constants = ra_exp2_load();
  f32x4 to_log2 = f32x4_splat((float)RA_LOG2_E), zero = f32x4_splat(0);
  for (int h = 0; h < RA_LANES; h += 4) {
    f32x4 seen = f32x4_load(live + h), by_state = f32x4_load(through + h);
    int some_state = f32x4_any_greater(by_state, zero), some_exp = f32x4_any_greater(seen, by_state);
    for (uint32_t n = 0; n < t->count; n++) {
      float *weight = e->weight + n * RA_LANES + h, *ds = e->ds + n * RA_LANES + h;
      f32x4 dp = f32x4_load(e->dp + n * RA_LANES + h), s = f32x4_load(e->s + n * RA_LANES + h), value = zero,
            slope = zero;
      if (some_exp) {
        f32x4 x = f32x4_mul(f32x4_add(s, f32x4_load_splat(t->offset + n)), to_log2);
        value = slope = ra_exp2(x, constants);
      }
      if (some_state) {
        f32x4 factor = f32x4_load_splat(t->factor + n);
        value = f32x4_where_less(zero, by_state, f32x4_mul(ra_weigher_polynomial(c->w, 0, s), factor), value);
        slope = f32x4_where_less(zero, by_state, f32x4_mul(ra_weigher_polynomial(c->w, 1, s), factor), slope);
      }
      slope = f32x4_where_less(zero, seen, slope, zero);
      f32x4_store(weight, f32x4_where_less(zero, seen, value, zero));
      f32x4_store(ds, f32x4_mul(slope, f32x4_sub(dp, f32x4_load_splat(t->delta + n))));
    }
  }
}

// 1 where first <= key < end, else 0.
RA_INLINE f32x4 between(f32x4 key, const float *first, const float *end, f32x4 one) {
  f32x4 zero = f32x4_splat(0);
  return f32x4_where_less(key, f32x4_load_splat(first), zero, f32x4_where_less(key, f32x4_load_splat(end), one, zero));
}

// The same where each of them weighs in its own way, as ranges, bias and slopes have it.
RA_KERNEL void weigh_apart(const ra_sample *e, const queries *t, const columns *c) {
  const ra_problem *p = e->p;
  const ra_exp2_constants *constants = ra_exp2_load();
  f32x4 to_log2 = f32x4_splat((float)RA_LOG2_E), zero = f32x4_splat(0), one = f32x4_splat(1);
  f32x4 fall = f32x4_splat(p->alibi ? p->alibi[t->head % p->heads] : 0);
  for (int h = 0; h < RA_LANES; h += 4) {
    float place[4], plain[4];
    for (int m = 0; m < 4; m++) {
      place[m] = (float)(c->keys[h + m] - t->position);
      plain[m] = c->w->polynomial && !c->outlier[h + m] ? 1.0f : 0.0f;
    }
    for (uint32_t n = 0; n < t->count; n++) {
      float *weight = e->weight + n * RA_LANES + h, *ds = e->ds + n * RA_LANES + h;
      f32x4 key = f32x4_load(place), offset = f32x4_load_splat(t->offset + n);
      f32x4 seen = between(key, t->first + n, t->end + n, one);
      f32x4 by_state = between(key, t->from + n, t->to + n, f32x4_load(plain));
      f32x4 s = f32x4_load(e->s + n * RA_LANES + h), value = zero, slope = zero;
      if (p->alibi) { // differences of positions that are no longer exact weigh nothing
        f32x4 distance = f32x4_abs(f32x4_sub(key, f32x4_splat((float)n)));
        offset = f32x4_sub(offset, f32x4_mul(fall, distance));
      }
      if (p->bias) {
        const float *own = ra_sample_bias(p, t->head, t->i0 + n);
        float bias[4];
        for (int m = 0; m < 4; m++) bias[m] = *(own - c->keys[h + m]);
        offset = f32x4_add(offset, f32x4_load(bias));
      }
      if (f32x4_any_greater(seen, by_state))
        value = slope = ra_exp2(f32x4_mul(f32x4_add(s, offset), to_log2), constants);
      if (f32x4_any_greater(by_state, zero)) {
        f32x4 factor = ra_exp2(f32x4_mul(offset, to_log2), constants);
        value = f32x4_where_less(zero, by_state, f32x4_mul(ra_weigher_polynomial(c->w, 0, s), factor), value);
        slope = f32x4_where_less(zero, by_state, f32x4_mul(ra_weigher_polynomial(c->w, 1, s), factor), slope);
      }
      slope = f32x4_where_less(zero, seen, slope, zero);
      f32x4_store(weight, f32x4_where_less(zero, seen, value, zero));
      f32x4_store(ds,
                  f32x4_mul(slope, f32x4_sub(f32x4_load(e->dp + n * RA_LANES + h), f32x4_load_splat(t->delta + n))));
    }
  }
}

static int some_between(const uint32_t *keys, uint32_t first, uint32_t end) {
  int some = 0;
  for (int n = 0; n < RA_LANES; n++) some |= keys[n] >= first && keys[n] < end;
  return some;
}

// Groups of eight keys, the same for every way that they are weighed in.
typedef struct groups {
  uint32_t count;
  int ways;
  columns c[RA_WAYS][RA_SAMPLE_GROUPS];
  ra_sample own[RA_WAYS][RA_SAMPLE_GROUPS]; // their lanes in strip and v_strip; sums apart
} groups;

// What the mean query makes of these weights and gradients by scores; its own part of the gradient by keys has the
// weights, not their derivatives.
RA_KERNEL void weigh_centred(const ra_sample *e, const queries *t, const columns *c) {
  for (uint32_t h = 0; h < RA_LANES; h += 4) {
    float gain[4];
    f32x4 lacking = f32x4_splat(0);
    for (uint32_t m = 0; m < 4; m++) gain[m] = e->k_gain[c->keys[h + m]];
    for (uint32_t n = h; n < t->count * RA_LANES; n += RA_LANES) {
      f32x4 weight = f32x4_mul(f32x4_load(e->weight + n), f32x4_load(gain));
      f32x4 ds = f32x4_mul(f32x4_load(e->ds + n), f32x4_load(gain));
      f32x4_store(e->weight + n, weight), f32x4_store(e->ds + n, ds);
      f32x4 whole = f32x4_mul(weight, f32x4_sub(f32x4_load(e->dp + n), f32x4_load_splat(t->delta + n / RA_LANES)));
      lacking = f32x4_add(lacking, f32x4_sub(whole, ds));
    }
    for (size_t d = 0; d < e->D; d++) {
      float *d_t = e->d_t + d * RA_LANES + h;
      f32x4_store(d_t, f32x4_madd(f32x4_splat(e->p->scale * e->q_mean[d]), lacking, f32x4_load(d_t)));
    }
  }
}

// These queries, with rows of dout for them, against all groups; t lacks all but delta.
static void add_weighed(const groups *g, const ra_arrays *x, queries *t, const float *dout) {
  const ra_sample *e = g->own[0];
  int polynomial = g->c[0]->w->polynomial;
  uint32_t i0 = t->i0, count = t->count, first = ra_keys_of(e->p, i0).first, end = ra_key_limit(e->p, i0 + count - 1);
  const float *lse = x->lse + t->head * e->Nq + i0;
  ra_sample_rotate_queries(e, x->q, t->head, i0, count, e->p->scale);
  for (uint32_t n = 0; n < count; n++)
    t->offset[n] = ra_dot(e->rows + n * e->Dp, e->k_mean, e->D) - (lse[n] == -INFINITY ? 0 : lse[n]);
  for (uint32_t n = 0; n < RA_SAMPLE_TILE && polynomial; n += 4) {
    f32x4 offset = f32x4_mul(f32x4_load(t->offset + n), f32x4_splat((float)RA_LOG2_E));
    f32x4_store(t->factor + n, ra_exp2(offset, ra_exp2_load()));
  }
  for (uint32_t m = 0; m < g->count; m++) {
    if (!some_between(g->c[0][m].keys, first, end)) continue;
    ra_sample_score_queries(g->own[0] + m, i0, count, g->c[0][m].keys, e->s);
    ra_set_rows(dout, e->out_row, count, g->own[0][m].v_strip, RA_LANES, (uint32_t)e->Dv, e->dp, RA_LANES);
    for (int way = 0; way < g->ways; way++) {
      const columns *c = g->c[way] + m;
      const ra_sample *own = g->own[way] + m;
      float live[RA_LANES], through[RA_LANES];
      if (weighs_alike(e, t, c, live, through)) weigh_alike(e, t, c, live, through);
      else {
        if (!t->ranged) find_ranges(e, t);
        weigh_apart(e, t, c);
      }
      if (e->state->centred) weigh_centred(own, t, c);
      ra_add_columns(dout, e->out_row, (uint32_t)e->Dv, e->weight, RA_LANES, count, own->sum_t, RA_LANES);
      add_key_gradients(own, i0, count, c->keys, e->ds);
    }
  }
}

// Queries i0 .. i0 + count - 1 of one head with the dout, out and lse that are there.
static void add_queries(const ra_sample *e, const ra_arrays *x, size_t head, uint32_t i0, uint32_t count,
                        const groups *g) {
  size_t row = ra_head(e->p, head, e->p->heads, e->Nq, e->Dv) + i0 * e->out_row;
  const float *dout = x->dout + row, *out = x->out + row;
  queries t = queries_of(e->p, head, i0, count);
  for (uint32_t n = 0; n < count; n++) t.delta[n] = ra_dot(dout + n * e->out_row, out + n * e->out_row, e->Dv);
  add_weighed(g, x, &t, dout);
}

// What changes when the lse and out of query i become those given, `share` times. P~ being the weight by what is there,
// the weight becomes r P~, r = exp(lse there - lse), and dS = P~ (dP - delta~) becomes r P~ (dP - delta): differences
// are those of a query with share (r - 1) dout for its dout and share (r delta - delta~) for its delta.
static void add_change(const ra_sample *e, const ra_arrays *x, size_t head, uint32_t i, float lse, const float *out,
                       float share, const groups *g) {
  size_t row = ra_head(e->p, head, e->p->heads, e->Nq, e->Dv) + i * e->out_row;
  const float *dout = x->dout + row;
  double ratio = ra_exp_f64((double)x->lse[head * e->Nq + i] - lse);
  if (lse == -INFINITY) return; // it sees nothing
  queries t = queries_of(e->p, head, i, 1);
  t.delta[0] = (float)(share * (ratio * ra_dot(dout, out, e->Dv) - ra_dot(dout, x->out + row, e->Dv)));
  for (size_t d = 0; d < e->Dv; d++) e->scaled[d] = (float)(share * (ratio - 1) * dout[d]);
  add_weighed(g, x, &t, e->scaled);
}

// Groups of eight of `count` keys, with their rows and values in the lanes of strip and v_strip; sums begin at zero.
// Lanes past the last key repeat it.
static void load_columns(const ra_sample *e, const ra_arrays *x, uint32_t kv_head, const uint32_t *keys, uint32_t count,
                         const ra_weigher *w, int ways, groups *g) {
  const float *v = x->v + ra_head(e->p, kv_head, e->p->kv_heads, e->Nk, e->Dv);
  g->count = ra_ceil_div(count, RA_LANES), g->ways = ways;
  ra_fill(e->sum_t, e->Dv * RA_SAMPLE_SUMS * RA_LANES, 0);
  ra_fill(e->d_t, e->Dp * RA_SAMPLE_SUMS * RA_LANES, 0);
  for (uint32_t m = 0; m < g->count; m++) {
    for (size_t way = 0; way < RA_WAYS; way++) {
      ra_sample *own = g->own[way] + m;
      size_t at = way * RA_SAMPLE_GROUPS + m;
      *own = *e;
      own->strip += m * e->Dp * RA_LANES, own->v_strip += m * e->Dv * RA_LANES;
      own->sum_t += at * e->Dv * RA_LANES, own->d_t += at * e->Dp * RA_LANES;
      g->c[way][m].w = w + way;
    }
    for (uint32_t n = 0; n < RA_LANES; n++) {
      uint32_t j = keys[ra_min_u32(m * RA_LANES + n, count - 1)];
      uint32_t outlier = ra_outlier_bits(ra_outlier_keys(e->p, kv_head), 1, 0, j, 1);
      for (int way = 0; way < RA_WAYS; way++) g->c[way][m].keys[n] = j, g->c[way][m].outlier[n] = outlier;
      ra_transpose(e->k_rows + j * e->Dp, e->Dp, 1, e->D, g->own[0][m].strip + n, RA_LANES);
      ra_transpose(v + j * e->v_row, e->v_row, 1, e->Dv, g->own[0][m].v_strip + n, RA_LANES);
    }
  }
}

// Of all ways, one after the other.
static void store_columns(const groups *g, const uint32_t *keys, uint32_t count, float *dk, float *dv) {
  for (int way = 0; way < g->ways; way++)
    for (uint32_t n = 0; n < count; n++) {
      const ra_sample *e = g->own[way] + n / RA_LANES;
      ra_transpose(e->d_t + n % RA_LANES, RA_LANES, e->D, 1, e->rows, e->Dp);
      ra_transpose(e->sum_t + n % RA_LANES, RA_LANES, e->Dv, 1, dv, e->Dv);
      ra_rotary_rows(&e->state->k_rotary, e->rows, e->Dp, dk, e->D, 1, keys[n], RA_ROTATE_TRANSPOSE, 1.0f);
      dk += e->D, dv += e->Dv;
    }
}

int ra_sample_columns(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, const uint32_t *keys, uint32_t count,
                      const float *coefficients, uint32_t degree, uint32_t beside, float *dk, float *dv,
                      void *workspace) {
  if (ra_check(p) != RA_OK || count == 0 || count > RA_SAMPLE_KEYS || degree > RA_MAX_DEGREE) return RA_ERROR_PROBLEM;
  ra_workspace_cursor cursor = {workspace, 0, 0};
  ra_sample e = ra_sample_arrange(p, &cursor);
  groups g;
  ra_weigher w[RA_WAYS];
  int ways = ra_weighers_of(p, kv_head, coefficients, degree, beside, w);
  if (p->dv_by_derivative && degree > 0) memcpy(w->c[0], w->c[1], sizeof w->c[0]);
  load_columns(&e, x, kv_head, keys, count, w, ways, &g);
  for (size_t head = kv_head * e.group; head < (kv_head + 1) * e.group; head++)
    for (uint32_t i = ra_query_start(p, keys[0]), end = ra_query_end(p, keys[count - 1]), some; i < end; i += some) {
      some = ra_min_u32(RA_SAMPLE_TILE, end - i);
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
  ra_sample e = ra_sample_arrange(p, &cursor);
  groups g;
  for (uint32_t n = 0; n < count; n++)
    if (rows[n] >= e.group * e.Nq) return RA_ERROR_PROBLEM;
  ra_weigher w[RA_WAYS];
  load_columns(&e, x, kv_head, keys, key_count, w, ra_weighers_of(p, kv_head, NULL, 0, 0, w), &g);
  for (uint32_t n = 0; n < count; n++)
    add_change(&e, x, kv_head * e.group + rows[n] / e.Nq, (uint32_t)(rows[n] % e.Nq), lse[n], out + n * e.Dv, shares[n],
               &g);
  store_columns(&g, keys, key_count, dk, dv);
  return RA_OK;
}
