// SPDX-License-Identifier: MIT
//
// The multiply-add peak of one thread, the yardstick of the benchmarks: twelve independent accumulators that never leave
// registers (kind 0), or the matrix micro-kernel on operands in L1 (kind 1). The better one counts: engines that fuse a
// multiply and an add reach it by the first, others by the second. Likewise transforms alone, for those inside an engine.

#include "fft.h"
#include "rope_attention.h"
#include "tile.h"

static float registers(uint32_t iterations) {
  f32x4 a = f32x4_splat(0.5f), b = f32x4_splat(0.999f), c[12];
  RA_UNROLLED
  for (int i = 0; i < 12; i++) c[i] = f32x4_splat((float)i);
  RA_ROLLED
  for (uint32_t n = 0; n < iterations; n++) RA_UNROLLED
  for (int i = 0; i < 12; i++) c[i] = f32x4_madd(c[i], b, a);
  RA_UNROLLED
  for (int i = 1; i < 12; i++) c[0] = f32x4_add(c[0], c[i]);
  return f32x4_sum(c[0]);
}

static float tiles(uint32_t iterations) {
  enum { COUNT = 192 };
  float a[COUNT * RA_TILE_ROWS], b[COUNT * 8], sum = 0;
  for (int n = 0; n < COUNT * RA_TILE_ROWS; n++) a[n] = 0.25f;
  for (int n = 0; n < COUNT * 8; n++) b[n] = 0.5f;
  RA_ROLLED
  for (uint32_t n = 0; n < iterations; n += COUNT * RA_TILE_ROWS / 4) {
    ra_tile t;
    ra_tile_multiply(&t, RA_TILE_ROWS, f32x4_splat(sum), f32x4_splat(0), COUNT, a, RA_TILE_ROWS, 1, b, 8);
    f32x4 all = f32x4_splat(0); // every accumulator counts, or the compiler drops its products
    RA_UNROLLED
    for (int r = 0; r < RA_TILE_ROWS; r++) all = f32x4_add(all, f32x4_add(t.c[r][0], t.c[r][1]));
    sum = f32x4_sum(all) * 1e-9f;
  }
  return sum;
}

float ra_peak(uint32_t kind, uint32_t iterations) { return kind == 0 ? registers(iterations) : tiles(iterations); }

void ra_fft_peak(uint32_t length, uint32_t blocks, uint32_t calls, void *workspace) {
  size_t floats = 8 * (size_t)length;
  float *x = (float *)workspace + ra_fft_bytes(length) / sizeof(float), *y = x + floats;
  ra_fft_init(workspace, length);
  for (size_t n = 0; n < floats; n++) x[n] = n % 7;
  for (uint32_t n = 0; n < calls; n++) ra_fft(workspace, x, y + n % blocks * floats);
}
