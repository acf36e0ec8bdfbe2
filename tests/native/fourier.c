// SPDX-License-Identifier: MIT
//
// The Fourier transform and what is made of it, Toeplitz products, each against its definition in double precision.

#include "check.h"
#include "convolution.h"
#include "fft.h"
#include "rope_attention.h"

#define PI 3.14159265358979323846

// What MATH.md section 7 proves of the roundings of a transform: of each result over the sum of magnitudes that go in, of all of them in
// Euclidean norms; web/transforms.ts has the same numbers.
static void roundings_of(uint32_t length, double *each, double *norm) {
  static const uint32_t factors[] = {4, 2, 3, 5};
  static const double stages[] = {6, 5, 9, 13};
  *each = *norm = 0;
  for (int n = 0; n < 4; n++)
    for (; length % factors[n] == 0; length /= factors[n])
      *each += stages[n], *norm += stages[n] * (n < 2 ? 1 : sqrt(factors[n]));
}

// Signal over error, in decibels, of four lanes of other numbers; those of the last two lanes are 0 but for a few.
static void transforms_are_accurate(uint32_t length) {
  void *plan = aligned_alloc(16, ra_fft_bytes(length));
  guarded x = guarded_new((size_t)length * 8 + 4, length, 1), y = guarded_new((size_t)length * 8 + 4, 1, 1);
  float *from = (float *)(((uintptr_t)x.data + 15) & ~(uintptr_t)15),
        *to = (float *)(((uintptr_t)y.data + 15) & ~(uintptr_t)15);
  double each, norm;
  roundings_of(length, &each, &norm);
  ra_fft_init(plan, length);
  for (uint32_t n = 0; n < length; n++)
    if (n % 13 != 7) from[8 * n + 2] = from[8 * n + 6] = from[8 * n + 3] = 0, from[8 * n + 7] *= n == 5;
  ra_fft(plan, from, to);
  for (uint32_t lane = 0; lane < 4; lane++) {
    double signal = 0, noise = 0, magnitudes = 0, squares = 0, largest = 0, u = ldexp(1, -24);
    for (uint32_t n = 0; n < length; n++) {
      double x_n = hypot(from[8 * n + lane], from[8 * n + 4 + lane]);
      magnitudes += x_n, squares += x_n * x_n;
    }
    for (uint32_t k = 0; k < length; k++) {
      double re = 0, im = 0;
      for (uint32_t n = 0; n < length; n++) {
        double angle = -2 * PI * (double)((uint64_t)k * n % length) / length, c = cos(angle), s = sin(angle);
        re += from[8 * n + lane] * c - from[8 * n + 4 + lane] * s;
        im += from[8 * n + lane] * s + from[8 * n + 4 + lane] * c;
      }
      signal += re * re + im * im;
      double error = hypot(to[8 * k + lane] - re, to[8 * k + 4 + lane] - im);
      noise += error * error, largest = fmax(largest, error);
    }
    CHECK(largest <= each * u * magnitudes, "length %u: %g of a sum", length, largest / magnitudes / u);
    CHECK(noise <= length * squares * pow(norm * u, 2), "length %u: %g", length, sqrt(noise / length / squares) / u);
    // float32 has 150 dB; each of the log2 n stages adds an error of a rounding or less: measured 136 at least
    CHECK(10 * log10(signal / noise) > 132, "length %u: %g dB", length, 10 * log10(signal / noise));
  }
  CHECK(guarded_intact(&x) && guarded_intact(&y), "canary");
  free(plan), guarded_free(&x), guarded_free(&y);
}

typedef struct columns {
  float *at; // [8][length]
  uint32_t length;
} columns;

static columns random_columns(uint32_t length, uint64_t seed) {
  columns x = {malloc(8 * sizeof(float) * length), length};
  for (uint32_t n = 0; n < 8 * length; n++) x.at[n] = check_random(&seed, 1);
  return x;
}

static float *spectra_of(const ra_convolution *c, const columns *x, uint32_t blocks) {
  float *spectra = aligned_alloc(16, ra_convolution_floats(c) * sizeof(float));
  for (uint32_t block = 0; block < blocks; block++) {
    for (uint32_t n = 0; n < c->S; n += RA_STRIP) {
      float lanes[8 * RA_STRIP];
      for (uint32_t i = 0; i < 8 * RA_STRIP; i++) {
        uint32_t at = block * c->S + n + i % RA_STRIP;
        lanes[i] = at < x->length ? x->at[i / RA_STRIP * x->length + at] : 0;
      }
      ra_convolution_put(c, n, lanes);
    }
    ra_convolution_transform(c, block, spectra);
  }
  return spectra;
}

static columns columns_of(const ra_convolution *c, const float *spectra, uint32_t length) {
  columns y = {malloc(8 * sizeof(float) * length), length};
  for (uint32_t block = 0; block * c->S < length; block++) {
    ra_convolution_invert(c, block, spectra);
    for (uint32_t n = 0; n < c->S; n += RA_STRIP) {
      float lanes[8 * RA_STRIP];
      ra_convolution_get(c, n, lanes);
      for (uint32_t i = 0; i < 8 * RA_STRIP; i++) {
        uint32_t at = block * c->S + n + i % RA_STRIP;
        if (at < length) y.at[i / RA_STRIP * length + at] = lanes[i];
      }
    }
  }
  return y;
}

// A convolution with room for its derivative, in a workspace of exactly its size, which is to be freed.
static char *lay_out(ra_convolution *c, uint32_t Nq, uint32_t Nk, uint32_t S, int own) {
  ra_workspace_cursor w = {NULL, 0, 0};
  ra_convolution_layout(c, Nq, Nk, S, own, 1, &w);
  char *space = aligned_alloc(16, w.used);
  memset(space, 0xff, w.used);
  w = (ra_workspace_cursor){space, 0, 0};
  ra_convolution_layout(c, Nq, Nk, S, own, 1, &w);
  return space;
}

// least .. most: the lags that are not zero.
static void products_match_sums(uint32_t Nq, uint32_t Nk, uint32_t S, int64_t least, int64_t most) {
  ra_convolution c;
  char *space = lay_out(&c, Nq, Nk, S, 0);

  uint32_t count = Nq + Nk - 1;
  guarded lags = guarded_new(count, 3, 1), change = guarded_new(count, 4, 1);
  for (uint32_t n = 0; n < count; n++) {
    int64_t t = (int64_t)n - Nk + 1;
    if (t < least || t > most) lags.data[n] = 0;
  }
  ra_convolution_init(&c);
  ra_convolution_kernel(&c, lags.data);
  columns x = random_columns(Nk, 1), y = random_columns(Nq, 2);
  float *x_spectra = spectra_of(&c, &x, c.columns), *y_spectra = spectra_of(&c, &y, c.rows);
  ra_convolution_correlate(&c, x_spectra, y_spectra);
  ra_convolution_change(&c, change.data);
  ra_convolution_multiply(&c, 0, x_spectra), ra_convolution_multiply(&c, 1, y_spectra);
  columns product = columns_of(&c, x_spectra, Nq), transposed = columns_of(&c, y_spectra, Nk);

  double *want = calloc(count, sizeof *want), worst = 0, worst_transposed = 0, worst_change = 0, left = 0, right = 0;
  for (uint32_t column = 0; column < 8; column++) {
    double *want_x = calloc(Nk, sizeof *want_x);
    for (uint32_t i = 0; i < Nq; i++) {
      double sum = 0, y_i = y.at[column * Nq + i];
      for (uint32_t j = 0; j < Nk; j++) {
        uint32_t n = i + Nk - 1 - j;
        double x_j = x.at[column * Nk + j];
        sum += lags.data[n] * x_j, want_x[j] += lags.data[n] * y_i, want[n] += x_j * y_i;
      }
      worst = fmax(worst, fabs(sum - product.at[column * Nq + i]));
      left += y_i * product.at[column * Nq + i];
    }
    for (uint32_t j = 0; j < Nk; j++) {
      worst_transposed = fmax(worst_transposed, fabs(want_x[j] - transposed.at[column * Nk + j]));
      right += (double)transposed.at[column * Nk + j] * x.at[column * Nk + j];
    }
    free(want_x);
  }
  int64_t S64 = S;
  for (uint32_t n = 0; n < count; n++) {
    // the derivative is made for blocks that are not zero
    int64_t t = (int64_t)n - Nk + 1;
    if (t <= (c.least - 1) * S64 || t >= (c.most + 1) * S64) continue;
    if (t < c.least * S64 || t > c.most * S64) continue; // half of such a lag is in a block that is zero
    worst_change = fmax(worst_change, fabs(want[n] - change.data[n]));
  }
  // random sums of n terms are about sqrt(n / 3); measured at most 2e-7 of it
  double size = sqrt(fmax(Nq, Nk));
  CHECK(worst < 1e-6 * size && worst_transposed < 1e-6 * size, "Nq %u Nk %u S %u: %g %g", Nq, Nk, S, worst / size,
        worst_transposed / size);
  CHECK(worst_change < 4e-6 * size, "change: Nq %u Nk %u S %u: %g", Nq, Nk, S, worst_change / size);
  // errors of an entry as above, summed over as many at random
  double slack = 5e-7 * size * sqrt(8.0 * Nq);
  CHECK(fabs(left - right) <= slack, "adjoint: %g %g, off by %g of %g", left, right, left - right, slack);
  CHECK(guarded_intact(&change), "canary");
  guarded_free(&lags), guarded_free(&change);
  free(want), free(x.at), free(y.at), free(product.at), free(transposed.at), free(x_spectra), free(y_spectra),
      free(space);
}

// Four sequences, each with a complex kernel of its own: T x, conj(T)^T y and the derivative.
static void own_products_match_sums(uint32_t Nq, uint32_t Nk, uint32_t S, int64_t least, int64_t most) {
  ra_convolution c;
  char *space = lay_out(&c, Nq, Nk, S, 1);

  uint32_t count = Nq + Nk - 1;
  guarded lags = guarded_new(8 * count, 3, 1), change = guarded_new(8 * count, 4, 1);
  for (uint32_t n = 0; n < 8 * count; n++) {
    int64_t t = (int64_t)(n % count) - Nk + 1;
    if (t < least || t > most) lags.data[n] = 0;
  }
  ra_convolution_init(&c);
  ra_convolution_kernel(&c, lags.data);
  columns x = random_columns(Nk, 1), y = random_columns(Nq, 2);
  float *x_spectra = spectra_of(&c, &x, c.columns), *y_spectra = spectra_of(&c, &y, c.rows);
  ra_convolution_correlate(&c, x_spectra, y_spectra);
  ra_convolution_change(&c, change.data);
  ra_convolution_multiply(&c, 0, x_spectra), ra_convolution_multiply(&c, 1, y_spectra);
  columns product = columns_of(&c, x_spectra, Nq), adjoint = columns_of(&c, y_spectra, Nk);

  double worst = 0, worst_adjoint = 0, worst_change = 0;
  for (uint32_t lane = 0; lane < RA_LANES; lane++) {
    const float *T = lags.data + lane * count, *T_i = T + RA_LANES * count;
    const float *x_r = x.at + lane * Nk, *x_i = x_r + RA_LANES * Nk, *y_r = y.at + lane * Nq,
                *y_i = y_r + RA_LANES * Nq;
    double *sums = calloc(2 * (Nk + count), sizeof *sums), *dT = sums + 2 * Nk;
    for (uint32_t i = 0; i < Nq; i++) {
      double re = 0, im = 0;
      for (uint32_t j = 0; j < Nk; j++) {
        uint32_t n = i + Nk - 1 - j;
        re += (double)T[n] * x_r[j] - (double)T_i[n] * x_i[j], im += (double)T[n] * x_i[j] + (double)T_i[n] * x_r[j];
        sums[2 * j] += (double)T[n] * y_r[i] + (double)T_i[n] * y_i[i];
        sums[2 * j + 1] += (double)T[n] * y_i[i] - (double)T_i[n] * y_r[i];
        dT[2 * n] += (double)x_r[j] * y_r[i] + (double)x_i[j] * y_i[i];
        dT[2 * n + 1] += (double)x_r[j] * y_i[i] - (double)x_i[j] * y_r[i];
      }
      worst = fmax(worst, fabs(re - product.at[lane * Nq + i]));
      worst = fmax(worst, fabs(im - product.at[(RA_LANES + lane) * Nq + i]));
    }
    for (uint32_t n = 0; n < 2 * Nk; n++)
      worst_adjoint = fmax(worst_adjoint, fabs(sums[n] - adjoint.at[(n % 2 * RA_LANES + lane) * Nk + n / 2]));
    for (uint32_t n = 0; n < 2 * count; n++) {
      int64_t t = (int64_t)(n / 2) - Nk + 1;
      if (t < c.least * (int64_t)S || t > c.most * (int64_t)S) continue; // as above
      worst_change = fmax(worst_change, fabs(dT[n] - change.data[(n % 2 * RA_LANES + lane) * count + n / 2]));
    }
    free(sums);
  }
  // as above; measured at most 4e-7
  double size = sqrt(fmax(Nq, Nk));
  CHECK(worst < 1e-6 * size && worst_adjoint < 1e-6 * size, "own: Nq %u Nk %u S %u: %g %g", Nq, Nk, S, worst / size,
        worst_adjoint / size);
  CHECK(worst_change < 1e-6 * size, "own change: Nq %u Nk %u S %u: %g", Nq, Nk, S, worst_change / size);
  CHECK(guarded_intact(&lags) && guarded_intact(&change), "canary");
  guarded_free(&lags), guarded_free(&change);
  free(x.at), free(y.at), free(product.at), free(adjoint.at), free(x_spectra), free(y_spectra), free(space);
}

// What benchmarks time fills the memory that it says, and no more: blocks in turn, each with the transform of the same numbers.
static void peak_transforms_into_blocks(uint32_t length, uint32_t blocks) {
  size_t bytes = (68 + 32 * (size_t)blocks) * length + 1024, plan = ra_fft_bytes(length), row = 8 * (size_t)length;
  CHECK(plan <= 36 * (size_t)length + 1024, "plan of %u: %zu bytes", length, plan);
  char *workspace = aligned_alloc(16, bytes);
  ra_fft_peak(length, blocks, blocks, workspace);
  const float *x = (float *)(workspace + plan), *y = x + row;
  double sum = 0;
  for (uint32_t n = 0; n < length; n++) sum += x[8 * n];
  CHECK(sum > 0 && fabs(y[0] - sum) < 1e-5 * sum, "sum of %u numbers: %g, %g", length, (double)y[0], sum);
  for (uint32_t b = 1; b < blocks; b++) CHECK(memcmp(y, y + b * row, row * sizeof *y) == 0, "block %u", b);
  free(workspace);
}

int main(void) {
  peak_transforms_into_blocks(32, 1);
  peak_transforms_into_blocks(480, 5);
  static const uint32_t lengths[] = {32, 64, 96, 160, 192, 256, 320, 480, 1024, 1280, 1536};
  for (size_t n = 0; n < sizeof lengths / sizeof *lengths; n++) transforms_are_accurate(lengths[n]);
  products_match_sums(1, 1, 32, -1000, 1000);
  products_match_sums(31, 33, 32, -1000, 1000);
  products_match_sums(200, 200, 32, 0, 1000);
  products_match_sums(200, 70, 64, -1000, 1000);
  products_match_sums(70, 300, 32, -1000, 1000);
  products_match_sums(300, 310, 96, -20, 10);
  products_match_sums(300, 310, 32, 70, 75);
  products_match_sums(100, 90, 160, -3, 1000);
  products_match_sums(100, 90, 32, 1000, 0);
  products_match_sums(1000, 1100, 160, -1000, 2000);
  own_products_match_sums(1, 1, 32, -1000, 1000);
  own_products_match_sums(31, 33, 32, -1000, 1000);
  own_products_match_sums(200, 70, 64, -1000, 1000);
  own_products_match_sums(300, 310, 32, 70, 75);
  own_products_match_sums(100, 90, 32, 1000, 0);
  own_products_match_sums(500, 600, 160, 0, 2000);
  for (uint32_t N = 1; N < 1u << 24; N = N * 3 + 1) {
    uint32_t S = ra_convolution_block(N, N), odd = S;
    while (odd % 2 == 0) odd /= 2;
    CHECK((S & 31) == 0 && S <= 1u << 14 && odd <= 5 && S < 2 * N + 64, "block of %u: %u", N, S);
  }
  return check_report();
}
