// SPDX-License-Identifier: MIT
//
// The five names that KissFFT, built with USE_SIMD, takes from the header of this name: four float lanes with C's own operators,
// on any target. There is no heap here: with plans in the caller's memory, factors 2, 3 and 5 only, and results that do not
// overwrite inputs, KissFFT asks for none. The compiler is told, and leaves out what would.

#ifndef RA_KISSFFT_XMMINTRIN_H
#define RA_KISSFFT_XMMINTRIN_H

typedef float __m128 __attribute__((vector_size(16), may_alias));

static inline __m128 _mm_set1_ps(double x) { return (__m128){(float)x, (float)x, (float)x, (float)x}; }

#define _mm_malloc(bytes, alignment) ((void)(bytes), (void)(alignment), __builtin_unreachable(), (void *)0)
#define _mm_free(pointer) ((void)(pointer))

#endif
