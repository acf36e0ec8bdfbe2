// SPDX-License-Identifier: MIT
//
// All points of a data set as comma-separated values, one point a line. Pure.

import type { Dataset } from './dataset.js';
import { rank } from './measure.js';

const COLUMNS = [
  'figure',
  'length',
  'entry_bound',
  'head_dim',
  'causal',
  'seed',
  'method',
  'polynomial',
  'degree',
  'rank',
  'output_error',
  'certified_bound',
  'dq_error',
  'dk_error',
  'dv_error',
  'forward_ms',
  'backward_ms',
  'source',
] as const;

type Row = Record<(typeof COLUMNS)[number], string | number | null>;

export function toCsv(dataset: Dataset): string {
  const { headDim, causal, certified, seed, entryBound } = dataset.settings;
  const polynomial = certified ? 'certified' : 'fitted';
  const common = { head_dim: headDim, causal: causal ? 1 : 0, seed };
  const errors = (figure: 'length' | 'bound') =>
    (figure === 'length' ? dataset.byLength() : dataset.byBound()).map(
      (point): Row => ({
        ...common,
        figure: `error_by_${figure}`,
        length: point.length,
        entry_bound: point.entryBound,
        method: 'polynomial',
        polynomial,
        degree: point.degree,
        rank: rank(headDim, point.degree),
        output_error: point.output,
        certified_bound: point.certified,
        dq_error: point.dq,
        dk_error: point.dk,
        dv_error: point.dv,
        forward_ms: null,
        backward_ms: null,
        source: point.source,
      }),
    );
  const times = dataset.times().map(
    (point): Row => ({
      ...common,
      figure: 'time',
      length: point.length,
      entry_bound: entryBound,
      method: point.degree === null ? 'exact' : 'polynomial',
      polynomial: point.degree === null ? null : polynomial,
      degree: point.degree,
      rank: point.degree === null ? null : rank(headDim, point.degree),
      output_error: null,
      certified_bound: null,
      dq_error: null,
      dk_error: null,
      dv_error: null,
      forward_ms: point.forward,
      backward_ms: point.backward,
      source: point.source,
    }),
  );
  const lines = [...errors('length'), ...errors('bound'), ...times].map((row) => COLUMNS.map((column) => row[column] ?? '').join(','));
  return [COLUMNS.join(','), ...lines, ''].join('\n');
}
