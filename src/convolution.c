// SPDX-License-Identifier: MIT
//
// See convolution.h. Spectra lie as [block][2S][8], the even frequencies first; a number is four real parts, four imaginary
// parts. Sums over blocks go through tiles of 16 frequencies, so that a spectrum is read once however many blocks there are.

#include "convolution.h"

#include <math.h>

#include "elementary.h"
#include "fft.h"
#include "pack.h"

enum {
  TILE = 16,         // frequencies of a tile
  TOGETHER = 4,      // blocks of results whose sums run together: eight accumulators
  LONGEST = 1 << 14, // of a block: 512 KB of numbers, as much again of twiddle factors; L2 caches hold little more
  SHORTEST = RA_STRIP,
};

static uint32_t ceil_div(uint32_t a, uint32_t b) { return a / b + (a % b != 0); }

// Time of a batch, in operations of a transform within L2: transforms of every block, products of every two, which take half as
// long. `log` is log2 S.
static double cost(uint32_t Nq, uint32_t Nk, uint32_t S, double log) {
  double rows = ceil_div(Nq, S), columns = ceil_div(Nk, S), slower = S > 1 << 12 ? 1.15 : 1;
  return (rows + columns) * 10 * S * log * slower + rows * columns * 8 * S;
}

uint32_t ra_convolution_block(uint32_t Nq, uint32_t Nk) {
  uint32_t best = SHORTEST, longer = Nq > Nk ? Nq : Nk;
  double least = INFINITY, log = 5;
  for (uint32_t power = SHORTEST; power <= LONGEST && power / 2 < longer; power *= 2, log++)
    for (uint32_t odd = 4; odd <= 6; odd++) { // 5/4 and 3/2 of the power
      uint32_t S = power / 4 * odd;
      if (S % RA_STRIP != 0 || S > LONGEST) continue;
      double own = cost(Nq, Nk, S, log + (odd - 4) * 0.3);
      if (own < least) least = own, best = S;
    }
  return best;
}

void ra_convolution_layout(ra_convolution *c, uint32_t Nq, uint32_t Nk, uint32_t S, int own, int gradient,
                           ra_workspace_cursor *w) {
  *c = (ra_convolution){.Nq = Nq, .Nk = Nk, .S = S, .rows = ceil_div(Nq, S), .columns = ceil_div(Nk, S), .own = own};
  size_t diagonals = (size_t)c->rows + c->columns - 1, floats = (own ? 16 : 4) * (size_t)S;
  c->plan = ra_take(w, 1, ra_fft_bytes(S), 1);
  c->turn = ra_take_floats(w, 2, S);
  c->kernel = ra_take_floats(w, diagonals, floats);
  c->change = gradient ? ra_take_floats(w, diagonals, floats) : NULL;
  c->even = ra_take_floats(w, S, 8);
  c->odd = ra_take_floats(w, S, 8);
  c->half = ra_take_floats(w, S, 8);
  c->tile = ra_take_floats(w, diagonals + 1, TILE * 8);
}

size_t ra_convolution_floats(const ra_convolution *c) {
  return (size_t)(c->rows > c->columns ? c->rows : c->columns) * c->S * 16;
}

void ra_convolution_init(ra_convolution *c) {
  ra_fft_init(c->plan, c->S);
  for (uint32_t n = 0; n < c->S; n++) {
    double cosine, sine;
    ra_cos_sin_f64(3.14159265358979323846 * n / c->S, &cosine, &sine);
    c->turn[n] = (float)cosine, c->turn[c->S + n] = (float)sine;
  }
}

// --- One block ----------------------------------------------------------------------------------------------------

// Lanes of four columns from `lanes` [.][32] become numbers, or the reverse.
RA_INLINE void load_four(const float *lanes, f32x4 *a) {
  for (int i = 0; i < 4; i++) a[i] = f32x4_load(lanes + i * RA_STRIP);
  f32x4_transpose(&a[0], &a[1], &a[2], &a[3]);
}

RA_INLINE void store_four(float *lanes, f32x4 *a) {
  f32x4_transpose(&a[0], &a[1], &a[2], &a[3]);
  for (int i = 0; i < 4; i++) f32x4_store(lanes + i * RA_STRIP, a[i]);
}

void ra_convolution_put(const ra_convolution *c, uint32_t n, const float *lanes) {
  const float *cosine = c->turn + n, *sine = cosine + c->S;
  float *even = c->even + (size_t)n * 8, *odd = c->odd + (size_t)n * 8;
  for (uint32_t at = 0; at < RA_STRIP; at += 4) {
    f32x4 re[4], im[4];
    load_four(lanes + at, re), load_four(lanes + 4 * RA_STRIP + at, im);
    RA_UNROLLED
    for (int i = 0; i < 4; i++, even += 8, odd += 8) { // times e^(-i pi n/S)
      f32x4 c_n = f32x4_load_splat(cosine + at + i), s_n = f32x4_load_splat(sine + at + i);
      f32x4_store(even, re[i]), f32x4_store(even + 4, im[i]);
      f32x4_store(odd, f32x4_madd(im[i], s_n, f32x4_mul(re[i], c_n)));
      f32x4_store(odd + 4, f32x4_sub(f32x4_mul(im[i], c_n), f32x4_mul(re[i], s_n)));
    }
  }
}

void ra_convolution_get(const ra_convolution *c, uint32_t n, float *lanes) {
  const float *cosine = c->turn + n, *sine = cosine + c->S;
  const float *even = c->even + (size_t)n * 8, *odd = c->odd + (size_t)n * 8;
  for (uint32_t at = 0; at < RA_STRIP; at += 4) {
    f32x4 re[4], im[4];
    RA_UNROLLED
    for (int i = 0; i < 4; i++, even += 8, odd += 8) { // conj(even) + e^(i pi n/S) conj(odd)
      f32x4 c_n = f32x4_load_splat(cosine + at + i), s_n = f32x4_load_splat(sine + at + i);
      f32x4 o_r = f32x4_load(odd), o_i = f32x4_load(odd + 4);
      re[i] = f32x4_add(f32x4_load(even), f32x4_madd(o_i, s_n, f32x4_mul(o_r, c_n)));
      im[i] = f32x4_sub(f32x4_sub(f32x4_mul(o_r, s_n), f32x4_mul(o_i, c_n)), f32x4_load(even + 4));
    }
    store_four(lanes + at, re), store_four(lanes + 4 * RA_STRIP + at, im);
  }
}

void ra_convolution_transform(const ra_convolution *c, uint32_t block, float *spectra) {
  float *to = spectra + (size_t)block * c->S * 16;
  ra_fft(c->plan, c->even, to);
  ra_fft(c->plan, c->odd, to + (size_t)c->S * 8);
}

void ra_convolution_invert(const ra_convolution *c, uint32_t block, const float *spectra) {
  const float *from = spectra + (size_t)block * c->S * 16;
  ra_fft(c->plan, from, c->even);
  ra_fft(c->plan, from + (size_t)c->S * 8, c->odd);
}

// --- The kernel ---------------------------------------------------------------------------------------------------

// Where lag t is in an array of lags; beyond its end for lags that there are none of.
static size_t place(const ra_convolution *c, int64_t t) {
  int64_t at = t + c->Nk - 1;
  return at >= 0 && at < (int64_t)c->Nq + c->Nk - 1 ? (size_t)at : SIZE_MAX;
}

static float lag(const ra_convolution *c, const float *lags, int64_t t) {
  size_t at = place(c, t);
  return at == SIZE_MAX ? 0 : lags[at];
}

// Floats of the spectrum of one block.
static size_t block_floats(const ra_convolution *c) { return (c->own ? 16 : 4) * (size_t)c->S; }

// Block d of 2S numbers: lags d S + m at m < S, lags (d-1) S + m at S + m, m > 0.

// A batch's own kernels: even and odd of block d, one sequence in each lane. Returns whether there is anything in it.
RA_KERNEL int load_own_block(const ra_convolution *c, const float *lags, int64_t d) {
  size_t length = (size_t)c->Nq + c->Nk - 1;
  float *even = c->even, *odd = c->odd;
  int live = 0;
  for (int64_t m = 0; m < c->S; m++, even += 8, odd += 8) {
    size_t at = place(c, d * c->S + m), before = m > 0 ? place(c, (d - 1) * c->S + m) : SIZE_MAX;
    float difference[8];
    for (size_t row = 0; row < 8; row++) {
      float ahead = at == SIZE_MAX ? 0 : lags[row * length + at];
      float behind = before == SIZE_MAX ? 0 : lags[row * length + before];
      even[row] = ahead + behind, difference[row] = ahead - behind;
      live |= ahead != 0 || behind != 0;
    }
    for (size_t lane = 0; lane < 4; lane++) { // times e^(-i pi m/S)
      float re = difference[lane], im = difference[4 + lane], cosine = c->turn[m], sine = c->turn[c->S + m];
      odd[lane] = re * cosine + im * sine, odd[4 + lane] = im * cosine - re * sine;
    }
  }
  return live;
}

static void count_block(ra_convolution *c, int live, int64_t d) {
  if (live && d < c->least) c->least = (int32_t)d;
  if (live) c->most = (int32_t)d;
}

static void own_kernel(ra_convolution *c, const float *lags, int64_t first, int64_t last) {
  f32x4 scale = f32x4_splat(0.5f / (float)c->S);
  for (int64_t d = first; d <= last; d++) {
    float *to = c->kernel + (size_t)(d - first) * block_floats(c);
    int live = load_own_block(c, lags, d);
    count_block(c, live, d);
    if (!live) {
      ra_fill(to, block_floats(c), 0);
      continue;
    }
    ra_fft(c->plan, c->even, to), ra_fft(c->plan, c->odd, to + 8 * (size_t)c->S);
    for (size_t n = 0; n < block_floats(c); n += 4) f32x4_store(to + n, f32x4_mul(scale, f32x4_load(to + n)));
  }
}

// One kernel: four blocks at a time, one in each lane.
static void common_kernel(ra_convolution *c, const float *lags, int64_t first, int64_t last) {
  int64_t S = c->S;
  float scale = 0.5f / (float)S;
  for (int64_t d0 = first; d0 <= last; d0 += 4) {
    ra_fill(c->even, (size_t)S * 8, 0), ra_fill(c->odd, (size_t)S * 8, 0);
    for (int64_t d = d0; d < d0 + 4 && d <= last; d++) {
      float *even = c->even + (d - d0), *odd = c->odd + (d - d0);
      int live = 0;
      for (int64_t m = 0; m < S; m++, even += 8, odd += 8) {
        float ahead = lag(c, lags, d * S + m), behind = m > 0 ? lag(c, lags, (d - 1) * S + m) : 0;
        even[0] = ahead + behind;
        odd[0] = (ahead - behind) * c->turn[m], odd[4] = -(ahead - behind) * c->turn[S + m];
        live |= ahead != 0 || behind != 0;
      }
      count_block(c, live, d);
    }
    for (int half = 0; half < 2; half++) {
      ra_fft(c->plan, half ? c->odd : c->even, c->half);
      for (int64_t d = d0; d < d0 + 4 && d <= last; d++) {
        float *to = c->kernel + (size_t)(d - first) * block_floats(c) + half * S * 2;
        const float *from = c->half + (d - d0);
        for (int64_t m = 0; m < S; m++) to[2 * m] = scale * from[8 * m], to[2 * m + 1] = scale * from[8 * m + 4];
      }
    }
  }
}

void ra_convolution_kernel(ra_convolution *c, const float *lags) {
  int64_t first = 1 - (int64_t)c->columns, last = (int64_t)c->rows - 1;
  c->least = INT32_MAX, c->most = INT32_MIN;
  (c->own ? own_kernel : common_kernel)(c, lags, first, last);
  if (c->change) ra_fill(c->change, (size_t)(last - first + 1) * block_floats(c), 0);
}

// What block d gives to the derivative, from its conjugate halves in the lanes `lane` (real) of even and odd; `im`:
// from imaginary parts.
RA_KERNEL void add_change(const ra_convolution *c, int64_t d, size_t lane, int im, float *dlags) {
  const float *even = c->even + lane, *odd = c->odd + lane;
  float scale = (im ? -0.5f : 0.5f) / (float)c->S;
  for (int64_t m = 0; m < c->S; m++, even += 8, odd += 8) { // odd times e^(-i pi m/S)
    float cosine = c->turn[m], sine = c->turn[c->S + m];
    float own = im ? even[4] : even[0], turned = im ? odd[4] * cosine - odd[0] * sine : odd[0] * cosine + odd[4] * sine;
    size_t ahead = place(c, d * c->S + m), behind = place(c, (d - 1) * c->S + m);
    if (ahead != SIZE_MAX) dlags[ahead] += scale * (own + turned);
    if (behind != SIZE_MAX && m > 0) dlags[behind] += scale * (own - turned);
  }
}

static void own_change(const ra_convolution *c, float *dlags, int64_t first, int64_t last) {
  size_t length = (size_t)c->Nq + c->Nk - 1, S = c->S;
  f32x4 minus = f32x4_splat(-1);
  for (int64_t d = first; d <= last; d++) {
    if (d < c->least || d > c->most) continue;
    for (int half = 0; half < 2; half++) {
      const float *from = c->change + (size_t)(d - first) * block_floats(c) + half * S * 8;
      for (size_t n = 0; n < S * 8; n += 8) {
        f32x4_store(c->half + n, f32x4_load(from + n));
        f32x4_store(c->half + n + 4, f32x4_mul(minus, f32x4_load(from + n + 4)));
      }
      ra_fft(c->plan, c->half, half ? c->odd : c->even);
    }
    for (size_t row = 0; row < 8; row++) add_change(c, d, row % 4, row >= 4, dlags + row * length);
  }
}

static void common_change(const ra_convolution *c, float *dlags, int64_t first, int64_t last) {
  int64_t S = c->S;
  for (int64_t d0 = first; d0 <= last; d0 += 4) {
    for (int half = 0; half < 2; half++) {
      ra_fill(c->half, (size_t)S * 8, 0);
      for (int64_t d = d0; d < d0 + 4 && d <= last; d++) {
        const float *from = c->change + (size_t)(d - first) * block_floats(c) + half * S;
        float *to = c->half + (d - d0);
        for (int64_t m = 0; m < S; m++) to[8 * m] = from[m], to[8 * m + 4] = -from[2 * S + m];
      }
      ra_fft(c->plan, c->half, half ? c->odd : c->even);
    }
    for (int64_t d = d0; d < d0 + 4 && d <= last; d++) add_change(c, d, (size_t)(d - d0), 0, dlags);
  }
}

void ra_convolution_change(const ra_convolution *c, float *dlags) {
  ra_fill(dlags, (c->own ? 8 : 1) * ((size_t)c->Nq + c->Nk - 1), 0);
  (c->own ? own_change : common_change)(c, dlags, 1 - (int64_t)c->columns, (int64_t)c->rows - 1);
}

// --- Products in the frequency domain -----------------------------------------------------------------------------

// Which blocks of a kernel are read: that of row r and input n is d + step (r - n) blocks behind the first one that is
// not zero, of `span` and one more; modulo 2^32, so that what is before the first is far behind the last.
typedef struct live {
  uint32_t d, step, span;
} live;

// y[r] = sum_n t[r - n] z[n] for R rows at one frequency, imaginary parts times `sign`; t goes on by `t_row` with r, the other
// way with n; it is a number, or `own` numbers, one for each lane. z [count][TILE][8].
RA_INLINE void multiply_at(const int own, const int R, const float *t, ptrdiff_t t_row, const float *z, uint32_t count,
                           live l, f32x4 sign, float *y, size_t y_row) {
  f32x4 re[TOGETHER], im[TOGETHER], zero = f32x4_splat(0);
  RA_UNROLLED
  for (int r = 0; r < R; r++) re[r] = im[r] = zero;
  RA_ROLLED
  for (uint32_t n = 0; n < count; n++, t -= t_row, z += TILE * 8, l.d -= l.step) {
    f32x4 z_r = f32x4_load(z), z_i = f32x4_load(z + 4), minus = f32x4_sub(zero, z_i);
    RA_UNROLLED
    for (int r = 0; r < R; r++) {
      if (l.d + (uint32_t)r * l.step > l.span) continue; // zeros
      const float *t_n = t + r * t_row;
      f32x4 t_r = own ? f32x4_load(t_n) : f32x4_load_splat(t_n);
      f32x4 t_i = own ? f32x4_load(t_n + 4) : f32x4_load_splat(t_n + 1);
      re[r] = f32x4_madd(t_i, minus, f32x4_madd(t_r, z_r, re[r]));
      im[r] = f32x4_madd(t_i, z_r, f32x4_madd(t_r, z_i, im[r]));
    }
  }
  RA_UNROLLED
  for (int r = 0; r < R; r++) f32x4_store(y + r * y_row, re[r]), f32x4_store(y + r * y_row + 4, f32x4_mul(sign, im[r]));
}

// The same at all frequencies of a tile.
RA_INLINE void multiply_frequencies(const int own, int R, const float *t, ptrdiff_t t_row, const float *z,
                                    uint32_t count, live l, f32x4 sign, float *y, size_t y_row) {
  for (uint32_t f = 0; f < TILE; f++, t += own ? 8 : 2, z += 8, y += 8) {
    if (R == TOGETHER) multiply_at(own, TOGETHER, t, t_row, z, count, l, sign, y, y_row);
    live one = l;
    for (int r = 0; R < TOGETHER && r < R; r++, one.d += l.step)
      multiply_at(own, 1, t + r * t_row, t_row, z, count, one, sign, y + r * y_row, y_row);
  }
}

typedef void multiply_tile(int R, const float *t, ptrdiff_t t_row, const float *z, uint32_t count, live l, f32x4 sign,
                           float *y, size_t y_row);

RA_KERNEL void multiply_common(int R, const float *t, ptrdiff_t t_row, const float *z, uint32_t count, live l,
                               f32x4 sign, float *y, size_t y_row) {
  multiply_frequencies(0, R, t, t_row, z, count, l, sign, y, y_row);
}

RA_KERNEL void multiply_own(int R, const float *t, ptrdiff_t t_row, const float *z, uint32_t count, live l, f32x4 sign,
                            float *y, size_t y_row) {
  multiply_frequencies(1, R, t, t_row, z, count, l, sign, y, y_row);
}

// tile [blocks][TILE][8] = frequencies f .. of all blocks, imaginary parts times `sign`.
RA_KERNEL void load_tile(const float *spectra, size_t row, uint32_t blocks, f32x4 sign, float *tile) {
  for (uint32_t n = 0; n < blocks; n++, tile += TILE * 8)
    for (uint32_t f = 0; f < TILE * 8; f += 8) {
      f32x4_store(tile + f, f32x4_load(spectra + n * row + f));
      f32x4_store(tile + f + 4, f32x4_mul(sign, f32x4_load(spectra + n * row + f + 4)));
    }
}

static int64_t clip(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

void ra_convolution_multiply(const ra_convolution *c, int adjoint, float *spectra) {
  // conj(sum T z) or, of the transpose, conj(sum conj(T) z) = sum T conj(z)
  f32x4 one = f32x4_splat(1), minus = f32x4_splat(-1), sign_in = adjoint ? minus : one,
        sign_out = adjoint ? one : minus;
  uint32_t out = adjoint ? c->columns : c->rows, in = adjoint ? c->rows : c->columns;
  size_t row = (size_t)c->S * 16;
  ptrdiff_t t_block = (ptrdiff_t)block_floats(c), t_row = adjoint ? -t_block : t_block;
  multiply_tile *multiply = c->own ? multiply_own : multiply_common;
  for (uint32_t f = 0; f < 2 * c->S; f += TILE) {
    load_tile(spectra + (size_t)f * 8, row, in, sign_in, c->tile);
    for (uint32_t a = 0; a < out; a += TOGETHER) {
      uint32_t R = out - a < TOGETHER ? out - a : TOGETHER;
      // inputs b whose blocks are not zero for one of the R results: d = a - b, or b - a
      int64_t low = adjoint ? (int64_t)a + c->least : (int64_t)a - c->most;
      int64_t high = adjoint ? (int64_t)a + R + c->most : (int64_t)a + R - c->least;
      uint32_t first = (uint32_t)clip(low, 0, in), end = (uint32_t)clip(high, first, in);
      if (c->least > c->most) end = first;
      ptrdiff_t d = adjoint ? (ptrdiff_t)first - a : (ptrdiff_t)a - first;
      if (first == end) d = 0;
      const float *t = c->kernel + (d + (ptrdiff_t)c->columns - 1) * t_block + f * (c->own ? 8 : 2);
      uint32_t least = (uint32_t)c->least;
      live l = {(uint32_t)d - least, adjoint ? UINT32_MAX : 1, (uint32_t)c->most - least};
      multiply((int)R, t, t_row, c->tile + (size_t)first * TILE * 8, end - first, l, sign_out,
               spectra + a * row + (size_t)f * 8, row);
    }
  }
}

// Four frequencies, sums over `count` pairs of blocks of conj(x) y. Own: dre [4][8] grows by those of every lane; else
// dre, dim [4] by what they add up to.
RA_INLINE void correlate_four(const int own, const float *x, const float *y, uint32_t count, float *dre, float *dim) {
  f32x4 re[4], im[4], zero = f32x4_splat(0);
  RA_UNROLLED
  for (int f = 0; f < 4; f++) re[f] = im[f] = zero;
  RA_ROLLED
  for (uint32_t n = 0; n < count; n++, x += TILE * 8, y += TILE * 8) RA_UNROLLED
  for (int f = 0; f < 4; f++) {
    f32x4 x_r = f32x4_load(x + 8 * f), x_i = f32x4_load(x + 8 * f + 4);
    f32x4 y_r = f32x4_load(y + 8 * f), y_i = f32x4_load(y + 8 * f + 4);
    re[f] = f32x4_madd(x_i, y_i, f32x4_madd(x_r, y_r, re[f]));
    im[f] = f32x4_madd(f32x4_sub(zero, x_i), y_r, f32x4_madd(x_r, y_i, im[f]));
  }
  if (own) {
    RA_UNROLLED
    for (int f = 0; f < 4; f++) {
      f32x4_store(dre + 8 * f, f32x4_add(f32x4_load(dre + 8 * f), re[f]));
      f32x4_store(dre + 8 * f + 4, f32x4_add(f32x4_load(dre + 8 * f + 4), im[f]));
    }
    return;
  }
  f32x4_transpose(&re[0], &re[1], &re[2], &re[3]), f32x4_transpose(&im[0], &im[1], &im[2], &im[3]);
  f32x4_store(dre, f32x4_add(f32x4_load(dre), f32x4_add(f32x4_add(re[0], re[1]), f32x4_add(re[2], re[3]))));
  f32x4_store(dim, f32x4_add(f32x4_load(dim), f32x4_add(f32x4_add(im[0], im[1]), f32x4_add(im[2], im[3]))));
}

RA_KERNEL void correlate_common(const float *x, const float *y, uint32_t count, float *dre, float *dim) {
  for (uint32_t f = 0; f < TILE; f += 4) correlate_four(0, x + f * 8, y + f * 8, count, dre + f, dim + f);
}

RA_KERNEL void correlate_own(const float *x, const float *y, uint32_t count, float *change) {
  for (uint32_t f = 0; f < TILE * 8; f += 32) correlate_four(1, x + f, y + f, count, change + f, change + f);
}

void ra_convolution_correlate(const ra_convolution *c, const float *x_spectra, const float *y_spectra) {
  f32x4 one = f32x4_splat(1);
  size_t row = (size_t)c->S * 16;
  float *x = c->tile, *y = c->tile + (size_t)c->columns * TILE * 8;
  for (uint32_t f = 0; f < 2 * c->S; f += TILE) {
    load_tile(x_spectra + (size_t)f * 8, row, c->columns, one, x);
    load_tile(y_spectra + (size_t)f * 8, row, c->rows, one, y);
    for (int64_t d = c->least; d <= c->most; d++) {
      uint32_t first = (uint32_t)(d > 0 ? d : 0), end = (uint32_t)clip((int64_t)c->columns + d, first, c->rows);
      const float *x_d = x + (size_t)(first - d) * TILE * 8, *y_d = y + (size_t)first * TILE * 8;
      float *change = c->change + (size_t)(d + c->columns - 1) * block_floats(c);
      if (c->own) correlate_own(x_d, y_d, end - first, change + (size_t)f * 8);
      else correlate_common(x_d, y_d, end - first, change + f, change + f + 2 * c->S);
    }
  }
}
