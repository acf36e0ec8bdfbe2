// SPDX-License-Identifier: MIT
//
// Near pairs of the Toeplitz engine: keys less than RA_NEAR behind a query, and as far ahead of it as they may be, with
// exp itself. The first rows of a causal product are sums of few terms, and rounding errors of a transform are as large
// there as in rows whose sums are large. O(RA_NEAR (D + Dv)) for each query, with a relative map O(RA_NEAR (|S| + Dv)).
//
// Where rotations factorise, scores are products of matrices, strip by strip of 32 queries. With a relative map every
// distance has its own; there the strip goes through the distances one by one, queries and keys side by side in the
// lanes.

#include "pack.h"
#include "products.h"
#include "softmax.h"
#include "toeplitz.h"

enum { STRIP = RA_STRIP, NEAR = RA_NEAR, KEYS = RA_NEAR_KEYS, EDGE = RA_EDGE };

// E exp(score), scores in natural units.
RA_INLINE f32x4 weigh(f32x4 E, f32x4 score, const ra_exp2_constants *constants) {
  f32x4 zero = f32x4_splat(0), exponent = f32x4_mul(score, f32x4_splat((float)RA_LOG2_E));
  f32x4 weight = f32x4_mul(E, ra_exp2(f32x4_min(f32x4_splat(128), exponent), constants));
  return f32x4_where_less(zero, E, weight, zero);
}

// --- Products of matrices ------------------------------------------------------------------------------------------------

// Keys near queries i .. i + 31, from and up to multiples of 8.
static ra_range near_keys(const ra_toeplitz *e, uint32_t i) {
  int64_t ahead = e->state->ahead, position = (int64_t)i + e->p->query_offset;
  int64_t first = position - NEAR + 1, end = position + STRIP + ahead;
  if (first < 0) first = 0;
  if (end > (int64_t)e->Nk) end = (int64_t)e->Nk;
  if (ahead >= NEAR || end <= first) return (ra_range){0, 0};
  return (ra_range){(uint32_t)first / 8 * 8, ((uint32_t)end + 7) / 8 * 8};
}

// a[key][32] = exp(x.y) E
RA_KERNEL void near_weights(const ra_toeplitz *e, const ra_side *x, uint32_t i, ra_range keys) {
  const ra_exp2_constants *constants = ra_exp2_load();
  uint32_t count = keys.end - keys.first;
  ra_fill(e->a, (size_t)count * STRIP, 0);
  for (uint32_t c = 0; c < STRIP; c += 8)
    ra_add_columns(e->keys.z_t + keys.first, e->keys.length, count, x->z_t + i + c, x->length, e->D, e->a + c, STRIP);
  for (uint32_t n = 0; n < count; n++) {
    const float *lag = e->near + EDGE + ((int64_t)i - keys.first - n + (int64_t)e->Nk - 1);
    for (uint32_t c = 0; c < STRIP; c += 4) {
      float *a = e->a + n * STRIP + c;
      f32x4_store(a, weigh(f32x4_load(lag + c), f32x4_load(a), constants));
    }
  }
}

// y[r][at .. at + 7] += sum_n rows[r][n] weights[n][8]
static void add_eight(const ra_toeplitz *e, const float *rows, size_t length, uint32_t count, const float *weights,
                      size_t weights_row, uint32_t terms, float *y, size_t y_length) {
  ra_set_rows(rows, length, count, weights, weights_row, terms, e->sums, 8);
  for (uint32_t r = 0; r < count; r++)
    for (uint32_t c = 0; c < 8; c++) y[r * y_length + c] += e->sums[r * 8 + c];
}

RA_KERNEL void product_forward(const ra_toeplitz *e, const ra_side *x, uint32_t i) {
  ra_range keys = near_keys(e, i);
  if (keys.first == keys.end) return;
  near_weights(e, x, i, keys);
  for (uint32_t c = 0; c < STRIP; c += 8)
    add_eight(e, e->keys.w_t + keys.first, e->keys.length, e->columns, e->a + c, STRIP, keys.end - keys.first,
              x->w_t + i + c, x->length);
}

RA_KERNEL void product_backward(const ra_toeplitz *e, const ra_side *x, uint32_t i, float *dbias) {
  const ra_side *y = &e->keys;
  ra_range keys = near_keys(e, i);
  uint32_t count = keys.end - keys.first;
  if (count == 0) return;
  near_weights(e, x, i, keys);
  // in the forward pass this was numerators += a u
  ra_fill(e->ds, (size_t)count * STRIP, 0);
  for (uint32_t c = 0; c < STRIP; c += 8)
    ra_add_columns(y->w_t + keys.first, y->length, count, x->w_t + i + c, x->length, e->columns, e->ds + c, STRIP);
  for (uint32_t n = 0; n < count * STRIP; n += 4)
    f32x4_store(e->ds + n, f32x4_mul(f32x4_load(e->ds + n), f32x4_load(e->a + n)));
  ra_transpose(e->a, STRIP, count, STRIP, e->a_t, KEYS);
  ra_transpose(e->ds, STRIP, count, STRIP, e->ds_t, KEYS);
  // in the forward pass this was a = exp(x.y + b)
  for (uint32_t c = 0; c < STRIP; c += 8)
    add_eight(e, y->z_t + keys.first, y->length, e->D, e->ds + c, STRIP, count, x->dz_t + i + c, x->length);
  for (uint32_t c = 0; c < count; c += 8) {
    add_eight(e, x->z_t + i, x->length, e->D, e->ds_t + c, KEYS, STRIP, y->dz_t + keys.first + c, y->length);
    add_eight(e, x->w_t + x->length + i, x->length, e->Dv, e->a_t + c, KEYS, STRIP, y->dw_t + keys.first + c,
              y->length);
  }
  for (uint32_t n = 0; dbias && n < count && keys.first + n < e->Nk; n++)
    for (uint32_t c = 0; c < STRIP && i + c < e->Nq; c++)
      dbias[i + c + e->Nk - 1 - keys.first - n] += e->ds[n * STRIP + c];
}

// --- Maps that go by distance ----------------------------------------------------------------------------------------------

// A rotation is four entries for each pair, and one for each dimension that does not turn.
uint32_t ra_near_entries(const ra_problem *p) {
  return p->relative_positions ? p->head_dim + p->rotary_dim : p->support_count;
}

// The query's and the key's dimension of an entry.
static void places_of(const ra_problem *p, uint32_t entry, uint32_t *a, uint32_t *b) {
  uint32_t half = p->rotary_dim / 2, pair = entry / 4;
  if (p->support_count) *a = p->support[2 * (size_t)entry], *b = p->support[2 * (size_t)entry + 1];
  else if (entry >= 4 * half) *a = *b = entry - 2 * half;
  else {
    uint32_t first = p->interleaved ? 2 * pair : pair, second = p->interleaved ? 2 * pair + 1 : half + pair;
    *a = entry & 2 ? second : first, *b = entry & 1 ? second : first;
  }
}

// map[entry] = W at a distance, x being half of the query where a pair turns (terms.c).
static void load_map(const ra_toeplitz *e, size_t lag) {
  uint32_t entries = ra_near_entries(e->p), half = e->complex ? e->p->rotary_dim / 2 : 0;
  float *to = e->map;
  for (uint32_t pair = 0; pair < half; pair++, to += 4) {
    const float *phase = e->phases + 2 * pair * e->lags + lag;
    to[0] = to[3] = 2 * phase[0], to[1] = 2 * phase[e->lags], to[2] = -to[1];
  }
  for (uint32_t n = 4 * half; n < entries; n++) e->map[n] = e->complex ? 1 : e->p->weights[n * e->lags + lag];
}

// Distances that are near, as entries first .. end - 1 of lags, and the key of query i at the last of them, which is
// where the window begins: it goes on to query i + 31 at the first.
typedef struct reach {
  size_t first, end;
  int64_t key;
} reach;

static reach reach_of(const ra_toeplitz *e, uint32_t i) {
  int64_t zero = (int64_t)e->Nk - 1 - e->p->query_offset, first = zero - e->state->ahead, end = zero + NEAR;
  if (first < 0) first = 0;
  if (end > (int64_t)e->lags) end = (int64_t)e->lags;
  if (e->state->ahead >= NEAR || end < first) end = first;
  return (reach){(size_t)first, (size_t)end, (int64_t)i + (int64_t)e->Nk - end};
}

// window [D + Dv + 1][KEYS] = y and u of keys key .., 0 where there are none. No window is longer than KEYS.
static void load_window(const ra_toeplitz *e, int64_t key) {
  const ra_side *y = &e->keys;
  for (uint32_t r = 0; r < e->D + e->columns; r++) {
    const float *from = r < e->D ? y->z_t + r * y->length : y->w_t + (r - e->D) * y->length;
    for (int64_t n = 0; n < KEYS; n++)
      e->window[r * KEYS + n] = key + n >= 0 && key + n < (int64_t)e->Nk ? from[key + n] : 0;
  }
}

// dy and du of the window go to their keys.
static void store_window(const ra_toeplitz *e, int64_t key) {
  const ra_side *y = &e->keys;
  for (uint32_t r = 0; r < e->D + e->Dv; r++) {
    float *to = r < e->D ? y->dz_t + r * y->length : y->dw_t + (r - e->D) * y->length;
    for (int64_t n = 0; n < KEYS; n++)
      if (key + n >= 0 && key + n < (int64_t)e->Nk) to[key + n] += e->dwindow[r * KEYS + n];
  }
}

// y [32] += factor a b
RA_INLINE void add_scaled(float factor, const float *a, const float *b, float *y) {
  f32x4 f = f32x4_splat(factor);
  for (uint32_t n = 0; n < STRIP; n += 4)
    f32x4_store(y + n, f32x4_madd(f32x4_mul(f, f32x4_load(a + n)), f32x4_load(b + n), f32x4_load(y + n)));
}

// a [32] = E exp(x W y): query i + n, key n of the window.
RA_KERNEL void mapped_weights(const ra_toeplitz *e, const ra_side *x, uint32_t i, float E, const float *window,
                              float *a) {
  const ra_exp2_constants *constants = ra_exp2_load();
  uint32_t entries = ra_near_entries(e->p);
  ra_fill(a, STRIP, 0);
  for (uint32_t n = 0; n < entries; n++) {
    uint32_t q, k;
    places_of(e->p, n, &q, &k);
    add_scaled(e->map[n], x->z_t + q * x->length + i, window + k * KEYS, a);
  }
  for (uint32_t n = 0; n < STRIP; n += 4) f32x4_store(a + n, weigh(f32x4_splat(E), f32x4_load(a + n), constants));
}

RA_KERNEL void mapped_forward(const ra_toeplitz *e, const ra_side *x, uint32_t i) {
  reach near = reach_of(e, i);
  if (near.first == near.end) return;
  load_window(e, near.key);
  for (size_t lag = near.first; lag < near.end; lag++) {
    const float *window = e->window + (near.end - 1 - lag);
    float E = e->near[EDGE + lag];
    if (!(E > 0)) continue;
    load_map(e, lag);
    mapped_weights(e, x, i, E, window, e->a);
    for (uint32_t c = 0; c < e->columns; c++)
      ra_add_products(e->a, window + (e->D + c) * KEYS, x->w_t + c * x->length + i);
  }
}

// Undoes one distance: ds [32] = a (h.u), then what that gives to dx, dy, du and the weights.
RA_KERNEL void mapped_gradients(const ra_toeplitz *e, const ra_side *x, uint32_t i, size_t lag, const float *window,
                                float *dwindow, float *dweights) {
  uint32_t entries = ra_near_entries(e->p);
  const float *a = e->a;
  float *ds = e->ds;
  ra_fill(ds, STRIP, 0);
  for (uint32_t c = 0; c < e->columns; c++) ra_add_products(x->w_t + c * x->length + i, window + (e->D + c) * KEYS, ds);
  for (uint32_t n = 0; n < STRIP; n += 4) f32x4_store(ds + n, f32x4_mul(f32x4_load(a + n), f32x4_load(ds + n)));
  for (uint32_t c = 1; c < e->columns; c++)
    ra_add_products(a, x->w_t + c * x->length + i, dwindow + (e->D + c - 1) * KEYS);
  for (uint32_t n = 0; n < entries; n++) {
    uint32_t q, k;
    places_of(e->p, n, &q, &k);
    const float *x_q = x->z_t + q * x->length + i, *y_k = window + k * KEYS;
    add_scaled(e->map[n], ds, y_k, x->dz_t + q * x->length + i);
    add_scaled(e->map[n], ds, x_q, dwindow + k * KEYS);
    if (!dweights) continue;
    f32x4 sum = f32x4_splat(0);
    for (uint32_t c = 0; c < STRIP; c += 4)
      sum = f32x4_madd(f32x4_mul(f32x4_load(x_q + c), f32x4_load(y_k + c)), f32x4_load(ds + c), sum);
    dweights[n * e->lags + lag] += f32x4_sum(sum);
  }
}

RA_KERNEL void mapped_backward(const ra_toeplitz *e, const ra_side *x, uint32_t i, float *dbias, float *dweights) {
  reach near = reach_of(e, i);
  if (near.first == near.end) return;
  load_window(e, near.key);
  ra_fill(e->dwindow, (size_t)(e->D + e->Dv) * KEYS, 0);
  for (size_t lag = near.first; lag < near.end; lag++) {
    size_t at = near.end - 1 - lag;
    float E = e->near[EDGE + lag];
    if (!(E > 0)) continue;
    load_map(e, lag);
    mapped_weights(e, x, i, E, e->window + at, e->a);
    mapped_gradients(e, x, i, lag, e->window + at, e->dwindow + at, dweights);
    for (uint32_t n = 0; dbias && n < STRIP; n++) dbias[lag] += e->ds[n];
  }
  store_window(e, near.key);
}

void ra_near_forward(const ra_toeplitz *e, const ra_side *x, uint32_t i) {
  if (e->own) mapped_forward(e, x, i);
  else product_forward(e, x, i);
}

void ra_near_backward(const ra_toeplitz *e, const ra_side *x, uint32_t i, float *dbias, float *dweights) {
  if (e->own) mapped_backward(e, x, i, dbias, dweights);
  else product_backward(e, x, i, dbias);
}
