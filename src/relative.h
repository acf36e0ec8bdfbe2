// SPDX-License-Identifier: MIT
//
// Scores of a relative map, s_ij = q_i W_{i-j} k_j^T, and their gradients, tile by tile, for the exact engine: the general form
// of Alman, Song, Fast RoPE Attention, 2025 (2505.11892). W_t has the same few entries (a, b) for every t. A rotation by any
// number f(t) is such a map: four entries for each pair of dimensions, cos and sin of f(t) theta.
//
// W does not factorise, so scores are no matrix product: every pair (i, j) meets its own W. Queries are the lanes, so that
// t = i - j runs along them and an entry of W for all lanes is one load from its row over t. With entries grouped by a,
//
//   s_ij = sum_a q_ia sum_(b of a) W_ab[i-j] k_jb
//
// takes |S| + (number of different a) multiply-adds a pair: 3 D for a rotation, three times those of a product. Gradients by q
// and k take as many each, that by W |S|.
//
// Far from the diagonal maps are often constant (ReRoPE; keys by clipped distance). Where a block of queries and keys meets one
// matrix only, q W is computed once for each query, and the rest is a product of matrices again.

#ifndef RA_RELATIVE_H
#define RA_RELATIVE_H

#include "rope_attention.h"

typedef struct ra_relative {
  uint32_t count, table_rows;     // entries; different rows of numbers that they take
  uint32_t half, step, gap, D;    // of a rotation: pairs (p step, p step + gap) for p < half; else half is 0
  size_t diagonals, before;       // entries of a row of the table, those of t < 0 (Nk - 1)
  const float *table;             // [table_rows][diagonals] W by t
  uint32_t *entries;              // [count][3] a, b, row
  uint32_t *of_queries, *of_keys; // the same, grouped by a and by b
  uint32_t query_groups, key_groups;
  // the part of the table that a block of queries and keys meets, zeros where there is no such query or key
  float *window; // [table_rows][width], t falling with the key: see ra_relative_move
  size_t width, panel_size, strip_size;
  uint32_t first_query, last_key;
  uint32_t *same;                  // [diagonals] the last t up to which all matrices are that of t
  float *mapped;                   // [4][D][8] strips of q W
  float *products, *column, *sums; // of ra_relative_weights
} ra_relative;

// Bytes that ra_relative_init needs for blocks of up to `queries` and `keys`; RA_SIZE_OVERFLOW when they do not fit.
// O(|S| (queries + keys + 1) + N), and O(D N) for positions.
size_t ra_relative_bytes(const ra_problem *p, uint32_t queries, uint32_t keys);

// Fills *r for a problem with a relative map; `space` stays in use. Cost O(|S| N); for positions D/2 cos and sin a diagonal.
void ra_relative_init(ra_relative *r, const ra_problem *p, uint32_t queries, uint32_t keys, void *space);

// Moves the window: the functions below take queries from first_query on and keys up to last_key, as many as said to init.
void ra_relative_move(ra_relative *r, uint32_t first_query, uint32_t last_key);

// Whether queries i .. i + queries - 1 and keys key0 .. key0 + keys - 1 all meet the same matrix.
int ra_relative_is_constant(const ra_relative *r, uint32_t i, uint32_t queries, uint32_t key0, uint32_t keys);

// Where they do: r->mapped[n] = strip n of q W, for `strips` strips one after the other, queries from i on; and the gradient by
// such a strip back to the queries, dq[a][8] += sum_b W_ab dmapped[b][8].
void ra_relative_map(const ra_relative *r, const float *q_strip, uint32_t strips, uint32_t i, uint32_t key0);
void ra_relative_map_back(const ra_relative *r, const float *dmapped, uint32_t i, uint32_t key0, float *dq);

// In all of these a strip is [D][8], of queries from i on, and panels are [D][RA_TILE_ROWS], of keys from key0 on.

// s[n][8] for the keys of `panels` panels; rows of s are `row` apart.
void ra_relative_scores(const ra_relative *r, const float *k_panel, const float *q_strip, uint32_t i, uint32_t key0,
                        uint32_t panels, uint32_t row, float *s);

// dq[a][8] += sum_n ds[n][8] sum_b W_ab k_nb.
void ra_relative_queries(const ra_relative *r, const float *k_panel, const float *ds, uint32_t row, uint32_t i,
                         uint32_t key0, uint32_t panels, float *dq);

// dk[n][b] += sum_i ds[n][i] sum_a W_ab q_ia for four strips, `strip_size` apart; rows of ds are 32 queries, of dk
// dk_row apart.
void ra_relative_keys(const ra_relative *r, const float *q_strip, size_t strip_size, const float *ds, uint32_t i,
                      uint32_t key0, uint32_t panels, float *dk, size_t dk_row);

// dweights[n][t] += factor * sum_(i - j = t) ds_ij q_ia k_jb for the entries (a, b), for four strips; ds as above.
void ra_relative_weights(const ra_relative *r, const float *q_strip, size_t strip_size, const float *k_panel,
                         const float *ds, uint32_t i, uint32_t key0, uint32_t panels, float factor, float *dweights);

// --- One row, for samples (relative_rows.c) ---------------------------------------------------------------------------
//
// A query i (side 0) against keys j, j + 1, .., or a key j (side 1) against queries i, i + 1, ..; z_t [D][z_row] has these as
// columns, `diagonal` is where the table has the first pair, i - j + Nk - 1. O(|S|) a pair.

// y[n] = q W k of the n-th pair.
void ra_relative_row(const ra_relative *r, int side, const float *x, const float *z_t, size_t z_row, size_t diagonal,
                     uint32_t count, float *y);

// dx[d * dx_row] += sum_n ds[n] times the derivative of q W k of the n-th pair by x[d].
void ra_relative_row_gradient(const ra_relative *r, int side, const float *ds, const float *z_t, size_t z_row,
                              size_t diagonal, uint32_t count, float *dx, size_t dx_row);

#endif
