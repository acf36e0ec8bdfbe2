// SPDX-License-Identifier: MIT
//
// The parts of the polynomial engine that work on one chunk of 32 tokens, for the files that put them together: whole
// sequences (polynomial.c) and streaming states (stream.c). Tokens are the columns of everything that ends in _t and of
// features; x_i = scale R q_i, y_j = R k_j - mean, u_j = [v_j - mean, 1]. Where queries are centred, x_i less their
// mean m stands for x_i and exp(m.y_j) u_j for u_j.

#ifndef RA_POLYNOMIAL_H
#define RA_POLYNOMIAL_H

#include "elementary.h"
#include "engines.h"
#include "lags.h"
#include "monomials.h"
#include "rotary.h"

enum { RA_DECAY_STEPS = RA_CHUNK + 1 };

// What bias or ALiBi makes of weights at a distance t, E(t) = sum_e weight_e exp(-rate_e (t - from)).
typedef struct ra_decays {
  uint32_t from;
  double rate[RA_MAX_DECAYS], weight[RA_MAX_DECAYS], least, most; // least, most: of the rates
  double top;                                                     // E is exp(bias - top)
  float steps[RA_MAX_DECAYS][RA_DECAY_STEPS];                     // exp(-rate_e n)
} ra_decays;

// Keys j .. j + count - 1 of a key/value head; of none when count is 0.
typedef struct ra_loaded {
  size_t kv;
  uint32_t j, count;
} ra_loaded;

enum { RA_STRIP_QUERIES = 8, RA_STRIPS = RA_CHUNK / RA_STRIP_QUERIES };

// What is done of a block of keys, which is half of it on a diagonal: the keys that each strip of 8 queries sees, and
// the queries from .. to - 1 of the strips that see some of each 8 keys; `whole`: these see all of them.
typedef struct ra_strips {
  ra_range keys[RA_STRIPS], all[RA_STRIPS]; // all: those that each of its queries sees
  uint32_t from[RA_STRIPS], to[RA_STRIPS];
  int whole;
} ra_strips;

// Of a block of keys each query sees first[i] .. end[i] - 1. Where weights decay, key n has bias[31 + i - n] + row[i] added.
typedef struct ra_seen {
  float first[RA_CHUNK], end[RA_CHUNK], row[RA_CHUNK], bias[2 * RA_CHUNK];
  ra_strips strips;
} ra_seen;

// Blocks of `keys` keys from j on are seen alike by `count` queries from i on, i - j being `ahead`, where nothing else
// decides; of none when count is 0.
typedef struct ra_pattern {
  int64_t ahead;
  uint32_t count, keys;
} ra_pattern;

// What stays between calls.
typedef struct ra_polynomial_state {
  ra_rotary q_rotary, k_rotary;
  int centred;           // queries are:
  float shift;           // their mean times that of keys
  uint32_t first, edge;  // keys first .. edge-1 are in Z (forward sweep); keys edge .. are done (backward sweep)
  ra_range queries;      // those in Y (backward sweep)
  uint32_t cleared;      // keys before this one have rows of dk and dv that hold something (backward)
  uint32_t gone;         // tokens that have left Z, or Y, since it was made
  uint32_t not_positive; // rows whose denominator was not positive and finite
  uint32_t
      origin; // key r from which tokens in Z and Y decay: a key's by exp(-rate (r - j)), a query's likewise from its position
  ra_loaded loaded; // what y_rows and u_rows hold
  ra_seen seen;     // of the last block beside a state, and which that was
  ra_pattern pattern;
  double dslope;
  ra_decays decays;
} ra_polynomial_state;

typedef struct ra_polynomial {
  const ra_problem *p;
  ra_polynomial_state *state;
  ra_features f;
  size_t rank;
  uint32_t D, Dv, Dp, Dvp; // Dp, Dvp: padded to 8
  uint32_t columns, row;   // columns of u and h: Dvp values, then one; length of their rows, a multiple of 4
  int decaying;            // weights depend on distance:
  uint32_t decays;         // states side by side, one for each rate, else one
  uint32_t z_columns,
      z_row; // columns of the state: Dvp values for each, then a one for each; length of its rows, a multiple of 4
  size_t q_row, k_row, v_row, out_row; // floats from token to token in the arrays; dq, dk, dv, dout alike
  char *q_space, *k_space;
  float *weights;         // [rank] w_r
  uint8_t *run;           // [rank]
  float *z;               // [rank][z_row] Z, later Y
  float *moment;          // [rank][z_row] Z with each key times j - r: with slopes, backward; else NULL
  float *k_mean, *v_mean; // [Dp], [Dvp]
  float *q_mean;          // [Dp] of queries, scale included; 0 where these are not centred
  float *lower, *block;   // features [lower][32], [48][32]
  float *x_rows, *y_rows; // [32][Dp] the chunk's queries (not centred), keys
  float *x_t, *y_t;       // [Dp][32]
  float *u_rows;          // [32][row]
  float *sum_t;           // [columns][32] numerators and denominators, du
  float *factors;         // [decays][32] of the tokens of a chunk
  float *z_factors;       // [z_row] of the state, when its origin moves
  float *z_rows;          // [32][z_row] u_rows or h_rows, once for each rate, times factors
  float *z_t;             // [z_columns][32] their transpose, or sums of the states before factors
  float *a;               // [32 keys][32] weights of keys that are done exactly
  float *reference;       // [32] powers of two that a query's sums, and such weights, are divided by
  float *far_y, *far_u;   // [outlier keys][Dp], [outlier keys][row] of the head
  // backward
  float *h_rows, *h_t;    // [32][row], [columns][32]; u_t in the backward sweep
  float *da;              // [32][32]
  float *dlower, *dblock; // [lower][32], [48][32]
  float *dx_t;            // [Dp][32]
  float *d_rows;          // [32][max(Dp, row)]
  double *near_lags;      // [ra_lags_from] with decays: gradient of the bias at those distances
  ra_lags lags;           // likewise: of those beyond
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

// --- Chunks --------------------------------------------------------------------------------------------------------

// live[32]: 1 for the first `count` tokens, without those in `outliers` (bit n: token n), 0 for the others.
void ra_live_tokens(uint32_t count, uint32_t outliers, float *live);

// rows [count][Dp], the rest of 32 zeroed, and their transpose t.
void ra_turn(const ra_polynomial *e, float *rows, uint32_t count, float *t);

// x_rows, whose rest of 32 is zeroed, as x_t, centred.
void ra_turn_queries(const ra_polynomial *e, uint32_t count);

// Queries i .. i + count - 1: x_rows, x_t and, if `features`, their stored features.
void ra_load_queries(const ra_polynomial *e, const float *q, uint32_t i, uint32_t count, int features);

// Keys j .. j + count - 1 of key/value head kv: y_rows, u_rows, unless they are there, and, if `features`, y_t and its stored
// features, outliers as zeros. Whoever changes y_rows or u_rows has them forgotten.
void ra_load_keys(const ra_polynomial *e, const ra_arrays *x, size_t kv, uint32_t j, uint32_t count, int features);

static inline void ra_forget_keys(const ra_polynomial *e) { e->state->loaded.count = 0; }

// sums[column][token] += phi(token)^T z, for the first `tokens` of the chunk; z_columns of them
void ra_read_state(const ra_polynomial *e, const float *x_t, uint32_t tokens, float *sums);

// z += W phi(tokens) rows [32][z_row]
void ra_update_state(const ra_polynomial *e, const float *x_t, const float *rows);

// h_rows, h_t, references and live[32] of queries whose rows of out and dout are `row` floats apart: the gradient by A_ij is
// live_i h_i.u_j for A = p, h_i.u_j for A = exp 2^-reference_i. All zero for those in `outliers` and those that saw nothing.
void ra_load_gradients(const ra_polynomial *e, const float *out, const float *dout, size_t row, const float *lse,
                       uint32_t count, uint32_t outliers, float *live);

// sum_t becomes columns of the output, lse [32] its logarithms. Returns those of the first `count` queries, bit n,
// whose weights do not add up to a positive finite number: zeros, -infinity.
uint32_t ra_normalise(const ra_polynomial *e, uint32_t count, float *lse);

// sum_t of queries i .. i + count - 1 becomes their rows of out and lse; returns what ra_normalise does.
uint32_t ra_finish_chunk(const ra_polynomial *e, uint32_t i, uint32_t count, float *out, float *lse);

// --- Pairs that are done exactly (pairs.c) -----------------------------------------------------------------------------
//
// Their scores may be large, so each query has a reference: sum_t, and A = exp(x.y), are meant times 2^reference.

// What a query with this range sees of the keys j .. j + keys - 1; 0 when that is nothing.
static inline int ra_see(ra_seen *seen, uint32_t query, ra_range range, uint32_t j, uint32_t keys) {
  uint32_t first = range.first <= j ? 0 : ra_min_u32(range.first - j, keys);
  uint32_t end = range.end <= j ? 0 : ra_min_u32(range.end - j, keys);
  seen->first[query] = (float)first, seen->end[query] = (float)end;
  return first < end;
}

// Sets `strips`, once first and end are there.
void ra_see_strips(ra_seen *seen);

// The references at the beginning, for sum_t as it is; `empty`: nothing is in it.
void ra_begin_references(const ra_polynomial *e, int empty);

// sum_t += A u for a block of keys y_rows [keys][Dp], u_rows [keys][row]. Where scores exceed a reference by far it
// rises first.
void ra_add_block(const ra_polynomial *e, const float *y_rows, const float *u_rows, const ra_seen *seen);

// After ra_load_gradients: a, and da, the gradient by scores.
void ra_block_gradients(const ra_polynomial *e, const float *y_rows, const float *u_rows, const ra_seen *seen);

// Undoes ra_add_block, after ra_load_gradients: adds to dx_t, and to the rows `rows`, or j on when NULL, of dk and dv.
void ra_add_block_backward(const ra_polynomial *e, const float *y_rows, const float *u_rows, uint32_t keys,
                           const ra_seen *seen, const uint32_t *rows, uint32_t j, float *dk, float *dv);

// d_rows [count][Dvp], gradients by u_rows of keys, become those by v. u_rows [count][row]
void ra_scale_values(const ra_polynomial *e, const float *u_rows, uint32_t count);

// y[rows[n]][0 .. columns-1] += x[n], n < count; rows first, first + 1 .. when NULL.
void ra_add_rows(const float *x, size_t x_row, uint32_t count, uint32_t columns, float *y, size_t y_row,
                 const uint32_t *rows, uint32_t first);

// --- Outliers -----------------------------------------------------------------------------------------------------------

// far_y, far_u of a head. O(outlier keys (D + Dv)).
void ra_load_outlier_keys(const ra_polynomial *e, const ra_arrays *x, size_t kv);

// The outliers among the keys of the state of a chunk, without the chunk's own `outliers` (bit n: query n): forward,
// and backward.
void ra_add_outlier_keys(const ra_polynomial *e, size_t kv, ra_range state, uint32_t outliers);
void ra_add_outlier_keys_backward(const ra_polynomial *e, const ra_arrays *x, size_t kv, ra_range state,
                                  uint32_t outliers);

// The chunks of up to 32 outlier queries of a head, one of them: rows of out, lse; of dq, and what they add to dk, dv.
// O(Nk (D + Dv)) a query.
void ra_outlier_queries_forward(const ra_polynomial *e, const ra_arrays *x, size_t kv, uint32_t chunk);
void ra_outlier_queries_backward(const ra_polynomial *e, const ra_arrays *x, size_t kv, uint32_t chunk);

#endif
