// SPDX-License-Identifier: MIT
//
// What the files of the Toeplitz engine share: toeplitz.c (the engine), terms.c (the terms of the expansion: features,
// kernels and their derivatives), near.c (pairs that are done exactly).

#ifndef RA_TOEPLITZ_H
#define RA_TOEPLITZ_H

#include "convolution.h"
#include "engines.h"
#include "monomials.h"
#include "rotary.h"
#include "simd.h"

enum {
  RA_NEAR = 64,                    // distances below it are done exactly where the first rows need it
  RA_NEAR_KEYS = 2 * RA_NEAR + 40, // keys near a strip of queries: 31 + 63 + 63 and one, from and up to a multiple of 8
  RA_EDGE = 40, // zeros on both sides of the arrays of lags, so that a strip may look past their ends
};

// What stays between calls.
typedef struct ra_toeplitz_state {
  ra_rotary q_rotary, k_rotary;
  ra_convolution convolution;
  float top;             // largest bias that counts; -infinity when none does
  float one;             // what u has for 1: of the size of the values, as the rounding of transforms is that of both
  int64_t ahead;         // how far keys may be ahead of a query; RA_NEAR or more: no pairs are near
  uint32_t not_positive; // rows whose denominator was not positive and finite
} ra_toeplitz_state;

// The queries of a head, or the keys: tokens are columns, as many as blocks hold; those that there are none of are 0.
typedef struct ra_side {
  int queries;
  size_t length; // of a row: blocks * S
  float *z_t;    // [D][length] x or y
  float *w_t;    // [1 + Dv][length] u; of queries: denominators and numerators, backward h
  float *phi;  // [4 or 8][length] features of the terms at hand, of queries times w_r: real parts, then imaginary parts
  float *dphi; // the same, backward: gradient by features without w_r
  float *dz_t; // [D][length] backward
  float *dw_t; // [Dv][length] backward, keys
} ra_side;

typedef struct ra_toeplitz {
  const ra_problem *p;
  ra_toeplitz_state *state;
  ra_features f;           // monomials of the variables
  uint32_t D, Dv, columns; // Dv + 1
  int own, complex;        // each term has a kernel of its own, which is complex where the map is a rotation
  uint32_t parts;          // rows of phi: 4, or 8 when complex
  uint32_t groups;         // groups of four terms, one in each lane
  uint32_t
      real_groups; // those of real terms, which come first: all, or when complex most terms that are their own conjugates
  uint32_t together;                   // query heads that share a key/value head and a bias
  size_t q_row, k_row, v_row, out_row; // floats from token to token in the arrays
  size_t Nq, Nk, lags;
  char *q_space, *k_space;
  uint32_t *tail;
  float *weights;            // [rank] w_r, of two conjugate terms where one stands for both
  uint8_t *run;              // [rank]
  uint16_t *variables;       // [rank][degree] of each monomial
  uint32_t *monomial;        // [groups][4]; UINT32_MAX where the last group of its kind has no term
  float *phases;             // complex: [rotary_dim/2][2][lags] cos, sin of relative_positions
  float *near, *far;         // [RA_EDGE + lags + RA_EDGE] E / exp(top), pairs that are done exactly and the others
  float *kernels;            // own: [8][lags] of the terms at hand
  float *dlags;              // [lags], own: [8][lags], backward
  float *k_mean, *v_mean;    // [D], [Dv]
  float *rows;               // [32][max(D, Dv)]
  float *sums;               // [max(D, Dv + 1)][8]
  float *a, *ds;             // [RA_NEAR_KEYS][32] weights of near pairs, their gradient
  float *a_t, *ds_t;         // [32][RA_NEAR_KEYS]
  float *window, *dwindow;   // own: [D + Dv + 1][RA_NEAR_KEYS] keys near a strip, and gradients
  float *map;                // own: [entries] W at a distance
  ra_side keys, queries;     // queries: of the first of the heads that go together
  size_t queries_step;       // floats to the next
  float *spectra, *spectra2; // of a batch of keys, of queries (backward)
} ra_toeplitz;

// y += a b, for 32 tokens
RA_INLINE void ra_add_products(const float *a, const float *b, float *y) {
  for (uint32_t i = 0; i < RA_STRIP; i += 4)
    f32x4_store(y + i, f32x4_madd(f32x4_load(a + i), f32x4_load(b + i), f32x4_load(y + i)));
}

// --- Terms (terms.c) ------------------------------------------------------------------------------------------------------

// Terms of the expansion, and variables that it is one in; RA_SIZE_OVERFLOW past 2^32 - 2 monomials. Real ones are those whose
// features and matrices are: all, but for rotations those that are their own conjugates.
size_t ra_terms_count(const ra_problem *p);
size_t ra_terms_real(const ra_problem *p);
uint32_t ra_terms_variables(const ra_problem *p);

// Fills f, variables, monomial; O(rank g).
void ra_terms_init(const ra_toeplitz *e);

// w_r of the coefficients of a key/value head.
void ra_terms_weights(const ra_toeplitz *e, const float *coefficients);

// The features of a group for all tokens of a side; what their gradients give to dz_t.
void ra_terms_features(const ra_toeplitz *e, const ra_side *z, uint32_t group);
void ra_terms_jacobian(const ra_toeplitz *e, const ra_side *z, uint32_t group);

// Own: kernels of a group, E W..; what the derivatives by them, dlags, give to those by the bias and the weights (or NULL).
void ra_terms_kernels(const ra_toeplitz *e, uint32_t group);
void ra_terms_change(const ra_toeplitz *e, uint32_t group, float *dbias, float *dweights);

// --- Near pairs (near.c) ----------------------------------------------------------------------------------------------------

// Entries of the map of a pair: 0 where rotations factorise.
uint32_t ra_near_entries(const ra_problem *p);

// What queries i .. i + 31 have from keys near them: denominators and numerators, or all gradients (dbias, dweights or NULL).
void ra_near_forward(const ra_toeplitz *e, const ra_side *x, uint32_t i);
void ra_near_backward(const ra_toeplitz *e, const ra_side *x, uint32_t i, float *dbias, float *dweights);

#endif
