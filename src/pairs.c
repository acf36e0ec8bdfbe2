// SPDX-License-Identifier: MIT
//
// Pairs that the polynomial engine does exactly, with exp itself: the keys beside a chunk's state, and all pairs of
// outliers, the few keys and queries whose scores would be too large for the polynomial. A block is up to 32 keys
// against the 32 queries of a chunk; O(D + Dv) a pair.
//
//   outlier keys      are taken beside the state by every chunk that they are in the state of, from rows that a head keeps;
//   outlier queries   are gathered, 32 to a chunk, and take all their keys.
//
// Exact weights may be as large as they like: sum_t and A are meant times 2^reference, a whole number for each query that rises
// when a score exceeds it by RISE. Backward weighs with the denominator's power of two instead.

#include <math.h>
#include <string.h>

#include "pack.h"
#include "polynomial.h"
#include "products.h"
#include "softmax.h"
#include "tile.h"

enum {
  CHUNK = RA_CHUNK,
  RISE = 40, // 2^40 a weight: 2^20 of them, times values up to 2^60, still fit a float
};

// --- Blocks -------------------------------------------------------------------------------------------------------

enum { STRIP = RA_STRIP_QUERIES, STRIPS = RA_STRIPS };

void ra_see_strips(ra_seen *seen) {
  ra_strips *t = &seen->strips;
  for (uint32_t s = 0; s < STRIPS; s++) {
    ra_range keys = {CHUNK, 0};
    for (uint32_t n = s * STRIP; n < (s + 1) * STRIP; n++) {
      uint32_t first = (uint32_t)seen->first[n], end = (uint32_t)seen->end[n];
      if (first >= end) continue;
      if (first < keys.first) keys.first = first;
      if (end > keys.end) keys.end = end;
    }
    t->keys[s] = keys.end > 0 ? keys : (ra_range){0, 0};
  }
  for (uint32_t c = 0; c < CHUNK; c += STRIP) {
    ra_range all = {0, CHUNK};
    for (uint32_t n = c; n < c + STRIP; n++) {
      if (seen->first[n] > (float)all.first) all.first = (uint32_t)seen->first[n];
      if (seen->end[n] < (float)all.end) all.end = (uint32_t)seen->end[n];
    }
    t->all[c / STRIP] = all;
  }
  t->whole = 1;
  for (uint32_t g = 0; g < STRIPS; g++) {
    uint32_t some = 0;
    t->from[g] = CHUNK, t->to[g] = 0;
    for (uint32_t s = 0; s < STRIPS; s++) {
      if (t->keys[s].first >= (g + 1) * STRIP || t->keys[s].end <= g * STRIP) continue;
      if (t->to[g] == 0) t->from[g] = s * STRIP;
      t->to[g] = (s + 1) * STRIP;
      some += t->keys[s].first <= g * STRIP && t->keys[s].end >= (g + 1) * STRIP ? STRIP : 0;
    }
    if (t->to[g] > t->from[g] && some != t->to[g] - t->from[g]) t->whole = 0;
  }
}

// c[key][query] = rows[key].x_t[..][query], where strips see keys
static void score_strips(const ra_strips *t, const float *rows, size_t row, const float *x_t, uint32_t terms,
                         float *c) {
  for (uint32_t s = 0; s < STRIPS; s++)
    ra_set_rows(rows + t->keys[s].first * row, row, t->keys[s].end - t->keys[s].first, x_t + s * STRIP, CHUNK, terms,
                c + t->keys[s].first * CHUNK + s * STRIP, CHUNK);
}

// sum_t[column][query] += sum_key rows[key][column] a[key][query], likewise
static void add_strips(const ra_strips *t, const float *rows, size_t row, uint32_t columns, const float *a,
                       float *sum_t) {
  for (uint32_t s = 0; s < STRIPS; s++)
    ra_add_columns(rows + t->keys[s].first * row, row, columns, a + t->keys[s].first * CHUNK + s * STRIP, CHUNK,
                   t->keys[s].end - t->keys[s].first, sum_t + s * STRIP, CHUNK);
}

// c[key][column] = sum_query a[key][query] rows[query][column] over the queries that may see the key, four keys at a
// time: a has 32 rows, of zeros past the last key unless these are whole strips. columns: a multiple of 8
RA_KERNEL void set_strip_products(const ra_strips *t, const float *a, uint32_t keys, const float *rows, size_t row,
                                  uint32_t columns, float *c) {
  f32x4 zero = f32x4_splat(0);
  ra_tile tile;
  for (uint32_t d = 0; d < columns; d += 8)
    for (uint32_t r = 0; r < keys; r += 4) {
      uint32_t from = t->from[r / STRIP], to = t->to[r / STRIP];
      ra_tile_multiply(&tile, 4, zero, zero, to > from ? to - from : 0, a + r * CHUNK + from, 1, CHUNK,
                       rows + from * row + d, row);
      ra_tile_store(&tile, 4, c + (size_t)r * columns + d, columns);
    }
}

// a = 2^(s - reference) of scores a = x.y, 0 for keys that are not seen; top[32]: the largest s, in powers of two as well.
RA_KERNEL void weigh(const ra_polynomial *e, const ra_seen *seen, float *top) {
  const ra_exp2_constants *constants = ra_exp2_load();
  f32x4 to_log2 = f32x4_splat((float)RA_LOG2_E), masked = f32x4_splat(RA_MASKED), zero = f32x4_splat(0);
  const int biased = e->decaying;
  for (uint32_t c = 0; c < CHUNK; c += STRIP) {
    ra_range keys = seen->strips.keys[c / STRIP], all = seen->strips.all[c / STRIP];
    f32x4 most[2] = {masked, masked}, less[2];
    float *at = e->a + keys.first * CHUNK + c;
    const float *bias = seen->bias + CHUNK - 1 + c - keys.first;
    for (int h = 0; h < 2; h++) less[h] = f32x4_sub(zero, f32x4_load(e->reference + c + 4 * h));
    RA_ROLLED
    for (uint32_t n = keys.first; n < keys.end; n++, at += CHUNK, bias--) {
      f32x4 s[2], key = f32x4_splat((float)n);
      RA_UNROLLED
      for (uint32_t h = 0; h < 2; h++) s[h] = f32x4_load(at + 4 * h);
      if (biased) {
        RA_UNROLLED
        for (uint32_t h = 0; h < 2; h++)
          s[h] = f32x4_add(s[h], f32x4_add(f32x4_load(seen->row + c + 4 * h), f32x4_load(bias + 4 * h)));
      }
      if (n < all.first || n >= all.end) {
        RA_UNROLLED
        for (uint32_t h = 0; h < 2; h++) {
          f32x4 first = f32x4_load(seen->first + c + 4 * h), end = f32x4_load(seen->end + c + 4 * h);
          s[h] = f32x4_where_less(key, first, masked, f32x4_where_less(key, end, s[h], masked));
        }
      }
      RA_UNROLLED
      for (uint32_t h = 0; h < 2; h++) {
        most[h] = f32x4_max(most[h], s[h]);
        s[h] = f32x4_min(f32x4_splat(128), f32x4_madd(s[h], to_log2, less[h]));
        f32x4_store(at + 4 * h, ra_exp2(s[h], constants));
      }
    }
    for (uint32_t h = 0; h < 2; h++) f32x4_store(top + c + 4 * h, f32x4_mul(most[h], to_log2));
  }
}

static void score_and_weigh(const ra_polynomial *e, const float *y_rows, const ra_seen *seen, float *top) {
  score_strips(&seen->strips, y_rows, e->Dp, e->x_t, e->D, e->a);
  weigh(e, seen, top);
}

void ra_begin_references(const ra_polynomial *e, int empty) {
  ra_fill(e->reference, CHUNK, empty ? RA_FORBIDDEN : 0); // below every score: the first one makes it rise
}

// 1 when some reference was too low.
static int raise_references(const ra_polynomial *e, const float *top) {
  float factor[CHUNK];
  int raised = 0;
  for (uint32_t n = 0; n < CHUNK; n++) {
    factor[n] = 1;
    if (!(top[n] > e->reference[n] + RISE)) continue;
    float power = ceilf(top[n]);
    factor[n] = ra_power_of_two(e->reference[n] - power);
    e->reference[n] = power;
    raised = 1;
  }
  for (uint32_t r = 0; raised && r < e->columns; r++)
    for (uint32_t n = 0; n < CHUNK; n++) e->sum_t[r * CHUNK + n] *= factor[n];
  return raised;
}

void ra_add_block(const ra_polynomial *e, const float *y_rows, const float *u_rows, const ra_seen *seen) {
  float top[CHUNK];
  score_and_weigh(e, y_rows, seen, top);
  if (raise_references(e, top)) score_and_weigh(e, y_rows, seen, top);
  add_strips(&seen->strips, u_rows, e->row, e->columns, e->a, e->sum_t);
}

void ra_add_rows(const float *x, size_t x_row, uint32_t count, uint32_t columns, float *y, size_t y_row,
                 const uint32_t *rows, uint32_t first) {
  for (uint32_t n = 0; n < count; n++) ra_add(x + n * x_row, columns, y + (rows ? rows[n] : first + n) * y_row);
}

void ra_scale_values(const ra_polynomial *e, const float *u_rows, uint32_t count) {
  for (uint32_t n = 0; n < count && e->state->centred; n++)
    for (uint32_t d = 0; d < e->Dvp; d++) e->d_rows[n * e->Dvp + d] *= u_rows[n * e->row + e->Dvp];
}

void ra_block_gradients(const ra_polynomial *e, const float *y_rows, const float *u_rows, const ra_seen *seen) {
  const ra_strips *t = &seen->strips;
  float top[CHUNK];
  // in the forward pass this was sum += A u, A = exp(x.y)
  if (!t->whole || e->decaying) ra_fill(e->a, CHUNK * CHUNK, 0), ra_fill(e->da, CHUNK * CHUNK, 0);
  score_and_weigh(e, y_rows, seen, top);
  score_strips(t, u_rows, e->row, e->h_t, e->columns, e->da);
  for (uint32_t c = 0; c < CHUNK; c += 4)
    for (uint32_t n = t->keys[c / STRIP].first; n < t->keys[c / STRIP].end; n++) {
      float *da = e->da + n * CHUNK + c;
      f32x4_store(da, f32x4_mul(f32x4_load(da), f32x4_load(e->a + n * CHUNK + c)));
    }
}

void ra_add_block_backward(const ra_polynomial *e, const float *y_rows, const float *u_rows, uint32_t keys,
                           const ra_seen *seen, const uint32_t *rows, uint32_t j, float *dk, float *dv) {
  const ra_strips *t = &seen->strips;
  ra_block_gradients(e, y_rows, u_rows, seen);
  add_strips(t, y_rows, e->Dp, e->D, e->da, e->dx_t);
  set_strip_products(t, e->da, keys, e->x_rows, e->Dp, e->Dp, e->d_rows);
  ra_add_rows(e->d_rows, e->Dp, keys, e->D, dk, e->k_row, rows, j);
  set_strip_products(t, e->a, keys, e->h_rows, e->row, e->Dvp, e->d_rows);
  ra_scale_values(e, u_rows, keys);
  ra_add_rows(e->d_rows, e->Dvp, keys, e->Dv, dv, e->v_row, rows, j);
}

// --- Outlier keys -------------------------------------------------------------------------------------------------

void ra_load_outlier_keys(const ra_polynomial *e, const ra_arrays *x, size_t kv) {
  ra_outliers far = ra_outlier_keys(e->p, kv);
  for (uint32_t n = 0; n < far.count; n++) {
    ra_load_keys(e, x, kv, far.rows[n], 1, 0);
    memcpy(e->far_y + (size_t)n * e->Dp, e->y_rows, e->Dp * sizeof *e->far_y);
    memcpy(e->far_u + (size_t)n * e->row, e->u_rows, e->row * sizeof *e->far_u);
  }
}

// The next block of up to 32 outliers within `state`: where they are among those of the head. Begin with *n = 0.
static int next_block(const ra_polynomial *e, size_t kv, ra_range state, uint32_t *n, ra_outliers *block, size_t *at) {
  ra_outliers all = ra_outlier_keys(e->p, kv), near = ra_outliers_within(all, state.first, state.end);
  if (*n >= near.count) return 0;
  *block = (ra_outliers){near.rows + *n, ra_min_u32(CHUNK, near.count - *n)};
  *at = (size_t)(block->rows - all.rows);
  *n += CHUNK;
  return 1;
}

// All keys of a block, for the queries that are no outliers themselves.
static ra_seen seen_by_plain(uint32_t keys, uint32_t outliers) {
  ra_seen seen;
  memset(&seen, 0, sizeof seen);
  for (uint32_t n = 0; n < CHUNK; n++) seen.end[n] = outliers >> n & 1 ? 0 : (float)keys;
  ra_see_strips(&seen);
  return seen;
}

void ra_add_outlier_keys(const ra_polynomial *e, size_t kv, ra_range state, uint32_t outliers) {
  ra_outliers block;
  size_t at;
  for (uint32_t n = 0; next_block(e, kv, state, &n, &block, &at);) {
    ra_seen seen = seen_by_plain(block.count, outliers);
    ra_add_block(e, e->far_y + at * e->Dp, e->far_u + at * e->row, &seen);
  }
}

void ra_add_outlier_keys_backward(const ra_polynomial *e, const ra_arrays *x, size_t kv, ra_range state,
                                  uint32_t outliers) {
  ra_heads head = ra_heads_of(e, kv * ra_group(e->p));
  ra_outliers block;
  size_t at;
  for (uint32_t n = 0; next_block(e, kv, state, &n, &block, &at);) {
    ra_seen seen = seen_by_plain(block.count, outliers);
    ra_add_block_backward(e, e->far_y + at * e->Dp, e->far_u + at * e->row, block.count, &seen, block.rows, 0,
                          x->dk + head.k, x->dv + head.v);
  }
}

// --- Outlier queries ----------------------------------------------------------------------------------------------

// Up to 32 of them: where they are in the arrays, which keys they see, and all of these.
typedef struct gathered {
  uint32_t count, i[CHUNK];
  size_t q[CHUNK], out[CHUNK], lse[CHUNK];
  ra_range keys[CHUNK], all;
} gathered;

// Sets x_rows and x_t.
static gathered gather(const ra_polynomial *e, const ra_arrays *x, size_t kv, uint32_t chunk) {
  const ra_problem *p = e->p;
  ra_outliers far = ra_outlier_queries(p, kv);
  const uint32_t *rows = far.rows + chunk * CHUNK, group = ra_group(p);
  gathered g = {.count = ra_min_u32(CHUNK, far.count - chunk * CHUNK), .all = {UINT32_MAX, 0}};
  for (uint32_t n = 0; n < g.count; n++) {
    uint32_t i = g.i[n] = rows[n] / group;
    ra_heads at = ra_heads_of(e, kv * group + rows[n] % group);
    g.q[n] = at.q + i * e->q_row, g.out[n] = at.out + i * e->out_row, g.lse[n] = at.lse + i;
    g.keys[n] = ra_keys_of(p, i);
    if (g.keys[n].first < g.all.first) g.all.first = g.keys[n].first;
    if (g.keys[n].end > g.all.end) g.all.end = g.keys[n].end;
    ra_rotary_rows(&e->state->q_rotary, x->q + g.q[n], e->q_row, e->x_rows + n * e->Dp, e->Dp, 1, i, RA_ROTATE,
                   p->scale);
  }
  ra_turn_queries(e, g.count);
  return g;
}

// What they see of the keys j .. j + keys - 1, which are loaded when that is something.
static int load_seen(const ra_polynomial *e, const ra_arrays *x, size_t kv, const gathered *g, uint32_t j,
                     uint32_t keys, ra_seen *seen) {
  int any = 0;
  memset(seen, 0, sizeof *seen);
  for (uint32_t n = 0; n < g->count; n++) any |= ra_see(seen, n, g->keys[n], j, keys);
  ra_see_strips(seen);
  if (any) ra_load_keys(e, x, kv, j, keys, 0);
  return any;
}

void ra_outlier_queries_forward(const ra_polynomial *e, const ra_arrays *x, size_t kv, uint32_t chunk) {
  gathered g = gather(e, x, kv, chunk);
  ra_seen seen;
  float lse[CHUNK];
  ra_fill(e->sum_t, (size_t)e->columns * CHUNK, 0);
  ra_begin_references(e, 1);
  for (uint32_t j = g.all.first, keys; j < g.all.end; j += keys) {
    keys = ra_min_u32(CHUNK, g.all.end - j);
    if (load_seen(e, x, kv, &g, j, keys, &seen)) ra_add_block(e, e->y_rows, e->u_rows, &seen);
  }
  uint32_t bad = ra_normalise(e, g.count, lse);
  ra_forget_keys(e);
  ra_transpose(e->sum_t, CHUNK, e->Dv, g.count, e->u_rows, e->row);
  for (uint32_t n = 0; n < g.count; n++) {
    if ((bad >> n & 1) && g.keys[n].first < g.keys[n].end) e->state->not_positive = 1;
    memcpy(x->out + g.out[n], e->u_rows + n * e->row, e->Dv * sizeof *x->out);
    x->lse[g.lse[n]] = lse[n];
  }
}

void ra_outlier_queries_backward(const ra_polynomial *e, const ra_arrays *x, size_t kv, uint32_t chunk) {
  ra_heads head = ra_heads_of(e, kv * ra_group(e->p));
  gathered g = gather(e, x, kv, chunk);
  ra_seen seen;
  float lse[CHUNK], ignored[CHUNK];
  ra_forget_keys(e);
  for (uint32_t n = 0; n < g.count; n++) {
    memcpy(e->u_rows + n * e->row, x->out + g.out[n], e->Dv * sizeof *e->u_rows);
    memcpy(e->d_rows + n * e->row, x->dout + g.out[n], e->Dv * sizeof *e->d_rows);
    lse[n] = x->lse[g.lse[n]];
  }
  ra_load_gradients(e, e->u_rows, e->d_rows, e->row, lse, g.count, 0, ignored);
  ra_fill(e->dx_t, (size_t)e->Dp * CHUNK, 0);
  for (uint32_t j = g.all.first, keys; j < g.all.end; j += keys) {
    keys = ra_min_u32(CHUNK, g.all.end - j);
    if (load_seen(e, x, kv, &g, j, keys, &seen))
      ra_add_block_backward(e, e->y_rows, e->u_rows, keys, &seen, NULL, j, x->dk + head.k, x->dv + head.v);
  }
  ra_transpose(e->dx_t, CHUNK, e->Dp, CHUNK, e->d_rows, e->Dp);
  for (uint32_t n = 0; n < g.count; n++)
    ra_rotary_rows(&e->state->q_rotary, e->d_rows + n * e->Dp, e->Dp, x->dq + g.q[n], e->q_row, 1, g.i[n],
                   RA_ROTATE_TRANSPOSE, e->p->scale);
}
