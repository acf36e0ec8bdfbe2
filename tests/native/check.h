// SPDX-License-Identifier: MIT
//
// The smallest test frame: CHECK counts, REPORT prints the last line that `make test` reads. Inputs come from a seeded
// generator; every array has canaries on both sides.

#ifndef CHECK_H
#define CHECK_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int check_passed, check_failed;

#define CHECK(condition, ...)                                                                                          \
  do {                                                                                                                 \
    if (condition) check_passed++;                                                                                     \
    else {                                                                                                             \
      check_failed++;                                                                                                  \
      printf("%s:%d: " #condition ": ", __FILE__, __LINE__);                                                           \
      printf(__VA_ARGS__);                                                                                             \
      printf("\n");                                                                                                    \
    }                                                                                                                  \
  } while (0)

static inline int check_report(void) {
  printf("%d passed, %d failed\n", check_passed, check_failed);
  return check_failed != 0;
}

// Uniform in [-bound, bound): Steele, Vigna. SplitMix. 2014.
static inline float check_random(uint64_t *state, float bound) {
  uint64_t z = (*state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return bound * (float)((double)(z >> 11) / 4503599627370496.0 - 1.0);
}

enum { CANARIES = 8 };
#define CANARY 1.2345e19f

typedef struct guarded {
  float *base, *data;
  size_t count;
} guarded;

// An array of its own: AddressSanitizer sees overruns beyond the canaries, the canaries those within alignment slack.
static inline guarded guarded_new(size_t count, uint64_t seed, float bound) {
  guarded g = {malloc((count + 2 * CANARIES) * sizeof(float)), NULL, count};
  g.data = g.base + CANARIES;
  for (size_t n = 0; n < CANARIES; n++) g.base[n] = g.data[count + n] = CANARY;
  for (size_t n = 0; n < count; n++) g.data[n] = check_random(&seed, bound);
  return g;
}

static inline int guarded_intact(const guarded *g) {
  for (size_t n = 0; n < CANARIES; n++)
    if (g->base[n] != CANARY || g->data[g->count + n] != CANARY) return 0;
  return 1;
}

static inline void guarded_free(guarded *g) { free(g->base); }

// max |a - b| / max |b|; infinities must agree, a NaN is infinitely wrong.
static inline double check_error(const float *a, const float *b, size_t count) {
  double worst = 0, top = 1e-30;
  for (size_t n = 0; n < count; n++) {
    if (isinf(b[n]) && a[n] == b[n]) continue;
    double difference = fabs((double)a[n] - b[n]);
    if (!(difference <= worst)) worst = isnan(difference) ? INFINITY : difference;
    if (fabs((double)b[n]) > top) top = fabs((double)b[n]);
  }
  return worst / top;
}

#endif
