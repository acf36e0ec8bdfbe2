// SPDX-License-Identifier: MIT
//
// The points on the page: stored ones first, replaced one by one by live ones. Pure.

import type { ErrorPoint, Point, TimePoint } from './measure.js';
import type { Settings } from './state.js';

export type Source = 'stored' | 'live';
export type Sourced<T extends Point> = T & { readonly source: Source };

const keyOf = (point: Point): string =>
  point.kind === 'error' ? `error ${point.length} ${point.entryBound} ${point.degree}` : `time ${point.length} ${point.degree}`;

export class Dataset {
  readonly settings: Settings;
  readonly #points = new Map<string, Sourced<Point>>();
  #retired: readonly Sourced<TimePoint>[] = [];

  constructor(settings: Settings, stored: readonly Point[] = []) {
    this.settings = settings;
    this.add(stored, 'stored');
  }

  /** Stored errors are replaced one by one: they are the same everywhere. Stored times all give way to the first live one. */
  add(points: readonly Point[], source: Source): void {
    for (const point of points) {
      if (source === 'live' && point.kind === 'time') this.#retireTimes();
      this.#points.set(keyOf(point), { ...point, source });
    }
  }

  #retireTimes(): void {
    const stored = this.times().filter((point) => point.source === 'stored');
    if (stored.length === 0) return;
    this.#retired = stored;
    for (const point of stored) this.#points.delete(keyOf(point));
  }

  /** Stored times that gave way, until all live ones are there. */
  get retiredTimes(): readonly Sourced<TimePoint>[] {
    return this.#retired;
  }

  get size(): number {
    return this.#points.size;
  }

  /** After a complete run: stored points that it has not replaced are more than this machine does. */
  dropStored(): void {
    this.#retired = [];
    for (const [key, point] of this.#points) if (point.source === 'stored') this.#points.delete(key);
  }

  /** First figure: one entry bound, all lengths. */
  byLength(): Sourced<ErrorPoint>[] {
    return this.#errors().filter((point) => point.entryBound === this.settings.entryBound);
  }

  /** Second figure: one length, all entry bounds. A degree that is there with the first figure's point only is left away. */
  byBound(): Sourced<ErrorPoint>[] {
    const points = this.#errors().filter((point) => point.length === this.settings.length);
    return points.filter((point) => points.some((other) => other !== point && other.degree === point.degree));
  }

  times(): Sourced<TimePoint>[] {
    const all = [...this.#points.values()].filter((point): point is Sourced<TimePoint> => point.kind === 'time');
    return all.sort((a, b) => (a.degree ?? 0) - (b.degree ?? 0) || a.length - b.length);
  }

  #errors(): Sourced<ErrorPoint>[] {
    const all = [...this.#points.values()].filter((point): point is Sourced<ErrorPoint> => point.kind === 'error');
    return all.sort((a, b) => a.degree - b.degree || a.length - b.length || a.entryBound - b.entryBound);
  }
}
