// SPDX-License-Identifier: MIT
//
// Looking at the data: bounds of every key/value head, a polynomial for each fitted to sampled scores, and errors measured
// on a few rows that are computed exactly. O(N D) for the bounds, O(N (D + Dv)) for each sampled row.
//
// Rows are drawn by a generator seeded with the call's seed and the head, so a call repeated gives the same choice, and
// `backward` finds the polynomials of its `forward`. Only rows that may see a key are drawn.

import { CHECK_ROWS, CHUNK, LOOKED_SEGMENTS, SAMPLE_HEADS, SAMPLE_ROWS, SAMPLE_SCORES, type Pass } from './cost.js';
import { scoreRadius } from './certificate.js';
import type { Bounds, Rows, Session } from './kernel.js';
import { evaluate, fitToScores } from './polynomial.js';
import { seeingQueries, seenKeys, segmentsOf } from './scores.js';

/** Sampled errors. */
export interface Measured {
  /** In the units of the tolerance; Infinity where the polynomial's weights are not positive. */
  error: number;
  /** Relative Frobenius error of the same rows. */
  relative: number;
}

/** Differences this small, relative to what was summed, are float32 rounding and count as none (see `outputError`). */
const ROUNDING = 2 ** -18;

/** Streams of random numbers, so that different questions get different rows. */
const [PILOT, CHECK, HEADS, HARD, SEGMENTS] = [1, 2, 3, 4, 5];

/** Bounds of all key/value heads, one after the other; yields 0 in between, so that a caller can pause. */
export function* survey(session: Session): Generator<number, Bounds[]> {
  const bounds: Bounds[] = [];
  for (let head = 0; head < session.heads; head++) {
    bounds.push(session.prepare(head));
    yield 0;
  }
  return bounds;
}

export class Sampler {
  readonly #session: Session;
  readonly #bounds: readonly Bounds[];
  readonly #seed: number;
  readonly #looked: number[];
  readonly #scores = new Map<number, Float32Array>();
  readonly #hard = new Map<number, number[]>();

  constructor(session: Session, bounds: readonly Bounds[], seed: number) {
    this.#session = session;
    this.#bounds = bounds;
    this.#seed = seed;
    const radii = bounds.map((one) => scoreRadius(session.geometry, one));
    const widest = radii.indexOf(Math.max(...radii));
    this.#looked = draw(SAMPLE_HEADS, session.heads, [Math.max(widest, 0)], random(seed, 0, HEADS));
  }

  /**
   * The polynomials of all key/value heads, [heads][degree + 1], each the least-squares fit to the scores of its pilot rows;
   * null where some score or coefficient is too large for float32.
   */
  *coefficients(degree: number): Generator<number, Float32Array | null> {
    const all = new Float32Array(this.#session.heads * (degree + 1));
    for (let head = 0; head < this.#session.heads; head++) {
      const own = this.#fit(head, degree);
      if (!own) return null;
      all.set(own, head * (degree + 1));
      yield 0;
    }
    return all;
  }

  /**
   * Errors to expect of each degree (ascending): rows of a few heads, exact and with the polynomial, by ra_sample_rows. Drawn
   * rows first; then, of the degrees that stay within `limit` on these, rows that are likely to be worse, until one degree
   * stays within it there too.
   */
  *pilot(pass: Pass, degrees: readonly number[], limit: number): Generator<number, Map<number, Measured>> {
    const tallies = new Map(degrees.map((degree) => [degree, new Tally()]));
    const drawn = yield* this.#exactly(pass, (head) => this.#portions([], this.#pilotRows(head)));
    for (const [degree, tally] of tallies) yield* this.#predict(pass, degree, drawn, tally);
    const passing = (tally: Tally) => tally.result().error <= limit;
    if (Array.from(tallies.values()).some(passing)) {
      const hard = yield* this.#exactly(pass, (head) => this.#portions(this.#hardRows(head), []));
      for (const [degree, tally] of tallies) {
        if (!passing(tally)) continue;
        yield* this.#predict(pass, degree, hard, tally);
        if (passing(tally)) break;
      }
    }
    return new Map(Array.from(tallies, ([degree, tally]) => [degree, tally.result()]));
  }

  /** Portions of rows of the heads that are looked at, with their exact values. */
  *#exactly(pass: Pass, portions: (head: number) => Portion[]): Generator<number, Known[]> {
    const known: Known[] = [];
    for (const head of this.#looked) {
      for (const portion of portions(head)) {
        known.push({ head, ...portion, exact: this.#session.rows(head, portion.rows, null, pass === 'backward') });
        yield 0;
      }
    }
    return known;
  }

  /** What a degree would make of known rows. */
  *#predict(pass: Pass, degree: number, known: readonly Known[], tally: Tally): Generator<number, void> {
    for (const { head, rows, weight, exact } of known) {
      const own = this.#fit(head, degree);
      const got = own && this.#session.rows(head, rows, own, pass === 'backward');
      if (!got?.positive) tally.fail();
      else if (pass === 'forward') tally.output(exact.out, got.out, this.#bounds[head].v_half_range, weight);
      else tally.gradient('dq', exact.dq, got.dq, this.#rounding(head, rows, exact), weight);
      yield 0;
    }
  }

  /**
   * Errors to expect for the worst values in [-1, 1]: max over pilot rows of sum_j |P^_j - P_j|, which some v attains. From
   * scores of every few keys, so an estimate; exactness inside the causal diagonal is not counted.
   */
  *worstValues(degrees: readonly number[]): Generator<number, Map<number, Measured>> {
    const worst = new Map(degrees.map((degree) => [degree, 0]));
    const stride = Math.ceil(seenKeys(this.#session.geometry) / SAMPLE_SCORES);
    for (const head of this.#looked) {
      for (const row of this.#pilotRows(head)) {
        const scores = this.#session.scores(head, [row], stride);
        for (const degree of degrees) {
          const own = this.#fit(head, degree);
          worst.set(degree, Math.max(worst.get(degree)!, own ? totalVariation(scores, own) : Infinity));
        }
        yield 0;
      }
    }
    return new Map(Array.from(worst, ([degree, error]) => [degree, { error, relative: error }]));
  }

  /**
   * The error of a finished pass: on the rows that are likely to be the worst, and on drawn rows, others than the pilot's,
   * CHECK_ROWS or more in all, however few the heads. Gradients also on columns, likewise.
   */
  *check(pass: Pass): Generator<number, Measured> {
    const tally = new Tally();
    const known = yield* this.#exactly(pass, (head) => this.#checkPortions(head));
    for (const { head, rows, weight, exact } of known) {
      if (pass === 'forward') {
        tally.output(exact.out, this.#gather('out', head, rows), this.#bounds[head].v_half_range, weight);
      } else {
        const rounding = this.#rounding(head, rows, exact);
        tally.gradient('dq', exact.dq, this.#gather('dq', head, rows), rounding, weight);
      }
      yield 0;
    }
    for (const head of pass === 'backward' ? this.#looked : []) {
      const own = known.find((one) => one.head === head);
      const rounding = own ? this.#rounding(head, own.rows, own.exact) : 0;
      for (const { rows: keys, weight } of this.#checkColumns(head)) {
        const { dk, dv } = this.#session.columns(head, keys);
        tally.gradient('dk', dk, this.#gather('dk', head, keys), rounding, weight);
        tally.gradient('dv', dv, this.#gather('dv', head, keys), 0, weight);
        yield 0;
      }
    }
    return tally.result();
  }

  /** How far the output and lse that were given are from exact ones: the larger of the output's error and lse's. */
  *given(): Generator<number, number> {
    const tally = new Tally();
    let largest = 0;
    const known = yield* this.#exactly('forward', (one) => this.#checkPortions(one));
    for (const { head, rows, exact } of known) {
      tally.output(exact.out, this.#gather('out', head, rows), this.#bounds[head].v_half_range, 1);
      const lse = this.#gather('lse', head, rows);
      exact.lse.forEach((value, n) => {
        if (value === lse[n]) return; // -Infinity where nothing is seen
        largest = worse(largest, Math.abs(value - lse[n]) / Math.max(1, Math.abs(value)));
      });
    }
    return worse(largest, tally.result().error);
  }

  #fit(head: number, degree: number): Float32Array | null {
    let scores = this.#scores.get(head);
    if (!scores) {
      const stride = Math.ceil((SAMPLE_ROWS * seenKeys(this.#session.geometry)) / SAMPLE_SCORES);
      const rows = this.#pilotRows(head);
      scores = rows.length > 0 ? this.#session.scores(head, rows, stride) : new Float32Array(0);
      this.#scores.set(head, scores);
    }
    if (!scores.every(Number.isFinite)) return null;
    const own = fitToScores(scores, degree);
    return own.every(Number.isFinite) ? own : null;
  }

  #pilotRows(head: number): number[] {
    return this.#rows(head, PILOT, SAMPLE_ROWS, []);
  }

  #checkPortions(head: number): Portion[] {
    const count = Math.ceil(CHECK_ROWS / SAMPLE_ROWS / this.#looked.length) * SAMPLE_ROWS;
    return this.#portions(this.#hardRows(head), this.#rows(head, CHECK, count, this.#pilotRows(head)));
  }

  /** `hard` rows count for themselves, `drawn` ones for all other rows; in portions that one call takes. */
  #portions(hard: readonly number[], drawn: readonly number[]): Portion[] {
    const others = drawn.filter((row) => !hard.includes(row));
    const weight = others.length > 0 ? Math.max(1, (this.#session.rowsOfHead - hard.length) / others.length) : 1;
    return [...inPortions(hard, 1), ...inPortions(others, weight)];
  }

  /**
   * Rows where a polynomial is likely to be worst: the largest queries, those whose scores with the largest key are the
   * largest, and rows that see few keys through the polynomial (errors average out over many): when causal, the first two chunks
   * of one query head that see any, then ever fewer of the rows behind them; the first or the last two where a window ends
   * there; some of packed sequences.
   */
  #hardRows(head: number): number[] {
    const known = this.#hard.get(head);
    if (known) return known;
    const { causal, queryOffset, queryLength } = this.#session.geometry;
    const { large, aligned } = this.#session.extremes(head);
    const rows = new Set([...large, ...aligned].filter((row) => !causal || (row % queryLength) + queryOffset >= 0));
    const start = Math.ceil(Math.max(1 - queryOffset, 0) / CHUNK) * CHUNK;
    if (causal && start + queryOffset <= 2 * CHUNK) {
      const first = (this.#seed % (this.#session.rowsOfHead / queryLength)) * queryLength;
      for (let i = start; i < Math.min(start + 2 * CHUNK, queryLength); i++) rows.add(first + i);
      const later = start + 2 * CHUNK;
      const next = random(this.#seed, head, HARD);
      for (let n = 0; n < 2 * SAMPLE_ROWS && later < queryLength; n++) {
        rows.add(first + Math.floor(later * (queryLength / later) ** next())); // uniform in the logarithm
      }
    }
    for (const row of [...this.#windowRows(), ...this.#segmentRows(head)]) rows.add(row);
    const sorted = [...rows].sort((a, b) => (a % queryLength) - (b % queryLength));
    this.#hard.set(head, sorted);
    return sorted;
  }

  /**
   * A window that is limited to one side sees least at the other end. Rows within a chunk of that end see its keys at the edges,
   * which are exact, when the queries begin before the keys or end behind them.
   */
  #windowRows(): number[] {
    const { causal, queryOffset, queryLength, keyLength, window } = this.#session.geometry;
    const [left, right] = window;
    const { from, to } = seeingQueries(this.#session.geometry);
    const starts: number[] = [];
    if (!causal && right >= 0) starts.push(from + (queryOffset < 0 ? CHUNK : 0));
    if (left >= 0) starts.push(to - 2 * CHUNK - (queryOffset + queryLength > keyLength ? CHUNK : 0));
    const first = (this.#seed % (this.#session.rowsOfHead / queryLength)) * queryLength;
    return starts.flatMap((start) =>
      Array.from({ length: 2 * CHUNK }, (_, n) => start + n).flatMap((i) => (i >= from && i < to ? [first + i] : [])),
    );
  }

  /**
   * Packed sequences begin anew: rows that see few keys through the polynomial. When causal, the second chunk of a few of them;
   * else a chunk of rows of the shortest.
   */
  #segmentRows(head: number): number[] {
    const g = this.#session.geometry;
    if (g.segments.length === 1) return [];
    const next = random(this.#seed, head, SEGMENTS);
    const first = Math.floor(next() * (this.#session.rowsOfHead / g.queryLength)) * g.queryLength;
    const rows = (start: number, end: number) =>
      Array.from({ length: Math.min(CHUNK, end - start) }, (_, n) => first + start + n);
    const segments = segmentsOf(g);
    if (!g.causal) {
      const shortest = segments.sort((a, b) => a.keys - b.keys).slice(0, LOOKED_SEGMENTS);
      return shortest.flatMap(({ from, to }) => rows(from, to));
    }
    const second = segments
      .map(({ from, to }) => ({ start: (Math.floor(from / CHUNK) + 1) * CHUNK, to }))
      .filter(({ start, to }) => start < to);
    const chosen = draw(Math.min(LOOKED_SEGMENTS, second.length), second.length, [], next);
    return chosen.flatMap((n) => rows(second[n].start, second[n].to));
  }

  /** Rows of a head, the one of the largest query first, else none of `taken` as long as there are others. */
  #rows(head: number, stream: number, count: number, taken: readonly number[]): number[] {
    const { queryLength } = this.#session.geometry;
    // Count only rows that see a key: number n is row `place(n)`.
    const { from, to } = seeingQueries(this.#session.geometry);
    const seeing = to - from;
    if (seeing <= 0) return [];
    const place = (n: number) => Math.floor(n / seeing) * queryLength + from + (n % seeing);
    const number = (row: number) => Math.floor(row / queryLength) * seeing + (row % queryLength) - from;
    const largest = this.#bounds[head].q_argmax;
    const first = largest % queryLength >= from && largest % queryLength < to ? [number(largest)] : [];
    const total = (this.#session.rowsOfHead / queryLength) * seeing;
    return draw(count, total, first, random(this.#seed, head, stream), new Set(taken.map(number))).map(place);
  }

  /** Keys in portions: the largest ones, and drawn ones that count for the others; ascending in each. */
  #checkColumns(head: number): Portion[] {
    const { keyLength } = this.#session.geometry;
    const ascending = (keys: Iterable<number>) => [...keys].sort((a, b) => a - b);
    const large = new Set(this.#session.extremes(head).keys);
    const drawn = draw(Math.min(SAMPLE_ROWS, keyLength - large.size), keyLength, [], random(this.#seed, head, CHECK), large);
    const weight = drawn.length > 0 ? Math.max(1, (keyLength - large.size) / drawn.length) : 1;
    return [...inPortions(ascending(large), 1), ...inPortions(ascending(drawn), weight)];
  }

  /** Rows of an array of the session, one after the other. */
  #gather(array: 'out' | 'lse' | 'dout' | 'dq' | 'dk' | 'dv', head: number, rows: readonly number[]): Float32Array {
    const parts = rows.map((row) => this.#session.resultRow(array, head, row));
    const all = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
    parts.forEach((part, n) => all.set(part, n * part.length));
    return all;
  }

  /**
   * Frobenius norm below which a difference of these rows of dq is float32 rounding, where the values of all keys are alike to
   * rounding: then dq = scale sum_j P_ij (dP_ij - delta_i) k_j is nothing but that. 0 elsewhere. Taken for dk too.
   */
  #rounding(head: number, rows: readonly number[], exact: Rows): number {
    const { scale, valueDim, rotaryGain } = this.#session.geometry;
    const { q_norm, k_norm, v_half_range } = this.#bounds[head];
    const largest = exact.out.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
    if (v_half_range > ROUNDING * largest) return 0;
    const dout = this.#gather('dout', head, rows).reduce((sum, x) => sum + x * x, 0);
    const delta = Math.sqrt(dout * valueDim) * largest;
    return ROUNDING * Math.abs(scale) * rotaryGain ** 2 * Math.max(q_norm, k_norm) * delta;
  }
}

/** Up to SAMPLE_ROWS rows (or keys) of a head, each standing for `weight` rows. */
interface Portion {
  rows: number[];
  weight: number;
}

/** A portion with what is exact. */
interface Known extends Portion {
  head: number;
  exact: Rows;
}

function inPortions(rows: readonly number[], weight: number): Portion[] {
  const count = Math.ceil(rows.length / SAMPLE_ROWS);
  return Array.from({ length: count }, (_, n) => ({ rows: rows.slice(n * SAMPLE_ROWS, (n + 1) * SAMPLE_ROWS), weight }));
}

/** Adds up errors over heads. NaN anywhere counts as an infinite error. */
class Tally {
  #largest = 0;
  #squares = new Map<string, { difference: number; reference: number; rounding: number }>();

  /** Weights that are not positive, or no polynomial at all. */
  fail(): void {
    this.#largest = Infinity;
  }

  /** @param weight rows that each of these stands for, in sums of squares. */
  output(exact: Float32Array, got: Float32Array, halfRange: number, weight: number): void {
    this.#largest = worse(this.#largest, outputError(exact, got, halfRange));
    this.#add('out', exact, got, 0, weight);
  }

  gradient(name: 'dq' | 'dk' | 'dv', exact: Float32Array, got: Float32Array, rounding: number, weight: number): void {
    this.#add(name, exact, got, rounding, weight);
  }

  result(): Measured {
    let error = this.#largest;
    const total = { difference: 0, reference: 0, rounding: 0 };
    for (const [name, squares] of this.#squares) {
      if (name !== 'out') error = worse(error, ratio(squares));
      total.difference += squares.difference;
      total.reference += squares.reference;
      total.rounding += squares.rounding;
    }
    return { error, relative: worse(ratio(total), this.#largest === Infinity ? Infinity : 0) };
  }

  #add(name: string, exact: Float32Array, got: Float32Array, rounding: number, weight: number): void {
    const squares = this.#squares.get(name) ?? { difference: 0, reference: 0, rounding: 0 };
    exact.forEach((x, n) => {
      squares.difference += weight * (got[n] - x) ** 2;
      squares.reference += weight * x * x;
    });
    squares.rounding += weight * rounding ** 2;
    this.#squares.set(name, squares);
  }
}

/**
 * max |got - exact| over half the range of v. Where v is constant (half range 0) the output is v whatever the weights: then
 * the error is 0 for differences at the rounding level of |v|, else infinite.
 */
function outputError(exact: Float32Array, got: Float32Array, halfRange: number): number {
  let [difference, largest] = [0, 0];
  exact.forEach((x, n) => {
    difference = worse(difference, Math.abs(got[n] - x));
    largest = Math.max(largest, Math.abs(x));
  });
  if (halfRange > 0) return difference / halfRange;
  return difference <= ROUNDING * largest ? 0 : Infinity;
}

/** Relative Frobenius error. */
function ratio({
  difference,
  reference,
  rounding,
}: {
  difference: number;
  reference: number;
  rounding: number;
}): number {
  if (difference <= rounding) return 0; // 0 / 0 included
  return worse(0, Math.sqrt(difference / reference));
}

/** The larger one; NaN is worse than anything. */
function worse(a: number, b: number): number {
  return Number.isNaN(b) ? Infinity : Math.max(a, b);
}

/** sum_j |p(s_j) / sum p - exp(s_j) / sum exp|: what the output can move by for values in [-1, 1]. */
function totalVariation(scores: Float32Array, coefficients: Float32Array): number {
  const top = scores.reduce((most, s) => Math.max(most, s), -Infinity);
  const exact = Array.from(scores, (s) => Math.exp(s - top));
  const got = Array.from(scores, (s) => evaluate(coefficients, s));
  const sum = (values: number[]) => values.reduce((total, value) => total + value, 0);
  const [exactSum, gotSum] = [sum(exact), sum(got)];
  if (scores.length > 0 && !(gotSum > 0)) return Infinity;
  return sum(exact.map((w, n) => Math.abs(got[n] / gotSum - w / exactSum)));
}

/** Up to `count` different numbers below `total`: those of `first`, then random ones, those of `avoid` only when short. */
function draw(
  count: number,
  total: number,
  first: readonly number[],
  next: () => number,
  avoid: ReadonlySet<number> = new Set(),
): number[] {
  const drawn = new Set(first);
  const wanted = Math.min(count, total);
  const others = total - new Set([...first, ...avoid]).size;
  const allowed = drawn.size + others >= wanted ? (n: number) => !avoid.has(n) : () => true;
  while (drawn.size < wanted) {
    const start = Math.floor(next() * total);
    // Small totals: the next free number, so that this ends soon.
    for (let step = 0; step < total; step++) {
      const n = (start + step) % total;
      if (drawn.has(n) || !allowed(n)) continue;
      drawn.add(n);
      break;
    }
  }
  return [...drawn];
}

/** Numbers in [0, 1) by mulberry32, from a seed and two more integers. */
function random(seed: number, head: number, stream: number): () => number {
  let state = (seed ^ Math.imul(head + 1, 0x9e3779b1) ^ Math.imul(stream, 0x85ebca6b)) >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}
