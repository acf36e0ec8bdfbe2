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

extern const ra_engine ra_naive_engine, ra_exact_engine, ra_polynomial_engine;

// RA_OK or RA_ERROR_PROBLEM.
int ra_check(const ra_problem *p);

static inline uint32_t ra_min_u32(uint32_t a, uint32_t b) { return a < b ? a : b; }
static inline uint32_t ra_ceil_div(uint32_t a, uint32_t b) { return a / b + (a % b != 0); }

// Keys that query i may see: 0 .. limit-1.
static inline uint32_t ra_key_limit(const ra_problem *p, uint32_t i) {
  if (!p->causal) return p->key_length;
  int64_t limit = (int64_t)i + p->query_offset + 1;
  return limit <= 0 ? 0 : limit < p->key_length ? (uint32_t)limit : p->key_length;
}

// The first query that may see key j; Nq when there is none.
static inline uint32_t ra_query_start(const ra_problem *p, uint32_t j) {
  if (!p->causal) return 0;
  int64_t start = (int64_t)j - p->query_offset;
  return start <= 0 ? 0 : start < p->query_length ? (uint32_t)start : p->query_length;
}

// Keys that the polynomial engine takes through its state for a chunk of queries that begins at i: all when not causal, else
// those at positions before the chunk's first query. The chunk's other keys are done exactly.
static inline uint32_t ra_state_keys(const ra_problem *p, uint32_t i) {
  if (!p->causal) return p->key_length;
  int64_t keys = (int64_t)i + p->query_offset;
  return keys <= 0 ? 0 : keys < p->key_length ? (uint32_t)keys : p->key_length;
}

// Query heads that share a key/value head.
static inline uint32_t ra_group(const ra_problem *p) { return p->heads / p->kv_heads; }

#endif
