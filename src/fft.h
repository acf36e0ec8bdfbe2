// SPDX-License-Identifier: MIT
//
// The discrete Fourier transform of four complex sequences in lockstep, one in each lane, by KissFFT:
//
//   y_k = sum_n x_n e^(-2 pi i k n / length),   k = 0 .. length - 1
//
// A number is eight floats: four real parts, four imaginary parts. O(length log length); nothing is scaled. The inverse is
// the conjugate of the transform of the conjugate.
//
// The transforms are Borgerding's KissFFT, compiled from the sources that the npm package kissfft-js carries.

#ifndef RA_FFT_H
#define RA_FFT_H

#include <stddef.h>
#include <stdint.h>

// Bytes of a plan, a multiple of 16: 32 bytes of twiddle factors for each number.
size_t ra_fft_bytes(uint32_t length);

// Makes a plan in `plan`, 16-byte aligned, for a length 2^a 3^b 5^c up to 2^24. One cos and sin a number.
void ra_fft_init(void *plan, uint32_t length);

// x, y [length][8], 16-byte aligned, not the same.
void ra_fft(const void *plan, const float *x, float *y);

#endif
