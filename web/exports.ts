// SPDX-License-Identifier: MIT
//
// What the WebAssembly exports: the functions of rope_attention.h, all of whose arguments are numbers; addresses among them.

export interface Exports {
  memory: WebAssembly.Memory;
  __heap_base: WebAssembly.Global;
  ra_workspace(problem: number, pass: number): number;
  ra_units(problem: number, pass: number): number;
  ra_run(problem: number, arrays: number, pass: number, workspace: number, first: number, last: number): number;
  ra_rotate_workspace(problem: number): number;
  ra_rotate(problem: number, x: number, inverse: number, workspace: number): number;
  ra_sample_workspace(problem: number): number;
  ra_sample_prepare(
    problem: number,
    arrays: number,
    head: number,
    again: number,
    bounds: number,
    workspace: number,
  ): number;
  ra_sample_largest(
    p: number,
    x: number,
    head: number,
    queries: number,
    count: number,
    rows: number,
    norms: number,
    workspace: number,
  ): number;
  ra_sample_spread(p: number, x: number, head: number, limit: number, spread: number, workspace: number): number;
  ra_sample_outside(p: number, x: number, head: number): number;
  ra_sample_extremes(
    p: number,
    x: number,
    head: number,
    large: number,
    aligned: number,
    opposed: number,
    keys: number,
    workspace: number,
  ): number;
  ra_sample_scores(
    p: number,
    x: number,
    head: number,
    rows: number,
    count: number,
    stride: number,
    scores: number,
    workspace: number,
  ): number;
  ra_sample_rows(
    p: number,
    x: number,
    head: number,
    rows: number,
    count: number,
    coefficients: number,
    degree: number,
    beside: number,
    out: number,
    lse: number,
    dq: number,
    distance: number,
    workspace: number,
  ): number;
  ra_sample_columns(
    p: number,
    x: number,
    head: number,
    keys: number,
    count: number,
    coefficients: number,
    degree: number,
    beside: number,
    dk: number,
    dv: number,
    workspace: number,
  ): number;
  ra_sample_changes(
    p: number,
    x: number,
    head: number,
    rows: number,
    count: number,
    lse: number,
    out: number,
    shares: number,
    keys: number,
    keyCount: number,
    dk: number,
    dv: number,
    workspace: number,
  ): number;
  ra_sample_lags(
    p: number,
    x: number,
    head: number,
    entries: number,
    count: number,
    coefficients: number,
    sums: number,
    workspace: number,
  ): number;
  ra_sample_lag_changes(
    p: number,
    x: number,
    head: number,
    row: number,
    lse: number,
    out: number,
    entries: number,
    count: number,
    changes: number,
    workspace: number,
  ): number;
  ra_state_bytes(problem: number, whole: number): number;
  ra_state_workspace(problem: number): number;
  ra_state_append(problem: number, arrays: number, state: number, workspace: number): number;
  ra_state_attend(problem: number, arrays: number, state: number, workspace: number): number;
  ra_state_merge(problem: number, state: number, other: number, workspace: number): number;
  ra_product(a: number, b: number, rows: number, inner: number, columns: number, c: number): void;
  ra_transposed_product(a: number, b: number, inner: number, rows: number, columns: number, c: number): void;
  ra_relaxed(): number;
  ra_warm_up(calls: number): void;
}

/** Their names. */
export const EXPORTS: readonly (keyof Exports)[] = [
  'memory',
  '__heap_base',
  'ra_workspace',
  'ra_units',
  'ra_run',
  'ra_rotate_workspace',
  'ra_rotate',
  'ra_sample_workspace',
  'ra_sample_prepare',
  'ra_sample_largest',
  'ra_sample_spread',
  'ra_sample_outside',
  'ra_sample_extremes',
  'ra_sample_scores',
  'ra_sample_rows',
  'ra_sample_columns',
  'ra_sample_changes',
  'ra_sample_lags',
  'ra_sample_lag_changes',
  'ra_state_bytes',
  'ra_state_workspace',
  'ra_state_append',
  'ra_state_attend',
  'ra_state_merge',
  'ra_product',
  'ra_transposed_product',
  'ra_relaxed',
  'ra_warm_up',
];
