// SPDX-License-Identifier: MIT
//
// What a pass costs: useful floating-point operations, counted in closed form, over the share of the machine's peak that
// each engine reaches. Only ratios of costs decide, so the peak itself is not needed. Counts are numbers, exact to 2^53.

import { batchesOf, blocksOf, rank, termsAndReal } from './blocks.js';
import { productsOfPair } from './relative.js';
import { seenKeys, type Features } from './scores.js';
import { cost as products, pairs, transforms } from './theory.js';
import type { Geometry } from './validate.js';

export type Pass = 'forward' | 'backward';

/** Queries and keys of one chunk of the causal polynomial engine, inside which exp is exact; keys that join a state together. */
export const CHUNK = 32;

/** When errors are sampled: rows at a time in a key/value head, of those that see few keys, and drawn rows in all heads (if few). */
export const SAMPLE_ROWS = 8;
export const SHORT_ROWS = 32;
/** Keys whose gradients are sampled together, at most: RA_SAMPLE_KEYS. */
export const SAMPLE_KEYS = 32;
export const DRAWN_ROWS = 32;
/** Segments that are looked at for their own sake: rows that see few keys, so next to nothing. */
export const LOOKED_SEGMENTS = 4;
/** Scores that a head's polynomial is fitted to, about. */
export const SAMPLE_SCORES = 1024;
/** Keys that are weighed together there (RA_SAMPLE_TILE). */
const SAMPLE_TILE = 128;

/** Outliers of a key/value head: of `rows` queries or keys at most these are done exactly beside a polynomial. */
export function outlierLimit(rows: number): number {
  return Math.min(rows, Math.max(64, Math.ceil(OUTLIER_SHARE * rows)));
}

/** Queries and keys of each key/value head that are done exactly beside a polynomial. */
export interface OutlierCounts {
  queries: number;
  keys: number;
}

/** Looking for decays that stand for a bias, in operations at peak (decays.ts). */
export const FIT_DECAYS = 4e8;

export const NO_OUTLIERS: OutlierCounts = { queries: 0, keys: 0 };

/** Of the rows; with as many queries and keys the gain over exact is below 12. */
const OUTLIER_SHARE = 0.04;

/** Share of the multiply-add peak, by head size: the first row whose `upTo` is not below headDim. `higher`: from degree 3 on. */
const EFFICIENCY = [
  {
    upTo: 16,
    exact: { forward: 0.73, backward: 0.8 },
    polynomial: { forward: 0.55, backward: 0.52 },
    higher: { forward: 0.75, backward: 0.72 },
    outliers: { forward: 0.45, backward: 0.45 },
  },
  {
    upTo: 32,
    exact: { forward: 0.83, backward: 0.87 },
    polynomial: { forward: 0.74, backward: 0.72 },
    higher: { forward: 0.83, backward: 0.82 },
    outliers: { forward: 0.55, backward: 0.55 },
  },
  {
    upTo: Infinity,
    exact: { forward: 0.88, backward: 0.9 },
    polynomial: { forward: 0.8, backward: 0.83 },
    higher: { forward: 0.83, backward: 0.83 },
    outliers: { forward: 0.65, backward: 0.65 },
  },
] as const;

/** Beyond so many powers of e, scores of 1 or 2 included, float32 has no weights; keys that are passed over together, and half as many again. */
const SIGHT = { powers: 92, keys: 180 } as const;

/** The same for the states beside a first one, of the same features. */
const WIDE_EFFICIENCY = { forward: 0.88, backward: 0.75 } as const;

/** The same for the Toeplitz engine, two thirds of whose time are transforms: with one matrix, and with one for each term. */
const TOEPLITZ_EFFICIENCY = {
  bias: { forward: 0.45, backward: 0.41 },
  rotation: { forward: 0.36, backward: 0.36 },
  matrices: { forward: 0.42, backward: 0.42 },
} as const;

/** Of the exact engine's share, what relative maps reach: rotations, and any matrices; their constant parts all of it. */
const MAP_EFFICIENCY = { bias: 1, rotation: 0.87, matrices: 0.45 } as const;
/** Distances that have to be alike for a block of queries and keys to meet one matrix: about two blocks. */
const ALIKE = 512;

/**
 * What sampling takes, in operations at peak speed (6.7e4 a microsecond), measured: for each pair of a sampled row or column, so many and
 * so many for each entry; for each row of the arrays that is looked at, likewise.
 */
const PAIR = {
  rows: { forward: { each: 30, entry: 2.4 }, backward: { each: 30, entry: 5.1 } },
  columns: { each: 90, entry: 6.2 },
  /** More with slopes. */
  slopes: { rows: 45, columns: 90 },
} as const;
/** Rows of gradients with how far they are from others take so many times as long. */
export const DISTANCE_OF_GRADIENTS = 1.5;
const ROW = {
  /** To begin with another head, queries and keys. */
  prepare: { each: 240, entry: 36 },
  /** The same head with other outliers. */
  prepareAgain: { each: 230, entry: 22 },
  /** Of a query, where these are centred. */
  centre: { each: 0, entry: 60 },
  /** To find the rows that are likely to be worst. */
  extremes: { each: 600, entry: 42 },
  /** The same where keys of each chunk are looked at. */
  extremesOfChunks: { each: 1100, entry: 73 },
  /** How far scores are from 0: of each entry of the product of a query, or key, with itself. */
  spread: { each: 700, entry: 1.9 },
  /** To rank queries, or keys, by norm. */
  rank: { each: 900, entry: 0 },
} as const;
/** Operations of a relative map, which sampling multiplies entry by entry, over useful ones; and of each cos and sin of its table. */
const [MAP_SAMPLING, MAP_TABLE] = [6, 950];
/**
 * What JavaScript adds: the scores that polynomials are fitted to, and the fit of one; a call that computes or compares a portion of
 * rows; and the rest of a plan, of one with outliers, and of each trial of these; a polynomial with a proof.
 */
export const FIT = { scores: 1.3e6, polynomial: 4e5 } as const;
const PORTION = 4e5;
export const PLAN = { any: 6e5, outliers: 2e6, trial: 3e6, proof: 2e6 } as const;
/** Portions that hold these, about: without a mask, and when causal (most of them short). */
const HARD_PORTIONS = { full: 2, causal: 6 } as const;
/** The same of rows at the beginning of chunks, half as long, where there are slopes: flat ones, and some that are steep. */
const SLOPE_PORTIONS = { flat: 4, steep: 11 } as const;
/** From this slope on rows see few keys that count, so that more of them are looked at. */
export const STEEP = 0.25;

/** Of geometries that were asked for before: choosing outliers asks a hundred times. */
const allowed = new WeakMap<Geometry, number>();

/** Pairs (query, key) that the mask allows, over all query heads. */
export function allowedPairs(g: Geometry): number {
  let known = allowed.get(g);
  if (known === undefined) allowed.set(g, (known = g.batch * g.heads * pairs(g)));
  return known;
}

/** Useful operations of the exact engine; those of a relative map as relative.ts counts them. */
export function exactFlops(g: Geometry, pass: Pass): number {
  const map = productsOfPair(g);
  const more =
    map === null ? 0 : pass === 'forward' ? map.score - g.headDim : map.score + map.gradients + map.weights - 3 * g.headDim;
  return (flopsOfPair(g, pass) + 2 * more) * allowedPairs(g);
}

/**
 * Useful operations of the polynomial engine, with (CHUNK + 1) / 2 exact pairs for each query at each edge of what it sees, and the
 * pairs of outliers.
 */
export function polynomialFlops(g: Geometry, pass: Pass, degree: number, outliers = NO_OUTLIERS, dvDegree = degree): number {
  const edges = Number(g.causal || g.window[1] >= 0) + Number(g.window[0] >= 0);
  const near = g.decays ? g.decays.near - 1 : 0;
  const beside = Math.min((near + (edges * (CHUNK + 1)) / 2) * g.batch * g.heads * g.queryLength, allowedPairs(g));
  return stateFlops(g, pass, degree, dvDegree) + flopsOfPair(g, pass) * (beside + outlierPairs(g, outliers));
}

/** Of these the products with states; with decays one for each, and in the backward pass the gradient of the bias. */
function stateFlops(g: Geometry, pass: Pass, degree: number, dvDegree: number): number {
  const one = flopsOfState(g, pass, degree, dvDegree);
  return one * (g.decays?.count ?? 1) + (g.decays && pass === 'backward' ? lagFlops(g) : 0);
}

/** Of one state; heads with slopes, or with a bias that decays stand for, of their own have a state of their own. */
function flopsOfState(g: Geometry, pass: Pass, degree: number, dvDegree: number): number {
  const kvHeads = g.decays && hasOwnBiases(g) ? g.heads : g.kvHeads;
  const states = g.batch * (g.alibi ? g.heads : kvHeads);
  const saved = pass === 'forward' ? 0 : rank(g.headDim, degree) - rank(g.headDim, dvDegree);
  const { batch, heads, queryLength, keyLength, headDim, valueDim, window, queryOffset, alibi } = g;
  // one by one: engines take their time over `...g`
  const all = products({
    method: 'polynomial',
    pass,
    degree,
    batch,
    heads,
    kvHeads,
    queryLength,
    keyLength,
    headDim,
    valueDim,
    window,
    queryOffset,
    alibi,
  });
  return all - 2 * saved * (g.valueDim + 1) * g.keyLength * states;
}

/** Products for the gradient of a far bias by correlations (lags.c), of features of degree 1. */
function lagFlops(g: Geometry): number {
  const heads = g.batch * (hasOwnBiases(g) ? g.heads : g.kvHeads);
  const batches = Math.ceil(((g.headDim + 1) * (g.valueDim + 1)) / 8);
  const { rows, columns, block } = blocksOf(g);
  return heads * batches * ((rows + columns) * 40 * block * Math.log2(block) + rows * columns * 32 * block);
}

/** The cost of states for so many decays beyond a distance, at a degree that is likely; only for comparisons. */
export function costOfDecays(g: Geometry): (count: number, near: number) => number {
  const share = EFFICIENCY.find((row) => g.headDim <= row.upTo)!;
  const both = (of: (pass: Pass) => number) => of('forward') + of('backward');
  const state = both((pass) => flopsOfState(g, pass, 2, 2) / WIDE_EFFICIENCY[pass]);
  const pair = both((pass) => (flopsOfPair(g, pass) * g.batch * g.heads * g.queryLength) / share.outliers[pass]);
  return (count, near) => count * state + near * pair;
}

/** The cost of the exact engine. */
export function exactCost(g: Geometry, pass: Pass): number {
  return cost(g, pass, null);
}

function hasOwnBiases(g: Geometry): boolean {
  return g.bias !== null && g.bias.length > g.queryLength + g.keyLength - 1;
}

/** Pairs of outliers, those of an outlier query and an outlier key once; outliers see and are seen like others. */
export function outlierPairs(g: Geometry, { queries, keys }: OutlierCounts): number {
  const others = (g.heads / g.kvHeads) * g.queryLength - queries;
  const all = g.batch * g.kvHeads * (queries * g.keyLength + keys * others);
  return all * (allowedPairs(g) / (g.batch * g.heads * g.queryLength * g.keyLength));
}

/** Terms of the Toeplitz engine. */
export function termsOf(g: Geometry, degree: number): number {
  return termsAndReal(expansionOf(g, degree)).count;
}

/** What its terms depend on. */
function expansionOf({ headDim, rotaryDim, relativePositions, relative }: Geometry, degree: number) {
  const places = relative ? relative.support.length / 2 : undefined;
  return { headDim, degree, rotaryDim: relativePositions ? rotaryDim : 0, places };
}

/** How often all batches of the Toeplitz engine are run: for each key/value head, or each head with a bias of its own. */
function jobsOf(g: Geometry): number {
  return g.batch * (hasOwnBiases(g) ? g.heads : g.kvHeads);
}

/** Whether the engine can count its terms and its units of work (ra_toeplitz_fits). */
export function countable(g: Geometry, degree: number): boolean {
  const { batches } = batchesOf(termsAndReal(expansionOf(g, degree)), g.valueDim);
  const monomials = rank(g.relative ? g.relative.support.length / 2 : g.headDim, degree);
  return monomials < 2 ** 32 - 1 && jobsOf(g) * (batches + 2) < 2 ** 32;
}

/**
 * Useful operations of the Toeplitz engine: the transforms (5 S log2 S each) and, block by block, the products of spectra, of four
 * complex columns at a time. Query heads that share a key/value head and a bias share all of it.
 */
export function toeplitzFlops(g: Geometry, pass: Pass, degree: number): number {
  const { relative, bias } = g;
  const map = expansionOf(g, degree);
  const { batches } = batchesOf(termsAndReal(map), g.valueDim);
  const { rows, columns, block } = blocksOf(g);
  const { count } = transforms({ ...g, ...map, bias: bias !== null, pass });
  const times = pass === 'forward' ? 1 : bias || relative ? 3 : 2;
  const products = batches * times * rows * columns * 64 * block * (g.causal ? 0.5 : 1);
  return jobsOf(g) * (count * 5 * block * Math.log2(block) + products);
}

/** Operations at peak speed that take as long as the pass: `degree` null for the exact engine, `dvDegree` that of the weights of dv. */
export function cost(
  g: Geometry,
  pass: Pass,
  degree: number | null,
  features: Features = 'polynomial',
  dvDegree = degree ?? 0,
): number {
  const share = efficiencyOf(g);
  const map = mapOf(g);
  if (degree === null) {
    const alike = map === 'bias' ? 0 : alikeShare(g);
    const all = (1 - alike) * pairwiseCost(g, pass) + (alike * flopsOfPair(g, pass) * allowedPairs(g)) / share.exact[pass];
    return shareInSight(g) * all;
  }
  if (features === 'toeplitz') return toeplitzFlops(g, pass, degree) / TOEPLITZ_EFFICIENCY[map][pass];
  // The keys at the left edge of a window, and those that leave the state, are rotated once more and weighed in whole blocks.
  const besides = g.window[0] < 0 ? 0 : 1.5 * CHUNK * flopsOfPair(g, pass) * g.batch * g.heads * g.queryLength;
  const more = ((g.decays?.count ?? 1) - 1) * flopsOfState(g, pass, degree, dvDegree);
  const first = (polynomialFlops(g, pass, degree, NO_OUTLIERS, dvDegree) - more + besides) / share[degree > 2 ? 'higher' : 'polynomial'][pass];
  return first + more / WIDE_EFFICIENCY[pass];
}

/** What rows that are exact beside a polynomial add to it. */
export function outliersCost(g: Geometry, pass: Pass, outliers: OutlierCounts): number {
  return (flopsOfPair(g, pass) * outlierPairs(g, outliers)) / efficiencyOf(g).outliers[pass];
}

/** Of its pairs those that the exact engine does not pass over because slopes leave no weight to them, where only an end cuts what is seen. */
function shareInSight(g: Geometry): number {
  if (!g.alibi || g.bias || g.mask || g.softcap || g.relative || g.relativePositions) return 1;
  if (g.segments.length > 1 || g.window.some((side) => side >= 0)) return 1;
  const inSight = (slope: number) => {
    const reach = Math.ceil(SIGHT.powers / slope) + SIGHT.keys;
    return reach < g.keyLength ? pairs({ ...g, window: [reach, g.causal ? -1 : reach] }) : pairs(g);
  };
  return g.alibi.reduce((sum, slope) => sum + inSight(slope), 0) / (g.alibi.length * pairs(g));
}

/** The same for the exact engine if every pair had a matrix of its own. */
export function pairwiseCost(g: Geometry, pass: Pass): number {
  return exactFlops(g, pass) / (efficiencyOf(g).exact[pass] * MAP_EFFICIENCY[mapOf(g)]);
}

const efficiencyOf = (g: Geometry) => EFFICIENCY.find((row) => g.headDim <= row.upTo)!;

const mapOf = (g: Geometry) => (g.relativePositions ? 'rotation' : g.relative ? 'matrices' : 'bias');

const alikeShares = new WeakMap<object, number>();

/** Pairs of a relative map that meet the same matrix as all around them, as a share of all that a mask by distance allows. */
function alikeShare(g: Geometry): number {
  const map = g.relativePositions ?? g.relative!.weights;
  const known = alikeShares.get(g);
  if (known !== undefined) return known;
  const diagonals = g.queryLength + g.keyLength - 1;
  const [behind, ahead] = [g.window[0] < 0 ? Infinity : g.window[0], g.causal ? 0 : g.window[1] < 0 ? Infinity : g.window[1]];
  const same = (n: number) => {
    for (let at = n; at < map.length; at += diagonals) if (map[at] !== map[at - 1]) return false;
    return true;
  };
  let [alike, all, run, first] = [0, 0, 0, 0];
  for (let n = 0; n <= diagonals; n++) {
    if (n === diagonals || (n > 0 && !same(n))) {
      if (n - first >= ALIKE) alike += run;
      [run, first] = [0, n];
    }
    const distance = n - (g.keyLength - 1) + g.queryOffset;
    const pairs = distance > behind || -distance > ahead ? 0 : Math.min(n + 1, g.queryLength, g.keyLength, diagonals - n);
    run += pairs;
    all += pairs;
  }
  alikeShares.set(g, all > 0 ? alike / all : 0);
  return alikeShares.get(g)!;
}

/** The same to make a head the one that is sampled; `again`: with other outliers. */
export function prepareCost(g: Geometry, again = false): number {
  return rowCost(again ? ROW.prepareAgain : ROW.prepare, g) * (queriesOfHead(g) + g.keyLength);
}

/** What it takes beside that where queries are centred. */
export function centringCost(g: Geometry): number {
  return rowCost(ROW.centre, g) * queriesOfHead(g);
}

export function extremesCost(g: Geometry): number {
  return PORTION + rowCost(g.alibi || g.decays ? ROW.extremesOfChunks : ROW.extremes, g) * queriesOfHead(g);
}

/** The same to find how far scores of a head are from 0, by so many queries and keys, those that leave a window included. */
export function spreadCost(g: Geometry, rows = queriesOfHead(g) + (g.window[0] >= 0 ? 2 : 1) * g.keyLength): number {
  const { each, entry } = ROW.spread;
  return PORTION + (each + entry * g.headDim ** 2) * rows;
}

/** Of queries, or keys. */
export function rankCost(g: Geometry, of: 'queries' | 'keys'): number {
  return rowCost(ROW.rank, g) * (of === 'queries' ? queriesOfHead(g) : g.keyLength);
}

/** The same for a portion of rows. */
export function rowsCost(g: Geometry, rows: ArrayLike<number>, pass: Pass): number {
  if (g.causal && g.window[0] >= 0) {
    let keys = 0;
    for (let n = 0; n < rows.length; n += SAMPLE_ROWS) keys += between(rows, n, (row) => (row % g.queryLength) + g.queryOffset + 1, -g.window[0] - 1, g.keyLength);
    return portionCost(g, pass, keys);
  }
  let last = 0;
  for (let n = 0; n < rows.length; n++) last = Math.max(last, rows[n] % g.queryLength);
  const seen = g.causal ? Math.max(0, last + g.queryOffset + 1) : g.keyLength;
  return portionCost(g, pass, Math.min(seen, keysOfPortion(g)), Math.ceil(rows.length / SAMPLE_ROWS));
}

/** The same for a portion of columns, ascending, up to SAMPLE_KEYS of them. */
export function columnsCost(g: Geometry, keys: ArrayLike<number>): number {
  const { each, entry } = PAIR.columns;
  let pairs = 0;
  for (let n = 0; n < keys.length; n += SAMPLE_ROWS) {
    if (g.causal && g.window[0] >= 0) {
      pairs += SAMPLE_ROWS * (g.heads / g.kvHeads) * between(keys, n, (key) => key - g.queryOffset, g.window[0] + 1, g.queryLength);
      continue;
    }
    const unseen = g.causal ? Math.max(0, Math.min(keys[n] - g.queryOffset, g.queryLength)) : 0;
    pairs += SAMPLE_ROWS * ((g.queryLength - unseen) / g.queryLength) * queriesOfHead(g);
  }
  return PORTION + pairs * (each + entry * (g.headDim + g.valueDim) + moreOfPair(g, 'columns', 'backward'));
}

/** Of eight at most, from number n on, how many others below `limit` they meet, tiles being seen as a whole: from a place of each so far. */
function between(all: ArrayLike<number>, n: number, place: (one: number) => number, far: number, limit: number): number {
  let [sum, before] = [0, -Infinity];
  const places = Array.from({ length: Math.min(all.length - n, SAMPLE_ROWS) }, (_, m) => place(all[n + m])).sort((a, b) => a - b);
  for (const one of places) {
    const [from, to] = [Math.min(one, one + far), Math.max(one, one + far)];
    const [first, end] = [Math.max(from - SAMPLE_TILE / 2, 0, before), Math.min(to + SAMPLE_TILE / 2, limit)];
    sum += Math.max(end - first, 0);
    before = Math.max(before, end);
  }
  return sum;
}

/** What so many known rows change in a portion of columns. */
export function changesCost(g: Geometry, rows: number): number {
  const { each, entry } = PAIR.columns;
  return PORTION + SAMPLE_ROWS * rows * (each + entry * (g.headDim + g.valueDim) + moreOfPair(g, 'columns', 'backward'));
}

/** The same for a portion of rows that see so many keys, by default as many as one may; of so many times SAMPLE_ROWS. */
export function portionCost(g: Geometry, pass: Pass, keys = keysOfPortion(g), times = 1): number {
  const { each, entry } = PAIR.rows[pass];
  return PORTION + times * SAMPLE_ROWS * keys * (each + entry * (g.headDim + g.valueDim) + moreOfPair(g, 'rows', pass));
}

/** Every refusal takes this, at least. */
export const LEAST_REFUSAL = PLAN.any + FIT.scores + FIT.polynomial + 2 * PORTION;

/**
 * The same for what `auto` does before and after a polynomial, beyond the bounds that the exact engine is given too.
 *
 * @returns `refusal`: until no polynomial is found fit, at worst, usually; `all`: of one that runs, from the first look to the
 *   check of its results.
 */
export function samplingCost(g: Geometry, pass: Pass, candidates: number): { refusal: number; all: number } {
  const heads = g.batch * g.kvHeads;
  const prepare = heads > 1 ? prepareCost(g) : 0;
  const table = g.relativePositions ? (MAP_TABLE / 2) * g.rotaryDim * (g.queryLength + g.keyLength) : 0;
  const portion = portionCost(g, pass);
  // Long portions of a head, those of drawn rows and of large ones; when causal short ones as well.
  const drawn = Math.ceil(DRAWN_ROWS / SAMPLE_ROWS / heads) * (g.causal ? 1.5 : 1);
  const slopes = g.alibi ? SLOPE_PORTIONS[g.alibi.some((slope) => slope >= STEEP) ? 'steep' : 'flat'] : 0;
  const long = HARD_PORTIONS.full + drawn + slopes / 2 + Number(g.decays !== null && pass === 'backward');
  const short = g.causal ? HARD_PORTIONS.causal - HARD_PORTIONS.full : 0;
  const columns = pass === 'backward' ? 3 * columnsCost(g, [0]) : 0;
  const fits = FIT.scores + FIT.polynomial * candidates;
  const refusal = PLAN.any + prepare + table + fits + extremesCost(g) + 2 * portion;
  // Exact, by the polynomial, and compared with what the engine did
  const rest = 2 * long * portion + (long + 3 * short) * PORTION + columns;
  return { refusal, all: refusal + heads * rest + (heads - 1) * (prepare + fits) };
}

/** Keys that rows of a portion see between them, wherever they are. */
function keysOfPortion(g: Geometry): number {
  return Math.min(g.keyLength, SAMPLE_ROWS * (seenKeys(g) + SAMPLE_TILE));
}

/** The same for a look at one choice of outliers. */
export function trialCost(g: Geometry, pass: Pass): number {
  return PLAN.trial + g.batch * g.kvHeads * prepareCost(g, true) + samplingCost(g, pass, 1).refusal;
}

function queriesOfHead(g: Geometry): number {
  return (g.heads / g.kvHeads) * g.queryLength;
}

function rowCost({ each, entry }: { each: number; entry: number }, { headDim }: Geometry): number {
  return each + entry * headDim;
}

function flopsOfPair(g: Geometry, pass: Pass): number {
  return products({ method: 'exact', pass, heads: 1, queryLength: 1, headDim: g.headDim, valueDim: g.valueDim });
}

/** What slopes and a relative map add to each pair that is sampled. */
function moreOfPair(g: Geometry, of: 'rows' | 'columns', pass: Pass): number {
  const map = productsOfPair(g);
  const mapped = map ? (pass === 'forward' ? 4 : 8) * MAP_SAMPLING * map.score : 0;
  return mapped + (g.alibi ? PAIR.slopes[of] : 0);
}
