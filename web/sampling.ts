// SPDX-License-Identifier: MIT
//
// Looking at the data: bounds of every key/value head, a polynomial for each fitted to sampled scores, and errors measured
// on a few rows that are computed exactly. O(N D) for the bounds, O(N (D + Dv)) for each sampled row.
//
// The rows are the same before and after the run: the pilot works out what a polynomial would make of them, the check what the
// engine did make of them, both against the same exact values. So what passes the pilot misses the check only by what the pilot
// cannot see: float32 sums of the engine, weights that are not positive in other rows, and columns of dk and dv.
//
// Rows are drawn by a generator seeded with the call's seed and the head, so a call repeated gives the same choice, and
// `backward` finds the polynomials of its `forward`. Only rows that may see a key are drawn. Where chance decides and what follows is dearer
// than rows, more of them are drawn, once (tally.ts).

import { CHUNK, columnsCost, DRAWN_ROWS, extremesCost, FIT, LOOKED_SEGMENTS, portionCost, prepareCost, rowsCost } from './cost.js';
import { SAMPLE_KEYS, SAMPLE_ROWS, SAMPLE_SCORES, SHORT_ROWS, STEEP, type Pass } from './cost.js';
import { scoreRadius } from './certificate.js';
import { draw, random, WeightedDraws, type Drawn } from './draws.js';
import { SAMPLE_CHANGES, type Bounds, type Change, type Columns, type Distance, type Outliers, type Rows, type Session } from './kernel.js';
import { condense, evaluate, ScoreFits } from './polynomial.js';
import { seeingQueries, seenKeys, segmentsOf } from './scores.js';
import { overRange, ROUNDING, Tally, worse, type Measured, type Sample } from './tally.js';
import { drownedRows } from './transforms.js';

/** Errors of lse below this share of a limit are left alone in columns: those of rows would have to agree to make up a tolerance. */
const HARMLESS = 1 / 32;

/** A degree is not tried where the one before and the fits make its error this many times too large. */
const HOPELESS = 3;

/** Gradients whose error is too large by this share, or on n portions an nth of it, may yet turn out well. */
const CHANCE = 0.8;

/**
 * Where there is no time to see all rows: an error that is to stay within a limit must be seen to be within this share of it, of the
 * largest error and of sums of squares; beside outliers, where rows differ much, of what was seen before all but drawn ones were. Less
 * where more is lost by a miss (`surety`).
 */
const SURE = { forward: 0.6, backward: 0.9, besideOutliers: 0.1 } as const;

/**
 * An error of outputs that is seen to be within this share of its limit, on the largest scores and a few drawn rows, is not looked at on more
 * drawn ones where these are less than one of so many of all: what they do not show those others would not show either.
 */
const [AMPLE, ONE_OF] = [1 / 4, 64];
/** A polynomial that may miss runs where its error on rows that must be looked at is within this share of the limit: the check sees the others. */
const RUNS = 1 / 2;

/** Portions of rows with the largest scores that have to be looked at; beside outliers what else is large decides. */
const LARGEST = { all: 1, besideOutliers: 2 } as const;

/**
 * Where fewer looks are left than this, a degree that usually fails is passed over for the next one; outputs in the last look also for none. It
 * does where the usual error is more than one of so many parts of the limit: worst rows of outputs are farther from usual ones.
 */
const FEW_LOOKS = 4;
const UNLIKELY = { forward: { few: 2, last: 4 }, backward: { few: 1, last: 2 } } as const;

/** Where chance decides, so many times as much is drawn in all, or so many if that is too much: what it may hide falls to two thirds. */
const TIMES = [4, 3];

interface PilotOptions {
  thorough?: boolean;
  short?: (degree: number) => boolean;
  alike?: (next: number) => boolean;
  budget?: number;
  worth?: (degree: number) => number;
  surety?: (degree: number) => number;
}

/**
 * With slopes: first rows of chunks that are looked at in each key/value head, and keys between chunks, if they see half of all; as many more
 * as they see less, every tile that they touch included.
 */
const SLOPE_ROWS = 4 * SAMPLE_ROWS;
const SLOPE_KEYS = 3 * SAMPLE_ROWS;
const TOUCHED = 256;
/**
 * Where slopes are steep, the rows behind the first one have few keys that count too, and keys farther before it may weigh more than the last:
 * so many of a chunk, in some chunks.
 */
const [STEEP_DEPTH, STEEP_CHUNKS] = [4, SAMPLE_ROWS];

/** Of the norm of the largest key over that of typical ones: errors of rows next to it are then like those of no others. */
const KEY_STANDS_OUT = 4;
/** Queries of which the largest is so many times the usual one are looked at by twice as many of the largest. */
const QUERY_STANDS_OUT = 2;

/** Query heads of a group whose first rows are looked at, two chunks of each; more of them where there are fewer heads. */
const FIRST_HEADS = 2;

/** Streams of random numbers, so that different questions get different rows. */
export const [DRAWN, COLUMNS, SEGMENTS, GIVEN, SLOPES, LAGS] = [1, 2, 3, 4, 5, 6];

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
  readonly #outliers: Outliers | null;
  readonly #next: readonly (readonly number[])[];
  readonly #before: readonly (readonly number[])[];
  #order: readonly number[] | null = null;
  readonly #scores = new Map<number, ScoreFits | null>();
  readonly #fits = new Map<string, Float32Array | null>();
  readonly #drawn = new Map<number, DrawnRows>();
  /** How many times as much as at first is drawn by now. */
  readonly #times: Record<Sample, number> = { rows: 1, columns: 1 };
  readonly #rest = new Map<string, Portion[]>();
  readonly #few = new Map<number, ReadonlySet<number>>();
  readonly #extreme = new Map<number, ReadonlySet<number>>();
  readonly #extremes = new Map<number, ReturnType<Session['extremes']>>();
  readonly #columns = new Map<number, DrawnColumns>();

  /**
   * @param outliers rows that are exact; `bounds` are those of the others.
   * @param next for each head some of the largest queries that are left, numbered like outliers: they are many then, and alike.
   * @param before for each head rows that were extreme when there were none, where an output and lse were given: what gave these may have had none.
   */
  constructor(
    session: Session,
    bounds: readonly Bounds[],
    seed: number,
    outliers: Outliers | null = null,
    next: readonly (readonly number[])[] = [],
    before: readonly (readonly number[])[] = [],
  ) {
    this.#next = next;
    this.#before = before;
    this.#outliers = outliers;
    this.#session = session;
    this.#bounds = bounds;
    this.#seed = seed;
  }

  /**
   * The polynomials of all key/value heads, [heads][degree + 1], each the least-squares fit to the scores of its first drawn rows;
   * null where some score or coefficient is too large for float32.
   */
  *coefficients(degree: number): Generator<number, Float32Array | null> {
    this.#session.setOutliers(this.#outliers);
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
   * Errors to expect of each degree (ascending), on the rows of the check, by ra_sample_rows, until one stays within `limit`;
   * degrees beyond that are missing from the result.
   *
   * @param thorough measure every one of these; else one that is out of the question is left as soon as that is seen, or is not
   *   tried at all, and its error is where that was seen, or an estimate.
   * @param short degrees for which most of the drawn rows, of gradients all but the first ones where these leave no doubt, may wait for
   *   the check.
   * @param alike degrees that are not worth a look at the one before where there is time for few.
   * @param budget what sampling may take in all; it ends before, with a degree that is well within `limit` so far, or with none.
   *   Empty where there is no time for any.
   * @param worth what more rows may take where chance decides about a degree.
   * @param surety of SURE, the less the more a miss of a degree would lose.
   */
  *pilot(
    pass: Pass,
    degrees: readonly number[],
    limit: number,
    { thorough = false, short = () => false, alike = () => false, budget = Infinity, worth = () => 0, surety = () => 1 }: PilotOptions = {},
  ): Generator<number, Map<number, Measured>> {
    const found = new Map<number, Measured>();
    this.#session.setOutliers(this.#outliers);
    let failed: { error: number; residual: number; fell: number; trail: readonly number[] } | null = null;
    for (const [n, degree] of degrees.entries()) {
      const left = this.#looksLeft(pass, budget);
      const more = n + 1 < degrees.length;
      if (left < 1) break;
      if (more && left < FEW_LOOKS && alike(degrees[n + 1])) continue;
      const residual = thorough ? 0 : this.#residual(pass, degree);
      const [rarely, usual] = this.#errorsOf(pass).map((one) => one * residual);
      // As fast as residuals fall, or not faster than errors did: a huge key shows in rows alone.
      const fall: number = failed && failed.residual > 0 ? Math.max(residual / failed.residual, failed.fell) : Infinity;
      const likely: number = failed ? failed.error * fall : Infinity;
      const error = Math.max(rarely, failed ? likely : 0);
      if (!thorough && (rarely > limit || error > HOPELESS * limit)) {
        found.set(degree, { error, upper: error, relative: error });
        continue;
      }
      const unlikely = usual > limit / UNLIKELY[pass][left < 2 ? 'last' : 'few'];
      const passed = left < FEW_LOOKS && (more || pass === 'forward') && unlikely;
      // without the means for a second look the first must do
      if (passed || (failed && left < 2 && likely > surety(degree) * SURE[pass] * limit)) {
        found.set(degree, { error, upper: Infinity, relative: error });
        continue;
      }
      // a second look at this one is not to be in the way of a first one at the next, nor of gradients of keys
      const next = more ? this.#session.heads * FIT.polynomial + this.#lookCost(pass) : 0;
      const reserve = Math.max(next, pass === 'backward' ? 2 * this.#columnsCost() : 0);
      const trail: number[] = [];
      const within: Within = { limit, budget, reserve, worth: worth(degree), surety: surety(degree), trail };
      const measured: Measured = yield* this.#pilotOne(pass, degree, thorough, short(degree), within);
      if (measured.upper === Infinity) measured.error = Math.max(measured.error, rarely);
      found.set(degree, measured);
      if (measured.upper <= limit) break;
      const common = Math.min(trail.length, failed?.trail.length ?? 0) - 1; // after as many portions
      const fell: number = !failed ? 0 : common < 0 ? measured.error / failed.error : trail[common] / failed.trail[common];
      failed = { error: measured.error, residual, fell, trail };
    }
    return found;
  }

  /**
   * Errors over residuals, the least and what three of four exceed, over all kinds of inputs: relative errors of gradients are like those
   * of the weights' derivatives; those of outputs average out over keys, but for first rows.
   */
  #errorsOf(pass: Pass): readonly [least: number, usual: number] {
    const g = this.#session.geometry;
    if (pass === 'backward') return [0.5, g.causal ? 0.65 : 0.9];
    const averaged = Math.sqrt(Math.max(1, seenKeys(g)));
    const decayed = g.alibi ? Math.sqrt(2 / Math.max(...g.alibi)) : Infinity; // as sum w = 1 / slope, sum w^2 half of that
    return g.causal ? [2 / averaged, 5 / Math.min(averaged, decayed)] : [0.7 / averaged, 1.1 / averaged];
  }

  /** What the error of a degree usually is, by the scores that it is fitted to: those of ordinary rows. */
  usualError(pass: Pass, degree: number): number {
    this.#session.setOutliers(this.#outliers);
    return this.#errorsOf(pass)[1] * this.#residual(pass, degree);
  }

  /**
   * How often one may look at a degree before so much is spent, at what must be seen of it. Exact rows and what goes before them is done
   * once.
   */
  #looksLeft(pass: Pass, most: number): number {
    const rows = this.#mustCost(pass);
    let once = 0;
    for (let head = 0; head < this.#session.heads; head++) {
      once += this.#extremes.has(head) ? 0 : rows + extremesCost(this.#session.geometry);
      once += this.#scores.has(head) ? 0 : FIT.scores;
    }
    return (most - this.#session.spent - once) / this.#lookCost(pass);
  }

  #lookCost(pass: Pass): number {
    const { heads, geometry } = this.#session;
    return heads * (this.#mustCost(pass) + (heads > 1 ? prepareCost(geometry) : 0));
  }

  /** Of what must be seen of one head, exact rows or those by a polynomial. */
  #mustCost(pass: Pass): number {
    const g = this.#session.geometry;
    const largest = this.#outliers ? LARGEST.besideOutliers : LARGEST.all;
    const [few] = pass === 'forward' ? this.#portions(this.#heads()[0], pass, 'few') : [];
    return (few ? rowsCost(g, few.rows, pass) : 0) + (largest + Number(pass === 'backward')) * portionCost(g, pass);
  }

  /** What exact gradients of sampled keys take, or those by a polynomial, about. */
  #columnsCost(): number {
    const { heads, geometry } = this.#session;
    return heads * (1 + Math.ceil(2 / heads)) * columnsCost(geometry, [0]); // see #columnPortions
  }

  /**
   * The same of one degree, as far as the budget goes; not within `limit` when it was left, whatever was seen until then.
   */
  *#pilotOne(
    pass: Pass,
    degree: number,
    thorough: boolean,
    short: boolean,
    { limit, budget, reserve, worth, surety, trail }: Within,
  ): Generator<number, Measured> {
    if (short && pass === 'backward') {
      const first = yield* this.#pilotFirst(degree);
      if (first.upper <= limit || first.error > 2 * limit) return first;
    }
    const tally = this.#tally();
    const [first] = this.#heads();
    let [portions, at] = [0, first];
    for (const must of [true, false]) {
      for (const portion of this.#allPortions(pass, must, short)) {
        if (this.#session.spent + this.#costOf(portion, pass, at) + (must ? 0 : reserve) > budget) {
          const { error, upper, relative } = tally.result();
          const beside = this.#outliers !== null && !short && !this.#onlyDrawnLeft(portion, pass);
          const sure = surety * (beside ? SURE.besideOutliers : SURE[pass]);
          return { error, upper: must || upper > sure * limit ? Infinity : upper, relative };
        }
        this.#predict(pass, degree, portion, tally);
        at = portion.head;
        yield 0;
        if (thorough) continue;
        const { error, upper, relative } = tally.result();
        trail.push(error);
        if (short && pass === 'backward' && upper <= limit) return { error, upper, relative }; // the check sees the others
        // Gradients may still come down: the fewer rows, the more of it is chance.
        if (error > limit * (pass === 'forward' ? 1 : 1 + CHANCE / ++portions)) return { error, upper, relative };
      }
      const seen = tally.result();
      if (short && must && pass === 'forward' && seen.upper <= RUNS * limit) return seen;
    }
    const most = Math.min(worth, budget - reserve - this.#session.spent);
    if (this.#enlarge(tally.doubtful(limit), pass, 2, most)) return yield* this.#predictAll(pass, degree, short);
    return tally.result();
  }

  /** Whether only drawn rows are left from a portion on. */
  #onlyDrawnLeft(portion: Portion, pass: Pass): boolean {
    return portion.head === this.#heads()[this.#session.heads - 1] && this.#portions(portion.head, pass, 'drawn').includes(portion);
  }

  /** Errors of a degree on all sampled rows. */
  *#predictAll(pass: Pass, degree: number, short: boolean): Generator<number, Measured> {
    const tally = this.#tally();
    for (const must of [true, false]) {
      for (const portion of this.#allPortions(pass, must, short)) {
        this.#predict(pass, degree, portion, tally);
        yield 0;
      }
    }
    return tally.result();
  }

  #tally(): Tally {
    const { rows, columns } = this.#times;
    const [head] = this.#heads();
    return new Tally({ hidden: hiddenFactor(this.#session, this.#slopesToDraw(head, 'rows')), enlarged: { rows: rows > 1, columns: columns > 1 } });
  }

  /**
   * Draws more of the samples that leave a doubt, each of them once, if that takes `most` at most; false where nothing was drawn.
   *
   * @param looks at each of these: at what is exact, and at a polynomial.
   */
  #enlarge(doubtful: readonly Sample[], pass: Pass, looks: number, most: number): boolean {
    if (doubtful.length === 0 || doubtful.some((sample) => this.#times[sample] > 1)) return false;
    const { heads, geometry } = this.#session;
    const prepare = heads > 1 ? heads * prepareCost(geometry) : 0;
    const cost = (times: number) =>
      doubtful.reduce((sum, sample) => sum + heads * looks * this.#moreCost(sample, pass, times), prepare);
    const times = TIMES.find((one) => cost(one) <= most);
    if (times === undefined) return false;
    for (const sample of doubtful) {
      this.#times[sample] = times;
      for (const head of this.#heads()) {
        if (sample === 'rows') this.#moreRows(head, pass);
        else this.#moreColumns(head);
      }
    }
    return true;
  }

  /** Of what is drawn of a head beyond the first sample, at most. */
  #moreCost(sample: Sample, pass: Pass, times: number): number {
    const g = this.#session.geometry;
    const drawn = sample === 'columns' ? this.#keysToDraw : pass === 'backward' ? this.#rowsToDraw : 0;
    const slopes = g.alibi ? (sample === 'columns' ? SLOPE_KEYS : SLOPE_ROWS) : 0; // or more, which see the less
    const more = Math.ceil((times - 1) * (drawn * (g.causal ? 1.5 : 1) + slopes));
    const evenly = (of: number) => Array.from({ length: more }, (_, n) => Math.floor((n * of) / more));
    if (sample === 'columns') return columnsCost(g, evenly(g.keyLength));
    const rows = evenly(g.queryLength);
    let cost = 0;
    for (let n = 0; n < more; n += SAMPLE_ROWS) cost += rowsCost(g, rows.slice(n, n + SAMPLE_ROWS), pass);
    return cost;
  }

  /** What it takes to see what a degree makes of a portion, once another head was looked at. */
  #costOf({ head, rows, exact }: Portion, pass: Pass, before: number): number {
    const again = head === before ? 0 : prepareCost(this.#session.geometry);
    return (exact ? 1 : 2) * this.#session.costOfRows(head, rows, pass) + again;
  }

  /** The same of gradients on the rows that each polynomial is fitted to. */
  *#pilotFirst(degree: number): Generator<number, Measured> {
    const tally = this.#tally();
    for (const head of this.#heads()) {
      for (const portion of this.#drawnRows(head).first) {
        this.#predict('backward', degree, portion, tally);
        yield 0;
      }
    }
    return tally.result();
  }

  #withExact(portion: Portion, pass: Pass): Known {
    portion.exact ??= this.#session.rows(portion.head, portion.rows, pass === 'backward');
    return portion as Known;
  }

  /** The sampled rows of all heads: those that have to be seen, or the others. `short`: see `#others`. */
  *#allPortions(pass: Pass, must: boolean, short = false): Generator<Portion, void> {
    for (const head of this.#heads()) yield* must ? this.#musts(head, pass) : this.#others(head, pass, short);
  }

  /** What a degree would make of some rows. */
  #predict(pass: Pass, degree: number, portion: Portion, tally: Tally): void {
    const { head, rows, weights, predicted } = portion;
    let got = predicted.get(degree);
    if (got === undefined) {
      const own = this.#fit(head, degree);
      const compared = this.#drawnRows(head).first.some((one) => one === portion); // see `distance`
      const gradient = pass === 'backward';
      const both = own && this.#session.polynomialRows(head, rows, own, gradient, compared, portion.exact === null);
      predicted.set(degree, (got = both && both.got));
      portion.exact ??= both && both.exact;
    }
    const { exact } = this.#withExact(portion, pass);
    if (!got?.positive) tally.fail();
    else if (pass === 'forward') tally.output(exact.out, got.out, this.#bounds[head].v_half_range, weights);
    else tally.gradient('dq', exact.dq, got.dq, this.#rounding(head, rows, exact), weights);
  }

  /**
   * Errors to expect for the worst values in [-1, 1]: max over some rows of sum_j |P^_j - P_j|, which some v attains. From
   * scores of every few keys, so an estimate; exactness inside the causal diagonal is not counted.
   */
  *worstValues(degrees: readonly number[]): Generator<number, Map<number, Measured>> {
    this.#session.setOutliers(this.#outliers);
    const worst = new Map(degrees.map((degree) => [degree, 0]));
    const stride = Math.ceil(seenKeys(this.#session.geometry) / SAMPLE_SCORES);
    for (const head of this.#heads()) {
      for (const row of this.#drawnRows(head).first.flatMap(({ rows }) => rows)) {
        const scores = this.#session.scores(head, [row], stride);
        for (const degree of degrees) {
          const own = this.#fit(head, degree);
          worst.set(degree, Math.max(worst.get(degree)!, own ? totalVariation(scores, own) : Infinity));
        }
        yield 0;
      }
    }
    return new Map(Array.from(worst, ([degree, error]) => [degree, { error, upper: error, relative: error }]));
  }

  /**
   * How far the output and lse that are there are from those of a polynomial, on the rows that it is fitted to; Infinity as soon as that
   * is beyond `limit`: gradients by these would not be its own.
   */
  *distance(degree: number, limit: number): Generator<number, number> {
    this.#session.setOutliers(this.#outliers);
    let largest = 0;
    for (const head of this.#heads()) {
      for (const { rows, predicted } of this.#drawnRows(head).first) {
        const own = this.#fit(head, degree);
        const known = this.#session.hasGiven ? predicted.get(degree)?.distance : null;
        const distance = (gradient: boolean) => known ?? this.#session.distance(head, rows, own, gradient);
        largest = own ? worse(largest, this.#difference(head, distance)) : Infinity;
        if (!(largest <= limit)) return Infinity;
        yield 0;
      }
    }
    return largest;
  }

  /**
   * Errors to expect of dk and dv, on the columns of the check, given the output and lse that are there; as soon as they are seen to
   * be beyond `limit`, only that.
   *
   * @param portions of each head that are looked at, at most.
   * @param budget what may be taken in all, as in `pilot`; the first portion goes before that.
   * @param worth what more keys may take where chance decides, but not in dv alone, which may have other weights yet.
   * @param surety as in `pilot`.
   */
  *foresee(degree: number, limit: number, portions: number, budget: number, worth = 0, surety = 1): Generator<number, Measured> {
    this.#session.setOutliers(this.#outliers);
    this.#forgetColumns(); // as they are with another output and lse
    const tally = this.#tally();
    let [seen, ended] = [0, false];
    const over = (next: number) => (ended ||= seen > 0 && this.#session.spent + next > budget);
    for (const head of this.#heads()) {
      let left = portions;
      for (const portion of this.#exactColumns(head, limit, degree, over)) {
        this.#addColumns(head, portion, true, tally);
        yield 0;
        if (tally.result().error > limit * (1 + CHANCE / ++seen)) return tally.result();
        if (--left === 0) break;
      }
    }
    const { error, upper, relative, besideDv } = tally.result();
    const chance = !ended && portions === Infinity && besideDv > limit;
    if (chance && this.#enlarge(tally.doubtful(limit), 'backward', 2, worth)) return yield* this.#foreseeAll(degree, limit);
    const sure = (most: number) => (ended && most > surety * SURE.backward * limit ? Infinity : most);
    return { error, upper: sure(upper), relative, besideDv: sure(besideDv) };
  }

  /** The same once more, where dv alone has other weights now; its first portion goes before the budget, too. */
  *foreseeDv(degree: number, limit: number, budget: number, worth: number, surety: number): Generator<number, Measured> {
    const tally = this.#tally();
    let [seen, ended] = [0, false];
    for (const head of this.#heads()) {
      for (const portion of this.#drawnColumns(head).portions) {
        if (!portion.exact) continue; // there was no time for it
        ended ||= seen++ > 0 && this.#session.spent + this.#session.costOfColumns(head, portion.rows) > budget;
        if (!ended) this.#predictColumns(head, degree, portion);
        this.#addColumns(head, portion as KnownColumns, !ended, tally);
        yield 0;
      }
    }
    if (!ended && this.#enlarge(tally.doubtful(limit), 'backward', 2, worth)) return yield* this.#foreseeAll(degree, limit);
    const { error, upper, relative, besideDv } = tally.result();
    return { error, upper: ended && upper > Math.max(besideDv, surety * SURE.backward * limit) ? Infinity : upper, relative, besideDv };
  }

  /** The same on all sampled columns. */
  *#foreseeAll(degree: number, limit: number): Generator<number, Measured> {
    const tally = this.#tally();
    for (const head of this.#heads()) {
      for (const portion of this.#exactColumns(head, limit, degree)) {
        this.#addColumns(head, portion, true, tally);
        yield 0;
      }
    }
    return tally.result();
  }

  /** What a degree makes of columns, and what they are by the output and lse that are there; null where it has no polynomial. */
  #predictColumns(head: number, degree: number, portion: ColumnPortion): void {
    const own = this.#fit(head, degree);
    const both = own && this.#session.polynomialColumns(head, portion.rows, own, portion.byThere === null);
    portion.predicted = both && both.got;
    portion.byThere ??= both && both.exact;
  }

  /** Adds up errors of predicted columns, with or without those of dv. */
  #addColumns(head: number, { exact, predicted, weights }: KnownColumns, ofDv: boolean, tally: Tally): void {
    if (!predicted) return tally.fail();
    tally.gradient('dk', exact.dk, predicted.dk, this.#columnRounding(head), weights);
    if (ofDv) tally.gradient('dv', exact.dv, predicted.dv, 0, weights);
  }

  /**
   * The error of a finished pass on the sampled rows; of gradients also on columns, as far as it matters to `limit`.
   *
   * @param worth what more of them may take where chance decides.
   * @param weak also look at rows of outputs whose weights add up to little: there a polynomial that is far off cancels.
   */
  *check(pass: Pass, limit: number, worth = 0, weak = false): Generator<number, Measured> {
    this.#session.setOutliers(this.#outliers);
    let tally = yield* this.#compare(pass, limit, weak);
    if (this.#enlarge(tally.doubtful(limit), pass, 1, worth)) tally = yield* this.#compare(pass, limit, weak);
    this.#forgetColumns();
    return tally.result();
  }

  /** The same of what is drawn by now. */
  *#compare(pass: Pass, limit: number, weak: boolean): Generator<number, Tally> {
    const tally = this.#tally();
    const portions = [...this.#allPortions(pass, true), ...this.#allPortions(pass, false, true)];
    yield* this.#compareRows(pass, portions, tally);
    for (const head of pass === 'forward' ? this.#heads() : []) {
      tally.certain(this.#session.outside(head), this.#bounds[head].v_half_range);
      if (weak) yield* this.#compareRows(pass, this.#weakRows(head), tally);
    }
    if (pass === 'forward' && !this.#isAmple(tally.result().upper, limit)) {
      for (const head of this.#heads()) yield* this.#compareRows(pass, this.#portions(head, pass, 'drawn'), tally);
    }
    for (const head of pass === 'backward' ? this.#heads() : []) {
      for (const { rows: keys, weights, exact } of this.#exactColumns(head, limit)) {
        tally.gradient('dk', exact.dk, this.#session.resultRows('dk', head, keys), this.#columnRounding(head), weights);
        tally.gradient('dv', exact.dv, this.#session.resultRows('dv', head, keys), 0, weights);
        yield 0;
      }
    }
    return tally;
  }

  *#compareRows(pass: Pass, portions: readonly Portion[], tally: Tally): Generator<number, void> {
    for (const portion of portions) {
      const { head, rows, weights, exact } = this.#withExact(portion, pass);
      if (pass === 'forward') {
        tally.output(exact.out, this.#session.resultRows('out', head, rows), this.#bounds[head].v_half_range, weights);
      } else {
        const rounding = this.#rounding(head, rows, exact);
        tally.gradient('dq', exact.dq, this.#session.resultRows('dq', head, rows), rounding, weights);
      }
      yield 0;
    }
  }

  /** Of a finished forward pass, those that were not looked at. */
  #weakRows(head: number): Portion[] {
    const known = new Set([...this.#drawnRows(head).first.flatMap(({ rows }) => rows), ...this.#fewKeyRows(head, 'forward'), ...this.#extremeRows(head)]);
    const weak = this.#session.leastSums(head, SAMPLE_ROWS).filter((row) => !known.has(row));
    return inPortions(head, weak.map((row) => ({ row, weight: 1 })));
  }

  /** Whether an error of outputs that is seen without more than the first drawn rows needs no more of them. */
  #isAmple(upper: number, limit: number): boolean {
    return upper <= AMPLE * limit && ONE_OF * this.#rowsToDraw <= this.#session.rowsOfHead;
  }

  /**
   * Sampled columns of a head with exact values: by the output and lse that are there, each computed when it is first asked for, but by
   * the exact ones in those known rows where that matters to a limit.
   *
   * @param degree what is to be known of them as well, unless it is; null for nothing.
   * @param over ends it before what takes so much, that included.
   */
  *#exactColumns(
    head: number,
    limit: number,
    degree: number | null = null,
    over: (next: number) => boolean = () => false,
  ): Generator<KnownColumns, void> {
    const changed = this.changedRows(head, limit);
    for (const portion of this.#drawnColumns(head).portions) {
      if (over((portion.byThere ? 1 : 2) * this.#session.costOfColumns(head, portion.rows))) return;
      if (degree !== null && !portion.predicted) this.#predictColumns(head, degree, portion);
      portion.byThere ??= this.#session.columns(head, portion.rows);
      // more rows are known later, never fewer
      if (!portion.exact || portion.changes !== changed.length) {
        portion.exact = this.#withChanges(head, portion.rows, portion.byThere, changed);
        portion.changes = changed.length;
      }
      yield portion as KnownColumns;
    }
  }

  /** Columns by the output and lse that are there, but for some rows. */
  #withChanges(head: number, keys: readonly number[], { dk, dv }: Columns, changed: readonly Change[]): Columns {
    const sum = { dk: dk.slice(), dv: dv.slice() };
    const seeing = changed.filter(({ row }) => this.#session.mayCount(head, row, keys));
    for (let n = 0; n < seeing.length; n += SAMPLE_CHANGES) {
      const more = this.#session.changes(head, seeing.slice(n, n + SAMPLE_CHANGES), keys);
      more.dk.forEach((x, at) => (sum.dk[at] += x));
      more.dv.forEach((x, at) => (sum.dv[at] += x));
    }
    return sum;
  }

  /**
   * Known rows of a head whose lse is off by a share of the limit that counts: all weights of the row are off by as much, in the engine
   * and in what columns take for exact. One that stands for w rows counts sqrt(w) times: their errors are like its own but for
   * their signs, so that squares are what adds up.
   */
  changedRows(head: number, limit: number): Change[] {
    const { first } = this.#drawnRows(head);
    const rest = (['few', 'most', 'drawn'] as const).flatMap((of) => this.#rest.get(`${head} ${of}`) ?? []);
    const { valueDim } = this.#session.geometry;
    return [...first, ...rest].flatMap(({ rows, weights, exact }) => {
      const there = exact && this.#session.lseOf(head, rows);
      return rows.flatMap((row, n): Change[] => {
        const lse = exact?.lse[n] ?? -Infinity; // nothing is seen
        if (lse === -Infinity) return [];
        const off = Math.abs(lse - there![n]);
        if (off <= Math.max(HARMLESS * limit, ROUNDING * Math.max(1, Math.abs(lse)))) return [];
        return [{ row, share: Math.sqrt(weights[n]), lse, out: exact!.out.subarray(n * valueDim, (n + 1) * valueDim) }];
      });
    });
  }

  /**
   * How far the output and lse that were given are from exact ones: the larger of the output's error and lse's, on so many drawn rows
   * of each of so many heads, those of the largest scores first, and where there is time for as much more on some that a polynomial is likely to have
   * wrong; what was seen as soon as it is beyond `limit`.
   */
  *given(count: number, heads: number, limit: number, budget: number): Generator<number, number> {
    this.#session.setOutliers(this.#outliers);
    const radii = this.#radii();
    const order = heads < this.#session.heads ? [...radii.keys()].sort((a, b) => radii[b] - radii[a]) : [...radii.keys()].reverse();
    const { total, place } = this.#seeing();
    const all = Math.min(count, total);
    const g = this.#session.geometry;
    let largest = 0;
    for (const head of order.slice(0, heads)) {
      const look = (rows: readonly number[] | Uint32Array) => {
        const distance = this.#difference(head, (gradient) => this.#session.distance(head, rows, null, gradient));
        largest = worse(largest, distance);
      };
      if (heads * (portionCost(g, 'forward') + (this.#extremes.has(head) ? 0 : extremesCost(g))) <= budget) {
        const rows = [...this.#extremeRows(head)].slice(0, SAMPLE_ROWS);
        if (rows.length > 0) look(rows);
        yield 0;
      }
      const next = random(this.#seed, head, GIVEN);
      for (let n = 0; n < all && largest <= limit; n += SAMPLE_ROWS) {
        // one of each of as many equal shares
        const rows = new Uint32Array(Math.min(SAMPLE_ROWS, all - n));
        for (let m = 0; m < rows.length; m++) rows[m] = place(Math.floor(((n + m + next()) * total) / all));
        look(rows);
        yield 0;
      }
      if (!(largest <= limit)) return largest;
    }
    return largest;
  }

  /**
   * How far the output and lse that are there are from rows of a head: the largest of the output's error, lse's, and where there are such
   * that of dq by these, which is small where rows of keys cancel and shows them the more.
   */
  #difference(head: number, distance: (gradient: boolean) => Distance): number {
    const { out, outEntry, lse, lseEntry } = distance(false);
    // Weights are off by as much as lse is, but for float32 rounding.
    const off = worse(overRange(out, outEntry, this.#bounds[head].v_half_range), lse - ROUNDING * Math.max(1, lseEntry));
    if (!(off > 0)) return off;
    const { dq, dqSize } = distance(true);
    return worse(off, dq === 0 ? 0 : dq / dqSize - ROUNDING);
  }

  #fit(head: number, degree: number): Float32Array | null {
    const name = `${head} ${degree}`;
    let own = this.#fits.get(name);
    if (own === undefined) {
      const some = this.#scoresOf(head);
      this.#session.spend(FIT.polynomial);
      own = some && some.fit(degree);
      if (!own?.every(Number.isFinite)) own = null;
      this.#fits.set(name, own);
    }
    return own;
  }

  /** Scores of the first drawn rows of a head; null where one is not finite. */
  #scoresOf(head: number): ScoreFits | null {
    let scores = this.#scores.get(head);
    if (scores === undefined) {
      this.#session.spend(FIT.scores);
      const stride = Math.ceil((SAMPLE_ROWS * seenKeys(this.#session.geometry)) / SAMPLE_SCORES);
      const rows = this.#drawnRows(head).first.flatMap(({ rows }) => rows);
      const all = rows.length > 0 ? this.#session.scores(head, rows, stride) : new Float32Array(0);
      const few = condense(all);
      scores = few && new ScoreFits(few.scores, few.weights);
      this.#scores.set(head, scores);
    }
    return scores;
  }

  /**
   * How well a degree fits the scores of the head with the largest ones, or for gradients its derivative: the root of the sum of squares
   * of what it leaves of exp, over that of exp.
   */
  #residual(pass: Pass, degree: number): number {
    const head = this.#heads()[0];
    const [own, some] = [this.#fit(head, degree), this.#scoresOf(head)];
    if (!own || !some) return Infinity;
    return some.residual(own, pass === 'backward');
  }

  /** What no score of each head exceeds. */
  #radii(): number[] {
    return this.#bounds.map((one) => scoreRadius(this.#session.geometry, one));
  }

  /** All heads, the one with the largest scores first. */
  #heads(): readonly number[] {
    if (!this.#order) {
      const radii = this.#radii();
      const widest = Math.max(radii.indexOf(radii.reduce((a, b) => Math.max(a, b), 0)), 0);
      this.#order = [widest, ...radii.keys()].filter((head, n) => n === 0 || head !== widest);
    }
    return this.#order;
  }

  /** Rows that may see a key, counted: number n is row place(n); number(row) is null for the others. */
  #seeing(): { total: number; length: number; place(n: number): number; number(row: number): number | null } {
    const { queryLength } = this.#session.geometry;
    const { from, to } = seeingQueries(this.#session.geometry);
    const length = Math.max(to - from, 0);
    return {
      total: (this.#session.rowsOfHead / queryLength) * length,
      length,
      place: (n) => Math.floor(n / length) * queryLength + from + (n % length),
      number: (row) => {
        const i = (row % queryLength) - from;
        return i >= 0 && i < length ? Math.floor(row / queryLength) * length + i : null;
      },
    };
  }

  /** Drawn rows of a head: the one of the largest query, for itself, and others that count for all that are not exact. */
  #drawnRows(head: number): DrawnRows {
    let drawn = this.#drawn.get(head);
    if (!drawn) {
      const { total, length, place, number } = this.#seeing();
      const largest = number(this.#bounds[head].q_argmax);
      const taken = largest === null ? [] : [largest];
      const next = random(this.#seed, head, DRAWN);
      const apart = new Set([...taken, ...this.#outlierRows(head).map(number).filter((n) => n !== null)]);
      const draws = new WeightedDraws(total, this.#session.geometry.causal ? length : null, apart, next);
      const rows = draws.add(this.#rowsToDraw).rows;
      const all = [...taken.map((n) => ({ row: n, weight: 1 })), ...rows].map(({ row, weight }) => ({ row: place(row), weight }));
      drawn = { all, first: inPortions(head, all.slice(0, SAMPLE_ROWS)), draws };
      this.#drawn.set(head, drawn);
    }
    return drawn;
  }

  /** Rows to draw of each head, to begin with. */
  get #rowsToDraw(): number {
    return Math.max(SAMPLE_ROWS, Math.ceil(DRAWN_ROWS / this.#session.heads));
  }

  /** More drawn rows of a head, all of which then stand for fewer others: beside those of sums of squares first ones of chunks with slopes. */
  #moreRows(head: number, pass: Pass): void {
    const [few, most, drawn] = (['few', 'most', 'drawn'] as const).map((of) => this.#portions(head, pass, of));
    const { first, draws } = this.#drawnRows(head);
    const hard = this.#hardRows(head, pass);
    const { place } = this.#seeing();
    const slope = this.#slopeRows(head);
    const more = pass === 'backward' ? draws.add((this.#times.rows - 1) * this.#rowsToDraw).rows : [];
    const others = more.map(({ row, weight }) => ({ row: place(row), weight })).filter(({ row }) => !hard(row));
    const between = Array.from(slope.rows, (row) => ({ row, weight: slope.weight }));
    const known = [...first, ...drawn, ...few, ...most];
    drawn.push(...inPortions(head, this.#byPlace(weighAgain(known, others).filter(({ row }) => !slope.stands(row)))));
    few.push(...inPortions(head, this.#byPlace(weighAgain([...known, ...drawn], between)), SHORT_ROWS));
  }

  #byPlace(rows: Drawn[]): Drawn[] {
    const { queryLength } = this.#session.geometry;
    return rows.sort((a, b) => (a.row % queryLength) - (b.row % queryLength));
  }

  /** Outlier queries of a head, as rows. */
  #outlierRows(head: number): number[] {
    if (!this.#outliers) return [];
    const { queries, counts } = this.#outliers;
    return Array.from(queries.subarray(head * counts.queries, (head + 1) * counts.queries), (n) => this.#rowOf(n));
  }

  /** The row of a query that is numbered like outliers. */
  #rowOf(n: number): number {
    const { queryLength } = this.#session.geometry;
    const group = this.#session.rowsOfHead / queryLength;
    return (n % group) * queryLength + Math.floor(n / group);
  }

  /**
   * The rows of a head that have to be looked at. Where the largest error decides the first of those that see few keys, which costs
   * next to nothing, and of the largest scores; where sums of squares do, rows that the polynomial is fitted to and the largest scores.
   */
  *#musts(head: number, pass: Pass): Generator<Portion, void> {
    if (pass === 'backward') yield* this.#drawnRows(head).first;
    else yield* this.#portions(head, pass, 'few').slice(0, 1);
    yield* this.#largest(head, pass).musts;
  }

  /** The others; `short`: where the largest error decides, without most of the drawn ones. */
  *#others(head: number, pass: Pass, short: boolean): Generator<Portion, void> {
    const [few, most] = [this.#portions(head, pass, 'few'), this.#largest(head, pass).others];
    if (pass === 'backward') yield* [...this.#portions(head, pass, 'drawn'), ...few, ...most];
    else yield* [...most, ...this.#drawnRows(head).first, ...few.slice(1), ...(short ? [] : this.#portions(head, pass, 'drawn'))];
  }

  #largest(head: number, pass: Pass): { musts: Portion[]; others: Portion[] } {
    const all = this.#portions(head, pass, 'most');
    const count = this.#outliers ? LARGEST.besideOutliers : LARGEST.all;
    return { musts: all.slice(0, count), others: all.slice(count) };
  }

  /** Rows that see few keys or most likely have the largest scores, each for itself; and drawn ones that are none of these. A sampler serves one pass. */
  #portions(head: number, pass: Pass, of: 'few' | 'most' | 'drawn'): Portion[] {
    const name = `${head} ${of}`;
    let portions = this.#rest.get(name);
    if (portions) return portions;
    const { all, first } = this.#drawnRows(head);
    const few = this.#fewKeyRows(head, pass);
    const slope = this.#slopeRows(head);
    const some: Drawn[] = [];
    const alone = (row: number) => {
      if (!first.some(({ rows }) => rows.includes(row))) some.push({ row, weight: slope.rows.has(row) ? slope.weight : 1 });
    };
    if (of === 'few') few.forEach(alone);
    else if (of === 'most') [...this.#extremeRows(head)].filter((row) => !few.has(row)).forEach(alone);
    else {
      const hard = this.#hardRows(head, pass);
      for (const { rows, weights } of first) rows.forEach((row, n) => hard(row) && (weights[n] = 1));
      for (const one of all.slice(SAMPLE_ROWS)) if (!hard(one.row) && !slope.stands(one.row)) some.push(one);
    }
    portions = inPortions(head, of === 'most' ? some : this.#byPlace(some), of === 'few' ? SHORT_ROWS : SAMPLE_ROWS);
    this.#rest.set(name, portions);
    return portions;
  }

  /** Whether rows are looked at for themselves. */
  #hardRows(head: number, pass: Pass): (row: number) => boolean {
    const [few, extreme] = [this.#fewKeyRows(head, pass), this.#extremeRows(head)];
    return (row) => few.has(row) || extreme.has(row);
  }

  /**
   * Rows that see few keys through the polynomial (errors average out over many): when causal, the first ones that see any;
   * the first or the last two chunks where a window ends there; first rows of chunks where slopes are steep; some of packed sequences; of
   * gradients those behind the largest key where a bias decays; with Fourier transforms those that a bias leaves next to nothing.
   */
  #fewKeyRows(head: number, pass: Pass): ReadonlySet<number> {
    let rows = this.#few.get(head);
    if (!rows) this.#few.set(head, (rows = this.#findFewKeyRows(head, pass)));
    return rows;
  }

  #findFewKeyRows(head: number, pass: Pass): ReadonlySet<number> {
    const { causal, queryOffset, queryLength, decays } = this.#session.geometry;
    const rows = new Set<number>();
    const near = decays ? decays.near : 0; // which are exact
    const start = Math.ceil(Math.max((near || 1) - queryOffset, 0) / CHUNK) * CHUNK;
    if (causal && start + queryOffset <= near + 2 * CHUNK) {
      const heads = this.#session.rowsOfHead / queryLength;
      const chunks = 2 * Math.max(1, Math.floor(FIRST_HEADS / heads));
      for (let n = 0; n < Math.min(heads, FIRST_HEADS); n++) {
        const first = ((this.#seed + n) % heads) * queryLength;
        for (let i = start; i < Math.min(start + chunks * CHUNK, queryLength); i++) rows.add(first + i);
      }
    }
    const slope = this.#slopeRows(head);
    const behind = pass === 'backward' ? this.#rowsBehindBand(head) : [];
    const others = [slope.rows, slope.next, this.#windowRows(), this.#segmentRows(head), behind, this.#drownedRows(head)];
    for (const some of others) for (const row of some) rows.add(row);
    return rows;
  }

  /** With decays of a bias: the first rows that have the largest key behind their near band, where it still weighs much. */
  #rowsBehindBand(head: number): number[] {
    const { decays, queryLength, queryOffset } = this.#session.geometry;
    if (!decays) return [];
    const first = (this.#seed % (this.#session.rowsOfHead / queryLength)) * queryLength;
    const behind = this.#bounds[head].k_argmax + decays.near - queryOffset;
    const start = Math.ceil(Math.max(behind, 0) / CHUNK) * CHUNK;
    const count = Math.min(SAMPLE_ROWS, Math.max(queryLength - start, 0));
    return Array.from({ length: count }, (_, n) => first + start + n);
  }

  /** Of each query head of the group rows that the rounding of transforms shows in first. */
  #drownedRows(head: number): number[] {
    const { geometry, features, rowsOfHead } = this.#session;
    if (features !== 'toeplitz') return [];
    const { heads, kvHeads, queryLength } = geometry;
    const rows = drownedRows(geometry);
    return Array.from({ length: rowsOfHead / queryLength }, (_, h) => {
      const own = ((head % kvHeads) * heads) / kvHeads + h;
      return rows[own % rows.length].map((row) => h * queryLength + row);
    }).flat();
  }

  /** Those of the largest queries, with the largest scores against the largest keys, and next to outliers; each once. */
  #extremeRows(head: number): ReadonlySet<number> {
    let rows = this.#extreme.get(head);
    if (!rows) this.#extreme.set(head, (rows = this.#findExtremeRows(head)));
    return rows;
  }

  #findExtremeRows(head: number): ReadonlySet<number> {
    const { number } = this.#seeing();
    const { large, aligned, opposed } = this.#extremesOf(head);
    const next = (this.#next[head] ?? []).map((n) => this.#rowOf(n));
    const [half, quarter] = [SAMPLE_ROWS / 2, SAMPLE_ROWS / 4];
    // A few of each kind first
    const extreme = [
      ...[...aligned.slice(0, half), ...opposed.slice(0, quarter), ...large.slice(0, quarter)],
      ...[...(this.#before[head] ?? []), ...next, ...aligned.slice(half), ...opposed.slice(quarter, half), ...large.slice(quarter, half)],
      ...(this.#queriesStandOut(head) ? [...large.slice(half), ...opposed.slice(half)] : []),
    ];
    return new Set(extreme.filter((row) => number(row) !== null));
  }

  /** For each head those of the largest queries and scores. */
  *extremes(): Generator<number, number[][]> {
    this.#session.setOutliers(this.#outliers);
    const rows: number[][] = [];
    for (let head = 0; head < this.#session.heads; head++) {
      const { large, aligned, opposed } = this.#extremesOf(head);
      rows.push([...aligned, ...opposed, ...large]);
      yield 0;
    }
    return rows;
  }

  /** Some queries are far larger than most: any of these may be the worst. */
  #queriesStandOut(head: number): boolean {
    const { q_plain_norm, q_squares } = this.#bounds[head];
    return q_plain_norm ** 2 * this.#session.rowsOfHead > QUERY_STANDS_OUT ** 2 * q_squares;
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
   * With a steep slope a row has few keys that count, and those of the first row of a chunk, but its own, come through the
   * polynomial: such rows of the steepest query head of the group, each standing for `weight` of them, which rows these are, and
   * rows behind a chunk's first, likewise those that come next after one of the largest keys.
   */
  #slopeRows(head: number): SlopeRows {
    const { alibi, queryLength, queryOffset } = this.#session.geometry;
    if (!alibi) return NO_SLOPES;
    const slopes = this.#slopesOf(head);
    const slope = Math.max(...slopes);
    const before = slopes.indexOf(slope) * queryLength;
    const { first, end } = this.#chunks();
    const count = Math.min(this.#slopesToDraw(head, 'rows'), end - first);
    const chunks = draw(count, end - first, [], random(this.#seed, head, SLOPES)).map((n) => first + n);
    const behind = this.#extremesOf(head).keys.map((key) => Math.floor((key - queryOffset) / CHUNK) + 1);
    const seen = behind.filter((chunk) => chunk >= first && chunk < end);
    const depths = Array.from({ length: STEEP_DEPTH }, (_, n) => n);
    const deep = [...chunks.slice(0, STEEP_CHUNKS), ...seen].flatMap((chunk) => depths.map((n) => before + chunk * CHUNK + n));
    const next = slope < STEEP ? [] : deep.filter((row) => row < before + queryLength);
    return {
      rows: new Set(chunks.map((chunk) => before + chunk * CHUNK)),
      weight: (end - first) / count,
      stands: (row) => row >= before && row < before + queryLength && (row - before) % CHUNK === 0,
      next: [...next, ...this.#rowsBehindLargest(head)],
    };
  }

  /** With slopes: where the largest key stands out, the chunk behind it of the head in which it still weighs most. */
  #rowsBehindLargest(head: number): number[] {
    const { queryLength, queryOffset, keyLength } = this.#session.geometry;
    const { k_centred_norm, k_squares, k_argmax } = this.#bounds[head];
    if (!(k_centred_norm ** 2 * keyLength > KEY_STANDS_OUT ** 2 * k_squares)) return [];
    const slopes = this.#slopesOf(head);
    const first = slopes.indexOf(Math.min(...slopes)) * queryLength;
    const start = Math.max((Math.floor((k_argmax - queryOffset) / CHUNK) + 1) * CHUNK, 0);
    return Array.from({ length: Math.max(0, Math.min(CHUNK, queryLength - start)) }, (_, n) => first + start + n);
  }

  /** Those of the query heads of a group. */
  #slopesOf(head: number): Float32Array {
    const { alibi, kvHeads, queryLength } = this.#session.geometry;
    const group = this.#session.rowsOfHead / queryLength;
    return alibi!.subarray((head % kvHeads) * group, ((head % kvHeads) + 1) * group);
  }

  /** Of first rows, or keys between chunks, so many are looked at. */
  #slopesToDraw(head: number, sample: Sample): number {
    const less = seenKeys(this.#session.geometry) / 2 / (this.#session.sight(head) + TOUCHED);
    return this.#times[sample] * Math.floor((sample === 'rows' ? SLOPE_ROWS : SLOPE_KEYS) * Math.max(1, less));
  }

  /** Chunks whose first row may see a key. */
  #chunks(): { first: number; end: number } {
    const { from, to } = seeingQueries(this.#session.geometry);
    const first = Math.ceil(from / CHUNK);
    return { first, end: Math.max(Math.ceil(to / CHUNK), first) };
  }

  /**
   * Likewise the gradients of keys: those of the last key before a chunk come through the polynomial from the row that counts most, those
   * of the next one from the row that is changed with it. Such keys, each standing for `weight` of them, and all of them.
   */
  #slopeKeys(head: number): { keys: readonly number[]; weight: number; all: readonly number[] } {
    const { alibi, queryOffset, keyLength } = this.#session.geometry;
    if (!alibi) return { keys: [], weight: 1, all: [] };
    const { first, end } = this.#chunks();
    const between = Array.from({ length: end - first }, (_, n) => (first + n) * CHUNK + queryOffset);
    const depth = Math.max(...this.#slopesOf(head)) < STEEP ? 1 : STEEP_DEPTH;
    const around = Array.from({ length: depth + 1 }, (_, n) => n - depth);
    const all = between.flatMap((key) => around.map((n) => key + n)).filter((key) => key >= 0 && key < keyLength);
    const count = Math.min(this.#slopesToDraw(head, 'columns'), all.length);
    const keys = draw(count, all.length, [], random(this.#seed, head, SLOPES)).map((n) => all[n]);
    return { keys, weight: all.length / count, all };
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

  #extremesOf(head: number): ReturnType<Session['extremes']> {
    let extremes = this.#extremes.get(head);
    if (!extremes) this.#extremes.set(head, (extremes = this.#session.extremes(head)));
    return extremes;
  }

  /** The keys whose gradients are looked at: the largest ones, and drawn ones that count for the others; of outliers apart. */
  #drawnColumns(head: number): DrawnColumns {
    let columns = this.#columns.get(head);
    if (!columns) {
      const { keyLength, causal } = this.#session.geometry;
      const large = new Set(this.#extremesOf(head).keys);
      const next = random(this.#seed, head, COLUMNS);
      const apart = new Set([...large, ...this.#outlierKeys(head), ...this.#slopeKeys(head).all]);
      const draws = new WeightedDraws(keyLength, causal ? keyLength : null, apart, next);
      columns = { portions: [], draws, next, ofOutliers: [] };
      const all = [...Array.from(large, (row) => ({ row, weight: 1 })), ...this.#drawKeys(head, columns, this.#keysToDraw)];
      all.sort((a, b) => a.row - b.row);
      // What fails should fail soon: a few, then the others
      columns.portions = [all.slice(0, SAMPLE_ROWS), all.slice(SAMPLE_ROWS)].flatMap((some) => columnPortions(some));
      this.#columns.set(head, columns);
    }
    return columns;
  }

  /** Draws so many more keys of a head: these and those of before, with what they stand for now. */
  #drawKeys(head: number, columns: DrawnColumns, count: number): Drawn[] {
    const { draws, next } = columns;
    const large = new Set(this.#extremesOf(head).keys);
    const slope = this.#slopeKeys(head);
    const drawn = draws.add(count).rows;
    const between = slope.keys.filter((key) => !large.has(key)).map((row) => ({ row, weight: slope.weight }));
    const outliers = this.#outlierKeys(head);
    const some = (this.#times.columns * SAMPLE_ROWS) / 2;
    columns.ofOutliers = draw(some, outliers.length, columns.ofOutliers, next);
    const weight = Math.max(1, outliers.length / some);
    return [...drawn, ...between, ...columns.ofOutliers.map((n) => ({ row: outliers[n], weight }))];
  }

  /** Keys to draw of each head, to begin with. */
  get #keysToDraw(): number {
    return Math.max(SAMPLE_ROWS / 2, Math.ceil((2 * SAMPLE_ROWS) / this.#session.heads));
  }

  /** More drawn keys of a head, all of which then stand for fewer others. */
  #moreColumns(head: number): void {
    const columns = this.#drawnColumns(head);
    const more = weighAgain(columns.portions, this.#drawKeys(head, columns, (this.#times.columns - 1) * this.#keysToDraw));
    columns.portions.push(...columnPortions(more.sort((a, b) => a.row - b.row)));
  }

  get #allColumns(): ColumnPortion[] {
    return [...this.#columns.values()].flatMap(({ portions }) => portions);
  }

  #forgetColumns(): void {
    for (const portion of this.#allColumns) Object.assign(portion, NOTHING_KNOWN);
  }

  #outlierKeys(head: number): ArrayLike<number> & Iterable<number> {
    const outliers = this.#outliers;
    return outliers?.keys.subarray(head * outliers.counts.keys, (head + 1) * outliers.counts.keys) ?? [];
  }

  /** The same for columns of dk: that of the first rows, once these are known. */
  #columnRounding(head: number): number {
    const [first] = this.#drawnRows(head).first;
    return first?.exact ? this.#rounding(head, first.rows, first.exact) : 0;
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
    const dout = this.#session.resultRows('dout', head, rows).reduce((sum, x) => sum + x * x, 0);
    const delta = Math.sqrt(dout * valueDim) * largest;
    return ROUNDING * Math.abs(scale) * rotaryGain ** 2 * Math.max(q_norm, k_norm) * delta;
  }
}

/** What one look at a degree may take. */
interface Within {
  limit: number;
  budget: number;
  /** Of the budget, only for what has to be seen. */
  reserve: number;
  /** What more rows may take where chance decides. */
  worth: number;
  surety: number;
  /** Gets the errors that were seen after each portion. */
  trail: number[];
}

/** See #slopeRows. */
interface SlopeRows {
  rows: ReadonlySet<number>;
  weight: number;
  stands(row: number): boolean;
  next: readonly number[];
}

const NO_SLOPES: SlopeRows = { rows: new Set(), weight: 1, stands: () => false, next: [] };

/** Up to SAMPLE_ROWS rows of a head, or SHORT_ROWS that see few keys, each standing for `weights` rows. */
interface Portion {
  head: number;
  rows: number[];
  weights: number[];
  exact: Rows | null;
  /** By degree; null where it has no polynomial. */
  predicted: Map<number, Rows | null>;
}

/** A portion with what is exact. */
interface Known extends Portion {
  exact: Rows;
}

/** Up to SAMPLE_KEYS keys of a head, each standing for `weights` keys. */
interface ColumnPortion {
  rows: number[];
  weights: number[];
  /** By the output and lse that are there. */
  byThere: Columns | null;
  /** With what is known of so many rows. */
  exact: Columns | null;
  changes: number;
  /** By the polynomial that is looked at. */
  predicted: Columns | null;
}

const NOTHING_KNOWN = { byThere: null, exact: null, changes: 0, predicted: null } as const;

/** A portion with what is exact. */
interface KnownColumns extends ColumnPortion {
  exact: Columns;
}

/** Drawn rows of a head: all of the first sample, those of them that the polynomial is fitted to, and how to go on. */
interface DrawnRows {
  all: Drawn[];
  first: Portion[];
  draws: WeightedDraws;
}

/** Keys of a head, and how to go on; drawn outliers by number. */
interface DrawnColumns {
  portions: ColumnPortion[];
  draws: WeightedDraws;
  next: () => number;
  ofOutliers: number[];
}

function columnPortions(all: readonly Drawn[]): ColumnPortion[] {
  return inPortions(0, all, SAMPLE_KEYS).map(({ rows, weights }) => ({ rows, weights, ...NOTHING_KNOWN }));
}

/** Writes down what rows stand for by now in portions that have them; those that are in none. */
function weighAgain(portions: readonly { rows: number[]; weights: number[] }[], all: readonly Drawn[]): Drawn[] {
  const left = new Map(all.map(({ row, weight }) => [row, weight]));
  for (const { rows, weights } of portions) {
    for (const [n, row] of rows.entries()) {
      const weight = left.get(row);
      if (weight === undefined) continue;
      weights[n] = weight;
      left.delete(row);
    }
  }
  return Array.from(left, ([row, weight]) => ({ row, weight }));
}

function inPortions(head: number, all: readonly Drawn[], size: number = SAMPLE_ROWS): Portion[] {
  const portions: Portion[] = [];
  for (let n = 0; n < all.length; n++) {
    if (n % size === 0) portions.push({ head, rows: [], weights: [], exact: null, predicted: new Map() });
    const { rows, weights } = portions[portions.length - 1];
    rows.push(all[n].row);
    weights.push(all[n].weight);
  }
  return portions;
}

/**
 * With slopes each chunk has a row of few keys that count, and errors of these are much like normal ones: the largest of M is
 * about sqrt(log M / log n) times the largest of n, which are looked at in each head. 1 without.
 */
function hiddenFactor({ geometry: { alibi, queryLength }, heads }: Session, looked: number): number {
  const chunks = Math.ceil(queryLength / CHUNK);
  return alibi && chunks > looked ? Math.sqrt(Math.log(chunks * heads) / Math.log(looked * heads)) : 1;
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
