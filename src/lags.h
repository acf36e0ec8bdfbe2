// SPDX-License-Identifier: MIT
//
// The gradient of a bias by distance, of pairs that the polynomial engine takes through its state (polynomial.c):
//
//   dbias_t = E_t sum_{i-j=t} p(x_i.y_j) h_i.u_j = E_t sum over r and columns c of corr(phi_r(y) u_c, w_r phi_r(x) h_c)_t
//
// the Toeplitz engine's way to it without the rest of that engine: forward transforms only, and of few features. Unlike
// dq and dk this has a term of degree 0, and the other degrees matter as the scores do: p is here a polynomial of its
// own, of degree 0 to 2. O(N C(D + g, g) (Dv + 1) log S) time, O(N (D + Dv)) workspace.
//
// This work is based on:
//   Cao, Huo, Liang, Shi, Song. RoPE Attention Can Be Trained in Almost Linear Time. 2024 (2412.17316v3)

#ifndef RA_LAGS_H
#define RA_LAGS_H

#include "convolution.h"
#include "engines.h"

enum { RA_MAX_LAG_DEGREE = 2 };

// Tokens are columns here, `length` of them, those that there are none of are 0.
typedef struct ra_lag_side {
  size_t length; // of a row: blocks * S
  float *z_t;    // [D][length] x or y
  float *w_t;    // [Dv + 1][length] h or u
} ra_lag_side;

typedef struct ra_lags {
  const ra_problem *p;
  uint32_t D, columns, rank, batches; // columns: Dv + 1
  uint32_t together;                  // query heads that share a key/value head and a bias
  ra_convolution *convolution;
  float *dlags;              // [Nq + Nk - 1] which distances count, then their gradient
  ra_lag_side keys, queries; // queries: of the first of the heads that go together
  size_t queries_step;       // floats to the next
  float *spectra, *spectra2; // of eight columns of keys, of queries
} ra_lags;

// Distances from here on; those below are the caller's.
static inline uint32_t ra_lags_from(const ra_problem *p) { return p->decay_from + RA_STRIP; }

// Units of work of one state, 0 when no pair is so far apart.
uint32_t ra_lags_units(const ra_problem *p);

// Takes its pieces from *w. `together`: query heads of a state.
ra_lags ra_lags_arrange(const ra_problem *p, uint32_t together, ra_workspace_cursor *w);

// Which distances count. Before the tokens are loaded.
void ra_lags_begin(const ra_lags *e);

// The columns of tokens n .. n + 31: z_t [D][32], w_t [Dv + 1][32] but for the last, which is at `last`, times live [32].
void ra_lags_load(const ra_lags *e, const ra_lag_side *side, uint32_t n, const float *z_t, const float *w_t,
                  const float *last, const float *live);

// The queries of the h-th of the heads that go together.
ra_lag_side ra_lags_queries(const ra_lags *e, uint32_t h);

// Correlates a share of the features, unit 0 .. ra_lags_units() - 1, with lag_coefficients of key/value head kv.
void ra_lags_correlate(const ra_lags *e, size_t kv, uint32_t unit);

// dbias [Nq + Nk - 1] += the sums, times exp(bias - top).
void ra_lags_finish(const ra_lags *e, const float *bias, double top, float *dbias);

#endif
