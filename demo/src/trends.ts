// SPDX-License-Identifier: MIT
//
// The third figure's curves with what is read off them: slope and crossover. Pure.

import type { Sourced } from './dataset.js';
import type { TimePoint } from './measure.js';
import { crossover, powerLaw, type XY } from './statistics.js';

/** Short lengths are ruled by the cost of the call itself: the slopes are of what follows. */
export const SLOPE_FROM = 1024;

export interface TimeCurve {
  readonly degree: number | null;
  readonly points: readonly Sourced<TimePoint>[];
  readonly law: { slope: number; factor: number } | null;
  /** Against exact; null for exact itself. */
  readonly crossover: XY | 'before' | 'after' | null;
}

const totals = (points: readonly TimePoint[]): XY[] => points.map((p) => ({ x: p.length, y: p.forward + p.backward }));

/** Exact first, then by degree. */
export function timeCurves(points: readonly Sourced<TimePoint>[]): TimeCurve[] {
  const exact = totals(points.filter((point) => point.degree === null));
  return [...new Set(points.map((point) => point.degree))].map((degree) => {
    const own = points.filter((point) => point.degree === degree);
    return {
      degree,
      points: own,
      law: powerLaw(totals(own.filter((point) => point.length >= SLOPE_FROM))),
      crossover: degree === null ? null : crossover(totals(own), exact),
    };
  });
}
