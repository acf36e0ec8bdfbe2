// SPDX-License-Identifier: MIT
//
// Workspaces: one block of bytes that the caller provides, handed out piece by piece. A layout is one function that takes
// pieces; run with base = NULL it only counts, so that the size that is asked for and the size that is used cannot differ.

#ifndef RA_WORKSPACE_H
#define RA_WORKSPACE_H

#include <stddef.h>
#include <stdint.h>

typedef struct ra_workspace_cursor {
  char *base;
  size_t used;
  int overflow;
} ra_workspace_cursor;

static inline size_t ra_pad16(size_t bytes) { return (bytes + 15) & ~(size_t)15; }

// The next rows * columns * bytes bytes, 16-byte aligned; NULL when only counting.
static inline void *ra_take(ra_workspace_cursor *w, size_t rows, size_t columns, size_t bytes) {
  uint64_t cells = (uint64_t)rows * columns; // both factors are below 2^32
  uint64_t all = (cells > UINT64_MAX / bytes ? UINT64_MAX : cells * bytes);
  if (all > SIZE_MAX - 16 || (size_t)ra_pad16((size_t)all) > SIZE_MAX - 16 - w->used) {
    w->overflow = 1;
    return NULL;
  }
  char *at = w->base ? w->base + w->used : NULL;
  w->used += ra_pad16((size_t)all);
  return at;
}

static inline float *ra_take_floats(ra_workspace_cursor *w, size_t rows, size_t columns) {
  return (float *)ra_take(w, rows, columns, sizeof(float));
}

#endif
