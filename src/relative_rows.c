// SPDX-License-Identifier: MIT
//
// Scores of one row of a relative map and their gradient; see relative.h. The tokens on the other side are the lanes,
// so that an entry of W for four of them is one load from its row over t, which falls along keys and rises along
// queries.
//
// This work is based on:
//   Alman, Song. Fast RoPE Attention: Combining the Polynomial Method and Fast Fourier Transform. 2025 (2505.11892)

#include "relative.h"
#include "simd.h"

// p[0 .. 3], or (falls) p[0], p[-1], ..; 0 from number `count` on, where nothing is read.
RA_INLINE f32x4 load_some(const float *p, int falls, uint32_t count) {
  float lane[4] = {0};
  if (count >= 4) return falls ? f32x4_reverse(f32x4_load(p - 3)) : f32x4_load(p);
  for (uint32_t n = 0; n < count; n++) lane[n] = falls ? *(p - n) : p[n];
  return f32x4_load(lane);
}

RA_INLINE uint32_t behind(uint32_t count, uint32_t n) { return count > n ? count - n : 0; }

// Where an entry's row has the n-th pair.
RA_INLINE const float *weights_at(const ra_relative *r, const uint32_t *entry, int falls, size_t diagonal, uint32_t n) {
  return r->table + entry[2] * r->diagonals + (falls ? diagonal - n : diagonal + n);
}

void ra_relative_row(const ra_relative *r, int side, const float *x, const float *z_t, size_t z_row, size_t diagonal,
                     uint32_t count, float *y) {
  int falls = side == 0, step = falls ? -4 : 4;
  for (uint32_t n = 0; n < count; n += 8) {
    uint32_t first = behind(count, n), second = behind(count, n + 4);
    f32x4 sum[2] = {f32x4_splat(0), f32x4_splat(0)};
    const uint32_t *entry = r->entries;
    RA_ROLLED
    for (uint32_t e = 0; e < r->count; e++, entry += 3) {
      f32x4 own = f32x4_load_splat(x + entry[side]);
      const float *z = z_t + entry[1 - side] * z_row + n, *w = weights_at(r, entry, falls, diagonal, n);
      sum[0] = f32x4_madd(f32x4_mul(own, load_some(z, 0, first)), load_some(w, falls, first), sum[0]);
      if (second > 0)
        sum[1] = f32x4_madd(f32x4_mul(own, load_some(z + 4, 0, second)), load_some(w + step, falls, second), sum[1]);
    }
    float lane[8];
    f32x4_store(lane, sum[0]), f32x4_store(lane + 4, sum[1]);
    for (uint32_t m = 0; m < 8 && n + m < count; m++) y[n + m] = lane[m];
  }
}

// In the forward pass this was y[n] = sum of x[own] w z[other] over the entries (own, other).
void ra_relative_row_gradient(const ra_relative *r, int side, const float *ds, const float *z_t, size_t z_row,
                              size_t diagonal, uint32_t count, float *dx, size_t dx_row) {
  int falls = side == 0;
  const uint32_t *entry = r->entries;
  for (uint32_t e = 0; e < r->count; e++, entry += 3) {
    const float *z = z_t + entry[1 - side] * z_row;
    f32x4 sum = f32x4_splat(0);
    RA_ROLLED
    for (uint32_t n = 0; n < count; n += 4) {
      f32x4 w = load_some(weights_at(r, entry, falls, diagonal, n), falls, count - n);
      f32x4 product = f32x4_mul(load_some(z + n, 0, count - n), w);
      sum = f32x4_madd(load_some(ds + n, 0, count - n), product, sum);
    }
    dx[entry[side] * dx_row] += f32x4_sum(sum);
  }
}
