// SPDX-License-Identifier: MIT
//
// Which rows to do exactly beside a polynomial. A few keys and queries with large norms set the bound of all scores; the others
// alone have a much smaller one, and a polynomial of low degree will do. O(N D) for the norms, and a few more passes over the
// keys for each choice that is looked at.
//
// By Cauchy-Schwarz the scores of the others stay within scale |q| |k| of the largest norms that are left, so the rows to take are
// the largest ones, and of all pairs (queries, keys) of counts only those matter that no cheaper one undercuts.

import { NO_OUTLIERS, outlierPairs, type OutlierCounts } from './cost.js';
import type { Bounds, Largest, Outliers, Session } from './kernel.js';
import { Sampler, survey } from './sampling.js';
import type { Problem } from './validate.js';

/** Rows that are exact, and what is known of the others. */
export interface Split {
  /** null: none. */
  outliers: Outliers | null;
  bounds: readonly Bounds[];
  sampler: Sampler;
}

/** Counts to choose from, and the radius of the scores of the others relative to that of all. */
export interface Choice {
  counts: OutlierCounts;
  shrinks: number;
}

/** The largest rows of every key/value head. */
export interface Ranking {
  queries: Largest[];
  keys: Largest[];
}

/** Counts that are tried: a few rows, and shares of all. */
const FEW = [0, 1, 8, 32];
const SHARES = [0.005, 0.01, 0.02, 0.04];

/** A dearer choice must bring the radius down to this part of a cheaper one's. */
const WORTH = 0.85;

/** Queries that are looked at of those that come next: behind outliers many are nearly as large. */
const NEXT = 16;

/**
 * Keys that stand out by more than this from the least that is listed, and together move the mean key by more than so much of that:
 * ranks are taken again without.
 */
const [STANDS_OUT, MOVES] = [8, 0.1];

const rankings = new WeakMap<Session, Ranking>();

/** Ranks rows by norm, keys around the mean of the ordinary ones; of each call once. Yields 0 between heads. May leave no outliers set. */
export function* rank(session: Session): Generator<number, Ranking> {
  let ranking = rankings.get(session);
  if (!ranking) rankings.set(session, (ranking = yield* rankRows(session)));
  return ranking;
}

function* rankRows(session: Session): Generator<number, Ranking> {
  session.setOutliers(null);
  const ranking: Ranking = { queries: [], keys: [] };
  for (let head = 0; head < session.heads; head++) {
    ranking.queries.push(session.largest(head, 'queries'));
    ranking.keys.push(session.largest(head, 'keys'));
    yield 0;
  }
  const far = ({ norms }: Largest) => {
    const least = norms[norms.length - 1];
    const sum = norms.filter((norm) => norm > STANDS_OUT * least).reduce((a, b) => a + b, 0);
    return sum > MOVES * least * session.geometry.keyLength;
  };
  if (!ranking.keys.some(far) || session.outlierLimits.keys === session.geometry.keyLength) return ranking;
  session.setOutliers(outliersOf(session, ranking, { queries: 0, keys: session.outlierLimits.keys }));
  for (let head = 0; head < session.heads; head++) {
    ranking.keys[head] = session.largest(head, 'keys');
    yield 0;
  }
  session.setOutliers(null);
  return ranking;
}

/** The choices worth a look, the cheapest first. */
export function choicesOf(problem: Problem, session: Session, { queries, keys }: Ranking): Choice[] {
  const counts = (rows: number, limit: number) =>
    [...new Set([...FEW, ...SHARES.map((share) => Math.ceil(share * rows))])].filter((count) => count < limit);
  const radius = (counts: OutlierCounts) => {
    let most = 0;
    for (let head = 0; head < keys.length; head++)
      most = Math.max(most, queries[head].norms[counts.queries] * keys[head].norms[counts.keys]);
    return most;
  };
  const all = radius(NO_OUTLIERS);
  const pairs = counts(session.rowsOfHead, session.outlierLimits.queries).flatMap((q) =>
    counts(session.geometry.keyLength, session.outlierLimits.keys).map((k) => ({ queries: q, keys: k })),
  );
  const choices: Choice[] = [];
  let least = all;
  const dear = pairs.map((one) => outlierPairs(problem, one));
  for (const n of [...pairs.keys()].sort((a, b) => dear[a] - dear[b])) {
    const one = pairs[n];
    const left = radius(one);
    if (!(left < WORTH * least)) continue;
    least = left;
    choices.push({ counts: one, shrinks: left / all });
  }
  return choices;
}

/**
 * Sets the outliers of a choice, and looks at the others.
 *
 * @param whole the sampler of all rows, where an output and lse were given: these may be off in rows that are ordinary now.
 */
export function* splitOff(
  session: Session,
  ranking: Ranking,
  counts: OutlierCounts,
  seed: number,
  whole: Sampler | null = null,
): Generator<number, Split> {
  const before = whole ? yield* whole.extremes() : [];
  const outliers = outliersOf(session, ranking, counts);
  session.setOutliers(outliers);
  const bounds = yield* survey(session);
  const next = ranking.queries.map(({ rows }) =>
    Array.from({ length: NEXT }, (_, n) => Math.floor(counts.queries + (n / NEXT) * (rows.length - counts.queries))).flatMap(
      (at, n, all) => (at !== all[n - 1] && at < rows.length ? [rows[at]] : []),
    ),
  );
  return { outliers, bounds, sampler: new Sampler(session, bounds, seed, outliers, next, before) };
}

function outliersOf(session: Session, { queries, keys }: Ranking, counts: OutlierCounts): Outliers {
  const lists = (largest: readonly Largest[], count: number) => {
    const all = new Uint32Array(session.heads * count);
    largest.forEach(({ rows }, head) => all.set(rows.slice(0, count).sort(), head * count));
    return all;
  };
  return { queries: lists(queries, counts.queries), keys: lists(keys, counts.keys), counts };
}
