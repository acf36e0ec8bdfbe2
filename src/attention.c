// SPDX-License-Identifier: MIT
//
// The contract of rope_attention.h: checks the problem, then hands it to the engine that it names.

#include "engines.h"

#include <math.h>

int ra_check(const ra_problem *p) {
  int sizes = p->batch >= 1 && p->kv_heads >= 1 && p->heads >= 1 && p->heads % p->kv_heads == 0 &&
              p->query_length >= 1 && p->key_length >= 1 && p->head_dim >= 1 && p->head_dim <= RA_MAX_HEAD_DIM &&
              p->value_dim >= 1 && p->value_dim <= RA_MAX_HEAD_DIM;
  int rotary = p->rotary_dim % 2 == 0 && p->rotary_dim <= p->head_dim && (p->rotary_dim == 0 || p->frequencies);
  int positions = (int64_t)p->query_offset + p->query_length <= INT32_MAX && p->key_length <= INT32_MAX;
  int engine =
      p->method <= RA_POLYNOMIAL && (p->method != RA_POLYNOMIAL || (p->degree <= RA_MAX_DEGREE && p->coefficients));
  int flags = p->interleaved <= 1 && p->causal <= 1 && isfinite(p->scale);
  // units are counted in 32 bits
  uint64_t blocks = (uint64_t)p->query_length / 32 + p->key_length / 32 + 4;
  int units = sizes && (uint64_t)p->batch * p->heads <= UINT32_MAX / 4 / blocks;
  return units && rotary && positions && engine && flags ? RA_OK : RA_ERROR_PROBLEM;
}

static const ra_engine *engine_of(const ra_problem *p) {
  static const ra_engine *const engines[] = {&ra_naive_engine, &ra_exact_engine, &ra_polynomial_engine};
  return engines[p->method];
}

size_t ra_workspace(const ra_problem *p, uint32_t pass) {
  if (ra_check(p) != RA_OK || pass > RA_BACKWARD) return 0;
  ra_workspace_cursor w = {NULL, 0, 0};
  engine_of(p)->layout(p, pass, &w);
  return w.overflow ? RA_SIZE_OVERFLOW : w.used;
}

uint32_t ra_units(const ra_problem *p, uint32_t pass) {
  if (ra_check(p) != RA_OK || pass > RA_BACKWARD) return 0;
  return engine_of(p)->units(p, pass);
}

int ra_run(const ra_problem *p, const ra_arrays *x, uint32_t pass, void *workspace, uint32_t first, uint32_t last) {
  if (ra_check(p) != RA_OK || pass > RA_BACKWARD) return RA_ERROR_PROBLEM;
  if (first > last || last > engine_of(p)->units(p, pass)) return RA_ERROR_UNITS;
  return engine_of(p)->run(p, x, pass, workspace, first, last);
}

uint32_t ra_relaxed(void) {
#ifdef RA_RELAXED
  return 1;
#else
  return 0;
#endif
}
