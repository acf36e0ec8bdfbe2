// SPDX-License-Identifier: MIT
//
// Monomial features of chunks of 32 tokens, and their Jacobian; see monomials.h. One multiplication a feature and token
// forward, two multiply-adds backward.

#include "monomials.h"

#include "pack.h"

size_t ra_rank(uint32_t head_dim, uint32_t degree) {
  uint64_t rank = 1; // C(D + m, m) = C(D + m - 1, m - 1) (D + m) / m, exact at every step
  for (uint32_t m = 1; m <= degree; m++) {
    rank = rank * (head_dim + (uint64_t)m) / m;
    if (rank >= UINT32_MAX) return RA_SIZE_OVERFLOW;
  }
  return (size_t)rank;
}

size_t ra_features_cells(uint32_t head_dim, uint32_t degree) { return ((size_t)degree + 1) * ((size_t)head_dim + 1); }

void ra_features_init(ra_features *f, uint32_t head_dim, uint32_t degree, uint32_t *tail) {
  uint32_t D = head_dim, rows = 1; // rows of the degree below
  *f = (ra_features){.D = D, .degree = degree, .tail = tail};
  f->first[1] = 1;
  for (uint32_t a = 0; a <= D; a++) tail[a] = 0; // the constant goes with every variable
  for (uint32_t m = 1; m <= degree; m++) {
    const uint32_t *below = tail + (size_t)(m - 1) * (D + 1);
    uint32_t *here = tail + (size_t)m * (D + 1);
    here[0] = 0;
    for (uint32_t a = 0; a < D; a++) here[a + 1] = here[a] + (rows - below[a]);
    rows = here[D];
    f->first[m + 1] = f->first[m] + rows;
  }
  f->rank = f->first[degree + 1];
  f->lower = degree == 0 ? f->rank : f->first[degree];
}

void ra_features_weights(const ra_features *f, const float *coefficients, float *weights, uint8_t *run) {
  uint32_t D = f->D;
  weights[0] = 1, run[0] = 0;
  for (uint32_t m = 1; m <= f->degree; m++) {
    const uint32_t *below = f->tail + (size_t)(m - 1) * (D + 1);
    uint32_t row = f->first[m], rows_below = f->first[m] - f->first[m - 1];
    for (uint32_t a = 0; a < D; a++)
      for (uint32_t t = below[a]; t < rows_below; t++, row++) {
        uint32_t from =
            f->first[m - 1] + t; // x_a times this row, which begins with run[from] x_a's when below x_{a+1}'s
        run[row] = (uint8_t)(t < below[a + 1] ? run[from] + 1 : 1);
        weights[row] = weights[from] * (float)m / run[row];
      }
  }
  for (uint32_t m = 0; m <= f->degree; m++)
    for (uint32_t row = f->first[m]; row < f->first[m + 1]; row++) weights[row] *= coefficients[m];
}

// y[r] = x * below[r], rows of 32
RA_KERNEL void multiply_rows(const float *x, const float *below, uint32_t rows, float *y) {
  for (uint32_t h = 0; h < RA_CHUNK; h += 16) {
    f32x4 x0 = f32x4_load(x + h), x1 = f32x4_load(x + h + 4), x2 = f32x4_load(x + h + 8), x3 = f32x4_load(x + h + 12);
    const float *from = below + h;
    float *to = y + h;
    RA_ROLLED
    for (uint32_t r = 0; r < rows; r++) {
      f32x4_store(to, f32x4_mul(x0, f32x4_load(from)));
      f32x4_store(to + 4, f32x4_mul(x1, f32x4_load(from + 4)));
      f32x4_store(to + 8, f32x4_mul(x2, f32x4_load(from + 8)));
      f32x4_store(to + 12, f32x4_mul(x3, f32x4_load(from + 12)));
      from += RA_CHUNK;
      to += RA_CHUNK;
    }
  }
}

// in the forward pass this was y[r] = x * below[r], so now dbelow[r] += x * dy[r] and dx += sum_r below[r] * dy[r]
RA_KERNEL void multiply_rows_backward(const float *x, const float *below, uint32_t rows, const float *dy, float *dbelow,
                                      float *dx) {
  for (uint32_t h = 0; h < RA_CHUNK; h += 8) {
    f32x4 x0 = f32x4_load(x + h), x1 = f32x4_load(x + h + 4);
    f32x4 dx0 = f32x4_load(dx + h), dx1 = f32x4_load(dx + h + 4);
    const float *from = below + h, *dfrom = dy + h;
    float *to = dbelow + h;
    RA_ROLLED
    for (uint32_t r = 0; r < rows; r++) {
      f32x4 dy0 = f32x4_load(dfrom), dy1 = f32x4_load(dfrom + 4);
      f32x4_store(to, f32x4_madd(x0, dy0, f32x4_load(to)));
      f32x4_store(to + 4, f32x4_madd(x1, dy1, f32x4_load(to + 4)));
      dx0 = f32x4_madd(dy0, f32x4_load(from), dx0);
      dx1 = f32x4_madd(dy1, f32x4_load(from + 4), dx1);
      from += RA_CHUNK;
      dfrom += RA_CHUNK;
      to += RA_CHUNK;
    }
    f32x4_store(dx + h, dx0), f32x4_store(dx + h + 4, dx1);
  }
}

// in the forward pass these were y[a] = x_a * live, and so dx_a += live * dy[a]
RA_KERNEL void first_rows_backward(const float *live, const float *dy, uint32_t rows, float *dx) {
  for (uint32_t i = 0; i < RA_CHUNK; i += 4) {
    f32x4 factor = f32x4_load(live + i);
    RA_ROLLED
    for (size_t n = i; n < (size_t)rows * RA_CHUNK; n += RA_CHUNK) {
      f32x4_store(dx + n, f32x4_madd(factor, f32x4_load(dy + n), f32x4_load(dx + n)));
    }
  }
}

void ra_features_lower(const ra_features *f, const float *x_t, const float *live, float *lower) {
  uint32_t D = f->D;
  for (uint32_t i = 0; i < RA_CHUNK; i++) lower[i] = live[i];
  if (f->degree > 1) multiply_rows(live, x_t, D, lower + RA_CHUNK);
  for (uint32_t m = 2; m < f->degree; m++) {
    const uint32_t *below = f->tail + (size_t)(m - 1) * (D + 1), *here = below + D + 1;
    const float *rows_below = lower + (size_t)f->first[m - 1] * RA_CHUNK;
    float *rows = lower + (size_t)f->first[m] * RA_CHUNK;
    for (uint32_t a = 0; a < D; a++)
      multiply_rows(x_t + a * RA_CHUNK, rows_below + (size_t)below[a] * RA_CHUNK, here[a + 1] - here[a],
                    rows + (size_t)here[a] * RA_CHUNK);
  }
}

// Calls that touch rows row0 .. row0 + count - 1 of degree g, cut at the changes of the smallest variable: `a`, the row
// below that the first one comes from, how many, and where in the block.
typedef struct cut {
  uint32_t a, below, rows, at;
} cut;

static uint32_t first_variable(const uint32_t *here, uint32_t D, uint32_t row) {
  uint32_t low = 0, high = D - 1; // the last a with here[a] <= row
  while (low < high) {
    uint32_t middle = (low + high + 1) / 2;
    if (here[middle] <= row) low = middle;
    else high = middle - 1;
  }
  return low;
}

// The next cut; start with *a = first variable and *at = 0; 0 when the block is done.
static int next_cut(const ra_features *f, uint32_t row, uint32_t count, uint32_t *a, uint32_t *at, cut *c) {
  if (*at == count) return 0;
  uint32_t D = f->D;
  const uint32_t *below = f->tail + (size_t)(f->degree - 1) * (D + 1), *here = below + D + 1;
  uint32_t at_row = row + *at, left = here[*a + 1] - at_row;
  uint32_t rows = left < count - *at ? left : count - *at;
  *c = (cut){*a, f->first[f->degree - 1] + below[*a] + (at_row - here[*a]), rows, *at};
  *at += rows;
  if (rows == left) ++*a;
  return 1;
}

void ra_features_block(const ra_features *f, const float *x_t, const float *lower, uint32_t row0, uint32_t count,
                       float *block) {
  uint32_t row = row0 - f->lower, at = 0;
  if (f->degree == 1) {
    multiply_rows(lower, x_t + (size_t)row * RA_CHUNK, count, block);
    return;
  }
  uint32_t a = first_variable(f->tail + (size_t)f->degree * (f->D + 1), f->D, row);
  for (cut c; next_cut(f, row, count, &a, &at, &c);)
    multiply_rows(x_t + c.a * RA_CHUNK, lower + (size_t)c.below * RA_CHUNK, c.rows, block + (size_t)c.at * RA_CHUNK);
}

void ra_features_block_backward(const ra_features *f, const float *x_t, const float *lower, uint32_t row0,
                                uint32_t count, const float *dblock, float *dlower, float *dx_t) {
  uint32_t row = row0 - f->lower, at = 0;
  if (f->degree == 1) {
    first_rows_backward(lower, dblock, count, dx_t + (size_t)row * RA_CHUNK);
    return;
  }
  uint32_t a = first_variable(f->tail + (size_t)f->degree * (f->D + 1), f->D, row);
  for (cut c; next_cut(f, row, count, &a, &at, &c);)
    multiply_rows_backward(x_t + c.a * RA_CHUNK, lower + (size_t)c.below * RA_CHUNK, c.rows,
                           dblock + (size_t)c.at * RA_CHUNK, dlower + (size_t)c.below * RA_CHUNK,
                           dx_t + c.a * RA_CHUNK);
}

void ra_features_lower_backward(const ra_features *f, const float *x_t, const float *lower, float *dlower,
                                float *dx_t) {
  uint32_t D = f->D;
  for (uint32_t m = f->degree; m-- > 2;) {
    const uint32_t *below = f->tail + (size_t)(m - 1) * (D + 1), *here = below + D + 1;
    size_t rows_below = (size_t)f->first[m - 1] * RA_CHUNK, rows = (size_t)f->first[m] * RA_CHUNK;
    for (uint32_t a = 0; a < D; a++)
      multiply_rows_backward(x_t + a * RA_CHUNK, lower + rows_below + (size_t)below[a] * RA_CHUNK,
                             here[a + 1] - here[a], dlower + rows + (size_t)here[a] * RA_CHUNK,
                             dlower + rows_below + (size_t)below[a] * RA_CHUNK, dx_t + a * RA_CHUNK);
  }
  if (f->degree > 1) first_rows_backward(lower, dlower + RA_CHUNK, D, dx_t);
}
