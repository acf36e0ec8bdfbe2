// SPDX-License-Identifier: MIT
//
// The gradient of the training problem as the papers take it apart, matrix by matrix, in float64, for short sequences: what the
// engines never write down. Names are those of *RoPE Attention Can Be Trained in Almost Linear Time* (arXiv 2412.17316v3), after
// Alman, Song 2024 (arXiv 2402.04497):
//
//   s = D^-1 A                    softmax weights                          h = a3 y
//   l = s h - e                   residual; the loss is 1/2 |l|_F^2
//   beta = l h^T                  gradient by s, of rank valueDim at most
//   gamma1 = s o beta             gamma2 = diag(rowsum(gamma1)) s          gamma = gamma1 - gamma2, gradient by the scores
//   dx1 = scale a1^T R^T gamma (R a2 x2)        dx2 = scale a2^T R^T gamma^T (R a1 x1)        dy = a3^T s^T l
//
// That is almost linear where s is nearly a product of thin matrices, s ~ u v^T with r columns: then gamma1 has rank r valueDim,
// gamma2 rank r. Numerical ranks tell how low ranks could be, the polynomial's factors how low they are made.
// Cost: O(Nq Nk (D + Dv)) and, for singular values, O(Nq Nk min(Nq, Nk)); O(Nq Nk) memory.

import { polynomialFactors } from './low-rank.js';
import { MAX_DEGREE, fitToScores } from './polynomial.js';
import { readSizes, type Pair } from './reference-options.js';
import { accumulate, dot, multiply, prepare, prepareLoss, type ReferenceLossArgs } from './reference.js';
import { numericalRank, singularValues } from './singular-values.js';
import { rank } from './theory.js';

export interface GradientPartsArgs extends Omit<ReferenceLossArgs, 'degree'> {
  /** Singular values count for a rank when they exceed this share of the largest one. From 0 to below 1; default 1e-6. */
  rankTolerance?: number;
  /** Degree of the polynomial for `lowRank`, 0 to 8; none, no factors. */
  degree?: number;
}

/** Row-major matrices. Nq = queryLength, Nk = keyLength. */
export interface GradientMatrices {
  /** [Nq, Nk] */
  s: Float64Array;
  /** [Nq, valueDim] */
  l: Float64Array;
  /** [Nq, Nk], as are the rest. */
  beta: Float64Array;
  gamma1: Float64Array;
  gamma2: Float64Array;
  gamma: Float64Array;
}

type Matrix = keyof GradientMatrices;

export interface GradientParts extends GradientMatrices {
  loss: number;
  dx1: Float64Array;
  dx2: Float64Array;
  dy: Float64Array;
  /** [Nk, valueDim] */
  h: Float64Array;
  /** Of each matrix, descending. */
  singularValues: Record<Matrix, Float64Array>;
  /** Numerical ranks, by `rankTolerance`. */
  ranks: Record<Matrix, number>;
  /** When a degree was given. */
  lowRank?: LowRank;
}

/**
 * What the polynomial makes of s: u v^T, on the allowed pairs. With a mask (causal, window, segments) the product of the factors
 * is to be cut to these pairs, and no longer of low rank itself.
 */
export interface LowRank {
  /** Columns of the factors, C(D + degree, degree). */
  rank: number;
  /** c_0 .. c_degree, least squares over all scores as the engine fits sampled ones (polynomial.ts). */
  coefficients: Float32Array;
  /** [Nq, rank]: weighted monomials of R q over the denominators. */
  u: Float64Array;
  /** [Nk, rank]: monomials of R k minus the mean row, which softmax does not see. */
  v: Float64Array;
  /** No rank can exceed these when u v^T takes the place of s, uncut: rank, and its products with valueDim. */
  rankBounds: Record<Matrix, number>;
  /** Relative errors in the Frobenius norm of s, and of all that follows from it, when u v^T takes its place. */
  errors: Record<Matrix, number>;
}

const NAMES: readonly Matrix[] = ['s', 'l', 'beta', 'gamma1', 'gamma2', 'gamma'];

/** Of Nq Nk, and of numbers in the factors: 1 GiB. */
const MOST = 2 ** 27;

/**
 * Every matrix of the gradient, their singular values and numerical ranks, and with `degree` the factors of the polynomial method.
 * Arguments as for `reference.attentionLoss`, with one head and one batch, and without softcap.
 *
 * @throws RangeError for arrays whose size does not fit the shape, for several heads, for lengths and degrees out of reach, and for
 *   softcap; with `degree` also for alibi, bias, mask, sinks, relative and relativePositions, which the factors do not have.
 */
export function gradientParts(args: GradientPartsArgs): GradientParts {
  const name = 'gradientParts';
  check(name, args);
  const { rankTolerance = 1e-6, degree, ...problem } = args;
  const { a1, a2, a3, e } = problem;
  const { call, queries, keys } = prepareLoss(name, problem);
  const { rotatedQ, rotatedK, scale, headDim, valueDim, softmax, turnQuery, turnKey, map } = prepare(name, call);
  const h = call.v;

  const s = new Float64Array(queries * keys);
  const allowed: number[] = [];
  const pairs: Pair[] = [];
  for (let i = 0; i < queries; i++) {
    for (const { key, pair, weight } of softmax(i).keys) {
      s[i * keys + key] = weight;
      allowed.push(i * keys + key);
      pairs.push(pair);
    }
  }
  const matrices = chain(s, h, e, keys);
  const { l, gamma } = matrices;
  // R k and R q, or W_{i-j} k and W_{i-j}^T q where these do not factorise.
  const [dq, dk] = [queries, keys].map((rows) => rowsOf(new Float64Array(rows * headDim), headDim));
  for (const pair of pairs) {
    const [q, k, dT] = [rotatedQ[pair.i], rotatedK[pair.j], scale * gamma[pair.i * keys + pair.j]];
    accumulate(dq[pair.i], dT, map ? map.ofKey(k, pair) : k);
    accumulate(dk[pair.j], dT, map ? map.ofQuery(q, pair) : q);
  }
  const turned = (rows: Float64Array[], turn: typeof turnQuery) =>
    flat(map ? rows : rows.map((row, r) => turn(row, r, 'transpose')));

  const values = each((matrix) => singularValues(matrices[matrix], queries, matrix === 'l' ? valueDim : keys));
  return {
    loss: l.reduce((sum, x) => sum + x * x, 0) / 2,
    dx1: multiply(a1, turned(dq, turnQuery), queries, true),
    dx2: multiply(a2, turned(dk, turnKey), keys, true),
    dy: multiply(a3, multiply(s, l, queries, true), keys, true),
    h,
    ...matrices,
    singularValues: values,
    ranks: each((matrix) => numericalRank(values[matrix], rankTolerance)),
    ...(degree !== undefined && {
      lowRank: approximate(matrices, { rotatedQ, rotatedK, scale, degree, allowed, h, e, keys, valueDim }),
    }),
  };
}

function check(name: string, args: GradientPartsArgs): void {
  const { batch, heads, kvHeads, queryLength, keyLength, headDim } = readSizes(name, args);
  const { rankTolerance = 0, degree, softcap } = args;
  if (batch !== 1 || heads !== 1 || kvHeads !== 1) {
    throw new RangeError(`${name}: is for one head, got shape.batch ${batch}, heads ${heads} and kvHeads ${kvHeads}`);
  }
  if (!(queryLength * keyLength <= MOST)) {
    throw new RangeError(`${name}: matrices are queryLength x keyLength, at most ${MOST}, got ${queryLength * keyLength}`);
  }
  if (!(rankTolerance >= 0 && rankTolerance < 1)) {
    throw new RangeError(`${name}: rankTolerance must be from 0 to below 1, got ${rankTolerance}`);
  }
  if (softcap !== undefined) throw new RangeError(`${name}: has no softcap, got ${softcap}`);
  if (degree === undefined) return;
  if (!Number.isInteger(degree) || degree < 0 || degree > MAX_DEGREE) {
    throw new RangeError(`${name}: degree must be an integer from 0 to ${MAX_DEGREE}, got ${degree}`);
  }
  const size = rank(headDim, degree) * (queryLength + keyLength);
  if (size > MOST) throw new RangeError(`${name}: the factors of degree ${degree} have ${size} numbers, at most ${MOST} are allowed`);
  for (const option of ['alibi', 'bias', 'mask', 'sinks', 'relative', 'relativePositions'] as const) {
    if (args[option]) throw new RangeError(`${name}: the factors have no ${option}; leave degree out`);
  }
}

/** From the weights to the gradient by the scores. */
function chain(s: Float64Array, h: Float64Array, e: ArrayLike<number>, keys: number): GradientMatrices {
  const valueDim = h.length / keys;
  const l = multiply(s, h, keys).map((x, n) => x - e[n]);
  const beta = s.map((_, n) => {
    const [i, j] = [Math.floor(n / keys), n % keys];
    let sum = 0;
    for (let c = 0; c < valueDim; c++) sum += l[i * valueDim + c] * h[j * valueDim + c];
    return sum;
  });
  const gamma1 = s.map((weight, n) => weight * beta[n]);
  const sums = rowsOf(gamma1, keys).map((row) => row.reduce((sum, x) => sum + x, 0));
  const gamma2 = s.map((weight, n) => weight * sums[Math.floor(n / keys)]);
  return { s, l, beta, gamma1, gamma2, gamma: gamma1.map((x, n) => x - gamma2[n]) };
}

interface Parts {
  rotatedQ: readonly Float64Array[];
  rotatedK: readonly Float64Array[];
  scale: number;
  degree: number;
  /** Entries of s. */
  allowed: readonly number[];
  h: Float64Array;
  e: ArrayLike<number>;
  keys: number;
  valueDim: number;
}

/** u v^T for s, and what becomes of the others. */
function approximate(exact: GradientMatrices, parts: Parts): LowRank {
  const { rotatedQ, rotatedK, scale, degree, allowed, h, e, keys, valueDim } = parts;
  const mean = rotatedK[0].map((_, d) => rotatedK.reduce((sum, row) => sum + row[d] / keys, 0));
  const centred = rotatedK.map((row) => row.map((x, d) => x - mean[d]));
  const scaled = rotatedQ.map((row) => row.map((x) => scale * x));
  const scores = Float64Array.from(allowed, (n) => dot(scaled[Math.floor(n / keys)], centred[n % keys]));
  const coefficients = fitToScores(scores, degree);
  const { u, v, rank } = polynomialFactors(scaled, centred, coefficients);

  const [left, right] = [rowsOf(u, rank), rowsOf(v, rank)];
  const s = new Float64Array(exact.s.length);
  for (const n of allowed) s[n] = dot(left[Math.floor(n / keys)], right[n % keys]);
  rowsOf(s, keys).forEach((row, i) => {
    const sum = row.reduce((total, x) => total + x, 0);
    if (sum === 0) return; // nothing is allowed
    for (const numbers of [row, left[i]]) numbers.forEach((x, n) => (numbers[n] = x / sum));
  });
  const found = chain(s, h, e, keys);
  return {
    rank,
    coefficients,
    u,
    v,
    rankBounds: {
      s: rank,
      l: valueDim,
      beta: valueDim,
      gamma1: rank * valueDim,
      gamma2: rank,
      gamma: rank * (valueDim + 1),
    },
    errors: each((matrix) => relativeError(found[matrix], exact[matrix])),
  };
}

function each<T>(make: (matrix: Matrix) => T): Record<Matrix, T> {
  return Object.fromEntries(NAMES.map((matrix) => [matrix, make(matrix)])) as Record<Matrix, T>;
}

/** Views of the rows. */
function rowsOf(x: Float64Array, width: number): Float64Array[] {
  return Array.from({ length: x.length / width }, (_, r) => x.subarray(r * width, (r + 1) * width));
}

function flat(rows: readonly Float64Array[]): Float64Array {
  const x = new Float64Array(rows.length * (rows[0]?.length ?? 0));
  rows.forEach((row, r) => x.set(row, r * row.length));
  return x;
}

/** |x - y|_F / |y|_F; 0 where both are zero. */
function relativeError(x: Float64Array, y: Float64Array): number {
  const norm = (values: (n: number) => number) => Math.sqrt(y.reduce((sum, _, n) => sum + values(n) ** 2, 0));
  const difference = norm((n) => x[n] - y[n]);
  return difference === 0 ? 0 : difference / norm((n) => y[n]);
}
