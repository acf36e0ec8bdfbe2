// SPDX-License-Identifier: MIT
//
// Experiment 4: what scores look like, and whether the assumption of the theorems holds: all entries of q and k of order
// below sqrt(log n) (Alman, Song, arXiv 2302.13214, 2505.11892; Cao et al., 2412.17316v3). Input patterns of inputs.mjs, several lengths.
//
//   density     of the scores scale (R_i q_i).(R_j k_j), from pairs drawn at random
//   entries     max |entry| over sqrt(ln n), the share of entries that keep the bound, and how many of some draws keep it whole
//   sizes       of scores, median, 99 % and largest drawn, beside the Cauchy-Schwarz bound that a certificate goes by

import { theory } from '../dist/index.js';
import { mulberry32, PATTERNS } from './inputs.mjs';
import { median, quantile } from './statistics.mjs';
import * as words from './words.mjs';

export const title = 'Entries and scores of different inputs';
export const about =
  'The theorems assume that no entry of q and k exceeds a bound of smaller order than √log n. Here are inputs that keep it and inputs ' +
  'that do not: d = 16, scale 1/√d, each length drawn anew several times.';

export const sizes = {
  full: { headDim: 16, lengths: [256, 1024, 4096, 16384], draws: 8, pairs: 200_000, tolerance: 1e-2 },
  quick: { headDim: 16, lengths: [256, 1024, 4096], draws: 3, pairs: 40_000, tolerance: 1e-2 },
  tiny: { headDim: 4, lengths: [32, 64], draws: 2, pairs: 2000, tolerance: 1e-2 },
};

/** Share of entries, of both arrays, within the bound. */
function within(arrays, bound) {
  let [inside, all] = [0, 0];
  for (const array of arrays) {
    for (const x of array) if (Math.abs(x) <= bound) inside++;
    all += array.length;
  }
  return inside / all;
}

export function run({ attention, sizes: size, progress, seed }) {
  const { headDim, lengths, draws, tolerance } = size;
  const entries = [];
  const scores = [];
  const densities = [];
  const names = Object.keys(PATTERNS);
  names.forEach((pattern, step) => {
    progress(pattern, step / names.length);
    for (const length of lengths) {
      const bound = theory.paperBound(length);
      const shape = { heads: 1, queryLength: length, headDim };
      const found = [];
      for (let draw = 0; draw < draws; draw++) {
        const { q, k } = PATTERNS[pattern](length, headDim, seed + 17 * draw);
        const report = attention.plan({ q, k, shape, tolerance });
        found.push({ largest: report.entryBound, share: within([q, k], bound), report });
        if (draw > 0) continue;
        const drawn = drawScores({ attention, q, k, shape, pairs: size.pairs, seed });
        const magnitudes = drawn.map(Math.abs);
        const base = { pattern, length };
        scores.push({ ...base, series: 'median', value: median(magnitudes) });
        scores.push({ ...base, series: '99 %', value: quantile(magnitudes, 0.99) });
        scores.push({ ...base, series: 'largest drawn', value: quantile(magnitudes, 1) });
        scores.push({ ...base, series: 'Cauchy–Schwarz', value: report.scoreBound });
        if (length === lengths[0] || length === lengths.at(-1))
          densities.push(...density(drawn, { pattern, length, series: `n = ` + `${words.integer(length)}` }));
      }
      entries.push({
        pattern,
        length,
        bound,
        largest: median(found.map((one) => one.largest)),
        relative: median(found.map((one) => one.largest)) / bound,
        share: median(found.map((one) => one.share)),
        whole: found.filter((one) => one.largest <= bound).length / draws,
        draws,
        plan: words.list([...new Set(found.map(({ report }) => (report.degree === null ? 'exact' : `degree ${report.degree}`)))]),
      });
    }
  });
  return [entriesFigure(entries, size), densityFigure(densities, size), scoresFigure(scores, size)];
}

/** Scores of pairs drawn at random. */
function drawScores({ attention, q, k, shape, pairs, seed }) {
  const { queryLength, headDim } = shape;
  const [turnedQ, turnedK] = [q, k].map((x) => attention.rotate({ x, shape }));
  const next = mulberry32(seed + 5000);
  return Float64Array.from({ length: pairs }, () => {
    const i = Math.floor(next() * queryLength) * headDim;
    const j = Math.floor(next() * queryLength) * headDim;
    let sum = 0;
    for (let d = 0; d < headDim; d++) sum += turnedQ[i + d] * turnedK[j + d];
    return sum / Math.sqrt(headDim);
  });
}

/** A histogram of 61 bins from -6 to 6, as densities; empty bins are left out. */
function density(scores, base) {
  const [bins, edge] = [61, 6];
  const width = (2 * edge) / bins;
  const counts = new Array(bins).fill(0);
  for (const s of scores) if (Math.abs(s) < edge) counts[Math.floor((s + edge) / width)]++;
  return counts.flatMap((count, n) =>
    count === 0 ? [] : [{ ...base, score: (n + 0.5) * width - edge, density: count / scores.length / width }],
  );
}

const patternsOf = (rows) => [...new Set(rows.map((row) => row.pattern))];

function entriesFigure(rows, { draws, headDim, tolerance }) {
  const longest = Math.max(...rows.map((row) => row.length));
  const of = (pattern) => rows.filter((row) => row.pattern === pattern);
  const patterns = patternsOf(rows);
  const always = patterns.filter((pattern) => of(pattern).every((row) => row.whole === 1));
  const never = patterns.filter((pattern) => of(pattern).every((row) => row.whole === 0));
  const mixed = patterns.filter((pattern) => !always.includes(pattern) && !never.includes(pattern));
  const parts = [
    always.length > 0 ? `always for ${words.list(always)}` : null,
    mixed.length > 0 ? `in some draws for ${words.list(mixed)}` : null,
    never.length > 0 ? `in no draw for ${words.list(never)}` : null,
  ].filter((part) => part !== null);
  const last = never.flatMap((pattern) => of(pattern).filter((row) => row.length === longest));
  const shares = last.map((row) => row.share);
  const yet =
    shares.length > 0
      ? ` Yet at n = ${words.integer(longest)} between ${words.percent(Math.min(...shares))} and ` +
        `${words.percent(Math.max(...shares))} of the single entries of these keep it.`
      : '';
  return {
    id: 'entries-bound',
    kind: 'lines',
    title: 'How often the bound √(ln n) holds',
    sentence: `All entries of q and k are within √(ln n) ${parts.join('; ')}.${yet}`,
    note:
      `Largest entry over √(ln n), median of ${draws} draws, d = ${headDim}. The theorems ask for an order below √log n, ` +
      `not for a number; the constant 1 is ours. The table has what \`plan\` chooses at tolerance ${tolerance} for the worst values.`,
    x: { key: 'length', label: 'n', log: 2, kind: 'integer' },
    y: { key: 'relative', label: 'largest entry / √(ln n)', log: 10, kind: 'number' },
    series: 'pattern',
    rules: [{ y: 1, label: 'the bound' }],
    columns: [
      { key: 'pattern', label: 'input' },
      { key: 'length', label: 'n', kind: 'integer' },
      { key: 'bound', label: '√(ln n)', kind: 'number' },
      { key: 'largest', label: 'largest entry', kind: 'number' },
      { key: 'relative', label: 'ratio', kind: 'number' },
      { key: 'share', label: 'entries within', kind: 'percent' },
      { key: 'whole', label: 'draws within', kind: 'percent' },
      { key: 'draws', label: 'draws', kind: 'integer' },
      { key: 'plan', label: 'planned' },
    ],
    rows,
  };
}

function densityFigure(rows, { lengths, headDim, pairs }) {
  const spread = (pattern) => {
    const own = rows.filter((row) => row.pattern === pattern && row.length === lengths.at(-1));
    const weight = own.reduce((sum, row) => sum + row.density, 0);
    const mean = own.reduce((sum, row) => sum + row.density * row.score, 0) / weight;
    return Math.sqrt(own.reduce((sum, row) => sum + row.density * (row.score - mean) ** 2, 0) / weight);
  };
  const deviations = patternsOf(rows).map((pattern) => ({ pattern, deviation: spread(pattern) }));
  deviations.sort((a, b) => a.deviation - b.deviation);
  const parts = deviations.map(({ pattern, deviation }) => `${words.number(deviation, 2)} for ${pattern}`);
  return {
    id: 'entries-density',
    kind: 'lines',
    title: 'Densities of the scores',
    sentence: `The standard deviation of scores within [−6, 6] at n = ${words.integer(lengths.at(-1))} is ${words.list(parts)}.`,
    note:
      `${words.integer(pairs)} random pairs each, rotated, d = ${headDim}. On the logarithmic axis a normal density is a ` +
      `parabola; what is wider at the foot has heavy tails.`,
    x: { key: 'score', label: 'score', kind: 'number' },
    y: { key: 'density', label: 'density', log: 10, kind: 'error' },
    panel: 'pattern',
    series: 'series',
    columns: [
      { key: 'pattern', label: 'input' },
      { key: 'length', label: 'n', kind: 'integer' },
      { key: 'score', label: 'score', kind: 'number' },
      { key: 'density', label: 'density', kind: 'error' },
    ],
    rows,
    small: true,
    thin: true,
  };
}

function scoresFigure(rows, { headDim, pairs }) {
  const longest = Math.max(...rows.map((row) => row.length));
  const value = (pattern, series) =>
    rows.find((row) => row.pattern === pattern && row.series === series && row.length === longest).value;
  const gaps = patternsOf(rows).map((pattern) => ({ pattern, gap: value(pattern, 'Cauchy–Schwarz') / value(pattern, '99 %') }));
  gaps.sort((a, b) => a.gap - b.gap);
  const [least, most] = [gaps[0], gaps.at(-1)];
  return {
    id: 'entries-scores',
    kind: 'lines',
    title: 'Sizes of scores, and the bound that a proof uses',
    sentence:
      `At n = ${words.integer(longest)} the bound by Cauchy–Schwarz is ${words.number(least.gap, 2)} times the score that ` +
      `99 % of pairs stay below for ${least.pattern}, and ${words.number(most.gap, 2)} times for ${most.pattern}: what a ` +
      `certificate pays for knowing norms only.`,
    note:
      `d = ${headDim}; the bound is the report’s \`scoreBound\`, after the mean key is subtracted, the others are of ` +
      `${words.integer(pairs)} random pairs, not centred.`,
    x: { key: 'length', label: 'n', log: 2, kind: 'integer' },
    y: { key: 'value', label: '|score|', log: 10, kind: 'number' },
    panel: 'pattern',
    series: 'series',
    styles: {
      median: { colour: 'degree-6' },
      '99 %': { colour: 'degree-5' },
      'largest drawn': { colour: 'degree-2' },
      'Cauchy–Schwarz': { colour: 'ink', dash: true, dots: false },
    },
    small: true,
    columns: [
      { key: 'pattern', label: 'input' },
      { key: 'length', label: 'n', kind: 'integer' },
      { key: 'series', label: 'which' },
      { key: 'value', label: '|score|', kind: 'number' },
    ],
    rows,
  };
}

/** The experiment in a sentence or two, from its figures. */
export function finding([{ rows }, , { rows: scores }]) {
  const longest = Math.max(...rows.map((row) => row.length));
  const last = rows.filter((row) => row.length === longest);
  const kept = last.filter((row) => row.whole === 1);
  const worst = last.reduce((a, b) => (b.relative > a.relative ? b : a));
  const value = (series) =>
    scores.find((row) => row.pattern === worst.pattern && row.series === series && row.length === longest).value;
  return (
    `At n = ${words.integer(longest)}, ${kept.length} of ${last.length} kinds of input keep all entries within √(ln n) in every ` +
    `draw; for ${worst.pattern} the largest entry is ${words.number(worst.relative, 2)} times that, ` +
    `with scores bounded by ${words.number(value('Cauchy–Schwarz'), 2)} while 99 % are below ${words.number(value('99 %'), 2)}.`
  );
}
