// SPDX-License-Identifier: MIT
//
// Polynomial attention: exp(s) ~ p(s) = sum_m c_m s^m of degree g, so that the weights A_ij = phi(x_i)^T W phi(y_j) have
// rank C(D + g, g) and every product with A goes through a state of that many rows.
// O(N rank (Dv + 1)) time, O(rank Dv) workspace whatever N is, forward and backward.
//
//   x_i = scale R q_i,   y_j = R k_j - mean,   u_j = [v_j - mean, 1]
//
// The means change nothing in softmax attention (x.mean is a constant of a row; v's mean comes back at the end) and make
// scores and sums smaller. Forward:
//
//   Z = W sum_j phi(y_j) u_j^T   over the keys seen so far;   [numerator, denominator]_i = phi(x_i)^T Z
//
// Causal, or in a window: queries go in chunks of 32. Keys that all queries of a chunk see come through Z, which keys leave as
// they joined it; the others, at the edges of what the queries see, are done exactly, with exp. Backward is the derivative of
// exactly this function, c_m held fixed. With h_i = [dout_i, -dout_i.out_i] / denominator_i the gradient by A_ij is
// h_i.u_j, and so
//
//   dphi(x_i) = Z h_i                       a sweep forwards, with the same Z
//   Y = W sum_i phi(x_i) h_i^T,   dphi(y_j) = Y u_j,   du_j = Y^T phi(y_j)      a sweep backwards
//
// and the Jacobian of phi takes dphi to dx, dy. Nothing of size N x rank is ever stored. So dx and dy go by p', and du may too.
//
// ALiBi, causal: exp(-m (i - j)) = exp(-m (i - r)) exp(-m (r - j)), so Z decays by exp(-m (r' - r)) as its origin r goes on,
// and tokens join it, or read it, with such a factor. For dm = sum_ij dS_ij (j - i) there is a second state, of keys
// times j - r. Rows of dS add up to 0, so that any r may stand for i.
//
// Any bias b(i - j) whose exponential is, from some distance on, a sum of a few decays, exp(b(t)) ~ sum_e c_e
// exp(-lambda_e t): as many such states side by side, of the same features. u and h become wider, each once for every
// rate, times its factor; what the states give adds up. Nearer pairs are done exactly, with the bias itself. Its
// gradient is sums of their dS, and for the distances beyond them and a chunk correlations (lags.h).
//
// Queries whose mean m says much are centred: exp(x.y) = exp((x - m).y) exp(m.y), the second factor a number of the
// key, which goes with u. Like the coefficients m is held fixed.
//
// Outliers, rows whose scores are too large for p, are left out of the states and of the mean and done exactly (pairs.c).
//
// This work is based on:
//   Alman, Song. Fast Attention Requires Bounded Entries. 2023 (2302.13214): forward
//   Cao, Huo, Liang, Shi, Song. RoPE Attention Can Be Trained in Almost Linear Time. 2024 (2412.17316v3): gradient; h u^T is its
//   beta - rowsum(s o beta), dA o A its gamma
//   Katharopoulos et al. Transformers are RNNs. 2020 (2006.16236): running states for causal feature attention

#include <float.h>
#include <math.h>
#include <string.h>

#include "elementary.h"
#include "pack.h"
#include "polynomial.h"
#include "products.h"
#include "softmax.h"
#include "tile.h"

enum {
  CHUNK = RA_CHUNK,
  UNIT = 256, // tokens of a unit
};

// Query heads that share a state: a group, but with slopes or biases of their own none.
static uint32_t sharing(const ra_problem *p) {
  return p->alibi || (p->decay_count > 0 && p->bias_heads > 1) ? 1 : ra_group(p);
}

ra_polynomial ra_polynomial_arrange(const ra_problem *p, uint32_t pass, ra_workspace_cursor *w) {
  ra_polynomial e = {.p = p, .D = p->head_dim, .Dv = p->value_dim};
  size_t rank = ra_rank(p->head_dim, p->degree);
  if (rank == RA_SIZE_OVERFLOW) {
    w->overflow = 1;
    return e;
  }
  e.rank = rank;
  e.Dp = (e.D + 7) / 8 * 8;
  e.Dvp = (e.Dv + 7) / 8 * 8;
  e.columns = e.Dvp + 1;
  e.row = e.Dvp + 4;
  e.decaying = p->alibi || p->decay_count > 0;
  e.decays = p->decay_count > 1 ? p->decay_count : 1;
  e.z_columns = e.decays * e.columns;
  e.z_row = e.decays > 1 ? e.decays * e.Dvp + 8 : e.row; // the ones as another eight columns
  e.q_row = ra_row(p, p->heads, e.D);
  e.k_row = ra_row(p, p->kv_heads, e.D);
  e.v_row = ra_row(p, p->kv_heads, e.Dv);
  e.out_row = ra_row(p, p->heads, e.Dv);
  e.state = ra_take(w, 1, 1, sizeof(ra_polynomial_state));
  uint32_t *tail = ra_take(w, 1, ra_features_cells(p->head_dim, p->degree), sizeof(uint32_t));
  size_t lower = p->degree == 0 ? 1 : ra_rank(p->head_dim, p->degree - 1);
  e.q_space = ra_take(w, 1, ra_rotary_bytes(p), 1);
  e.k_space = ra_take(w, 1, ra_rotary_bytes(p), 1);
  e.weights = ra_take_floats(w, rank, 1);
  e.run = ra_take(w, rank, 1, 1);
  if (pass != RA_STREAM) e.z = ra_take_floats(w, rank, e.z_row);
  if (pass == RA_BACKWARD && p->alibi) e.moment = ra_take_floats(w, rank, e.z_row);
  e.k_mean = ra_take_floats(w, 1, e.Dp);
  e.v_mean = ra_take_floats(w, 1, e.Dvp);
  e.q_mean = ra_take_floats(w, 1, e.Dp);
  e.lower = ra_take_floats(w, lower, CHUNK);
  e.block = ra_take_floats(w, RA_ROW_BLOCK, CHUNK);
  e.x_rows = ra_take_floats(w, CHUNK, e.Dp);
  e.y_rows = ra_take_floats(w, CHUNK, e.Dp);
  e.x_t = ra_take_floats(w, e.Dp, CHUNK);
  e.y_t = ra_take_floats(w, e.Dp, CHUNK);
  e.u_rows = ra_take_floats(w, CHUNK, e.row);
  e.sum_t = ra_take_floats(w, e.columns, CHUNK);
  if (e.decaying) {
    e.factors = ra_take_floats(w, e.decays, CHUNK);
    e.z_factors = ra_take_floats(w, e.z_row, 1);
    e.z_rows = ra_take_floats(w, CHUNK, e.z_row);
    e.z_t = ra_take_floats(w, e.z_columns, CHUNK);
  }
  e.a = ra_take_floats(w, CHUNK, CHUNK);
  e.reference = ra_take_floats(w, CHUNK, 1);
  e.far_y = ra_take_floats(w, p->outlier_key_count, e.Dp);
  e.far_u = ra_take_floats(w, p->outlier_key_count, e.row);
  if (pass == RA_BACKWARD) {
    e.h_rows = ra_take_floats(w, CHUNK, e.row);
    e.h_t = ra_take_floats(w, e.columns, CHUNK);
    e.da = ra_take_floats(w, CHUNK, CHUNK);
    e.dlower = ra_take_floats(w, lower, CHUNK);
    e.dblock = ra_take_floats(w, RA_ROW_BLOCK, CHUNK);
    e.dx_t = ra_take_floats(w, e.Dp, CHUNK);
    e.d_rows = ra_take_floats(w, CHUNK, e.Dp > e.row ? e.Dp : e.row);
  }
  if (pass == RA_BACKWARD && p->decay_count > 0) {
    e.near_lags = ra_take(w, ra_lags_from(p), 1, sizeof(double));
    if (ra_lags_units(p) > 0) e.lags = ra_lags_arrange(p, sharing(p), w);
  }
  if (w->base) ra_features_init(&e.f, p->head_dim, p->degree, tail);
  return e;
}

static void layout(const ra_problem *p, uint32_t pass, ra_workspace_cursor *w) { ra_polynomial_arrange(p, pass, w); }

// --- Products -----------------------------------------------------------------------------------------------------

// c[r][32] = sum_d a[r][d] * b[d][32]: dphi from state and h
static void set_rows(const float *a, size_t a_row, uint32_t rows, const float *b, uint32_t columns, float *c) {
  for (uint32_t i = 0; i < CHUNK; i += 8) ra_set_rows(a, a_row, rows, b + i, CHUNK, columns, c + i, CHUNK);
}

// z[r][0] += w_r f[r].column, four rows at a time: the sums of four rows are the lanes of one vector.
RA_KERNEL void add_column_to_state(const float *weights, const float *f, uint32_t rows, const float *column, float *z,
                                   size_t z_row) {
  float sums[4];
  RA_ROLLED
  for (uint32_t r = 0; r < rows; r += 4) {
    uint32_t last = ra_min_u32(4, rows - r) - 1;
    f32x4 even[4], odd[4];
    RA_UNROLLED
    for (uint32_t n = 0; n < 4; n++) even[n] = odd[n] = f32x4_splat(0);
    const float *row[4];
    RA_UNROLLED
    for (uint32_t n = 0; n < 4; n++) row[n] = f + (size_t)ra_min_u32(r + n, r + last) * CHUNK;
    RA_ROLLED
    for (uint32_t i = 0; i < CHUNK; i += 8) {
      f32x4 u0 = f32x4_load(column + i), u1 = f32x4_load(column + i + 4);
      RA_UNROLLED
      for (uint32_t n = 0; n < 4; n++) {
        even[n] = f32x4_madd(f32x4_load(row[n] + i), u0, even[n]);
        odd[n] = f32x4_madd(f32x4_load(row[n] + i + 4), u1, odd[n]);
      }
    }
    RA_UNROLLED
    for (uint32_t n = 0; n < 4; n++) even[n] = f32x4_add(even[n], odd[n]);
    f32x4_transpose(even, even + 1, even + 2, even + 3);
    f32x4_store(sums, f32x4_add(f32x4_add(even[0], even[1]), f32x4_add(even[2], even[3])));
    for (uint32_t n = 0; n <= last; n++) z[(r + n) * z_row] += weights[r + n] * sums[n];
  }
}

// z[r] += w_r sum_i f[r][i] u[i]: a chunk joins the state, of which these are columns, a multiple of 8 of them.
RA_KERNEL void add_to_state(const float *weights, const float *f, uint32_t rows, const float *u, size_t u_row,
                            uint32_t columns, float *z) {
  f32x4 zero = f32x4_splat(0);
  ra_tile t;
  for (uint32_t d = 0; d < columns; d += 8) {
#define STEP(R)                                                                                                        \
  ra_tile_multiply(&t, R, zero, zero, CHUNK, f + (size_t)r * CHUNK, 1, CHUNK, u + d, u_row);                           \
  RA_UNROLLED                                                                                                          \
  for (int n = 0; n < R; n++) {                                                                                        \
    f32x4 w = f32x4_load_splat(weights + r + n);                                                                       \
    float *z_r = z + (r + (uint32_t)n) * u_row + d;                                                                    \
    f32x4_store(z_r, f32x4_madd(w, t.c[n][0], f32x4_load(z_r)));                                                       \
    f32x4_store(z_r + 4, f32x4_madd(w, t.c[n][1], f32x4_load(z_r + 4)));                                               \
  }
    RA_IN_STEPS(r, rows, STEP);
#undef STEP
  }
}

// --- Blocks of rows -----------------------------------------------------------------------------------------------

// The features row0 .. of the tokens x_t: stored rows, or a block made now. *count is 48 or what is left.
static const float *rows_at(const ra_polynomial *e, const float *x_t, uint32_t row0, uint32_t *count) {
  uint32_t end = row0 < e->f.lower ? e->f.lower : e->f.rank;
  *count = ra_min_u32(RA_ROW_BLOCK, end - row0);
  if (row0 < e->f.lower) return e->lower + (size_t)row0 * CHUNK;
  ra_features_block(&e->f, x_t, e->lower, row0, *count, e->block);
  return e->block;
}

void ra_read_state(const ra_polynomial *e, const float *x_t, uint32_t tokens, float *sums) {
  for (uint32_t row0 = 0, count; row0 < e->f.rank; row0 += count) {
    const float *f = rows_at(e, x_t, row0, &count), *z = e->z + (size_t)row0 * e->z_row;
    for (uint32_t i = 0; i < tokens; i += 8)
      ra_add_columns(z, e->z_row, e->z_columns, f + i, CHUNK, count, sums + i, CHUNK);
  }
}

void ra_update_state(const ra_polynomial *e, const float *x_t, const float *rows) {
  int one = e->decays == 1; // behind the values; more are columns like these
  uint32_t columns = one ? e->Dvp : e->z_row;
  float column[CHUNK];
  for (uint32_t i = 0; i < CHUNK && one; i++) column[i] = rows[i * e->z_row + columns];
  for (uint32_t row0 = 0, count; row0 < e->f.rank; row0 += count) {
    const float *f = rows_at(e, x_t, row0, &count), *weights = e->weights + row0;
    float *z = e->z + (size_t)row0 * e->z_row;
    add_to_state(weights, f, count, rows, e->z_row, columns, z);
    if (one) add_column_to_state(weights, f, count, column, z + columns, e->z_row);
  }
}

// Of some rows, whose features are f, sum_ij dS_ij (j - r) over the keys of Z and the queries of a chunk: phi(x_i).(moment h_i)
static double moment_of_rows(const ra_polynomial *e, const float *f, uint32_t row0, uint32_t count, const float *h_t,
                             float *space) {
  set_rows(e->moment + (size_t)row0 * e->z_row, e->z_row, count, h_t, e->z_columns, space);
  return ra_dot(f, space, (size_t)count * CHUNK);
}

// sum of the terms of f, y [count][32] and `distance` [32]
static float inner_at(const float *f, const float *y, const float *distance, uint32_t count) {
  f32x4 sum = f32x4_splat(0);
  for (uint32_t c = 0; c < CHUNK; c += 4) {
    f32x4 own = f32x4_splat(0);
    for (size_t n = c; n < (size_t)count * CHUNK; n += CHUNK)
      own = f32x4_madd(f32x4_load(f + n), f32x4_load(y + n), own);
    sum = f32x4_madd(f32x4_load(distance + c), own, sum);
  }
  return f32x4_sum(sum);
}

// dx_t += J(x)^T (z h_t): through the features that the state was read with; h_t [z_columns][32]. With slopes, and
// queries that are `distance` [32] ahead of r (else NULL), returns over the keys of Z and these
// sum_ij dS_ij (j - i) = sum_ij dS_ij (j - r) - sum_i distance_i phi(x_i).(z h_i).
RA_KERNEL double read_state_backward(const ra_polynomial *e, const float *x_t, const float *h_t,
                                     const float *distance) {
  const ra_features *f = &e->f;
  double sum = 0;
  if (distance) sum += moment_of_rows(e, e->lower, 0, f->lower, h_t, e->dlower);
  set_rows(e->z, e->z_row, f->lower, h_t, e->z_columns, e->dlower);
  if (distance) sum -= inner_at(e->lower, e->dlower, distance, f->lower);
  for (uint32_t row0 = f->lower, count; row0 < f->rank; row0 += count) {
    count = ra_min_u32(RA_ROW_BLOCK, f->rank - row0);
    if (distance) {
      ra_features_block(f, x_t, e->lower, row0, count, e->block);
      sum += moment_of_rows(e, e->block, row0, count, h_t, e->dblock);
    }
    set_rows(e->z + (size_t)row0 * e->z_row, e->z_row, count, h_t, e->z_columns, e->dblock);
    if (distance) sum -= inner_at(e->block, e->dblock, distance, count);
    ra_features_block_backward(f, x_t, e->lower, row0, count, e->dblock, e->dlower, e->dx_t);
  }
  ra_features_lower_backward(f, x_t, e->lower, e->dlower, e->dx_t);
  return sum;
}

// --- Chunks -------------------------------------------------------------------------------------------------------

void ra_turn(const ra_polynomial *e, float *rows, uint32_t count, float *t) {
  ra_fill(rows + (size_t)count * e->Dp, (size_t)(CHUNK - count) * e->Dp, 0);
  ra_transpose(rows, e->Dp, CHUNK, e->Dp, t, CHUNK);
}

void ra_turn_queries(const ra_polynomial *e, uint32_t count) {
  ra_turn(e, e->x_rows, count, e->x_t);
  for (uint32_t d = 0; d < e->D && e->state->centred; d++) {
    f32x4 mean = f32x4_load_splat(e->q_mean + d);
    for (uint32_t c = 0; c < CHUNK; c += 4)
      f32x4_store(e->x_t + d * CHUNK + c, f32x4_sub(f32x4_load(e->x_t + d * CHUNK + c), mean));
  }
}

void ra_live_tokens(uint32_t count, uint32_t outliers, float *live) {
  for (uint32_t i = 0; i < CHUNK; i++) live[i] = i < count && !(outliers >> i & 1) ? 1.0f : 0.0f;
}

void ra_load_queries(const ra_polynomial *e, const float *q, uint32_t i, uint32_t count, int features) {
  float live[CHUNK];
  ra_rotary_rows(&e->state->q_rotary, q + i * e->q_row, e->q_row, e->x_rows, e->Dp, count, i, RA_ROTATE, e->p->scale);
  ra_turn_queries(e, count);
  if (!features) return;
  ra_live_tokens(count, 0, live);
  ra_features_lower(&e->f, e->x_t, live, e->lower);
}

// y_rows less the mean key, u_rows; the rest of 32 tokens zeroed.
RA_KERNEL void centre_keys(const ra_polynomial *e, const float *v, uint32_t count) {
  uint32_t Dv = e->Dv;
  f32x4 zero = f32x4_splat(0);
  ra_fill(e->u_rows + (size_t)count * e->row, (size_t)(CHUNK - count) * e->row, 0);
  for (uint32_t n = 0; n < count; n++, v += e->v_row) {
    float *y = e->y_rows + n * e->Dp, *u = e->u_rows + n * e->row;
    for (uint32_t d = 0; d < e->Dp; d += 4) f32x4_store(y + d, f32x4_sub(f32x4_load(y + d), f32x4_load(e->k_mean + d)));
    for (uint32_t d = Dv / 4 * 4; d < e->row; d += 4) f32x4_store(u + d, zero);
    for (uint32_t d = 0; d + 4 <= Dv; d += 4)
      f32x4_store(u + d, f32x4_sub(f32x4_load(v + d), f32x4_load(e->v_mean + d)));
    for (uint32_t d = Dv / 4 * 4; d < Dv; d++) u[d] = v[d] - e->v_mean[d];
    u[e->Dvp] = 1;
    if (!e->state->centred) continue;
    for (uint32_t d = e->D; d < e->Dp; d++) y[d] = 0; // nobody else looks there
    f32x4 gain = f32x4_splat((float)ra_exp_f64(ra_dot(e->q_mean, y, e->Dp)));
    for (uint32_t d = 0; d < e->row; d += 4) f32x4_store(u + d, f32x4_mul(gain, f32x4_load(u + d)));
  }
}

void ra_load_keys(const ra_polynomial *e, const ra_arrays *x, size_t kv, uint32_t j, uint32_t count, int features) {
  const ra_problem *p = e->p;
  ra_loaded loaded = {kv, j, count}, *there = &e->state->loaded;
  if (there->kv != kv || there->j != j || there->count != count) {
    const float *k = x->k + ra_head(p, kv, p->kv_heads, p->key_length, e->D) + j * e->k_row;
    ra_rotary_rows(&e->state->k_rotary, k, e->k_row, e->y_rows, e->Dp, count, j, RA_ROTATE, 1.0f);
    centre_keys(e, x->v + ra_head(p, kv, p->kv_heads, p->key_length, e->Dv) + j * e->v_row, count);
    *there = loaded;
  }
  if (!features) return;
  float live[CHUNK];
  uint32_t outliers = ra_outlier_bits(ra_outlier_keys(p, kv), 1, 0, j, count);
  ra_turn(e, e->y_rows, count, e->y_t);
  for (uint32_t n = 0; n < count; n++)
    for (uint32_t d = 0; d < e->Dp && (outliers >> n & 1); d++) e->y_t[d * CHUNK + n] = 0;
  ra_live_tokens(count, outliers, live);
  ra_features_lower(&e->f, e->y_t, live, e->lower);
}

// --- Decays -------------------------------------------------------------------------------------------------------

static void take_decays(const ra_polynomial *e, size_t head) {
  const ra_problem *p = e->p;
  ra_decays *d = &e->state->decays;
  size_t own = p->bias_heads > 1 ? head % p->heads : 0;
  *d = (ra_decays){.weight = {1}};
  if (p->alibi) d->rate[0] = p->alibi[head % p->heads];
  if (p->decay_count > 0) d->from = p->decay_from, d->top = p->decay_tops[own];
  for (uint32_t n = 0; n < p->decay_count; n++) {
    d->rate[n] = p->decay_rates[own * p->decay_count + n];
    d->weight[n] = p->decay_weights[own * p->decay_count + n];
  }
  d->least = d->rate[0];
  for (uint32_t n = 0; n < e->decays; n++) {
    d->least = fmin(d->least, d->rate[n]), d->most = fmax(d->most, d->rate[n]);
    for (uint32_t t = 0; t < RA_DECAY_STEPS; t++) d->steps[n][t] = (float)ra_exp_f64(-d->rate[n] * t);
  }
}

// exp(-rate distance), a whole distance
static float decay(const ra_decays *d, uint32_t n, double distance) {
  return distance >= 0 && distance < RA_DECAY_STEPS ? d->steps[n][(uint32_t)distance]
                                                    : (float)ra_exp_f64(-d->rate[n] * distance);
}

// Positions by which all keys of query i are farther than `from`; what that takes off all its scores, by the smallest
// rate, is in no weight, so that these do not vanish.
static double excess(const ra_polynomial *e, uint32_t i) {
  int64_t distance = (int64_t)i + e->p->query_offset - ((int64_t)ra_key_limit(e->p, i) - 1) - e->state->decays.from;
  return e->decaying && distance > 0 ? (double)distance : 0;
}

static double beyond(const ra_polynomial *e, uint32_t i) { return e->state->decays.least * excess(e, i); }

// factors of keys j .. j + count - 1, of queries i .. i + count - 1; 0 of the rest of a chunk
static void set_key_factors(const ra_polynomial *e, uint32_t j, uint32_t count) {
  const ra_decays *d = &e->state->decays;
  for (uint32_t s = 0; e->decaying && s < e->decays; s++)
    for (uint32_t n = 0; n < CHUNK; n++)
      e->factors[s * CHUNK + n] = n < count ? decay(d, s, (double)e->state->origin - j - n) : 0;
}

static void set_query_factors(const ra_polynomial *e, uint32_t i, uint32_t count) {
  const ra_decays *d = &e->state->decays;
  for (uint32_t n = 0; e->decaying && n < CHUNK; n++) {
    double past = n < count ? excess(e, i + n) : 0;
    double distance = (double)i + n + e->p->query_offset - e->state->origin - d->from - past;
    for (uint32_t s = 0; s < e->decays; s++) {
      float farther = past > 0 ? (float)ra_exp_f64((d->least - d->rate[s]) * past) : 1;
      e->factors[s * CHUNK + n] = n < count ? (float)d->weight[s] * decay(d, s, distance) * farther : 0;
    }
  }
}

// rows [32][row] as the state takes them: once for each rate, times factors.
RA_KERNEL const float *widen(const ra_polynomial *e, const float *rows) {
  if (!e->decaying) return rows;
  for (uint32_t n = 0; n < CHUNK; n++) {
    float *z = e->z_rows + n * e->z_row, *ones = z + e->decays * e->Dvp;
    ra_fill(ones, e->z_row - e->decays * e->Dvp, 0);
    for (uint32_t s = 0; s < e->decays; s++) {
      f32x4 factor = f32x4_load_splat(e->factors + s * CHUNK + n);
      for (uint32_t d = 0; d < e->Dvp; d += 4)
        f32x4_store(z + s * e->Dvp + d, f32x4_mul(factor, f32x4_load(rows + n * e->row + d)));
      ones[s] = e->factors[s * CHUNK + n] * rows[n * e->row + e->Dvp];
    }
  }
  return e->z_rows;
}

// Their columns, of h_rows or u_rows, for the way back through the state; rows_t [columns][32] has those of the rows.
static const float *widen_columns(const ra_polynomial *e, const float *rows, const float *rows_t) {
  if (!e->decaying) return rows_t;
  ra_transpose(widen(e, rows), e->z_row, CHUNK, e->z_columns, e->z_t, CHUNK);
  return e->z_t;
}

// sum_t += what the states give, times factors
RA_KERNEL void read_states(const ra_polynomial *e, const float *x_t, uint32_t tokens) {
  ra_fill(e->z_t, (size_t)e->z_columns * CHUNK, 0);
  ra_read_state(e, x_t, tokens, e->z_t);
  for (uint32_t s = 0; s < e->decays; s++)
    for (uint32_t c = 0; c < e->columns; c++) {
      const float *from = e->z_t + (size_t)(c < e->Dvp ? s * e->Dvp + c : e->decays * e->Dvp + s) * CHUNK;
      for (uint32_t i = 0; i < CHUNK; i += 4) {
        float *sum = e->sum_t + c * CHUNK + i;
        f32x4 factor = f32x4_load(e->factors + s * CHUNK + i);
        f32x4_store(sum, f32x4_madd(factor, f32x4_load(from + i), f32x4_load(sum)));
      }
    }
}

static void read_decayed(const ra_polynomial *e, const float *x_t, uint32_t tokens) {
  if (e->decaying) read_states(e, x_t, tokens);
  else ra_read_state(e, x_t, tokens, e->sum_t);
}

static void clear_state(const ra_polynomial *e) {
  ra_fill(e->z, (size_t)e->f.rank * e->z_row, 0);
  if (e->moment) ra_fill(e->moment, (size_t)e->f.rank * e->z_row, 0);
  e->state->gone = 0;
}

// The origin of the state goes to another key: away from those in Z, or towards those that Y is for. `moment` may be NULL.
RA_KERNEL void move_origin(const ra_polynomial *e, uint32_t origin, float *moment) {
  double step = (double)origin - e->state->origin;
  f32x4 steps = f32x4_splat((float)-step);
  e->state->origin = origin;
  if (step == 0 || !e->decaying || (e->state->decays.most == 0 && !moment)) return;
  ra_fill(e->z_factors, e->z_row, 0);
  for (uint32_t s = 0; s < e->decays; s++) {
    float factor = decay(&e->state->decays, s, fabs(step));
    ra_fill(e->z_factors + s * e->Dvp, e->Dvp, factor);
    e->z_factors[e->decays * e->Dvp + s] = factor;
  }
  for (size_t r = 0; r < e->f.rank; r++)
    for (uint32_t c = 0; c < e->z_row; c += 4) {
      size_t n = r * e->z_row + c;
      f32x4 factor = f32x4_load(e->z_factors + c), z = f32x4_mul(f32x4_load(e->z + n), factor);
      f32x4_store(e->z + n, z);
      if (moment) f32x4_store(moment + n, f32x4_madd(steps, z, f32x4_mul(f32x4_load(moment + n), factor)));
    }
}

// The keys j .. j + count - 1 in z_rows, whose features are there, times j - r.
static void add_moment(const ra_polynomial *e, uint32_t j, uint32_t count) {
  ra_polynomial of_moment = *e;
  of_moment.z = e->moment;
  for (uint32_t n = 0; n < count; n++)
    for (uint32_t d = 0; d < e->z_columns; d++)
      e->z_rows[n * e->z_row + d] *= (float)((double)j + n - e->state->origin);
  ra_update_state(&of_moment, e->y_t, e->z_rows);
}

static void negate(float *rows, size_t count) {
  for (size_t n = 0; n < count; n++) rows[n] = -rows[n];
}

// Keys join the state, or leave it.
RA_KERNEL void add_keys(const ra_polynomial *e, const ra_arrays *x, size_t kv, ra_range keys, int leave) {
  for (uint32_t j = keys.first, count; j < keys.end; j += count) {
    count = ra_min_u32(CHUNK, keys.end - j);
    ra_load_keys(e, x, kv, j, count, 1);
    if (leave) negate(e->u_rows, (size_t)CHUNK * e->row), ra_forget_keys(e);
    set_key_factors(e, j, count);
    ra_update_state(e, e->y_t, widen(e, e->u_rows));
    if (e->moment) add_moment(e, j, count);
  }
}

// The state becomes that of these keys, which rise from call to call.
static void move_state(const ra_polynomial *e, const ra_arrays *x, size_t kv, ra_range keys) {
  ra_polynomial_state *s = e->state;
  if (keys.first >= keys.end) return;
  uint32_t staying = s->edge > keys.first ? s->edge - keys.first : 0, leaving = keys.first - s->first;
  if (staying == 0 || (leaving > 0 && ra_is_worn(s->gone, leaving, staying))) {
    clear_state(e);
    s->edge = keys.first;
    s->origin = keys.end - 1;
  } else {
    move_origin(e, keys.end - 1, e->moment);
    add_keys(e, x, kv, (ra_range){s->first, keys.first}, 1);
    s->gone += leaving;
  }
  s->first = keys.first;
  add_keys(e, x, kv, (ra_range){s->edge, keys.end}, 0);
  s->edge = keys.end;
}

// Entry n of what goes by i - j of the bias, less what the decays have it divided by, or ALiBi; 0 past the ends.
static double bias_at(const ra_polynomial *e, size_t head, int64_t n) {
  const ra_problem *p = e->p;
  if (n < 0 || n >= (int64_t)ra_diagonals(p)) return 0;
  if (p->alibi) return -ra_alibi(p, head, (size_t)n);
  size_t own = p->bias_heads > 1 ? head % p->heads * ra_diagonals(p) : 0;
  return p->bias[own + (size_t)n] - e->state->decays.top;
}

// What is added to the scores of a block of keys from j on, for the queries i .. i + count - 1.
static void add_biases(const ra_polynomial *e, size_t head, uint32_t i, uint32_t count, uint32_t j, ra_seen *seen) {
  double first = beyond(e, i);
  int64_t entry = (int64_t)i - j + (int64_t)e->p->key_length - CHUNK;
  for (uint32_t n = 0; n < 2 * CHUNK; n++) seen->bias[n] = (float)(bias_at(e, head, entry + n) + first);
  for (uint32_t n = 0; n < CHUNK; n++) seen->row[n] = n < count ? (float)(beyond(e, i + n) - first) : 0;
}

// Which of the keys j .. j + keys - 1 the queries i .. i + count - 1 of a head may see; `outliers`, done elsewhere,
// none. Until the next one is asked for.
static const ra_seen *seen_keys(const ra_polynomial *e, size_t head, uint32_t i, uint32_t count, uint32_t outliers,
                                uint32_t j, uint32_t keys) {
  ra_polynomial_state *s = e->state;
  ra_pattern pattern = {(int64_t)i - j, count, keys};
  int alike = !e->p->segments && !e->decaying && outliers == 0;
  int known = s->pattern.ahead == pattern.ahead && s->pattern.count == count && s->pattern.keys == keys;
  if (alike && known) return &s->seen;
  for (uint32_t n = 0; n < CHUNK; n++) {
    int sees = n < count && !(outliers >> n & 1);
    ra_see(&s->seen, n, sees ? ra_keys_of(e->p, i + n) : (ra_range){0, 0}, j, keys);
  }
  if (e->decaying) add_biases(e, head, i, count, j, &s->seen);
  else ra_fill(s->seen.row, CHUNK, 0);
  ra_see_strips(&s->seen);
  s->pattern = alike ? pattern : (ra_pattern){0, 0, 0};
  return &s->seen;
}

// What the queries i .. i + count - 1 of a chunk see beside the keys of its state: a range on either side, or all when there
// are none.
typedef struct edges {
  ra_range side[2];
} edges;

static edges edges_of(const ra_problem *p, uint32_t i, uint32_t count, ra_range state) {
  ra_range seen = {ra_keys_of(p, i).first, ra_key_limit(p, i + count - 1)};
  if (state.first >= state.end) return (edges){{seen, {0, 0}}};
  return (edges){{{seen.first, state.first}, {state.end, seen.end}}};
}

// The row constants x_i.mean that centring keys took off the scores.
RA_KERNEL void row_shifts(const ra_polynomial *e, float *shift) {
  for (uint32_t c = 0; c < CHUNK; c += 4) {
    f32x4 sum = f32x4_splat(e->state->shift);
    for (uint32_t d = 0; d < e->D; d++)
      sum = f32x4_madd(f32x4_load(e->x_t + d * CHUNK + c), f32x4_load_splat(e->k_mean + d), sum);
    f32x4_store(shift + c, sum);
  }
}

// --- Preparation --------------------------------------------------------------------------------------------------

// Means of the rotated keys, without outliers, and of the values, unless they are known; that of queries if it is.
RA_KERNEL void take_means(const ra_polynomial *e, const ra_arrays *x, size_t kv) {
  uint32_t Nk = e->p->key_length, plain = Nk - e->p->outlier_key_count;
  ra_outliers far = ra_outlier_keys(e->p, kv);
  ra_heads at = ra_heads_of(e, kv * ra_group(e->p));
  const float *k = x->k + at.k, *v = x->v + at.v;
  double k_sum[RA_MAX_HEAD_DIM] = {0}, v_sum[RA_MAX_HEAD_DIM] = {0};
  ra_forget_keys(e);
  ra_fill(e->k_mean, e->Dp, 0), ra_fill(e->v_mean, e->Dvp, 0), ra_fill(e->q_mean, e->Dp, 0);
  e->state->centred = 0, e->state->shift = 0;
  if (x->means) {
    const float *known = x->means + kv * ra_means(e->p), *q_mean = known + e->D + e->Dv;
    for (uint32_t d = 0; d < e->D; d++) {
      e->q_mean[d] = e->p->scale * q_mean[d];
      e->state->shift += e->q_mean[d] * known[d];
      if (e->q_mean[d] != 0) e->state->centred = 1;
    }
    memcpy(e->k_mean, known, e->D * sizeof *known), memcpy(e->v_mean, known + e->D, e->Dv * sizeof *known);
    return;
  }
  for (uint32_t j = 0; j < Nk; j += CHUNK) {
    uint32_t count = ra_min_u32(CHUNK, Nk - j);
    ra_rotary_rows(&e->state->k_rotary, k + j * e->k_row, e->k_row, e->y_rows, e->Dp, count, j, RA_ROTATE, 1.0f);
    ra_sum_rows(e->y_rows, e->Dp, count, e->D, ra_outlier_bits(far, 1, 0, j, count), k_sum);
    ra_sum_rows(v + j * e->v_row, e->v_row, count, e->Dv, 0, v_sum);
  }
  for (uint32_t d = 0; d < e->D && plain > 0; d++) e->k_mean[d] = (float)(k_sum[d] / plain);
  for (uint32_t d = 0; d < e->Dv; d++) e->v_mean[d] = (float)(v_sum[d] / Nk);
}

void ra_take_weights(const ra_polynomial *e, uint32_t kv) {
  ra_features_weights(&e->f, e->p->coefficients + (size_t)kv * (e->f.degree + 1), e->weights, e->run);
}

// --- Forward ------------------------------------------------------------------------------------------------------

uint32_t ra_normalise(const ra_polynomial *e, uint32_t count, float *lse) {
  f32x4 zero = f32x4_splat(0), least = f32x4_splat(FLT_MIN), most = f32x4_splat(3.4e38f);
  float shift[CHUNK], inverse[CHUNK];
  uint32_t bad = 0;
  row_shifts(e, shift);
  for (uint32_t n = 0; n < CHUNK; n += 4) {
    f32x4 sum = f32x4_load(e->sum_t + (size_t)e->Dvp * CHUNK + n), own = f32x4_max(least, f32x4_min(most, sum));
    f32x4 power = f32x4_add(f32x4_exponent(own), f32x4_load(e->reference + n));
    f32x4 log_n = f32x4_add(ra_log(f32x4_mantissa(own), power), f32x4_load(shift + n));
    f32x4 good = f32x4_where_less(sum, most, f32x4_div(f32x4_splat(1), own), zero); // of NaN too
    good = f32x4_where_less(sum, least, zero, good);
    f32x4_store(inverse + n, good);
    f32x4_store(lse + n, f32x4_where_less(zero, good, log_n, f32x4_splat(-INFINITY)));
  }
  for (uint32_t n = 0; n < count; n++) bad |= (uint32_t) !(inverse[n] > 0) << n;
  for (uint32_t d = 0; d < e->Dv; d++) {
    f32x4 mean = f32x4_load_splat(e->v_mean + d);
    for (uint32_t c = 0; c < CHUNK; c += 4) {
      float *at = e->sum_t + d * CHUNK + c;
      f32x4 inverse_c = f32x4_load(inverse + c), value = f32x4_madd(f32x4_load(at), inverse_c, mean);
      f32x4_store(at, f32x4_where_less(f32x4_splat(0), inverse_c, value, f32x4_splat(0)));
    }
  }
  return bad;
}

uint32_t ra_finish_chunk(const ra_polynomial *e, uint32_t i, uint32_t count, float *out, float *lse) {
  float own[CHUNK];
  uint32_t bad = ra_normalise(e, count, own);
  for (uint32_t n = 0; n < count && e->decaying; n++) own[n] += (float)(e->state->decays.top - beyond(e, i + n));
  memcpy(lse + i, own, count * sizeof *own);
  ra_transpose(e->sum_t, CHUNK, e->Dv, count, out + i * e->out_row, e->out_row);
  return bad;
}

// Those of the queries i .. i + count - 1 that see some key, bit n.
static uint32_t seeing_queries(const ra_problem *p, uint32_t i, uint32_t count) {
  uint32_t seeing = 0;
  for (uint32_t n = 0; n < count; n++) {
    ra_range keys = ra_keys_of(p, i + n);
    if (keys.first < keys.end) seeing |= 1u << n;
  }
  return seeing;
}

// The outliers among the queries i .. i + count - 1 of a head, bit n.
static uint32_t outlier_queries(const ra_problem *p, size_t head, uint32_t i, uint32_t count) {
  uint32_t group = ra_group(p);
  return ra_outlier_bits(ra_outlier_queries(p, head / group), group, (uint32_t)(head % group), i, count);
}

// Whether the state of these keys has something in it.
static int has_plain_keys(const ra_problem *p, size_t kv, ra_range keys) {
  return keys.first < keys.end &&
         ra_outliers_within(ra_outlier_keys(p, kv), keys.first, keys.end).count < keys.end - keys.first;
}

RA_KERNEL void forward_chunk(const ra_polynomial *e, const ra_arrays *x, size_t head, uint32_t i, uint32_t count) {
  const ra_problem *p = e->p;
  size_t kv = head / ra_group(p);
  ra_heads at = ra_heads_of(e, head);
  ra_range state = ra_state_keys(p, i);
  edges beside = edges_of(p, i, count, state);
  uint32_t outliers = outlier_queries(p, head, i, count);
  int reads = has_plain_keys(p, kv, state);
  ra_fill(e->sum_t, (size_t)e->columns * CHUNK, 0);
  ra_load_queries(e, x->q + at.q, i, count, reads);
  ra_begin_references(e, !reads);
  if (reads) {
    set_query_factors(e, i, count);
    read_decayed(e, e->x_t, count);
  }
  ra_add_outlier_keys(e, kv, state, outliers);
  for (int side = 0; side < 2; side++)
    for (uint32_t j = beside.side[side].first, keys; j < beside.side[side].end; j += keys) {
      keys = ra_min_u32(CHUNK, beside.side[side].end - j);
      const ra_seen *seen = seen_keys(e, head, i, count, outliers, j, keys);
      ra_load_keys(e, x, kv, j, keys, 0);
      ra_add_block(e, e->y_rows, e->u_rows, seen);
    }
  uint32_t bad = ra_finish_chunk(e, i, count, x->out + at.out, x->lse + at.lse) & ~outliers;
  if (bad && (bad & seeing_queries(p, i, count))) e->state->not_positive = 1;
}

// --- Backward -----------------------------------------------------------------------------------------------------

// What weights of queries are divided by, from lse [32], as references, powers of two, and inverse[32], what is left:
// 1/2 .. 1, or 0 of queries whose lse is -infinity, which count for nothing. live[32] as ra_load_gradients.
RA_KERNEL void take_denominators(const ra_polynomial *e, const float *lse, float *inverse, float *live) {
  const ra_exp2_constants *constants = ra_exp2_load();
  f32x4 zero = f32x4_splat(0), least = f32x4_splat(-FLT_MAX), weightless = f32x4_splat(-RA_MASKED);
  float shift[CHUNK];
  row_shifts(e, shift);
  for (uint32_t n = 0; n < CHUNK; n += 4) {
    f32x4 lse_n = f32x4_load(lse + n), natural = f32x4_sub(lse_n, f32x4_load(shift + n));
    f32x4 all = f32x4_mul(natural, f32x4_splat((float)RA_LOG2_E)), power = f32x4_floor(all),
          none = f32x4_sub(zero, power);
    f32x4 factor = ra_exp2(none, constants), rest = ra_exp2(f32x4_sub(power, all), constants);
    factor = f32x4_where_less(f32x4_splat(-126), power, factor, zero); // else there is no polynomial in it
    f32x4_store(e->reference + n, f32x4_where_less(lse_n, least, weightless, power)); // weights of nothing are 0
    f32x4_store(inverse + n, f32x4_where_less(lse_n, least, zero, rest));
    f32x4_store(live + n, f32x4_where_less(lse_n, least, zero, factor));
  }
}

void ra_load_gradients(const ra_polynomial *e, const float *out, const float *dout, size_t row, const float *lse,
                       uint32_t count, uint32_t outliers, float *live) {
  float own[CHUNK], inverse[CHUNK];
  uint32_t whole = e->Dv / 4 * 4;
  f32x4 zero = f32x4_splat(0);
  for (uint32_t n = 0; n < CHUNK; n++) own[n] = n < count && !(outliers >> n & 1) ? lse[n] : -INFINITY;
  take_denominators(e, own, inverse, live);
  for (uint32_t n = 0; n < CHUNK; n += 4) { // delta = out.dout of four, as lanes of one vector
    f32x4 sums[4];
    float delta[4], rest[4] = {0};
    for (uint32_t m = 0; m < 4; m++) {
      size_t at = ra_min_u32(n + m, count - 1) * row; // 0 in `inverse` past the last one
      const float *out_n = out + at, *dout_n = dout + at;
      float factor = inverse[n + m], *h = e->h_rows + (n + m) * e->row;
      f32x4 factors = f32x4_splat(factor), sum = zero;
      for (uint32_t d = factor == 0 ? 0 : whole; d < e->row; d += 4) f32x4_store(h + d, zero);
      for (uint32_t d = 0; d < whole && factor != 0; d += 4) {
        f32x4 dout_d = f32x4_load(dout_n + d);
        sum = f32x4_madd(dout_d, f32x4_sub(f32x4_load(out_n + d), f32x4_load(e->v_mean + d)), sum);
        f32x4_store(h + d, f32x4_mul(dout_d, factors));
      }
      for (uint32_t d = whole; d < e->Dv && factor != 0; d++)
        rest[m] += dout_n[d] * (out_n[d] - e->v_mean[d]), h[d] = dout_n[d] * factor;
      sums[m] = sum;
    }
    f32x4_transpose(sums, sums + 1, sums + 2, sums + 3);
    f32x4 all = f32x4_add(f32x4_add(sums[0], sums[1]), f32x4_add(sums[2], sums[3]));
    f32x4_store(delta, f32x4_mul(f32x4_add(all, f32x4_load(rest)), f32x4_load(inverse + n)));
    for (uint32_t m = 0; m < 4; m++) e->h_rows[(n + m) * e->row + e->Dvp] = -delta[m];
  }
  ra_transpose(e->h_rows, e->row, CHUNK, e->columns, e->h_t, CHUNK);
}

// A chunk of queries, and what they pass back, as ra_load_gradients; `features`: scaled by it.
RA_KERNEL void load_queries_backward(const ra_polynomial *e, const ra_arrays *x, size_t head, uint32_t i,
                                     uint32_t count, int features) {
  float live[CHUNK], lse[CHUNK];
  ra_heads at = ra_heads_of(e, head);
  ra_load_queries(e, x->q + at.q, i, count, 0);
  for (uint32_t n = 0; n < count; n++)
    lse[n] = x->lse[at.lse + i + n] + (e->decaying ? (float)(beyond(e, i + n) - e->state->decays.top) : 0);
  ra_load_gradients(e, x->out + at.out + i * e->out_row, x->dout + at.out + i * e->out_row, e->out_row, lse, count,
                    outlier_queries(e->p, head, i, count), live);
  if (!features) return;
  set_query_factors(e, i, count);
  ra_features_lower(&e->f, e->x_t, live, e->lower);
}

ra_heads ra_heads_of(const ra_polynomial *e, size_t head) {
  const ra_problem *p = e->p;
  size_t kv = head / ra_group(p), Nq = p->query_length, Nk = p->key_length;
  return (ra_heads){.q = ra_head(p, head, p->heads, Nq, e->D),
                    .k = ra_head(p, kv, p->kv_heads, Nk, e->D),
                    .v = ra_head(p, kv, p->kv_heads, Nk, e->Dv),
                    .out = ra_head(p, head, p->heads, Nq, e->Dv),
                    .lse = head * Nq};
}

// sum_ij dS_ij (j - i) over the keys j .. j + count - 1 at an edge and the queries at positions `position` and on, dS in da.
static double edge_moment(const ra_polynomial *e, uint32_t j, uint32_t count, int64_t position) {
  double sum = 0;
  for (uint32_t n = 0; n < count; n++) {
    f32x4 row = f32x4_splat(0);
    for (uint32_t c = 0; c < CHUNK; c += 4) {
      float first = (float)((int64_t)j + n - position - c), distance[4] = {first, first - 1, first - 2, first - 3};
      row = f32x4_madd(f32x4_load(e->da + n * CHUNK + c), f32x4_load(distance), row);
    }
    sum += f32x4_sum(row);
  }
  return sum;
}

// dS of the pairs of a block joins the gradient of the bias at near distances.
static void add_near_lags(const ra_polynomial *e, uint32_t i, uint32_t count, uint32_t j, uint32_t keys) {
  for (uint32_t k = 0; k < keys; k++)
    for (uint32_t n = 0; n < count; n++) {
      int64_t t = (int64_t)i + n + e->p->query_offset - j - k;
      if (t >= 0 && t < ra_lags_from(e->p)) e->near_lags[t] += e->da[k * CHUNK + n];
    }
}

// The same of the last keys of a state, beyond which pairs are farther apart.
RA_KERNEL void add_last_keys(const ra_polynomial *e, const ra_arrays *x, size_t head, uint32_t i, uint32_t count,
                             ra_range state) {
  uint32_t keys = ra_min_u32(CHUNK, state.end - state.first), j = state.end - keys;
  const ra_seen *seen = seen_keys(e, head, i, count, 0, j, keys);
  ra_load_keys(e, x, head / ra_group(e->p), j, keys, 0);
  ra_block_gradients(e, e->y_rows, e->u_rows, seen);
  add_near_lags(e, i, count, j, keys);
}

// Rows of dk and dv before key `end` begin at zero, just before something is first added to them.
static void clear_rows(const ra_polynomial *e, const ra_arrays *x, ra_heads at, uint32_t end) {
  for (uint32_t *j = &e->state->cleared; *j < end; ++*j) {
    float *dk = x->dk + at.k + *j * e->k_row, *dv = x->dv + at.v + *j * e->v_row;
    for (uint32_t d = 0; d < e->D; d++) dk[d] = 0;
    for (uint32_t d = 0; d < e->Dv; d++) dv[d] = 0;
  }
}

// The sweep forwards, one chunk of one query head: dq, and what pairs that are done exactly give to dk and dv.
RA_KERNEL void backward_queries(const ra_polynomial *e, const ra_arrays *x, size_t head, uint32_t i, uint32_t count) {
  const ra_problem *p = e->p;
  size_t kv = head / ra_group(p);
  ra_heads at = ra_heads_of(e, head);
  ra_range state = ra_state_keys(p, i);
  edges beside = edges_of(p, i, count, state);
  uint32_t outliers = outlier_queries(p, head, i, count);
  int reads = has_plain_keys(p, kv, state);
  int64_t position = (int64_t)i + p->query_offset;
  load_queries_backward(e, x, head, i, count, reads);
  ra_fill(e->dx_t, (size_t)e->Dp * CHUNK, 0);
  clear_rows(e, x, at, ra_key_limit(p, i + count - 1));

  // in the forward pass this was sum = phi(x) Z
  if (reads) {
    const float *h_t = widen_columns(e, e->h_rows, e->h_t);
    float distance[CHUNK];
    for (uint32_t n = 0; n < CHUNK; n++) distance[n] = (float)(position + n - (int64_t)e->state->origin);
    e->state->dslope += read_state_backward(e, e->x_t, h_t, e->moment ? distance : NULL);
  }
  ra_add_outlier_keys_backward(e, x, kv, state, outliers);
  for (int side = 0; side < 2; side++)
    for (uint32_t j = beside.side[side].first, keys; j < beside.side[side].end; j += keys) {
      keys = ra_min_u32(CHUNK, beside.side[side].end - j);
      const ra_seen *seen = seen_keys(e, head, i, count, outliers, j, keys);
      ra_load_keys(e, x, kv, j, keys, 0);
      ra_add_block_backward(e, e->y_rows, e->u_rows, keys, seen, NULL, j, x->dk + at.k, x->dv + at.v);
      if (e->moment) e->state->dslope += edge_moment(e, j, keys, position);
      if (e->near_lags) add_near_lags(e, i, count, j, keys);
    }
  if (e->near_lags && reads) add_last_keys(e, x, head, i, count, state);
  // in the forward pass this was x = scale R q
  ra_transpose(e->dx_t, CHUNK, e->Dp, CHUNK, e->d_rows, e->Dp);
  ra_rotary_rows(&e->state->q_rotary, e->d_rows, e->Dp, x->dq + at.q + i * e->q_row, e->q_row, count, i,
                 RA_ROTATE_TRANSPOSE, p->scale);
}

// One chunk of one query head joins Y, or leaves it.
RA_KERNEL void add_queries(const ra_polynomial *e, const ra_arrays *x, size_t head, uint32_t i, uint32_t count,
                           int leave) {
  load_queries_backward(e, x, head, i, count, 1);
  if (leave) negate(e->h_rows, (size_t)CHUNK * e->row);
  ra_update_state(e, e->x_t, widen(e, e->h_rows));
}

// The same for all chunks of these queries that see keys through a state, and all heads of the group.
static void add_group(const ra_polynomial *e, const ra_arrays *x, size_t state, ra_range queries, int leave) {
  size_t group = sharing(e->p);
  for (uint32_t i = queries.first, end; i < queries.end; i = end) {
    ra_range keys = ra_state_keys(e->p, i);
    end = ra_chunk_end(e->p, i);
    for (size_t head = state * group; keys.first < keys.end && head < (state + 1) * group; head++)
      add_queries(e, x, head, i, end - i, leave);
  }
}

// Those chunks leave Y that saw no key before the edge. Returns the first key that all see which stay; the edge when none do.
static uint32_t drop_queries(const ra_polynomial *e, const ra_arrays *x, size_t state) {
  ra_polynomial_state *s = e->state;
  uint32_t top = s->queries.end, first = s->edge, start;
  for (; top > s->queries.first; top = start) {
    start = ra_chunk_start(e->p, top - 1);
    first = ra_state_keys(e->p, start).first;
    if (first < s->edge) break;
  }
  ra_range leaving = {top, s->queries.end}, staying = {s->queries.first, top};
  s->queries.end = top;
  if (leaving.end > top && ra_is_worn(s->gone, leaving.end - top, top - staying.first)) {
    clear_state(e);
    add_group(e, x, state, staying, 0);
  } else {
    add_group(e, x, state, leaving, 1);
    s->gone += leaving.end - top;
  }
  return top > staying.first ? first : s->edge;
}

// sum_t += what the states give to dv for a chunk of keys. By the derivative: w_r for p' is (m + 1) c_{m+1} / c_m times
// that for p.
RA_KERNEL void read_values_backward(const ra_polynomial *e, uint32_t kv, uint32_t count) {
  ra_polynomial below = *e;
  const ra_features *f = &e->f;
  const float *c = e->p->coefficients + (size_t)kv * (f->degree + 1);
  if (e->p->dv_by_derivative && f->degree > 0) {
    below.f.rank = f->lower, below.lower = e->dlower;
    for (uint32_t m = 0; m < f->degree; m++) {
      f32x4 ratio = f32x4_splat((float)(m + 1) * c[m + 1] / c[m]);
      for (size_t n = (size_t)f->first[m] * CHUNK; n < (size_t)f->first[m + 1] * CHUNK; n += 4)
        f32x4_store(e->dlower + n, f32x4_mul(ratio, f32x4_load(e->lower + n)));
    }
  }
  read_decayed(&below, e->y_t, count);
}

// With du in sum_t, what the mean query gives to dy: the sums of dS over queries, times that.
RA_KERNEL void add_mean_query(const ra_polynomial *e) {
  for (uint32_t i = 0; i < CHUNK && e->state->centred; i++) {
    float sum = 0;
    for (uint32_t c = 0; c < e->columns; c++) sum += e->u_rows[i * e->row + c] * e->sum_t[c * CHUNK + i];
    for (uint32_t d = 0; d < e->D; d++) e->dx_t[d * CHUNK + i] += sum * e->q_mean[d];
  }
}

// The sweep backwards: keys start .. edge-1 take their gradients from the state of the queries that saw them through Z.
RA_KERNEL void retire_keys(const ra_polynomial *e, const ra_arrays *x, size_t state, uint32_t start) {
  size_t head = state * sharing(e->p), kv = head / ra_group(e->p);
  ra_heads at = ra_heads_of(e, head);
  while (e->state->edge > start) {
    uint32_t first = drop_queries(e, x, state);
    if (first == e->state->edge) { // nobody saw these
      e->state->edge = start;
      return;
    }
    uint32_t left = e->state->edge - (first > start ? first : start), count = left % CHUNK ? left % CHUNK : CHUNK,
             j = e->state->edge - count;
    ra_load_keys(e, x, kv, j, count, 1);
    ra_fill(e->sum_t, (size_t)e->columns * CHUNK, 0);
    ra_fill(e->dx_t, (size_t)e->Dp * CHUNK, 0);
    set_key_factors(e, j, count);
    read_values_backward(e, (uint32_t)kv, count);
    ra_transpose(e->sum_t, CHUNK, e->Dvp, CHUNK, e->d_rows, e->Dvp);
    ra_scale_values(e, e->u_rows, count);
    ra_add_rows(e->d_rows, e->Dvp, count, e->Dv, x->dv + at.v, e->v_row, NULL, j);
    add_mean_query(e);
    ra_transpose(e->u_rows, e->row, CHUNK, e->columns, e->h_t, CHUNK);
    read_state_backward(e, e->y_t, widen_columns(e, e->u_rows, e->h_t), NULL);
    ra_transpose(e->dx_t, CHUNK, e->Dp, CHUNK, e->d_rows, e->Dp);
    ra_add_rows(e->d_rows, e->Dp, count, e->D, x->dk + at.k, e->k_row, NULL, j);
    e->state->edge = j;
  }
}

// dk is so far the gradient by y = R k - mean: take out its sum over those that the mean is of (the path through the
// mean), rotate back.
RA_KERNEL void finish_keys(const ra_polynomial *e, size_t kv, float *dk) {
  uint32_t Nk = e->p->key_length, plain = Nk - e->p->outlier_key_count, D = e->D;
  double sum[RA_MAX_HEAD_DIM] = {0};
  float less[RA_MAX_HEAD_DIM];
  for (uint32_t j = 0; j < Nk; j += CHUNK)
    ra_sum_rows(dk + j * e->k_row, e->k_row, ra_min_u32(CHUNK, Nk - j), D, 0, sum);
  for (uint32_t d = 0; d < D; d++) less[d] = (float)(-sum[d] / plain);
  for (uint32_t j = 0; j < Nk; j += CHUNK) {
    uint32_t count = ra_min_u32(CHUNK, Nk - j), outliers = ra_outlier_bits(ra_outlier_keys(e->p, kv), 1, 0, j, count);
    float *dk_j = dk + j * e->k_row;
    for (uint32_t n = 0; n < count; n++)
      if (!(outliers >> n & 1)) ra_add(less, D, dk_j + n * e->k_row);
    ra_rotary_rows(&e->state->k_rotary, dk_j, e->k_row, dk_j, e->k_row, count, j, RA_ROTATE_TRANSPOSE, 1.0f);
  }
}

// Before the first unit of a state, of the query heads from `head` on.
static void prepare_state(const ra_polynomial *e, const ra_arrays *x, uint32_t head) {
  const ra_problem *p = e->p;
  uint32_t kv = head / ra_group(p);
  ra_rotary_batch(&e->state->q_rotary, p, 1, kv / p->kv_heads);
  ra_rotary_batch(&e->state->k_rotary, p, 0, kv / p->kv_heads);
  ra_take_weights(e, kv);
  take_means(e, x, kv);
  ra_load_outlier_keys(e, x, kv);
  e->state->first = e->state->edge = 0;
  take_decays(e, head);
  e->state->dslope = 0;
  for (uint32_t t = 0; e->near_lags && t < ra_lags_from(p); t++) e->near_lags[t] = 0;
  if (head % ra_group(p) == 0) e->state->cleared = 0;
}

// --- The gradient of the bias -------------------------------------------------------------------------------------------

RA_KERNEL void load_lags(const ra_polynomial *e, const ra_arrays *x, uint32_t head) {
  const ra_problem *p = e->p;
  uint32_t kv = head / ra_group(p);
  float live[CHUNK], lse[CHUNK];
  ra_lags_begin(&e->lags);
  for (uint32_t j = 0, count; j < p->key_length; j += count) {
    count = ra_min_u32(CHUNK, p->key_length - j);
    ra_load_keys(e, x, kv, j, count, 0);
    ra_turn(e, e->y_rows, count, e->y_t);
    ra_transpose(e->u_rows, e->row, CHUNK, e->columns, e->h_t, CHUNK);
    ra_live_tokens(count, 0, live);
    ra_lags_load(&e->lags, &e->lags.keys, j, e->y_t, e->h_t, e->h_t + e->Dvp * CHUNK, live);
  }
  for (uint32_t h = 0; h < sharing(p); h++) {
    ra_heads at = ra_heads_of(e, head + h);
    ra_lag_side queries = ra_lags_queries(&e->lags, h);
    for (uint32_t i = 0, count; i < p->query_length; i += count) {
      count = ra_min_u32(CHUNK, p->query_length - i);
      ra_load_queries(e, x->q + at.q, i, count, 0);
      for (uint32_t n = 0; n < count; n++) lse[n] = x->lse[at.lse + i + n] - (float)e->state->decays.top;
      ra_load_gradients(e, x->out + at.out + i * e->out_row, x->dout + at.out + i * e->out_row, e->out_row, lse, count,
                        0, live);
      ra_lags_load(&e->lags, &queries, i, e->x_t, e->h_t, e->h_t + e->Dvp * CHUNK, live);
    }
  }
}

// `unit` of those of a state: loads, correlates, gives what came of it.
static void run_lags(const ra_polynomial *e, const ra_arrays *x, uint32_t head, uint32_t unit) {
  const ra_problem *p = e->p;
  size_t own = p->bias_heads > 1 ? head % p->heads * ra_diagonals(p) : 0;
  uint32_t units = ra_lags_units(p);
  if (!x->dbias) return;
  if (unit == 0) load_lags(e, x, head);
  else if (unit <= units) ra_lags_correlate(&e->lags, head / ra_group(p), unit - 1);
  else ra_lags_finish(&e->lags, p->bias + own, e->state->decays.top, x->dbias + own);
}

static void finish_near_lags(const ra_polynomial *e, const ra_arrays *x, uint32_t head) {
  const ra_problem *p = e->p;
  size_t own = p->bias_heads > 1 ? head % p->heads * ra_diagonals(p) : 0;
  for (int64_t t = 0; x->dbias && t < ra_lags_from(p); t++) {
    int64_t n = t - p->query_offset + p->key_length - 1;
    if (n >= 0 && n < (int64_t)ra_diagonals(p)) x->dbias[own + (size_t)n] += (float)e->near_lags[t];
  }
}

// After the last unit of a backward pass.
static void finish_state(const ra_polynomial *e, const ra_arrays *x, uint32_t head) {
  const ra_problem *p = e->p;
  uint32_t kv = head / ra_group(p);
  if ((head + sharing(p)) % ra_group(p) == 0) finish_keys(e, kv, x->dk + ra_heads_of(e, head).k);
  if (e->near_lags) finish_near_lags(e, x, head);
  if (!p->alibi || !x->dalibi) return;
  float *sum = x->dalibi + head % p->heads;
  *sum = (head < p->heads ? 0 : *sum) + (float)e->state->dslope;
}

// --- Units --------------------------------------------------------------------------------------------------------
//
// Per state: a key/value head, or a query head where heads have slopes of their own. Forward: blocks of 256 keys of the first
// chunk's state (all keys when there is no mask), then blocks of 256 queries of all heads of the group, each bringing
// its own. Backward: the same, then the query blocks again from the last to the first, then the key blocks from the
// last to the first. Both passes end with chunks of 32 outlier queries; what the blocks before wrote to their rows is
// overwritten. A backward pass with decays, which has none of these, ends with the units of the gradient of the bias.

typedef struct plan {
  uint32_t key_blocks, query_blocks, outliers, lags, per_head; // outliers, lags: where they begin
} plan;

static plan plan_units(const ra_problem *p, uint32_t pass) {
  ra_range keys = ra_state_keys(p, 0);
  plan n = {.key_blocks = ra_ceil_div(keys.end - keys.first, UNIT), .query_blocks = ra_ceil_div(p->query_length, UNIT)};
  n.outliers = (n.key_blocks + n.query_blocks) * (pass == RA_FORWARD ? 1 : 2);
  n.per_head = n.lags = n.outliers + ra_ceil_div(p->outlier_query_count, CHUNK);
  if (pass == RA_BACKWARD && ra_lags_units(p) > 0) n.per_head += ra_lags_units(p) + 2;
  return n;
}

static uint32_t units(const ra_problem *p, uint32_t pass) {
  return p->batch * p->heads / sharing(p) * plan_units(p, pass).per_head;
}

static void forward_queries(const ra_polynomial *e, const ra_arrays *x, size_t state, uint32_t block, uint32_t pass) {
  const ra_problem *p = e->p;
  size_t group = sharing(p);
  for (uint32_t i = block * UNIT, count; i < ra_min_u32(block * UNIT + UNIT, p->query_length); i += count) {
    count = ra_chunk_end(p, i) - i;
    move_state(e, x, state * group / ra_group(p), ra_state_keys(p, i));
    for (size_t head = state * group; head < (state + 1) * group; head++) {
      if (pass == RA_FORWARD) forward_chunk(e, x, head, i, count);
      else backward_queries(e, x, head, i, count);
    }
  }
}

static void sweep_back(const ra_polynomial *e, const ra_arrays *x, size_t state, uint32_t block) {
  const ra_problem *p = e->p;
  ra_range *queries = &e->state->queries;
  uint32_t start = block * UNIT, i, end = ra_min_u32(start + UNIT, p->query_length);
  for (; end > start; end = i) {
    i = ra_chunk_start(p, end - 1);
    ra_range keys = ra_state_keys(p, i);
    retire_keys(e, x, state, keys.end);
    if (keys.first >= keys.end) continue;
    if (queries->first == queries->end) queries->end = end, e->state->origin = keys.end - 1;
    queries->first = i;
    move_origin(e, keys.end - 1, NULL);
    add_group(e, x, state, (ra_range){i, end}, 0);
  }
}

static int run(const ra_problem *p, const ra_arrays *x, uint32_t pass, void *workspace, uint32_t first, uint32_t last) {
  ra_workspace_cursor cursor = {workspace, 0, 0};
  ra_polynomial e = ra_polynomial_arrange(p, pass, &cursor);
  plan n = plan_units(p, pass);
  ra_range keys = ra_state_keys(p, 0);
  uint32_t blocks = n.key_blocks + n.query_blocks, all = units(p, pass);
  if (first == 0) {
    e.state->not_positive = 0;
    e.state->pattern.count = 0;
    ra_rotary_init(&e.state->q_rotary, p, 1, NULL, e.q_space);
    ra_rotary_init(&e.state->k_rotary, p, 0, &e.state->q_rotary, e.k_space);
    if (e.near_lags && x->dbias) ra_fill(x->dbias, p->bias_heads * ra_diagonals(p), 0);
  }
  for (uint32_t unit = first; unit < last; unit++) {
    uint32_t state = unit / n.per_head, at = unit % n.per_head, head = state * sharing(p), kv = head / ra_group(p);
    if (at == 0) prepare_state(&e, x, head);
    if (pass == RA_BACKWARD && at == blocks) { // keys that no query saw through the state are done
      clear_state(&e);
      clear_rows(&e, x, ra_heads_of(&e, head), p->key_length);
      e.state->queries = (ra_range){p->query_length, p->query_length};
      e.state->edge = ra_state_keys(p, ra_chunk_start(p, p->query_length - 1)).end;
    }
    if (at < n.key_blocks)
      move_state(&e, x, kv, (ra_range){keys.first, ra_min_u32(keys.first + (at + 1) * UNIT, keys.end)});
    else if (at < blocks) forward_queries(&e, x, state, at - n.key_blocks, pass);
    else if (at < n.outliers && at < blocks + n.query_blocks)
      sweep_back(&e, x, state, blocks + n.query_blocks - 1 - at);
    else if (at < n.outliers) retire_keys(&e, x, state, keys.first + (n.outliers - 1 - at) * UNIT);
    else if (at >= n.lags) run_lags(&e, x, head, at - n.lags);
    else if (pass == RA_FORWARD) ra_outlier_queries_forward(&e, x, kv, at - n.outliers);
    else ra_outlier_queries_backward(&e, x, kv, at - n.outliers);
    if (pass == RA_BACKWARD && at == n.per_head - 1) finish_state(&e, x, head);
  }
  return last == all && e.state->not_positive > 0 ? RA_NOT_POSITIVE : RA_OK;
}

const ra_engine ra_polynomial_engine = {layout, units, run};

// --- Before the first call ----------------------------------------------------------------------------------------

void ra_polynomial_warm_up(uint32_t calls) {
  float x[CHUNK] = {0};
  volatile uint32_t nothing = 0; // nobody is to see that the calls are empty
  for (uint32_t n = 0; n < calls; n++) {
    uint32_t none = nothing;
    set_rows(x, none, none, x, none, x);
    add_to_state(x, x, none, x, none, none, x);
  }
}
