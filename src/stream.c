// SPDX-License-Identifier: MIT
//
// Streaming states: the sums of the polynomial engine over the keys so far, kept by the caller. O(rank (Dv + 1)) numbers for
// each key/value head however long the sequence is; O(rank (Dv + 1)) operations a token to append or to attend.
//
// Keys join the sums a chunk of 32 at a time; those that wait for the chunk to fill are attended with exp itself. Two
// states add up, as sums do, which is what sharding over workers and machines needs.
//
// This work is based on:
//   Katharopoulos et al. Transformers are RNNs. 2020 (2006.16236)

#include <math.h>
#include <string.h>

#include "pack.h"
#include "polynomial.h"

enum { CHUNK = RA_CHUNK };

// How a state begins. The waiting keys of all heads follow, then the sums of all heads.
typedef struct stream {
  uint32_t joined;  // 1 when some chunk is in the sums
  uint32_t waiting; // keys beside them, below 32
  uint32_t unused[2];
} stream;

// One head's part of a state.
typedef struct stream_head {
  float *y_rows; // [32][Dp] waiting keys, rotated
  float *u_rows; // [32][row]
  float *z;      // [rank][row]
} stream_head;

static int is_stream(const ra_problem *p) {
  return ra_check(p) == RA_OK && p->method == RA_POLYNOMIAL && !p->causal && p->query_length == p->key_length &&
         !p->key_positions && !p->segments && p->window_left < 0 && p->window_right < 0 && p->outlier_key_count == 0 &&
         p->outlier_query_count == 0;
}

// The layout of a state: sets head kv unless `head` is NULL. Without sums when not `whole`.
static void lay_out_stream(const ra_polynomial *e, uint32_t whole, ra_workspace_cursor *w, uint32_t kv,
                           stream_head *head) {
  uint32_t heads = e->p->batch * e->p->kv_heads;
  size_t y = (size_t)CHUNK * e->Dp, u = (size_t)CHUNK * e->row, z = e->rank * e->row;
  if (head) *head = (stream_head){NULL, NULL, NULL};
  ra_take(w, 1, 1, sizeof(stream));
  float *waiting = ra_take_floats(w, heads, y + u);
  if (head) head->y_rows = waiting + kv * (y + u), head->u_rows = head->y_rows + y;
  if (!whole) return;
  if (e->rank > UINT32_MAX / e->row) w->overflow = 1;
  float *sums = ra_take_floats(w, heads, z);
  if (head) head->z = sums + kv * z;
}

size_t ra_state_bytes(const ra_problem *p, uint32_t whole) {
  if (!is_stream(p)) return 0;
  ra_workspace_cursor sizes = {NULL, 0, 0}, w = {NULL, 0, 0};
  ra_polynomial e = ra_polynomial_arrange(p, RA_STREAM, &sizes);
  if (sizes.overflow) return RA_SIZE_OVERFLOW;
  lay_out_stream(&e, whole, &w, 0, NULL);
  return w.overflow ? RA_SIZE_OVERFLOW : w.used;
}

size_t ra_state_workspace(const ra_problem *p) {
  if (!is_stream(p)) return 0;
  ra_workspace_cursor w = {NULL, 0, 0};
  ra_polynomial_arrange(p, RA_STREAM, &w);
  return w.overflow ? RA_SIZE_OVERFLOW : w.used;
}

// The workspace of a call. Nothing is centred: the means are 0.
static ra_polynomial open_stream(const ra_problem *p, void *workspace) {
  ra_workspace_cursor cursor = {workspace, 0, 0};
  ra_polynomial e = ra_polynomial_arrange(p, RA_STREAM, &cursor);
  e.state->not_positive = 0;
  e.state->centred = 0, e.state->shift = 0;
  ra_fill(e.k_mean, e.Dp, 0), ra_fill(e.v_mean, e.Dvp, 0), ra_fill(e.q_mean, e.Dp, 0);
  ra_rotary_init(&e.state->q_rotary, p, 1, NULL, e.q_space);
  return e;
}

// Without sums when the state is only its beginning.
static stream_head head_of_stream(const ra_polynomial *e, void *state, uint32_t whole, uint32_t kv) {
  ra_workspace_cursor w = {state, 0, 0};
  stream_head head;
  lay_out_stream(e, whole, &w, kv, &head);
  return head;
}

// Turns to one head of a state: its sums become those of *e.
static stream_head open_stream_head(ra_polynomial *e, void *state, uint32_t whole, uint32_t kv) {
  stream_head head = head_of_stream(e, state, whole, kv);
  e->z = head.z;
  ra_rotary_batch(&e->state->q_rotary, e->p, 1, kv / e->p->kv_heads);
  return head;
}

// The waiting keys are a chunk: it joins the sums. Needs the weights of the head.
static void join_chunk(const ra_polynomial *e, const stream_head *head) {
  float live[CHUNK];
  ra_transpose(head->y_rows, e->Dp, CHUNK, e->Dp, e->y_t, CHUNK);
  ra_live_tokens(CHUNK, 0, live);
  ra_features_lower(&e->f, e->y_t, live, e->lower);
  ra_update_state(e, e->y_t, head->u_rows);
}

int ra_state_append(const ra_problem *p, const ra_arrays *x, void *state, void *workspace) {
  if (!is_stream(p)) return RA_ERROR_PROBLEM;
  ra_polynomial e = open_stream(p, workspace);
  stream *s = state;
  uint32_t fills = s->waiting + p->key_length >= CHUNK;
  for (uint32_t kv = 0; kv < p->batch * p->kv_heads; kv++) {
    stream_head head = open_stream_head(&e, state, fills, kv);
    if (fills) ra_take_weights(&e, kv);
    const float *k = x->k + ra_head(p, kv, p->kv_heads, p->key_length, e.D);
    const float *v = x->v + ra_head(p, kv, p->kv_heads, p->key_length, e.Dv);
    for (uint32_t j = 0, waiting = s->waiting, count; j < p->key_length; j += count) {
      count = ra_min_u32(CHUNK - waiting, p->key_length - j);
      ra_rotary_rows(&e.state->q_rotary, k + j * e.k_row, e.k_row, head.y_rows + waiting * e.Dp, e.Dp, count, j,
                     RA_ROTATE, 1.0f);
      for (uint32_t n = 0; n < count; n++) {
        float *u = head.u_rows + (waiting + n) * e.row;
        memcpy(u, v + (j + n) * e.v_row, e.Dv * sizeof *u);
        u[e.Dvp] = 1;
      }
      waiting += count;
      if (waiting == CHUNK) join_chunk(&e, &head), waiting = 0;
    }
  }
  s->joined |= fills;
  s->waiting = (s->waiting + p->key_length) % CHUNK;
  return RA_OK;
}

int ra_state_attend(const ra_problem *p, const ra_arrays *x, const void *state, void *workspace) {
  if (!is_stream(p)) return RA_ERROR_PROBLEM;
  ra_polynomial e = open_stream(p, workspace);
  const stream *s = state;
  uint32_t group = ra_group(p);
  for (uint32_t kv = 0; kv < p->batch * p->kv_heads; kv++) {
    stream_head own = open_stream_head(&e, (void *)(uintptr_t)state, s->joined, kv); // only read
    for (uint32_t head = kv * group; head < (kv + 1) * group; head++) {
      ra_heads at = ra_heads_of(&e, head);
      for (uint32_t i = 0; i < p->query_length; i += CHUNK) {
        uint32_t count = ra_min_u32(CHUNK, p->query_length - i);
        ra_seen seen;
        memset(&seen, 0, sizeof seen);
        ra_fill(seen.end, count, (float)s->waiting);
        ra_see_strips(&seen);
        ra_fill(e.sum_t, (size_t)e.columns * CHUNK, 0);
        ra_load_queries(&e, x->q + at.q, i, count, s->joined != 0);
        ra_begin_references(&e, !s->joined);
        if (s->joined) ra_read_state(&e, e.x_t, count, e.sum_t);
        if (s->waiting > 0) ra_add_block(&e, own.y_rows, own.u_rows, &seen);
        uint32_t bad = ra_finish_chunk(&e, i, count, x->out + at.out, x->lse + at.lse);
        if (bad && (s->joined || s->waiting > 0)) e.state->not_positive = 1;
      }
    }
  }
  return e.state->not_positive > 0 ? RA_NOT_POSITIVE : RA_OK;
}

int ra_state_merge(const ra_problem *p, void *state, const void *other, void *workspace) {
  if (!is_stream(p)) return RA_ERROR_PROBLEM;
  ra_polynomial e = open_stream(p, workspace);
  stream *s = state;
  const stream *t = other;
  uint32_t fills = s->waiting + t->waiting >= CHUNK;
  for (uint32_t kv = 0; kv < p->batch * p->kv_heads; kv++) {
    stream_head head = open_stream_head(&e, state, 1, kv), added = head_of_stream(&e, (void *)(uintptr_t)other, 1, kv);
    if (fills) ra_take_weights(&e, kv);
    for (size_t n = 0; n < (size_t)e.f.rank * e.row; n += 4)
      f32x4_store(head.z + n, f32x4_add(f32x4_load(head.z + n), f32x4_load(added.z + n)));
    for (uint32_t n = 0, waiting = s->waiting; n < t->waiting; n++) {
      memcpy(head.y_rows + waiting * e.Dp, added.y_rows + n * e.Dp, e.Dp * sizeof *head.y_rows);
      memcpy(head.u_rows + waiting * e.row, added.u_rows + n * e.row, e.row * sizeof *head.u_rows);
      if (++waiting == CHUNK) join_chunk(&e, &head), waiting = 0;
    }
  }
  s->joined |= t->joined | fills;
  s->waiting = (s->waiting + t->waiting) % CHUNK;
  return RA_OK;
}
