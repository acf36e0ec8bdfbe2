// SPDX-License-Identifier: MIT
//
// Products that more than one file needs, eight lanes wide. All add to C, or overwrite it, as said; none reads or writes past
// the rows and lanes named.

#ifndef RA_PRODUCTS_H
#define RA_PRODUCTS_H

#include <stddef.h>
#include <stdint.h>

// c[r][8] += sum_n a[n][r] * b[n][8], r < rows, n < count: numerators (a = values, b = weights), dq (a = keys, b = dS).
void ra_add_columns(const float *a, size_t a_row, uint32_t rows, const float *b, size_t b_row, uint32_t count, float *c,
                    size_t c_row);

// c[r][8] = sum_d a[r][d] * b[d][8], r < rows, d < columns: scores (a = keys, b = queries), dP (a = values, b = dout).
void ra_set_rows(const float *a, size_t a_row, uint32_t rows, const float *b, size_t b_row, uint32_t columns, float *c,
                 size_t c_row);

#endif
