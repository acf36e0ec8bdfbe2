// SPDX-License-Identifier: MIT
//
// Monomial features. For x, y in R^D the multinomial theorem gives
//
//   p(x.y) = sum_m c_m (x.y)^m = sum_r w_r phi_r(x) phi_r(y),
//
// r over the monomials of degree 0 .. g in D variables: rank = C(D + g, g) of them, w_r = c_m m!/(alpha_1! .. alpha_D!).
// A row of features is one monomial, its columns are the 32 tokens of a chunk, so that the tokens are the lanes.
//
// Order: by degree, then by the smallest variable. The rows of degree m whose smallest variable is a are x_a times the
// rows of degree m - 1 whose smallest variable is at least a, and these are the tail of that degree's rows. So a row costs
// one multiplication a token, the rank is exactly minimal, and the Jacobian follows the same tails backwards.
// Only the rows below degree g are stored; the rows of degree g, by far the most, are made a block at a time.
//
// This work is based on:
//   Aggarwal, Alman. Optimal-Degree Polynomial Approximations for Exponentials and Gaussian Kernel Density Estimation.
//   2022 (2205.06249), and Lemma 3.4 of Alman, Song. Fast Attention Requires Bounded Entries. 2023 (2302.13214)

#ifndef RA_MONOMIALS_H
#define RA_MONOMIALS_H

#include "rope_attention.h"
#include "simd.h"

enum {
  RA_CHUNK = 32,    // tokens that share a block of features
  RA_ROW_BLOCK = 48 // rows of degree g that exist at a time: 6 KB, a multiple of the 6 rows of a tile
};

typedef struct ra_features {
  uint32_t D, degree;
  uint32_t rank, lower; // all rows; rows below degree g (all of them when g = 0)
  uint32_t *tail;       // [degree + 1][D + 1] first row, within its degree, whose smallest variable is at least a
  uint32_t first[RA_MAX_DEGREE + 2]; // first row of each degree, and the rank
} ra_features;

// C(D + g, g), or RA_SIZE_OVERFLOW past 2^32 - 2.
size_t ra_rank(uint32_t head_dim, uint32_t degree);

// uint32_t cells that `tail` needs.
size_t ra_features_cells(uint32_t head_dim, uint32_t degree);
void ra_features_init(ra_features *f, uint32_t head_dim, uint32_t degree, uint32_t *tail);

// w_r for all rows. run is scratch, [rank] bytes. Cost O(rank).
void ra_features_weights(const ra_features *f, const float *coefficients, float *weights, uint8_t *run);

// Rows below degree g of the tokens x_t [D][32]; live[32] is 1 for tokens and 0 for padding. Cost O(lower).
void ra_features_lower(const ra_features *f, const float *x_t, const float *live, float *lower);

// Rows row0 .. row0 + count - 1 (lower <= row0) into block [count][32].
void ra_features_block(const ra_features *f, const float *x_t, const float *lower, uint32_t row0, uint32_t count,
                       float *block);

// The Jacobian, transposed: rows row0 .. of degree g have gradients dblock [count][32]; adds to dlower [lower][32] and
// dx_t [D][32].
void ra_features_block_backward(const ra_features *f, const float *x_t, const float *lower, uint32_t row0,
                                uint32_t count, const float *dblock, float *dlower, float *dx_t);

// The rest of it: dlower, complete, is taken down degree by degree; adds to dx_t. dlower is used up.
void ra_features_lower_backward(const ra_features *f, const float *x_t, const float *lower, float *dlower, float *dx_t);

#endif
