// SPDX-License-Identifier: MIT
//
// Dense products, the linear part of the training problem (MATH.md section 1): panels of eight columns by the micro-kernel of
// products.h, so 2 rows inner columns operations at about the multiply-add peak.

#include "products.h"
#include "rope_attention.h"

// Terms of one partial sum: rounding grows with 128 and with the number of parts, not with their product.
enum { PART = 128 };

void ra_product(const float *a, const float *b, uint32_t rows, uint32_t inner, uint32_t columns, float *c) {
  for (uint32_t p = 0; p < columns; p += 8) ra_set_rows(a, inner, rows, b + p, columns, inner, c + p, columns);
}

void ra_transposed_product(const float *a, const float *b, uint32_t inner, uint32_t rows, uint32_t columns, float *c) {
  for (size_t n = 0; n < (size_t)rows * columns; n++) c[n] = 0;
  for (uint32_t n = 0; n < inner; n += PART) {
    uint32_t count = inner - n < PART ? inner - n : PART;
    for (uint32_t p = 0; p < columns; p += 8)
      ra_add_columns(a + (size_t)n * rows, rows, rows, b + (size_t)n * columns + p, columns, count, c + p, columns);
  }
}
