// SPDX-License-Identifier: MIT
//
// See relative.h. Costs there; the share of the multiply-add peak is printed by tests/bench/relative.mjs.

#include "relative.h"

#include <string.h>

#include "elementary.h"
#include "engines.h"
#include "pack.h"
#include "tile.h"

enum {
  LANES = 8,
  PANEL = RA_TILE_ROWS,
  KEYS =
      PANEL /
      2, // keys that go together: their sums and what is being added are 4 KEYS vectors, the rest of 15 is for operands
  STRIPS = 4, // of a backward step
  CHUNK = STRIPS * LANES,
  PAD = 4, // zeros around sums that are read shifted
};

// --- Tables ---------------------------------------------------------------------------------------------------------

// A rotation has rows cos, sin and -sin for each pair, and one of ones when some dimensions do not rotate.
static uint32_t rotation_rows(const ra_problem *p) { return p->rotary_dim / 2 * 3 + (p->rotary_dim < p->head_dim); }

static size_t layout(ra_relative *r, const ra_problem *p, uint32_t queries, uint32_t keys, void *space) {
  ra_workspace_cursor w = {space, 0, 0};
  size_t D = p->head_dim;
  r->count = p->relative_positions ? p->head_dim + p->rotary_dim : p->support_count;
  r->table_rows = p->relative_positions ? rotation_rows(p) : p->support_count;
  r->D = p->head_dim, r->half = p->relative_positions ? p->rotary_dim / 2 : 0;
  r->step = p->interleaved ? 2 : 1, r->gap = p->interleaved ? 1 : r->half;
  r->diagonals = ra_diagonals(p), r->before = p->key_length - 1;
  r->width = (size_t)queries + keys, r->panel_size = D * PANEL, r->strip_size = D * LANES;
  r->table = p->relative_positions ? ra_take_floats(&w, r->table_rows, r->diagonals) : p->weights;
  r->entries = ra_take(&w, r->count, 3, sizeof(uint32_t));
  r->of_queries = ra_take(&w, r->count + D, 2, sizeof(uint32_t));
  r->of_keys = ra_take(&w, r->count + D, 2, sizeof(uint32_t));
  r->same = ra_take(&w, r->diagonals, 1, sizeof(uint32_t));
  r->window = ra_take_floats(&w, r->table_rows, r->width);
  r->mapped = ra_take_floats(&w, STRIPS, r->strip_size);
  r->products = ra_take_floats(&w, keys + PAD, CHUNK);
  r->column = ra_take_floats(&w, keys + PAD, 1);
  r->sums = ra_take_floats(&w, 4, keys + CHUNK + 2 * PAD);
  return w.overflow ? RA_SIZE_OVERFLOW : w.used;
}

size_t ra_relative_bytes(const ra_problem *p, uint32_t queries, uint32_t keys) {
  ra_relative r;
  return layout(&r, p, queries, keys, NULL);
}

static void set_entry(ra_relative *r, uint32_t n, uint32_t a, uint32_t b, uint32_t row) {
  r->entries[3 * n] = a, r->entries[3 * n + 1] = b, r->entries[3 * n + 2] = row;
}

// (R q).k = q1 (c k1 + s k2) + q2 (-s k1 + c k2) for each pair, and q k for each dimension that does not rotate; queries and
// keys both carry the factor.
static void fill_rotation(ra_relative *r, const ra_problem *p, float *table) {
  uint32_t half = p->rotary_dim / 2, n = 0;
  size_t length = r->diagonals;
  double factor = (double)p->rotary_factor * p->rotary_factor;
  for (uint32_t i = 0; i < half; i++, table += 3 * length) {
    uint32_t first = p->interleaved ? 2 * i : i, second = p->interleaved ? 2 * i + 1 : half + i;
    set_entry(r, n++, first, first, 3 * i), set_entry(r, n++, first, second, 3 * i + 1);
    set_entry(r, n++, second, first, 3 * i + 2), set_entry(r, n++, second, second, 3 * i);
    for (size_t t = 0; t < length; t++) {
      double c, s;
      ra_cos_sin_f64(p->relative_positions[t] * p->frequencies[i], &c, &s);
      table[t] = (float)(factor * c);
      table[length + t] = (float)(factor * s);
      table[2 * length + t] = -table[length + t];
    }
  }
  for (uint32_t d = p->rotary_dim; d < p->head_dim; d++) set_entry(r, n++, d, d, 3 * half);
  if (p->rotary_dim < p->head_dim) ra_fill(table, length, 1);
}

// Entries in groups that share a (side 0) or b (side 1): for each group that dimension times own_step and the number of
// entries, then for each entry the other dimension times other_step and where its row begins in the window. Returns the
// number of groups. `start` [D] is scratch.
static uint32_t group_entries(const ra_relative *r, uint32_t D, int side, uint32_t own_step, uint32_t other_step,
                              uint32_t *start, uint32_t *list) {
  uint32_t groups = 0, at = 0;
  for (uint32_t d = 0; d < D; d++) start[d] = 0;
  for (uint32_t n = 0; n < r->count; n++) start[r->entries[3 * n + side]]++;
  for (uint32_t d = 0; d < D; d++) {
    uint32_t count = start[d];
    if (count == 0) continue;
    list[at] = d * own_step, list[at + 1] = count;
    start[d] = at + 2;
    at += 2 + 2 * count, groups++;
  }
  for (uint32_t n = 0; n < r->count; n++) {
    const uint32_t *entry = r->entries + 3 * n;
    uint32_t *to = list + start[entry[side]];
    to[0] = entry[1 - side] * other_step, to[1] = (uint32_t)(entry[2] * r->width);
    start[entry[side]] += 2;
  }
  return groups;
}

// Rows of the map itself: positions, or weights.
static void find_constant(ra_relative *r, const float *map, uint32_t rows) {
  size_t length = r->diagonals;
  for (size_t t = 0; t < length; t++) r->same[t] = 1; // that t + 1 is the same
  for (uint32_t n = 0; n < rows; n++, map += length)
    for (size_t t = 0; t + 1 < length; t++) r->same[t] &= map[t] == map[t + 1];
  uint32_t last = (uint32_t)length - 1;
  r->same[last] = last;
  for (uint32_t t = last; t-- > 0;) r->same[t] = last = r->same[t] ? last : t;
}

void ra_relative_init(ra_relative *r, const ra_problem *p, uint32_t queries, uint32_t keys, void *space) {
  layout(r, p, queries, keys, space);
  if (p->relative_positions) fill_rotation(r, p, (float *)r->table);
  for (uint32_t n = 0; n < p->support_count; n++) set_entry(r, n, p->support[2 * n], p->support[2 * n + 1], n);
  if (p->relative_positions) find_constant(r, p->relative_positions, 1);
  else find_constant(r, p->weights, p->support_count);
  uint32_t start[RA_MAX_HEAD_DIM];
  r->query_groups = group_entries(r, p->head_dim, 0, LANES, PANEL, start, r->of_queries);
  r->key_groups = group_entries(r, p->head_dim, 1, 1, LANES, start, r->of_keys);
}

// Column c of the window has t = first_query - last_key + c.
void ra_relative_move(ra_relative *r, uint32_t first_query, uint32_t last_key) {
  r->first_query = first_query, r->last_key = last_key;
  int64_t first = (int64_t)first_query - last_key + (int64_t)r->before; // where column 0 is in the table
  int64_t from = first < 0 ? -first : 0, end = (int64_t)r->diagonals - first;
  if (end > (int64_t)r->width) end = (int64_t)r->width;
  for (uint32_t n = 0; n < r->table_rows; n++) {
    float *to = r->window + n * r->width;
    ra_fill(to, r->width, 0);
    if (from < end) memcpy(to + from, r->table + n * r->diagonals + first + from, (size_t)(end - from) * sizeof(float));
  }
}

// Where the window has (i, j).
static size_t column_of(const ra_relative *r, uint32_t i, uint32_t j) {
  return (size_t)(i - r->first_query) + (r->last_key - j);
}

// --- Constant parts ---------------------------------------------------------------------------------------------------

int ra_relative_is_constant(const ra_relative *r, uint32_t i, uint32_t queries, uint32_t key0, uint32_t keys) {
  int64_t first = (int64_t)i - key0 - (keys - 1) + (int64_t)r->before,
          last = (int64_t)i + queries - 1 - key0 + (int64_t)r->before;
  if (first < 0) first = 0; // keys, and queries, that only fill up a tile
  if (last >= (int64_t)r->diagonals) last = (int64_t)r->diagonals - 1;
  return first >= last || r->same[first] >= last;
}

// y[own][8] += sum of x[other][8] W over the entries of each group, for 8 queries and one key. `own` and `other` are
// what the list says times LANES over the steps that it was made with.
static void map_strip(const uint32_t *list, uint32_t groups, uint32_t own_step, uint32_t other_step,
                      const float *window, const float *x, float *y) {
  for (uint32_t g = 0; g < groups; g++) {
    float *y_g = y + list[0] / own_step * LANES;
    f32x4 y0 = f32x4_load(y_g), y1 = f32x4_load(y_g + 4);
    const uint32_t *end = list + 2 + 2 * list[1];
    for (list += 2; list < end; list += 2) {
      const float *x_e = x + list[0] / other_step * LANES, *row = window + list[1];
      y0 = f32x4_madd(f32x4_load(x_e), f32x4_load(row), y0);
      y1 = f32x4_madd(f32x4_load(x_e + 4), f32x4_load(row + 4), y1);
    }
    f32x4_store(y_g, y0), f32x4_store(y_g + 4, y1);
  }
}

void ra_relative_map(const ra_relative *r, const float *q_strip, uint32_t strips, uint32_t i, uint32_t key0) {
  ra_fill(r->mapped, strips * r->strip_size, 0);
  for (uint32_t n = 0; n < strips; n++)
    map_strip(r->of_keys, r->key_groups, 1, LANES, r->window + column_of(r, i + n * LANES, key0),
              q_strip + n * r->strip_size, r->mapped + n * r->strip_size);
}

void ra_relative_map_back(const ra_relative *r, const float *dmapped, uint32_t i, uint32_t key0, float *dq) {
  map_strip(r->of_queries, r->query_groups, LANES, PANEL, r->window + column_of(r, i, key0), dmapped, dq);
}

// --- Scores -----------------------------------------------------------------------------------------------------------

// u[n] = sum of W_ab k_nb over the b of a group, for KEYS keys and 8 queries; `at` is the first entry of the group.
RA_INLINE void key_side(const uint32_t *at, uint32_t count, const float *k, const float *window, f32x4 u[KEYS][2]) {
  RA_UNROLLED
  for (int n = 0; n < KEYS; n++) u[n][0] = u[n][1] = f32x4_splat(0);
  RA_ROLLED
  for (uint32_t e = 0; e < count; e++, at += 2) {
    const float *k_b = k + at[0], *row = window + at[1];
    RA_UNROLLED
    for (int n = 0; n < KEYS; n++) {
      f32x4 x = f32x4_load_splat(k_b + n);
      u[n][0] = f32x4_madd(x, f32x4_load(row - n), u[n][0]);
      u[n][1] = f32x4_madd(x, f32x4_load(row - n + 4), u[n][1]);
    }
  }
}

RA_KERNEL void scores(const uint32_t *list, uint32_t groups, const float *k, const float *q_strip, const float *window,
                      uint32_t row, float *s) {
  f32x4 sum[KEYS][2], u[KEYS][2];
  RA_UNROLLED
  for (int n = 0; n < KEYS; n++) sum[n][0] = sum[n][1] = f32x4_splat(0);
  RA_ROLLED
  for (uint32_t g = 0; g < groups; g++, list += 2 + 2 * list[1]) {
    key_side(list + 2, list[1], k, window, u);
    f32x4 q0 = f32x4_load(q_strip + list[0]), q1 = f32x4_load(q_strip + list[0] + 4);
    RA_UNROLLED
    for (int n = 0; n < KEYS; n++) {
      sum[n][0] = f32x4_madd(q0, u[n][0], sum[n][0]);
      sum[n][1] = f32x4_madd(q1, u[n][1], sum[n][1]);
    }
  }
  RA_UNROLLED
  for (int n = 0; n < KEYS; n++)
    f32x4_store(s + (uint32_t)n * row, sum[n][0]), f32x4_store(s + (uint32_t)n * row + 4, sum[n][1]);
}

// The same for a rotation and four queries, pair by pair: (q1 k1 + q2 k2) cos + (q1 k2 - q2 k1) sin. As many products,
// but half as many loads, which are what the general form waits for.
RA_KERNEL void turned_scores(const ra_relative *r, const float *k, const float *q, const float *window, uint32_t row,
                             float *s) {
  f32x4 sum[PANEL];
  RA_UNROLLED
  for (int n = 0; n < PANEL; n++) sum[n] = f32x4_splat(0);
  RA_ROLLED
  for (uint32_t p = 0; p < r->half; p++) {
    uint32_t first = p * r->step, second = first + r->gap;
    const float *k_first = k + first * PANEL, *k_second = k + second * PANEL;
    f32x4 q1 = f32x4_load(q + first * LANES), q2 = f32x4_load(q + second * LANES);
    RA_UNROLLED
    for (int n = 0; n < PANEL; n++) {
      f32x4 k1 = f32x4_load_splat(k_first + n), k2 = f32x4_load_splat(k_second + n);
      f32x4 even = f32x4_madd(q2, k2, f32x4_mul(q1, k1)), odd = f32x4_nmadd(q2, k1, f32x4_mul(q1, k2));
      sum[n] = f32x4_madd(even, f32x4_load(window - n), sum[n]);
      sum[n] = f32x4_madd(odd, f32x4_load(window + r->width - n), sum[n]);
    }
    window += 3 * r->width;
  }
  RA_ROLLED
  for (uint32_t d = 2 * r->half; d < r->D; d++) {
    f32x4 q_d = f32x4_load(q + d * LANES);
    RA_UNROLLED
    for (int n = 0; n < PANEL; n++) sum[n] = f32x4_madd(q_d, f32x4_load_splat(k + d * PANEL + n), sum[n]);
  }
  RA_UNROLLED
  for (int n = 0; n < PANEL; n++) f32x4_store(s + (uint32_t)n * row, sum[n]);
}

// Where KEYS keys begin in the panels.
static size_t in_panels(uint32_t n, size_t panel_size) { return n / PANEL * panel_size + n % PANEL; }

void ra_relative_scores(const ra_relative *r, const float *k_panel, const float *q_strip, uint32_t i, uint32_t key0,
                        uint32_t panels, uint32_t row, float *s) {
  const float *window = r->window + column_of(r, i, key0);
  for (uint32_t n = 0; r->half > 0 && n < panels * PANEL; n += PANEL)
    for (uint32_t lanes = 0; lanes < LANES; lanes += 4)
      turned_scores(r, k_panel + in_panels(n, r->panel_size), q_strip + lanes, window + lanes - n, row,
                    s + n * row + lanes);
  for (uint32_t n = 0; r->half == 0 && n < panels * PANEL; n += KEYS)
    scores(r->of_queries, r->query_groups, k_panel + in_panels(n, r->panel_size), q_strip, window - n, row,
           s + n * row);
}

// --- Gradients --------------------------------------------------------------------------------------------------------

// One dimension of dq.
RA_KERNEL void query_gradient(const ra_relative *r, const uint32_t *group, const float *k_panel, const float *window,
                              const float *ds, uint32_t row, uint32_t keys, float *dq) {
  f32x4 sum[KEYS][2], u[KEYS][2];
  RA_UNROLLED
  for (int n = 0; n < KEYS; n++) sum[n][0] = sum[n][1] = f32x4_splat(0);
  RA_ROLLED
  for (uint32_t n = 0; n < keys; n += KEYS, ds += KEYS * row, window -= KEYS) {
    key_side(group + 2, group[1], k_panel + in_panels(n, r->panel_size), window, u);
    RA_UNROLLED
    for (int m = 0; m < KEYS; m++) {
      sum[m][0] = f32x4_madd(f32x4_load(ds + (uint32_t)m * row), u[m][0], sum[m][0]);
      sum[m][1] = f32x4_madd(f32x4_load(ds + (uint32_t)m * row + 4), u[m][1], sum[m][1]);
    }
  }
  RA_UNROLLED
  for (int m = 1; m < KEYS; m++)
    sum[0][0] = f32x4_add(sum[0][0], sum[m][0]), sum[0][1] = f32x4_add(sum[0][1], sum[m][1]);
  f32x4_store(dq, f32x4_add(f32x4_load(dq), sum[0][0]));
  f32x4_store(dq + 4, f32x4_add(f32x4_load(dq + 4), sum[0][1]));
}

// The two dimensions of a pair that turns, for four queries: dq1 += ds (k1 cos + k2 sin), dq2 += ds (k2 cos - k1 sin).
// Keys take turns with two sums each, so that none waits for the one before.
RA_KERNEL void turned_query_gradient(const ra_relative *r, uint32_t first, const float *k, const float *window,
                                     const float *ds, uint32_t row, uint32_t panels, float *dq) {
  uint32_t second = first + r->gap;
  f32x4 sum[2][2];
  sum[0][0] = sum[0][1] = sum[1][0] = sum[1][1] = f32x4_splat(0);
  RA_ROLLED
  for (uint32_t panel = 0; panel < panels; panel++) {
    const float *k_first = k + first * PANEL, *k_second = k + second * PANEL;
    RA_UNROLLED
    for (int n = 0; n < PANEL; n++) {
      f32x4 k1 = f32x4_load_splat(k_first + n), k2 = f32x4_load_splat(k_second + n),
            ds_n = f32x4_load(ds + (uint32_t)n * row);
      f32x4 cosine = f32x4_load(window - n), sine = f32x4_load(window + r->width - n);
      f32x4 *to = sum[n % 2];
      to[0] = f32x4_madd(ds_n, f32x4_madd(k2, sine, f32x4_mul(k1, cosine)), to[0]);
      to[1] = f32x4_madd(ds_n, f32x4_nmadd(k1, sine, f32x4_mul(k2, cosine)), to[1]);
    }
    k += r->panel_size, window -= PANEL, ds += PANEL * row;
  }
  float *dq1 = dq + first * LANES, *dq2 = dq + second * LANES;
  f32x4_store(dq1, f32x4_add(f32x4_load(dq1), f32x4_add(sum[0][0], sum[1][0])));
  f32x4_store(dq2, f32x4_add(f32x4_load(dq2), f32x4_add(sum[0][1], sum[1][1])));
}

void ra_relative_queries(const ra_relative *r, const float *k_panel, const float *ds, uint32_t row, uint32_t i,
                         uint32_t key0, uint32_t panels, float *dq) {
  const uint32_t *group = r->of_queries;
  const float *window = r->window + column_of(r, i, key0);
  for (uint32_t p = 0; p < r->half; p++)
    for (uint32_t lanes = 0; lanes < LANES; lanes += 4)
      turned_query_gradient(r, p * r->step, k_panel, window + 3 * p * r->width + lanes, ds + lanes, row, panels,
                            dq + lanes);
  for (uint32_t g = 0; g < r->query_groups; g++, group += 2 + 2 * group[1])
    if (g >= 2 * r->half) query_gradient(r, group, k_panel, window, ds, row, panels * PANEL, dq + group[0]);
}

// One dimension of dk: sums over the lanes of ds times what the query side of the group gives.
RA_KERNEL void key_gradient(const uint32_t *group, const float *q_strip, size_t strip_size, const float *window,
                            const float *ds, uint32_t keys, float *dk, size_t dk_row) {
  RA_ROLLED
  for (uint32_t n = 0; n < keys; n += KEYS, ds += KEYS * CHUNK, window -= KEYS) {
    f32x4 sum[KEYS][2];
    RA_UNROLLED
    for (int m = 0; m < KEYS; m++) sum[m][0] = sum[m][1] = f32x4_splat(0);
    RA_ROLLED
    for (uint32_t strip = 0; strip < STRIPS; strip++) {
      const float *q = q_strip + strip * strip_size, *w = window + strip * LANES, *ds_n = ds + strip * LANES;
      const uint32_t *at = group + 2;
      f32x4 u[KEYS][2];
      RA_UNROLLED
      for (int m = 0; m < KEYS; m++) u[m][0] = u[m][1] = f32x4_splat(0);
      RA_ROLLED
      for (uint32_t e = 0; e < group[1]; e++, at += 2) {
        f32x4 q0 = f32x4_load(q + at[0]), q1 = f32x4_load(q + at[0] + 4);
        const float *row = w + at[1];
        RA_UNROLLED
        for (int m = 0; m < KEYS; m++) {
          u[m][0] = f32x4_madd(q0, f32x4_load(row - m), u[m][0]);
          u[m][1] = f32x4_madd(q1, f32x4_load(row - m + 4), u[m][1]);
        }
      }
      RA_UNROLLED
      for (int m = 0; m < KEYS; m++) {
        sum[m][0] = f32x4_madd(f32x4_load(ds_n + m * CHUNK), u[m][0], sum[m][0]);
        sum[m][1] = f32x4_madd(f32x4_load(ds_n + m * CHUNK + 4), u[m][1], sum[m][1]);
      }
    }
    RA_UNROLLED
    for (int m = 0; m < KEYS; m++) dk[(n + (uint32_t)m) * dk_row] += f32x4_sum(f32x4_add(sum[m][0], sum[m][1]));
  }
}

// The two dimensions of a pair that turns: dk1 += ds (q1 cos - q2 sin), dk2 += ds (q1 sin + q2 cos), summed over the lanes.
RA_KERNEL void turned_key_gradient(const ra_relative *r, uint32_t first, const float *q_strip, size_t strip_size,
                                   const float *window, const float *ds, uint32_t keys, float *dk, size_t dk_row) {
  const float *q_first = q_strip + first * LANES, *q_second = q_first + r->gap * LANES;
  RA_ROLLED
  for (uint32_t n = 0; n < keys; n += KEYS, ds += KEYS * CHUNK, window -= KEYS, dk += KEYS * dk_row) {
    f32x4 sum[KEYS][2];
    RA_UNROLLED
    for (int m = 0; m < KEYS; m++) sum[m][0] = sum[m][1] = f32x4_splat(0);
    RA_ROLLED
    for (uint32_t c = 0; c < CHUNK; c += 4) {
      size_t at = c / LANES * strip_size + c % LANES;
      f32x4 q1 = f32x4_load(q_first + at), q2 = f32x4_load(q_second + at);
      RA_UNROLLED
      for (int m = 0; m < KEYS; m++) {
        f32x4 cosine = f32x4_load(window + c - m), sine = f32x4_load(window + r->width + c - m);
        f32x4 ds_m = f32x4_load(ds + m * CHUNK + c);
        sum[m][0] = f32x4_madd(ds_m, f32x4_nmadd(q2, sine, f32x4_mul(q1, cosine)), sum[m][0]);
        sum[m][1] = f32x4_madd(ds_m, f32x4_madd(q2, cosine, f32x4_mul(q1, sine)), sum[m][1]);
      }
    }
    RA_UNROLLED
    for (int m = 0; m < KEYS; m++) {
      float *dk_m = dk + (uint32_t)m * dk_row + first;
      dk_m[0] += f32x4_sum(sum[m][0]), dk_m[r->gap] += f32x4_sum(sum[m][1]);
    }
  }
}

void ra_relative_keys(const ra_relative *r, const float *q_strip, size_t strip_size, const float *ds, uint32_t i,
                      uint32_t key0, uint32_t panels, float *dk, size_t dk_row) {
  const uint32_t *group = r->of_keys;
  const float *window = r->window + column_of(r, i, key0);
  for (uint32_t p = 0; p < r->half; p++)
    turned_key_gradient(r, p * r->step, q_strip, strip_size, window + 3 * p * r->width, ds, panels * PANEL, dk, dk_row);
  for (uint32_t g = 0; g < r->key_groups; g++, group += 2 + 2 * group[1])
    if (g >= 2 * r->half) key_gradient(group, q_strip, strip_size, window, ds, panels * PANEL, dk + group[0], dk_row);
}

// --- Gradient by the weights --------------------------------------------------------------------------------------------
//
// x_ij = ds_ij q_ia is to be summed along its diagonals i - j = t, times k_jb. A vector holds the queries 4 c .. 4 c +
// 3, and keys are taken in four classes j = 4 m + r: within a class the same vector of diagonals, 4 (c - m) - r .. + 3,
// comes again and again for c - m fixed, so that sums stay in registers. Four arrays of sums, one for each r, are added
// up at the end, each shifted by its r.

// x [keys][32], zeros up to the next multiple of four keys.
RA_KERNEL void multiply_queries(const float *q, size_t strip_size, const float *ds, uint32_t keys, float *x) {
  f32x4 lanes[CHUNK / 4];
  for (uint32_t c = 0; c < CHUNK / 4; c++) lanes[c] = f32x4_load(q + c / 2 * strip_size + c % 2 * 4);
  for (uint32_t n = 0; n < keys; n++)
    for (uint32_t c = 0; c < CHUNK / 4; c++, x += 4, ds += 4) f32x4_store(x, f32x4_mul(lanes[c], f32x4_load(ds)));
  ra_fill(x, (4 - keys % 4) % 4 * CHUNK, 0);
}

// sums[r][4 (c - m + fours - 1) ..], r < 4, of x [4 fours][32] times k [4 fours].
RA_KERNEL void sum_diagonals(const float *x, const float *k, uint32_t fours, float *sums, size_t sums_row) {
  for (uint32_t slot = 0; slot < fours + CHUNK / 4 - 1; slot++, sums += 4) {
    uint32_t m = slot < fours ? fours - 1 - slot : 0, c = slot < fours ? 0 : slot - (fours - 1);
    f32x4 sum[4];
    RA_UNROLLED
    for (int r = 0; r < 4; r++) sum[r] = f32x4_splat(0);
    RA_ROLLED
    for (; m < fours && c < CHUNK / 4; m++, c++) {
      const float *x_m = x + (size_t)m * 4 * CHUNK + c * 4, *k_m = k + m * 4;
      RA_UNROLLED
      for (int r = 0; r < 4; r++) sum[r] = f32x4_madd(f32x4_load(x_m + r * CHUNK), f32x4_load_splat(k_m + r), sum[r]);
    }
    RA_UNROLLED
    for (int r = 0; r < 4; r++) f32x4_store(sums + (size_t)r * sums_row, sum[r]);
  }
}

// to[n] += factor (sums[0][n] + sums[1][n + 1] + sums[2][n + 2] + sums[3][n + 3])
RA_KERNEL void add_classes(const float *sums, size_t sums_row, size_t count, float factor, float *to) {
  size_t n = 0;
  for (; n + 4 <= count; n += 4, sums += 4) {
    f32x4 low = f32x4_add(f32x4_load(sums), f32x4_load(sums + sums_row + 1));
    f32x4 high = f32x4_add(f32x4_load(sums + 2 * sums_row + 2), f32x4_load(sums + 3 * sums_row + 3));
    f32x4_store(to + n, f32x4_madd(f32x4_splat(factor), f32x4_add(low, high), f32x4_load(to + n)));
  }
  for (; n < count; n++, sums++)
    to[n] += factor * ((sums[0] + sums[sums_row + 1]) + (sums[2 * sums_row + 2] + sums[3 * sums_row + 3]));
}

void ra_relative_weights(const ra_relative *r, const float *q_strip, size_t strip_size, const float *k_panel,
                         const float *ds, uint32_t i, uint32_t key0, uint32_t panels, float factor, float *dweights) {
  uint32_t keys = panels * PANEL, fours = ra_ceil_div(keys, 4), sums = 4 * fours + CHUNK - 4;
  size_t row = PAD + sums + PAD;
  // sums[0][0] belongs to this place of the table; what is before the table or behind it is 0
  int64_t first = (int64_t)i - key0 - 4 * ((int64_t)fours - 1) + (int64_t)r->before;
  int64_t from = first < PAD - 1 ? -first : 1 - PAD, end = (int64_t)r->diagonals - first;
  if (end > sums) end = sums;
  ra_fill(r->sums, 4 * row, 0);
  ra_fill(r->column, keys + PAD, 0);
  const uint32_t *at = r->of_queries;
  for (uint32_t g = 0; g < r->query_groups; g++) {
    uint32_t a = at[0], count = at[1];
    multiply_queries(q_strip + a, strip_size, ds, keys, r->products);
    at += 2;
    for (uint32_t e = 0; e < count; e++, at += 2) {
      for (uint32_t n = 0; n < panels; n++)
        memcpy(r->column + n * PANEL, k_panel + n * r->panel_size + at[0], PANEL * sizeof(float));
      sum_diagonals(r->products, r->column, fours, r->sums + PAD, row);
      float *to = dweights + at[1] / r->width * r->diagonals + first + from;
      add_classes(r->sums + PAD + from, row, (size_t)(end - from), factor, to);
    }
  }
}
