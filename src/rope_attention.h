// SPDX-License-Identifier: MIT
//
// rope-attention: softmax attention with rotary position embedding (RoPE), forward and backward, by three engines:
//
//   exact       O(N^2 D) time, O(N D) memory: tiled online softmax;
//   polynomial  O(N rank Dv) time, O(N D + rank Dv) memory: exp replaced by a polynomial of low degree, so that the
//               matrix of scores becomes an inner product of monomial features; a few outliers, rows with large scores,
//               are done exactly; a smooth bias is a few states that decay;
//   toeplitz    O(N terms Dv log N) time, O(N (D + Dv)) memory: the same polynomial, and what depends on i - j alone (any bias,
//               mask, map) in Toeplitz matrices, which are applied by fast Fourier transforms.
//
// This work is based on:
//   Alman, Song. Fast RoPE Attention: Combining the Polynomial Method and Fast Fourier Transform. 2025 (2505.11892)
//   Cao, Huo, Liang, Shi, Song. RoPE Attention Can Be Trained in Almost Linear Time. 2024 (2412.17316v3)
//   Alman, Song. Fast Attention Requires Bounded Entries. 2023 (2302.13214)
//   Su et al. RoFormer: Enhanced Transformer with Rotary Position Embedding. 2021 (2104.09864)
//   Dao et al. FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness. 2022 (2205.14135)
// The derivations are in MATH.md beside this file.
//
// What is computed, for every head (query head h reads key/value head floor(h * kv_heads / heads)):
//
//   s_ij  = scale * (R_{i + query_offset} q_i) . (R_j k_j)       allowed: all pairs, or those of a mask
//   P     = softmax of s over the allowed j;   out_i = sum_j P_ij v_j;   lse_i = log sum_j exp(s_ij)
//   dP_ij = dout_i . v_j;   delta_i = dout_i . out_i;   dS_ij = P_ij (dP_ij - delta_i)
//   dv_j  = sum_i P_ij dout_i;   dq_i = scale R^T sum_j dS_ij (R k)_j;   dk_j = scale R^T sum_i dS_ij (R q)_i
//
// A row with no allowed key gives out = 0, lse = -infinity and no gradient. Scores below -3.4e29 count as not allowed.
//
// Scores may have ALiBi's -m |i + query_offset - j| added, of the head's slope m, or a bias_{i-j}: any one in the exact
// and the Toeplitz engine, one that decays stand for, causal, in the polynomial one. The exact engine alone takes s_ij
// = softcap tanh(scale q.k / softcap) + bias_{i-j} + mask_ij, and attention sinks: one more key for each head, of score
// `sink` and value 0. In place of a rotation by the difference of positions it and the Toeplitz engine take one by any
// number f(i - j), or any matrix W_{i - j} with few entries, s_ij = scale q_i W_{i-j} k_j^T (2505.11892, the general
// form).
//
// Size letters, everywhere in this folder: B batch, H heads, N length (Nq queries, Nk keys), D head size, Dv value size.
//
// Promises of every function here: nothing is allocated, printed or kept between calls; nothing outside the named
// arrays and the workspace is touched; the stack use is below 32 KB. Arrays must not overlap one another. Arrays need
// the alignment of a float, the workspace 16 bytes. NaN and infinity in an input spread to the outputs that depend on
// them, and to those that share a tile with these: a forbidden key still takes part, with weight 0, where others of its tile
// are allowed. So keys and values behind a mask must be finite too. In the polynomial engine they reach the whole head, whose
// rows may come out as zeros with RA_NOT_POSITIVE. They do no other harm.

#ifndef ROPE_ATTENTION_H
#define ROPE_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifdef __wasm__
#define RA_API(name) __attribute__((export_name(#name))) name
#else
#define RA_API(name) name
#endif

// Results of the functions that return int.
enum {
  RA_OK = 0,
  RA_ERROR_PROBLEM = -1, // a field of ra_problem is outside its stated range
  RA_ERROR_UNITS = -2,   // first > last, or last > ra_units()
  RA_NOT_POSITIVE =
      -3, // polynomial, toeplitz: some row's weights do not add up to a positive finite number (toeplitz: to
          // 2^-80 of the largest exp(bias)); the rows concerned are zeros, all others are right (sums of values
          // beyond float32 are infinite or NaN)
};

// A size that does not fit size_t (32 bits in WebAssembly).
#define RA_SIZE_OVERFLOW ((size_t)-1)

// Engines, ra_problem.method.
enum {
  RA_NAIVE = 0,      // the oracle: plain loops over whole rows, one float sum each; O(N^2 D); in native builds only
  RA_EXACT = 1,      // tiled online softmax
  RA_POLYNOMIAL = 2, // exp(s) ~ sum_m coefficients[m] s^m
  RA_TOEPLITZ = 3,   // the same, with what goes by i - j, by Fourier transforms
};

// Directions, the argument `pass`.
enum {
  RA_FORWARD = 0,  // reads q, k, v; overwrites out, lse
  RA_BACKWARD = 1, // reads q, k, v, out, lse, dout; overwrites dq, dk, dv
};

// The largest sizes that are accepted: with them no index product inside one head overflows 32 bits.
#define RA_MAX_HEAD_DIM 1024u
#define RA_MAX_DEGREE 8u
#define RA_MAX_SUPPORT (RA_MAX_HEAD_DIM * RA_MAX_HEAD_DIM)
#define RA_MAX_DECAYS 8u
#define RA_MAX_NEAR 1024u

typedef struct ra_problem {
  uint32_t batch, heads, kv_heads;   // >= 1; heads is a multiple of kv_heads
  uint32_t query_length, key_length; // Nq, Nk >= 1
  uint32_t head_dim, value_dim;      // D, Dv in 1 .. RA_MAX_HEAD_DIM
  uint32_t rotary_dim;               // even, 0 (no rotation) .. D; dimensions past it are left alone
  uint32_t interleaved;              // pairs are 0: (p, p + rotary_dim/2)   1: (2p, 2p + 1)
  uint32_t causal;                   // 0, or 1: key j is allowed for query i when j <= i + query_offset
  int32_t query_offset;              // position of query 0; key 0 is at position 0
  float scale;                       // factor on the scores
  const double *frequencies;         // [rotary_dim/2] radians per position; NULL without rotation or with tables
  uint32_t method;                   // RA_NAIVE, RA_EXACT, RA_POLYNOMIAL, RA_TOEPLITZ
  uint32_t degree;                   // polynomial, toeplitz: g, 0 .. RA_MAX_DEGREE
  const float *coefficients; // likewise: [B * kv_heads][g + 1], c_0 .. c_g of p(s) for each key/value head, for s
      // taken with the mean of the rotated keys (but outliers) subtracted from every rotated key, and that of queries from
      // these where they are centred; with a relative map for s as it is
  uint32_t layout; // 0: [B][heads][N][width]   1: [B][N][heads][width]; lse is [B][H][Nq] always

  // Rotation beyond frequencies. Positions stand for i + query_offset and j in the rotation, not in the mask.
  float rotary_factor;           // on the rotated dimensions of queries and keys (attention factor); usually 1
  const double *query_positions; // [position_batches][Nq], or NULL
  const double *key_positions;   // [position_batches][Nk], or NULL
  uint32_t position_batches;     // 1 or B
  const float *cos_table,
      *sin_table;      // [table_rows][rotary_dim/2] instead of frequencies, or NULL; positions are rows then
  uint32_t table_rows; // positions past the end take the last row

  // Masks that give each query, i at position i + query_offset, a range of keys.
  int32_t window_left, window_right; // -1: unbounded; else key j is allowed when -right <= i + query_offset - j <= left
  const uint32_t *segments; // [segment_count] ascending first positions, or NULL: no attention across segments;
                            // not toeplitz
  uint32_t segment_count;

  // What is done to scores. All engines, but polynomial only one of alibi and bias, and that only when causal, bias
  // with decays; toeplitz only bias.
  const float *alibi;                     // [H] slopes m from 0 to 1e19: adds -m |i + query_offset - j|; or NULL
  float softcap;                          // 0: none
  const float *bias;                      // [bias_heads][Nq + Nk - 1], entry i - j + Nk - 1, or NULL
  uint32_t bias_heads;                    // 1 or H
  const float *mask;                      // added, or NULL; -infinity, and all below -3.4e29, forbids
  const uint8_t *allowed;                 // 0 forbids, or NULL; strides as for mask
  size_t mask_batch, mask_head, mask_row; // strides in elements, 0 where all have the same; keys are contiguous
  const float *sinks;                     // [H], or NULL

  // What the caller knows: no |scale q.k|, or |scale q W k|, exceeds it; 0: nothing. Small ones spare the exact engine
  // the search for maxima, and most of softcap; then |v| must be 0 or its largest entry from 1e-28 to 1e30 / Nk.
  float score_bound;

  // Relative maps: one of the two, or neither. Not the polynomial engine; toeplitz up to 1,024 entries of support.
  // Positions differ by relative_positions[i - j + Nk - 1] in the rotation, not in the mask; [Nq + Nk - 1] finite numbers, with
  // frequencies and without query_positions and key_positions.
  const float *relative_positions;
  // s_ij = scale sum_n q_i[support[n][0]] weights[n][i - j + Nk - 1] k_j[support[n][1]]: W_t has few entries, in the
  // same places for all t. support [support_count][2], each below D; a place that is named twice adds up. rotary_dim is
  // 0.
  const uint32_t *support;
  uint32_t support_count; // 0: none
  const float *weights;   // [support_count][Nq + Nk - 1]

  // Polynomial, without alibi: rows whose scores are too large for p are done exactly, all scores of theirs, at
  // O(key_length D) for a query and O(query_length D) for a key: as many in each key/value head, ascending, or NULL.
  // Query i of the h-th query head of a group is number i * heads / kv_heads + h.
  const uint32_t *outlier_queries,
      *outlier_keys; // [B * kv_heads][outlier_query_count], [B * kv_heads][outlier_key_count]
  uint32_t outlier_query_count, outlier_key_count;

  // Polynomial with bias, causal, without outliers, segments and alibi: decays that stand for the far part of bias,
  //   exp(bias_t - decay_tops) ~ sum_e decay_weights[e] exp(-decay_rates[e] (t - decay_from)),   t = i + query_offset - j >= decay_from.
  // Nearer pairs are done exactly, with bias itself, which is above -3.4e29 there.
  const double *decay_rates;        // [bias_heads][decay_count], not negative
  const float *decay_weights;       // likewise, any sign
  const float *decay_tops;          // [bias_heads]
  uint32_t decay_count, decay_from; // 0 (none) .. RA_MAX_DECAYS; 1 .. RA_MAX_NEAR
  // For the gradient of the far part of bias a polynomial of its own, like coefficients: [B * kv_heads][lag_degree + 1].
  const float *lag_coefficients;
  uint32_t lag_degree; // 0 .. 2

  // Polynomial, backward, g >= 1: 1 takes dv by p' in the place of p, as dq and dk are, which is near exp as well: of a
  // degree less, so that a fifth of the products is saved. Gradients are no longer the derivative of this forward pass
  // then, but no farther from exact ones. c_0 .. c_{g-1} are not 0.
  uint32_t dv_by_derivative;
} ra_problem;

// All contiguous, row-major, shapes as in layout 0. A pointer that the pass does not name may be NULL.
typedef struct ra_arrays {
  const float *q;    // [B][H][Nq][D]
  const float *k;    // [B][kv_heads][Nk][D]
  const float *v;    // [B][kv_heads][Nk][Dv]
  float *out;        // [B][H][Nq][Dv]
  float *lse;        // [B][H][Nq]
  const float *dout; // [B][H][Nq][Dv]
  float *dq;         // [B][H][Nq][D]
  float *dk;         // [B][kv_heads][Nk][D], summed over the query heads of its group
  float *dv;         // [B][kv_heads][Nk][Dv], likewise
  float *dbias;      // [bias_heads][Nq + Nk - 1], summed over batches (and heads); or NULL
  float *dalibi;     // [H], summed over batches; or NULL
  float *dsinks;     // [H], summed over batches; or NULL
  float *dweights;   // [support_count][Nq + Nk - 1], summed over batches and heads; or NULL
  // [B][kv_heads][D + Dv + D] mean rotated keys without outliers, mean values, and the mean rotated query where queries
  // are to be centred, else 0: ra_sample_prepare leaves them there, the polynomial engine goes by them. Or NULL: it
  // finds the first two, and queries are not centred.
  float *means;
} ra_arrays;

// --- The contract: any engine, either pass -----------------------------------------------------------------------
//
// A pass is a fixed list of units of work (a block of queries or keys of one head), run in order, as few or as many at
// a time as the caller likes: a thread that must answer messages runs a few, then looks up. State between the calls
// lives in the workspace only.

// Bytes of workspace for a pass, RA_SIZE_OVERFLOW when they do not fit size_t, 0 when the problem is not valid.
size_t RA_API(ra_workspace)(const ra_problem *p, uint32_t pass);

// Number of units of a pass, 0 when the problem is not valid.
uint32_t RA_API(ra_units)(const ra_problem *p, uint32_t pass);

// Runs units first .. last-1. Every unit must be run once, in order, with the same arguments otherwise.
// RA_NOT_POSITIVE, where it applies, is returned by the call that runs the last unit.
int RA_API(ra_run)(const ra_problem *p, const ra_arrays *x, uint32_t pass, void *workspace, uint32_t first,
                   uint32_t last);

// Features of the polynomial engine: C(D + g, g); RA_SIZE_OVERFLOW when that does not fit size_t.
size_t RA_API(ra_rank)(uint32_t head_dim, uint32_t degree);

// --- A state of its own: sequences that arrive piece by piece ------------------------------------------------------------
//
// The sums of the polynomial engine over the keys so far, constant in size however many there are: for each key/value head
// rank x (Dv + 1) numbers, and up to 31 keys that wait until a chunk of 32 is full and are attended with exp itself. Two
// states of the same problem add up to the state of both sequences.
//
// The problem describes tokens on their way: query_length = key_length of them, the first at position query_offset (or at
// query_positions), method RA_POLYNOMIAL, causal 0. Coefficients are those of p(s) for s = scale (R q).(R k) itself: nothing is
// centred. All calls on a state need the same batch, heads, sizes, degree and coefficients.

// Bytes of a state (whole = 1), or of its beginning, which is all that an append reads and writes that fills no chunk
// (whole = 0); of the workspace of a call; as ra_workspace. A state begins as zeros.
size_t RA_API(ra_state_bytes)(const ra_problem *p, uint32_t whole);
size_t RA_API(ra_state_workspace)(const ra_problem *p);

// The keys x->k and values x->v join. O(Nk rank Dv).
int RA_API(ra_state_append)(const ra_problem *p, const ra_arrays *x, void *state, void *workspace);

// The queries x->q attend to all keys in the state: overwrites x->out, x->lse. O(Nq rank Dv). RA_NOT_POSITIVE as ra_run.
int RA_API(ra_state_attend)(const ra_problem *p, const ra_arrays *x, const void *state, void *workspace);

// The keys of `other` join.
int RA_API(ra_state_merge)(const ra_problem *p, void *state, const void *other, void *workspace);

// --- Rotation alone -----------------------------------------------------------------------------------------------

// Rotates all of x in place; it has the shape, layout and positions of q. inverse: 0 rotates by +angle, 1 undoes that.
// Cost O(B H Nq D).
size_t RA_API(ra_rotate_workspace)(const ra_problem *p);
int RA_API(ra_rotate)(const ra_problem *p, float *x, uint32_t inverse, void *workspace);

// --- Looking at the data: what a planner needs ----------------------------------------------------------------------
//
// With a relative map keys are neither rotated nor centred, and a row costs O(Nk (|S| + Dv)), |S| = D + rotary_dim for
// positions. Softcap, masks that are arrays, and sinks are left out.

// Bounds over one key/value head and its group of query heads. |s_ij| <= scale * q_norm * k_norm, and, of the rows that are no
// outliers and after a shift by a constant of the row (which softmax does not see), |s_ij| <= scale * q_plain_norm *
// k_centred_norm; of a relative map these times what W lengthens a row by.
typedef struct ra_bounds {
  float q_entry, k_entry; // max |entry| of q, of k
  float q_norm;           // max |q_i|
  float k_norm;           // max |k_j|
  float q_plain_norm;     // max |q_i|, outliers left out
  float k_centred_norm;   // max |R k_j - mean of R k|, outliers left out of both; max |k_j| with a relative map
  float q_squares;        // sum of |q_i|^2, outliers left out
  float k_squares;        // the same of centred keys
  float v_entry;          // max |entry| of v; 0 when x->v is NULL
  float v_half_range;     // max over columns of (max - min) / 2 of v; 0 when x->v is NULL
  uint32_t q_argmax;      // flat row (head in group * Nq + i) of the largest query that is no outlier
  uint32_t k_argmax;      // row of the largest centred key that is none
  uint32_t finite;        // 1 when q, k (and v unless NULL) have no NaN and no infinity
  float q_mean_norm; // of the mean rotated query where queries are centred: q_plain_norm, q_squares and q_argmax are
                     // of rotated queries less that then; else 0
} ra_bounds;

// From which share of the squares of queries on, those of their mean, they are centred.
#define RA_WORTH_CENTRING 0.2f

// Prepares one key/value head (0 .. B*kv_heads-1) for the calls below, O((group Nq + Nk) D): rotated centred keys are
// kept in the workspace, and, with x->means, what the mean query says of them where queries are worth centring. Fills
// *bounds. `again`: only outliers have changed since *bounds was filled for the same head, so that what does not depend
// on them is kept.
size_t RA_API(ra_sample_workspace)(const ra_problem *p);
int RA_API(ra_sample_prepare)(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, uint32_t again,
                              ra_bounds *bounds, void *workspace);

// Candidates for outliers: the `count` rows, at most as many as there are, of the largest queries (queries = 1, numbered as
// ra_problem.outlier_queries) or of the largest centred keys (queries = 0), in no order, and their norms. Outliers that
// are named already are looked at like all others. O(N D). Needs ra_sample_prepare.
int RA_API(ra_sample_largest)(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, uint32_t queries,
                              uint32_t count, uint32_t *rows, float *norms, void *workspace);

// Of scores s = scale q.k through the polynomial engine's state, centred as above: for each query that is no outlier
// let n be the keys in the state of its chunk, without outliers. scores: the largest (sum s^2 / n) exp(-sum s / n);
// gain: the largest exp(-sum s / n); keys: the largest sum |k|^2 / n. 0 where states are empty. rows: queries and keys
// that were looked at to find that.
typedef struct ra_spread {
  float scores, keys, gain;
  uint32_t rows;
} ra_spread;

// O((group Nq + Nk) D^2); left as soon as scores exceed `limit`. Not with slopes, biases, decays, a relative map or
// centred queries: RA_ERROR_PROBLEM. Needs ra_sample_prepare.
int RA_API(ra_sample_spread)(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, float limit, ra_spread *spread,
                             void *workspace);

// Rows where an approximation is likely to fail first, but outliers: flat rows of the largest queries; those with the
// largest positive and with the largest negative scores s, by s^3 |v - mean|, against the keys of the largest |k| |v -
// mean|, k centred, that the polynomial engine would take through its state; and these keys, falling. RA_EXTREMES of
// each, 0 where there are fewer. |v - mean| by x->means of ra_sample_prepare; 1 without these, and where x->dout says
// that gradients are in question. When causal with slopes, or decays, of more than 1/128 the keys of such rows are
// those of the last chunk of the state, weighed by what these leave of them. O(N (D + Dv)). Needs ra_sample_prepare.
enum { RA_EXTREMES = 8 };
int RA_API(ra_sample_extremes)(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, uint32_t *large,
                               uint32_t *aligned, uint32_t *opposed, uint32_t *keys, void *workspace);

// Scores of up to 8 queries of one group against every `stride`-th key, centred as above, masked pairs and outliers left out.
// rows[count] are flat rows (head in group * Nq + i). Writes at most count * ceil(Nk / stride) floats to `scores` and
// returns how many.
uint32_t RA_API(ra_sample_scores)(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, const uint32_t *rows,
                                  uint32_t count, uint32_t stride, float *scores, void *workspace);

// How far rows are from x->out and x->lse: the largest differences, infinite where one is NaN, and the largest entries
// of these rows. Rows with the same lse do not count in the latter two. With dq also how far that is from dq by x->out
// and x->lse, Frobenius norms before rotation and scale, likewise; else 0.
typedef struct ra_distance {
  float out, out_entry, lse, lse_entry, dq, dq_size;
} ra_distance;

// Rows of the forward pass, eight at a time, and of dq unless dq is NULL, with exp (coefficients NULL) or with the polynomial
// coefficients[degree + 1] as the polynomial engine would use it (exact at the edges of causal masks and windows, and for
// outliers), times exp(bias), directly from the scores: O(count Nk (D + Dv)). out [count][Dv], lse [count], dq [count][D]; and
// *distance unless that is NULL. The gradient itself reads x->dout only.
// RA_NOT_POSITIVE when a row's weights do not add up to a positive finite number. `beside`: the same rows with exp as
// well, for what that takes beyond the scores; out, lse and dq are twice as long then, and these come second.
int RA_API(ra_sample_rows)(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, const uint32_t *rows,
                           uint32_t count, const float *coefficients, uint32_t degree, uint32_t beside, float *out,
                           float *lse, float *dq, ra_distance *distance, void *workspace);

enum { RA_SAMPLE_KEYS = 32 };

// Up to RA_SAMPLE_KEYS rows of dk and dv (keys[count], ascending), with exp (coefficients NULL) or with the polynomial
// as for rows, with lse and out taken from x->lse and x->out: O(count heads/kv_heads Nq (D + Dv)). dk [count][D], dv
// [count][Dv], twice as long where these are wanted with exp as well (`beside`), which come second. With a
// polynomial dk lacks what the engine has through the mean key, R_j^T x with the same x for every key: of the size of the
// polynomial's error.
int RA_API(ra_sample_columns)(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, const uint32_t *keys,
                              uint32_t count, const float *coefficients, uint32_t degree, uint32_t beside, float *dk,
                              float *dv, void *workspace);

// What such rows of dk and dv, with exp, gain when the lse and out of some rows (flat, as above) are not x->lse and x->out but
// lse [count] and out [count][Dv], each counted shares[count] times. O(count (D + Dv)).
int RA_API(ra_sample_changes)(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, const uint32_t *rows,
                              uint32_t count, const float *lse, const float *out, const float *shares,
                              const uint32_t *keys, uint32_t key_count, float *dk, float *dv, void *workspace);

// The gradient of the bias of a query head (flat, of a key/value head that was prepared) at some entries, of this head
// alone, with lse and out taken from x->lse and x->out: with exp, and with three polynomials of degree 2, coefficients
// [3][3]. entries [count], at most RA_SAMPLE_LAGS; sums [count][4]. O(count Nq (D + Dv)).
enum { RA_SAMPLE_LAGS = 256 };
int RA_API(ra_sample_lags)(const ra_problem *p, const ra_arrays *x, uint32_t head, const uint32_t *entries,
                           uint32_t count, const float *coefficients, float *sums, void *workspace);

// What such sums, with exp, gain when the lse and out of one row (flat, as above), which sees some keys, are not x->lse
// and x->out but lse and out [Dv]: changes [count]. O(count (D + Dv)).
int RA_API(ra_sample_lag_changes)(const ra_problem *p, const ra_arrays *x, uint32_t kv_head, uint32_t row, float lse,
                                  const float *out, const uint32_t *entries, uint32_t count, float *changes,
                                  void *workspace);

// How far entries of x->out are outside of what their columns of x->v span, the most of all rows of one key/value head
// that see a key: attention is a mean of values, so that this much of an error is certain. O(Nq Dv + Nk Dv).
float RA_API(ra_sample_outside)(const ra_problem *p, const ra_arrays *x, uint32_t kv_head);

// --- Dense products ---------------------------------------------------------------------------------------------------

// What stands on both sides of attention in the training problem (MATH.md section 1); `columns` is a multiple of 8, C is
// overwritten and is neither A nor B. 2 rows inner columns operations.

// C [rows][columns] = A B, A [rows][inner], B [inner][columns]. Sums over `inner` are plain.
void RA_API(ra_product)(const float *a, const float *b, uint32_t rows, uint32_t inner, uint32_t columns, float *c);

// C [rows][columns] = A^T B, A [inner][rows], B [inner][columns]. Sums over `inner` are two-level.
void RA_API(ra_transposed_product)(const float *a, const float *b, uint32_t inner, uint32_t rows, uint32_t columns,
                                   float *c);

// --- What this build is ---------------------------------------------------------------------------------------------

// 1 when compiled with relaxed SIMD (fused multiply-add), else 0.
uint32_t RA_API(ra_relaxed)(void);

// Calls the kernels with nothing to do, `calls` times. Engines that compile a function better once it has
// run often (V8: 13 MB of code passed, counted by the call) so have the better code before it matters; at 20,000 calls this
// takes about a millisecond, and the first real call (1,024 tokens, D = 16, forward) 2.1 ms instead of 6.5.
void RA_API(ra_warm_up)(uint32_t calls);

// Multiply-adds at the rate that benchmarks divide by. kind 0: in registers, iterations * 96 floating-point operations;
// kind 1: the matrix micro-kernel in L1, 64 operations an iteration, rounded up to a multiple of 288 iterations (192
// where tiles have four rows).
float RA_API(ra_peak)(uint32_t kind, uint32_t iterations);

// The same for the Toeplitz engine: so many transforms of four sequences of a length that it uses, 20 length log2
// length operations each, into so many blocks in turn. The workspace has 68 + 32 blocks bytes for each number, and 1
// KB.
void RA_API(ra_fft_peak)(uint32_t length, uint32_t blocks, uint32_t calls, void *workspace);

#ifdef __cplusplus
}
#endif

#endif
