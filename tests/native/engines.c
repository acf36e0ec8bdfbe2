// SPDX-License-Identifier: MIT
//
// The engines against the naive oracle, forward and backward, over shapes that do not fit any tile; sampled rows and columns
// likewise; canaries around every array and the workspace; results do not depend on how units are cut.

#include "engines.h"
#include "check.h"
#include "rope_attention.h"

typedef struct shape {
  uint32_t batch, heads, kv_heads, Nq, Nk, D, Dv, rotary_dim, interleaved, causal;
  int32_t offset;
  float scale, bound;
  // what follows is off when 0
  uint32_t layout, positions, table, window, segments;
  float softcap;
  uint32_t bias_heads, mask, sinks,
      alibi; // mask: 1 added, for each query and key; 2 allowed, for each batch and head; 3 added, a row; sinks: 2 lowest
  uint32_t decays, near; // bias is that many decays from the distance `near` on
  uint32_t
      relative; // 1 positions, 2 the same as weights, 3 random weights, some places twice; 4, 5: 1, 2 of plain rotation
} shape;

static const shape SHAPES[] = {
    {1, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0.7f, 1, .layout = 0},
    {1, 1, 1, 3, 3, 4, 4, 4, 0, 1, 0, 0.5f, 1, .layout = 0},
    {1, 1, 1, 5, 4, 1, 1, 0, 0, 0, 0, 1.0f, 1, .layout = 0},
    {1, 2, 1, 31, 33, 6, 3, 4, 1, 0, 0, 0.4f, 1, .layout = 0},
    {2, 4, 2, 32, 32, 8, 8, 8, 0, 1, 0, 0.35f, 1, .layout = 0},
    {1, 1, 1, 65, 64, 16, 16, 16, 1, 1, -1, 0.25f, 1, .layout = 0},
    {1, 2, 2, 40, 129, 12, 20, 12, 0, 1, 89, 0.3f, 1, .layout = 0},
    {1, 1, 1, 129, 40, 5, 7, 4, 0, 1, -30, 0.45f, 1, .layout = 0},
    {1, 3, 1, 100, 130, 33, 9, 32, 0, 0, 5, 0.17f, 1, .layout = 0},
    {1, 1, 1, 257, 257, 4, 4, 4, 0, 1, 0, 0.5f, 2, .layout = 0},
    {1, 1, 1, 20, 300, 16, 16, 8, 0, 0, 7, -0.25f, 1, .layout = 0},
    {1, 1, 1, 300, 290, 8, 16, 8, 0, 1, -5, 0.35f, 1, .layout = 0},
    {1, 1, 1, 33, 500, 10, 6, 10, 1, 1, 1000000, 0.3f, 1, .layout = 0},
    {2, 4, 2, 45, 50, 8, 6, 8, 0, 1, 5, 0.35f, 1, .layout = 1},
    {2, 2, 1, 70, 33, 8, 8, 6, 1, 0, 0, 0.35f, 1, .layout = 1, .positions = 1},
    {2, 2, 2, 70, 70, 8, 8, 8, 0, 1, 0, 0.35f, 1, .positions = 2},
    {1, 2, 1, 40, 70, 8, 8, 8, 0, 1, 30, 0.35f, 1, .table = 1},
    {2, 2, 2, 40, 40, 8, 4, 4, 1, 0, 0, 0.35f, 1, .positions = 1, .table = 1},
    {1, 2, 2, 300, 300, 8, 8, 8, 0, 1, 0, 0.35f, 1, .segments = 1},
    {2, 4, 2, 300, 300, 8, 4, 8, 0, 0, 0, 0.35f, 1, .segments = 1},
    {1, 2, 1, 100, 300, 8, 8, 8, 0, 1, 150, 0.35f, 1, .segments = 1, .layout = 1},
    {1, 1, 1, 290, 200, 8, 8, 8, 0, 1, -30, 0.35f, 1, .segments = 1},
    {1, 1, 1, 290, 100, 8, 8, 8, 0, 0, -30, 0.35f, 1, .segments = 1},
    {1, 1, 1, 300, 300, 8, 8, 8, 0, 1, 0, 0.35f, 1, .window = 1},
    {1, 1, 1, 140, 300, 8, 8, 8, 0, 0, 100, 0.35f, 1, .window = 2},
    {1, 2, 1, 300, 280, 8, 4, 8, 0, 0, -40, 0.35f, 1, .window = 3},
    {1, 2, 2, 200, 300, 8, 8, 8, 0, 0, 60, 0.35f, 1, .segments = 1, .window = 2, .layout = 1},
    {1, 1, 1, 300, 300, 8, 8, 8, 0, 1, 0, 0.35f, 1, .window = 2},
    {2, 4, 2, 300, 300, 8, 4, 8, 0, 1, 0, 0.35f, 1, .window = 4},
    {1, 1, 1, 600, 600, 4, 4, 4, 0, 1, 0, 0.5f, 1, .window = 4},
    {1, 2, 1, 300, 400, 8, 8, 8, 0, 1, 250, 0.35f, 1, .window = 4},
    {1, 1, 1, 400, 300, 8, 8, 8, 0, 0, -37, 0.35f, 1, .window = 4},
    {1, 1, 1, 300, 500, 8, 8, 8, 0, 0, 0, 0.35f, 1, .window = 5},
    {1, 2, 2, 700, 700, 4, 4, 4, 0, 0, 11, 0.5f, 1, .window = 6},
    {1, 1, 1, 500, 400, 4, 4, 4, 0, 0, 0, 0.5f, 1, .window = 7},
    {1, 2, 1, 400, 400, 8, 4, 8, 0, 1, 0, 0.35f, 1, .segments = 1, .window = 4},
    {1, 1, 1, 400, 350, 8, 8, 8, 0, 0, 20, 0.35f, 1, .segments = 1, .window = 6},
    {1, 1, 1, 300, 300, 8, 8, 8, 0, 1, 0, 0.35f, 1, .alibi = 1},
    {2, 4, 2, 130, 140, 8, 4, 8, 0, 1, 10, 0.35f, 1, .alibi = 1, .layout = 1},
    {1, 2, 1, 40, 300, 8, 8, 8, 0, 1, 290, 0.35f, 1, .alibi = 1},
    {1, 2, 1, 170, 100, 8, 8, 8, 0, 1, -30, 0.35f, 1, .alibi = 1},
    {1, 2, 2, 300, 300, 8, 8, 8, 0, 1, 0, 0.35f, 1, .alibi = 1, .segments = 1},
    {1, 2, 1, 300, 300, 8, 8, 8, 0, 1, 0, 0.35f, 1, .alibi = 2, .window = 4},
    {1, 4, 2, 300, 290, 8, 4, 8, 0, 1, 20, 0.35f, 1, .alibi = 1}, // out of sight of one another
};

// Biases that are decays beyond a near part: one, some, eight; heads that share a bias or have their own; queries behind all keys.
static const shape DECAY_SHAPES[] = {
    {1, 1, 1, 300, 300, 8, 8, 8, 0, 1, 0, 0.35f, 1, .bias_heads = 1, .decays = 1, .near = 64},
    {1, 2, 1, 170, 180, 8, 5, 8, 0, 1, 10, 0.35f, 1, .bias_heads = 1, .decays = 3, .near = 20},
    {2, 4, 2, 140, 130, 8, 4, 8, 1, 1, -7, 0.35f, 1, .bias_heads = 4, .decays = 2, .near = 1, .layout = 1},
    {1, 4, 2, 257, 257, 4, 9, 4, 0, 1, 0, 0.5f, 1, .bias_heads = 1, .decays = 8, .near = 64, .layout = 1},
    {1, 2, 1, 100, 60, 8, 8, 8, 0, 1, 40, 0.35f, 1, .bias_heads = 2, .decays = 4, .near = 40},
    {1, 2, 1, 40, 300, 8, 8, 8, 0, 1, 700, 0.35f, 1, .bias_heads = 2, .decays = 1, .near = 64},
    {1, 1, 1, 40, 300, 8, 8, 8, 0, 1, 700, 0.35f, 1, .bias_heads = 1, .decays = 5, .near = 64},
    {1, 2, 1, 300, 280, 8, 4, 8, 0, 1, 5, 0.35f, 1, .bias_heads = 2, .decays = 3, .near = 16, .window = 4},
    {1, 1, 1, 300, 300, 8, 8, 8, 0, 1, 0, 0.35f, 1, .bias_heads = 1, .decays = 2, .near = 64, .window = 1},
    {1, 1, 1, 500, 500, 4, 4, 4, 0, 1, 0, 0.5f, 1, .bias_heads = 1, .decays = 2, .near = 33, .window = 5},
    {1, 1, 1, 33, 1000, 4, 4, 4, 0, 1, 970, 0.5f, 1, .bias_heads = 1, .decays = 2, .near = 200, .positions = 1},
    {1, 1, 1, 1, 1, 2, 2, 2, 0, 1, 0, 0.7f, 1, .bias_heads = 1, .decays = 2, .near = 64},
};

// What relative maps meet.
static const shape RELATIVE_SHAPES[] = {
    {1, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0.7f, 1, .layout = 0},
    {2, 4, 2, 45, 50, 6, 3, 6, 1, 1, 5, 0.35f, 1, .layout = 1},
    {1, 2, 1, 129, 40, 5, 7, 4, 0, 0, -30, 0.45f, 1, .layout = 0},
    {1, 1, 1, 140, 300, 16, 16, 16, 0, 1, 150, 0.25f, 1, .window = 2},
};

// Several blocks of the Toeplitz engine: biases by head, windows whose near side is narrow, none, and wide.
static const shape TOEPLITZ_SHAPES[] = {
    {1, 2, 1, 700, 900, 4, 3, 4, 0, 0, 0, 0.5f, 1, .bias_heads = 2, .layout = 1},
    {2, 4, 2, 400, 300, 4, 3, 4, 0, 1, 20, 0.5f, 1, .bias_heads = 1},
    {1, 1, 1, 900, 700, 3, 2, 2, 1, 0, -90, 0.5f, 1, .bias_heads = 1, .window = 2},
    {1, 3, 1, 600, 700, 4, 4, 4, 0, 0, 0, 0.5f, 1, .window = 3, .layout = 1},
    {1, 1, 1, 1000, 20, 4, 4, 4, 0, 0, 0, 0.5f, 1, .bias_heads = 1},
    {1, 1, 1, 20, 1000, 4, 4, 4, 0, 1, 980, 0.5f, 1, .bias_heads = 1, .positions = 1},
    {2, 4, 2, 400, 300, 6, 3, 4, 0, 0, 20, 0.4f, 1, .relative = 1, .layout = 1},
    {1, 2, 1, 300, 500, 5, 4, 4, 1, 1, 200, 0.4f, 1, .relative = 1, .bias_heads = 2},
    {1, 1, 1, 500, 500, 4, 5, 4, 0, 1, 0, 0.5f, 1, .relative = 2},
    {1, 2, 1, 400, 300, 3, 2, 0, 0, 0, 0, 0.5f, 1, .relative = 3, .bias_heads = 1},
    {2, 2, 2, 300, 300, 2, 3, 0, 0, 1, 10, 0.5f, 1, .relative = 3, .window = 1},
    {1, 1, 1, 500, 450, 3, 3, 2, 0, 0, 0, 0.5f, 1, .relative = 1, .window = 4},
};

// What only the exact engine does.
static const shape EXACT_SHAPES[] = {
    {1, 2, 1, 130, 140, 8, 8, 8, 0, 0, 0, 0.35f, 2, .softcap = 0.8f},
    {1, 2, 1, 130, 270, 8, 8, 8, 0, 1, 30, 0.35f, 2, .softcap = 30}, // bounds say that it bends little
    {1, 2, 1, 130, 140, 8, 8, 8, 0, 0, 0, 0.35f, 2, .softcap = 30, .bias_heads = 1},
    {2, 2, 1, 130, 140, 8, 8, 8, 0, 1, 10, 0.35f, 1, .bias_heads = 1},
    {2, 2, 1, 33, 31, 8, 8, 8, 0, 0, 0, 0.35f, 1, .bias_heads = 2, .layout = 1},
    {1, 1, 1, 1, 1, 8, 8, 8, 0, 0, 0, 0.35f, 1, .bias_heads = 1},
    {2, 2, 1, 70, 140, 8, 8, 8, 0, 1, 70, 0.35f, 1, .mask = 1},
    {2, 4, 2, 70, 50, 8, 8, 8, 0, 0, 0, 0.35f, 1, .mask = 2},
    {2, 2, 1, 70, 50, 8, 8, 8, 0, 0, 0, 0.35f, 1, .mask = 3},
    {2, 4, 2, 70, 60, 8, 8, 8, 0, 1, -3, 0.35f, 1, .sinks = 1},
    {1, 2, 1, 130, 140, 8, 8, 8, 0, 0, 20, 0.35f, 1, .alibi = 1},
    {1, 4, 4, 250, 320, 8, 8, 8, 0, 0, 40, 0.35f, 1, .alibi = 1, .sinks = 1},
    {1, 4, 1, 200, 260, 8, 8, 8, 0, 1, 60, 0.35f, 1, .alibi = 1, .sinks = 1},
    {1, 4, 4, 320, 310, 8, 8, 8, 0, 0, -10, 0.35f, 1, .alibi = 1},
    {2, 2, 1, 130, 140, 8, 8, 8, 0, 0, 0, 0.35f, 1, .alibi = 1, .bias_heads = 1},
    {2, 2, 1, 70, 140, 8, 8, 8, 0, 1, 70, 0.35f, 1, .mask = 1, .sinks = 2},
    {1, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0.7f, 1, .relative = 1},
    {1, 1, 1, 1, 1, 1, 3, 0, 0, 0, 0, 0.7f, 1, .relative = 3},
    {2, 4, 2, 45, 50, 6, 3, 6, 1, 1, 5, 0.35f, 1, .relative = 1, .layout = 1},
    {1, 2, 1, 300, 290, 10, 7, 8, 0, 0, 0, 0.3f, 1, .relative = 1},
    {1, 2, 2, 290, 140, 16, 16, 16, 1, 1, -20, 0.25f, 1, .relative = 2},
    {1, 1, 1, 129, 40, 5, 7, 4, 0, 0, -30, 0.45f, 1, .relative = 2},
    {2, 2, 1, 70, 33, 8, 8, 0, 0, 0, 0, 0.35f, 1, .relative = 3},
    {1, 3, 1, 33, 500, 5, 6, 0, 0, 1, 470, 0.5f, 1, .relative = 3},
    {1, 2, 1, 400, 390, 10, 7, 10, 1, 0, 5, 0.3f, 1, .relative = 1},
    {1, 1, 1, 400, 390, 6, 7, 0, 0, 1, 5, 0.3f, 1, .relative = 3, .bias_heads = 1},
    {1, 1, 1, 400, 390, 6, 7, 0, 0, 0, 5, 0.3f, 1, .relative = 3, .softcap = 0.8f, .sinks = 1},
    {1, 1, 1, 300, 300, 8, 8, 8, 0, 0, 0, 0.35f, 1, .relative = 3, .window = 2, .segments = 1},
    {1, 2, 1, 130, 140, 8, 8, 8, 0, 1, 10, 0.35f, 1, .relative = 1, .bias_heads = 2},
    {2, 2, 1, 130, 140, 8, 8, 8, 0, 0, 0, 0.35f, 1, .relative = 3, .mask = 1, .softcap = 0.8f},
    {2, 4, 2, 70, 260, 8, 4, 8, 0, 1, 200, 0.35f, 1, .relative = 1, .mask = 2, .sinks = 1},
    {2,
     4,
     2,
     200,
     210,
     8,
     5,
     8,
     1,
     1,
     10,
     0.35f,
     1,
     .layout = 1,
     .positions = 2,
     .window = 1,
     .softcap = 1.5f,
     .bias_heads = 4,
     .mask = 2,
     .sinks = 1},
};

typedef struct run {
  ra_problem p;
  ra_arrays x;
  guarded q, k, v, out, lse, dout, dq, dk, dv, dbias, dsinks, dweights, dalibi;
} run;

static double frequencies[64], query_positions[1024], key_positions[1024];
static float coefficients[64], cos_table[4096], sin_table[4096], bias[4096], mask[1 << 19], sinks[16], slopes[16];
static uint8_t allowed[1 << 19];
static double decay_rates[128];
static float decay_weights[128], decay_tops[16], lag_coefficients[64];
static float relative_positions[1024], weights[64 * 1024];
static uint32_t support[128];
static const uint32_t segments[] = {0, 3, 40, 41, 200};

// Pair i turned by an angle is W with the 2 x 2 rotation at (first, second).
static void rotation_as_weights(ra_problem *p) {
  size_t half = p->rotary_dim / 2, length = (size_t)p->query_length + p->key_length - 1;
  p->support_count = 0;
  for (size_t i = 0; i < half; i++) {
    uint32_t first = (uint32_t)(p->interleaved ? 2 * i : i), second = (uint32_t)(p->interleaved ? 2 * i + 1 : half + i);
    const uint32_t places[] = {first, first, first, second, second, first, second, second};
    memcpy(support + 2 * p->support_count, places, sizeof places);
    for (size_t n = 0; n < length; n++) {
      double angle = relative_positions[n] * p->frequencies[i], factor = (double)p->rotary_factor * p->rotary_factor;
      float c = (float)(factor * cos(angle)), t = (float)(factor * sin(angle));
      const float four[] = {c, t, -t, c};
      for (size_t e = 0; e < 4; e++) weights[(p->support_count + e) * length + n] = four[e];
    }
    p->support_count += 4;
  }
  for (uint32_t d = p->rotary_dim; d < p->head_dim; d++, p->support_count++) {
    support[2 * p->support_count] = support[2 * p->support_count + 1] = d;
    for (size_t n = 0; n < length; n++) weights[p->support_count * length + n] = 1;
  }
  p->rotary_dim = 0;
}

static void add_relative(ra_problem *p, const shape *s) {
  uint64_t seed = 78;
  size_t length = (size_t)s->Nq + s->Nk - 1;
  for (size_t n = 0; n < length; n++) {
    double t = (double)n - (s->Nk - 1.0) + s->offset; // near: as it is; far: slowly
    relative_positions[n] = (float)(s->relative > 3 ? t : fabs(t) < 9 ? t : t > 40 ? 40 : t / 4 + 0.1 * sin(t));
  }
  if (s->relative % 3 == 1) p->relative_positions = relative_positions;
  if (s->relative == 2 || s->relative == 5) rotation_as_weights(p);
  if (s->relative == 3) {
    p->rotary_dim = 0, p->support_count = 2 * s->D + 3;
    for (uint32_t n = 0; n < p->support_count; n++)
      support[2 * n] = n * 5 % 7 % s->D, support[2 * n + 1] = n * n % 11 % s->D;
    for (size_t n = 0; n < p->support_count * length; n++) weights[n] = check_random(&seed, 1);
    for (size_t n = 0; n < p->support_count * length;
         n++) { // constant in the last thirds, which the engine makes use of
      size_t row = n / length * length, t = n % length,
             middle = t < length / 3       ? length / 3
                      : t > 2 * length / 3 ? 2 * length / 3
                                           : t;
      weights[n] = weights[row + middle];
    }
  }
  if (p->support_count) p->support = support, p->weights = weights;
}

// A bias that is exactly what the decays say, from `near` on, and anything before.
static void add_decays(ra_problem *p, const shape *s) {
  uint64_t seed = 79;
  size_t length = (size_t)s->Nq + s->Nk - 1;
  p->decay_rates = decay_rates, p->decay_weights = decay_weights, p->decay_tops = decay_tops;
  p->decay_count = s->decays, p->decay_from = s->near;
  p->lag_degree = p->degree < 2 ? p->degree : 2, p->lag_coefficients = lag_coefficients;
  for (uint32_t h = 0, n = 0; h < s->batch * s->kv_heads; h++)
    for (uint32_t m = 0; m <= p->lag_degree; m++) lag_coefficients[n++] = m == 2 ? 0.5f : 1;
  for (uint32_t h = 0; h < s->bias_heads; h++) {
    double *rates = decay_rates + h * s->decays;
    float *own = decay_weights + h * s->decays;
    decay_tops[h] = check_random(&seed, 3);
    for (uint32_t n = 0; n < s->decays; n++) {
      rates[n] = n == 1 ? 0 : 0.2 / (1 << (2 * n + h));
      own[n] = n == 2 ? -0.1f : 0.3f + 0.2f * (float)n;
    }
    for (size_t n = 0; n < length; n++) {
      double t = (double)n - (s->Nk - 1.0) + s->offset, sum = 0;
      for (uint32_t m = 0; m < s->decays; m++) sum += own[m] * exp(-rates[m] * (t - s->near));
      bias[h * length + n] = t < s->near ? check_random(&seed, 2) : (float)(log(sum) + decay_tops[h]);
    }
  }
}

static ra_problem problem(const shape *s, uint32_t method, uint32_t degree) {
  uint64_t seed = 77;
  uint32_t half = s->rotary_dim / 2;
  for (uint32_t i = 0; i < half; i++) frequencies[i] = pow(10000, -2.0 * i / s->rotary_dim);
  for (uint32_t h = 0, n = 0; h < s->batch * s->kv_heads; h++)
    for (uint32_t m = 0; m <= degree; m++) coefficients[n++] = (float)(1 / tgamma(m + 1.0));
  ra_problem p = {
      .batch = s->batch,
      .heads = s->heads,
      .kv_heads = s->kv_heads,
      .query_length = s->Nq,
      .key_length = s->Nk,
      .head_dim = s->D,
      .value_dim = s->Dv,
      .rotary_dim = s->rotary_dim,
      .interleaved = s->interleaved,
      .causal = s->causal,
      .query_offset = s->offset,
      .scale = s->scale,
      .frequencies = frequencies,
      .method = method,
      .degree = degree,
      .coefficients = coefficients,
      .layout = s->layout,
      .rotary_factor = s->layout ? 1.1f : 1,
      .position_batches = s->positions == 2 ? s->batch : 1,
      .window_left = -1,
      .window_right = -1,
      .softcap = s->softcap,
  };
  if (s->positions) {
    for (int n = 0; n < 1024; n++)
      query_positions[n] = n % 7 == 3 ? 1000.5 - n : n + 3, key_positions[n] = n * 0.5 - 20;
    p.query_positions = query_positions, p.key_positions = key_positions;
  }
  if (s->table) {
    for (uint32_t n = 0; n < 100 * half; n++) {
      cos_table[n] = (float)cos(0.1 * n), sin_table[n] = (float)sin(0.1 * n);
    }
    p.cos_table = cos_table, p.sin_table = sin_table, p.table_rows = 100;
  }
  if (s->window == 1) p.window_left = 9;
  if (s->window == 2) p.window_left = 70, p.window_right = 3;
  if (s->window == 3) p.window_right = 150;
  if (s->window == 4) p.window_left = 100, p.window_right = 20;
  if (s->window == 5) p.window_left = 127;
  if (s->window == 6) p.window_left = 64, p.window_right = 127;
  if (s->window == 7) p.window_left = 0, p.window_right = 300;
  if (s->segments) p.segments = segments, p.segment_count = 5;
  if (s->bias_heads) {
    for (uint32_t n = 0; n < 4096; n++) bias[n] = check_random(&seed, 2);
    p.bias = bias, p.bias_heads = s->bias_heads;
  }
  if (s->decays) add_decays(&p, s);
  if (s->mask) {
    size_t rows = (size_t)s->Nq * s->Nk;
    for (uint32_t n = 0; n < 1 << 19; n++) {
      mask[n] = check_random(&seed, 2), allowed[n] = mask[n] > -1;
      if (n / s->Nk % 11 == 5) mask[n] = -INFINITY, allowed[n] = 0; // whole rows of nothing
      if (n % 5 == 2) mask[n] = -3e38f;
    }
    if (s->mask == 2) p.allowed = allowed, p.mask_batch = s->heads * rows, p.mask_head = rows, p.mask_row = s->Nk;
    else p.mask = mask, p.mask_row = s->mask == 1 ? s->Nk : 0;
  }
  if (s->alibi) {
    for (uint32_t h = 0; h < s->heads; h++)
      slopes[h] = s->alibi == 2 ? 0.01f : h == 2 ? 0 : h == 3 ? 1 : 0.3f / (float)(1 + 4 * h);
    p.alibi = slopes;
  }
  if (s->sinks) {
    for (uint32_t h = 0; h < s->heads; h++) sinks[h] = s->sinks == 2 ? -1e30f : (float)h - 1;
    p.sinks = sinks;
  }
  if (s->relative) add_relative(&p, s);
  return p;
}

static run start(const shape *s, uint32_t method, uint32_t degree) {
  size_t queries = (size_t)s->batch * s->heads * s->Nq, keys = (size_t)s->batch * s->kv_heads * s->Nk;
  run r = {.p = problem(s, method, degree)};
  r.q = guarded_new(queries * s->D, 1, s->bound), r.k = guarded_new(keys * s->D, 2, s->bound);
  r.v = guarded_new(keys * s->Dv, 3, 1), r.dout = guarded_new(queries * s->Dv, 4, 1);
  r.out = guarded_new(queries * s->Dv, 5, 1), r.lse = guarded_new(queries, 6, 1);
  r.dq = guarded_new(queries * s->D, 7, 1), r.dk = guarded_new(keys * s->D, 8, 1);
  r.dv = guarded_new(keys * s->Dv, 9, 1);
  r.dbias = guarded_new(s->bias_heads ? (size_t)s->bias_heads * (s->Nq + s->Nk - 1) : 0, 10, 1);
  r.dsinks = guarded_new(s->sinks ? s->heads : 0, 11, 1);
  r.dalibi = guarded_new(s->alibi ? s->heads : 0, 13, 1);
  r.dweights = guarded_new(r.p.support_count * ((size_t)s->Nq + s->Nk - 1), 12, 1);
  r.x = (ra_arrays){.q = r.q.data,
                    .k = r.k.data,
                    .v = r.v.data,
                    .out = r.out.data,
                    .lse = r.lse.data,
                    .dout = r.dout.data,
                    .dq = r.dq.data,
                    .dk = r.dk.data,
                    .dv = r.dv.data,
                    .dbias = s->bias_heads ? r.dbias.data : NULL,
                    .dalibi = s->alibi ? r.dalibi.data : NULL,
                    .dsinks = s->sinks ? r.dsinks.data : NULL,
                    .dweights = s->relative ? r.dweights.data : NULL}; // of no weights: nothing may be written

  return r;
}

// What a call must not read before it is written shows: NaN.
static void *new_workspace(size_t bytes) {
  void *workspace = aligned_alloc(16, bytes);
  memset(workspace, 0xff, bytes);
  return workspace;
}

// The queries have something in common, and the polynomial engine is to know what.
static void shift_queries(run *r, guarded *means, float shift) {
  uint32_t heads = r->p.batch * r->p.kv_heads;
  for (size_t n = 0; n < r->q.count; n++) r->q.data[n] += shift;
  *means = guarded_new(heads * ra_means(&r->p), 1, 1);
  r->x.means = means->data;
  void *workspace = new_workspace(ra_sample_workspace(&r->p));
  for (uint32_t kv = 0; kv < heads; kv++) {
    ra_bounds b;
    CHECK(ra_sample_prepare(&r->p, &r->x, kv, 0, &b, workspace) == RA_OK, "prepare");
  }
  free(workspace);
}

static void finish(run *r) {
  guarded *all[] = {&r->q,  &r->k,  &r->v,     &r->out,    &r->lse,      &r->dout,  &r->dq,
                    &r->dk, &r->dv, &r->dbias, &r->dsinks, &r->dweights, &r->dalibi};
  for (size_t n = 0; n < sizeof all / sizeof *all; n++) {
    CHECK(guarded_intact(all[n]), "array %zu", n);
    guarded_free(all[n]);
  }
}

static void finish_shifted(run *r, guarded *means) {
  CHECK(guarded_intact(means), "means");
  guarded_free(means);
  finish(r);
}

// Both passes, `slice` units at a time, in a workspace of exactly the size asked for.
static void compute_pass(run *r, uint32_t pass, uint32_t slice) {
  size_t bytes = ra_workspace(&r->p, pass);
  uint32_t units = ra_units(&r->p, pass);
  char *workspace = new_workspace(bytes);
  int status = RA_OK;
  for (uint32_t first = 0; first < units; first += slice)
    status |= ra_run(&r->p, &r->x, pass, workspace, first, first + slice < units ? first + slice : units);
  CHECK(status == RA_OK, "pass %u: %d", pass, status);
  free(workspace);
}

static void compute(run *r, uint32_t slice) {
  for (uint32_t pass = RA_FORWARD; pass <= RA_BACKWARD; pass++) compute_pass(r, pass, slice);
}

static void compare(const char *name, const shape *s, const run *r, const run *oracle, double tolerance) {
  const guarded *got[] = {&r->out, &r->lse, &r->dq, &r->dk, &r->dv, &r->dbias, &r->dsinks, &r->dweights, &r->dalibi};
  const guarded *want[] = {&oracle->out,   &oracle->lse,    &oracle->dq,       &oracle->dk,    &oracle->dv,
                           &oracle->dbias, &oracle->dsinks, &oracle->dweights, &oracle->dalibi};
  static const char *const names[] = {"out", "lse", "dq", "dk", "dv", "dbias", "dsinks", "dweights", "dalibi"};
  for (int n = 0; n < 9; n++) {
    if (got[n]->count != want[n]->count) continue;
    double top = 1e-30;
    for (size_t i = 0; i < want[n]->count; i++)
      if (isfinite(want[n]->data[i])) top = fmax(top, fabs((double)want[n]->data[i]));
    // dq and dk are differences of terms of size scale * bound: where these cancel (few keys, one allowed key), the rounding
    // of the terms is the yardstick
    double yardstick = n == 2 || n == 3 ? fmax(top, 0.2 * fabs((double)s->scale) * s->bound)
                       : n >= 5         ? fmax(top, n == 8 ? 0.02 * s->Nk : 0.2) // of dS, and of distances times dS
                                        : top;
    double error = check_error(got[n]->data, want[n]->data, want[n]->count) * top / yardstick;
    // the far part of dbias goes by degree 2: measured at most 2.6e-5 where others converge
    double limit = n == 5 && s->decays ? fmax(tolerance, 1e-4) : tolerance;
    CHECK(error < limit, "%s %s: Nq %u Nk %u D %u: %g", name, names[n], s->Nq, s->Nk, s->D, error);
  }
}

static void engines_match_the_oracle(const shape *s) {
  run oracle = start(s, RA_NAIVE, 0), exact = start(s, RA_EXACT, 0), sliced = start(s, RA_EXACT, 0);
  compute(&oracle, 1), compute(&exact, 1000), compute(&sliced, 1);
  compare("exact", s, &exact, &oracle, 4e-6); // fp32 sums of up to 500 terms; measured at most 1.2e-6
  compare("sliced", s, &sliced, &exact, 1e-30);

  run bounded = start(s, RA_EXACT, 0); // Cauchy-Schwarz
  bounded.p.score_bound =
      fabsf(s->scale) * (float)s->D * s->bound * s->bound * bounded.p.rotary_factor * bounded.p.rotary_factor;
  compute(&bounded, 2);
  compare("bounded", s, &bounded, &oracle, 4e-6);
  finish(&oracle), finish(&exact), finish(&sliced), finish(&bounded);
}

// The oracle with a relative map is the oracle that rotates, when the map is that rotation; and positions are weights.
static void relative_maps_agree(const shape *given) {
  for (uint32_t relative = 0; relative < 4; relative += 3) { // 0: against plain rotation, 3: other maps
    shape s = *given;
    s.relative = relative ? 1 : 0;
    run expected = start(&s, RA_NAIVE, 0);
    compute(&expected, 1);
    for (uint32_t form = 1; form < 3; form++) {
      s.relative = relative ? form : form + 3;
      run r = start(&s, RA_NAIVE, 0);
      compute(&r, 1);
      compare("relative", &s, &r, &expected, 2e-6); // angles from one position or from two; measured at most 5e-7
      finish(&r);
    }
    finish(&expected);
  }
}

static void polynomials_match_the_oracle(const shape *s) {
  run oracle = start(s, RA_NAIVE, 0);
  compute(&oracle, 1);

  // |s| stays below 4 at bound 1, below 2 mostly: degree 8 leaves 1e-4 at the edge, degree 4 tests the rest
  run high = start(s, RA_POLYNOMIAL, 4), cut = start(s, RA_POLYNOMIAL, 4);
  compute(&high, 1000), compute(&cut, 1);
  compare("polynomial", s, &high, &oracle, s->bound > 1 ? 0.5 : 0.05);
  compare("polynomial sliced", s, &cut, &high, 1e-30);
  finish(&oracle), finish(&high), finish(&cut);
}

// Where row n of a head begins.
static size_t place(const shape *s, size_t head, uint32_t heads, size_t length, size_t n, size_t width) {
  return s->layout ? ((head / heads * length + n) * heads + head % heads) * width : (head * length + n) * width;
}

static int is_sampled(const shape *s) { return !s->softcap && !s->mask && !s->sinks; }

// dv by the derivative of a polynomial is dv by the polynomial that this is, and nothing else changes; sampled columns likewise.
static void derivative_gives_dv(const shape *given) {
  shape s = *given;
  if (s.layout == 0) s.bound = 0.5f; // weights of both signs may add up to little
  run whole = start(&s, RA_POLYNOMIAL, 3), r = start(&s, RA_POLYNOMIAL, 3), lower = start(&s, RA_POLYNOMIAL, 2);
  float c[64], derivative[64];
  for (uint32_t n = 0; n < s.batch * s.kv_heads; n++)
    for (uint32_t m = 0; m < 4; m++) {
      c[4 * n + m] = (m < 2 ? 1 : m == 2 ? 0.4f : 0.2f) + 0.01f * (float)(n + m);
      if (m > 0) derivative[3 * n + m - 1] = (float)m * c[4 * n + m];
    }
  whole.p.coefficients = r.p.coefficients = c, lower.p.coefficients = derivative;
  r.p.dv_by_derivative = 1;
  compute(&whole, 1000), compute(&r, 1);
  memcpy(lower.x.out, whole.x.out, whole.out.count * sizeof(float));
  memcpy(lower.x.lse, whole.x.lse, whole.lse.count * sizeof(float));
  compute_pass(&lower, RA_BACKWARD, 1000);
  double others = check_error(r.dq.data, whole.dq.data, r.dq.count) + check_error(r.dk.data, whole.dk.data, r.dk.count);
  CHECK(others == 0, "dq and dk beside dv by derivative: Nq %u Nk %u D %u: %g", s.Nq, s.Nk, s.D, others);
  double error = check_error(r.dv.data, lower.dv.data, r.dv.count);

  CHECK(error < 3e-6, "dv by derivative: Nq %u Nk %u D %u: %g", s.Nq, s.Nk, s.D, error); // measured at most 5e-7
  if (is_sampled(&s)) {
    uint32_t keys[] = {0, s.Nk / 2, s.Nk - 1}, count = s.Nk > 2 ? 3 : 1;
    void *workspace = new_workspace(ra_sample_workspace(&r.p));
    guarded dk = guarded_new((size_t)count * s.D, 1, 1), dv = guarded_new((size_t)count * s.Dv, 1, 1);
    ra_bounds bounds;
    CHECK(ra_sample_prepare(&r.p, &r.x, 0, 0, &bounds, workspace) == RA_OK, "prepare");
    CHECK(ra_sample_columns(&r.p, &r.x, 0, keys, count, c, 3, 0, dk.data, dv.data, workspace) == RA_OK, "columns");
    double top = 1e-3;
    for (size_t n = 0; n < r.dv.count; n++) top = fmax(top, fabs((double)r.dv.data[n]));
    for (uint32_t n = 0; n < count; n++)
      for (uint32_t d = 0; d < s.Dv; d++) {
        double want = r.dv.data[place(&s, 0, s.kv_heads, s.Nk, keys[n], s.Dv) + d];
        CHECK(fabs(dv.data[n * s.Dv + d] - want) < 1e-5 * top, "sampled dv: Nq %u Nk %u D %u key %u: %g, %g", s.Nq,
              s.Nk, s.D, keys[n], dv.data[n * s.Dv + d], want);
      }
    CHECK(guarded_intact(&dk) && guarded_intact(&dv), "canary");
    guarded_free(&dk), guarded_free(&dv), free(workspace);
  }
  finish(&whole), finish(&r), finish(&lower);
}

// A small bound and a high degree: polynomial and exact agree to rounding.
static void polynomial_converges(const shape *given) {
  shape s = *given;
  s.bound = 0.3f;
  uint32_t degree = s.D > 16 ? 3 : s.D > 8 ? 4 : 6;
  run oracle = start(&s, RA_NAIVE, 0), r = start(&s, RA_POLYNOMIAL, degree);
  compute(&oracle, 1), compute(&r, 3);
  compare("converged", &s, &r, &oracle, degree == 3 ? 3e-4 : 1e-5); // |s| <= 0.3^2 D scale: s^(g+1)/(g+1)! or rounding
  finish(&oracle), finish(&r);
}

// Every 9th key and every 11th query of a group, from a place that differs by head, are `factor` times as large, and outliers.
static uint32_t outlier_keys[4096], outlier_queries[4096];

static void make_outliers(const shape *s, run *r, float factor) {
  uint32_t group = s->heads / s->kv_heads, keys = (s->Nk + 8) / 9, queries = (group * s->Nq + 10) / 11;
  keys -= keys > 1 && s->Nk % 9 > 0, queries -= queries > 1 && group * s->Nq % 11 > 0; // whole strides
  for (uint32_t kv = 0; kv < s->batch * s->kv_heads; kv++) {
    for (uint32_t n = 0; n < keys; n++) {
      uint32_t j = outlier_keys[kv * keys + n] = s->Nk < 9 ? kv % s->Nk : 9 * n + kv % 9;
      for (uint32_t d = 0; d < s->D; d++) r->k.data[place(s, kv, s->kv_heads, s->Nk, j, s->D) + d] *= factor;
    }
    for (uint32_t n = 0; n < queries; n++) {
      uint32_t row = outlier_queries[kv * queries + n] = group * s->Nq < 11 ? kv % (group * s->Nq) : 11 * n + kv % 11;
      size_t head = (size_t)kv * group + row % group;
      for (uint32_t d = 0; d < s->D; d++) r->q.data[place(s, head, s->heads, s->Nq, row / group, s->D) + d] *= factor;
    }
  }
  r->p.outlier_keys = outlier_keys, r->p.outlier_key_count = keys;
  r->p.outlier_queries = outlier_queries, r->p.outlier_query_count = queries;
}

// Scores are large by what queries have in common alone: centred, polynomial and exact agree to rounding again; without, 2^7 / 7!.
static void centred_queries_converge(const shape *given, int outliers) {
  shape s = *given;
  if (s.alibi || s.D > 16) return;
  s.bound = 0.3f, s.rotary_dim = 0; // which would spread it
  run oracle = start(&s, RA_NAIVE, 0), r = start(&s, RA_POLYNOMIAL, s.D > 8 ? 4 : 6);
  guarded means[2];
  if (outliers) make_outliers(&s, &oracle, 3), make_outliers(&s, &r, 3);
  oracle.p.outlier_query_count = oracle.p.outlier_key_count = 0;
  shift_queries(&oracle, means, 2 / (0.3f * (float)s.D * fabsf(s.scale)));
  shift_queries(&r, means + 1, 2 / (0.3f * (float)s.D * fabsf(s.scale)));
  for (size_t n = 0; n < means[1].count; n++) {
    int of_queries = n % ra_means(&r.p) >= s.D + s.Dv;
    CHECK(!of_queries || means[1].data[n] > 0, "mean query %g", means[1].data[n]);
  }
  compute(&oracle, 1), compute(&r, 3);
  compare("centred", &s, &r, &oracle, 1e-5);
  finish_shifted(&oracle, means), finish_shifted(&r, means + 1);
}

// dout.out, with q, k and v moved by `step` times these directions.
static double loss_at(run *r, const guarded *q, const guarded *k, const guarded *v, float step) {
  const guarded *directions[] = {q, k, v};
  guarded *arrays[] = {&r->q, &r->k, &r->v};
  double loss = 0;
  for (int a = 0; a < 3; a++)
    for (size_t n = 0; n < arrays[a]->count; n++) arrays[a]->data[n] += step * directions[a]->data[n];
  compute_pass(r, RA_FORWARD, 1000);
  for (int a = 0; a < 3; a++)
    for (size_t n = 0; n < arrays[a]->count; n++) arrays[a]->data[n] -= step * directions[a]->data[n];
  for (size_t n = 0; n < r->out.count; n++) loss += (double)r->dout.data[n] * r->out.data[n];
  return loss;
}

// The gradient of centred queries is the derivative of the forward pass, the mean query held fixed, where p and p' differ by far.
static void centred_gradient_is_the_derivative(const shape *given) {
  shape s = *given;
  if (s.alibi || s.Nk < 20) return;
  s.rotary_dim = 0;
  run r = start(&s, RA_POLYNOMIAL, 2);
  guarded means,
      moves[] = {guarded_new(r.q.count, 21, 1), guarded_new(r.k.count, 22, 1), guarded_new(r.v.count, 23, 1)};
  shift_queries(&r, &means, 2);
  for (uint32_t kv = 0; kv < s.batch * s.kv_heads; kv++) // the mean key stays
    for (uint32_t d = 0; d < s.D; d++) {
      double sum = 0;
      for (uint32_t j = 0; j < s.Nk; j++) sum += moves[1].data[place(&s, kv, s.kv_heads, s.Nk, j, s.D) + d];
      for (uint32_t j = 0; j < s.Nk; j++)
        moves[1].data[place(&s, kv, s.kv_heads, s.Nk, j, s.D) + d] -= (float)(sum / s.Nk);
    }
  const guarded *gradients[] = {&r.dq, &r.dk, &r.dv};
  for (int a = 0; a < 3; a++) {
    guarded still[3];
    const guarded *direction[3];
    double slope = 0, size = 0;
    for (int n = 0; n < 3; n++)
      still[n] = guarded_new(moves[n].count, 1, 0), direction[n] = n == a ? moves + n : still + n;
    float step = 1.0f / 128;
    double change = loss_at(&r, direction[0], direction[1], direction[2], step) -
                    loss_at(&r, direction[0], direction[1], direction[2], -step);
    compute(&r, 1000);
    for (size_t n = 0; n < gradients[a]->count; n++)
      slope += (double)gradients[a]->data[n] * moves[a].data[n], size += pow(gradients[a]->data[n], 2);
    CHECK(fabs(change / (2 * (double)step) - slope) < 1e-2 * sqrt(size), "Nq %u Nk %u D %u gradient %d: %g, not %g",
          s.Nq, s.Nk, s.D, a, slope, change / (2 * (double)step));
    for (int n = 0; n < 3; n++) guarded_free(still + n);
  }
  for (int n = 0; n < 3; n++) guarded_free(moves + n);
  finish_shifted(&r, &means);
}

// The same by Fourier transforms, and with what depends on distances.
static void toeplitz_converges(const shape *given) {
  shape s = *given;
  s.bound = 0.1f;
  uint32_t degree = s.D > 8 ? 2 : 3;
  run oracle = start(&s, RA_NAIVE, 0), r = start(&s, RA_TOEPLITZ, degree), cut = start(&s, RA_TOEPLITZ, degree);
  compute(&oracle, 1), compute(&r, 1000000), compute(&cut, 50);
  compare("toeplitz", &s, &r, &oracle,
          degree == 2 ? 1e-4 : 6e-5); // s^(g+1)/(g+1)!; rounding, measured at most 4e-5 where few keys are far
  compare("toeplitz sliced", &s, &cut, &r, 1e-30);
  finish(&oracle), finish(&r), finish(&cut);
}

// Distances alone decide what this engine multiplies with.
static int is_by_distance(const shape *s) { return !s->segments && !s->softcap && !s->mask && !s->sinks && !s->alibi; }

// The features are those of the polynomial engine, so any degree agrees with it where neither does anything exactly.
static void toeplitz_is_polynomial(const shape *given) {
  shape s = *given;
  if (s.segments || s.window || s.alibi || (int64_t)s.Nk - s.offset <= 64) return;
  s.causal = 0;
  run polynomial = start(&s, RA_POLYNOMIAL, 2), r = start(&s, RA_TOEPLITZ, 2);
  compute(&polynomial, 10), compute(&r, 10);
  compare("toeplitz as polynomial", &s, &r, &polynomial, 1e-5);
  finish(&polynomial), finish(&r);
}

// Far too large for the polynomial, and beyond what exp alone takes, yet as right as the exact engine.
static void outliers_match_the_oracle(const shape *given, float factor) {
  if (given->alibi) return;
  shape s = *given;
  s.bound = 0.3f;
  uint32_t degree = s.D > 16 ? 3 : s.D > 8 ? 4 : 6;
  run oracle = start(&s, RA_NAIVE, 0), exact = start(&s, RA_EXACT, 0), r = start(&s, RA_POLYNOMIAL, degree);
  run cut = start(&s, RA_POLYNOMIAL, degree);
  make_outliers(&s, &oracle, factor), make_outliers(&s, &exact, factor);
  make_outliers(&s, &r, factor), make_outliers(&s, &cut, factor);
  compute(&oracle, 1), compute(&exact, 5), compute(&r, 3), compute(&cut, 1);
  compare("outliers", &s, &r, &oracle, 1.5e-4);           // scores of hundreds in float32; measured at most 6e-5
  compare("exact outliers", &s, &exact, &oracle, 1.5e-4); // 4e-5
  compare("outliers, sliced", &s, &cut, &r, 1e-30);
  finish(&oracle), finish(&exact), finish(&r), finish(&cut);
}

// Rows first .. first + count - 1 of all heads, in the layout of the shape.
static guarded piece_of(const shape *s, const guarded *x, uint32_t heads, size_t length, uint32_t width, size_t first,
                        size_t count) {
  guarded piece = guarded_new(s->batch * heads * count * width, 1, 1);
  for (size_t head = 0; head < (size_t)s->batch * heads; head++)
    for (size_t n = 0; n < count; n++)
      memcpy(piece.data + place(s, head, heads, count, n, width),
             x->data + place(s, head, heads, length, first + n, width), width * sizeof(float));
  return piece;
}

// Keys first .. end - 1 join a state, `step` at a time.
static void append(const shape *s, const run *r, ra_problem p, void *state, uint32_t first, uint32_t end,
                   uint32_t step) {
  for (uint32_t at = first; at < end; at += step) {
    uint32_t count = end - at < step ? end - at : step;
    p.query_length = p.key_length = count, p.query_offset = (int32_t)at;
    guarded k = piece_of(s, &r->k, s->kv_heads, s->Nk, s->D, at, count);
    guarded v = piece_of(s, &r->v, s->kv_heads, s->Nk, s->Dv, at, count);
    void *workspace = new_workspace(ra_state_workspace(&p));
    CHECK(ra_state_append(&p, &(ra_arrays){.k = k.data, .v = v.data}, state, workspace) == RA_OK, "append");
    free(workspace), guarded_free(&k), guarded_free(&v);
  }
}

// All queries see all keys, which came in pieces, to two states that were merged.
static void states_match_the_oracle(const shape *given) {
  shape s = *given;
  if (s.positions || s.table || s.segments || s.window || s.alibi) return;
  s.bound = 0.3f, s.causal = 0;
  uint32_t degree = s.D > 16 ? 3 : s.D > 8 ? 4 : 6, half = s.Nk / 2;
  run oracle = start(&s, RA_NAIVE, 0), r = start(&s, RA_POLYNOMIAL, degree);
  compute(&oracle, 1);
  ra_problem p = r.p;
  p.query_length = p.key_length = s.Nq;
  for (uint32_t step = 1; step < 100; step += 35) {
    // exactly as long as asked for, so that the sanitizers see what is beyond
    size_t bytes = ra_state_bytes(&p, 1), beginning = ra_state_bytes(&p, 0);
    void *first = aligned_alloc(16, bytes), *second = aligned_alloc(16, bytes);
    memset(first, 0, bytes), memset(second, 0, bytes);
    append(&s, &r, p, second, half, s.Nk, step), append(&s, &r, p, first, 0, half, step);
    void *workspace = new_workspace(ra_state_workspace(&p));
    CHECK(ra_state_merge(&p, first, second, workspace) == RA_OK, "merge");
    if (s.Nk < 32) { // nothing in the sums: nobody looks at them
      void *cut = aligned_alloc(16, beginning);
      memcpy(cut, first, beginning);
      free(first), first = cut;
    }
    CHECK(ra_state_attend(&p, &r.x, first, workspace) == RA_OK, "attend");
    double tolerance = degree == 3 ? 3e-4 : 1e-5;
    CHECK(check_error(r.out.data, oracle.out.data, r.out.count) < tolerance, "out by %u", step);
    CHECK(check_error(r.lse.data, oracle.lse.data, r.lse.count) < tolerance, "lse by %u", step);
    free(first), free(second), free(workspace);
  }

  void *empty = calloc(1, ra_state_bytes(&p, 0)), *workspace = new_workspace(ra_state_workspace(&p));
  CHECK(ra_state_attend(&p, &r.x, empty, workspace) == RA_OK, "attend to nothing");
  for (size_t n = 0; n < r.out.count; n++) CHECK(r.out.data[n] == 0, "out of nothing");
  for (size_t n = 0; n < r.lse.count; n++) CHECK(r.lse.data[n] == -INFINITY, "lse of nothing");
  free(empty), free(workspace);

  ra_problem bad = p;
  bad.method = RA_EXACT;
  CHECK(ra_state_bytes(&bad, 1) == 0 && ra_state_workspace(&bad) == 0, "exact states");
  bad = p, bad.causal = 1;
  CHECK(ra_state_append(&bad, &r.x, NULL, NULL) == RA_ERROR_PROBLEM, "causal");
  bad = p, bad.key_length++;
  CHECK(ra_state_attend(&bad, &r.x, NULL, NULL) == RA_ERROR_PROBLEM, "lengths");
  finish(&oracle), finish(&r);
}

static double length(const float *a, const float *b, uint32_t count) {
  double squares = 0;
  for (uint32_t n = 0; n < count; n++) squares += pow((double)a[n] - b[n], 2);
  return sqrt(squares);
}

// With outliers that are named once a head was looked at: the same as if they had been from the beginning; and back again.
static void prepared_again_is_prepared(const run *r, uint32_t kv, const ra_bounds *without, void *workspace) {
  ra_problem p = r->p;
  uint32_t *row = calloc((size_t)p.batch * p.kv_heads, sizeof(uint32_t)); // the first of each head
  ra_bounds fresh, again = *without;
  p.outlier_queries = p.outlier_keys = row;
  p.outlier_query_count = p.outlier_key_count = 1;
  CHECK(ra_sample_prepare(&p, &r->x, kv, 1, &again, workspace) == RA_OK, "again");
  CHECK(ra_sample_prepare(&p, &r->x, kv, 0, &fresh, workspace) == RA_OK, "from the beginning");
  CHECK(memcmp(&fresh, &again, sizeof fresh) == 0, "bounds with outliers");
  CHECK(fresh.q_squares < without->q_squares || without->q_squares == 0, "sum of squares");
  CHECK(ra_sample_prepare(&r->p, &r->x, kv, 1, &again, workspace) == RA_OK, "without again");
  CHECK(memcmp(without, &again, sizeof again) == 0, "bounds without outliers");
  free(row);
}

// The rows that are named are the largest queries, and the largest keys around their mean.
static void largest_are_largest(const shape *s, const run *r, uint32_t kv, const ra_bounds *b, void *workspace) {
  uint32_t group = s->heads / s->kv_heads, total = group * s->Nq, count = total < 5 ? total : 5, rows[5];
  float norms[5], least = INFINITY, most = 0;
  CHECK(ra_sample_largest(&r->p, &r->x, kv, 1, count, rows, norms, workspace) == RA_OK, "largest queries");
  for (uint32_t n = 0; n < count; n++) {
    least = fminf(least, norms[n]), most = fmaxf(most, norms[n]);
    for (uint32_t m = 0; m < n; m++) CHECK(rows[n] != rows[m], "row %u twice", rows[n]);
  }
  CHECK(most == b->q_norm, "largest query %g %g", most, b->q_norm);
  uint32_t larger = 0;
  for (uint32_t n = 0; n < total; n++) {
    double squares = 0;
    size_t head = (size_t)kv * group + n % group;
    for (uint32_t d = 0; d < s->D; d++)
      squares += pow(r->q.data[place(s, head, s->heads, s->Nq, n / group, s->D) + d], 2);
    int named = 0;
    for (uint32_t m = 0; m < count; m++) {
      if (rows[m] != n) continue;
      named = 1;
      CHECK(fabs(sqrt(squares) - norms[m]) < 1e-6 * norms[m], "norm of %u", n);
    }
    larger += !named && sqrt(squares) > least * (1 + 1e-6);
  }
  CHECK(larger == 0, "%u larger ones", larger);
  count = s->Nk < 5 ? s->Nk : 5;
  CHECK(ra_sample_largest(&r->p, &r->x, kv, 0, count, rows, norms, workspace) == RA_OK, "largest keys");
  int found = 0;
  for (uint32_t n = 0; n < count; n++) found |= norms[n] == b->k_centred_norm && rows[n] == b->k_argmax;
  CHECK(found, "largest key");
  CHECK(ra_sample_largest(&r->p, &r->x, kv, 0, s->Nk + 1, rows, norms, workspace) == RA_ERROR_PROBLEM, "too many");
}

// What sampled rows know.
// With lse and out that are wrong in some rows, dq by these is as far from what it was as is said, dq being the rows `before`: on more
// rows than go together.
static void gradient_distance_is_right(const shape *s, run *wrong, uint32_t kv, const guarded *before,
                                       void *workspace) {
  uint32_t total = s->heads / s->kv_heads * s->Nq, count = total < 20 ? total : 20, rows[20];
  for (uint32_t n = 0; n < count; n++) rows[n] = (uint32_t)((uint64_t)n * total / count);
  guarded out = guarded_new((size_t)count * s->Dv, 1, 1), lse = guarded_new(count, 1, 1);
  guarded dq = guarded_new((size_t)count * s->D, 1, 1);
  ra_distance distance;
  double difference = 0, size = 0;
  CHECK(ra_sample_rows(&wrong->p, &wrong->x, kv, rows, count, NULL, 0, 0, out.data, lse.data, dq.data, &distance,
                       workspace) == RA_OK,
        "rows");
  compute_pass(wrong, RA_BACKWARD, 1);
  for (uint32_t n = 0; n < count; n++) {
    size_t row = (size_t)kv * (s->heads / s->kv_heads) * s->Nq + rows[n];
    size_t at = place(s, row / s->Nq, s->heads, s->Nq, row % s->Nq, s->D);
    for (uint32_t d = 0; d < s->D; d++) {
      difference += pow((double)wrong->dq.data[at + d] - before->data[at + d], 2);
      size += pow(before->data[at + d], 2);
    }
  }
  if (size > 0 && wrong->p.rotary_factor == 1)
    CHECK(fabs(distance.dq / distance.dq_size - sqrt(difference / size)) < 1e-4 * (1 + sqrt(difference / size)),
          "Nq %u Nk %u D %u: dq off by %g, not %g", s->Nq, s->Nk, s->D, (double)(distance.dq / distance.dq_size),
          sqrt(difference / size));
  guarded_free(&out), guarded_free(&lse), guarded_free(&dq);
}

// Columns by an lse and out that are wrong in some rows, and what changes when these are put right: the columns of the oracle.
static void changes_undo_errors(const shape *s, run *oracle, uint32_t kv, const uint32_t *all, uint32_t all_count,
                                const uint32_t *keys, uint32_t key_count, void *workspace) {
  uint32_t group = s->heads / s->kv_heads, past = group * s->Nq, rows[8], count = 0;
  for (uint32_t n = 0; n < all_count; n++) { // each once
    uint32_t m = 0;
    while (m < count && rows[m] != all[n]) m++;
    if (m == count) rows[count++] = all[n];
  }
  size_t k_count = (size_t)key_count * s->D, v_count = (size_t)key_count * s->Dv;
  guarded out = guarded_new((size_t)count * s->Dv, 1, 1), lse = guarded_new(count, 1, 1),
          shares = guarded_new(count, 1, 1);
  guarded dk[4], dv[4]; // by what is right, by what is wrong, changes, changes by halves
  for (int n = 0; n < 4; n++) dk[n] = guarded_new(k_count, 1, 1), dv[n] = guarded_new(v_count, 1, 1);
  CHECK(ra_sample_columns(&oracle->p, &oracle->x, kv, keys, key_count, NULL, 0, 0, dk[0].data, dv[0].data, workspace) ==
            RA_OK,
        "right columns");
  const ra_problem *p = &oracle->p;
  const ra_arrays *x = &oracle->x;
  float *own_lse[8], *own_out[8];
  for (uint32_t n = 0; n < count; n++) {
    size_t head = (size_t)kv * group + rows[n] / s->Nq, i = rows[n] % s->Nq;
    own_lse[n] = oracle->lse.data + head * s->Nq + i;
    own_out[n] = oracle->out.data + place(s, head, s->heads, s->Nq, i, s->Dv);
    lse.data[n] = *own_lse[n];
    memcpy(out.data + n * s->Dv, own_out[n], s->Dv * sizeof(float));
    *own_lse[n] += 0.25f - 0.1f * (float)n;
    for (uint32_t d = 0; d < s->Dv; d++) own_out[n][d] = 0.5f * own_out[n][d] + 0.1f;
  }
  CHECK(ra_sample_columns(p, x, kv, keys, key_count, NULL, 0, 0, dk[1].data, dv[1].data, workspace) == RA_OK,
        "wrong columns");
  guarded before = guarded_new(oracle->dq.count, 1, 1);
  memcpy(before.data, oracle->dq.data, before.count * sizeof(float));
  gradient_distance_is_right(s, oracle, kv, &before, workspace);
  guarded_free(&before);
  for (int halves = 0; halves < 2; halves++) {
    for (uint32_t n = 0; n < count; n++) shares.data[n] = halves ? 0.5f : 1;
    CHECK(ra_sample_changes(p, x, kv, rows, count, lse.data, out.data, shares.data, keys, key_count,
                            dk[2 + halves].data, dv[2 + halves].data, workspace) == RA_OK,
          "changes");
  }
  CHECK(ra_sample_changes(p, x, kv, &past, 1, lse.data, out.data, shares.data, keys, key_count, dk[1].data, dv[1].data,
                          workspace) == RA_ERROR_PROBLEM,
        "row past the end");
  CHECK(ra_sample_changes(p, x, kv, rows, count, lse.data, out.data, shares.data, keys, 0, dk[1].data, dv[1].data,
                          workspace) == RA_ERROR_PROBLEM,
        "no keys");
  for (uint32_t n = 0; n < count; n++) {
    *own_lse[n] = lse.data[n];
    memcpy(own_out[n], out.data + n * s->Dv, s->Dv * sizeof(float));
  }
  compute_pass(oracle, RA_BACKWARD, 1);
  double top_k = 0.2 * fabs((double)s->scale) * s->bound, top_v = 1e-3;
  for (size_t n = 0; n < k_count; n++)
    top_k = fmax(top_k, fmax(fabs((double)dk[0].data[n]), fabs((double)dk[1].data[n])));
  for (size_t n = 0; n < v_count; n++)
    top_v = fmax(top_v, fmax(fabs((double)dv[0].data[n]), fabs((double)dv[1].data[n])));
  for (int k = 0; k < 2; k++) {
    const guarded *found = k ? dk : dv;
    for (size_t n = 0; n < (k ? k_count : v_count); n++) {
      double sum = (double)found[1].data[n] + found[2].data[n], half = 2.0 * found[3].data[n];
      CHECK(fabs(sum - found[0].data[n]) < 1e-5 * (k ? top_k : top_v), "%s put right: %g, not %g", k ? "dk" : "dv", sum,
            found[0].data[n]);
      CHECK(fabs(half - found[2].data[n]) < 1e-5 * (k ? top_k : top_v), "shares of %s", k ? "dk" : "dv");
    }
  }
  for (int n = 0; n < 4; n++) {
    CHECK(guarded_intact(dk + n) && guarded_intact(dv + n), "canary");
    guarded_free(dk + n), guarded_free(dv + n);
  }
  guarded_free(&out), guarded_free(&lse), guarded_free(&shares);
}

// That of some rows of out and lse from those of a run.
static void distance_is_largest(const shape *s, const run *there, uint32_t kv, const uint32_t *rows, uint32_t count,
                                const guarded *out, const guarded *lse, const ra_distance *distance) {
  ra_distance want = {.dq = distance->dq, .dq_size = distance->dq_size};
  for (uint32_t n = 0; n < count; n++) {
    size_t row = (size_t)kv * (s->heads / s->kv_heads) * s->Nq + rows[n], head = row / s->Nq, i = row % s->Nq;
    const float *out_there = there->out.data + place(s, head, s->heads, s->Nq, i, s->Dv);
    for (uint32_t d = 0; d < s->Dv; d++) {
      float value = out->data[n * s->Dv + d];
      want.out = fmaxf(want.out, fabsf(value - out_there[d])), want.out_entry = fmaxf(want.out_entry, fabsf(value));
    }
    if (lse->data[n] == there->lse.data[row]) continue;
    want.lse = fmaxf(want.lse, fabsf(lse->data[n] - there->lse.data[row]));
    want.lse_entry = fmaxf(want.lse_entry, fabsf(lse->data[n]));
  }
  CHECK(distance->dq <= 1e-5f * distance->dq_size + 1e-6f, "dq by what is there off by %g", (double)distance->dq);
  CHECK(memcmp(&want, distance, sizeof want) == 0, "distance %g %g, not %g %g", (double)distance->out,
        (double)distance->lse, (double)want.out, (double)want.lse);
}

// What two calls give one gives that is asked for both.
static void both_ways_are_each(const run *r, uint32_t kv, const uint32_t *rows, uint32_t count, const uint32_t *keys,
                               uint32_t key_count, void *workspace) {
  const ra_problem *p = &r->p;
  size_t outs = (size_t)count * p->value_dim, dqs = (size_t)count * p->head_dim;
  size_t dks = (size_t)key_count * p->head_dim, dvs = (size_t)key_count * p->value_dim;
  guarded out[2], lse[2], dq[2], dk[2], dv[2]; // apart, together
  ra_distance distance[2];
  for (int n = 0; n < 2; n++) {
    out[n] = guarded_new(2 * outs, 1, 1), lse[n] = guarded_new(2 * (size_t)count, 1, 1),
    dq[n] = guarded_new(2 * dqs, 1, 1);
    dk[n] = guarded_new(2 * dks, 1, 1), dv[n] = guarded_new(2 * dvs, 1, 1);
  }
  CHECK(ra_sample_rows(p, &r->x, kv, rows, count, coefficients, 2, 0, out[0].data, lse[0].data, dq[0].data, distance,
                       workspace) == RA_OK &&
            ra_sample_rows(p, &r->x, kv, rows, count, NULL, 0, 0, out[0].data + outs, lse[0].data + count,
                           dq[0].data + dqs, NULL, workspace) == RA_OK &&
            ra_sample_rows(p, &r->x, kv, rows, count, coefficients, 2, 1, out[1].data, lse[1].data, dq[1].data,
                           distance + 1, workspace) == RA_OK,
        "rows in both ways");
  CHECK(ra_sample_columns(p, &r->x, kv, keys, key_count, coefficients, 2, 0, dk[0].data, dv[0].data, workspace) ==
                RA_OK &&
            ra_sample_columns(p, &r->x, kv, keys, key_count, NULL, 0, 0, dk[0].data + dks, dv[0].data + dvs,
                              workspace) == RA_OK &&
            ra_sample_columns(p, &r->x, kv, keys, key_count, coefficients, 2, 1, dk[1].data, dv[1].data, workspace) ==
                RA_OK,
        "columns in both ways");
  const guarded *all[] = {out, lse, dq, dk, dv};
  for (int n = 0; n < 5; n++) {
    CHECK(memcmp(all[n][0].data, all[n][1].data, all[n][0].count * sizeof(float)) == 0, "array %d in both ways", n);
    CHECK(guarded_intact(all[n]) && guarded_intact(all[n] + 1), "canary");
  }
  CHECK(memcmp(distance, distance + 1, sizeof *distance) == 0, "distance in both ways");
  for (int n = 0; n < 2; n++)
    guarded_free(out + n), guarded_free(lse + n), guarded_free(dq + n), guarded_free(dk + n), guarded_free(dv + n);
}

static uint32_t centred_heads;

// By means that sampling has left the engine computes what it does by its own, but for the rounding of mean values.
static void found_means_serve(const shape *s, run *r) {
  uint32_t heads = s->batch * s->kv_heads;
  guarded means = guarded_new(heads * ra_means(&r->p), 1, 1), *got[] = {&r->out, &r->dq, &r->dk, &r->dv}, before[4];
  for (size_t n = 0; n < means.count; n++) means.data[n] = NAN;
  for (int n = 0; n < 4; n++) {
    before[n] = guarded_new(got[n]->count, 1, 1);
    memcpy(before[n].data, got[n]->data, got[n]->count * sizeof(float));
  }
  r->x.means = means.data;
  for (uint32_t kv = 0; kv < heads; kv++) {
    void *workspace = new_workspace(ra_sample_workspace(&r->p));
    ra_bounds b;
    CHECK(ra_sample_prepare(&r->p, &r->x, kv, 0, &b, workspace) == RA_OK, "prepare");
    free(workspace);
  }
  for (size_t n = 0; n < means.count; n++)
    if (n % ra_means(&r->p) >= s->D + s->Dv) means.data[n] = 0; // queries as they are, even where these are few
  for (size_t n = 0; n < means.count; n++) CHECK(fabsf(means.data[n]) <= s->bound + 1, "mean %g", means.data[n]);
  compute(r, 1);
  for (int n = 0; n < 4; n++) {
    double top = 1e-30, worst = 0;
    for (size_t i = 0; i < before[n].count; i++) top = fmax(top, fabs((double)before[n].data[i]));
    if (n == 1 || n == 2) top = fmax(top, 0.2 * fabs((double)s->scale) * s->bound); // as in compare()
    for (size_t i = 0; i < before[n].count; i++) worst = fmax(worst, fabs((double)got[n]->data[i] - before[n].data[i]));
    CHECK(worst <= 4e-6 * top, "array %d by means that were found: %g", n, worst / top);
    guarded_free(before + n);
  }
  CHECK(guarded_intact(&means), "canary");
  guarded_free(&means);
  r->x.means = NULL;
}

// |v - mean|^2 of a key, the mean being that of the values themselves.
static double value_squares(const shape *s, const run *r, uint32_t kv, uint32_t j) {
  double sum = 0;
  for (uint32_t d = 0; d < s->Dv; d++) {
    double mean = 0;
    for (uint32_t n = 0; n < s->Nk; n++) mean += r->v.data[place(s, kv, s->kv_heads, s->Nk, n, s->Dv) + d] / s->Nk;
    sum += pow(r->v.data[place(s, kv, s->kv_heads, s->Nk, j, s->Dv) + d] - mean, 2);
  }
  return sum;
}

// Whether a key is among those of a range that count most, at least nearly so; squares: what counts, on which slopes come.
static int counts_most(const float *squares, ra_range among, double slope, int64_t j) {
  uint32_t larger = 0;
  for (int64_t m = among.first; m < among.end && larger < RA_EXTREMES; m++)
    larger += squares[m] * (slope > 0 ? exp(2 * slope * (double)(m - j)) : 1) > squares[j] * (1 + 1e-5);
  return among.first <= j && j < among.end && larger < RA_EXTREMES;
}

// No row has a larger s^3 |v - mean| exp(bias), of either sign, than the first of its list, through the state and against keys that count
// most: of all, or of the last 32 where slopes make them fall.
static void rows_are_extreme(const shape *s, run *r, uint32_t kv, int by_values, void *workspace) {
  uint32_t large[RA_EXTREMES], aligned[RA_EXTREMES], opposed[RA_EXTREMES], keys[RA_EXTREMES];
  uint32_t group = s->heads / s->kv_heads, *order = calloc(s->Nk, sizeof *order);
  CHECK(ra_sample_extremes(&r->p, &r->x, kv, large, aligned, opposed, keys, workspace) == RA_OK, "extremes");
  guarded scores = guarded_new(s->Nk, 1, 1), squares = guarded_new(s->Nk, 1, 1), norms = guarded_new(s->Nk, 1, 1);
  guarded weights = guarded_new(s->Nk, 1, 1), most = guarded_new(s->Nk, 1, 1);
  CHECK(ra_sample_largest(&r->p, &r->x, kv, 0, s->Nk, order, norms.data, workspace) == RA_OK, "all keys");
  for (uint32_t n = 0; n < s->Nk; n++) {
    uint32_t j = order[n];
    weights.data[j] = by_values ? (float)sqrt(value_squares(s, r, kv, j)) : 1;
    squares.data[j] = (float)pow(norms.data[n] * weights.data[j], 2);
  }
  ra_range all = {0, s->Nk};
  for (uint32_t j = 0; j < s->Nk; j++) most.data[j] = (float)counts_most(squares.data, all, 0, j);
  double high = 0, low = 0, high_found = 0, low_found = 0;
  for (uint32_t row = 0; row < group * s->Nq; row++) {
    uint32_t i = row % s->Nq, head = (kv * group + row / s->Nq) % s->heads;
    ra_range seen = ra_keys_of(&r->p, i), state = ra_state_keys(&r->p, ra_chunk_start(&r->p, i));
    ra_range near = ra_state_keys(&r->p, ra_chunk_start(&r->p, i / 32 * 32)); // segments may begin behind it
    double slope = s->alibi && s->causal && slopes[head] > 1.0f / 128 ? slopes[head] : 0;
    if (near.end > near.first + 32) near.first = near.end - 32;
    uint32_t written = ra_sample_scores(&r->p, &r->x, kv, &row, 1, 1, scores.data, workspace);
    CHECK(written == seen.end - seen.first, "scores of row %u: %u", row, written);
    for (int64_t j = state.first; j < state.end; j++) {
      if (slope > 0 ? !counts_most(squares.data, near, slope, j) : most.data[j] == 0) continue;
      double left = slope > 0 ? exp(-slope * (double)(i % 32 + near.end - j)) : 1;
      double off = pow(scores.data[j - seen.first], 3) * weights.data[j] * left;
      high = fmax(high, off), low = fmin(low, off);
      if (row == aligned[0]) high_found = fmax(high_found, off);
      if (row == opposed[0]) low_found = fmin(low_found, off);
    }
  }
  CHECK(fabs(high - high_found) <= 1e-4 * high, "aligned %u: %g, not %g", aligned[0], high_found, high);
  CHECK(fabs(low - low_found) <= -1e-4 * low, "opposed %u: %g, not %g", opposed[0], low_found, low);
  guarded *used[] = {&scores, &squares, &norms, &weights, &most};
  for (int n = 0; n < 5; n++) {
    CHECK(guarded_intact(used[n]), "canary");
    guarded_free(used[n]);
  }
  free(order);
}

// Of gradients, and of an output whose mean values are known.
static void extremes_are_extreme(const shape *s, run *r, uint32_t kv, void *workspace) {
  guarded means = guarded_new((size_t)s->batch * s->kv_heads * ra_means(&r->p), 1, 1);
  const float *dout = r->x.dout;
  float *there = r->x.means;
  ra_bounds b;
  rows_are_extreme(s, r, kv, 0, workspace);
  r->x.dout = NULL;
  if (!there) r->x.means = means.data;
  CHECK(ra_sample_prepare(&r->p, &r->x, kv, 0, &b, workspace) == RA_OK, "prepare");
  rows_are_extreme(s, r, kv, 1, workspace);
  r->x.dout = dout, r->x.means = there;
  CHECK(ra_sample_prepare(&r->p, &r->x, kv, 0, &b, workspace) == RA_OK, "prepare"); // as it was
  guarded_free(&means);
}

// What scores through the state add up to for the query where that is largest, outliers apart.
static void spread_is(const shape *s, const run *r, uint32_t kv, const ra_spread *got, void *workspace) {
  ra_spread expected = {0, 0, 0, 0};
  guarded scores = guarded_new(s->Nk, 1, 1), norms = guarded_new(s->Nk, 1, 1);
  uint32_t *order = calloc(s->Nk, sizeof *order), group = s->heads / s->kv_heads;
  double *squares = calloc(s->Nk, sizeof *squares); // of keys
  CHECK(ra_sample_largest(&r->p, &r->x, kv, 0, s->Nk, order, norms.data, workspace) == RA_OK, "all keys");
  for (uint32_t n = 0; n < s->Nk; n++) squares[order[n]] = pow(norms.data[n], 2);
  for (uint32_t row = 0; row < group * s->Nq; row++) {
    ra_range state = ra_state_keys(&r->p, ra_chunk_start(&r->p, row % s->Nq));
    if (r->p.outlier_query_count > 0 && row % s->Nq * group + row / s->Nq == r->p.outlier_queries[kv]) continue;
    double count = 0, sum = 0, all = 0, keys = 0;
    const float *score = scores.data;
    ra_sample_scores(&r->p, &r->x, kv, &row, 1, 1, scores.data, workspace); // of ordinary keys
    for (uint32_t j = ra_keys_of(&r->p, row % s->Nq).first; j < state.end; j++) {
      if (r->p.outlier_key_count > 0 && j == r->p.outlier_keys[kv]) continue;
      double own = *score++;
      if (j >= state.first) count++, sum += own, all += own * own, keys += squares[j];
    }
    if (count == 0) continue;
    expected.gain = fmaxf(expected.gain, (float)exp(-sum / count));
    expected.scores = fmaxf(expected.scores, (float)(all / count * exp(-sum / count)));
    expected.keys = fmaxf(expected.keys, (float)(keys / count));
  }
  CHECK(fabs(got->scores - expected.scores) <= 1e-5 * expected.scores, "scores %g, not %g", got->scores,
        expected.scores);
  CHECK(fabs(got->keys - expected.keys) <= 1e-5 * expected.keys, "keys %g, not %g", got->keys, expected.keys);
  CHECK(fabs(got->gain - expected.gain) <= 1e-5 * expected.gain, "gain %g, not %g", got->gain, expected.gain);
  CHECK(guarded_intact(&scores) && guarded_intact(&norms), "canary");
  guarded_free(&scores), guarded_free(&norms), free(order), free(squares);
}

// The same with an outlier key and query and without; and where it is not known.
static void spread_is_right(const shape *s, const run *r, uint32_t kv, const ra_bounds *b, void *workspace) {
  const ra_problem *p = &r->p;
  int scored = s->relative || p->bias || p->alibi || p->decay_count > 0 || p->softcap > 0 || p->mask || p->allowed;
  int known = !scored && b->q_mean_norm == 0;
  size_t heads = (size_t)s->batch * s->kv_heads;
  uint32_t *keys = calloc(heads, sizeof *keys), *queries = calloc(heads, sizeof *queries);
  run beside = *r;
  beside.p.outlier_keys = keys, beside.p.outlier_queries = queries;
  beside.p.outlier_key_count = beside.p.outlier_query_count = 1;
  for (size_t n = 0; n < heads; n++) keys[n] = b->k_argmax, queries[n] = s->Nq / 2 * (s->heads / s->kv_heads);
  const run *runs[] = {&beside, r};
  for (int n = known ? 0 : 1; n < 2; n++) { // the last leaves what was there
    ra_bounds bounds = *b;
    ra_spread got;
    if (known) CHECK(ra_sample_prepare(&runs[n]->p, &r->x, kv, 1, &bounds, workspace) == RA_OK, "prepare");
    int status = ra_sample_spread(&runs[n]->p, &r->x, kv, INFINITY, &got, workspace);
    CHECK(status == (known ? RA_OK : RA_ERROR_PROBLEM), "spread: %d", status);
    if (!known) continue;
    spread_is(s, runs[n], kv, &got, workspace);
    ra_spread left, same; // above a limit, and at it
    CHECK(ra_sample_spread(&runs[n]->p, &r->x, kv, got.scores / 2, &left, workspace) == RA_OK, "limited");
    CHECK(left.scores > got.scores / 2 || got.scores == 0, "left at %g of %g", left.scores, got.scores);
    CHECK(left.rows <= got.rows, "more rows than all: %u", left.rows);
    CHECK(ra_sample_spread(&runs[n]->p, &r->x, kv, got.scores, &same, workspace) == RA_OK, "at its limit");
    CHECK(memcmp(&got, &same, sizeof got) == 0, "spread within its limit");
  }
  free(keys), free(queries);
}

// Rows of out that see a key are means of values, and what one of them is beyond these is found, on either side and in any column.
static void outputs_are_within(const shape *s, const run *r, uint32_t kv) {
  size_t head = kv * (s->heads / s->kv_heads) + 1u * (s->heads > s->kv_heads), last = s->Nq - 1;
  size_t columns[] = {0, s->Dv / 2, s->Dv - 1};
  float *lse = r->lse.data + head * s->Nq + last, lse_kept = *lse;
  CHECK(ra_sample_outside(&r->p, &r->x, kv) <= 1e-6f, "outside by %g", ra_sample_outside(&r->p, &r->x, kv));
  for (int n = 0; n < 6; n++) {
    size_t column = columns[n / 2];
    float *own = r->out.data + place(s, head, s->heads, s->Nq, last, s->Dv) + column, kept = *own,
          sign = n % 2 ? -1 : 1;
    float high = -INFINITY; // of values times the sign
    for (uint32_t j = 0; j < s->Nk; j++)
      high = fmaxf(high, sign * r->v.data[place(s, kv, s->kv_heads, s->Nk, j, s->Dv) + column]);
    *own = sign * (high + 0.5f), *lse = 0;
    CHECK(fabsf(ra_sample_outside(&r->p, &r->x, kv) - 0.5f) < 1e-6f, "column %zu, sign %g", column, sign);
    *lse = -INFINITY;
    CHECK(ra_sample_outside(&r->p, &r->x, kv) <= 1e-6f, "a row that sees nothing");
    *own = kept, *lse = lse_kept;
  }
}

// `shift` is added to queries.
static void samples_match_the_oracle(const shape *s, float shift) {
  uint32_t engines = s->relative || s->bias_heads || (s->alibi && !s->causal) ? 1 : 2; // oracle; polynomial
  run oracle = start(s, RA_NAIVE, 0), polynomial = start(s, engines == 2 ? RA_POLYNOMIAL : RA_NAIVE, 2);
  guarded means[2];
  if (shift != 0) shift_queries(&oracle, means, shift), shift_queries(&polynomial, means + 1, shift);
  compute(&oracle, 1), compute(&polynomial, 1);
  size_t bytes = ra_sample_workspace(&oracle.p), group = s->heads / s->kv_heads;
  for (uint32_t kv = 0; kv < s->batch * s->kv_heads; kv++) {
    void *workspace = new_workspace(bytes);
    ra_bounds b;
    // from one to four groups of eight keys, not always full
    uint32_t rows[8], keys[RA_SAMPLE_KEYS], count = 0, key_count = 0, most = 8 * (1 + (s->Nq + kv) % 4) - s->Dv % 3;
    for (uint32_t n = 0; n < 8 && n < group * s->Nq; n++)
      rows[count++] = (uint32_t)((group * s->Nq - 1) * n / 8 + n % 2);
    for (uint32_t n = 0; n < most && n < s->Nk; n++) keys[key_count++] = s->Nk <= most ? n : n * (s->Nk / most);
    CHECK(ra_sample_prepare(&oracle.p, &oracle.x, kv, 0, &b, workspace) == RA_OK && b.finite, "prepare");

    double q_norm = 0, half = 0;
    for (size_t n = 0; n < group * s->Nq; n++) {
      double squares = 0;
      for (uint32_t d = 0; d < s->D; d++)
        squares += pow(oracle.q.data[place(s, kv * group + n / s->Nq, s->heads, s->Nq, n % s->Nq, s->D) + d], 2);
      q_norm = fmax(q_norm, sqrt(squares));
    }
    for (uint32_t d = 0; d < s->Dv; d++) {
      double low = INFINITY, high = -INFINITY;
      for (uint32_t j = 0; j < s->Nk; j++) {
        double value = oracle.v.data[place(s, kv, s->kv_heads, s->Nk, j, s->Dv) + d];
        low = fmin(low, value), high = fmax(high, value);
      }
      half = fmax(half, (high - low) / 2);
    }
    CHECK(fabs(b.q_norm / q_norm - 1) < 1e-6 && fabs(b.v_half_range - half) < 1e-6, "bounds");
    outputs_are_within(s, &oracle, kv);

    uint32_t large[RA_EXTREMES], aligned[RA_EXTREMES], opposed[RA_EXTREMES], far_keys[RA_EXTREMES];
    CHECK(ra_sample_extremes(&oracle.p, &oracle.x, kv, large, aligned, opposed, far_keys, workspace) == RA_OK,
          "extremes");
    CHECK(b.q_mean_norm == 0 || shift != 0, "mean of %g", b.q_mean_norm);
    centred_heads += b.q_mean_norm > 0;
    if (shift == 0) largest_are_largest(s, &oracle, kv, &b, workspace);
    prepared_again_is_prepared(&oracle, kv, &b, workspace);
    CHECK(large[0] == b.q_argmax && far_keys[0] == b.k_argmax, "largest %u %u", large[0], b.q_argmax);
    extremes_are_extreme(s, &oracle, kv, workspace);
    spread_is_right(s, &oracle, kv, &b, workspace);

    for (uint32_t polynomials = 0; polynomials < engines; polynomials++) {
      const run *want = polynomials ? &polynomial : &oracle;
      guarded out = guarded_new((size_t)count * s->Dv, 1, 1), lse = guarded_new(count, 1, 1);
      guarded dq = guarded_new((size_t)count * s->D, 1, 1);
      const float *c = polynomials ? coefficients : NULL;
      ra_distance distance;
      CHECK(ra_sample_rows(&want->p, &want->x, kv, rows, count, c, 2, 0, out.data, lse.data, dq.data, &distance,
                           workspace) == RA_OK,
            "rows");
      double top = 0;
      for (size_t n = 0; n < want->dq.count; n++) top = fmax(top, fabs((double)want->dq.data[n]));
      for (uint32_t n = 0; n < count; n++) {
        size_t row = kv * group * s->Nq + rows[n], head = row / s->Nq, i = row % s->Nq;
        const float *want_out = want->out.data + place(s, head, s->heads, s->Nq, i, s->Dv);
        const float *want_dq = want->dq.data + place(s, head, s->heads, s->Nq, i, s->D);
        CHECK(check_error(out.data + n * s->Dv, want_out, s->Dv) < 2e-5, "out of row %u", rows[n]);
        CHECK(check_error(lse.data + n, want->lse.data + row, 1) < 4e-6 || fabsf(want->lse.data[row]) < 0.1f, "lse");
        for (uint32_t d = 0; d < s->D; d++)
          CHECK(fabs(dq.data[n * s->D + d] - want_dq[d]) <= 4e-6 * top + 1e-7, "dq of row %u", rows[n]);
      }
      distance_is_largest(s, want, kv, rows, count, &out, &lse, &distance);
      float *there = want->lse.data + kv * group * s->Nq + rows[count - 1], kept = *there;
      *there = NAN;
      uint32_t twice[16]; // more than go together
      guarded more = guarded_new(2 * (size_t)count * s->Dv, 1, 1), more_lse = guarded_new(2 * count, 1, 1);
      for (uint32_t n = 0; n < 2 * count; n++) twice[n] = rows[n % count];
      CHECK(ra_sample_rows(&want->p, &want->x, kv, twice, 2 * count, c, 2, 0, more.data, more_lse.data, NULL, &distance,
                           workspace) == RA_OK,
            "rows again");
      for (size_t n = 0, once = count * (size_t)s->Dv; n < 2 * once; n++) {
        float value = more.data[n], before = out.data[n < once ? n : n - once];
        CHECK(fabsf(value - before) < 1e-5f * (1 + fabsf(value)), "out again");
      }
      CHECK(guarded_intact(&more) && guarded_intact(&more_lse), "canary");
      guarded_free(&more), guarded_free(&more_lse);
      CHECK(distance.lse == INFINITY && distance.out < 1, "NaN is infinitely far");
      *there = kept;
      CHECK(guarded_intact(&out) && guarded_intact(&lse) && guarded_intact(&dq), "canary");
      guarded_free(&out), guarded_free(&lse), guarded_free(&dq);
    }

    for (uint32_t polynomials = 0; polynomials < engines; polynomials++) {
      const run *want = polynomials ? &polynomial : &oracle;
      const float *c = polynomials ? coefficients : NULL;
      guarded dk = guarded_new((size_t)key_count * s->D, 1, 1), dv = guarded_new((size_t)key_count * s->Dv, 1, 1);
      CHECK(ra_sample_columns(&want->p, &want->x, kv, keys, key_count, c, 2, 0, dk.data, dv.data, workspace) == RA_OK,
            "columns");
      // dk: a difference of terms of that size, as in compare()
      double top_k = 0.2 * fabs((double)s->scale) * s->bound, top_v = 1e-3, mean_share = 0;
      for (size_t n = 0; n < want->dk.count; n++) top_k = fmax(top_k, fabs((double)want->dk.data[n]));
      for (size_t n = 0; n < want->dv.count; n++) top_v = fmax(top_v, fabs((double)want->dv.data[n]));
      for (uint32_t n = 0; n < key_count; n++) {
        const float *want_k = want->dk.data + place(s, kv, s->kv_heads, s->Nk, keys[n], s->D);
        const float *want_v = want->dv.data + place(s, kv, s->kv_heads, s->Nk, keys[n], s->Dv);
        double worst_k = 0, worst_v = 0;
        for (uint32_t d = 0; d < s->D; d++) worst_k = fmax(worst_k, fabs(dk.data[n * s->D + d] - want_k[d]));
        for (uint32_t d = 0; d < s->Dv; d++) worst_v = fmax(worst_v, fabs(dv.data[n * s->Dv + d] - want_v[d]));
        // a polynomial's columns lack what the mean key adds, a vector of the same length for all keys
        if (n == 0) mean_share = polynomials ? length(dk.data, want_k, s->D) : 0;
        if (polynomials) worst_k = fabs(length(dk.data + n * s->D, want_k, s->D) - mean_share);
        CHECK(worst_k < 1e-5 * top_k && worst_v < 6e-6 * top_v, "Nq %u Nk %u D %u column %u: %g %g", s->Nq, s->Nk, s->D,
              keys[n], worst_k / top_k, worst_v / top_v);
      }
      CHECK(guarded_intact(&dk) && guarded_intact(&dv), "canary");
      guarded_free(&dk), guarded_free(&dv);
    }
    if (engines == 2) both_ways_are_each(&polynomial, kv, rows, count, keys, key_count, workspace);
    changes_undo_errors(s, &oracle, kv, rows, count, keys, key_count, workspace);
    free(workspace);
  }
  if (shift != 0) finish_shifted(&oracle, means), finish_shifted(&polynomial, means + 1);
  else {
    if (engines == 2) found_means_serve(s, &polynomial);
    finish(&oracle), finish(&polynomial);
  }
}

// scale q W_{i-j} k for a relative map.
static double mapped_score(const ra_problem *p, uint32_t i, uint32_t j, const float *q, const float *k) {
  size_t t = (size_t)i + p->key_length - 1 - j, half = p->rotary_dim / 2;
  double sum = 0, factor = (double)p->rotary_factor * p->rotary_factor;
  for (size_t n = 0; n < p->support_count; n++)
    sum += (double)q[p->support[2 * n]] * p->weights[n * ra_diagonals(p) + t] * k[p->support[2 * n + 1]];
  for (size_t n = 0; n < half; n++) {
    size_t first = p->interleaved ? 2 * n : n, second = p->interleaved ? 2 * n + 1 : half + n;
    double angle = p->relative_positions[t] * p->frequencies[n];
    sum += factor * cos(angle) * ((double)q[first] * k[first] + (double)q[second] * k[second]);
    sum += factor * sin(angle) * ((double)q[first] * k[second] - (double)q[second] * k[first]);
  }
  for (size_t d = 2 * half; p->relative_positions && d < p->head_dim; d++) sum += (double)q[d] * k[d];
  return p->scale * sum;
}

// Pairs of one key/value head, as sums in double precision: s, its weight and the derivative of that, bias included.
typedef struct pair {
  double weight, slope;
} pair;

static pair weigh_pair(const shape *s, const run *r, size_t head, uint32_t i, uint32_t j, double reference) {
  const ra_problem *p = &r->p;
  ra_range seen = ra_keys_of(p, i), state = ra_state_keys(p, ra_chunk_start(p, i));
  if (j < seen.first || j >= seen.end) return (pair){0, 0};
  const float *q = r->q.data + place(s, head, s->heads, s->Nq, i, s->D);
  const float *k = r->k.data + place(s, head * s->kv_heads / s->heads, s->kv_heads, s->Nk, j, s->D);
  size_t own = s->bias_heads > 1 ? head % s->heads * ra_diagonals(p) : 0;
  double x = mapped_score(p, i, j, q, k), bias = p->bias ? p->bias[own + i + s->Nk - 1 - j] : 0;
  double factor = exp(bias - reference);
  if (j >= state.first && j < state.end) return (pair){factor * (1 + x + x * x / 2), factor * (1 + x)};
  return (pair){factor * exp(x), factor * exp(x)};
}

static void is_near(const char *name, const float *got, const double *want, uint32_t count, double top) {
  for (uint32_t n = 0; n < count; n++)
    CHECK(fabs(got[n] - want[n]) < 1e-5 * top, "%s: %g, not %g", name, got[n], want[n]); // measured at most 3e-6
}

// Sampled rows and columns of p(s) = 1 + s + s^2/2 with a relative map, which no engine need have.
static void sampled_maps_are_sums(const shape *s) {
  run r = start(s, RA_NAIVE, 0);
  const ra_problem *p = &r.p;
  uint32_t group = s->heads / s->kv_heads, D = s->D, Dv = s->Dv;
  static const float c[] = {1, 1, 0.5f};
  float got_out[8 * 16], got_lse[8], got_dq[8 * 16], got_dv[8 * 16], unit[16];
  CHECK(D <= 16 && Dv <= 16, "sizes");
  for (uint32_t kv = 0; kv < s->batch * s->kv_heads; kv++) {
    void *workspace = new_workspace(ra_sample_workspace(p));
    ra_bounds b;
    CHECK(ra_sample_prepare(p, &r.x, kv, 0, &b, workspace) == RA_OK, "prepare");
    for (uint32_t row = 0; row < group * s->Nq; row++) {
      size_t head = kv * group + row / s->Nq, i = row % s->Nq;
      double sum = 0, out[16] = {0}, delta = 0, dq[16] = {0}, lse;
      const float *dout = r.dout.data + place(s, head, s->heads, s->Nq, i, Dv);
      CHECK(ra_sample_rows(p, &r.x, kv, &row, 1, c, 2, 0, got_out, got_lse, got_dq, NULL, workspace) == RA_OK, "rows");
      for (uint32_t j = 0; j < s->Nk; j++) {
        double weight = weigh_pair(s, &r, head, (uint32_t)i, j, 0).weight;
        sum += weight;
        for (uint32_t d = 0; d < Dv; d++) out[d] += weight * r.v.data[place(s, kv, s->kv_heads, s->Nk, j, Dv) + d];
      }
      for (uint32_t d = 0; d < Dv; d++) out[d] = sum > 0 ? out[d] / sum : 0, delta += out[d] * dout[d];
      lse = sum > 0 ? log(sum) : 0;
      for (uint32_t j = 0; j < s->Nk; j++) {
        double slope = weigh_pair(s, &r, head, (uint32_t)i, j, lse).slope, dp = 0;
        for (uint32_t d = 0; d < Dv; d++) dp += (double)dout[d] * r.v.data[place(s, kv, s->kv_heads, s->Nk, j, Dv) + d];
        for (uint32_t d = 0; d < D && slope != 0; d++) {
          for (uint32_t n = 0; n < D; n++) unit[n] = n == d;
          const float *k = r.k.data + place(s, kv, s->kv_heads, s->Nk, j, D);
          dq[d] += slope * (dp - delta) * mapped_score(p, (uint32_t)i, j, unit, k);
        }
      }
      is_near("sampled out", got_out, out, Dv, 1), is_near("sampled dq", got_dq, dq, D, 0.3);
      if (sum > 0) is_near("sampled lse", got_lse, &lse, 1, 1);
      else CHECK(got_lse[0] == -INFINITY, "sampled lse of nothing");
      memcpy(r.out.data + place(s, head, s->heads, s->Nq, i, Dv), got_out, Dv * sizeof(float));
      r.lse.data[head * s->Nq + i] = got_lse[0];
    }
    for (uint32_t j = 0; j < s->Nk; j += 1 + s->Nk / 20) {
      double dk[16] = {0}, dv[16] = {0};
      CHECK(ra_sample_columns(p, &r.x, kv, &j, 1, c, 2, 0, got_dq, got_dv, workspace) == RA_OK, "columns");
      for (uint32_t row = 0; row < group * s->Nq; row++) {
        size_t head = kv * group + row / s->Nq, i = row % s->Nq;
        double lse = r.lse.data[head * s->Nq + i], dp = 0;
        if (lse == -INFINITY) continue;
        pair w = weigh_pair(s, &r, head, (uint32_t)i, j, lse);
        const float *dout = r.dout.data + place(s, head, s->heads, s->Nq, i, Dv);
        const float *out = r.out.data + place(s, head, s->heads, s->Nq, i, Dv);
        const float *v = r.v.data + place(s, kv, s->kv_heads, s->Nk, j, Dv);
        for (uint32_t d = 0; d < Dv; d++) dv[d] += w.weight * dout[d], dp += (double)dout[d] * (v[d] - out[d]);
        for (uint32_t d = 0; d < D && w.slope != 0; d++) {
          for (uint32_t n = 0; n < D; n++) unit[n] = n == d;
          const float *q = r.q.data + place(s, head, s->heads, s->Nq, i, D);
          dk[d] += w.slope * dp * mapped_score(p, (uint32_t)i, j, q, unit);
        }
      }
      is_near("sampled dk", got_dq, dk, D, 1), is_near("sampled dv", got_dv, dv, Dv, 1);
    }
    free(workspace);
  }
  finish(&r);
}

// Sums by an lse and out that are wrong in one row, and what changes when these are put right: the sums by what is right.
static void lag_changes_undo_errors(const shape *s, run *r, uint32_t kv, const uint32_t *entries, uint32_t count,
                                    double top, void *workspace) {
  static const float none[9];
  uint32_t group = s->heads / s->kv_heads, row = group * s->Nq - 1, i = s->Nq - 1, head = kv * group + group - 1;
  float *lse = r->lse.data + (size_t)head * s->Nq + i, *out = r->out.data + place(s, head, s->heads, s->Nq, i, s->Dv);
  float right = *lse, *own = malloc(s->Dv * sizeof *own), *sums = malloc(9 * count * sizeof *sums);
  float *wrong = sums + 4 * count, *changes = sums + 8 * count;
  if (right > -INFINITY) {
    CHECK(ra_sample_lags(&r->p, &r->x, head, entries, count, none, sums, workspace) == RA_OK, "right lags");
    memcpy(own, out, s->Dv * sizeof *own);
    *lse += 0.25f;
    for (uint32_t d = 0; d < s->Dv; d++) out[d] = 0.5f * out[d] + 0.1f;
    CHECK(ra_sample_lags(&r->p, &r->x, head, entries, count, none, wrong, workspace) == RA_OK, "wrong lags");
    CHECK(ra_sample_lag_changes(&r->p, &r->x, kv, row, right, own, entries, count, changes, workspace) == RA_OK,
          "changes");
    *lse = right, memcpy(out, own, s->Dv * sizeof *own);
    double differ = 0;
    for (uint32_t n = 0; n < count; n++) {
      double error = fabs((double)wrong[4 * n] + (double)changes[n] - (double)sums[4 * n]);
      CHECK(error < 4e-6 * top, "lag changes Nq %u Nk %u: %g", s->Nq, s->Nk, error / top); // measured at most 3e-7
      differ = fmax(differ, fabs((double)changes[n]));
    }
    CHECK(differ > 0 || count < s->Nq + s->Nk - 1, "something changes"); // the last row sees one of all distances
  }
  const ra_problem *p = &r->p;
  const ra_arrays *x = &r->x;
  uint32_t past = s->Nq + s->Nk - 1;
  CHECK(ra_sample_lag_changes(p, x, kv, row + 1, 0, own, entries, count, changes, workspace) == RA_ERROR_PROBLEM,
        "row");
  CHECK(ra_sample_lag_changes(p, x, s->batch * s->kv_heads, row, 0, own, entries, count, changes, workspace) ==
            RA_ERROR_PROBLEM,
        "head");
  CHECK(ra_sample_lag_changes(p, x, kv, row, 0, own, &past, 1, changes, workspace) == RA_ERROR_PROBLEM, "entry");
  CHECK(ra_sample_lag_changes(p, x, kv, row, 0, own, entries, 0, changes, workspace) == RA_ERROR_PROBLEM, "none");
  free(own), free(sums);
}

// Gradients of a bias at some distances, summed over heads and batches, against all of them.
static void lags_match_the_oracle(const shape *s) {
  run oracle = start(s, RA_NAIVE, 0), r = start(s, RA_EXACT, 0);
  compute(&oracle, 1), compute(&r, 1000);
  size_t length = (size_t)s->Nq + s->Nk - 1;
  uint32_t entries[RA_SAMPLE_LAGS], count = length < 50 ? (uint32_t)length : 50;
  for (uint32_t n = 0; n < count; n++) entries[n] = (uint32_t)(n * length / count);
  static const float taylor[] = {1, 0, 0, 1, 1, 0, 1, 1, 0.5f};
  double *sums = calloc(4 * s->bias_heads * count, sizeof *sums), top = 0.2; // of dS
  float *own = malloc(4 * count * sizeof *own);
  void *workspace = new_workspace(ra_sample_workspace(&r.p));
  for (uint32_t head = 0; head < s->batch * s->heads; head++) {
    ra_bounds bounds;
    CHECK(ra_sample_prepare(&r.p, &r.x, head / (s->heads / s->kv_heads), 0, &bounds, workspace) == RA_OK, "prepare");
    CHECK(ra_sample_lags(&r.p, &r.x, head, entries, count, taylor, own, workspace) == RA_OK, "lags");
    double *to = sums + (s->bias_heads > 1 ? head % s->heads * 4 * count : 0);
    for (uint32_t n = 0; n < 4 * count; n++) to[n] += own[n];
  }
  for (size_t n = 0; n < oracle.dbias.count; n++) top = fmax(top, fabs((double)oracle.dbias.data[n]));
  lag_changes_undo_errors(s, &r, s->batch * s->kv_heads - 1, entries, count, top,
                          workspace); // of the head that is prepared
  double worst[4] = {0};
  for (size_t h = 0; h < s->bias_heads; h++)
    for (uint32_t n = 0; n < count; n++)
      for (int g = 0; g < 4; g++) {
        double error = fabs(sums[4 * (h * count + n) + (size_t)g] - (double)oracle.dbias.data[h * length + entries[n]]);
        worst[g] = fmax(worst[g], error / top);
      }
  CHECK(worst[0] < 4e-6, "lags Nq %u Nk %u: %g", s->Nq, s->Nk, worst[0]); // as the engine; measured at most 7e-7
  CHECK(worst[3] <= worst[1], "degrees: %g %g %g", worst[1], worst[2], worst[3]);
  uint32_t past = (uint32_t)length;
  CHECK(ra_sample_lags(&r.p, &r.x, 0, &past, 1, taylor, own, workspace) == RA_ERROR_PROBLEM, "past the end");
  CHECK(ra_sample_lags(&r.p, &r.x, 0, entries, 0, taylor, own, workspace) == RA_ERROR_PROBLEM, "none");
  free(sums), free(own), free(workspace);
  finish(&oracle), finish(&r);
}

static void bad_problems_are_refused(void) {
  ra_problem good = problem(&SHAPES[4], RA_EXACT, 0), p;
  CHECK(ra_workspace(&good, RA_FORWARD) > 0 && ra_units(&good, RA_BACKWARD) > 0, "the good one");
#define REFUSED(change)                                                                                                \
  p = good;                                                                                                            \
  p.change;                                                                                                            \
  CHECK(ra_workspace(&p, RA_FORWARD) == 0 && ra_units(&p, RA_FORWARD) == 0, #change);                                  \
  CHECK(ra_run(&p, &(ra_arrays){0}, RA_FORWARD, NULL, 0, 0) == RA_ERROR_PROBLEM, #change)
  REFUSED(batch = 0);
  REFUSED(heads = 3);
  REFUSED(kv_heads = 0);
  REFUSED(query_length = 0);
  REFUSED(key_length = 0);
  REFUSED(head_dim = 0);
  REFUSED(head_dim = 1025);
  REFUSED(value_dim = 0);
  REFUSED(rotary_dim = 3);
  REFUSED(rotary_dim = 10);
  REFUSED(frequencies = NULL);
  REFUSED(causal = 2);
  REFUSED(scale = NAN);
  static const uint32_t twice[] = {1, 1, 2, 3, 0, 1, 2, 3}, far[] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 99};
  REFUSED(outlier_key_count = 1);
  REFUSED(outlier_keys = twice; p.outlier_key_count = 2);
  REFUSED(outlier_queries = far; p.outlier_query_count = 4);
  REFUSED(method = 4);
  REFUSED(query_offset = INT32_MAX);
  REFUSED(batch = 1u << 30);

  static const shape relative = {2, 4, 2, 5, 6, 8, 8, 8, 0, 1, 0, 0.35f, 1, .relative = 1};
  shape weighted = relative;
  weighted.relative = 3;
  good = problem(&relative, RA_NAIVE, 0);
  CHECK(ra_workspace(&good, RA_FORWARD) > 0, "relative positions");
  CHECK(ra_rotate_workspace(&good) == 0 && ra_rotate(&good, NULL, 0, NULL) == RA_ERROR_PROBLEM, "rotate");
  REFUSED(method = RA_POLYNOMIAL);
  REFUSED(query_positions = query_positions);
  REFUSED(key_positions = key_positions);
  REFUSED(cos_table = p.sin_table = cos_table; p.table_rows = 1);
  REFUSED(support_count = 1);
  good = problem(&weighted, RA_NAIVE, 0);
  CHECK(ra_workspace(&good, RA_FORWARD) > 0, "weights");
  REFUSED(method = RA_POLYNOMIAL);
  REFUSED(support = NULL);
  REFUSED(weights = NULL);
  REFUSED(rotary_dim = 8);
  REFUSED(head_dim = 6);
  REFUSED(support_count = RA_MAX_SUPPORT + 1);
  good.method = RA_TOEPLITZ, good.coefficients = sinks;
  CHECK(ra_units(&good, RA_FORWARD) > 0, "weights by transforms");
  REFUSED(support_count = RA_MAX_HEAD_DIM + 1);
  good = problem(&SHAPES[4], RA_EXACT, 0);
  CHECK(ra_run(&good, &(ra_arrays){0}, RA_FORWARD, NULL, 0, 1000) == RA_ERROR_UNITS, "units");
  CHECK(ra_workspace(&good, 2) == 0, "pass");
  float falling[] = {0, 1, -1, 0}, zeros[16] = {0};
  REFUSED(alibi = falling);
  good.method = RA_POLYNOMIAL, good.alibi = zeros, good.coefficients = zeros, good.outlier_keys = segments;
  CHECK(ra_units(&good, RA_FORWARD) > 0, "alibi");
  REFUSED(causal = 0);
  REFUSED(outlier_key_count = 1);

  good = problem(&DECAY_SHAPES[0], RA_POLYNOMIAL, 2), good.outlier_keys = segments;
  CHECK(ra_units(&good, RA_BACKWARD) > 0, "decays");
  REFUSED(causal = 0);
  REFUSED(segments = segments; p.segment_count = 2);
  REFUSED(alibi = zeros);
  REFUSED(softcap = 1);
  REFUSED(outlier_key_count = 1);
  REFUSED(bias = NULL);
  REFUSED(decay_count = 0);
  REFUSED(decay_count = RA_MAX_DECAYS + 1);
  REFUSED(decay_from = 0);
  REFUSED(decay_from = RA_MAX_NEAR + 1);
  REFUSED(decay_rates = NULL);
  REFUSED(lag_coefficients = NULL);
  REFUSED(lag_degree = 3);
  static const double negative[] = {-1};
  static const float infinite[] = {INFINITY};
  REFUSED(decay_rates = negative);
  REFUSED(decay_weights = infinite);
  REFUSED(decay_tops = infinite);
  bias[good.key_length - 1 + 64 + 31] = -INFINITY; // the last distance that chunks do exactly
  CHECK(ra_workspace(&good, RA_FORWARD) == 0, "bias");

  good = problem(&SHAPES[4], RA_EXACT, 0);
  p = good, p.method = RA_POLYNOMIAL, p.degree = 8, p.head_dim = p.value_dim = 1024, p.rotary_dim = 0;
  CHECK(ra_workspace(&p, RA_FORWARD) == RA_SIZE_OVERFLOW, "overflow");
}

static void negative_sums_are_reported(void) {
  run r = start(&SHAPES[8], RA_POLYNOMIAL, 1);
  for (int n = 0; n < 64; n++) coefficients[n] = n % 2 ? 0.0f : -1.0f; // p = -1
  void *workspace = new_workspace(ra_workspace(&r.p, RA_FORWARD));
  CHECK(ra_run(&r.p, &r.x, RA_FORWARD, workspace, 0, ra_units(&r.p, RA_FORWARD)) == RA_NOT_POSITIVE, "p = -1");
  for (size_t n = 0; n < r.out.count; n++) CHECK(r.out.data[n] == 0, "row not zero");

  float out[9], lse, bad[] = {-1, 0};
  ra_bounds b;
  uint32_t row = 7;
  void *sample = new_workspace(ra_sample_workspace(&r.p));
  CHECK(ra_sample_prepare(&r.p, &r.x, 0, 0, &b, sample) == RA_OK, "prepare");
  CHECK(ra_sample_rows(&r.p, &r.x, 0, &row, 1, bad, 1, 0, out, &lse, NULL, NULL, sample) == RA_NOT_POSITIVE,
        "p = -1, sampled");
  free(sample);
  free(workspace), finish(&r);
}

int main(void) {
  for (size_t n = 0; n < sizeof SHAPES / sizeof *SHAPES; n++) {
    engines_match_the_oracle(&SHAPES[n]);
    polynomials_match_the_oracle(&SHAPES[n]);
    polynomial_converges(&SHAPES[n]);
    derivative_gives_dv(&SHAPES[n]);
    outliers_match_the_oracle(&SHAPES[n], 8);
    outliers_match_the_oracle(&SHAPES[n], 40);
    if (is_by_distance(&SHAPES[n])) toeplitz_converges(&SHAPES[n]);
    toeplitz_is_polynomial(&SHAPES[n]);
    states_match_the_oracle(&SHAPES[n]);
    samples_match_the_oracle(&SHAPES[n], 0);
    samples_match_the_oracle(&SHAPES[n], 0.7f);
    for (int outliers = 0; outliers < 2; outliers++) centred_queries_converge(&SHAPES[n], outliers);
    centred_gradient_is_the_derivative(&SHAPES[n]);
  }
  CHECK(centred_heads > 20, "%u heads whose queries were centred", centred_heads);
  for (size_t n = 0; n < sizeof RELATIVE_SHAPES / sizeof *RELATIVE_SHAPES; n++)
    relative_maps_agree(&RELATIVE_SHAPES[n]);
  for (size_t n = 0; n < sizeof EXACT_SHAPES / sizeof *EXACT_SHAPES; n++) {
    engines_match_the_oracle(&EXACT_SHAPES[n]);
    if (is_by_distance(&EXACT_SHAPES[n])) toeplitz_converges(&EXACT_SHAPES[n]);
    if (is_sampled(&EXACT_SHAPES[n])) samples_match_the_oracle(&EXACT_SHAPES[n], 0);
    if (is_sampled(&EXACT_SHAPES[n]) && EXACT_SHAPES[n].relative) sampled_maps_are_sums(&EXACT_SHAPES[n]);
  }
  for (size_t n = 0; n < sizeof DECAY_SHAPES / sizeof *DECAY_SHAPES; n++) {
    polynomials_match_the_oracle(&DECAY_SHAPES[n]);
    polynomial_converges(&DECAY_SHAPES[n]);
    derivative_gives_dv(&DECAY_SHAPES[n]);
    lags_match_the_oracle(&DECAY_SHAPES[n]);
  }
  for (size_t n = 0; n < sizeof TOEPLITZ_SHAPES / sizeof *TOEPLITZ_SHAPES; n++) toeplitz_converges(&TOEPLITZ_SHAPES[n]);
  bad_problems_are_refused();
  negative_sums_are_reported();
  return check_report();
}
