// SPDX-License-Identifier: MIT
//
// What an engine gives the dispatcher (attention.c), and the small facts of a problem that all of them use.

#ifndef RA_ENGINES_H
#define RA_ENGINES_H

#include "rope_attention.h"
#include "workspace.h"

// An engine: the same three questions as the contract, for a problem that was found valid.
typedef struct ra_engine {
  void (*layout)(const ra_problem *p, uint32_t pass, ra_workspace_cursor *w);
  uint32_t (*units)(const ra_problem *p, uint32_t pass);
  int (*run)(const ra_problem *p, const ra_arrays *x, uint32_t pass, void *workspace, uint32_t first, uint32_t last);
} ra_engine;

extern const ra_engine ra_naive_engine, ra_exact_engine, ra_polynomial_engine, ra_toeplitz_engine;

// Whether the units of a pass of the Toeplitz engine can be counted in 32 bits.
int ra_toeplitz_fits(const ra_problem *p);

// Parts of ra_warm_up.
void ra_exact_warm_up(uint32_t calls);
void ra_polynomial_warm_up(uint32_t calls);

// RA_OK or RA_ERROR_PROBLEM.
int ra_check(const ra_problem *p);

static inline uint32_t ra_min_u32(uint32_t a, uint32_t b) { return a < b ? a : b; }
static inline uint32_t ra_ceil_div(uint32_t a, uint32_t b) { return a / b + (a % b != 0); }

// Keys that query i may see: first .. end-1. Both rise with i; first = end when there are none.
typedef struct ra_range {
  uint32_t first, end;
} ra_range;

ra_range ra_keys_of(const ra_problem *p, uint32_t i);

static inline uint32_t ra_key_limit(const ra_problem *p, uint32_t i) { return ra_keys_of(p, i).end; }

// Where key j is among keys j0 .. j0 + count - 1; the nearer end for keys elsewhere.
static inline uint32_t ra_place(uint32_t j, uint32_t j0, uint32_t count) {
  return j <= j0 ? 0 : ra_min_u32(j - j0, count);
}

// The first query whose range of keys ends behind key j: none before it sees j. Nq when there is none.
uint32_t ra_query_start(const ra_problem *p, uint32_t j);

// The first query whose range of keys begins behind key j: none from there on sees j.
uint32_t ra_query_end(const ra_problem *p, uint32_t j);

// Scores come from a relative map, not from rotated rows.
static inline int ra_is_relative(const ra_problem *p) { return p->relative_positions || p->support_count > 0; }

// m |i + query_offset - j| of entry n = i - j + Nk - 1 of what goes by i - j.
static inline double ra_alibi(const ra_problem *p, size_t head, size_t n) {
  double distance = (double)((int64_t)n - p->key_length + 1 + p->query_offset);
  return p->alibi[head % p->heads] * (distance < 0 ? -distance : distance);
}

// Distances from which on the polynomial engine takes keys through its state, when causal; nearer pairs are done exactly.
static inline uint32_t ra_state_from(const ra_problem *p) { return p->decay_count > 0 ? p->decay_from : 1; }

// Entries of what goes by i - j: bias, relative maps.
static inline size_t ra_diagonals(const ra_problem *p) { return (size_t)p->query_length + p->key_length - 1; }

// Chunks of the polynomial engine: up to 32 queries of one segment. Where the one that query i is in begins, and ends.
uint32_t ra_chunk_start(const ra_problem *p, uint32_t i);
uint32_t ra_chunk_end(const ra_problem *p, uint32_t i);

// Keys that the polynomial engine takes through its state for the chunk that begins at query i; both ends rise with i. They are
// keys that all its queries see: those of its segment; when causal, ra_state_from() or more before the chunk; in a
// window, from that of the last query to that of the first, a multiple of 32 of them, so that keys leave the state by
// the batches in which they joined. The chunk's other keys are done exactly.
ra_range ra_state_keys(const ra_problem *p, uint32_t i);

enum { RA_TURNOVER = 4 };

// Tokens leave a sum by subtraction, which leaves the rounding of what it held. So it is made anew once RA_TURNOVER
// times as many have left as stay, and where that costs no more than to subtract.
static inline int ra_is_worn(uint32_t gone, uint32_t leaving, uint32_t staying) {
  return leaving >= staying || gone + (uint64_t)leaving > RA_TURNOVER * (uint64_t)staying;
}

// Outliers of one key/value head, ascending; of queries the numbers are those of ra_problem.outlier_queries.
typedef struct ra_outliers {
  const uint32_t *rows;
  uint32_t count;
} ra_outliers;

ra_outliers ra_outlier_keys(const ra_problem *p, size_t kv_head);
ra_outliers ra_outlier_queries(const ra_problem *p, size_t kv_head);

// Those of them with numbers first .. end-1.
ra_outliers ra_outliers_within(ra_outliers all, uint64_t first, uint64_t end);

// Bit n: token first + n is one of them, n < count <= 32. Of queries of the h-th head of `group`, of keys with group =
// 1, h = 0.
uint32_t ra_outlier_bits(ra_outliers all, uint32_t group, uint32_t h, uint32_t first, uint32_t count);

// Where rows are: floats from one token to the next, and to the first token of a head (flat: batch * heads + head).
static inline size_t ra_row(const ra_problem *p, uint32_t heads, size_t width) {
  return p->layout ? heads * width : width;
}

static inline size_t ra_head(const ra_problem *p, size_t head, uint32_t heads, size_t length, size_t width) {
  return p->layout ? (head / heads * length * heads + head % heads) * width : head * length * width;
}

// Floats of ra_arrays.means for a key/value head.
static inline size_t ra_means(const ra_problem *p) { return 2 * (size_t)p->head_dim + p->value_dim; }

// Query heads that share a key/value head.
static inline uint32_t ra_group(const ra_problem *p) { return p->heads / p->kv_heads; }

#endif
