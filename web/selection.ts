// SPDX-License-Identifier: MIT
//
// Which rows and columns are looked at: those where a polynomial is most likely to fail, each for itself, and drawn ones, which stand for
// all others. O(N D) to find the former.
//
// Rows are drawn by a generator seeded with the call's seed and the head, so a call repeated gives the same choice, and
// `backward` finds the polynomials of its `forward`. Only rows that may see a key are drawn. More may be drawn later: what was drawn
// before stays, and stands for less.

import { CHUNK, columnsCost, DRAWN_ROWS, LOOKED_SEGMENTS, rowsCost, SAMPLE_KEYS, SAMPLE_ROWS, SHORT_ROWS, STEEP, type Pass } from './cost.js';
import { scoreRadius } from './certificate.js';
import { draw, random, WeightedDraws, type Drawn } from './draws.js';
import type { Bounds, Columns, Outliers, Rows, Session } from './kernel.js';
import { seeingQueries, seenKeys, segmentsOf } from './scores.js';
import type { Sample } from './tally.js';
import { drownedRows } from './transforms.js';

/** Portions of rows with the largest scores that have to be looked at; beside outliers what else is large decides. */
export const LARGEST = { all: 1, besideOutliers: 2 } as const;

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

/** See `#slopeRows`. */
interface SlopeRows {
  rows: ReadonlySet<number>;
  weight: number;
  stands(row: number): boolean;
  next: readonly number[];
}

const NO_SLOPES: SlopeRows = { rows: new Set(), weight: 1, stands: () => false, next: [] };

/** Up to SAMPLE_ROWS rows of a head, or SHORT_ROWS that see few keys, each standing for `weights` rows. */
export interface Portion {
  head: number;
  rows: number[];
  weights: number[];
  exact: Rows | null;
  /** By degree; null where it has no polynomial. */
  predicted: Map<number, Rows | null>;
}

/** A portion with what is exact. */
export interface Known extends Portion {
  exact: Rows;
}

/** Up to SAMPLE_KEYS keys of a head, each standing for `weights` keys. */
export interface ColumnPortion {
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
export interface KnownColumns extends ColumnPortion {
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

export class RowSelection {
  readonly #session: Session;
  readonly #bounds: readonly Bounds[];
  readonly #seed: number;
  readonly #outliers: Outliers | null;
  readonly #next: readonly (readonly number[])[];
  readonly #before: readonly (readonly number[])[];
  /** How many times as much as at first is drawn by now. */
  readonly times: Record<Sample, number> = { rows: 1, columns: 1 };
  #order: readonly number[] | null = null;
  readonly #drawn = new Map<number, DrawnRows>();
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
    outliers: Outliers | null,
    next: readonly (readonly number[])[],
    before: readonly (readonly number[])[],
  ) {
    this.#next = next;
    this.#before = before;
    this.#outliers = outliers;
    this.#session = session;
    this.#bounds = bounds;
    this.#seed = seed;
  }

  /** What no score of each head exceeds. */
  radii(): number[] {
    return this.#bounds.map((one) => scoreRadius(this.#session.geometry, one));
  }

  /** All heads, the one with the largest scores first. */
  heads(): readonly number[] {
    if (!this.#order) {
      const radii = this.radii();
      const widest = Math.max(radii.indexOf(radii.reduce((a, b) => Math.max(a, b), 0)), 0);
      this.#order = [widest, ...radii.keys()].filter((head, n) => n === 0 || head !== widest);
    }
    return this.#order;
  }

  /** Rows that may see a key, counted: number n is row place(n); number(row) is null for the others. */
  seeing(): { total: number; length: number; place(n: number): number; number(row: number): number | null } {
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
      const { total, length, place, number } = this.seeing();
      const largest = number(this.#bounds[head].q_argmax);
      const taken = largest === null ? [] : [largest];
      const next = random(this.#seed, head, DRAWN);
      const apart = new Set([...taken, ...this.#outlierRows(head).map(number).filter((n) => n !== null)]);
      const draws = new WeightedDraws(total, this.#session.geometry.causal ? length : null, apart, next);
      const rows = draws.add(this.rowsToDraw).rows;
      const all = [...taken.map((n) => ({ row: n, weight: 1 })), ...rows].map(({ row, weight }) => ({ row: place(row), weight }));
      drawn = { all, first: inPortions(head, all.slice(0, SAMPLE_ROWS)), draws };
      this.#drawn.set(head, drawn);
    }
    return drawn;
  }

  /** Rows to draw of each head, to begin with. */
  get rowsToDraw(): number {
    return Math.max(SAMPLE_ROWS, Math.ceil(DRAWN_ROWS / this.#session.heads));
  }

  /** More drawn rows of a head, all of which then stand for fewer others: beside those of sums of squares first ones of chunks with slopes. */
  #moreRows(head: number, pass: Pass): void {
    const [few, most, drawn] = (['few', 'most', 'drawn'] as const).map((of) => this.portions(head, pass, of));
    const { first, draws } = this.#drawnRows(head);
    const hard = this.#hardRows(head, pass);
    const { place } = this.seeing();
    const slope = this.#slopeRows(head);
    const more = pass === 'backward' ? draws.add((this.times.rows - 1) * this.rowsToDraw).rows : [];
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
  *musts(head: number, pass: Pass): Generator<Portion, void> {
    if (pass === 'backward') yield* this.#drawnRows(head).first;
    else yield* this.portions(head, pass, 'few').slice(0, 1);
    yield* this.#largest(head, pass).musts;
  }

  /** The others; `short`: where the largest error decides, without most of the drawn ones. */
  *others(head: number, pass: Pass, short: boolean): Generator<Portion, void> {
    const [few, most] = [this.portions(head, pass, 'few'), this.#largest(head, pass).others];
    if (pass === 'backward') yield* [...this.portions(head, pass, 'drawn'), ...few, ...most];
    else yield* [...most, ...this.#drawnRows(head).first, ...few.slice(1), ...(short ? [] : this.portions(head, pass, 'drawn'))];
  }

  #largest(head: number, pass: Pass): { musts: Portion[]; others: Portion[] } {
    const all = this.portions(head, pass, 'most');
    const count = this.#outliers ? LARGEST.besideOutliers : LARGEST.all;
    return { musts: all.slice(0, count), others: all.slice(count) };
  }

  /** Rows that see few keys or most likely have the largest scores, each for itself; and drawn ones that are none of these. A sampler serves one pass. */
  portions(head: number, pass: Pass, of: 'few' | 'most' | 'drawn'): Portion[] {
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
    else if (of === 'most') [...this.extremeRows(head)].filter((row) => !few.has(row)).forEach(alone);
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
    const [few, extreme] = [this.#fewKeyRows(head, pass), this.extremeRows(head)];
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
  extremeRows(head: number): ReadonlySet<number> {
    let rows = this.#extreme.get(head);
    if (!rows) this.#extreme.set(head, (rows = this.#findExtremeRows(head)));
    return rows;
  }

  #findExtremeRows(head: number): ReadonlySet<number> {
    const { number } = this.seeing();
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
    const count = Math.min(this.slopesToDraw(head, 'rows'), end - first);
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
  slopesToDraw(head: number, sample: Sample): number {
    const less = seenKeys(this.#session.geometry) / 2 / (this.#session.sight(head) + TOUCHED);
    return this.times[sample] * Math.floor((sample === 'rows' ? SLOPE_ROWS : SLOPE_KEYS) * Math.max(1, less));
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
    const count = Math.min(this.slopesToDraw(head, 'columns'), all.length);
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
    const some = (this.times.columns * SAMPLE_ROWS) / 2;
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
    const more = weighAgain(columns.portions, this.#drawKeys(head, columns, (this.times.columns - 1) * this.#keysToDraw));
    columns.portions.push(...columnPortions(more.sort((a, b) => a.row - b.row)));
  }

  forgetColumns(): void {
    for (const { portions } of this.#columns.values()) for (const portion of portions) Object.assign(portion, NOTHING_KNOWN);
  }

  #outlierKeys(head: number): ArrayLike<number> & Iterable<number> {
    const outliers = this.#outliers;
    return outliers?.keys.subarray(head * outliers.counts.keys, (head + 1) * outliers.counts.keys) ?? [];
  }

  /** Drawn rows that polynomials are fitted to. */
  first(head: number): readonly Portion[] {
    return this.#drawnRows(head).first;
  }

  /** All portions of a head that were asked for so far. */
  known(head: number): Portion[] {
    return [...this.first(head), ...(['few', 'most', 'drawn'] as const).flatMap((of) => this.#rest.get(`${head} ${of}`) ?? [])];
  }

  /** Of these rows those that a finished forward pass is not looked at for yet. */
  notYet(head: number, rows: readonly number[]): Portion[] {
    const known = new Set([...this.first(head).flatMap((one) => one.rows), ...this.#fewKeyRows(head, 'forward'), ...this.extremeRows(head)]);
    return inPortions(head, rows.filter((row) => !known.has(row)).map((row) => ({ row, weight: 1 })));
  }

  /** Whether the rows of a head that stand out were found. */
  hasExtremes(head: number): boolean {
    return this.#extremes.has(head);
  }

  columns(head: number): readonly ColumnPortion[] {
    return this.#drawnColumns(head).portions;
  }

  /** Draws more, so many times what was drawn at first in all, once. */
  drawMore(sample: Sample, pass: Pass, times: number): void {
    this.times[sample] = times;
    for (const head of this.heads()) {
      if (sample === 'rows') this.#moreRows(head, pass);
      else this.#moreColumns(head);
    }
  }

  /** Of what is drawn of a head beyond the first sample, at most. */
  costOfMore(sample: Sample, pass: Pass, times: number): number {
    const g = this.#session.geometry;
    const drawn = sample === 'columns' ? this.#keysToDraw : pass === 'backward' ? this.rowsToDraw : 0;
    const slopes = g.alibi ? (sample === 'columns' ? SLOPE_KEYS : SLOPE_ROWS) : 0; // or more, which see the less
    const more = Math.ceil((times - 1) * (drawn * (g.causal ? 1.5 : 1) + slopes));
    const evenly = (of: number) => Array.from({ length: more }, (_, n) => Math.floor((n * of) / more));
    if (sample === 'columns') return columnsCost(g, evenly(g.keyLength));
    const rows = evenly(g.queryLength);
    let cost = 0;
    for (let n = 0; n < more; n += SAMPLE_ROWS) cost += rowsCost(g, rows.slice(n, n + SAMPLE_ROWS), pass);
    return cost;
  }
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

export function inPortions(head: number, all: readonly Drawn[], size: number = SAMPLE_ROWS): Portion[] {
  const portions: Portion[] = [];
  for (let n = 0; n < all.length; n++) {
    if (n % size === 0) portions.push({ head, rows: [], weights: [], exact: null, predicted: new Map() });
    const { rows, weights } = portions[portions.length - 1];
    rows.push(all[n].row);
    weights.push(all[n].weight);
  }
  return portions;
}
