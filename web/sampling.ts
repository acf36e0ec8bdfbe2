// SPDX-License-Identifier: MIT
//
// Looking at the data: bounds of every key/value head, a polynomial for each fitted to sampled scores, and errors measured
// on a few rows that are computed exactly. O(N D) for the bounds, O(N (D + Dv)) for each sampled row.
//
// The rows are the same before and after the run: the pilot works out what a polynomial would make of them, the check what the
// engine did make of them, both against the same exact values. So what passes the pilot misses the check only by what the pilot
// cannot see: float32 sums of the engine, weights that are not positive in other rows, and columns of dk and dv.
//
// Which rows these are is in selection.ts. Where chance decides and what follows is dearer than rows, more of them are drawn, once (tally.ts).

import { CHUNK, columnsCost, extremesCost, FIT, portionCost, prepareCost, rowsCost, SAMPLE_ROWS, SAMPLE_SCORES, type Pass } from './cost.js';
import { random } from './draws.js';
import { SAMPLE_CHANGES, type Bounds, type Change, type Columns, type Distance, type Outliers, type Rows, type Session } from './kernel.js';
import { condense, evaluate, ScoreFits } from './polynomial.js';
import { seenKeys } from './scores.js';
import { GIVEN, LARGEST, RowSelection, type ColumnPortion, type Known, type KnownColumns, type Portion } from './selection.js';
import { overRange, ROUNDING, Tally, worse, type Measured, type Sample } from './tally.js';

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
  readonly #selection: RowSelection;
  readonly #scores = new Map<number, ScoreFits | null>();
  readonly #fits = new Map<string, Float32Array | null>();

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
    this.#outliers = outliers;
    this.#session = session;
    this.#bounds = bounds;
    this.#seed = seed;
    this.#selection = new RowSelection(session, bounds, seed, outliers, next, before);
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
      once += this.#selection.hasExtremes(head) ? 0 : rows + extremesCost(this.#session.geometry);
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
    const [few] = pass === 'forward' ? this.#selection.portions(this.#selection.heads()[0], pass, 'few') : [];
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
    const [first] = this.#selection.heads();
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
    return portion.head === this.#selection.heads()[this.#session.heads - 1] && this.#selection.portions(portion.head, pass, 'drawn').includes(portion);
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
    const { rows, columns } = this.#selection.times;
    const [head] = this.#selection.heads();
    return new Tally({ hidden: hiddenFactor(this.#session, this.#selection.slopesToDraw(head, 'rows')), enlarged: { rows: rows > 1, columns: columns > 1 } });
  }

  /**
   * Draws more of the samples that leave a doubt, each of them once, if that takes `most` at most; false where nothing was drawn.
   *
   * @param looks at each of these: at what is exact, and at a polynomial.
   */
  #enlarge(doubtful: readonly Sample[], pass: Pass, looks: number, most: number): boolean {
    if (doubtful.length === 0 || doubtful.some((sample) => this.#selection.times[sample] > 1)) return false;
    const { heads, geometry } = this.#session;
    const prepare = heads > 1 ? heads * prepareCost(geometry) : 0;
    const cost = (times: number) =>
      doubtful.reduce((sum, sample) => sum + heads * looks * this.#selection.costOfMore(sample, pass, times), prepare);
    const times = TIMES.find((one) => cost(one) <= most);
    if (times === undefined) return false;
    for (const sample of doubtful) this.#selection.drawMore(sample, pass, times);
    return true;
  }

  /** What it takes to see what a degree makes of a portion, once another head was looked at. */
  #costOf({ head, rows, exact }: Portion, pass: Pass, before: number): number {
    const again = head === before ? 0 : prepareCost(this.#session.geometry);
    return (exact ? 1 : 2) * this.#session.costOfRows(head, rows, pass) + again;
  }

  /** The same of gradients on the rows that each polynomial is fitted to. */
  *#pilotFirst(degree: number): Generator<number, Measured> {
    const tally = this.#tally();
    for (const head of this.#selection.heads()) {
      for (const portion of this.#selection.first(head)) {
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
    for (const head of this.#selection.heads()) yield* must ? this.#selection.musts(head, pass) : this.#selection.others(head, pass, short);
  }

  /** What a degree would make of some rows. */
  #predict(pass: Pass, degree: number, portion: Portion, tally: Tally): void {
    const { head, rows, weights, predicted } = portion;
    let got = predicted.get(degree);
    if (got === undefined) {
      const own = this.#fit(head, degree);
      const compared = this.#selection.first(head).some((one) => one === portion); // see `distance`
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
    for (const head of this.#selection.heads()) {
      for (const row of this.#selection.first(head).flatMap(({ rows }) => rows)) {
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
    for (const head of this.#selection.heads()) {
      for (const { rows, predicted } of this.#selection.first(head)) {
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
    this.#selection.forgetColumns(); // as they are with another output and lse
    const tally = this.#tally();
    let [seen, ended] = [0, false];
    const over = (next: number) => (ended ||= seen > 0 && this.#session.spent + next > budget);
    for (const head of this.#selection.heads()) {
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
    for (const head of this.#selection.heads()) {
      for (const portion of this.#selection.columns(head)) {
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
    for (const head of this.#selection.heads()) {
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
    this.#selection.forgetColumns();
    return tally.result();
  }

  /** The same of what is drawn by now. */
  *#compare(pass: Pass, limit: number, weak: boolean): Generator<number, Tally> {
    const tally = this.#tally();
    const portions = [...this.#allPortions(pass, true), ...this.#allPortions(pass, false, true)];
    yield* this.#compareRows(pass, portions, tally);
    for (const head of pass === 'forward' ? this.#selection.heads() : []) {
      tally.certain(this.#session.outside(head), this.#bounds[head].v_half_range);
      if (weak) yield* this.#compareRows(pass, this.#weakRows(head), tally);
    }
    if (pass === 'forward' && !this.#isAmple(tally.result().upper, limit)) {
      for (const head of this.#selection.heads()) yield* this.#compareRows(pass, this.#selection.portions(head, pass, 'drawn'), tally);
    }
    for (const head of pass === 'backward' ? this.#selection.heads() : []) {
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
    return this.#selection.notYet(head, this.#session.leastSums(head, SAMPLE_ROWS));
  }

  /** For each head rows of the largest queries and scores. */
  *extremes(): Generator<number, number[][]> {
    this.#session.setOutliers(this.#outliers);
    return yield* this.#selection.extremes();
  }

  /** Whether an error of outputs that is seen without more than the first drawn rows needs no more of them. */
  #isAmple(upper: number, limit: number): boolean {
    return upper <= AMPLE * limit && ONE_OF * this.#selection.rowsToDraw <= this.#session.rowsOfHead;
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
    for (const portion of this.#selection.columns(head)) {
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
    const { valueDim } = this.#session.geometry;
    return this.#selection.known(head).flatMap(({ rows, weights, exact }) => {
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
    const radii = this.#selection.radii();
    const order = heads < this.#session.heads ? [...radii.keys()].sort((a, b) => radii[b] - radii[a]) : [...radii.keys()].reverse();
    const { total, place } = this.#selection.seeing();
    const all = Math.min(count, total);
    const g = this.#session.geometry;
    let largest = 0;
    for (const head of order.slice(0, heads)) {
      const look = (rows: readonly number[] | Uint32Array) => {
        const distance = this.#difference(head, (gradient) => this.#session.distance(head, rows, null, gradient));
        largest = worse(largest, distance);
      };
      if (heads * (portionCost(g, 'forward') + (this.#selection.hasExtremes(head) ? 0 : extremesCost(g))) <= budget) {
        const rows = [...this.#selection.extremeRows(head)].slice(0, SAMPLE_ROWS);
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
      const rows = this.#selection.first(head).flatMap(({ rows }) => rows);
      const all = rows.length > 0 ? this.#session.scores(head, rows, stride) : new Float32Array(0);
      const few = condense(all);
      if (few && this.#meansAreZero()) few.scores.set(centred(few.scores, few.weights));
      scores = few && new ScoreFits(few.scores, few.weights);
      this.#scores.set(head, scores);
    }
    return scores;
  }

  /** Whether the scores of a row have the mean 0, whatever a few of them have: those of all keys, from which their mean is subtracted. */
  #meansAreZero(): boolean {
    const { causal, window, segments, relative, relativePositions } = this.#session.geometry;
    return !causal && window.every((side) => side < 0) && segments.length === 1 && !relative && !relativePositions;
  }

  /**
   * How well a degree fits the scores of the head with the largest ones, or for gradients its derivative: the root of the sum of squares
   * of what it leaves of exp, over that of exp.
   */
  #residual(pass: Pass, degree: number): number {
    const head = this.#selection.heads()[0];
    const [own, some] = [this.#fit(head, degree), this.#scoresOf(head)];
    if (!own || !some) return Infinity;
    return some.residual(own, pass === 'backward');
  }

  /** The same for columns of dk: that of the first rows, once these are known. */
  #columnRounding(head: number): number {
    const [first] = this.#selection.first(head);
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

/**
 * With slopes each chunk has a row of few keys that count, and errors of these are much like normal ones: the largest of M is
 * about sqrt(log M / log n) times the largest of n, which are looked at in each head. 1 without.
 */
function hiddenFactor({ geometry: { alibi, queryLength }, heads }: Session, looked: number): number {
  const chunks = Math.ceil(queryLength / CHUNK);
  return alibi && chunks > looked ? Math.sqrt(Math.log(chunks * heads) / Math.log(looked * heads)) : 1;
}

/** Less their mean. */
function centred(scores: Float64Array, weights: Float64Array): Float64Array {
  let [sum, total] = [0, 0];
  for (let n = 0; n < scores.length; n++) {
    sum += weights[n] * scores[n];
    total += weights[n];
  }
  return scores.map((s) => s - sum / total);
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
