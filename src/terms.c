// SPDX-License-Identifier: MIT
//
// The terms of the Toeplitz engine. p(s) is expanded over the variables that a score is the sum of; a term is a
// monomial in them, and each variable is a number of the query times one of the key times one of the distance t = i -
// j, so that terms are too:
//
//   plain rotation, done before    s = sum_d x_d y_d                      D variables; nothing depends on t but the bias
//   W_t with support S             s = sum_n x_a W_n(t) y_b               |S| variables; kernels W_n(t) W_m(t) ..
//   rotation by any number f(t)    s = sum_p z_p + conj(z_p) + sum_d x_d y_d,   z_p = conj(x_p) e^(-i f(t) theta_p) y_p
//
// where x_p is half of the query's pair of dimensions, read as a complex number, y_p the key's. The last is complex, in D
// variables instead of the 2 D real ones of the same map as W_t; a term and its conjugate add up to twice the real part of
// either, so that only one of them is computed: about C(D + g, g) / 2 terms. Those that are their own conjugates are
// real, features and matrices, and take two columns of values at a time as all terms of the other two kinds do.
//
// With phi a product of x_p (of z_p), their conjugates (of conj(z_p)) and real numbers, A_ij = sum_r w_r Re(conj(phi_r(x_i))
// T_r(i - j) phi_r(y_j)): queries and keys have the same features.
//
// This work is based on:
//   Alman, Song. Fast RoPE Attention: Combining the Polynomial Method and Fast Fourier Transform. 2025 (2505.11892)

#include <math.h>

#include "pack.h"
#include "toeplitz.h"

enum { NONE = RA_MAX_DEGREE };

// --- Which there are -------------------------------------------------------------------------------------------------

uint32_t ra_terms_variables(const ra_problem *p) { return p->support_count ? p->support_count : p->head_dim; }

// Monomials that are their own conjugates: as often z_p as conj(z_p).
static uint64_t count_real(const ra_problem *p) {
  uint32_t pairs = p->rotary_dim / 2;
  uint64_t count = 0;
  for (uint32_t m = 0; 2 * m <= p->degree && (m == 0 || pairs > 0); m++) // m products z_p conj(z_p)
    count += (uint64_t)(m == 0 ? 1 : ra_rank(pairs - 1, m)) * ra_rank(p->head_dim - p->rotary_dim, p->degree - 2 * m);
  return count;
}

size_t ra_terms_count(const ra_problem *p) {
  size_t all = ra_rank(ra_terms_variables(p), p->degree);
  if (all == RA_SIZE_OVERFLOW || !p->relative_positions) return all;
  return (size_t)((all + count_real(p)) / 2);
}

size_t ra_terms_real(const ra_problem *p) {
  size_t all = ra_terms_count(p);
  return all == RA_SIZE_OVERFLOW || !p->relative_positions ? all : (size_t)count_real(p);
}

static const uint16_t *variables_of(const ra_toeplitz *e, uint32_t row) {
  return e->variables + (size_t)row * e->f.degree;
}

static uint32_t degree_of(const ra_toeplitz *e, uint32_t row) {
  uint32_t m = 0;
  while (row >= e->f.first[m + 1]) m++;
  return m;
}

// The variables of every monomial, falling, in the order of monomials.h: x_a times those of a row of the degree below.
static void list_variables(const ra_toeplitz *e) {
  const ra_features *f = &e->f;
  uint32_t g = f->degree;
  for (uint32_t m = 1; m <= g; m++) {
    const uint32_t *below = f->tail + (size_t)(m - 1) * (f->D + 1);
    uint32_t row = f->first[m], rows_below = f->first[m] - f->first[m - 1];
    for (uint32_t a = 0; a < f->D; a++)
      for (uint32_t t = below[a]; t < rows_below; t++, row++) {
        uint16_t *to = e->variables + (size_t)row * g;
        const uint16_t *from = variables_of(e, f->first[m - 1] + t);
        for (uint32_t n = 0; n + 1 < m; n++) to[n] = from[n];
        to[m - 1] = (uint16_t)a;
      }
  }
}

// Below 0, 0 or above: where the conjugate of a monomial is in an order of all of them, seen from it.
static int compare_conjugate(const ra_toeplitz *e, const uint16_t *variables, uint32_t count) {
  uint16_t other[RA_MAX_DEGREE];
  uint32_t half = e->p->rotary_dim / 2;
  for (uint32_t m = 0; m < count; m++) {
    uint32_t v = variables[m], n = m;
    if (v < 2 * half) v = v < half ? v + half : v - half;
    for (; n > 0 && other[n - 1] < v; n--) other[n] = other[n - 1];
    other[n] = (uint16_t)v;
  }
  for (uint32_t m = 0; m < count; m++)
    if (other[m] != variables[m]) return other[m] < variables[m] ? -1 : 1;
  return 0;
}

void ra_terms_init(const ra_toeplitz *e) {
  uint32_t slots = e->real_groups * RA_LANES, real = 0, other = slots;
  list_variables(e);
  for (uint32_t slot = 0; slot < e->groups * RA_LANES; slot++) e->monomial[slot] = UINT32_MAX;
  for (uint32_t row = 0; row < e->f.rank; row++) {
    int order = e->complex ? compare_conjugate(e, variables_of(e, row), degree_of(e, row)) : 0;
    if (order == 0 && real < slots) e->monomial[real++] = row;
    else if (order >= 0) e->monomial[other++] = row;
  }
}

void ra_terms_weights(const ra_toeplitz *e, const float *coefficients) {
  ra_features_weights(&e->f, coefficients, e->weights, e->run);
  for (uint32_t row = 0; e->complex && row < e->f.rank; row++)
    if (compare_conjugate(e, variables_of(e, row), degree_of(e, row)) > 0) e->weights[row] *= 2;
}

// --- Features -------------------------------------------------------------------------------------------------------

// Where the number of a variable is in z_t and dz_t: it is re + sign i im, sign 0 for a real one.
typedef struct factor {
  size_t re, im;
  float sign;
} factor;

static factor factor_of(const ra_toeplitz *e, const ra_side *z, uint32_t v) {
  const ra_problem *p = e->p;
  uint32_t half = p->rotary_dim / 2;
  if (p->support_count) return (factor){p->support[2 * (size_t)v + !z->queries] * z->length, 0, 0};
  if (!e->complex || v >= 2 * half) return (factor){v * z->length, 0, 0};
  uint32_t pair = v % half;
  size_t re = p->interleaved ? 2 * pair : pair, im = p->interleaved ? 2 * pair + 1 : half + pair;
  return (factor){re * z->length, im * z->length, v < half ? 1 : -1};
}

// y [2][32] = weight times the product of the factors, without the one numbered `but`, for tokens n .. n + 31. y[1]
// only if complex.
RA_KERNEL void multiply_factors(const float *z_t, const factor *factors, uint32_t count, uint32_t but, float weight,
                                int complex, size_t n, float *y) {
  ra_fill(y, RA_STRIP, weight);
  if (complex) ra_fill(y + RA_STRIP, RA_STRIP, 0);
  for (uint32_t m = 0; m < count; m++) {
    if (m == but) continue;
    const float *re = z_t + factors[m].re + n, *im = z_t + factors[m].im + n;
    f32x4 sign = f32x4_splat(factors[m].sign);
    for (uint32_t i = 0; i < RA_STRIP; i += 4) {
      f32x4 x_r = f32x4_load(re + i), y_r = f32x4_load(y + i);
      if (!complex) {
        f32x4_store(y + i, f32x4_mul(y_r, x_r));
        continue;
      }
      f32x4 y_i = f32x4_load(y + RA_STRIP + i), z_r = f32x4_mul(y_r, x_r), z_i = f32x4_mul(y_i, x_r);
      if (factors[m].sign != 0) {
        f32x4 x_i = f32x4_mul(sign, f32x4_load(im + i));
        z_r = f32x4_nmadd(y_i, x_i, z_r), z_i = f32x4_madd(y_r, x_i, z_i);
      }
      f32x4_store(y + i, z_r), f32x4_store(y + RA_STRIP + i, z_i);
    }
  }
}

// The factors of a term, and its weight on this side; the number of factors.
static uint32_t take_factors(const ra_toeplitz *e, const ra_side *z, uint32_t row, factor *factors, float *weight) {
  uint32_t count = degree_of(e, row);
  for (uint32_t m = 0; m < count; m++) factors[m] = factor_of(e, z, variables_of(e, row)[m]);
  *weight = z->queries ? e->weights[row] : 1;
  return count;
}

void ra_terms_features(const ra_toeplitz *e, const ra_side *z, uint32_t group) {
  for (uint32_t lane = 0; lane < RA_LANES; lane++) {
    uint32_t row = e->monomial[group * RA_LANES + lane];
    factor factors[RA_MAX_DEGREE];
    float weight = 0, y[2 * RA_STRIP];
    uint32_t count = row != UINT32_MAX ? take_factors(e, z, row, factors, &weight) : 0;
    for (size_t n = 0; n < z->length; n += RA_STRIP) {
      multiply_factors(z->z_t, factors, count, NONE, weight, e->complex, n, y);
      for (uint32_t i = 0; i < RA_STRIP; i += 4) {
        f32x4_store(z->phi + lane * z->length + n + i, f32x4_load(y + i));
        if (e->complex) f32x4_store(z->phi + (RA_LANES + lane) * z->length + n + i, f32x4_load(y + RA_STRIP + i));
      }
    }
  }
}

// In the forward pass this was phi = z_m times `others`: dz_m += conj(others) dphi, and its conjugate where z_m is one.
RA_KERNEL void add_jacobian(float *dz_t, const factor *f, const float *others, const float *dphi, size_t length,
                            int complex, size_t n) {
  float *dre = dz_t + f->re + n, *dim = dz_t + f->im + n;
  f32x4 sign = f32x4_splat(f->sign);
  for (uint32_t i = 0; i < RA_STRIP; i += 4) {
    f32x4 o_r = f32x4_load(others + i), d_r = f32x4_load(dphi + i), dz_r = f32x4_madd(o_r, d_r, f32x4_load(dre + i));
    if (complex) {
      f32x4 o_i = f32x4_load(others + RA_STRIP + i), d_i = f32x4_load(dphi + RA_LANES * length + i);
      dz_r = f32x4_madd(o_i, d_i, dz_r);
      if (f->sign != 0) {
        f32x4 turned = f32x4_nmadd(o_i, d_r, f32x4_mul(o_r, d_i));
        f32x4_store(dim + i, f32x4_madd(sign, turned, f32x4_load(dim + i)));
      }
    }
    f32x4_store(dre + i, dz_r);
  }
}

void ra_terms_jacobian(const ra_toeplitz *e, const ra_side *z, uint32_t group) {
  for (uint32_t lane = 0; lane < RA_LANES; lane++) {
    factor factors[RA_MAX_DEGREE];
    float weight, others[2 * RA_STRIP];
    uint32_t row = e->monomial[group * RA_LANES + lane];
    uint32_t count = row != UINT32_MAX ? take_factors(e, z, row, factors, &weight) : 0;
    for (size_t n = 0; n < z->length; n += RA_STRIP)
      for (uint32_t m = 0; m < count; m++) {
        multiply_factors(z->z_t, factors, count, m, weight, e->complex, n, others);
        add_jacobian(z->dz_t, &factors[m], others, z->dphi + lane * z->length + n, z->length, e->complex, n);
      }
  }
}

// --- Kernels --------------------------------------------------------------------------------------------------------

// y [lags] times W_v(t), or (complex) y and y_i times e^(-+i f(t) theta).
RA_KERNEL void multiply_lags(const ra_toeplitz *e, uint32_t v, float *y, float *y_i) {
  size_t half = e->p->rotary_dim / 2;
  if (!e->complex) {
    const float *w = e->p->weights + v * e->lags;
    for (size_t n = 0; n < e->lags; n++) y[n] *= w[n];
    return;
  }
  if (v >= 2 * half) return;
  const float *cosine = e->phases + v % half * 2 * e->lags, *sine = cosine + e->lags;
  float sign = v < half ? 1 : -1;
  for (size_t n = 0; n < e->lags; n++) {
    float re = y[n], im = y_i[n], s = sign * sine[n];
    y[n] = re * cosine[n] + im * s, y_i[n] = im * cosine[n] - re * s;
  }
}

// y = E, or 0 for a term that there is none of, times the map of each of its variables but one. Of real terms y_i is
// rounding: 0.
static void fill_lags(const ra_toeplitz *e, uint32_t term, uint32_t but, float *y, float *y_i) {
  uint32_t row = e->monomial[term], count = row != UINT32_MAX ? degree_of(e, row) : 0;
  for (size_t n = 0; n < e->lags; n++) y[n] = row != UINT32_MAX ? e->far[RA_EDGE + n] : 0;
  ra_fill(y_i, e->lags, 0);
  for (uint32_t m = 0; m < count; m++)
    if (m != but) multiply_lags(e, variables_of(e, row)[m], y, y_i);
  if (term / RA_LANES < e->real_groups) ra_fill(y_i, e->lags, 0);
}

void ra_terms_kernels(const ra_toeplitz *e, uint32_t group) {
  for (uint32_t lane = 0; lane < RA_LANES; lane++)
    fill_lags(e, group * RA_LANES + lane, NONE, e->kernels + lane * e->lags, e->kernels + (RA_LANES + lane) * e->lags);
}

// In the forward pass this was T = E W.. = exp(b) W_n W_m ..; dlags are conj(dT).
void ra_terms_change(const ra_toeplitz *e, uint32_t group, float *dbias, float *dweights) {
  for (uint32_t row = 0; dbias && row < 2 * RA_LANES; row++)
    for (size_t n = 0; n < e->lags; n++) dbias[n] += e->kernels[row * e->lags + n] * e->dlags[row * e->lags + n];
  for (uint32_t lane = 0; dweights && lane < RA_LANES; lane++) {
    uint32_t term = group * RA_LANES + lane, row = e->monomial[term];
    uint32_t count = row != UINT32_MAX ? degree_of(e, row) : 0;
    float *others = e->kernels + lane * e->lags; // which is not needed any more
    for (uint32_t m = 0; m < count; m++) {
      float *to = dweights + variables_of(e, row)[m] * e->lags;
      fill_lags(e, term, m, others, e->kernels + RA_LANES * e->lags);
      for (size_t n = 0; n < e->lags; n++) to[n] += others[n] * e->dlags[lane * e->lags + n];
    }
  }
}
