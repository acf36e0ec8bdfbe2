// SPDX-License-Identifier: MIT
//
// The gradient of a bias at a few sampled distances, exactly: which polynomial will do for it at far distances (lags.c), and whether
// it did. Distances are drawn by octaves, so that those that carry it are among them whatever the bias looks like; those between
// the queries and the keys whose scores are the largest are looked at for their own sake.

import { CHUNK } from './cost.js';
import { MAX_LAG_DEGREE, SAMPLE_LAGS, type Bounds, type Session } from './kernel.js';
import { LAGS, random, type Measured, type Sampler } from './sampling.js';
import type { Problem } from './validate.js';

/** Distances that are looked at one by one; drawn ones of every octave beyond, where all are exact, and where they are not, at most. */
const [FIRST, OF_NEAR, OF_FAR] = [8, 2, 12];

/** Drawn distances in all. */
const DRAWN = 40;

/** Heads with the largest scores, whose most extreme queries and largest keys are looked at. */
const [HEADS, QUERIES, KEYS] = [4, 4, 3];

/** Standard deviations of the squared error that the true one may be off: what a small sample hides. */
const DEVIATIONS = 2.5;

export class LagSampler {
  readonly #session: Session;
  readonly #problem: Problem;
  readonly #distances: number[] = [];
  /** How many distances each stands for. */
  readonly #weights: number[] = [];
  /** [heads with a bias of their own][distances]: exact gradients. */
  #exact: Float64Array[] = [];

  /** @param bounds of all key/value heads. */
  constructor(session: Session, problem: Problem, bounds: readonly Bounds[]) {
    this.#session = session;
    this.#problem = problem;
    const { queryOffset, queryLength, keyLength, window, seed } = problem;
    const last = queryOffset + queryLength - 1;
    const end = (window[0] < 0 ? last : Math.min(last, window[0])) + 1;
    const start = Math.max(0, queryOffset - keyLength + 1);
    const next = random(seed, 0, LAGS);
    const take = (from: number, to: number, count: number) => {
      if (from >= to) return;
      for (let n = 0; n < count; n++) {
        this.#distances.push(count === to - from ? from + n : from + Math.floor(next() * (to - from)));
        this.#weights.push((to - from) / count);
      }
    };
    const octaves = (from: number, to: number, most: number) => {
      const edges = [from];
      while (edges[edges.length - 1] < to) edges.push(Math.min(2 * edges[edges.length - 1], to));
      const left = Math.floor((DRAWN - this.#distances.length) / Math.max(edges.length - 1, 1));
      for (const [n, edge] of edges.entries()) if (n > 0) take(edges[n - 1], edge, Math.min(most, left, edge - edges[n - 1]));
    };
    // chunks do so many distances more exactly
    const far = Math.min(Math.max(start, problem.decays!.near + CHUNK), end);
    const first = Math.min(start + FIRST, far);
    take(start, first, first - start);
    octaves(first, far, OF_NEAR);
    octaves(far, end, OF_FAR);
    for (const t of this.#extremes(bounds)) {
      if (this.#distances.length === SAMPLE_LAGS) break;
      if (t < far || t >= end || this.#distances.includes(t)) continue;
      this.#distances.push(t);
      this.#weights.push(1);
    }
  }

  /** Distances from the queries with extreme scores to the largest keys, of the heads in turn. */
  #extremes(bounds: readonly Bounds[]): number[] {
    const { queryLength, queryOffset } = this.#problem;
    const radius = ({ q_plain_norm, k_centred_norm }: Bounds) => q_plain_norm * k_centred_norm;
    const heads = [...bounds.keys()].sort((a, b) => radius(bounds[b]) - radius(bounds[a])).slice(0, HEADS);
    const all = heads.map((head) => {
      const { aligned, opposed, keys } = this.#session.extremes(head);
      const places = aligned.slice(0, QUERIES).flatMap((row, n) => [row, opposed[n] ?? row].map((one) => one % queryLength));
      return keys.slice(0, KEYS).flatMap((j) => places.map((i) => i + queryOffset - j));
    });
    return all[0].flatMap((_, n) => all.flatMap((own) => own[n] ?? []));
  }

  /**
   * Sets the polynomial of the least degree whose error keeps within the room, or else the best: output and lse are there, and
   * gradients still to come.
   *
   * @param most the highest degree.
   */
  *choose(sampler: Sampler, most: number, room: number): Generator<number, Measured> {
    const fits: (Float32Array | null)[] = [];
    for (let degree = 0; degree <= Math.min(most, MAX_LAG_DEGREE); degree++) fits.push(yield* sampler.coefficients(degree));
    const sums = yield* this.#sums(fits);
    this.#exact = sums.map((own) => own[0]);
    const missing = { error: Infinity, upper: Infinity, relative: Infinity };
    const errors = fits.map((fit, degree) => (fit ? this.#error(sums.map((own) => own[degree + 1]), true) : missing));
    const uppers = errors.map(({ upper }) => upper);
    const found = uppers.findIndex((upper) => upper <= room);
    const degree = found >= 0 ? found : uppers.indexOf(Math.min(...uppers));
    const fit = fits[degree];
    if (fit) this.#session.setLags(degree, fit);
    return errors[degree];
  }

  /** The error of the gradient that was computed. */
  check(): Measured {
    const dBias = this.#session.vector('dbias')!;
    const got = this.#exact.map((_, head) => Float64Array.from(this.#distances, (t) => dBias[this.#entry(t) + head * this.#diagonals]));
    return this.#error(got, false);
  }

  get #diagonals(): number {
    return this.#problem.queryLength + this.#problem.keyLength - 1;
  }

  #entry(distance: number): number {
    return distance - this.#problem.queryOffset + this.#problem.keyLength - 1;
  }

  /** [heads with a bias of their own][exact and each polynomial][distances] */
  *#sums(fits: readonly (Float32Array | null)[]): Generator<number, Float64Array[][]> {
    const { batch, heads, kvHeads, bias } = this.#problem;
    const own = bias!.length > this.#diagonals ? heads : 1;
    const entries = this.#distances.map((t) => this.#entry(t));
    const sums = Array.from({ length: own }, () => Array.from({ length: 4 }, () => new Float64Array(entries.length)));
    // No query sees anything: there are no distances.
    for (let head = 0; head < batch * heads && entries.length > 0; head++) {
      const kv = Math.floor(head / (heads / kvHeads));
      const coefficients = new Float32Array(9);
      fits.forEach((fit, degree) => {
        if (fit) coefficients.set(fit.subarray(kv * (degree + 1), (kv + 1) * (degree + 1)), 3 * degree);
      });
      const got = this.#session.lags(head, entries, coefficients);
      for (const [n, value] of got.entries()) sums[own > 1 ? head % heads : 0][n % 4][n >> 2] += value;
      yield 0;
    }
    return sums;
  }

  /** Frobenius error over norm; of `far` distances only, the others being exact. */
  #error(got: readonly Float64Array[], far: boolean): Measured {
    const beyond = this.#problem.decays!.near + CHUNK;
    let [squares, fourths, norm] = [0, 0, 0];
    for (const [head, exact] of this.#exact.entries()) {
      for (const [n, t] of this.#distances.entries()) {
        norm += this.#weights[n] * exact[n] ** 2;
        if (far && t < beyond) continue;
        const own = this.#weights[n] * (got[head][n] - exact[n]) ** 2;
        squares += own;
        fourths += own * own;
      }
    }
    if (squares === 0) return { error: 0, upper: 0, relative: 0 };
    // of normal errors the fourth moment is three times, the variance of squares twice the square of their mean
    const deviation = Math.sqrt((2 / 3) * fourths) / squares;
    const error = Math.sqrt(squares / norm);
    return { error, upper: error * Math.sqrt(1 + DEVIATIONS * deviation), relative: error };
  }
}
