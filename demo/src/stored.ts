// SPDX-License-Identifier: MIT
//
// The curves that are shown before anything is computed: stored.json, made by make-stored.mjs. Pure.

import type { ErrorPoint, Point, TimePoint } from './measure.js';
import { sameSettings, type Settings } from './state.js';

/** One line of numbers for each point; null where a number is not finite, or there is no bound. */
export interface StoredFile {
  readonly about: string;
  readonly sets: readonly StoredSet[];
}

export interface StoredSet {
  readonly settings: Settings;
  /** length, entryBound, degree, output, dq, dk, dv, certified */
  readonly errors: readonly (readonly (number | null)[])[];
  /** length, degree (null: exact), forward, backward */
  readonly times: readonly (readonly (number | null)[])[];
}

const round = (value: number | null): number | null => (value === null || !Number.isFinite(value) ? null : Number(value.toPrecision(3)));

export function pack(settings: Settings, points: readonly Point[]): StoredSet {
  const errors = points.filter((point): point is ErrorPoint => point.kind === 'error');
  const times = points.filter((point): point is TimePoint => point.kind === 'time');
  return {
    settings,
    errors: errors.map((p) => [p.length, p.entryBound, p.degree, ...[p.output, p.dq, p.dk, p.dv, p.certified].map(round)]),
    times: times.map((p) => [p.length, p.degree, round(p.forward), round(p.backward)]),
  };
}

export function unpack(set: StoredSet): Point[] {
  const number = (value: number | null | undefined) => value ?? NaN;
  return [
    ...set.errors.map(
      ([length, entryBound, degree, output, dq, dk, dv, certified]): ErrorPoint => ({
        kind: 'error',
        length: number(length),
        entryBound: number(entryBound),
        degree: number(degree),
        output: number(output),
        dq: number(dq),
        dk: number(dk),
        dv: number(dv),
        certified: certified ?? null,
      }),
    ),
    ...set.times.map(
      ([length, degree, forward, backward]): TimePoint => ({
        kind: 'time',
        length: number(length),
        degree: degree ?? null,
        forward: number(forward),
        backward: number(backward),
      }),
    ),
  ];
}

/** The stored points of these settings; none when there are none. A higher degree than asked for is left away. */
export function storedPoints(file: StoredFile, settings: Settings): Point[] {
  const set = file.sets.find((candidate) => sameSettings({ ...candidate.settings, maxDegree: settings.maxDegree }, settings));
  return set ? unpack(set).filter((point) => (point.degree ?? 0) <= settings.maxDegree) : [];
}
