// SPDX-License-Identifier: MIT
//
// The contract of rope_attention.h: checks the problem, then hands it to the engine that it names.

#include "engines.h"
#include "lags.h"
#include "monomials.h"
#include "softmax.h"

#include <float.h>
#include <math.h>

// NULL for a number that names none. The oracle stays out of WebAssembly, where it would take 20 KB.
static const ra_engine *engine_of(const ra_problem *p) {
  switch (p->method) {
#ifndef __wasm__
  case RA_NAIVE:
    return &ra_naive_engine;
#endif
  case RA_EXACT:
    return &ra_exact_engine;
  case RA_POLYNOMIAL:
    return &ra_polynomial_engine;
  case RA_TOEPLITZ:
    return &ra_toeplitz_engine;
  default:
    return NULL;
  }
}

// Whether the relative map, if there is one, is one of the two and stands alone.
static int check_relative(const ra_problem *p) {
  if (!ra_is_relative(p)) return 1;
  if (p->relative_positions) return p->support_count == 0 && !p->cos_table && !p->query_positions && !p->key_positions;
  int inside = p->support && p->weights && p->rotary_dim == 0 && p->support_count <= RA_MAX_SUPPORT;
  for (uint32_t n = 0; inside && n < p->support_count; n++)
    inside = p->support[2 * (size_t)n] < p->head_dim && p->support[2 * (size_t)n + 1] < p->head_dim;
  return inside;
}

// Ascending numbers below `end`, in every key/value head.
static int are_outliers(const ra_problem *p, const uint32_t *rows, uint32_t count, uint64_t end) {
  if (count > 0 && !rows) return 0;
  for (size_t n = 0; n < (size_t)p->batch * p->kv_heads * count; n++)
    if (rows[n] >= end || (n % count > 0 && rows[n] <= rows[n - 1])) return 0;
  return 1;
}

// Whether there are decays for the far part of the bias, and the near part is finite.
static int check_decays(const ra_problem *p) {
  int there = p->bias && p->decay_count >= 1 && p->decay_count <= RA_MAX_DECAYS && p->decay_from >= 1 &&
              p->decay_from <= RA_MAX_NEAR && p->decay_rates && p->decay_weights && p->decay_tops &&
              p->lag_degree <= RA_MAX_LAG_DEGREE && p->lag_coefficients;
  for (size_t h = 0; there && h < p->bias_heads; h++) {
    there = isfinite(p->decay_tops[h]);
    for (size_t n = h * p->decay_count; n < (h + 1) * p->decay_count; n++)
      there &= p->decay_rates[n] >= 0 && p->decay_rates[n] <= 1e19 && isfinite(p->decay_weights[n]);
    for (int64_t t = 0; there && t < (int64_t)p->decay_from + RA_CHUNK; t++) { // chunks do some more exactly
      int64_t at = t - p->query_offset + p->key_length - 1;
      float bias = at < 0 || at >= (int64_t)ra_diagonals(p) ? 0 : p->bias[h * ra_diagonals(p) + (size_t)at];
      there = bias > RA_FORBIDDEN / (float)RA_LOG2_E && bias <= FLT_MAX;
    }
  }
  return there;
}

int ra_check(const ra_problem *p) {
  int sizes = p->batch >= 1 && p->kv_heads >= 1 && p->heads >= 1 && p->heads % p->kv_heads == 0 &&
              p->query_length >= 1 && p->key_length >= 1 && p->head_dim >= 1 && p->head_dim <= RA_MAX_HEAD_DIM &&
              p->value_dim >= 1 && p->value_dim <= RA_MAX_HEAD_DIM;
  int rotary = p->rotary_dim % 2 == 0 && p->rotary_dim <= p->head_dim && isfinite(p->rotary_factor) &&
               (p->rotary_dim == 0 || p->frequencies || (p->cos_table && p->sin_table && p->table_rows >= 1));
  int positions =
      (int64_t)p->query_offset + p->query_length <= INT32_MAX && p->key_length <= INT32_MAX &&
      (!(p->query_positions || p->key_positions) || p->position_batches == 1 || p->position_batches == p->batch);
  int features = p->method == RA_POLYNOMIAL || p->method == RA_TOEPLITZ;
  int engine = engine_of(p) && (!features || (p->degree <= RA_MAX_DEGREE && p->coefficients));
  int flags = p->interleaved <= 1 && p->causal <= 1 && p->layout <= 1 && isfinite(p->scale);
  int masks = p->window_left >= -1 && p->window_right >= -1 && (!p->segments || p->segment_count >= 1) &&
              p->softcap >= 0 && p->softcap <= FLT_MAX && p->score_bound >= 0 &&
              (!p->bias || p->bias_heads == 1 || p->bias_heads == p->heads);
  for (uint32_t h = 0; p->alibi && h < p->heads; h++) masks &= p->alibi[h] >= 0 && p->alibi[h] <= 1e19f;
  int outliers = p->outlier_query_count || p->outlier_key_count;
  int states = sizes && p->method == RA_POLYNOMIAL && (p->bias || p->decay_count > 0);
  int by_states = !states || (check_decays(p) && !p->segments && !p->alibi);
  int plain = p->softcap == 0 && !p->mask && !p->allowed && !ra_is_relative(p) && !p->sinks && by_states &&
              (!(p->alibi || p->bias) || (p->causal && !outliers));
  int by_distance = p->softcap == 0 && !p->mask && !p->allowed && !p->sinks && !p->segments && !p->alibi && !outliers;
  int known = (p->method != RA_POLYNOMIAL || plain) && (p->method != RA_TOEPLITZ || by_distance);
  // units are counted in 32 bits
  uint64_t blocks = (uint64_t)p->query_length / 32 + p->key_length / 32 + 4;
  int units = sizes && (uint64_t)p->batch * p->heads <= UINT32_MAX / 4 / blocks &&
              (p->method != RA_TOEPLITZ || ra_toeplitz_fits(p));
  int valid = units && rotary && positions && engine && flags && masks && known && check_relative(p);
  return valid && are_outliers(p, p->outlier_keys, p->outlier_key_count, p->key_length) &&
                 are_outliers(p, p->outlier_queries, p->outlier_query_count, (uint64_t)ra_group(p) * p->query_length)
             ? RA_OK
             : RA_ERROR_PROBLEM;
}

// The first position of the segment that holds `position`, and of the next one.
static void segment_of(const ra_problem *p, int64_t position, int64_t *first, int64_t *end) {
  uint32_t low = 0, high = p->segment_count; // segments[low] <= position < segments[high]
  while (high - low > 1) {
    uint32_t middle = low + (high - low) / 2;
    if (p->segments[middle] <= position) low = middle;
    else high = middle;
  }
  *first = p->segments[low];
  *end = high < p->segment_count ? p->segments[high] : INT64_MAX;
}

ra_range ra_keys_of(const ra_problem *p, uint32_t i) {
  int64_t position = (int64_t)i + p->query_offset, first = 0, end = p->key_length;
  if (p->causal && position + 1 < end) end = position + 1;
  if (p->window_left >= 0 && position - p->window_left > first) first = position - p->window_left;
  if (p->window_right >= 0 && position + p->window_right + 1 < end) end = position + p->window_right + 1;
  if (p->segments) {
    int64_t segment_first, segment_end;
    segment_of(p, position, &segment_first, &segment_end);
    if (segment_first > first) first = segment_first;
    if (segment_end < end) end = segment_end;
  }
  if (first > p->key_length) first = p->key_length;
  if (end < first) end = first;
  return (ra_range){(uint32_t)first, (uint32_t)end};
}

uint32_t ra_chunk_start(const ra_problem *p, uint32_t i) {
  uint32_t start = i / RA_CHUNK * RA_CHUNK;
  int64_t first, end, position = (int64_t)i + p->query_offset;
  if (!p->segments) return start;
  segment_of(p, position, &first, &end);
  if (p->segment_count == 1 || position < p->segments[1]) return start; // the first one holds all positions before it
  return first - p->query_offset > start ? (uint32_t)(first - p->query_offset) : start;
}

uint32_t ra_chunk_end(const ra_problem *p, uint32_t i) {
  uint64_t end = (uint64_t)i / RA_CHUNK * RA_CHUNK + RA_CHUNK;
  if (end > p->query_length) end = p->query_length;
  if (!p->segments) return (uint32_t)end;
  int64_t first, segment_end;
  segment_of(p, (int64_t)i + p->query_offset, &first, &segment_end);
  return segment_end < (int64_t)end + p->query_offset ? (uint32_t)(segment_end - p->query_offset) : (uint32_t)end;
}

ra_range ra_state_keys(const ra_problem *p, uint32_t i) {
  int64_t first = 0, end = INT64_MAX, behind = INT64_MAX; // behind: what the chunk's first query may see ends there
  int64_t position = (int64_t)i / RA_CHUNK * RA_CHUNK + p->query_offset;
  if (p->segments) segment_of(p, (int64_t)i + p->query_offset, &first, &end);
  if (p->window_right >= 0) behind = position + p->window_right + 1;
  if (p->causal) behind = position + 1 - ra_state_from(p);
  if (p->window_left >= 0) {
    int64_t from = position + RA_CHUNK - 1 - p->window_left;
    if (behind != INT64_MAX) from += (behind - from) & (RA_CHUNK - 1);
    if (from > first) first = from;
  }
  if (end > p->key_length) end = p->key_length;
  if (behind < end) end = behind;
  if (first > p->key_length) first = p->key_length;
  return (ra_range){(uint32_t)first, (uint32_t)(end < first ? first : end)};
}

// The first query whose range of keys ends, or begins, behind key j; ends and beginnings rise with i.
static uint32_t first_query(const ra_problem *p, uint32_t j, int begins) {
  uint32_t low = 0, high = p->query_length;
  while (low < high) {
    uint32_t middle = low + (high - low) / 2;
    ra_range keys = ra_keys_of(p, middle);
    if ((begins ? keys.first : keys.end) > j) high = middle;
    else low = middle + 1;
  }
  return low;
}

uint32_t ra_query_start(const ra_problem *p, uint32_t j) { return first_query(p, j, 0); }

uint32_t ra_query_end(const ra_problem *p, uint32_t j) { return first_query(p, j, 1); }

static ra_outliers outliers_of(const uint32_t *rows, uint32_t count, size_t kv_head) {
  return (ra_outliers){count ? rows + kv_head * count : NULL, count};
}

ra_outliers ra_outlier_keys(const ra_problem *p, size_t kv_head) {
  return outliers_of(p->outlier_keys, p->outlier_key_count, kv_head);
}

ra_outliers ra_outlier_queries(const ra_problem *p, size_t kv_head) {
  return outliers_of(p->outlier_queries, p->outlier_query_count, kv_head);
}

// How many are below `row`.
static uint32_t outliers_below(ra_outliers all, uint64_t row) {
  uint32_t low = 0, high = all.count;
  while (low < high) {
    uint32_t middle = low + (high - low) / 2;
    if (all.rows[middle] < row) low = middle + 1;
    else high = middle;
  }
  return low;
}

ra_outliers ra_outliers_within(ra_outliers all, uint64_t first, uint64_t end) {
  if (all.count == 0) return all;
  uint32_t before = outliers_below(all, first);
  return (ra_outliers){all.rows + before, outliers_below(all, end) - before};
}

uint32_t ra_outlier_bits(ra_outliers all, uint32_t group, uint32_t h, uint32_t first, uint32_t count) {
  ra_outliers near = ra_outliers_within(all, (uint64_t)first * group, ((uint64_t)first + count) * group);
  uint32_t bits = 0;
  for (uint32_t n = 0; n < near.count; n++)
    if (near.rows[n] % group == h) bits |= 1u << (near.rows[n] / group - first);
  return bits;
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

void ra_warm_up(uint32_t calls) {
  ra_exact_warm_up(calls);
  ra_polynomial_warm_up(calls);
}

uint32_t ra_relaxed(void) {
#ifdef RA_RELAXED
  return 1;
#else
  return 0;
#endif
}
