// SPDX-License-Identifier: MIT
//
// See workspace.h.

#include "workspace.h"

static size_t pad16(size_t bytes) { return (bytes + 15) & ~(size_t)15; }

void *ra_take(ra_workspace_cursor *w, size_t rows, size_t columns, size_t bytes) {
  uint64_t cells = (uint64_t)rows * columns; // both factors are below 2^32
  uint64_t all = (cells > UINT64_MAX / bytes ? UINT64_MAX : cells * bytes);
  if (all > SIZE_MAX - 16 || (size_t)pad16((size_t)all) > SIZE_MAX - 16 - w->used) {
    w->overflow = 1;
    return NULL;
  }
  char *at = w->base ? w->base + w->used : NULL;
  w->used += pad16((size_t)all);
  return at;
}

float *ra_take_floats(ra_workspace_cursor *w, size_t rows, size_t columns) {
  return (float *)ra_take(w, rows, columns, sizeof(float));
}
