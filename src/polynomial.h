// SPDX-License-Identifier: MIT
//
// The parts of the polynomial engine that work on one chunk of 32 tokens, for the files that put them together: whole
// sequences (polynomial.c) and streaming states (stream.c). Tokens are the columns of everything that ends in _t and of
// features; x_i = scale R q_i, y_j = R k_j - mean, u_j = [v_j - mean, 1].

#ifndef RA_POLYNOMIAL_H
#define RA_POLYNOMIAL_H

#include "engines.h"
#include "monomials.h"
#include "rotary.h"

// What stays between calls.
typedef struct ra_polynomial_state {
  ra_rotary q_rotary, k_rotary;
  uint32_t first, edge;  // keys first .. edge-1 are in Z (forward sweep); keys edge .. are done (backward sweep)
  ra_range queries;      // those in Y (backward sweep)
  uint32_t gone;         // tokens that have left Z, or Y, since it was made
  uint32_t not_positive; // rows whose denominator was not positive and finite
} ra_polynomial_state;

typedef struct ra_polynomial {
  const ra_problem *p;
  ra_polynomial_state *state;
  ra_features f;
  size_t rank;
  uint32_t D, Dv, Dp, Dvp; // Dp, Dvp: padded to 8
  uint32_t columns, row;   // columns of u, h and the state: Dvp values, then one; length of their rows, a multiple of 4
  size_t q_row, k_row, v_row, out_row; // floats from token to token in the arrays; dq, dk, dv, dout alike
  char *q_space, *k_space;
  float *weights;         // [rank] w_r
  uint8_t *run;           // [rank]
  float *z;               // [rank][row] Z, later Y
  float *k_mean, *v_mean; // [Dp], [Dvp]
  float *lower, *block;   // features [lower][32], [48][32]
  float *x_rows, *y_rows; // [32][Dp] the chunk's queries, keys
  float *x_t, *y_t;       // [D][32]
  float *u_rows;          // [32][row]
  float *sum_t;           // [columns][32] numerators and denominators, du
  float *a;               // [32 keys][32] weights of keys at an edge
  // backward
  float *h_rows, *h_t;    // [32][row], [columns][32]; u_t in the backward sweep
  float *da;              // [32][32]
  float *dlower, *dblock; // [lower][32], [48][32]
  float *dx_t;            // [Dp][32]
  float *d_rows;          // [32][max(Dp, Dvp)]
} ra_polynomial;

enum { RA_STREAM = RA_BACKWARD + 1 }; // a pass whose sums are not in the workspace

// Where one query head and its key/value head begin in the arrays.
typedef struct ra_heads {
  size_t q, k, v, out, lse;
} ra_heads;

// Takes its pieces from *w; `pass` may be RA_STREAM.
ra_polynomial ra_polynomial_arrange(const ra_problem *p, uint32_t pass, ra_workspace_cursor *w);

ra_heads ra_heads_of(const ra_polynomial *e, size_t head);

// The weights w_r of the coefficients of a key/value head; O(rank).
void ra_take_weights(const ra_polynomial *e, uint32_t kv);

// --- Products of a chunk: 32 tokens are the columns, two operations for each row, token and term -------------------------

// c[r][32] += sum_n a[n][r] * b[n][32]: numerators from state and features, from u and weights at an edge, dx from dA.
void ra_chunk_add_columns(const float *a, size_t a_row, uint32_t rows, const float *b, uint32_t count, float *c);

// c[r][32] = sum_d a[r][d] * b[d][32]: dphi from state and h, scores at an edge from keys and queries.
void ra_chunk_set_rows(const float *a, size_t a_row, uint32_t rows, const float *b, uint32_t count, float *c);

// c[r][columns] = sum_i a[r][i] * b[i][columns] over a chunk, columns a multiple of 8: dk, dv at an edge.
void ra_chunk_set_products(const float *a, uint32_t rows, const float *b, size_t b_row, uint32_t columns, float *c);

// --- Chunks --------------------------------------------------------------------------------------------------------

// live[32]: 1 for the first `count` tokens, 0 for the others.
void ra_live_tokens(uint32_t count, float *live);

// Queries i .. i + count - 1: x_rows, x_t and, if `features`, their stored features.
void ra_load_queries(const ra_polynomial *e, const float *q, uint32_t i, uint32_t count, int features);

// sum_t[column][token] += phi(token)^T z, for the first `tokens` of the chunk
void ra_read_state(const ra_polynomial *e, const float *x_t, uint32_t tokens);

// z += W phi(tokens) rows
void ra_update_state(const ra_polynomial *e, const float *x_t, const float *rows);

// a[n][i] = exp(x_i.y_n) for keys first[i] <= n < end[i] of y_rows [keys][Dp], 0 elsewhere.
void ra_exponentials(const ra_polynomial *e, const float *y_rows, uint32_t keys, const float *first, const float *end);

// sum_t of queries i .. i + count - 1 becomes their rows of out and lse. Those of `seeing`, counted from i, have seen a key.
void ra_finish_chunk(const ra_polynomial *e, uint32_t i, uint32_t count, ra_range seeing, float *out, float *lse);

#endif
