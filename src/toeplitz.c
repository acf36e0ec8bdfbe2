// SPDX-License-Identifier: MIT
//
// The papers' own algorithm: polynomial features and Toeplitz matrices, multiplied by fast Fourier transforms. With
// exp(s) ~ p(s) of degree g and any bias b by distance, masks that depend on distance being b = -infinity,
//
//   A_ij = E_{i-j} p(x_i.y_j) = sum_r w_r phi_r(x_i) E_{i-j} phi_r(y_j),   E_t = exp(b_t),   r < C(D + g, g)
//
// so that A u = sum_r diag(w_r phi_r(x)) E diag(phi_r(y)) u, E a Toeplitz matrix, the same for all r: exact in the bias, whatever
// it looks like, which no state of constant size can be. x_i = scale R q_i, y_j = R k_j - mean, u_j = [1, v_j - mean].
// O(N rank (Dv + 1) (log S + N/S)) time with blocks of S up to 2^14 (convolution.h); O(N (D + Dv)) workspace.
//
// Backward is the derivative of exactly this function. With h_i = [-delta_i, dout_i] / denominator_i:
//
//   du_j = sum_r phi_r(y_j) (E^T w_r phi_r(x) h)_j        dphi_r(y_j) = u_j . (E^T w_r phi_r(x) h)_j
//   dphi_r(x_i) = w_r h_i . (E phi_r(y) u)_i              dE_t = sum over r and columns of corr(phi_r(y) u, w_r phi_r(x) h)_t
//
// which are the products of the forward pass, as many with the transpose, and correlations of the same spectra.
//
// Every pair (r, column of u) is a slot; eight slots are a batch, one unit of work. Where few keys are in sight of the first
// queries (causal, or a narrow right side), pairs nearer than 64 are done exactly, with exp: rounding errors of a transform are
// as large in its first rows, whose sums are small, as in its last.
//
// This work is based on:
//   Alman, Song. Fast RoPE Attention: Combining the Polynomial Method and Fast Fourier Transform. 2025 (2505.11892)
//   Alman, Song. RoPE Attention Can Be Trained in Almost Linear Time. 2024 (2412.17316v3)

#include <math.h>
#include <string.h>

#include "convolution.h"
#include "engines.h"
#include "monomials.h"
#include "pack.h"
#include "products.h"
#include "rotary.h"
#include "softmax.h"
#include "tile.h"

enum {
  STRIP = RA_STRIP,
  NEAR = 64,            // distances below it are done exactly where the first rows need it
  KEYS = 2 * NEAR + 40, // keys near a strip of queries: 31 + 63 + 63 and one, from and up to a multiple of 8
  EDGE = 40,            // zeros on both sides of the arrays of lags, so that a strip may look past their ends
};

// What stays between calls.
typedef struct toeplitz_state {
  ra_rotary q_rotary, k_rotary;
  ra_convolution convolution;
  float top;             // largest bias that counts; -infinity when none does
  int64_t ahead;         // how far keys may be ahead of a query; NEAR or more: no pairs are near
  uint32_t not_positive; // rows whose denominator was not positive and finite
} toeplitz_state;

// The queries of a head, or the keys: tokens are columns, as many as blocks hold; those that there are none of are 0.
typedef struct side {
  size_t length; // of a row: blocks * S
  float *z_t;    // [D][length] x or y
  float *w_t;    // [1 + Dv][length] u; of queries: denominators and numerators, backward h
  float *dz_t;   // [D][length] backward
  float *dw_t;   // [Dv][length] backward, keys
} side;

typedef struct toeplitz {
  const ra_problem *p;
  toeplitz_state *state;
  ra_features f;
  uint32_t D, Dv, columns;             // Dv + 1
  uint32_t together;                   // query heads that share a key/value head and a bias
  uint32_t batches;                    // of eight slots
  size_t q_row, k_row, v_row, out_row; // floats from token to token in the arrays
  size_t Nq, Nk;
  char *q_space, *k_space;
  uint32_t *tail;
  float *weights;            // [rank] w_r
  uint8_t *run;              // [rank]
  uint16_t *variables;       // [rank][degree] of each monomial
  float *near, *far;         // [EDGE + Nq + Nk - 1 + EDGE] E / exp(top), pairs that are done exactly and the others
  float *dlags;              // [Nq + Nk - 1] backward
  float *k_mean, *v_mean;    // [D], [Dv]
  float *rows;               // [32][max(D, Dv)]
  float *sums;               // [max(D, Dv + 1)][8]
  float *a, *ds;             // [KEYS][32] weights of near pairs, their gradient
  float *a_t, *ds_t;         // [32][KEYS]
  side keys, queries;        // queries: of the first of the heads that go together
  size_t queries_step;       // floats to the next
  float *spectra, *spectra2; // of eight columns of keys, of queries (backward)
} toeplitz;

static uint32_t heads_together(const ra_problem *p) { return p->bias && p->bias_heads > 1 ? 1 : ra_group(p); }

static void take_side(side *z, uint32_t heads, size_t length, uint32_t D, uint32_t Dv, int backward, int keys,
                      ra_workspace_cursor *w) {
  size_t floats = D + Dv + 1 + (backward ? D : 0) + (backward && keys ? Dv : 0);
  if (heads > UINT32_MAX / floats) w->overflow = 1;
  z->length = length;
  z->z_t = ra_take_floats(w, heads * floats, length);
  if (!z->z_t) return; // only counting
  z->w_t = z->z_t + D * length;
  z->dz_t = z->w_t + (Dv + 1) * length;
  z->dw_t = z->dz_t + D * length;
}

// `c` is filled unless it was before, which is when `w` counts only or at the first unit.
static toeplitz arrange(const ra_problem *p, uint32_t pass, ra_workspace_cursor *w) {
  toeplitz e = {.p = p, .D = p->head_dim, .Dv = p->value_dim, .columns = p->value_dim + 1};
  size_t rank = ra_rank(p->head_dim, p->degree), wider = e.D > e.Dv ? e.D : e.Dv;
  int backward = pass == RA_BACKWARD;
  if (rank == RA_SIZE_OVERFLOW) {
    w->overflow = 1;
    return e;
  }
  e.Nq = p->query_length, e.Nk = p->key_length;
  e.together = heads_together(p);
  e.batches = (uint32_t)(((uint64_t)rank * e.columns + RA_COLUMNS - 2) / RA_COLUMNS);
  e.q_row = ra_row(p, p->heads, e.D), e.k_row = ra_row(p, p->kv_heads, e.D);
  e.v_row = ra_row(p, p->kv_heads, e.Dv), e.out_row = ra_row(p, p->heads, e.Dv);
  e.state = ra_take(w, 1, 1, sizeof(toeplitz_state));
  e.q_space = ra_take(w, 1, ra_rotary_bytes(p), 1);
  e.k_space = ra_take(w, 1, ra_rotary_bytes(p), 1);
  e.tail = ra_take(w, 1, ra_features_cells(p->head_dim, p->degree), sizeof(uint32_t));
  e.weights = ra_take_floats(w, rank, 1);
  e.run = ra_take(w, rank, 1, 1);
  e.variables = ra_take(w, rank, p->degree + 1, sizeof(uint16_t));
  size_t lags = e.Nq + e.Nk - 1;
  e.near = ra_take_floats(w, lags + 2 * EDGE, 1);
  e.far = ra_take_floats(w, lags + 2 * EDGE, 1);
  if (backward) e.dlags = ra_take_floats(w, lags, 1);
  e.k_mean = ra_take_floats(w, e.D, 1);
  e.v_mean = ra_take_floats(w, e.Dv, 1);
  e.rows = ra_take_floats(w, STRIP, wider);
  e.sums = ra_take_floats(w, wider + 1, 8);
  e.a = ra_take_floats(w, KEYS, STRIP);
  e.ds = ra_take_floats(w, KEYS, STRIP);
  e.a_t = ra_take_floats(w, STRIP, KEYS);
  e.ds_t = ra_take_floats(w, STRIP, KEYS);
  ra_convolution c;
  uint32_t S = ra_convolution_block(p->query_length, p->key_length);
  ra_convolution_layout(&c, p->query_length, p->key_length, S, backward && p->bias, w);
  take_side(&e.keys, 1, (size_t)c.columns * S, e.D, e.Dv, backward, 1, w);
  take_side(&e.queries, e.together, (size_t)c.rows * S, e.D, e.Dv, backward, 0, w);
  e.queries_step = (e.D + e.Dv + 1 + (backward ? e.D : 0)) * e.queries.length;
  e.spectra = ra_take_floats(w, ra_convolution_floats(&c), 1);
  if (backward) e.spectra2 = ra_take_floats(w, ra_convolution_floats(&c), 1);
  if (w->base) {
    c.least = e.state->convolution.least, c.most = e.state->convolution.most; // of the kernel that is there, if any
    e.state->convolution = c;
    ra_features_init(&e.f, p->head_dim, p->degree, e.tail);
  }
  return e;
}

static void layout(const ra_problem *p, uint32_t pass, ra_workspace_cursor *w) { arrange(p, pass, w); }

static side queries_of(const toeplitz *e, uint32_t h) {
  side z = e->queries;
  z.z_t += h * e->queries_step, z.w_t += h * e->queries_step;
  z.dz_t += h * e->queries_step, z.dw_t = NULL;
  return z;
}

// --- Slots --------------------------------------------------------------------------------------------------------

// The variables of every monomial, in the order of monomials.h: x_a times those of a row of the degree below.
static void list_variables(const toeplitz *e) {
  const ra_features *f = &e->f;
  uint32_t D = f->D, g = f->degree;
  for (uint32_t m = 1; m <= g; m++) {
    const uint32_t *below = f->tail + (size_t)(m - 1) * (D + 1);
    uint32_t row = f->first[m], rows_below = f->first[m] - f->first[m - 1];
    for (uint32_t a = 0; a < D; a++)
      for (uint32_t t = below[a]; t < rows_below; t++, row++) {
        uint16_t *to = e->variables + (size_t)row * g;
        const uint16_t *from = e->variables + (size_t)(f->first[m - 1] + t) * g;
        for (uint32_t n = 0; n + 1 < m; n++) to[n] = from[n];
        to[m - 1] = (uint16_t)a;
      }
  }
}

static uint32_t degree_of(const toeplitz *e, uint32_t r) {
  uint32_t m = 0;
  while (r >= e->f.first[m + 1]) m++;
  return m;
}

// y[32] = factor * product of the columns `variables` of z_t at n .. n + 31, without the one numbered `but`.
RA_KERNEL void multiply_columns(const side *z, const uint16_t *variables, uint32_t count, uint32_t but, float factor,
                                size_t n, float *y) {
  f32x4 f = f32x4_splat(factor);
  for (uint32_t i = 0; i < STRIP; i += 4) f32x4_store(y + i, f);
  for (uint32_t m = 0; m < count; m++) {
    if (m == but) continue;
    const float *column = z->z_t + variables[m] * z->length + n;
    for (uint32_t i = 0; i < STRIP; i += 4) f32x4_store(y + i, f32x4_mul(f32x4_load(y + i), f32x4_load(column + i)));
  }
}

// The slots of a batch: number n is feature n / columns and column n % columns. Slot 0, a constant, needs no transform: what it
// gives are sums of E (settle_queries, settle_lags).
typedef struct slots {
  uint64_t first;
  uint32_t count;
} slots;

static slots slots_of(const toeplitz *e, uint32_t batch) {
  uint64_t first = 1 + (uint64_t)batch * RA_COLUMNS, all = (uint64_t)e->f.rank * e->columns;
  return (slots){first, (uint32_t)(all - first < RA_COLUMNS ? all - first : RA_COLUMNS)};
}

// lanes [8][32] += w_r phi_r(z) w_c for the slots (r, c) of a batch; w_r = 1 without `weights`.
RA_KERNEL void pack_strip(const toeplitz *e, const side *z, slots s, const float *weights, size_t n, float *lanes) {
  float phi[STRIP];
  uint32_t g = e->f.degree, r = (uint32_t)(s.first / e->columns), c = (uint32_t)(s.first % e->columns);
  for (uint32_t slot = 0; slot < s.count; slot++, lanes += STRIP) {
    if (slot == 0 || c == 0)
      multiply_columns(z, e->variables + (size_t)r * g, degree_of(e, r), UINT32_MAX, weights ? weights[r] : 1, n, phi);
    const float *column = z->w_t + c * z->length + n;
    for (uint32_t i = 0; i < STRIP; i += 4)
      f32x4_store(lanes + i, f32x4_madd(f32x4_load(phi + i), f32x4_load(column + i), f32x4_load(lanes + i)));
    if (++c == e->columns) c = 0, r++;
  }
}

// In the forward pass this was phi = product of z_a; so dz_a += dphi times the product of the others, for each of them.
RA_KERNEL void add_jacobian(const toeplitz *e, const side *z, uint32_t r, float weight, size_t n, const float *dphi) {
  float others[STRIP];
  const uint16_t *variables = e->variables + (size_t)r * e->f.degree;
  uint32_t count = degree_of(e, r);
  for (uint32_t m = 0; m < count; m++) {
    float *dz = z->dz_t + variables[m] * z->length + n;
    multiply_columns(z, variables, count, m, weight, n, others);
    for (uint32_t i = 0; i < STRIP; i += 4)
      f32x4_store(dz + i, f32x4_madd(f32x4_load(others + i), f32x4_load(dphi + i), f32x4_load(dz + i)));
  }
}

// lanes [8][32] = what a batch gave, for each slot (r, c):
//   sums_c += w_r phi_r(z) lane, c >= sums_first       gradient: dphi_r += w_r w_c lane, and on to dz
RA_KERNEL void unpack_strip(const toeplitz *e, const side *z, slots s, const float *weights, size_t n,
                            const float *lanes, float *sums, uint32_t sums_first, int gradient) {
  float phi[STRIP], dphi[STRIP];
  uint32_t g = e->f.degree, r = (uint32_t)(s.first / e->columns), c = (uint32_t)(s.first % e->columns);
  for (uint32_t slot = 0; slot < s.count; slot++, lanes += STRIP) {
    float weight = weights ? weights[r] : 1;
    if (slot == 0 || c == 0) {
      if (sums) multiply_columns(z, e->variables + (size_t)r * g, degree_of(e, r), UINT32_MAX, weight, n, phi);
      ra_fill(dphi, STRIP, 0);
    }
    const float *column = z->w_t + c * z->length + n;
    float *sum = sums && c >= sums_first ? sums + (c - sums_first) * z->length + n : NULL;
    for (uint32_t i = 0; i < STRIP; i += 4) {
      f32x4 lane = f32x4_load(lanes + i);
      if (sum) f32x4_store(sum + i, f32x4_madd(f32x4_load(phi + i), lane, f32x4_load(sum + i)));
      if (gradient) f32x4_store(dphi + i, f32x4_madd(f32x4_load(column + i), lane, f32x4_load(dphi + i)));
    }
    if (gradient && (c + 1 == e->columns || slot + 1 == s.count)) add_jacobian(e, z, r, weight, n, dphi);
    if (++c == e->columns) c = 0, r++;
  }
}

// --- Batches ------------------------------------------------------------------------------------------------------

// Spectra of the slots of the keys, or of the queries of all heads together with weights.
static void transform(const toeplitz *e, int queries, slots s, float *spectra) {
  const ra_convolution *c = &e->state->convolution;
  float lanes[RA_COLUMNS * STRIP];
  uint32_t heads = queries ? e->together : 1, blocks = queries ? c->rows : c->columns;
  for (uint32_t block = 0; block < blocks; block++) {
    for (uint32_t n = 0; n < c->S; n += STRIP) {
      ra_fill(lanes, RA_COLUMNS * STRIP, 0);
      for (uint32_t h = 0; h < heads; h++) {
        side z = queries ? queries_of(e, h) : e->keys;
        pack_strip(e, &z, s, queries ? e->weights : NULL, (size_t)block * c->S + n, lanes);
      }
      ra_convolution_put(c, n, lanes);
    }
    ra_convolution_transform(c, block, spectra);
  }
}

// What the keys give to queries: numerators and denominators, or (backward) dx.
static void give_to_queries(const toeplitz *e, uint32_t pass, slots s, const float *spectra) {
  const ra_convolution *c = &e->state->convolution;
  float lanes[RA_COLUMNS * STRIP];
  for (uint32_t block = 0; block < c->rows; block++) {
    ra_convolution_invert(c, block, spectra);
    for (uint32_t n = 0; n < c->S; n += STRIP) {
      ra_convolution_get(c, n, lanes);
      for (uint32_t h = 0; h < e->together; h++) {
        side z = queries_of(e, h);
        float *sums = pass == RA_FORWARD ? z.w_t : NULL;
        unpack_strip(e, &z, s, e->weights, (size_t)block * c->S + n, lanes, sums, 0, pass == RA_BACKWARD);
      }
    }
  }
}

// What the queries give to keys: du and dy.
static void give_to_keys(const toeplitz *e, slots s, const float *spectra) {
  const ra_convolution *c = &e->state->convolution;
  float lanes[RA_COLUMNS * STRIP];
  for (uint32_t block = 0; block < c->columns; block++) {
    ra_convolution_invert(c, block, spectra);
    for (uint32_t n = 0; n < c->S; n += STRIP) {
      ra_convolution_get(c, n, lanes);
      unpack_strip(e, &e->keys, s, NULL, (size_t)block * c->S + n, lanes, e->keys.dw_t, 1, 1);
    }
  }
}

static void run_batch(const toeplitz *e, uint32_t pass, uint32_t batch) {
  const ra_convolution *c = &e->state->convolution;
  slots s = slots_of(e, batch);
  if (c->least > c->most) return; // all pairs that count are near
  transform(e, 0, s, e->spectra);
  if (pass == RA_BACKWARD) {
    transform(e, 1, s, e->spectra2);
    if (c->change) ra_convolution_correlate(c, e->spectra, e->spectra2);
    ra_convolution_multiply(c, 1, e->spectra2);
    give_to_keys(e, s, e->spectra2);
  }
  ra_convolution_multiply(c, 0, e->spectra);
  give_to_queries(e, pass, s, e->spectra);
}

// --- Near pairs ---------------------------------------------------------------------------------------------------

// Keys near queries i .. i + 31, from and up to multiples of 8.
static ra_range near_keys(const toeplitz *e, uint32_t i) {
  int64_t ahead = e->state->ahead, position = (int64_t)i + e->p->query_offset;
  int64_t first = position - NEAR + 1, end = position + STRIP + ahead;
  if (first < 0) first = 0;
  if (end > (int64_t)e->Nk) end = (int64_t)e->Nk;
  if (ahead >= NEAR || end <= first) return (ra_range){0, 0};
  return (ra_range){(uint32_t)first / 8 * 8, ((uint32_t)end + 7) / 8 * 8};
}

// The entry of near and far for i - j.
static const float *at_lag(const toeplitz *e, const float *lags, uint32_t i, uint32_t j) {
  return lags + EDGE + ((int64_t)i - j + (int64_t)e->Nk - 1);
}

// a[key][32] = exp(x.y) E
RA_KERNEL void near_weights(const toeplitz *e, const side *x, uint32_t i, ra_range keys) {
  const ra_exp2_constants *constants = ra_exp2_load();
  f32x4 to_log2 = f32x4_splat((float)RA_LOG2_E), zero = f32x4_splat(0);
  uint32_t count = keys.end - keys.first;
  ra_fill(e->a, (size_t)count * STRIP, 0);
  for (uint32_t c = 0; c < STRIP; c += 8)
    ra_add_columns(e->keys.z_t + keys.first, e->keys.length, count, x->z_t + i + c, x->length, e->D, e->a + c, STRIP);
  for (uint32_t n = 0; n < count; n++) {
    const float *lag = at_lag(e, e->near, i, keys.first + n);
    for (uint32_t c = 0; c < STRIP; c += 4) {
      f32x4 exponent = f32x4_mul(f32x4_load(e->a + n * STRIP + c), to_log2), E = f32x4_load(lag + c);
      f32x4 weight = f32x4_mul(E, ra_exp2(f32x4_min(f32x4_splat(128), exponent), constants));
      f32x4_store(e->a + n * STRIP + c, f32x4_where_less(zero, E, weight, zero));
    }
  }
}

// y[r][at .. at + 7] += sum_n rows[r][n] weights[n][8]
static void add_eight(const toeplitz *e, const float *rows, size_t length, uint32_t count, const float *weights,
                      size_t weights_row, uint32_t terms, float *y, size_t y_length) {
  ra_set_rows(rows, length, count, weights, weights_row, terms, e->sums, 8);
  for (uint32_t r = 0; r < count; r++)
    for (uint32_t c = 0; c < 8; c++) y[r * y_length + c] += e->sums[r * 8 + c];
}

RA_KERNEL void near_forward(const toeplitz *e, const side *x, uint32_t i) {
  ra_range keys = near_keys(e, i);
  if (keys.first == keys.end) return;
  near_weights(e, x, i, keys);
  for (uint32_t c = 0; c < STRIP; c += 8)
    add_eight(e, e->keys.w_t + keys.first, e->keys.length, e->columns, e->a + c, STRIP, keys.end - keys.first,
              x->w_t + i + c, x->length);
}

RA_KERNEL void near_backward(const toeplitz *e, const side *x, uint32_t i, float *dbias) {
  const side *y = &e->keys;
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

// --- Preparation --------------------------------------------------------------------------------------------------

// One column: its mean goes out. Float sums of 32, double sums of those.
RA_KERNEL float centre(float *column, size_t count) {
  double sum = 0;
  for (size_t n = 0; n < count; n += STRIP) {
    float strip = 0;
    for (size_t i = n; i < n + STRIP && i < count; i++) strip += column[i];
    sum += strip;
  }
  float mean = (float)(sum / (double)count);
  for (size_t n = 0; n < count; n++) column[n] -= mean;
  return mean;
}

// z_t of the queries of a head, or of the keys.
RA_KERNEL void load_tokens(const toeplitz *e, const side *z, int queries, const float *from) {
  ra_rotary *rotary = queries ? &e->state->q_rotary : &e->state->k_rotary;
  size_t row = queries ? e->q_row : e->k_row, tokens = queries ? e->Nq : e->Nk;
  ra_fill(z->z_t, e->D * z->length, 0);
  for (size_t n = 0; n < tokens; n += STRIP) {
    uint32_t count = (uint32_t)(tokens - n < STRIP ? tokens - n : STRIP);
    ra_rotary_rows(rotary, from + n * row, row, e->rows, e->D, count, (uint32_t)n, RA_ROTATE,
                   queries ? e->p->scale : 1);
    ra_transpose(e->rows, e->D, count, e->D, z->z_t + n, z->length);
  }
}

static void load_keys(const toeplitz *e, const float *k, const float *v) {
  const side *z = &e->keys;
  load_tokens(e, z, 0, k);
  for (uint32_t d = 0; d < e->D; d++) e->k_mean[d] = centre(z->z_t + d * z->length, e->Nk);
  ra_fill(z->w_t, e->columns * z->length, 0);
  ra_fill(z->w_t, e->Nk, 1);
  ra_transpose(v, e->v_row, e->Nk, e->Dv, z->w_t + z->length, z->length);
  for (uint32_t d = 0; d < e->Dv; d++) e->v_mean[d] = centre(z->w_t + (d + 1) * z->length, e->Nk);
}

// The row constant that centring keys took off the scores of query i.
static double shift_of(const toeplitz *e, const side *x, size_t i) {
  double shift = 0;
  for (uint32_t d = 0; d < e->D; d++) shift += (double)x->z_t[d * x->length + i] * e->k_mean[d];
  return shift;
}

// h = [-delta, dout] / denominator, from lse = log denominator + x.mean + top.
RA_KERNEL void load_gradients(const toeplitz *e, const side *x, const float *out, const float *lse, const float *dout) {
  ra_transpose(dout, e->out_row, e->Nq, e->Dv, x->w_t + x->length, x->length);
  for (size_t i = 0; i < e->Nq; i++) {
    int seen = lse[i] != -INFINITY;
    float inverse = seen ? (float)exp(shift_of(e, x, i) + e->state->top - lse[i]) : 0;
    double delta = 0;
    for (uint32_t d = 0; d < e->Dv; d++) {
      delta += (double)dout[i * e->out_row + d] * (out[i * e->out_row + d] - e->v_mean[d]);
      x->w_t[(d + 1) * x->length + i] *= inverse;
    }
    x->w_t[i] = seen ? (float)-delta * inverse : 0;
  }
}

// Whether pairs at this distance, entry n of the bias, may see one another.
static int counts(const ra_problem *p, const float *bias, int64_t distance, size_t n) {
  if (p->causal && distance < 0) return 0;
  if (p->window_left >= 0 && distance > p->window_left) return 0;
  if (p->window_right >= 0 && -distance > p->window_right) return 0;
  return !bias || bias[n] * (float)RA_LOG2_E >= RA_FORBIDDEN;
}

// near and far of a bias [Nq + Nk - 1], or of none.
RA_KERNEL void load_lags(const toeplitz *e, const float *bias) {
  size_t lags = e->Nq + e->Nk - 1;
  int64_t first = (int64_t)e->p->query_offset - (int64_t)e->Nk + 1; // distance of entry 0
  float top = -INFINITY;
  e->state->ahead = NEAR;
  for (size_t n = lags; n-- > 0;) {
    if (!counts(e->p, bias, first + (int64_t)n, n)) continue;
    e->state->ahead = -(first + (int64_t)n);
    if (!bias) top = 0;
    else if (!(bias[n] <= top)) top = bias[n];
  }
  e->state->top = top;
  ra_fill(e->near, lags + 2 * EDGE, 0), ra_fill(e->far, lags + 2 * EDGE, 0);
  for (size_t n = 0; n < lags; n++) {
    int64_t distance = first + (int64_t)n;
    if (!counts(e->p, bias, distance, n)) continue;
    float *to = e->state->ahead < NEAR && distance < NEAR ? e->near : e->far;
    to[EDGE + n] = bias ? (float)exp((double)bias[n] - top) : 1;
  }
}

// --- Jobs: query heads that go together, with their key/value head --------------------------------------------------

typedef struct heads {
  size_t first, kv;  // query head and key/value head, flat
  size_t k, v, lags; // where these begin
  int starts, ends;  // the first, the last job of its key/value head
} heads;

static heads heads_of(const toeplitz *e, uint32_t job) {
  const ra_problem *p = e->p;
  uint32_t jobs = ra_group(p) / e->together;
  heads at = {.first = (size_t)job * e->together, .kv = job / jobs};
  at.k = ra_head(p, at.kv, p->kv_heads, e->Nk, e->D), at.v = ra_head(p, at.kv, p->kv_heads, e->Nk, e->Dv);
  at.lags = p->bias_heads > 1 ? at.first % p->heads * (e->Nq + e->Nk - 1) : 0;
  at.starts = job % jobs == 0, at.ends = job % jobs == jobs - 1;
  return at;
}

static void prepare(const toeplitz *e, const ra_arrays *x, uint32_t pass, heads at) {
  const ra_problem *p = e->p;
  ra_features_weights(&e->f, p->coefficients + at.kv * (e->f.degree + 1), e->weights, e->run);
  ra_rotary_batch(&e->state->q_rotary, p, 1, (uint32_t)(at.kv / p->kv_heads));
  ra_rotary_batch(&e->state->k_rotary, p, 0, (uint32_t)(at.kv / p->kv_heads));
  load_lags(e, p->bias ? p->bias + at.lags : NULL);
  ra_convolution_kernel(&e->state->convolution, e->far + EDGE);
  load_keys(e, x->k + at.k, x->v + at.v);
  if (pass == RA_BACKWARD) ra_fill(e->keys.dz_t, (e->D + e->Dv) * e->keys.length, 0);
  for (uint32_t h = 0; h < e->together; h++) {
    side z = queries_of(e, h);
    size_t head = at.first + h, out = ra_head(p, head, p->heads, e->Nq, e->Dv);
    load_tokens(e, &z, 1, x->q + ra_head(p, head, p->heads, e->Nq, e->D));
    ra_fill(z.w_t, e->columns * z.length, 0);
    if (pass == RA_FORWARD) continue;
    load_gradients(e, &z, x->out + out, x->lse + head * e->Nq, x->dout + out);
    ra_fill(z.dz_t, e->D * z.length, 0);
  }
  for (size_t j = 0; pass == RA_BACKWARD && at.starts && j < e->Nk; j++) {
    ra_fill(x->dk + at.k + j * e->k_row, e->D, 0);
    ra_fill(x->dv + at.v + j * e->v_row, e->Dv, 0);
  }
}

// Keys that query i sees: how many distances count.
static size_t count_seen(const toeplitz *e, size_t first, size_t end) {
  size_t seen = 0;
  for (size_t n = first; n < end; n++) seen += e->near[EDGE + n] > 0 || e->far[EDGE + n] > 0;
  return seen;
}

// Entries first .. end - 1 of the far distances come or go (sign -1): how many count, and their sum.
typedef struct far_sum {
  size_t count;
  double sum;
} far_sum;

static void slide(const toeplitz *e, size_t first, size_t end, int sign, far_sum *s) {
  for (const float *lag = e->far + EDGE + first; first < end; first++, lag++) {
    s->count += *lag > 0 ? (size_t)sign : 0;
    s->sum += sign * (double)*lag;
  }
}

// What queries have from far keys is complete, but for slot 0 of denominators; where there are no far keys it is rounding.
RA_KERNEL void settle_queries(const toeplitz *e, uint32_t pass, const side *x) {
  far_sum far = {0, 0};
  slide(e, 0, e->Nk - 1, 1, &far);
  for (size_t i = 0; i < e->Nq; i++) {
    slide(e, i + e->Nk - 1, i + e->Nk, 1, &far); // key 0
    uint32_t rows = pass == RA_FORWARD ? e->columns : e->D;
    float *at = (pass == RA_FORWARD ? x->w_t : x->dz_t) + i;
    for (uint32_t r = 0; far.count == 0 && r < rows; r++) at[r * x->length] = 0;
    if (pass == RA_FORWARD && far.count > 0) at[0] += e->weights[0] * (float)far.sum;
    slide(e, i, i + 1, -1, &far); // the last key
  }
}

// Likewise what keys have from far queries.
RA_KERNEL void settle_keys(const toeplitz *e) {
  far_sum far = {0, 0};
  slide(e, e->Nk - 1, e->Nk - 1 + e->Nq, 1, &far);
  for (size_t j = 0; j < e->Nk; j++) {
    for (uint32_t r = 0; far.count == 0 && r < e->D + e->Dv; r++) e->keys.dz_t[r * e->keys.length + j] = 0;
    if (j + 1 == e->Nk) break;
    slide(e, e->Nk - 2 - j, e->Nk - 1 - j, 1, &far);                  // query 0 to the next key
    slide(e, e->Nk - 2 - j + e->Nq, e->Nk - 1 - j + e->Nq, -1, &far); // the last query to this one
  }
}

// Slot 0 of dE: for each distance the sum of w_0 h over the queries that have a key at it.
RA_KERNEL void settle_lags(const toeplitz *e) {
  double sum = 0;
  for (size_t n = 0; n < e->Nq + e->Nk - 1; n++) { // i - j = n - Nk + 1: queries max(0, n - Nk + 1) .. min(Nq - 1, n)
    for (uint32_t h = 0; h < e->together; h++) {
      const float *own = e->queries.w_t + h * e->queries_step;
      if (n < e->Nq) sum += own[n];
      if (n >= e->Nk) sum -= own[n - e->Nk];
    }
    e->dlags[n] += e->weights[0] * (float)sum;
  }
}

// Denominators and numerators become out and lse.
RA_KERNEL void finish_queries(const toeplitz *e, const side *x, float *out, float *lse) {
  const float *denominator = x->w_t;
  size_t seen = count_seen(e, 0, e->Nk - 1);
  for (size_t i = 0; i < e->Nq; i++) {
    seen += count_seen(e, i + e->Nk - 1, i + e->Nk); // key 0
    float sum = denominator[i];
    int good = seen > 0 && sum > 0 && sum <= 3.4e38f;
    if (seen > 0 && !good) e->state->not_positive++;
    lse[i] = good ? (float)(log((double)sum) + shift_of(e, x, i) + e->state->top) : -INFINITY;
    for (uint32_t d = 0; d < e->Dv; d++) {
      float *at = x->w_t + (d + 1) * x->length + i;
      *at = good ? *at / sum + e->v_mean[d] : 0;
    }
    seen -= count_seen(e, i, i + 1); // the last key
  }
  ra_transpose(x->w_t + x->length, x->length, e->Dv, e->Nq, out, e->out_row);
}

// in the forward pass this was x = scale R q
RA_KERNEL void finish_gradients(const toeplitz *e, const side *x, float *dq) {
  for (size_t i = 0; i < e->Nq; i += STRIP) {
    uint32_t count = (uint32_t)(e->Nq - i < STRIP ? e->Nq - i : STRIP);
    ra_transpose(x->dz_t + i, x->length, e->D, count, e->rows, e->D);
    ra_rotary_rows(&e->state->q_rotary, e->rows, e->D, dq + i * e->q_row, e->q_row, count, (uint32_t)i,
                   RA_ROTATE_TRANSPOSE, e->p->scale);
  }
}

// dk, dv grow by what this job gave to them; at the last one dk, so far the gradient by y = R k - mean, loses its mean (the path
// through the mean) and is rotated back.
RA_KERNEL void finish_keys(const toeplitz *e, float *dk, float *dv, int ends) {
  const side *y = &e->keys;
  for (size_t j = 0; j < e->Nk; j++)
    for (uint32_t d = 0; d < e->Dv; d++) dv[j * e->v_row + d] += y->dw_t[d * y->length + j];
  for (uint32_t d = 0; d < e->D; d++) {
    float *dy = y->dz_t + d * y->length;
    for (size_t j = 0; j < e->Nk; j++) dy[j] += dk[j * e->k_row + d];
    if (ends) centre(dy, e->Nk);
  }
  for (size_t j = 0; j < e->Nk; j += STRIP) {
    uint32_t count = (uint32_t)(e->Nk - j < STRIP ? e->Nk - j : STRIP);
    float *to = dk + j * e->k_row;
    ra_transpose(y->dz_t + j, y->length, e->D, count, to, e->k_row);
    if (ends)
      ra_rotary_rows(&e->state->k_rotary, to, e->k_row, to, e->k_row, count, (uint32_t)j, RA_ROTATE_TRANSPOSE, 1);
  }
}

static void finish(const toeplitz *e, const ra_arrays *x, uint32_t pass, heads at) {
  const ra_problem *p = e->p;
  float *dbias = pass == RA_BACKWARD && p->bias && x->dbias ? x->dbias + at.lags : NULL;
  if (pass == RA_BACKWARD) settle_keys(e);
  for (uint32_t h = 0; h < e->together; h++) {
    side z = queries_of(e, h);
    size_t head = at.first + h;
    settle_queries(e, pass, &z);
    for (uint32_t i = 0; i < e->Nq; i += STRIP) {
      if (pass == RA_FORWARD) near_forward(e, &z, i);
      else near_backward(e, &z, i, dbias);
    }
    if (pass == RA_FORWARD)
      finish_queries(e, &z, x->out + ra_head(p, head, p->heads, e->Nq, e->Dv), x->lse + head * e->Nq);
    else finish_gradients(e, &z, x->dq + ra_head(p, head, p->heads, e->Nq, e->D));
  }
  if (pass == RA_FORWARD) return;
  finish_keys(e, x->dk + at.k, x->dv + at.v, at.ends);
  if (!dbias) return;
  ra_convolution_change(&e->state->convolution, e->dlags); // in the forward pass this was E = exp(b)
  settle_lags(e);
  for (size_t n = 0; n < e->Nq + e->Nk - 1; n++) dbias[n] += e->far[EDGE + n] * e->dlags[n];
}

// --- Units --------------------------------------------------------------------------------------------------------
//
// For each job: one to prepare, one for each batch, one to finish.

static uint64_t count_units(const ra_problem *p) {
  size_t rank = ra_rank(p->head_dim, p->degree);
  uint64_t jobs = (uint64_t)p->batch * p->heads / heads_together(p);
  uint64_t batches = ((uint64_t)rank * (p->value_dim + 1) + RA_COLUMNS - 2) / RA_COLUMNS;
  return jobs > UINT32_MAX / (batches + 2) ? UINT64_MAX : jobs * (batches + 2);
}

int ra_toeplitz_fits(const ra_problem *p) { return count_units(p) <= UINT32_MAX; }

static uint32_t units(const ra_problem *p, uint32_t pass) {
  (void)pass;
  return (uint32_t)count_units(p);
}

static int run(const ra_problem *p, const ra_arrays *x, uint32_t pass, void *workspace, uint32_t first, uint32_t last) {
  ra_workspace_cursor cursor = {workspace, 0, 0};
  toeplitz e = arrange(p, pass, &cursor);
  if (first == 0) {
    e.state->not_positive = 0;
    ra_rotary_init(&e.state->q_rotary, p, 1, NULL, e.q_space);
    ra_rotary_init(&e.state->k_rotary, p, 0, &e.state->q_rotary, e.k_space);
    ra_convolution_init(&e.state->convolution);
    list_variables(&e);
    if (pass == RA_BACKWARD && p->bias && x->dbias) ra_fill(x->dbias, p->bias_heads * (e.Nq + e.Nk - 1), 0);
  }
  for (uint32_t unit = first; unit < last; unit++) {
    uint32_t job = unit / (e.batches + 2), at = unit % (e.batches + 2);
    heads own = heads_of(&e, job);
    if (at == 0) prepare(&e, x, pass, own);
    else if (at <= e.batches) run_batch(&e, pass, at - 1);
    else finish(&e, x, pass, own);
  }
  return last == units(p, pass) && e.state->not_positive > 0 ? RA_NOT_POSITIVE : RA_OK;
}

const ra_engine ra_toeplitz_engine = {layout, units, run};
