// SPDX-License-Identifier: MIT
//
// The gradient of a bias at a few sampled distances, exactly: which polynomial will do for it at far distances (lags.c), and whether
// it did. Half of them are drawn evenly in the logarithm of the distance, half by what the bias says of the gradient and its errors: sums of
// weights, whose squares go as exp(2 bias). Those between the queries and the keys whose scores are the largest are looked at for their
// own sake.

import { CHUNK } from './cost.js';
import { random } from './draws.js';
import { MAX_LAG_DEGREE, SAMPLE_LAGS, type Bounds, type Session } from './kernel.js';
import type { Sampler } from './sampling.js';
import { LAGS } from './selection.js';
import type { Measured } from './tally.js';
import type { Problem } from './validate.js';

/** Distances that are looked at one by one; drawn ones beyond, where all are exact, and where they are not, at least. */
const [FIRST, OF_NEAR, OF_FAR] = [8, 8, 24];

/** Of these as many more as there is room for, up to so many pairs: in short sequences single pairs count, and looking takes no time. */
const PAIRS = 2 ** 16;

/** Heads with the largest scores, whose most extreme queries and largest keys are looked at, and distances between these. */
const [HEADS, QUERIES, KEYS, EXTREMES] = [4, 4, 3, 24];

/** Standard deviations of the squared error that the true one may be off: what a small sample hides. */
const DEVIATIONS = 2.5;

/** Chances that would be above 1 are 1: times that the others grow for it. */
const ROUNDS = 4;

export class LagSampler {
  readonly #session: Session;
  readonly #problem: Problem;
  /** Distances in sight: from the first one to before the end. */
  readonly #start: number;
  readonly #end: number;
  /** What each of them carries of the gradient, by the bias. */
  readonly #carried: Float64Array;
  readonly #distances: number[] = [];
  /** How many distances each stands for. */
  readonly #weights: number[] = [];
  /** [heads with a bias of their own][distances]: exact gradients. */
  #exact: Float64Array[] = [];

  /** @param bounds of all key/value heads. */
  constructor(session: Session, problem: Problem, bounds: readonly Bounds[]) {
    this.#session = session;
    this.#problem = problem;
    const { batch, heads, queryOffset, queryLength, keyLength, window, seed } = problem;
    const last = queryOffset + queryLength - 1;
    const end = (this.#end = (window[0] < 0 ? last : Math.min(last, window[0])) + 1);
    const start = (this.#start = Math.max(0, queryOffset - keyLength + 1));
    this.#carried = this.#carriedBy();
    const next = random(seed, 0, LAGS);
    // chunks do so many distances more exactly
    const far = Math.min(Math.max(start, problem.decays!.near + CHUNK), end);
    const first = Math.min(start + FIRST, far);
    this.#draw(start, first, FIRST, next());
    this.#draw(first, far, OF_NEAR, next());
    const extremes = this.#extremes(bounds).slice(0, EXTREMES);
    const affordable = Math.floor(PAIRS / (batch * heads * queryLength));
    this.#draw(far, end, Math.min(Math.max(OF_FAR, affordable), SAMPLE_LAGS - FIRST - 2 * OF_NEAR - EXTREMES), next());
    for (const t of extremes) {
      if (t < far || t >= end || this.#distances.includes(t)) continue;
      this.#distances.push(t);
      this.#weights.push(1);
    }
  }

  /**
   * About `count` of the distances from .. to - 1, hardly more, all where there are not more. Each has a chance, whose inverse is its
   * weight, and the sums of chances are met at equal steps, so that every part of the range has about as many as it should.
   */
  #draw(from: number, to: number, count: number, shift: number): void {
    if (from >= to) return;
    const chances = this.#carried.slice(from - this.#start, to - this.#start);
    const carried = sumUpTo(chances, 1, Infinity);
    const octaves = Math.log1p((to - from) / FIRST);
    for (let n = 0; n < chances.length; n++) {
      chances[n] = (carried > 0 ? chances[n] / carried : 0) + Math.log1p(1 / (n + FIRST)) / octaves;
    }
    let factor = count / sumUpTo(chances, 1, Infinity);
    for (let n = 0; n < ROUNDS; n++) factor *= Math.min(count, to - from) / sumUpTo(chances, factor, 1);
    for (let [t, before] = [from, shift]; t < to; t++) {
      const chance = Math.min(1, factor * chances[t - from]);
      const after = before + chance;
      if (chance === 1 || Math.floor(after) > Math.floor(before)) {
        this.#distances.push(t);
        this.#weights.push(1 / chance);
      }
      before = after;
    }
  }

  /** For each distance in sight the sum over heads and pairs of exp(2 bias), over squares of sums of exp(bias). */
  #carriedBy(): Float64Array {
    const { queryOffset, queryLength, keyLength, bias } = this.#problem;
    const own = new Float64Array(Math.max(this.#end - this.#start, 0));
    const carried = new Float64Array(own.length);
    for (let first = this.#entry(this.#start); first < bias!.length; first += this.#diagonals) {
      let [top, sum] = [-Infinity, 0];
      for (let n = 0; n < own.length; n++) top = Math.max(top, bias![first + n]);
      for (let n = 0; n < own.length; n++) sum += own[n] = Math.exp(bias![first + n] - top);
      for (let n = 0; n < own.length && sum > 0; n++) {
        const before = this.#start + n - queryOffset;
        carried[n] += (Math.min(queryLength, keyLength + before) - Math.max(0, before)) * (own[n] / sum) ** 2;
      }
    }
    return carried;
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

  /**
   * The error of the gradient that was computed. Exact ones go by the output and lse that are there; what known rows whose lse is off
   * change in them counts in two ways, and the larger error is taken: as if signs were by chance, and as if they were alike.
   */
  check(sampler: Sampler, limit: number): Measured {
    const dBias = this.#session.vector('dbias')!;
    const got = this.#exact.map((_, head) => Float64Array.from(this.#distances, (t) => dBias[this.#entry(t) + head * this.#diagonals]));
    const { single, all, spread } = this.#changes(sampler, limit);
    const less = (sums: readonly Float64Array[]) => got.map((own, head) => own.map((value, n) => value - sums[head][n]));
    const errors = [this.#error(less(single), false), this.#error(less(all), false, spread)];
    return errors[0].upper >= errors[1].upper ? errors[0] : errors[1];
  }

  /**
   * Sums over known rows of what each changes, each standing for w rows: times sqrt(w) `single`, times w `all`, whose squares are too
   * large by `spread` on average, sums of w (w - 1) times squares.
   */
  #changes(sampler: Sampler, limit: number): Record<'single' | 'all' | 'spread', Float64Array[]> {
    const zeros = () => this.#exact.map(() => new Float64Array(this.#distances.length));
    const [single, all, spread] = [zeros(), zeros(), zeros()];
    const { queryLength, heads } = this.#problem;
    const entries = this.#distances.map((t) => this.#entry(t));
    for (let kv = 0; kv < this.#session.heads && entries.length > 0; kv++) {
      for (const change of sampler.changedRows(kv, limit)) {
        const head = (kv * this.#session.rowsOfHead) / queryLength + Math.floor(change.row / queryLength);
        const own = this.#exact.length > 1 ? head % heads : 0;
        const weight = change.share ** 2;
        for (const [n, value] of this.#session.lagChanges(kv, change, entries).entries()) {
          single[own][n] += change.share * value;
          all[own][n] += weight * value;
          spread[own][n] += weight * (weight - 1) * value ** 2;
        }
      }
    }
    return { single, all, spread };
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

  /** Frobenius error over norm; of `far` distances only, the others being exact. `spread`: by what squares of differences are too large. */
  #error(got: readonly Float64Array[], far: boolean, spread: readonly Float64Array[] | null = null): Measured {
    const beyond = this.#problem.decays!.near + CHUNK;
    let [squares, fourths, norm] = [0, 0, 0];
    for (const [head, exact] of this.#exact.entries()) {
      for (const [n, t] of this.#distances.entries()) {
        norm += this.#weights[n] * exact[n] ** 2;
        if (far && t < beyond) continue;
        const own = this.#weights[n] * ((got[head][n] - exact[n]) ** 2 - (spread ? spread[head][n] : 0));
        squares += own;
        fourths += own * own;
      }
    }
    if (squares <= 0) return { error: 0, upper: 0, relative: 0 };
    // of normal errors the fourth moment is three times, the variance of squares twice the square of their mean
    const deviation = Math.sqrt((2 / 3) * fourths) / squares;
    const error = Math.sqrt(squares / norm);
    return { error, upper: error * Math.sqrt(1 + DEVIATIONS * deviation), relative: error };
  }
}

/** The sum of factor times each, these being `most` at most. */
function sumUpTo(values: Float64Array, factor: number, most: number): number {
  let sum = 0;
  for (let n = 0; n < values.length; n++) sum += Math.min(most, factor * values[n]);
  return sum;
}
