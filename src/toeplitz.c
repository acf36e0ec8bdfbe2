// SPDX-License-Identifier: MIT
//
// The papers' own algorithm: polynomial features and Toeplitz matrices, multiplied by fast Fourier transforms. With
// exp(s) ~ p(s) of degree g and any bias b by distance, masks that depend on distance being b = -infinity,
//
//   A_ij = E_{i-j} p(s_ij) = sum_r w_r Re(conj(phi_r(x_i)) T_r(i-j) phi_r(y_j)),   E_t = exp(b_t),   T_r(t) = E_t times maps of t
//
// so that A u = sum_r Re(diag(w_r conj(phi_r(x))) T_r diag(phi_r(y)) u), T_r Toeplitz matrices. What the terms r are,
// and how many, is said in terms.c. Where rotations factorise all have one T = E: x_i = scale R q_i, y_j = R k_j -
// mean, and the engine is exact in the bias whatever it looks like, which no state of constant size can be. With a
// relative map, scores q_i W_{i-j} k_j or rotations by any f(i-j), each term has its own. u_j = [1, v_j - mean], 1
// times a power of two that values are of. O(N terms (Dv + 1) (log S + N/S)) time with blocks of S up to 2^14
// (convolution.h); O(N (D + Dv)) workspace.
//
// Backward is the derivative of exactly this function. With h_i = [-delta_i, dout_i] / denominator_i, X_r = w_r phi_r(x):
//
//   G = T_r phi_r(y) u     dphi_r(x_i) = w_r h_i . G_i                             (forward: numerators Re(conj(X_r) G))
//   H = T_r^H X_r h        dphi_r(y_j) = u_j . H_j,   du_j = sum_r Re(conj(phi_r(y_j)) H_j)
//   dT_r = conj(sum over columns of corr(phi_r(y) u, X_r h)),   dE_t = sum_r Re(dT_r T_r / E)_t,   dW likewise
//
// which are the products of the forward pass, as many with the adjoint, and correlations of the same spectra.
//
// Where few keys are in sight of the first queries (causal, or a narrow right side), pairs nearer than 64 are done
// exactly (near.c).
//
// This work is based on:
//   Alman, Song. Fast RoPE Attention: Combining the Polynomial Method and Fast Fourier Transform. 2025 (2505.11892)
//   Cao, Huo, Liang, Shi, Song. RoPE Attention Can Be Trained in Almost Linear Time. 2024 (2412.17316v3)

#include "toeplitz.h"

#include <math.h>
#include <string.h>

#include "elementary.h"
#include "pack.h"
#include "softmax.h"

enum { STRIP = RA_STRIP, NEAR = RA_NEAR, EDGE = RA_EDGE };

// The least sum of weights of a row, over the largest E of all: below it weights, which are floats, have nothing left
// to lose, nor have gradients, which go by the inverse.
static const float LEAST_SUM = 0x1p-80f;

static uint32_t heads_together(const ra_problem *p) { return p->bias && p->bias_heads > 1 ? 1 : ra_group(p); }

static void take_side(ra_side *z, uint32_t heads, size_t length, const ra_toeplitz *e, int backward,
                      ra_workspace_cursor *w) {
  size_t floats = e->D + e->columns + e->parts;
  if (backward) floats += e->D + e->parts + (z->queries ? 0 : e->Dv);
  if (heads > UINT32_MAX / floats) w->overflow = 1;
  z->length = length;
  z->z_t = ra_take_floats(w, heads * floats, length);
  if (!z->z_t) return; // only counting
  z->w_t = z->z_t + e->D * length;
  z->phi = z->w_t + e->columns * length;
  z->dphi = z->phi + e->parts * length;
  z->dz_t = z->dphi + e->parts * length;
  z->dw_t = z->dz_t + e->D * length;
}

// Batches of a group, of real terms or of complex ones.
static uint32_t steps_of(const ra_toeplitz *e, int complex) {
  return complex ? e->columns : ra_ceil_div(e->columns, 2);
}

// Real terms that do not fill a group of their own join complex ones where that makes fewer batches.
static void count_groups(ra_toeplitz *e, uint32_t terms, uint32_t real) {
  uint32_t rest = real % RA_LANES;
  uint64_t apart = steps_of(e, 0) + (uint64_t)ra_ceil_div(terms - real, RA_LANES) * steps_of(e, 1);
  uint64_t joined = (uint64_t)ra_ceil_div(terms - real + rest, RA_LANES) * steps_of(e, 1);
  e->real_groups = real / RA_LANES + (rest > 0 && apart < joined);
  uint32_t slots = e->real_groups * RA_LANES;
  e->groups = e->real_groups + (slots < terms ? ra_ceil_div(terms - (slots < real ? slots : real), RA_LANES) : 0);
}

// What follows from the problem alone.
static ra_toeplitz measure(const ra_problem *p) {
  ra_toeplitz e = {.p = p, .D = p->head_dim, .Dv = p->value_dim, .columns = p->value_dim + 1};
  size_t terms = ra_terms_count(p), real = ra_terms_real(p);
  e.own = ra_is_relative(p), e.complex = p->relative_positions != NULL;
  e.parts = e.complex ? 2 * RA_LANES : RA_LANES;
  count_groups(&e, (uint32_t)terms, (uint32_t)real); // RA_SIZE_OVERFLOW, which fits nothing, stays as large
  e.Nq = p->query_length, e.Nk = p->key_length, e.lags = ra_diagonals(p);
  e.together = heads_together(p);
  e.q_row = ra_row(p, p->heads, e.D), e.k_row = ra_row(p, p->kv_heads, e.D);
  e.v_row = ra_row(p, p->kv_heads, e.Dv), e.out_row = ra_row(p, p->heads, e.Dv);
  return e;
}

// The convolution is filled unless it was before, which is when `w` counts only or at the first unit.
static ra_toeplitz arrange(const ra_problem *p, uint32_t pass, ra_workspace_cursor *w) {
  ra_toeplitz e = measure(p);
  size_t rank = ra_rank(ra_terms_variables(p), p->degree), wider = e.D > e.Dv ? e.D : e.Dv;
  int backward = pass == RA_BACKWARD, change = backward && (p->bias || p->support_count);
  e.state = ra_take(w, 1, 1, sizeof(ra_toeplitz_state));
  e.q_space = ra_take(w, 1, ra_rotary_bytes(p), 1);
  e.k_space = ra_take(w, 1, ra_rotary_bytes(p), 1);
  e.tail = ra_take(w, 1, ra_features_cells(ra_terms_variables(p), p->degree), sizeof(uint32_t));
  e.weights = ra_take_floats(w, rank, 1);
  e.run = ra_take(w, rank, 1, 1);
  e.variables = ra_take(w, rank, p->degree + 1, sizeof(uint16_t));
  e.monomial = ra_take(w, e.groups, RA_LANES, sizeof(uint32_t));
  if (e.complex) e.phases = ra_take_floats(w, p->rotary_dim, e.lags);
  e.near = ra_take_floats(w, e.lags + 2 * EDGE, 1);
  e.far = ra_take_floats(w, e.lags + 2 * EDGE, 1);
  if (e.own) e.kernels = ra_take_floats(w, 2 * RA_LANES, e.lags);
  if (change) e.dlags = ra_take_floats(w, e.own ? 2 * RA_LANES : 1, e.lags);
  e.k_mean = ra_take_floats(w, e.D, 1);
  e.v_mean = ra_take_floats(w, e.Dv, 1);
  e.rows = ra_take_floats(w, STRIP, wider);
  e.sums = ra_take_floats(w, wider + 1, 8);
  e.a = ra_take_floats(w, RA_NEAR_KEYS, STRIP);
  e.ds = ra_take_floats(w, RA_NEAR_KEYS, STRIP);
  e.a_t = ra_take_floats(w, STRIP, RA_NEAR_KEYS);
  e.ds_t = ra_take_floats(w, STRIP, RA_NEAR_KEYS);
  if (e.own) {
    e.window = ra_take_floats(w, e.D + e.columns, RA_NEAR_KEYS);
    e.dwindow = ra_take_floats(w, e.D + e.columns, RA_NEAR_KEYS);
    e.map = ra_take_floats(w, ra_near_entries(p), 1);
  }
  ra_convolution c;
  uint32_t S = ra_convolution_block(p->query_length, p->key_length);
  ra_convolution_layout(&c, p->query_length, p->key_length, S, e.own, change, w);
  e.queries.queries = 1;
  take_side(&e.keys, 1, (size_t)c.columns * S, &e, backward, w);
  take_side(&e.queries, e.together, (size_t)c.rows * S, &e, backward, w);
  e.queries_step = (e.D + e.columns + e.parts + (backward ? e.D + e.parts : 0)) * e.queries.length;
  e.spectra = ra_take_floats(w, ra_convolution_floats(&c), 1);
  if (backward) e.spectra2 = ra_take_floats(w, ra_convolution_floats(&c), 1);
  if (w->base) {
    c.least = e.state->convolution.least, c.most = e.state->convolution.most; // of the kernel that is there, if any
    e.state->convolution = c;
    ra_features_init(&e.f, ra_terms_variables(p), p->degree, e.tail);
  }
  return e;
}

static void layout(const ra_problem *p, uint32_t pass, ra_workspace_cursor *w) { arrange(p, pass, w); }

static ra_side queries_of(const ra_toeplitz *e, uint32_t h) {
  ra_side z = e->queries;
  size_t step = h * e->queries_step;
  z.z_t += step, z.w_t += step, z.phi += step, z.dphi += step, z.dz_t += step, z.dw_t = NULL;
  return z;
}

// --- Batches ------------------------------------------------------------------------------------------------------
//
// A batch is a group of four terms, one in each lane, times one column of u, or of h: complex terms have a complex
// product with it. Real terms take two columns, one as the real part and one as the imaginary part.

typedef struct batch {
  uint32_t group, step, steps; // step of so many
  int complex;
} batch;

static uint64_t batches_of(const ra_toeplitz *e) {
  return (uint64_t)e->real_groups * steps_of(e, 0) + (uint64_t)(e->groups - e->real_groups) * steps_of(e, 1);
}

static batch batch_at(const ra_toeplitz *e, uint32_t n) {
  uint32_t real = e->real_groups * steps_of(e, 0);
  int complex = n >= real;
  uint32_t steps = steps_of(e, complex), at = complex ? n - real : n;
  return (batch){(complex ? e->real_groups : 0) + at / steps, at % steps, steps, complex};
}

// Row n of a batch, 0 .. 7, is row `part_of` of phi times this column; one that there is not for the second of a last
// pair. Nor for the first term, a constant, with the first column, of ones: what that gives are sums of E
// (settle_queries, settle_lags).
static uint32_t part_of(batch b, uint32_t n) { return b.complex ? n : n % RA_LANES; }

static uint32_t column_of(batch b, uint32_t n) {
  uint32_t column = b.complex ? b.step : 2 * b.step + n / RA_LANES;
  return b.group == 0 && n % RA_LANES == 0 && column == 0 ? UINT32_MAX : column;
}

// lanes [8][32] += phi times column.
RA_KERNEL void pack_strip(const ra_toeplitz *e, const ra_side *z, batch b, size_t at, float *lanes) {
  for (uint32_t n = 0; n < RA_COLUMNS; n++, lanes += STRIP) {
    uint32_t column = column_of(b, n);
    if (column < e->columns)
      ra_add_products(z->phi + part_of(b, n) * z->length + at, z->w_t + column * z->length + at, lanes);
  }
}

// What a batch gave, lanes [8][32]: sums += phi times lane, of columns `first` and on; dphi += column times lane.
RA_KERNEL void unpack_strip(const ra_toeplitz *e, const ra_side *z, batch b, size_t at, const float *lanes, float *sums,
                            uint32_t first, int gradient) {
  for (uint32_t n = 0; n < RA_COLUMNS; n++, lanes += STRIP) {
    uint32_t column = column_of(b, n);
    if (column >= e->columns) continue;
    size_t part = part_of(b, n) * z->length + at;
    if (sums && column >= first) ra_add_products(z->phi + part, lanes, sums + (column - first) * z->length + at);
    if (gradient) ra_add_products(z->w_t + column * z->length + at, lanes, z->dphi + part);
  }
}

// Spectra of a batch of the keys, or of the queries of all heads together.
static void transform(const ra_toeplitz *e, int queries, batch b, float *spectra) {
  const ra_convolution *c = &e->state->convolution;
  float lanes[RA_COLUMNS * STRIP];
  uint32_t heads = queries ? e->together : 1, blocks = queries ? c->rows : c->columns;
  for (uint32_t block = 0; block < blocks; block++) {
    for (uint32_t n = 0; n < c->S; n += STRIP) {
      ra_fill(lanes, RA_COLUMNS * STRIP, 0);
      for (uint32_t h = 0; h < heads; h++) {
        ra_side z = queries ? queries_of(e, h) : e->keys;
        pack_strip(e, &z, b, (size_t)block * c->S + n, lanes);
      }
      ra_convolution_put(c, n, lanes);
    }
    ra_convolution_transform(c, block, spectra);
  }
}

// What keys give to the queries: numerators and denominators, or (backward) dphi; what queries give to the keys: du and dphi.
static void give(const ra_toeplitz *e, int queries, uint32_t pass, batch b, const float *spectra) {
  const ra_convolution *c = &e->state->convolution;
  float lanes[RA_COLUMNS * STRIP];
  uint32_t heads = queries ? e->together : 1, blocks = queries ? c->rows : c->columns;
  for (uint32_t block = 0; block < blocks; block++) {
    ra_convolution_invert(c, block, spectra);
    for (uint32_t n = 0; n < c->S; n += STRIP) {
      ra_convolution_get(c, n, lanes);
      for (uint32_t h = 0; h < heads; h++) {
        ra_side z = queries ? queries_of(e, h) : e->keys;
        float *sums = pass == RA_FORWARD ? z.w_t : z.dw_t; // NULL for gradients of queries
        unpack_strip(e, &z, b, (size_t)block * c->S + n, lanes, sums, pass == RA_BACKWARD, pass == RA_BACKWARD);
      }
    }
  }
}

// How many of entries first .. end - 1 of the far distances count.
static size_t count_far(const ra_toeplitz *e, size_t first, size_t end) {
  size_t count = 0;
  for (; first < end; first++) count += e->far[EDGE + first] > 0;
  return count;
}

// Rows y [rows][length] of queries without far keys, where anything is rounding: 0.
RA_KERNEL void clear_blind(const ra_toeplitz *e, const ra_side *x, float *y, uint32_t rows) {
  size_t far = count_far(e, 0, e->Nk - 1);
  for (size_t i = 0; i < e->Nq; i++) {
    far += count_far(e, i + e->Nk - 1, i + e->Nk); // key 0
    for (uint32_t r = 0; far == 0 && r < rows; r++) y[r * x->length + i] = 0;
    far -= count_far(e, i, i + 1); // the last key
  }
}

// All pairs that count are near: there is nothing to transform.
static int nothing_is_far(const ra_toeplitz *e) { return e->state->convolution.least > e->state->convolution.most; }

static void begin_group(const ra_toeplitz *e, uint32_t pass, uint32_t group) {
  if (e->own) {
    ra_terms_kernels(e, group);
    ra_convolution_kernel(&e->state->convolution, e->kernels);
  }
  if (nothing_is_far(e)) return;
  for (uint32_t h = 0; h <= e->together; h++) {
    ra_side z = h < e->together ? queries_of(e, h) : e->keys;
    ra_terms_features(e, &z, group);
    if (pass == RA_FORWARD) continue;
    ra_fill(z.dphi, e->parts * z.length, 0);
    if (z.queries) clear_blind(e, &z, z.phi, e->parts); // whose h may be much larger than that of others
  }
}

static void end_group(const ra_toeplitz *e, uint32_t group, float *dbias, float *dweights) {
  if (nothing_is_far(e)) return;
  for (uint32_t h = 0; h <= e->together; h++) {
    ra_side z = h < e->together ? queries_of(e, h) : e->keys;
    ra_terms_jacobian(e, &z, group);
  }
  if (!e->own || !e->dlags) return;
  ra_convolution_change(&e->state->convolution, e->dlags);
  ra_terms_change(e, group, dbias, dweights);
}

static void run_batch(const ra_toeplitz *e, uint32_t pass, batch b) {
  const ra_convolution *c = &e->state->convolution;
  if (nothing_is_far(e)) return;
  transform(e, 0, b, e->spectra);
  if (pass == RA_BACKWARD) {
    transform(e, 1, b, e->spectra2);
    if (c->change) ra_convolution_correlate(c, e->spectra, e->spectra2);
    ra_convolution_multiply(c, 1, e->spectra2);
    give(e, 0, pass, b, e->spectra2);
  }
  ra_convolution_multiply(c, 0, e->spectra);
  give(e, 1, pass, b, e->spectra);
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

// With a relative map, y are keys as they are, x queries times this: `scale`, and the factors of both and half of a
// pair (terms.c).
static float scale_of(const ra_toeplitz *e, uint32_t d) {
  float factor = e->p->rotary_factor;
  return e->p->scale * (e->complex && d < e->p->rotary_dim ? factor * factor / 2 : 1);
}

static void scale_rows(const ra_toeplitz *e, float *z_t, size_t length) {
  for (uint32_t d = 0; d < e->D; d++)
    for (size_t n = 0; n < length; n++) z_t[d * length + n] *= scale_of(e, d);
}

// z_t of the queries of a head, or of the keys.
RA_KERNEL void load_tokens(const ra_toeplitz *e, const ra_side *z, const float *from) {
  ra_rotary *rotary = z->queries ? &e->state->q_rotary : &e->state->k_rotary;
  size_t row = z->queries ? e->q_row : e->k_row, tokens = z->queries ? e->Nq : e->Nk;
  ra_fill(z->z_t, e->D * z->length, 0);
  if (e->own) {
    ra_transpose(from, row, tokens, e->D, z->z_t, z->length);
    if (z->queries) scale_rows(e, z->z_t, z->length);
    return;
  }
  for (size_t n = 0; n < tokens; n += STRIP) {
    uint32_t count = (uint32_t)(tokens - n < STRIP ? tokens - n : STRIP);
    ra_rotary_rows(rotary, from + n * row, row, e->rows, e->D, count, (uint32_t)n, RA_ROTATE,
                   z->queries ? e->p->scale : 1);
    ra_transpose(e->rows, e->D, count, e->D, z->z_t + n, z->length);
  }
}

// The power of two above max |x|; 1 when all are 0.
RA_KERNEL float size_of(const float *x, size_t count) {
  float largest = 0;
  for (size_t n = 0; n < count; n++) largest = fabsf(x[n]) > largest ? fabsf(x[n]) : largest;
  int exponent = largest > 0 ? ra_exponent(largest) : 0;
  return ra_power_of_two(exponent < -60 ? -60 : exponent > 60 ? 60 : (float)exponent);
}

static void load_keys(const ra_toeplitz *e, const float *k, const float *v) {
  const ra_side *z = &e->keys;
  load_tokens(e, z, k);
  // with a relative map what the mean key gives is no constant of the row
  for (uint32_t d = 0; d < e->D; d++) e->k_mean[d] = e->own ? 0 : centre(z->z_t + d * z->length, e->Nk);
  ra_fill(z->w_t, e->columns * z->length, 0);
  ra_transpose(v, e->v_row, e->Nk, e->Dv, z->w_t + z->length, z->length);
  for (uint32_t d = 0; d < e->Dv; d++) e->v_mean[d] = centre(z->w_t + (d + 1) * z->length, e->Nk);
  e->state->one = size_of(z->w_t + z->length, e->Dv * z->length);
  ra_fill(z->w_t, e->Nk, e->state->one);
}

// The row constant that centring keys took off the scores of query i.
static double shift_of(const ra_toeplitz *e, const ra_side *x, size_t i) {
  double shift = 0;
  for (uint32_t d = 0; d < e->D; d++) shift += (double)x->z_t[d * x->length + i] * e->k_mean[d];
  return shift;
}

// h = [-delta, dout] / denominator, from lse = log denominator + x.mean + top.
RA_KERNEL void load_gradients(const ra_toeplitz *e, const ra_side *x, const float *out, const float *lse,
                              const float *dout) {
  ra_transpose(dout, e->out_row, e->Nq, e->Dv, x->w_t + x->length, x->length);
  for (size_t i = 0; i < e->Nq; i++) {
    int seen = lse[i] != -INFINITY;
    float inverse = seen ? (float)ra_exp_f64(shift_of(e, x, i) + e->state->top - lse[i]) : 0;
    if (inverse * LEAST_SUM > 1) e->state->not_positive++, seen = 0, inverse = 0;
    double delta = 0;
    for (uint32_t d = 0; d < e->Dv; d++) {
      delta += (double)dout[i * e->out_row + d] * (out[i * e->out_row + d] - e->v_mean[d]);
      x->w_t[(d + 1) * x->length + i] *= inverse;
    }
    x->w_t[i] = seen ? (float)(-delta / e->state->one) * inverse : 0;
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
RA_KERNEL void load_lags(const ra_toeplitz *e, const float *bias) {
  size_t lags = e->lags;
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
    to[EDGE + n] = bias ? (float)ra_exp_f64((double)bias[n] - top) : 1;
  }
}

// --- Jobs: query heads that go together, with their key/value head --------------------------------------------------

typedef struct heads {
  size_t first, kv;  // query head and key/value head, flat
  size_t k, v, lags; // where these begin
  int starts, ends;  // the first, the last job of its key/value head
} heads;

static heads heads_of(const ra_toeplitz *e, uint32_t job) {
  const ra_problem *p = e->p;
  uint32_t jobs = ra_group(p) / e->together;
  heads at = {.first = (size_t)job * e->together, .kv = job / jobs};
  at.k = ra_head(p, at.kv, p->kv_heads, e->Nk, e->D), at.v = ra_head(p, at.kv, p->kv_heads, e->Nk, e->Dv);
  at.lags = p->bias_heads > 1 ? at.first % p->heads * (e->lags) : 0;
  at.starts = job % jobs == 0, at.ends = job % jobs == jobs - 1;
  return at;
}

static const float *bias_of(const ra_toeplitz *e, heads at) { return e->p->bias ? e->p->bias + at.lags : NULL; }

static void prepare(const ra_toeplitz *e, const ra_arrays *x, uint32_t pass, heads at) {
  const ra_problem *p = e->p;
  ra_terms_weights(e, p->coefficients + at.kv * (e->f.degree + 1));
  ra_rotary_batch(&e->state->q_rotary, p, 1, (uint32_t)(at.kv / p->kv_heads));
  ra_rotary_batch(&e->state->k_rotary, p, 0, (uint32_t)(at.kv / p->kv_heads));
  load_lags(e, bias_of(e, at));
  if (!e->own) ra_convolution_kernel(&e->state->convolution, e->far + EDGE);
  load_keys(e, x->k + at.k, x->v + at.v);
  if (pass == RA_BACKWARD) ra_fill(e->keys.dz_t, (e->D + e->Dv) * e->keys.length, 0);
  for (uint32_t h = 0; h < e->together; h++) {
    ra_side z = queries_of(e, h);
    size_t head = at.first + h, out = ra_head(p, head, p->heads, e->Nq, e->Dv);
    load_tokens(e, &z, x->q + ra_head(p, head, p->heads, e->Nq, e->D));
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

// Keys that query i sees: how many distances count, those whose E is too small for a float too.
static size_t count_seen(const ra_toeplitz *e, const float *bias, size_t first, size_t end) {
  size_t seen = 0;
  for (size_t n = first; n < end; n++)
    seen += (size_t)counts(e->p, bias, e->p->query_offset - (int64_t)e->Nk + 1 + (int64_t)n, n);
  return seen;
}

// y[n - first] += factor times the sum of the last `width` of x[0] .. x[n], for n = first .. end - 1; x[length] and
// beyond are 0. A window is what is in it before a multiple of its width and what is in it behind: nothing large is
// added that would have to be subtracted again.
RA_KERNEL void add_windows(const float *x, size_t length, size_t width, float factor, size_t first, size_t end,
                           float *y) {
  double sum = 0;
  for (size_t n = 0; n < end; n++) {
    if (n % width == 0) sum = 0;
    if (n < length) sum += x[n];
    if (n >= first) y[n - first] += factor * (float)sum;
  }
  sum = 0;
  for (size_t n = length; n-- > 0;) {
    if ((n + 1) % width == 0) sum = 0;
    sum += x[n];
    size_t last = n + width - 1;
    if (n % width > 0 && last >= first && last < end) y[last - first] += factor * (float)sum;
  }
}

// What queries have from far keys is complete, but for slot 0 of denominators.
static void settle_queries(const ra_toeplitz *e, uint32_t pass, const ra_side *x) {
  clear_blind(e, x, pass == RA_FORWARD ? x->w_t : x->dz_t, pass == RA_FORWARD ? e->columns : e->D);
  if (pass == RA_FORWARD)
    add_windows(e->far + EDGE, e->lags, e->Nk, e->state->one * e->weights[0], e->Nk - 1, e->lags, x->w_t);
}

// Likewise what keys have from far queries.
RA_KERNEL void settle_keys(const ra_toeplitz *e) {
  size_t far = count_far(e, e->Nk - 1, e->Nk - 1 + e->Nq);
  for (size_t j = 0; j < e->Nk; j++) {
    for (uint32_t r = 0; far == 0 && r < e->D + e->Dv; r++) e->keys.dz_t[r * e->keys.length + j] = 0;
    if (j + 1 == e->Nk) break;
    far += count_far(e, e->Nk - 2 - j, e->Nk - 1 - j);                 // query 0 to the next key
    far -= count_far(e, e->Nk - 2 - j + e->Nq, e->Nk - 1 - j + e->Nq); // the last query to this one
  }
}

// Slot 0 of dE: for each distance the sum of w_0 h over the queries that have a key at it: i - j = n - Nk + 1 for queries
// max(0, n - Nk + 1) .. min(Nq - 1, n).
static void settle_lags(const ra_toeplitz *e) {
  for (uint32_t h = 0; h < e->together; h++)
    add_windows(e->queries.w_t + h * e->queries_step, e->Nq, e->Nk, e->state->one * e->weights[0], 0, e->lags,
                e->dlags);
}

// Denominators and numerators become out and lse.
RA_KERNEL void finish_queries(const ra_toeplitz *e, const ra_side *x, const float *bias, float *out, float *lse) {
  const float *denominator = x->w_t;
  size_t seen = count_seen(e, bias, 0, e->Nk - 1);
  for (size_t i = 0; i < e->Nq; i++) {
    seen += count_seen(e, bias, i + e->Nk - 1, i + e->Nk); // key 0
    float sum = denominator[i] / e->state->one;
    int good = seen > 0 && sum >= LEAST_SUM && sum <= 3.4e38f;
    if (seen > 0 && !good) e->state->not_positive++;
    lse[i] = good ? (float)(ra_log_f64((double)sum) + shift_of(e, x, i) + e->state->top) : -INFINITY;
    for (uint32_t d = 0; d < e->Dv; d++) {
      float *at = x->w_t + (d + 1) * x->length + i;
      *at = good ? *at / sum + e->v_mean[d] : 0;
    }
    seen -= count_seen(e, bias, i, i + 1); // the last key
  }
  ra_transpose(x->w_t + x->length, x->length, e->Dv, e->Nq, out, e->out_row);
}

// in the forward pass this was x = scale R q
RA_KERNEL void finish_gradients(const ra_toeplitz *e, const ra_side *x, float *dq) {
  if (e->own) {
    scale_rows(e, x->dz_t, x->length);
    ra_transpose(x->dz_t, x->length, e->D, e->Nq, dq, e->q_row);
    return;
  }
  for (size_t i = 0; i < e->Nq; i += STRIP) {
    uint32_t count = (uint32_t)(e->Nq - i < STRIP ? e->Nq - i : STRIP);
    ra_transpose(x->dz_t + i, x->length, e->D, count, e->rows, e->D);
    ra_rotary_rows(&e->state->q_rotary, e->rows, e->D, dq + i * e->q_row, e->q_row, count, (uint32_t)i,
                   RA_ROTATE_TRANSPOSE, e->p->scale);
  }
}

// dk, dv grow by what this job gave to them; at the last one dk, so far the gradient by y = R k - mean, loses its mean
// (the path through the mean) and is rotated back. With a relative map it is that by k from the first.
RA_KERNEL void finish_keys(const ra_toeplitz *e, float *dk, float *dv, int ends) {
  const ra_side *y = &e->keys;
  for (size_t j = 0; j < e->Nk; j++)
    for (uint32_t d = 0; d < e->Dv; d++) dv[j * e->v_row + d] += y->dw_t[d * y->length + j];
  for (uint32_t d = 0; d < e->D; d++) {
    float *dy = y->dz_t + d * y->length;
    for (size_t j = 0; j < e->Nk; j++) dy[j] += dk[j * e->k_row + d];
    if (ends && !e->own) centre(dy, e->Nk);
  }
  for (size_t j = 0; j < e->Nk; j += STRIP) {
    uint32_t count = (uint32_t)(e->Nk - j < STRIP ? e->Nk - j : STRIP);
    float *to = dk + j * e->k_row;
    ra_transpose(y->dz_t + j, y->length, e->D, count, to, e->k_row);
    if (ends && !e->own)
      ra_rotary_rows(&e->state->k_rotary, to, e->k_row, to, e->k_row, count, (uint32_t)j, RA_ROTATE_TRANSPOSE, 1);
  }
}

static float *dbias_of(const ra_toeplitz *e, const ra_arrays *x, heads at) {
  return e->p->bias && x->dbias ? x->dbias + at.lags : NULL;
}

static float *dweights_of(const ra_toeplitz *e, const ra_arrays *x) { return e->p->support_count ? x->dweights : NULL; }

static void finish(const ra_toeplitz *e, const ra_arrays *x, uint32_t pass, heads at) {
  const ra_problem *p = e->p;
  float *dbias = dbias_of(e, x, at);
  if (pass == RA_BACKWARD) settle_keys(e);
  for (uint32_t h = 0; h < e->together; h++) {
    ra_side z = queries_of(e, h);
    size_t head = at.first + h;
    settle_queries(e, pass, &z);
    for (uint32_t i = 0; i < e->Nq; i += STRIP) {
      if (pass == RA_FORWARD) ra_near_forward(e, &z, i);
      else ra_near_backward(e, &z, i, dbias, dweights_of(e, x));
    }
    if (pass == RA_FORWARD)
      finish_queries(e, &z, bias_of(e, at), x->out + ra_head(p, head, p->heads, e->Nq, e->Dv), x->lse + head * e->Nq);
    else finish_gradients(e, &z, x->dq + ra_head(p, head, p->heads, e->Nq, e->D));
  }
  if (pass == RA_FORWARD) return;
  finish_keys(e, x->dk + at.k, x->dv + at.v, at.ends);
  if (!dbias) return;
  // in the forward pass this was E = exp(b)
  if (e->own) ra_fill(e->dlags, e->lags, 0); // of which all but the first term is in dbias
  else ra_convolution_change(&e->state->convolution, e->dlags);
  settle_lags(e);
  for (size_t n = 0; n < e->lags; n++) // where nothing is far, dE may be beyond a float
    if (e->far[EDGE + n] > 0) dbias[n] += e->far[EDGE + n] * e->dlags[n];
}

// --- Units --------------------------------------------------------------------------------------------------------
//
// For each job: one to prepare, one for each batch, one to finish.

static uint64_t count_units(const ra_problem *p) {
  ra_toeplitz e = measure(p);
  uint64_t jobs = (uint64_t)p->batch * p->heads / e.together, each = batches_of(&e) + 2;
  return jobs > UINT32_MAX / each ? UINT64_MAX : jobs * each;
}

int ra_toeplitz_fits(const ra_problem *p) {
  return p->support_count <= RA_MAX_HEAD_DIM && count_units(p) <= UINT32_MAX;
}

static uint32_t units(const ra_problem *p, uint32_t pass) {
  (void)pass;
  return (uint32_t)count_units(p);
}

// cos and sin of the angles of the map.
static void load_phases(const ra_toeplitz *e) {
  const ra_problem *p = e->p;
  float *cosine = e->phases;
  for (uint32_t pair = 0; e->complex && pair < p->rotary_dim / 2; pair++, cosine += 2 * e->lags)
    for (size_t n = 0; n < e->lags; n++) {
      double c, s;
      ra_cos_sin_f64(p->relative_positions[n] * p->frequencies[pair], &c, &s);
      cosine[n] = (float)c, cosine[e->lags + n] = (float)s;
    }
}

static void begin(const ra_toeplitz *e, const ra_arrays *x, uint32_t pass) {
  const ra_problem *p = e->p;
  e->state->not_positive = 0;
  ra_rotary_init(&e->state->q_rotary, p, 1, NULL, e->q_space);
  ra_rotary_init(&e->state->k_rotary, p, 0, &e->state->q_rotary, e->k_space);
  ra_convolution_init(&e->state->convolution);
  ra_terms_init(e);
  load_phases(e);
  if (pass == RA_BACKWARD && p->bias && x->dbias) ra_fill(x->dbias, p->bias_heads * e->lags, 0);
  if (pass == RA_BACKWARD && p->support_count && x->dweights) ra_fill(x->dweights, p->support_count * e->lags, 0);
}

static int run(const ra_problem *p, const ra_arrays *x, uint32_t pass, void *workspace, uint32_t first, uint32_t last) {
  ra_workspace_cursor cursor = {workspace, 0, 0};
  ra_toeplitz e = arrange(p, pass, &cursor);
  uint32_t batches = (uint32_t)batches_of(&e);
  if (first == 0 && last > 0) begin(&e, x, pass);
  for (uint32_t unit = first; unit < last; unit++) {
    uint32_t job = unit / (batches + 2), at = unit % (batches + 2);
    heads own = heads_of(&e, job);
    if (at == 0) {
      prepare(&e, x, pass, own);
      continue;
    }
    if (at > batches) {
      finish(&e, x, pass, own);
      continue;
    }
    batch b = batch_at(&e, at - 1);
    if (b.step == 0) begin_group(&e, pass, b.group);
    run_batch(&e, pass, b);
    if (pass == RA_BACKWARD && b.step + 1 == b.steps) end_group(&e, b.group, dbias_of(&e, x, own), dweights_of(&e, x));
  }
  return last == units(p, pass) && e.state->not_positive > 0 ? RA_NOT_POSITIVE : RA_OK;
}

const ra_engine ra_toeplitz_engine = {layout, units, run};
