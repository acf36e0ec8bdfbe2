// SPDX-License-Identifier: MIT
//
// See lags.h. Every pair (feature r, column c) is a slot, eight slots are a batch.

#include "lags.h"

#include <math.h>
#include <string.h>

#include "elementary.h"
#include "monomials.h"
#include "pack.h"
#include "simd.h"

enum { STRIP = RA_STRIP };

static uint32_t count_batches(const ra_problem *p) {
  size_t rank = ra_rank(p->head_dim, p->lag_degree);
  return (uint32_t)((rank * (p->value_dim + 1) + RA_COLUMNS - 1) / RA_COLUMNS); // rank is below 2^20 at degree 2
}

// The distance of entry n of what goes by i - j.
static int64_t distance_of(const ra_problem *p, size_t n) { return (int64_t)n - p->key_length + 1 + p->query_offset; }

uint32_t ra_lags_units(const ra_problem *p) {
  if (p->decay_count == 0 || distance_of(p, ra_diagonals(p) - 1) < ra_lags_from(p)) return 0;
  return ra_min_u32(count_batches(p), p->query_length / STRIP + 1); // so that units can be counted in 32 bits
}

static void take_side(ra_lag_side *z, uint32_t heads, size_t length, size_t floats, ra_workspace_cursor *w) {
  if (heads > UINT32_MAX / floats) w->overflow = 1;
  z->length = length;
  z->z_t = ra_take_floats(w, heads * floats, length);
}

ra_lags ra_lags_arrange(const ra_problem *p, uint32_t together, ra_workspace_cursor *w) {
  ra_lags e = {.p = p, .D = p->head_dim, .columns = p->value_dim + 1, .together = together};
  ra_convolution c;
  size_t floats = (size_t)e.D + e.columns;
  uint32_t S = ra_convolution_block(p->query_length, p->key_length);
  e.rank = (uint32_t)ra_rank(p->head_dim, p->lag_degree);
  e.batches = count_batches(p);
  e.convolution = ra_take(w, 1, 1, sizeof *e.convolution);
  e.dlags = ra_take_floats(w, ra_diagonals(p), 1);
  ra_convolution_layout(&c, p->query_length, p->key_length, S, 0, 1, w);
  take_side(&e.keys, 1, (size_t)c.columns * S, floats, w);
  take_side(&e.queries, together, (size_t)c.rows * S, floats, w);
  e.queries_step = floats * e.queries.length;
  e.spectra = ra_take_floats(w, ra_convolution_floats(&c), 1);
  e.spectra2 = ra_take_floats(w, ra_convolution_floats(&c), 1);
  if (!w->base || w->overflow) return e;
  e.keys.w_t = e.keys.z_t + e.D * e.keys.length;
  e.queries.w_t = e.queries.z_t + e.D * e.queries.length;
  c.least = e.convolution->least, c.most = e.convolution->most; // of the distances that are there, if any
  *e.convolution = c;
  return e;
}

ra_lag_side ra_lags_queries(const ra_lags *e, uint32_t h) {
  ra_lag_side z = e->queries;
  z.z_t += h * e->queries_step, z.w_t += h * e->queries_step;
  return z;
}

void ra_lags_begin(const ra_lags *e) {
  const ra_problem *p = e->p;
  ra_convolution_init(e->convolution);
  for (size_t n = 0; n < ra_diagonals(p); n++) {
    int64_t t = distance_of(p, n);
    e->dlags[n] = t >= ra_lags_from(p) && (p->window_left < 0 || t <= p->window_left) ? 1.0f : 0.0f;
  }
  ra_convolution_kernel(e->convolution, e->dlags);
  size_t floats = (size_t)e->D + e->columns;
  ra_fill(e->keys.z_t, floats * e->keys.length, 0);
  ra_fill(e->queries.z_t, e->together * e->queries_step, 0);
}

void ra_lags_load(const ra_lags *e, const ra_lag_side *side, uint32_t n, const float *z_t, const float *w_t,
                  const float *last, const float *live) {
  for (uint32_t d = 0; d < e->D; d++) memcpy(side->z_t + d * side->length + n, z_t + d * STRIP, STRIP * sizeof *z_t);
  for (uint32_t c = 0; c < e->columns; c++) {
    const float *from = c + 1 < e->columns ? w_t + c * STRIP : last;
    float *to = side->w_t + c * side->length + n;
    for (uint32_t i = 0; i < STRIP; i += 4) f32x4_store(to + i, f32x4_mul(f32x4_load(from + i), f32x4_load(live + i)));
  }
}

// --- Features -----------------------------------------------------------------------------------------------------

// A monomial of up to two variables a <= b, and how often it comes in a power of x.y.
typedef struct monomial {
  uint32_t degree, a, b;
  float times;
} monomial;

static monomial first_monomial(void) { return (monomial){.degree = 0, .times = 1}; }

static monomial next_monomial(monomial m, uint32_t D) {
  if (m.degree == 0) return (monomial){1, 0, 0, 1};
  if (m.degree == 1) return m.a + 1 < D ? (monomial){1, m.a + 1, 0, 1} : (monomial){2, 0, 0, 1};
  if (m.b + 1 < D) return (monomial){2, m.a, m.b + 1, 2};
  return (monomial){2, m.a + 1, m.a + 1, 1};
}

// phi[32] = factor times the monomial of the tokens from n on
RA_KERNEL void evaluate(const ra_lag_side *z, const monomial *m, float factor, size_t n, float *phi) {
  const float *a = z->z_t + m->a * z->length + n, *b = z->z_t + m->b * z->length + n;
  for (uint32_t i = 0; i < STRIP; i += 4) {
    f32x4 f = f32x4_splat(factor);
    if (m->degree > 0) f = f32x4_mul(f, f32x4_load(a + i));
    if (m->degree > 1) f = f32x4_mul(f, f32x4_load(b + i));
    f32x4_store(phi + i, f);
  }
}

// The slots of a batch.
typedef struct slots {
  uint32_t count, column[RA_COLUMNS];
  monomial of[RA_COLUMNS];
} slots;

// The next eight: goes on from monomial *m and column *c.
static slots take_slots(const ra_lags *e, uint32_t batch, monomial *m, uint32_t *c) {
  uint32_t all = e->rank * e->columns, left = all - batch * RA_COLUMNS;
  slots s = {.count = ra_min_u32(RA_COLUMNS, left)};
  for (uint32_t n = 0; n < s.count; n++) {
    s.of[n] = *m, s.column[n] = *c;
    if (++*c == e->columns) *c = 0, *m = next_monomial(*m, e->D);
  }
  return s;
}

// lanes [8][32] += phi w for the tokens from n on; with the weights of p where there are coefficients.
RA_KERNEL void pack(const ra_lag_side *z, const slots *s, const float *coefficients, size_t n, float *lanes) {
  float phi[STRIP];
  for (uint32_t slot = 0; slot < s->count; slot++, lanes += STRIP) {
    const monomial *m = &s->of[slot];
    if (slot == 0 || s->column[slot] == 0)
      evaluate(z, m, coefficients ? coefficients[m->degree] * m->times : 1, n, phi);
    const float *column = z->w_t + s->column[slot] * z->length + n;
    for (uint32_t i = 0; i < STRIP; i += 4)
      f32x4_store(lanes + i, f32x4_madd(f32x4_load(phi + i), f32x4_load(column + i), f32x4_load(lanes + i)));
  }
}

// Spectra of the slots of the keys, or of the queries of all heads together.
static void transform(const ra_lags *e, const slots *s, const float *coefficients, float *spectra) {
  const ra_convolution *c = e->convolution;
  float lanes[RA_COLUMNS * STRIP];
  uint32_t heads = coefficients ? e->together : 1, blocks = coefficients ? c->rows : c->columns;
  for (uint32_t block = 0; block < blocks; block++) {
    for (uint32_t n = 0; n < c->S; n += STRIP) {
      ra_fill(lanes, RA_COLUMNS * STRIP, 0);
      for (uint32_t h = 0; h < heads; h++) {
        ra_lag_side z = coefficients ? ra_lags_queries(e, h) : e->keys;
        pack(&z, s, coefficients, (size_t)block * c->S + n, lanes);
      }
      ra_convolution_put(c, n, lanes);
    }
    ra_convolution_transform(c, block, spectra);
  }
}

void ra_lags_correlate(const ra_lags *e, size_t kv, uint32_t unit) {
  uint64_t units = ra_lags_units(e->p);
  uint32_t first = (uint32_t)(e->batches * (uint64_t)unit / units);
  uint32_t end = (uint32_t)(e->batches * ((uint64_t)unit + 1) / units), c = 0;
  monomial m = first_monomial();
  for (uint32_t batch = 0; batch < end; batch++) {
    slots s = take_slots(e, batch, &m, &c);
    if (batch < first) continue;
    transform(e, &s, NULL, e->spectra);
    transform(e, &s, e->p->lag_coefficients + kv * (e->p->lag_degree + 1), e->spectra2);
    ra_convolution_correlate(e->convolution, e->spectra, e->spectra2);
  }
}

void ra_lags_finish(const ra_lags *e, const float *bias, double top, float *dbias) {
  const ra_problem *p = e->p;
  ra_convolution_change(e->convolution, e->dlags);
  for (size_t n = 0; n < ra_diagonals(p); n++) {
    int64_t t = distance_of(p, n);
    if (t < ra_lags_from(p) || (p->window_left >= 0 && t > p->window_left)) continue;
    dbias[n] += (float)(ra_exp_f64(bias[n] - top) * e->dlags[n]);
  }
}
