// SPDX-License-Identifier: MIT
//
// Products with a Toeplitz matrix T, y_i = sum_j T_{i-j} x_j, with its adjoint, and the derivative of both by T, for
// four complex columns at a time, or eight real ones in pairs, by fast Fourier transforms of blocks. The four have one
// real T, or each its own complex one.
//
//   rows and columns are cut into blocks of S; blocks of rows and columns whose numbers differ by d meet in a Toeplitz matrix
//   of lags (d-1) S + 1 .. (d+1) S - 1; embedded in a circulant one of size 2S, it is a product of numbers in the frequency
//   domain. Spectra of input blocks are made once, the sums over blocks are taken in the frequency domain.
//
// Two real columns are one complex sequence where T is real; four sequences are transformed in lockstep. A block that
// is filled up with zeros to 2S has a spectrum of two halves, each a transform of S numbers: that of x_n, and that of
// x_n e^(-i pi n/S) for the odd frequencies; the inverse likewise. O(N log S + N^2/S) for each column. Blocks keep
// rounding errors near where they arise: an error is about 2^-24 sqrt(S) of the largest sums of its block, not of the
// whole sequence's.
//
// This work is based on:
//   Alman, Song. Fast RoPE Attention: Combining the Polynomial Method and Fast Fourier Transform. 2025 (2505.11892)
//   Stockham. High-speed convolution and correlation. 1966

#ifndef RA_CONVOLUTION_H
#define RA_CONVOLUTION_H

#include "workspace.h"

enum {
  RA_STRIP = 32,  // numbers of eight columns that go in or come out together; S is a multiple
  RA_LANES = 4,   // sequences of a batch
  RA_COLUMNS = 8, // their real and their imaginary parts: rows 0 .. 3 and 4 .. 7 of what goes in and out
};

typedef struct ra_convolution {
  uint32_t Nq, Nk;        // lengths of y and x
  uint32_t S;             // block
  uint32_t rows, columns; // blocks of y, of x
  uint32_t own;           // each sequence has its own kernel
  int32_t least, most;    // d of the blocks that are not zero: none when least > most
  void *plan;
  float *turn; // [2][S] cos, sin of pi n / S
  float *
      kernel; // [rows + columns - 1][2S][2] spectra of the blocks d = 1 - columns .. rows - 1, over 2S; own: [..][2S][8]
  float *change;     // [rows + columns - 1][2][2S] their derivatives, or NULL; own: [..][2S][8]
  float *even, *odd; // [S][8] the two halves of one block, before or behind a transform
  float *half;       // [S][8]
  float *tile;       // [rows + columns][16][8]
} ra_convolution;

// The block that is expected to be the fastest: 2^a, 3 2^a or 5 2^a, from 32 to 2^14.
uint32_t ra_convolution_block(uint32_t Nq, uint32_t Nk);

// Takes what is needed with blocks of S; `gradient`: for the derivative as well. Fills *c but for the contents.
void ra_convolution_layout(ra_convolution *c, uint32_t Nq, uint32_t Nk, uint32_t S, int own, int gradient,
                           ra_workspace_cursor *w);

// Floats of the spectra of a batch of x, or of y: room for either.
size_t ra_convolution_floats(const ra_convolution *c);

// Plan and tables. O(S): 2 microseconds at 64 tokens, 0.1 ms at 16,384, at most 0.25 % of a pass where D = 16 (of one
// with a single term
// 1.2 %), so that they live as long as the workspace and no longer.
void ra_convolution_init(ra_convolution *c);

// T: lags [Nq + Nk - 1], entry i - j + Nk - 1; own: [8][Nq + Nk - 1]. Sets the derivative to zero. Sets *least and *most.
void ra_convolution_kernel(ra_convolution *c, const float *lags);

// Numbers n .. n + 31 of a block, lanes [8][32], go in; when all have, the block's spectrum is made.
void ra_convolution_put(const ra_convolution *c, uint32_t n, const float *lanes);
void ra_convolution_transform(const ra_convolution *c, uint32_t block, float *spectra);

// spectra of x become those of T x, or (adjoint) those of y become conj(T)^T y. What comes out is conjugate, for `invert`.
void ra_convolution_multiply(const ra_convolution *c, int adjoint, float *spectra);

// A block's numbers come back, then those of n .. n + 31.
void ra_convolution_invert(const ra_convolution *c, uint32_t block, const float *spectra);
void ra_convolution_get(const ra_convolution *c, uint32_t n, float *lanes);

// The derivative by T_t grows by sum_j conj(x_j) y_{j+t}, of spectra that `transform` made: its real part, summed over the
// sequences; or that of each.
void ra_convolution_correlate(const ra_convolution *c, const float *x_spectra, const float *y_spectra);

// dlags, as lags, = the derivative so far.
void ra_convolution_change(const ra_convolution *c, float *dlags);

#endif
