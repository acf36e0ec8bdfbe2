// SPDX-License-Identifier: MIT
//
// Exact attention: tiled online softmax, forward and backward. O(Nq Nk (D + Dv)) time, never an N x N matrix: the
// workspace is O(N (D + Dv)) for one head at a time: keys in panels forward, queries and dout in strips backward.
//
// This work is based on:
//   Milakov, Gimelshein. Online normalizer calculation for softmax. 2018 (1805.02867)
//   Dao et al. FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness. 2022 (2205.14135)
//
// Layout. Eight queries are the lanes of two vectors: maximum, sum and rescaling are vertical. Queries are packed to
// [D][8], keys to panels of PANEL, [D][PANEL], so that a score tile of PANEL keys x 8 queries reads both in order. Queries
// carry scale * log2 e: weights are 2^s.

#include <float.h>
#include <math.h>
#include <string.h>

#include "elementary.h"
#include "engines.h"
#include "pack.h"
#include "products.h"
#include "relative.h"
#include "rotary.h"
#include "softmax.h"
#include "tile.h"

enum {
  LANES = 8,            // queries of a strip
  PANEL = RA_TILE_ROWS, // keys of a panel: 4 or 6, which divide the numbers of keys below
  QUERY_BLOCK = 256,    // queries of a forward unit: their tiles stay in cache while the keys pass by
  KEY_TILE = 120,       // keys of a forward tile: keys, values and weights stay in L1, or nearly
  KEY_TILE_MASK = 240,  // with a mask, whose rows are far apart in memory: longer pieces of them
  KEY_BLOCK = 120,      // keys of a backward unit
  QUERY_CHUNK = 32,     // queries of a backward step
  ROWS = 96,            // rows that are rotated together: whole panels, and whole blocks of rotary.h
  PAD = 32,             // floats around a bias, for the queries and keys that fill up tiles
};

// A new reference is taken when some score exceeds the old one by this many powers of two (until then sums may grow by 2^8,
// which costs no precision), or when all the first scores are this far below it. The first one is 0.
#define LAZY 8.0f

// Scores with a bias that are farther from the reference are computed again from the one that they make it move to.
#define DISTANT 32.0f

_Static_assert(KEY_TILE_MASK *LANES <= KEY_BLOCK * QUERY_CHUNK, "a mask of either pass fits");

// Where no score is further from 0 than this many powers of two (the problem's score_bound says so), the reference
// stays at 0, or with slopes at what these take off the nearest key, and nothing asks for maxima: weights in 2^-24 ..
// 2^24 cost no precision, and with values that are neither huge nor tiny (the caller looks at that) sums stay far from
// the ends of float32. Bounded entries again: D = 64 and entries up to 1.4.
#define NARROW 24.0

typedef struct exact_state {
  ra_rotary q_rotary, k_rotary;
} exact_state;

typedef struct exact {
  const ra_problem *p;
  exact_state *state;
  uint32_t D, Dv, Dp, Dvp;             // Dp, Dvp: padded to 8
  int narrow;                          // scores are within NARROW, and plain or only capped
  int sloped;                          // within NARROW but for slopes
  int in_place;                        // dq_t is
  int near;                            // softcap bends scores by little: ra_tanh_near
  uint32_t panels, strips;             // groups of PANEL keys, of 8 queries (backward: of 32, times 4)
  uint32_t block_queries, block_keys;  // of a forward tile, of a backward step
  size_t q_row, k_row, v_row, out_row; // floats from token to token in the arrays; dq, dk, dv, dout alike
  float cap, inverse_cap;              // softcap in powers of two; 0: none
  char *q_space, *k_space;             // rotary tables
  ra_relative *relative;               // NULL: none
  char *relative_space;
  float *rows;    // [ROWS][Dp] rotated rows on their way
  float *k_panel; // [panels][D][PANEL] rotated keys; backward: of a block
  // forward
  float *q_strip;         // [32 strips][D][8]; backward: all strips of the head
  float *out_t;           // [32 strips][Dv][8] numerators
  float *reference, *sum; // [32 strips][8] in powers of two; denominators
  float *s;               // [KEY_TILE_MASK][8] scores, then weights
  // both, where scores are more than a product
  float *bias; // [PAD + Nq + Nk - 1 + PAD] of one head, times log2 e
  float *mask; // [keys of a tile or block][8 or 32 queries]
  float *zero; // [8] where scores start
  // backward
  float *k_rows, *v_panel;    // [KEY_BLOCK][Dp] rotated, [panels of a block][Dv][PANEL]
  float *q_rows, *dout_rows;  // [32][Dp], [32][Dvp] of a step
  float *dout_strip;          // [strips][Dv][8]
  float *lse2, *delta;        // [8 strips], lse in powers of two
  float *weight, *ds;         // [KEY_BLOCK][32]
  float *dq_t;                // [strips][Dp][8]; in the place of dq where strips are as long as its rows
  float *dk_block, *dv_block; // [KEY_BLOCK][Dp], [KEY_BLOCK][Dvp]
  float *slope;               // [KEY_BLOCK][32] derivative of softcap
  float *dbias;               // [PAD + Nq + Nk - 1 + PAD] of one head
} exact;

static exact arrange(const ra_problem *p, uint32_t pass, ra_workspace_cursor *w) {
  exact e = {.p = p, .D = p->head_dim, .Dv = p->value_dim};
  e.Dp = (e.D + 7) / 8 * 8;
  e.Dvp = (e.Dv + 7) / 8 * 8;
  e.panels = ra_ceil_div(p->key_length, PANEL);
  e.q_row = ra_row(p, p->heads, e.D);
  e.k_row = ra_row(p, p->kv_heads, e.D);
  e.v_row = ra_row(p, p->kv_heads, e.Dv);
  e.out_row = ra_row(p, p->heads, e.Dv);
  e.cap = (float)(p->softcap * RA_LOG2_E);
  e.inverse_cap = p->softcap > 0 ? 1 / e.cap : 0;
  e.near = p->softcap > 0 && p->score_bound > 0 && p->score_bound <= p->softcap * RA_TANH_NEAR;
  e.narrow = p->score_bound > 0 && p->score_bound * RA_LOG2_E <= NARROW && !p->bias && !p->alibi && !p->mask &&
             !p->allowed && !ra_is_relative(p) && (p->softcap == 0 || e.near);
  e.sloped = p->score_bound > 0 && p->score_bound * RA_LOG2_E <= NARROW && p->alibi && !p->bias && !p->mask &&
             !p->allowed && !ra_is_relative(p) && p->softcap == 0;
  e.block_queries = pass == RA_FORWARD ? QUERY_BLOCK : QUERY_CHUNK;
  e.block_keys = pass == RA_BACKWARD ? KEY_BLOCK : p->mask || p->allowed ? KEY_TILE_MASK : KEY_TILE;
  size_t diagonals = ra_diagonals(p) + 2 * PAD;
  e.state = ra_take(w, 1, 1, sizeof(exact_state));
  e.q_space = ra_take(w, 1, ra_rotary_bytes(p), 1);
  e.k_space = ra_take(w, 1, ra_rotary_bytes(p), 1);
  if (ra_is_relative(p)) {
    e.relative = ra_take(w, 1, 1, sizeof(ra_relative));
    e.relative_space = ra_take(w, 1, ra_relative_bytes(p, e.block_queries, e.block_keys), 1);
  }
  e.rows = ra_take_floats(w, ROWS, e.Dp);
  e.k_panel = ra_take_floats(w, pass == RA_BACKWARD ? KEY_BLOCK / PANEL : e.panels, (size_t)e.D * PANEL);
  if (pass == RA_FORWARD) {
    e.strips = QUERY_BLOCK / LANES;
    e.q_strip = ra_take_floats(w, e.strips, (size_t)e.D * LANES);
    e.out_t = ra_take_floats(w, e.strips, (size_t)e.Dv * LANES);
    e.reference = ra_take_floats(w, e.strips, LANES);
    e.sum = ra_take_floats(w, e.strips, LANES);
    e.s = ra_take_floats(w, KEY_TILE_MASK, LANES);
  } else {
    e.strips = ra_ceil_div(p->query_length, QUERY_CHUNK) * (QUERY_CHUNK / LANES);
    e.q_strip = ra_take_floats(w, e.strips, (size_t)e.D * LANES);
    e.q_rows = ra_take_floats(w, QUERY_CHUNK, e.Dp);
    e.dout_rows = ra_take_floats(w, QUERY_CHUNK, e.Dvp);
    e.dout_strip = ra_take_floats(w, e.strips, (size_t)e.Dv * LANES);
    e.lse2 = ra_take_floats(w, e.strips, LANES);
    e.delta = ra_take_floats(w, e.strips, LANES);
    e.in_place = e.D == e.Dp && e.D == e.q_row && p->query_length % QUERY_CHUNK == 0;
    e.dq_t = ra_take_floats(w, e.in_place ? 0 : e.strips, (size_t)e.Dp * LANES);
    e.k_rows = ra_take_floats(w, KEY_BLOCK, e.Dp);
    e.v_panel = ra_take_floats(w, KEY_BLOCK, e.Dv);
    e.weight = ra_take_floats(w, KEY_BLOCK, QUERY_CHUNK);
    e.ds = ra_take_floats(w, KEY_BLOCK, QUERY_CHUNK);
    e.dk_block = ra_take_floats(w, KEY_BLOCK, e.Dp);
    e.dv_block = ra_take_floats(w, KEY_BLOCK, e.Dvp);
    if (p->softcap > 0) e.slope = ra_take_floats(w, KEY_BLOCK, QUERY_CHUNK);
    if (p->bias || p->alibi) e.dbias = ra_take_floats(w, diagonals, 1);
  }
  if (p->softcap > 0) e.zero = ra_take_floats(w, 1, LANES);
  if (p->bias || p->alibi) e.bias = ra_take_floats(w, diagonals, 1);
  if (p->mask || p->allowed) e.mask = ra_take_floats(w, KEY_BLOCK, QUERY_CHUNK);
  return e;
}

static void layout(const ra_problem *p, uint32_t pass, ra_workspace_cursor *w) { arrange(p, pass, w); }

// x [count][columns] becomes panels [ceil(count / width)][columns][width], zeros where rows are missing.
RA_KERNEL void pack(const float *x, size_t x_row, uint32_t count, uint32_t columns, uint32_t width, float *y) {
  for (uint32_t n = 0; n < count; n += width, y += (size_t)columns * width) {
    uint32_t rows = ra_min_u32(width, count - n);
    if (rows < width) ra_fill(y, (size_t)columns * width, 0);
    ra_transpose(x + n * x_row, x_row, rows, columns, y, width);
  }
}

// Rotates `keys` keys of a head from `first` on into panels, and into plain rows where the pass has them.
RA_KERNEL void prepare_keys(const exact *e, const float *k, uint32_t first, uint32_t keys) {
  if (e->k_rows) ra_fill(e->k_rows, (size_t)KEY_BLOCK * e->Dp, 0);
  for (uint32_t j = 0; j < keys; j += ROWS) {
    uint32_t count = ra_min_u32(ROWS, keys - j);
    float *rows = e->k_rows ? e->k_rows + (size_t)j * e->Dp : e->rows;
    ra_rotary_rows(&e->state->k_rotary, k + (first + j) * e->k_row, e->k_row, rows, e->Dp, count, first + j, RA_ROTATE,
                   1.0f);
    pack(rows, e->Dp, count, e->D, PANEL, e->k_panel + (size_t)j * e->D);
  }
}

// --- Modified scores ------------------------------------------------------------------------------------------------
//
// s = softcap tanh(q.k / softcap) + bias + mask, all in powers of two; of a relative map (relative.h) q W k in place of q.k.

static void prepare_modifiers(const exact *e, uint32_t head) {
  const ra_problem *p = e->p;
  size_t length = ra_diagonals(p);
  if (e->zero) ra_fill(e->zero, LANES, 0);
  if (e->dbias) ra_fill(e->dbias, length + 2 * PAD, 0);
  if (!e->bias) return;
  const float *bias = p->bias ? p->bias + (p->bias_heads > 1 ? head % p->heads * length : 0) : NULL;
  ra_fill(e->bias, length + 2 * PAD, 0);
  for (size_t n = 0; n < length; n++) {
    double value = (bias ? bias[n] : 0) - (p->alibi ? ra_alibi(p, head, n) : 0);
    e->bias[PAD + n] = (float)(value * RA_LOG2_E);
  }
}

// Where e->bias and e->dbias have key j of query i.
static size_t diagonal(const exact *e, uint32_t i, uint32_t j) { return (size_t)PAD + i + e->p->key_length - 1 - j; }

// The key of these that is nearest to query i, which there is.
static uint32_t nearest_key(const exact *e, uint32_t i, ra_range keys) {
  int64_t position = (int64_t)i + e->p->query_offset;
  return position < keys.first ? keys.first : position < keys.end ? (uint32_t)position : keys.end - 1;
}

// What slopes add to the scores of query i at most, in powers of two, for the keys that it sees of these.
static float largest_slope(const exact *e, uint32_t i, uint32_t first, uint32_t end) {
  ra_range keys = ra_keys_of(e->p, i);
  keys.first = keys.first > first ? keys.first : first, keys.end = ra_min_u32(keys.end, end);
  return keys.first < keys.end ? e->bias[diagonal(e, i, nearest_key(e, i, keys))] : -INFINITY;
}

// With slopes, whether these keys are so far from the queries i .. last that all their weights are 0, `bounds` bounds
// of scores beside that of the nearest key that each of them sees. Between such queries, where only an end cuts the
// keys that they see, nothing is nearer.
static int is_out_of_sight(const exact *e, uint32_t i, uint32_t last, uint32_t first, uint32_t end, float bounds) {
  const ra_problem *p = e->p;
  if (!e->sloped || p->window_left >= 0 || p->window_right >= 0 || p->segments) return 0;
  last = ra_min_u32(last, p->query_length - 1);
  float most = fmaxf(largest_slope(e, i, first, end) - largest_slope(e, i, 0, p->key_length),
                     largest_slope(e, last, first, end) - largest_slope(e, last, 0, p->key_length));
  return most + bounds * p->score_bound * (float)RA_LOG2_E <= -127;
}

// mask[n][r] = 0 where allowed[r][n], else -infinity
static void load_bytes(const uint8_t *allowed, size_t row, uint32_t rows, uint32_t keys, float *mask, uint32_t lanes) {
  f32x4 none = f32x4_splat(-INFINITY);
  uint32_t whole_rows = rows / 4 * 4, whole_keys = keys / 4 * 4;
  for (uint32_t r = 0; r < whole_rows; r += 4) {
    RA_ROLLED
    for (uint32_t n = 0; n < whole_keys; n += 4) {
      f32x4 bytes = f32x4_load_bytes(allowed + r * row + n, row);
      float *at = mask + n * lanes + r;
      RA_UNROLLED
      for (int b = 0; b < 4; b++, at += lanes) f32x4_store(at, f32x4_where_no_byte(bytes, b, none));
    }
  }
  for (uint32_t r = 0; r < rows; r++) {
    RA_ROLLED
    for (uint32_t n = r < whole_rows ? whole_keys : 0; n < keys; n++)
      mask[n * lanes + r] = allowed[r * row + n] ? 0 : -INFINITY;
  }
}

// e->mask [keys][lanes] for queries i .. and keys key0 .. key0 + keys - 1; what lies past the arrays is forbidden elsewhere.
RA_KERNEL void load_mask(const exact *e, uint32_t head, uint32_t i, uint32_t lanes, uint32_t key0, uint32_t keys) {
  const ra_problem *p = e->p;
  size_t at = head / p->heads * p->mask_batch + head % p->heads * p->mask_head + i * p->mask_row + key0;
  uint32_t rows = ra_min_u32(lanes, p->query_length - i);
  keys = ra_min_u32(keys, p->key_length - key0);
  if (rows < lanes) ra_fill(e->mask, (size_t)keys * lanes, 0);
  if (p->mask) ra_transpose(p->mask + at, p->mask_row, rows, keys, e->mask, lanes);
  else load_bytes(p->allowed + at, p->mask_row, rows, keys, e->mask, lanes);
}

// What is added to the scores of key n of a tile for lanes c .. c + 3: bias and mask. Without softcap the product starts
// here; -infinity stays.
RA_INLINE f32x4 added(const float *bias, const float *mask, f32x4 start) {
  if (bias) start = f32x4_add(start, f32x4_load(bias));
  return mask ? f32x4_madd(f32x4_load(mask), f32x4_splat((float)RA_LOG2_E), start) : start;
}

// s[n][8] = start + added + q.k and its maximum, for the queries from i and keys from key0; rows of s and mask are `row` long.
RA_INLINE void added_tile(const exact *e, const float *k_panel, const float *q_strip, uint32_t panels, uint32_t i,
                          uint32_t key0, const float *mask, const uint32_t row, const float *start, float *s,
                          f32x4 max[2]) {
  f32x4 start0 = f32x4_sub(f32x4_splat(0), f32x4_load(start));
  f32x4 start1 = f32x4_sub(f32x4_splat(0), f32x4_load(start + 4));
  f32x4 max0 = f32x4_splat(-INFINITY), max1 = max0;
  const float *bias = e->bias ? e->bias + diagonal(e, i, key0) : NULL;
  RA_ROLLED
  for (uint32_t n = 0; n < panels; n++) {
    ra_tile t;
    RA_UNROLLED
    for (int r = 0; r < PANEL; r++) {
      const float *mask_r = mask ? mask + (uint32_t)r * row : NULL;
      t.c[r][0] = added(bias ? bias - r : NULL, mask_r, start0);
      t.c[r][1] = added(bias ? bias - r + 4 : NULL, mask ? mask_r + 4 : NULL, start1);
    }
    ra_tile_accumulate(&t, PANEL, e->D, k_panel, PANEL, 1, q_strip, LANES);
    ra_tile_store(&t, PANEL, s, row);
    RA_UNROLLED
    for (int r = 0; r < PANEL; r++) max0 = f32x4_max(max0, t.c[r][0]), max1 = f32x4_max(max1, t.c[r][1]);
    k_panel += (size_t)e->D * PANEL;
    s += PANEL * row;
    if (bias) bias -= PANEL;
    if (mask) mask += PANEL * row;
  }
  max[0] = max0, max[1] = max1;
}

RA_KERNEL void biased_tile(const exact *e, const float *k_panel, const float *q_strip, uint32_t panels, uint32_t i,
                           uint32_t key0, const float *mask, const float *start, float *s, f32x4 max[2]) {
  added_tile(e, k_panel, q_strip, panels, i, key0, mask, LANES, start, s, max);
}

RA_KERNEL void biased_block(const exact *e, const float *k_panel, const float *q_strip, uint32_t panels, uint32_t i,
                            uint32_t key0, const float *mask, const float *start, float *s) {
  f32x4 max[2];
  added_tile(e, k_panel, q_strip, panels, i, key0, mask, QUERY_CHUNK, start, s, max);
}

// How softcap is taken.
enum { UNCAPPED, CAPPED, CAPPED_NEAR };

// softcap, then bias and mask, less the reference; `slope` is set to the derivative of softcap, if there is one.
RA_INLINE f32x4 modified(const exact *e, f32x4 value, const int cap, const float *bias, const float *mask,
                         const float *reference, f32x4 *slope) {
  if (cap != UNCAPPED) {
    f32x4 x = f32x4_mul(value, f32x4_splat(e->inverse_cap));
    const ra_tanh_constants *constants = ra_tanh_load();
    f32x4 t = cap == CAPPED_NEAR ? f32x4_mul(x, ra_tanh_near(x, constants)) : ra_tanh(x, constants);
    *slope = f32x4_sub(f32x4_splat(1), f32x4_mul(t, t));
    value = f32x4_mul(f32x4_splat(e->cap), t);
  }
  return f32x4_sub(added(bias, mask, value), f32x4_load(reference));
}

// A forward tile of plain scores, queries from i, keys from key0: s and mask [keys][8], and the maxima.
RA_INLINE void modify_rows(const exact *e, const int cap, uint32_t i, uint32_t key0, uint32_t keys, const float *mask,
                           const float *reference, float *s, f32x4 max[2]) {
  f32x4 slope, max0 = f32x4_splat(-INFINITY), max1 = max0;
  for (uint32_t n = 0; n < keys; n++, s += LANES) {
    const float *bias = e->bias ? e->bias + diagonal(e, i, key0 + n) : NULL, *mask_n = mask ? mask + n * LANES : NULL;
    f32x4 s0 = modified(e, f32x4_load(s), cap, bias, mask_n, reference, &slope);
    f32x4 s1 =
        modified(e, f32x4_load(s + 4), cap, bias ? bias + 4 : NULL, mask_n ? mask_n + 4 : NULL, reference + 4, &slope);
    f32x4_store(s, s0), f32x4_store(s + 4, s1);
    max0 = f32x4_max(max0, s0), max1 = f32x4_max(max1, s1);
  }
  max[0] = max0, max[1] = max1;
}

RA_KERNEL void shift_tile(const exact *e, uint32_t i, uint32_t key0, uint32_t keys, const float *mask,
                          const float *reference, float *s, f32x4 max[2]) {
  modify_rows(e, UNCAPPED, i, key0, keys, mask, reference, s, max);
}

RA_KERNEL void cap_tile(const exact *e, uint32_t i, uint32_t key0, uint32_t keys, const float *mask,
                        const float *reference, float *s, f32x4 max[2]) {
  modify_rows(e, CAPPED, i, key0, keys, mask, reference, s, max);
}

RA_KERNEL void cap_near_tile(const exact *e, uint32_t i, uint32_t key0, uint32_t keys, const float *mask,
                             const float *reference, float *s, f32x4 max[2]) {
  modify_rows(e, CAPPED_NEAR, i, key0, keys, mask, reference, s, max);
}

// A backward block: s [keys][32], slope likewise.
RA_INLINE void modify_chunk(const exact *e, const int cap, uint32_t i, uint32_t key0, uint32_t keys,
                            const float *reference, float *s) {
  for (uint32_t n = 0; n < keys; n++)
    for (uint32_t c = 0; c < QUERY_CHUNK; c += 4) {
      const float *bias = e->bias ? e->bias + diagonal(e, i, key0 + n) + c : NULL;
      uint32_t at = n * QUERY_CHUNK + c;
      f32x4 slope, value = f32x4_load(s + at);
      f32x4_store(s + at, modified(e, value, cap, bias, e->mask ? e->mask + at : NULL, reference + c, &slope));
      if (cap != UNCAPPED) f32x4_store(e->slope + at, slope);
    }
}

RA_KERNEL void shift_block(const exact *e, uint32_t i, uint32_t key0, uint32_t keys, const float *reference, float *s) {
  modify_chunk(e, UNCAPPED, i, key0, keys, reference, s);
}

RA_KERNEL void cap_block(const exact *e, uint32_t i, uint32_t key0, uint32_t keys, const float *reference, float *s) {
  modify_chunk(e, CAPPED, i, key0, keys, reference, s);
}

RA_KERNEL void cap_near_block(const exact *e, uint32_t i, uint32_t key0, uint32_t keys, const float *reference,
                              float *s) {
  modify_chunk(e, CAPPED_NEAR, i, key0, keys, reference, s);
}

// The strips, queries from i on, whose products with keys from key0 on are the scores: of a relative map that is one
// matrix here the mapped ones. *pairwise: there are none, as every pair meets a matrix of its own.
static const float *factors(const exact *e, const float *q_strip, uint32_t strips, uint32_t i, uint32_t key0,
                            uint32_t keys, int *pairwise) {
  *pairwise = e->relative && !ra_relative_is_constant(e->relative, i, strips * LANES, key0, keys);
  if (!e->relative || *pairwise) return q_strip;
  ra_relative_map(e->relative, q_strip, strips, i, key0);
  return e->relative->mapped;
}

// dbias of the diagonals that ds [keys][32] crosses.
RA_KERNEL void add_diagonals(const exact *e, uint32_t i, uint32_t key0, uint32_t keys, const float *ds) {
  float sum[KEY_BLOCK + QUERY_CHUNK]; // diagonal(i, key0 + keys - 1) and on
  ra_fill(sum, KEY_BLOCK + QUERY_CHUNK, 0);
  for (uint32_t n = 0; n < keys; n++, ds += QUERY_CHUNK)
    for (uint32_t c = 0; c < QUERY_CHUNK; c += 4) {
      float *at = sum + (keys - 1 - n) + c;
      f32x4_store(at, f32x4_add(f32x4_load(at), f32x4_load(ds + c)));
    }
  float *dbias = e->dbias + diagonal(e, i, key0) - (keys - 1);
  for (uint32_t n = 0; n < keys + QUERY_CHUNK - 1; n++) dbias[n] += sum[n];
}

// --- Forward ------------------------------------------------------------------------------------------------------

// C[n][8 lanes] = sum_d panel(n, d) * strip[d][8] - start, rows of c `row` apart; and the maximum of each lane if `max`.
RA_INLINE void multiply_panels(const float *panel, const float *strip, uint32_t columns, uint32_t panels,
                               const float *start, const uint32_t row, float *c, f32x4 *max) {
  f32x4 start0 = f32x4_sub(f32x4_splat(0), f32x4_load(start));
  f32x4 start1 = f32x4_sub(f32x4_splat(0), f32x4_load(start + 4));
  f32x4 max0 = f32x4_splat(-INFINITY), max1 = max0;
  RA_ROLLED
  for (uint32_t n = 0; n < panels; n++) {
    ra_tile t;
    ra_tile_multiply(&t, PANEL, start0, start1, columns, panel, PANEL, 1, strip, LANES);
    ra_tile_store(&t, PANEL, c, row);
    RA_UNROLLED
    for (int r = 0; max && r < PANEL; r++) max0 = f32x4_max(max0, t.c[r][0]), max1 = f32x4_max(max1, t.c[r][1]);
    panel += (size_t)columns * PANEL;
    c += PANEL * row;
  }
  if (max) max[0] = max0, max[1] = max1;
}

// Pass 1 of a tile: s = q.k - reference, and the maximum of each query.
RA_KERNEL void score_tile(const float *k_panel, const float *q_strip, uint32_t D, uint32_t panels,
                          const float *reference, float *s, f32x4 max[2]) {
  multiply_panels(k_panel, q_strip, D, panels, reference, LANES, s, max);
}

// Of narrow scores: from reference 0.
RA_KERNEL void narrow_tile(const float *k_panel, const float *q_strip, uint32_t D, uint32_t panels,
                           const float *reference, float *s) {
  multiply_panels(k_panel, q_strip, D, panels, reference, LANES, s, NULL);
}

// A range of keys as numbers of a tile: n in [*first, *end) of 0 .. keys.
static void place_range(ra_range range, uint32_t key0, uint32_t keys, float *first, float *end) {
  *first = range.first <= key0 ? 0.0f : (float)ra_min_u32(range.first - key0, keys);
  *end = range.end <= key0 ? 0.0f : (float)ra_min_u32(range.end - key0, keys);
}

// Takes out the pairs that are not allowed: key key0 + n stays in lane i while it is in range[i]. `max` anew.
RA_KERNEL void mask_tile(float *s, uint32_t keys, const ra_range *range, uint32_t key0, f32x4 max[2]) {
  float first[LANES], end[LANES];
  f32x4 masked = f32x4_splat(RA_MASKED);
  for (int i = 0; i < LANES; i++) place_range(range[i], key0, keys, &first[i], &end[i]);
  f32x4 first0 = f32x4_load(first), first1 = f32x4_load(first + 4), end0 = f32x4_load(end), end1 = f32x4_load(end + 4);
  max[0] = max[1] = f32x4_splat(-INFINITY);
  for (uint32_t n = 0; n < keys; n++, s += LANES) {
    f32x4 key = f32x4_splat((float)n);
    f32x4 s0 = f32x4_where_less(key, first0, masked, f32x4_where_less(key, end0, f32x4_load(s), masked));
    f32x4 s1 = f32x4_where_less(key, first1, masked, f32x4_where_less(key, end1, f32x4_load(s + 4), masked));
    f32x4_store(s, s0), f32x4_store(s + 4, s1);
    max[0] = f32x4_max(max[0], s0), max[1] = f32x4_max(max[1], s1);
  }
}

// Moves the reference of a strip to the maxima of the tile (relative to it): scores, sums and numerators follow. A query
// that has seen no key yet takes its maximum whatever its sign, others only a larger one.
RA_KERNEL void move_reference(float *s, uint32_t keys, float *reference, float *sum, float *out_t, uint32_t Dv,
                              const f32x4 max[2]) {
  const ra_exp2_constants *constants = ra_exp2_load();
  f32x4 zero = f32x4_splat(0), tiny = f32x4_splat(FLT_MIN), nothing = f32x4_splat(RA_FORBIDDEN);
  f32x4 shift[2], factor[2];
  for (int h = 0; h < 2; h++) {
    f32x4 sum_h = f32x4_load(sum + 4 * h);
    f32x4 up = f32x4_max(max[h], zero);
    shift[h] = f32x4_where_less(sum_h, tiny, f32x4_where_less(max[h], nothing, zero, max[h]), up);
    factor[h] = f32x4_where_less(sum_h, tiny, f32x4_splat(1), ra_exp2(f32x4_sub(zero, shift[h]), constants));
    f32x4_store(reference + 4 * h, f32x4_add(f32x4_load(reference + 4 * h), shift[h]));
    f32x4_store(sum + 4 * h, f32x4_mul(sum_h, factor[h]));
  }
  for (uint32_t n = 0; n < keys; n++, s += LANES)
    for (int h = 0; h < 2; h++) f32x4_store(s + 4 * h, f32x4_sub(f32x4_load(s + 4 * h), shift[h]));
  for (uint32_t d = 0; d < Dv; d++, out_t += LANES)
    for (int h = 0; h < 2; h++) f32x4_store(out_t + 4 * h, f32x4_mul(f32x4_load(out_t + 4 * h), factor[h]));
}

// Whether some lane needs another reference: its maximum is far above the present one, or far below with no sum yet to say
// that the present one suits other keys.
RA_INLINE int is_far(f32x4 max, f32x4 sum) {
  f32x4 lazy = f32x4_splat(LAZY), below = f32x4_sub(f32x4_splat(-LAZY), max); // above 0 where it is far below
  f32x4 none = f32x4_where_less(sum, f32x4_splat(FLT_MIN), below, f32x4_splat(0));
  return f32x4_any_greater(max, lazy) || f32x4_any_greater(none, f32x4_splat(0));
}

// Pass 2: weights 2^s in place, their sum added to `sum`. `near`: no s is below -127.
RA_INLINE void weights_of_tile(float *s, uint32_t keys, const int near, float *sum) {
  const ra_exp2_constants *constants = ra_exp2_load();
  f32x4 sum0 = f32x4_splat(0), sum1 = sum0;
  RA_ROLLED
  for (uint32_t n = 0; n < keys; n++) {
    f32x4 s0 = f32x4_load(s), s1 = f32x4_load(s + 4);
    f32x4 w0 = near ? ra_exp2_near(s0, constants) : ra_exp2(s0, constants);
    f32x4 w1 = near ? ra_exp2_near(s1, constants) : ra_exp2(s1, constants);
    f32x4_store(s, w0), f32x4_store(s + 4, w1);
    sum0 = f32x4_add(sum0, w0), sum1 = f32x4_add(sum1, w1);
    s += LANES;
  }
  f32x4_store(sum, f32x4_add(f32x4_load(sum), sum0));
  f32x4_store(sum + 4, f32x4_add(f32x4_load(sum + 4), sum1));
}

RA_KERNEL void weigh_tile(float *s, uint32_t keys, float *sum) { weights_of_tile(s, keys, 0, sum); }

RA_KERNEL void weigh_narrow_tile(float *s, uint32_t keys, float *sum) { weights_of_tile(s, keys, 1, sum); }

// Softcap of narrow scores that it bends by little: cap tanh(s / cap) = s q(s / cap). A pass of its own: 17 % of the
// plain kernel at D = 16, where one with that of the weights takes 30.
RA_KERNEL void bend_tile(float *s, uint32_t keys, float inverse_cap) {
  const ra_tanh_constants *constants = ra_tanh_load();
  f32x4 inverse = f32x4_splat(inverse_cap);
  RA_ROLLED
  for (uint32_t n = 0; n < keys; n++) {
    f32x4 s0 = f32x4_load(s), s1 = f32x4_load(s + 4);
    f32x4_store(s, f32x4_mul(s0, ra_tanh_near(f32x4_mul(s0, inverse), constants)));
    f32x4_store(s + 4, f32x4_mul(s1, ra_tanh_near(f32x4_mul(s1, inverse), constants)));
    s += LANES;
  }
}

// Keys from key0, panel by panel, that all lanes may see: of 0 .. keys, a multiple of PANEL. Ranges rise along the lanes.
static uint32_t open_keys(ra_range first, ra_range last, uint32_t key0, uint32_t keys) {
  if (last.first > key0 || first.end <= key0) return 0;
  return ra_min_u32((first.end - key0) / PANEL * PANEL, keys);
}

// s [panels * PANEL][8] and mask likewise, for the queries from i and keys from key0, less the reference; and the maxima.
static void modified_tile(const exact *e, uint32_t i, uint32_t key0, uint32_t panels, const float *q_strip,
                          const float *mask, const float *reference, float *s, f32x4 max[2]) {
  const float *k_panel = e->k_panel + (size_t)key0 * e->D;
  int pairwise;
  q_strip = factors(e, q_strip, 1, i, key0, PANEL * panels, &pairwise);
  if (pairwise || e->cap > 0) {
    if (pairwise) ra_relative_scores(e->relative, k_panel, q_strip, i, key0, panels, LANES, s);
    else score_tile(k_panel, q_strip, e->D, panels, e->zero, s, max);
    if (e->near) cap_near_tile(e, i, key0, PANEL * panels, mask, reference, s, max);
    else if (e->cap > 0) cap_tile(e, i, key0, PANEL * panels, mask, reference, s, max);
    else shift_tile(e, i, key0, PANEL * panels, mask, reference, s, max);
  } else if (e->bias || e->mask) biased_tile(e, k_panel, q_strip, panels, i, key0, mask, reference, s, max);
  else score_tile(k_panel, q_strip, e->D, panels, reference, s, max);
}

// Of all `whole` keys of a tile that lanes see, of which `open` are seen by all of them: s, less the reference, and the maxima.
static void scores_of_tile(const exact *e, uint32_t strip, uint32_t i, const ra_range *range, uint32_t key0,
                           uint32_t open, uint32_t whole, f32x4 max[2]) {
  const float *q_strip = e->q_strip + (size_t)strip * e->D * LANES, *reference = e->reference + strip * LANES;
  max[0] = max[1] = f32x4_splat(-INFINITY);
  if (open > 0) modified_tile(e, i, key0, open / PANEL, q_strip, e->mask, reference, e->s, max);
  if (open == whole) return;
  f32x4 rest[2];
  float *s = e->s + open * LANES;
  modified_tile(e, i, key0 + open, (whole - open) / PANEL, q_strip, e->mask ? e->mask + open * LANES : NULL, reference,
                s, rest);
  mask_tile(s, whole - open, range, key0 + open, rest);
  max[0] = f32x4_max(max[0], rest[0]), max[1] = f32x4_max(max[1], rest[1]);
}

// One strip of queries, from i, against keys key0 .. key0 + keys - 1; key0 is a multiple of PANEL.
RA_KERNEL void forward_tile(const exact *e, uint32_t head, uint32_t strip, uint32_t i, const ra_range *range,
                            uint32_t key0, uint32_t keys, const float *v) {
  float *reference = e->reference + strip * LANES, *sum = e->sum + strip * LANES;
  float *out_t = e->out_t + (size_t)strip * e->Dv * LANES;
  uint32_t whole = ra_ceil_div(keys, PANEL) * PANEL, open = open_keys(range[0], range[LANES - 1], key0, whole);
  f32x4 max[2], distant = f32x4_splat(DISTANT);
  if (e->narrow) {
    const float *q_strip = e->q_strip + (size_t)strip * e->D * LANES;
    uint32_t count = ra_min_u32(open, keys);
    narrow_tile(e->k_panel + (size_t)key0 * e->D, q_strip, e->D, whole / PANEL, reference, e->s);
    if (e->near) bend_tile(e->s, whole, e->inverse_cap);
    weigh_narrow_tile(e->s, count, sum);
    if (count < keys) {
      mask_tile(e->s + count * LANES, whole - count, range, key0 + count, max);
      weigh_tile(e->s + count * LANES, keys - count, sum);
    }
    ra_add_columns(v + key0 * e->v_row, e->v_row, e->Dv, e->s, LANES, keys, out_t, LANES);
    return;
  }
  if (e->mask) load_mask(e, head, i, LANES, key0, keys);
  scores_of_tile(e, strip, i, range, key0, open, whole, max);
  if (!e->sloped && (is_far(max[0], f32x4_load(sum)) || is_far(max[1], f32x4_load(sum + 4)))) {
    move_reference(e->s, whole, reference, sum, out_t, e->Dv, max);
    // what a bias far from the old reference has rounded away
    if (e->bias && f32x4_any_greater(f32x4_max(f32x4_abs(max[0]), f32x4_abs(max[1])), distant))
      scores_of_tile(e, strip, i, range, key0, open, whole, max);
  }
  weigh_tile(e->s, keys, sum);
  ra_add_columns(v + key0 * e->v_row, e->v_row, e->Dv, e->s, LANES, keys, out_t, LANES);
}

// Numerators over denominators, back to rows. A sink adds to the denominator.
RA_KERNEL void finish_strip(const exact *e, uint32_t head, uint32_t strip, uint32_t count, float *out, float *lse) {
  float *out_t = e->out_t + (size_t)strip * e->Dv * LANES, inverse[LANES];
  const float *sinks = e->p->sinks;
  for (uint32_t i = 0; i < LANES; i++) {
    double sum = e->sum[strip * LANES + i], whole = -INFINITY;
    inverse[i] = sum == 0 ? 0 : (float)(1 / sum);
    if (sum != 0) whole = e->reference[strip * LANES + i] * RA_LN_2 + ra_log_f64(sum);
    if (sinks) {
      double sink = sinks[head % e->p->heads], high = sink > whole ? sink : whole, low = sink > whole ? whole : sink;
      double smaller = high == -INFINITY ? 0 : ra_exp_f64(low - high); // of sink and sum, over the larger
      if (sum != 0) inverse[i] = (float)((sink > whole ? smaller : 1) / ((1 + smaller) * sum));
      whole = high + ra_log_f64(1 + smaller);
    }
    if (i < count) lse[i] = (float)whole;
  }
  for (uint32_t d = 0; d < e->Dv; d++)
    for (int h = 0; h < 2; h++) {
      float *at = out_t + d * LANES + 4 * h;
      f32x4_store(at, f32x4_mul(f32x4_load(at), f32x4_load(inverse + 4 * h)));
    }
  ra_transpose(out_t, LANES, e->Dv, count, out, e->out_row);
}

// A block of queries of one head against all keys. Keys outside, strips inside: a key tile is read from L1.
RA_KERNEL void forward_block(const exact *e, uint32_t head, const float *q, const float *v, uint32_t query0, float *out,
                             float *lse) {
  const ra_problem *p = e->p;
  uint32_t count = ra_min_u32(QUERY_BLOCK, p->query_length - query0), strips = ra_ceil_div(count, LANES);
  ra_range range[QUERY_BLOCK];
  for (uint32_t i = 0; i < strips * LANES; i++) range[i] = ra_keys_of(p, query0 + ra_min_u32(i, count - 1));
  for (uint32_t i = 0; i < count; i += 32) {
    uint32_t rows = ra_min_u32(32, count - i);
    ra_rotary_rows(&e->state->q_rotary, q + (query0 + i) * e->q_row, e->q_row, e->rows, e->Dp, rows, query0 + i,
                   RA_ROTATE, (float)(p->scale * RA_LOG2_E));
    pack(e->rows, e->Dp, rows, e->D, LANES, e->q_strip + (size_t)i * e->D);
  }
  ra_fill(e->out_t, (size_t)strips * e->Dv * LANES, 0);
  ra_fill(e->reference, (size_t)strips * LANES, 0);
  for (uint32_t i = 0; e->sloped && i < strips * LANES; i++) // the nearest key is within NARROW of it
    if (range[i].first < range[i].end)
      e->reference[i] = largest_slope(e, query0 + ra_min_u32(i, count - 1), 0, p->key_length);
  ra_fill(e->sum, (size_t)strips * LANES, 0);
  uint32_t end = range[strips * LANES - 1].end, key_tile = e->block_keys;
  for (uint32_t tile = range[0].first / key_tile * key_tile; tile < end; tile += key_tile) {
    if (e->relative) ra_relative_move(e->relative, query0, tile + key_tile - 1);
    for (uint32_t n = 0; n < strips; n++) {
      const ra_range *lanes = range + n * LANES;
      uint32_t first = lanes[0].first / PANEL * PANEL, last = ra_min_u32(tile + key_tile, lanes[LANES - 1].end);
      if (first < tile) first = tile;
      uint32_t i = query0 + n * LANES;
      if (first < last && is_out_of_sight(e, i, i + LANES - 1, first, last, 1)) continue;
      if (first < last) forward_tile(e, head, n, i, lanes, first, last - first, v);
    }
  }
  for (uint32_t n = 0; n < strips; n++) {
    uint32_t i = query0 + n * LANES;
    finish_strip(e, head, n, ra_min_u32(LANES, p->query_length - i), out + i * e->out_row, lse + i);
  }
}

// --- Backward -----------------------------------------------------------------------------------------------------

// What every key block of a head reads: queries, dout, lse and delta in lanes.
RA_KERNEL void prepare_queries(const exact *e, uint32_t head, const float *q, const float *out, const float *lse,
                               const float *dout, float *dsinks) {
  const ra_problem *p = e->p;
  uint32_t Nq = p->query_length;
  ra_fill(e->q_rows, (size_t)QUERY_CHUNK * e->Dp, 0);
  ra_fill(e->dout_rows, (size_t)QUERY_CHUNK * e->Dvp, 0);
  ra_fill(e->q_strip, (size_t)e->strips * LANES * e->D, 0);
  ra_fill(e->dout_strip, (size_t)e->strips * LANES * e->Dv, 0);
  ra_fill(e->dq_t, (size_t)e->strips * LANES * e->Dp, 0);
  ra_fill(e->lse2, (size_t)e->strips * LANES, 0);
  ra_fill(e->delta, (size_t)e->strips * LANES, 0);
  const float *sink = p->sinks ? p->sinks + head % p->heads : NULL;
  double dsink = 0;
  for (uint32_t i = 0; i < Nq; i += QUERY_CHUNK) {
    uint32_t rows = ra_min_u32(QUERY_CHUNK, Nq - i);
    ra_rotary_rows(&e->state->q_rotary, q + i * e->q_row, e->q_row, e->q_rows, e->Dp, rows, i, RA_ROTATE,
                   (float)(p->scale * RA_LOG2_E));
    for (uint32_t r = 0; r < rows; r++) {
      const float *dout_i = dout + (i + r) * e->out_row, *out_i = out + (i + r) * e->out_row;
      // else there was no key, or only a sink far below any score, and dout counts for nothing
      int seen = !(lse[i + r] <= RA_FORBIDDEN);
      double delta = 0;
      for (uint32_t d = 0; d < e->Dv; d++) {
        e->dout_rows[(size_t)r * e->Dvp + d] = seen ? dout_i[d] : 0;
        delta += (double)dout_i[d] * out_i[d];
      }
      if (sink) dsink -= ra_exp_f64(*sink - (double)lse[i + r]) * delta;
      e->delta[i + r] = seen ? (float)delta : 0;
      e->lse2[i + r] = seen ? (float)(lse[i + r] * RA_LOG2_E) : 0;
    }
    pack(e->q_rows, e->Dp, rows, e->D, LANES, e->q_strip + (size_t)i * e->D);
    pack(e->dout_rows, e->Dvp, rows, e->Dv, LANES, e->dout_strip + (size_t)i * e->Dv);
  }
  if (sink && dsinks) dsinks[head % p->heads] = (float)((head < p->heads ? 0 : dsinks[head % p->heads]) + dsink);
}

// s = q.k - lse.
RA_KERNEL void product_tiles(const float *panel, const float *strip, uint32_t columns, uint32_t panels,
                             const float *start, float *c) {
  multiply_panels(panel, strip, columns, panels, start, QUERY_CHUNK, c, NULL);
}

// The same of values, dout and delta, times the weights: dS = P (dP - delta).
RA_KERNEL void product_tiles_weighted(const float *panel, const float *strip, uint32_t columns, uint32_t panels,
                                      const float *start, const float *weight, float *c) {
  f32x4 start0 = f32x4_sub(f32x4_splat(0), f32x4_load(start));
  f32x4 start1 = f32x4_sub(f32x4_splat(0), f32x4_load(start + 4));
  RA_ROLLED
  for (uint32_t n = 0; n < panels; n++) {
    ra_tile t;
    ra_tile_multiply(&t, PANEL, start0, start1, columns, panel, PANEL, 1, strip, LANES);
    RA_UNROLLED
    for (int r = 0; r < PANEL; r++) {
      t.c[r][0] = f32x4_mul(t.c[r][0], f32x4_load(weight + r * QUERY_CHUNK));
      t.c[r][1] = f32x4_mul(t.c[r][1], f32x4_load(weight + r * QUERY_CHUNK + 4));
    }
    ra_tile_store(&t, PANEL, c, QUERY_CHUNK);
    panel += (size_t)columns * PANEL;
    weight += PANEL * QUERY_CHUNK;
    c += PANEL * QUERY_CHUNK;
  }
}

// Weights 2^s in place. Small ones are there whatever bounds the scores: lse may be that of more keys, or of a sink.
RA_KERNEL void weigh_block(float *s, uint32_t keys) {
  const ra_exp2_constants *constants = ra_exp2_load();
  RA_ROLLED
  for (uint32_t n = 0; n < keys * (QUERY_CHUNK / 8); n++) {
    f32x4_store(s, ra_exp2(f32x4_load(s), constants));
    f32x4_store(s + 4, ra_exp2(f32x4_load(s + 4), constants));
    s += 8;
  }
}

RA_KERNEL void mask_block(const exact *e, float *s, uint32_t keys, uint32_t query0, uint32_t key0) {
  const ra_problem *p = e->p;
  f32x4 masked = f32x4_splat(RA_MASKED);
  float first[QUERY_CHUNK], end[QUERY_CHUNK];
  for (uint32_t i = 0; i < QUERY_CHUNK; i++) {
    ra_range range = query0 + i < p->query_length ? ra_keys_of(p, query0 + i) : (ra_range){0, 0};
    place_range(range, key0, keys, &first[i], &end[i]);
  }
  for (uint32_t n = 0; n < keys; n++, s += QUERY_CHUNK)
    for (uint32_t i = 0; i < QUERY_CHUNK; i += 4) {
      f32x4 key = f32x4_splat((float)n), inside = f32x4_where_less(key, f32x4_load(end + i), f32x4_load(s + i), masked);
      f32x4_store(s + i, f32x4_where_less(key, f32x4_load(first + i), masked, inside));
    }
}

// C[n][columns] += sum_i a[n][i] * b[i][columns] over the 32 queries of a chunk, for the keys of `panels`: dv (a = P, b
// = dout), dk (a = dS, b = queries).
RA_KERNEL void accumulate_rows(const float *a, uint32_t panels, const float *b, size_t columns, float *c) {
  f32x4 zero = f32x4_splat(0);
  RA_ROLLED
  for (size_t d = 0; d < columns; d += 8) {
    RA_ROLLED
    for (uint32_t n = 0; n < panels; n++) {
      ra_tile t;
      ra_tile_multiply(&t, PANEL, zero, zero, QUERY_CHUNK, a + (size_t)n * PANEL * QUERY_CHUNK, 1, QUERY_CHUNK, b + d,
                       columns);
      ra_tile_add(&t, PANEL, c + (size_t)n * PANEL * columns + d, columns);
    }
  }
}

// What dS of a step gives where scores are those of a relative map: products with the mapped queries where the map is constant.
// Queries carry scale * log2 e; keys are those of the block from `start` on.
static void relative_gradients(const exact *e, uint32_t query0, uint32_t key0, uint32_t start, uint32_t panels,
                               int pairwise, float *dweights) {
  float *dk_block = e->dk_block + (size_t)start * e->Dp;
  const float *k_panel = e->k_panel + (size_t)start * e->D, *q_strip = e->q_strip + (size_t)query0 * e->D;
  size_t strip_size = (size_t)e->D * LANES;
  for (uint32_t n = 0; n < QUERY_CHUNK; n += LANES) {
    float *dq_t = e->dq_t + (size_t)(query0 + n) * e->Dp, *mapped = e->relative->mapped + n * e->D;
    if (pairwise) {
      ra_relative_queries(e->relative, k_panel, e->ds + n, QUERY_CHUNK, query0 + n, key0, panels, dq_t);
      continue;
    }
    ra_transpose(mapped, LANES, e->D, LANES, e->rows + n * e->Dp, e->Dp);
    ra_fill(mapped, strip_size, 0); // its gradient now
    ra_add_columns(e->k_rows + (size_t)start * e->Dp, e->Dp, e->D, e->ds + n, QUERY_CHUNK, PANEL * panels, mapped,
                   LANES);
    ra_relative_map_back(e->relative, mapped, query0 + n, key0, dq_t);
  }
  if (pairwise) ra_relative_keys(e->relative, q_strip, strip_size, e->ds, query0, key0, panels, dk_block, e->Dp);
  else accumulate_rows(e->ds, panels, e->rows, e->Dp, dk_block);
  if (dweights)
    ra_relative_weights(e->relative, q_strip, strip_size, k_panel, e->ds, query0, key0, panels, (float)RA_LN_2,
                        dweights);
}

// Strips of 32 queries, or their dout, as rows again.
static void unpack(const float *strips, uint32_t columns, float *rows, size_t row) {
  for (uint32_t n = 0; n < QUERY_CHUNK; n += LANES)
    ra_transpose(strips + (size_t)n * columns, LANES, columns, LANES, rows + n * row, row);
}

// A chunk of 32 queries against a block of keys: the five products of the backward pass.
RA_KERNEL void backward_step(const exact *e, uint32_t head, uint32_t query0, uint32_t key0, uint32_t keys,
                             float *dweights) {
  const ra_problem *p = e->p;
  uint32_t last = ra_min_u32(query0 + QUERY_CHUNK, p->query_length) - 1, strip0 = query0 / LANES;
  ra_range of_first = ra_keys_of(p, query0), of_last = ra_keys_of(p, last);
  uint32_t start =
      of_first.first > key0 ? (of_first.first - key0) / PANEL * PANEL : 0; // keys of the block before it see nothing
  if (of_last.end <= key0 + start || start >= keys) return;
  if (is_out_of_sight(e, query0, last, key0 + start, key0 + keys, 2)) return;
  keys = ra_min_u32(keys, of_last.end - key0) - start;
  key0 += start;
  uint32_t panels = ra_ceil_div(keys, PANEL);
  const float *k_panel = e->k_panel + (size_t)start * e->D, *v_panel = e->v_panel + (size_t)start * e->Dv;

  // in the forward pass this was s = q.k, P = 2^(s - lse)
  if (e->mask) load_mask(e, head, query0, QUERY_CHUNK, key0, keys);
  if (e->relative) ra_relative_move(e->relative, query0, key0 + KEY_BLOCK - 1);
  int pairwise;
  const float *q_strips = e->q_strip + (size_t)query0 * e->D;
  q_strips = factors(e, q_strips, QUERY_CHUNK / LANES, query0, key0, PANEL * panels, &pairwise);
  for (uint32_t n = 0; n < 4; n++) {
    const float *q_strip = q_strips + n * e->D * LANES, *lse2 = e->lse2 + (strip0 + n) * LANES;
    float *s = e->weight + n * LANES;
    if (pairwise) ra_relative_scores(e->relative, k_panel, q_strip, query0 + n * LANES, key0, panels, QUERY_CHUNK, s);
    else if (e->cap == 0 && (e->bias || e->mask))
      biased_block(e, k_panel, q_strip, panels, query0 + n * LANES, key0, e->mask ? e->mask + n * LANES : NULL, lse2,
                   s);
    else product_tiles(k_panel, q_strip, e->D, panels, e->cap > 0 ? e->zero : lse2, s);
  }
  if (e->near) cap_near_block(e, query0, key0, PANEL * panels, e->lse2 + query0, e->weight);
  else if (e->cap > 0) cap_block(e, query0, key0, PANEL * panels, e->lse2 + query0, e->weight);
  else if (pairwise) shift_block(e, query0, key0, PANEL * panels, e->lse2 + query0, e->weight);
  uint32_t open = last == query0 + QUERY_CHUNK - 1 ? open_keys(of_first, of_last, key0, PANEL * panels) : 0;
  if (open < PANEL * panels) mask_block(e, e->weight + open * QUERY_CHUNK, PANEL * panels - open, query0, key0 + open);
  weigh_block(e->weight, PANEL * panels);

  // in the forward pass this was out += P v, so now dP = dout v^T and dS = P (dP - delta)
  for (uint32_t n = 0; n < 4; n++)
    product_tiles_weighted(v_panel, e->dout_strip + (size_t)(strip0 + n) * e->Dv * LANES, e->Dv, panels,
                           e->delta + (strip0 + n) * LANES, e->weight + n * LANES, e->ds + n * LANES);
  unpack(e->dout_strip + (size_t)query0 * e->Dv, e->Dv, e->dout_rows, e->Dvp);
  accumulate_rows(e->weight, panels, e->dout_rows, e->Dvp, e->dv_block + (size_t)start * e->Dvp);

  // in the forward pass this was s = softcap tanh(q.k / softcap) + bias
  if (e->dbias) add_diagonals(e, query0, key0, PANEL * panels, e->ds);
  for (uint32_t n = 0; e->slope && n < PANEL * panels * QUERY_CHUNK; n += 4)
    f32x4_store(e->ds + n, f32x4_mul(f32x4_load(e->ds + n), f32x4_load(e->slope + n)));

  // undoes q.k on both sides, or q W k on all three
  if (e->relative) {
    relative_gradients(e, query0, key0, start, panels, pairwise, dweights);
    return;
  }
  unpack(e->q_strip + (size_t)query0 * e->D, e->D, e->q_rows, e->Dp);
  accumulate_rows(e->ds, panels, e->q_rows, e->Dp, e->dk_block + (size_t)start * e->Dp);
  for (uint32_t n = 0; n < 4; n++)
    ra_add_columns(e->k_rows + (size_t)start * e->Dp, e->Dp, e->Dp, e->ds + n * LANES, QUERY_CHUNK, PANEL * panels,
                   e->dq_t + (size_t)(strip0 + n) * e->Dp * LANES, LANES);
}

// One block of keys against all queries of a head; dk, dv of the block are overwritten, or added to (`add`), dweights added to.
RA_KERNEL void backward_block(const exact *e, uint32_t head, uint32_t key0, const float *k, const float *v, float *dk,
                              float *dv, int add, float *dweights) {
  const ra_problem *p = e->p;
  uint32_t keys = ra_min_u32(KEY_BLOCK, p->key_length - key0), end = ra_query_end(p, key0 + keys - 1);
  prepare_keys(e, k, key0, keys);
  pack(v + key0 * e->v_row, e->v_row, keys, e->Dv, PANEL, e->v_panel);
  ra_fill(e->dk_block, (size_t)KEY_BLOCK * e->Dp, 0);
  ra_fill(e->dv_block, (size_t)KEY_BLOCK * e->Dvp, 0);
  for (uint32_t i = ra_query_start(p, key0) / QUERY_CHUNK * QUERY_CHUNK; i < end; i += QUERY_CHUNK)
    backward_step(e, head, i, key0, keys, dweights);

  // queries carried scale * log2 e
  ra_rotary_rows(&e->state->k_rotary, e->dk_block, e->Dp, e->dk_block, e->Dp, keys, key0, RA_ROTATE_TRANSPOSE,
                 (float)RA_LN_2);
  for (uint32_t j = 0; j < keys; j++) {
    const float *dk_block = e->dk_block + (size_t)j * e->Dp, *dv_block = e->dv_block + (size_t)j * e->Dvp;
    float *dk_j = dk + (key0 + j) * e->k_row, *dv_j = dv + (key0 + j) * e->v_row;
    for (uint32_t d = 0; d < e->D; d++) dk_j[d] = add ? dk_j[d] + dk_block[d] : dk_block[d];
    for (uint32_t d = 0; d < e->Dv; d++) dv_j[d] = add ? dv_j[d] + dv_block[d] : dv_block[d];
  }
}

// dq of a head, back to rows and back-rotated.
RA_KERNEL void finish_queries(const exact *e, float *dq) {
  const ra_problem *p = e->p;
  for (uint32_t i = 0; i < p->query_length; i += QUERY_CHUNK) {
    uint32_t rows = ra_min_u32(QUERY_CHUNK, p->query_length - i);
    for (uint32_t r = 0; r < rows; r += LANES)
      ra_transpose(e->dq_t + (size_t)(i + r) * e->Dp, LANES, e->Dp, LANES, e->rows + r * e->Dp, e->Dp);
    ra_rotary_rows(&e->state->q_rotary, e->rows, e->Dp, dq + i * e->q_row, e->q_row, rows, i, RA_ROTATE_TRANSPOSE,
                   p->scale);
  }
}

// What the diagonals of a head give to the sums over heads and batches that it belongs to: dbias, and dalibi since in the
// forward pass its slope was taken times |i + query_offset - j|.
static void finish_bias(const exact *e, uint32_t head, float *dbias, float *dalibi) {
  const ra_problem *p = e->p;
  size_t length = ra_diagonals(p);
  uint32_t own = p->bias_heads > 1 ? head % p->heads : 0;
  if (!e->dbias) return;
  for (size_t n = 0; p->bias && dbias && n < length; n++) {
    float *sum = dbias + own * length + n;
    *sum = (head < p->bias_heads ? 0 : *sum) + e->dbias[PAD + n];
  }
  if (!p->alibi || !dalibi) return;
  double sum = head < p->heads ? 0 : dalibi[head % p->heads];
  for (size_t n = 0; n < length; n++) sum -= e->dbias[PAD + n] * fabs((double)n - p->key_length + 1 + p->query_offset);
  dalibi[head % p->heads] = (float)sum;
}

// --- Units --------------------------------------------------------------------------------------------------------

static uint32_t blocks_per_head(const ra_problem *p, uint32_t pass) {
  return pass == RA_FORWARD ? ra_ceil_div(p->query_length, QUERY_BLOCK) : ra_ceil_div(p->key_length, KEY_BLOCK);
}

static uint32_t units(const ra_problem *p, uint32_t pass) { return p->batch * p->heads * blocks_per_head(p, pass); }

static int run(const ra_problem *p, const ra_arrays *x, uint32_t pass, void *workspace, uint32_t first, uint32_t last) {
  ra_workspace_cursor cursor = {workspace, 0, 0};
  exact e = arrange(p, pass, &cursor);
  size_t Nq = p->query_length, Nk = p->key_length;
  uint32_t blocks = blocks_per_head(p, pass), group = ra_group(p);
  float *dweights = p->support_count > 0 ? x->dweights : NULL;
  ra_problem rows = *p; // of rows alone
  if (e.relative) rows.rotary_dim = 0;
  for (uint32_t unit = first; unit < last; unit++) {
    uint32_t head = unit / blocks, block = unit % blocks, kv = head / group, batch = head / p->heads;
    size_t q_head = ra_head(p, head, p->heads, Nq, e.D), out_head = ra_head(p, head, p->heads, Nq, e.Dv);
    size_t k_head = ra_head(p, kv, p->kv_heads, Nk, e.D), v_head = ra_head(p, kv, p->kv_heads, Nk, e.Dv);
    if (unit == 0) {
      ra_rotary_init(&e.state->q_rotary, &rows, 1, NULL, e.q_space);
      ra_rotary_init(&e.state->k_rotary, &rows, 0, &e.state->q_rotary, e.k_space);
      if (e.relative) ra_relative_init(e.relative, p, e.block_queries, e.block_keys, e.relative_space);
      if (pass == RA_BACKWARD && dweights) ra_fill(dweights, p->support_count * ra_diagonals(p), 0);
    }
    if (block == 0) {
      ra_rotary_batch(&e.state->q_rotary, &rows, 1, batch);
      ra_rotary_batch(&e.state->k_rotary, &rows, 0, batch);
      prepare_modifiers(&e, head);
    }
    if (pass == RA_FORWARD) {
      if (block == 0 && head % group == 0) prepare_keys(&e, x->k + k_head, 0, p->key_length);
      forward_block(&e, head, x->q + q_head, x->v + v_head, block * QUERY_BLOCK, x->out + out_head, x->lse + head * Nq);
      continue;
    }
    if (e.in_place) e.dq_t = x->dq + q_head;
    if (block == 0)
      prepare_queries(&e, head, x->q + q_head, x->out + out_head, x->lse + head * Nq, x->dout + out_head, x->dsinks);
    backward_block(&e, head, block * KEY_BLOCK, x->k + k_head, x->v + v_head, x->dk + k_head, x->dv + v_head,
                   head % group != 0, dweights);
    if (block == blocks - 1) finish_queries(&e, x->dq + q_head), finish_bias(&e, head, x->dbias, x->dalibi);
  }
  return RA_OK;
}

const ra_engine ra_exact_engine = {layout, units, run};

void ra_exact_warm_up(uint32_t calls) {
  float x[LANES] = {0};
  f32x4 max[2] = {f32x4_splat(0), f32x4_splat(0)};
  volatile uint32_t nothing = 0; // nobody is to see that the calls are empty
  for (uint32_t n = 0; n < calls; n++) {
    uint32_t none = nothing;
    pack(x, LANES, none, none, LANES, x);
    score_tile(x, x, none, none, x, x, max);
    narrow_tile(x, x, none, none, x, x);
    move_reference(x, none, x, x, x, none, max);
    weigh_tile(x, none, x);
    weigh_narrow_tile(x, none, x);
    ra_add_columns(x, LANES, none, x, LANES, none, x, LANES);
    product_tiles(x, x, none, none, x, x);
    product_tiles_weighted(x, x, none, none, x, x, x);
    weigh_block(x, none);
    accumulate_rows(x, none, x, none, x);
  }
}
