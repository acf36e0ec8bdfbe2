// SPDX-License-Identifier: MIT
//
// The small parts, each against its definition in double precision: 2^x, cos, sin, e^x, log, rotation, transposition, micro-kernel, monomials.

#include <float.h>

#include "check.h"
#include "elementary.h"
#include "monomials.h"
#include "pack.h"
#include "products.h"
#include "rotary.h"
#include "softmax.h"
#include "tile.h"

#define PI 3.14159265358979323846

static void exp2_is_accurate(void) {
  double worst = 0;
  for (int n = -126 * 64; n < 127 * 64; n++) {
    float x[4] = {(float)n / 64, (float)n / 64 + 0.003f, (float)n / 64 + 0.007f, (float)n / 64 + 0.011f}, y[4];
    f32x4_store(y, ra_exp2(f32x4_load(x), ra_exp2_load()));
    for (int i = 0; i < 4; i++) worst = fmax(worst, fabs(y[i] / exp2((double)x[i]) - 1));
  }
  CHECK(worst < 1.2e-7, "relative error %g", worst); // rounding of the last two steps; measured 0.9e-7

  float edge[4] = {-127.0f, -1e30f, -INFINITY, 0.0f}, y[4];
  f32x4_store(y, ra_exp2(f32x4_load(edge), ra_exp2_load()));
  CHECK(y[0] == 0 && y[1] == 0 && y[2] == 0 && y[3] == 1, "%g %g %g %g", y[0], y[1], y[2], y[3]);
  f32x4_store(y, ra_exp2(f32x4_splat(NAN), ra_exp2_load()));
  CHECK(isnan(y[0]), "%g", y[0]);
}

static void tanh_is_accurate(void) {
  double worst = 0;
  for (int n = -4000; n <= 4000; n++) {
    float x[4] = {(float)n / 256, (float)n / 1024 + 1e-4f, (float)n / 4096 + 1e-5f, (float)n / 65536 + 1e-6f}, y[4];
    f32x4_store(y, ra_tanh(f32x4_load(x), ra_tanh_load()));
    for (int i = 0; i < 4; i++) worst = fmax(worst, fabs(y[i] / tanh((double)x[i]) - 1));
  }
  CHECK(worst < 3e-7, "relative error %g", worst); // five roundings; measured 2.5e-7
  float edge[4] = {-1e30f, INFINITY, 0.0f, NAN}, y[4];
  f32x4_store(y, ra_tanh(f32x4_load(edge), ra_tanh_load()));
  CHECK(y[0] == -1 && y[1] == 1 && y[2] == 0 && isnan(y[3]), "%g %g %g %g", y[0], y[1], y[2], y[3]);
}

static void tanh_near_zero_is_accurate(void) {
  double worst = 0;
  for (int n = -512; n < 512; n++) {
    float x[4] = {(float)n / 1024 + 2e-4f, (float)n / 4096 + 1e-4f, (float)n / 65536 + 1e-5f, RA_TANH_NEAR}, y[4];
    f32x4_store(y, ra_tanh_near(f32x4_load(x), ra_tanh_load()));
    for (int i = 0; i < 4; i++) worst = fmax(worst, fabs(y[i] * x[i] / tanh((double)x[i]) - 1));
  }
  CHECK(worst < 1.5e-7, "relative error %g", worst); // measured 0.94e-7
  float y[4];
  f32x4_store(y, ra_tanh_near(f32x4_splat(0), ra_tanh_load()));
  CHECK(y[0] == 1, "%g", y[0]);
}

// The largest error of cos and sin at angles in (-top, top), and at doubles next to multiples of pi/2 there. long double has 64 bits at
// least on what these tests run on.
static double angle_error(double top) {
  uint64_t seed = 7;
  double worst = 0;
  for (int n = 0; n < 20000; n++) {
    double angle = top * ((double)check_random(&seed, 1) + (double)check_random(&seed, 0x1p-24f)), c, s;
    if (n % 4 == 0) angle = round(angle / PI * 2) * PI / 2;
    ra_cos_sin_f64(angle, &c, &s);
    double error = fmax(fabs((double)(c - cosl(angle))), fabs((double)(s - sinl(angle))));
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

static void angles_are_accurate(void) {
  // Measured 1.87e-16: roundings of the reduced angle and of the sum, 2^-54 each, and of what is added to 1 or to r.
  static const double exact[] = {0.7, 3.2, 6.4, 1e2, 1e4, 3294199 /* 2^20 pi */, 1e9, 0x1p32};
  for (size_t n = 0; n < sizeof exact / sizeof *exact; n++)
    CHECK(angle_error(exact[n]) < 2e-16, "%g: %g", exact[n], angle_error(exact[n]));
  static const double rounded[] = {1e10, 1e12, 1e15}; // as if the angle had been rounded once more
  for (size_t n = 0; n < sizeof rounded / sizeof *rounded; n++)
    CHECK(angle_error(rounded[n]) < 0x1p-53 * rounded[n], "%g: %g", rounded[n], angle_error(rounded[n]));

  static const double tiny[] = {0.0, -0.0, 5e-324, -1e-310, 1e-300, -1e-20, 1e-9};
  double c, s;
  for (size_t n = 0; n < sizeof tiny / sizeof *tiny; n++) {
    ra_cos_sin_f64(tiny[n], &c, &s);
    CHECK(c == 1 && s == tiny[n], "%g: %g, %g", tiny[n], c, s);
  }
  static const double large[] = {1e16, -1e22, 1e100, -1e300, DBL_MAX}; // any angle will do
  for (size_t n = 0; n < sizeof large / sizeof *large; n++) {
    ra_cos_sin_f64(large[n], &c, &s);
    CHECK(fabs(c * c + s * s - 1) < 5e-16, "%g: %g, %g", large[n], c, s);
  }
  static const double none[] = {INFINITY, -INFINITY, NAN};
  for (size_t n = 0; n < sizeof none / sizeof *none; n++) {
    ra_cos_sin_f64(none[n], &c, &s);
    CHECK(isnan(c) && isnan(s), "%g: %g, %g", none[n], c, s);
  }
}

static double relative(double got, long double want) { return fabs((double)((got - want) / want)); }

static void exponentials_and_logarithms_are_accurate(void) {
  uint64_t seed = 3;
  double of_exp = 0, of_log = 0;
  for (int n = 0; n < 40000; n++) {
    double x = (double)check_random(&seed, n % 2 ? 0.4f : 708), y = exp(x);
    of_exp = fmax(of_exp, relative(ra_exp_f64(x), expl(x)));
    if (y != 1) of_log = fmax(of_log, relative(ra_log_f64(y), logl(y)));
  }
  CHECK(of_exp < 2e-16 && of_log < 2e-16, "%g, %g", of_exp,
        of_log); // measured 1.8e-16, 1.6e-16: the last two roundings

  static const double ends[] = {0,      -0.0,    INFINITY, -INFINITY, NAN, -1,   1,    5e-324,
                                1e-310, DBL_MAX, -745,     709.7,     710, -800, 1e300};
  for (size_t n = 0; n < sizeof ends / sizeof *ends; n++) {
    double x = ends[n], e = exp(x), l = log(x), own_e = ra_exp_f64(x), own_l = ra_log_f64(x);
    CHECK(isnan(e) ? isnan(own_e) : own_e == e || relative(own_e, e) < 4e-16, "exp %g: %g", x, own_e);
    CHECK(isnan(l) ? isnan(own_l) : own_l == l || relative(own_l, l) < 4e-16, "log %g: %g", x, own_l);
  }
}

static void exponents_are_those_of_frexp(void) {
  for (int n = -125; n <= 127; n++) {
    int below, at;
    frexpf(nextafterf(ldexpf(1, n), 0), &below), frexpf(ldexpf(1, n), &at);
    CHECK(ra_exponent(ldexpf(1, n)) == at && ra_power_of_two((float)n) == ldexpf(1, n), "2^%d", n);
    if (n > -125) CHECK(ra_exponent(nextafterf(ldexpf(1, n), 0)) == below, "below 2^%d", n);
  }
  CHECK(ra_exponent(0x1p-140f) == -126 && ra_exponent(INFINITY) == 129, "ends");
}

static void rotation_is_accurate(uint32_t dim, uint32_t interleaved, int64_t position, uint32_t rows) {
  double frequencies[64];
  for (uint32_t i = 0; i < dim / 2; i++) frequencies[i] = pow(10000, -2.0 * i / dim);
  ra_problem p = {.head_dim = dim + 3, .rotary_dim = dim, .interleaved = interleaved, .frequencies = frequencies};
  p.rotary_factor = 1, p.query_length = rows, p.query_offset = (int32_t)position;
  guarded x = guarded_new((size_t)rows * (dim + 3), 1, 1), y = guarded_new(x.count, 2, 1),
          z = guarded_new(x.count, 3, 1);
  void *space = malloc(ra_rotary_bytes(&p));
  ra_rotary r;
  ra_rotary_init(&r, &p, 1, NULL, space);
  ra_rotary_rows(&r, x.data, dim + 3, y.data, dim + 3, rows, 0, RA_ROTATE, 1.0f);
  double worst = 0;
  for (uint32_t n = 0; n < rows; n++)
    for (uint32_t i = 0; i < dim / 2; i++) {
      uint32_t first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + dim / 2;
      const float *x_n = x.data + n * (dim + 3), *y_n = y.data + n * (dim + 3);
      double angle = (double)(position + n) * frequencies[i];
      worst = fmax(worst, fabs(y_n[first] - (x_n[first] * cos(angle) - x_n[second] * sin(angle))));
      worst = fmax(worst, fabs(y_n[second] - (x_n[first] * sin(angle) + x_n[second] * cos(angle))));
    }
  CHECK(worst < 4e-7, "dim %u at %lld: %g", dim, (long long)position, worst); // 2e-7 each in cos and sin, rows below 1
  for (uint32_t n = 0; n < rows; n++)
    for (uint32_t d = dim; d < dim + 3; d++)
      CHECK(y.data[n * (dim + 3) + d] == x.data[n * (dim + 3) + d], "column %u moved", d);
  ra_rotary_rows(&r, y.data, dim + 3, z.data, dim + 3, rows, 0, RA_ROTATE_TRANSPOSE, 1.0f);
  CHECK(check_error(z.data, x.data, x.count) < 6e-7, "not undone");

  // block by block downwards is the same as all at once upwards
  for (int64_t n = (int64_t)(rows - 1) / RA_ROTARY_BLOCK * RA_ROTARY_BLOCK; n >= 0; n -= RA_ROTARY_BLOCK) {
    uint32_t count = rows - n < RA_ROTARY_BLOCK ? (uint32_t)(rows - n) : RA_ROTARY_BLOCK;
    ra_rotary_rows(&r, x.data + n * (dim + 3), dim + 3, z.data + n * (dim + 3), dim + 3, count, (uint32_t)n, RA_ROTATE,
                   1.0f);
  }
  CHECK(check_error(z.data, y.data, x.count) < 1e-7, "order matters");
  CHECK(guarded_intact(&y) && guarded_intact(&z), "canary");
  free(space), guarded_free(&x), guarded_free(&y), guarded_free(&z);
}

static void transposes_any_size(void) {
  for (size_t rows = 1; rows < 10; rows++)
    for (size_t columns = 1; columns < 10; columns++) {
      guarded x = guarded_new(rows * columns, rows, 1), y = guarded_new(rows * columns, 2, 1);
      ra_transpose(x.data, columns, rows, columns, y.data, rows);
      int same = 1;
      for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < columns; c++) same &= x.data[r * columns + c] == y.data[c * rows + r];
      CHECK(same && guarded_intact(&y), "%zu x %zu", rows, columns);
      guarded_free(&x), guarded_free(&y);
    }
}

static void products_match_loops(void) {
  for (uint32_t rows = 1; rows < 24; rows++)
    for (uint32_t count = 1; count < 40; count += 13) {
      guarded a = guarded_new((size_t)rows * count, rows, 1), b = guarded_new((size_t)count * 8, count, 1);
      guarded c = guarded_new((size_t)rows * 8, 3, 1), d = guarded_new((size_t)rows * 8, 3, 1);
      ra_add_columns(a.data, rows, rows, b.data, 8, count, c.data, 8);
      float *expected = malloc(sizeof(float) * rows * 8);
      for (uint32_t r = 0; r < rows; r++)
        for (int i = 0; i < 8; i++) {
          double sum = d.data[r * 8 + i];
          for (uint32_t n = 0; n < count; n++) sum += (double)a.data[n * rows + r] * b.data[n * 8 + i];
          expected[r * 8 + i] = (float)sum;
        }
      CHECK(check_error(c.data, expected, c.count) < 1e-6 && guarded_intact(&c), "add %u %u", rows, count);
      ra_set_rows(a.data, count, rows, b.data, 8, count, c.data, 8);
      for (uint32_t r = 0; r < rows; r++)
        for (int i = 0; i < 8; i++) {
          double sum = 0;
          for (uint32_t n = 0; n < count; n++) sum += (double)a.data[r * count + n] * b.data[n * 8 + i];
          expected[r * 8 + i] = (float)sum;
        }
      CHECK(check_error(c.data, expected, c.count) < 2e-6 && guarded_intact(&c), "set %u %u", rows, count);
      free(expected), guarded_free(&a), guarded_free(&b), guarded_free(&c), guarded_free(&d);
    }
}

static void dense_products_match_loops(uint32_t rows, uint32_t inner, uint32_t columns) {
  guarded a = guarded_new((size_t)rows * inner, rows, 1), b = guarded_new((size_t)inner * columns, inner, 1);
  guarded c = guarded_new((size_t)rows * columns, 3, 1);
  float *expected = malloc(sizeof(float) * c.count);
  for (int transposed = 0; transposed < 2; transposed++) {
    for (uint32_t r = 0; r < rows; r++)
      for (uint32_t i = 0; i < columns; i++) {
        double sum = 0;
        for (uint32_t n = 0; n < inner; n++)
          sum += (double)a.data[transposed ? n * rows + r : r * inner + n] * b.data[n * columns + i];
        expected[r * columns + i] = (float)sum;
      }
    if (transposed) ra_transposed_product(a.data, b.data, inner, rows, columns, c.data);
    else ra_product(a.data, b.data, rows, inner, columns, c.data);
    double error = check_error(c.data, expected, c.count);
    // measured 6.3e-7, at 300 terms
    CHECK(error < 1.3e-6 && guarded_intact(&c), "%u %u %u, transposed %d: %g", rows, inner, columns, transposed, error);
  }
  free(expected), guarded_free(&a), guarded_free(&b), guarded_free(&c);
}

// sum_r w_r phi_r(x) phi_r(y) = sum_m c_m (x.y)^m, and J^T dphi against central differences of sum_r dphi_r phi_r(x).
static void features_are_the_multinomial_theorem(uint32_t D, uint32_t degree) {
  float coefficients[RA_MAX_DEGREE + 1], live[RA_CHUNK];
  for (uint32_t m = 0; m <= degree; m++) coefficients[m] = 1.0f / (float)(m + 1) - 0.3f;
  uint32_t *tail = malloc(ra_features_cells(D, degree) * sizeof *tail);
  ra_features f;
  ra_features_init(&f, D, degree, tail);
  CHECK(f.rank == ra_rank(D, degree), "rank %u", f.rank);
  size_t lower = (size_t)f.lower * RA_CHUNK, top = (size_t)(f.rank - f.lower) * RA_CHUNK;
  float *weights = malloc(sizeof(float) * f.rank);
  uint8_t *run = malloc(f.rank);
  ra_features_weights(&f, coefficients, weights, run);
  guarded x = guarded_new((size_t)D * RA_CHUNK, 5, 0.7f), y = guarded_new((size_t)D * RA_CHUNK, 6, 0.7f);
  guarded phi_x = guarded_new(lower + top, 1, 1), phi_y = guarded_new(lower + top, 1, 1);
  for (int i = 0; i < RA_CHUNK; i++) live[i] = i < 29;
  for (int side = 0; side < 2; side++) {
    const float *tokens = side ? y.data : x.data;
    float *phi = side ? phi_y.data : phi_x.data;
    ra_features_lower(&f, tokens, live, phi);
    for (uint32_t row = f.lower; row < f.rank; row += 7) // blocks of an awkward size
      ra_features_block(&f, tokens, phi, row, f.rank - row < 7 ? f.rank - row : 7, phi + (size_t)row * RA_CHUNK);
  }
  CHECK(guarded_intact(&phi_x) && guarded_intact(&phi_y), "canary");
  double worst = 0;
  for (int i = 0; i < 29; i++) {
    double dot = 0, p = 0, sum = 0;
    for (uint32_t d = 0; d < D; d++) dot += (double)x.data[d * RA_CHUNK + i] * y.data[d * RA_CHUNK + i];
    for (uint32_t m = degree + 1; m-- > 0;) p = p * dot + coefficients[m];
    for (size_t r = 0; r < f.rank; r++)
      sum += (double)weights[r] * phi_x.data[r * RA_CHUNK + i] * phi_y.data[r * RA_CHUNK + i];
    worst = fmax(worst, fabs(sum - p));
  }
  CHECK(worst < 5e-6, "D %u degree %u: %g", D, degree, worst);
  for (int i = 29; i < RA_CHUNK; i++) CHECK(phi_x.data[i] == 0, "padding has features");

  if (degree > 0) {
    guarded dphi = guarded_new(lower + top, 8, 1), dx = guarded_new((size_t)D * RA_CHUNK, 9, 1);
    guarded dphi_before = guarded_new(lower + top, 8, 1);
    memset(dx.data, 0, sizeof(float) * dx.count);
    for (uint32_t row = f.lower; row < f.rank; row += 7)
      ra_features_block_backward(&f, x.data, phi_x.data, row, f.rank - row < 7 ? f.rank - row : 7,
                                 dphi.data + (size_t)row * RA_CHUNK, dphi.data, dx.data);
    ra_features_lower_backward(&f, x.data, phi_x.data, dphi.data, dx.data);
    worst = 0;
    for (uint32_t d = 0; d < D; d++) {
      double change[RA_CHUNK] = {0};
      float step = 1.0f / 64;
      for (int sign = -1; sign <= 1; sign += 2) {
        guarded moved = guarded_new(x.count, 5, 0.7f);
        for (int i = 0; i < RA_CHUNK; i++) moved.data[d * RA_CHUNK + i] += (float)sign * step;
        ra_features_lower(&f, moved.data, live, phi_y.data);
        ra_features_block(&f, moved.data, phi_y.data, f.lower, f.rank - f.lower, phi_y.data + lower);
        for (size_t r = 0; r < f.rank; r++)
          for (int i = 0; i < RA_CHUNK; i++)
            change[i] += sign * (double)dphi_before.data[r * RA_CHUNK + i] * phi_y.data[r * RA_CHUNK + i] / (2 * step);
        guarded_free(&moved);
      }
      for (int i = 0; i < 29; i++) worst = fmax(worst, fabs(change[i] - dx.data[d * RA_CHUNK + i]));
    }
    CHECK(worst < 2e-2, "Jacobian, D %u degree %u: %g", D, degree,
          worst); // third derivative times step^2 / 6, summed over rows
    guarded_free(&dphi), guarded_free(&dx), guarded_free(&dphi_before);
  }
  free(tail), free(weights), free(run);
  guarded_free(&x), guarded_free(&y), guarded_free(&phi_x), guarded_free(&phi_y);
}

int main(void) {
  exp2_is_accurate();
  tanh_is_accurate();
  tanh_near_zero_is_accurate();
  angles_are_accurate();
  exponentials_and_logarithms_are_accurate();
  exponents_are_those_of_frexp();
  rotation_is_accurate(16, 0, 0, 70);
  rotation_is_accurate(16, 1, 1000000, 33);
  rotation_is_accurate(6, 0, -40, 65);
  rotation_is_accurate(16, 0, 32, 1); // a table of one row, one block from where the anchor begins
  rotation_is_accurate(16, 1, -32, 5);
  rotation_is_accurate(2, 1, 7, 1);
  transposes_any_size();
  products_match_loops();
  dense_products_match_loops(1, 1, 8);
  dense_products_match_loops(13, 300, 24);
  dense_products_match_loops(5, 128, 8);
  dense_products_match_loops(6, 129, 16);
  features_are_the_multinomial_theorem(1, 6);
  features_are_the_multinomial_theorem(2, 8);
  features_are_the_multinomial_theorem(3, 5);
  features_are_the_multinomial_theorem(7, 3);
  features_are_the_multinomial_theorem(16, 2);
  features_are_the_multinomial_theorem(5, 1);
  features_are_the_multinomial_theorem(5, 0);
  CHECK(ra_rank(64, 2) == 2145 && ra_rank(64, 3) == 47905 && ra_rank(16, 4) == 4845, "ranks");
  CHECK(ra_rank(1024, 8) == RA_SIZE_OVERFLOW, "overflow");
  return check_report();
}
