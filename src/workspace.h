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

// The next rows * columns * bytes bytes, 16-byte aligned; NULL when only counting.
void *ra_take(ra_workspace_cursor *w, size_t rows, size_t columns, size_t bytes);

float *ra_take_floats(ra_workspace_cursor *w, size_t rows, size_t columns);

#endif
