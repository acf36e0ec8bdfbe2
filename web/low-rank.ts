// SPDX-License-Identifier: MIT
//
// The polynomial method as matrices, in float64: p(x . y) = sum over monomials x^alpha y^alpha, each with its weight
// c_m m! / alpha!, m = |alpha| (the multinomial theorem), so that exp(Q K^T) is near U V^T with C(D+g, g) columns (Alman, Song
// 2023, arXiv 2302.13214, Lemma 3.4). O(N rank) numbers, written out as the engine never does.

import { rank } from './theory.js';

/** x_variable times the monomial number `parent`; variables do not decrease towards the parent. */
interface Monomial {
  parent: number;
  variable: number;
  degree: number;
  /** m! / alpha! */
  multinomial: number;
  /** The power of its variable. */
  power: number;
}

/**
 * U [N, r] and V [M, r], r = C(D + degree, degree), with p(x_i . y_j) = sum_n U_in V_jn for the rows of x [N, D] and y [M, D] and p
 * of the given coefficients, c_0 first.
 */
export function polynomialFactors(
  x: readonly Float64Array[],
  y: readonly Float64Array[],
  coefficients: ArrayLike<number>,
): { u: Float64Array; v: Float64Array; rank: number } {
  const list = monomials((x[0] ?? y[0]).length, coefficients.length - 1);
  const u = features(x, list);
  for (let n = 0; n < u.length; n++) {
    const { degree, multinomial } = list[n % list.length];
    u[n] *= coefficients[degree] * multinomial;
  }
  return { u, v: features(y, list), rank: list.length };
}

/** By degree, then by smallest variable, as in the kernels. */
function monomials(dim: number, degree: number): Monomial[] {
  const list: Monomial[] = [{ parent: -1, variable: dim, degree: 0, multinomial: 1, power: 0 }];
  for (let m = 1; m <= degree; m++) {
    const [first, end] = [m === 1 ? 0 : rank(dim, m - 2), list.length];
    for (let variable = 0; variable < dim; variable++) {
      for (let parent = first; parent < end; parent++) {
        if (list[parent].variable < variable) continue;
        const power = list[parent].variable === variable ? list[parent].power + 1 : 1;
        list.push({ parent, variable, degree: m, multinomial: (list[parent].multinomial * m) / power, power });
      }
    }
  }
  return list;
}

/** [N, r] */
function features(rows: readonly Float64Array[], list: readonly Monomial[]): Float64Array {
  const phi = new Float64Array(rows.length * list.length);
  rows.forEach((row, i) => {
    const own = phi.subarray(i * list.length, (i + 1) * list.length);
    own[0] = 1;
    for (let n = 1; n < list.length; n++) own[n] = row[list[n].variable] * own[list[n].parent];
  });
  return phi;
}
