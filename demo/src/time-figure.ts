// SPDX-License-Identifier: MIT
//
// Time against length: exact and one curve for each degree, the fitted power law drawn on, and the lengths where a
// polynomial is as fast as exact.

import * as Plot from '@observablehq/plot';
import type { Sourced } from './dataset.js';
import { clamp, colourOf, drawTip, fillOf, GHOST, HALO, HEADING, NARROW, STYLE, xAxis, yAxis, type Chart, type Figure, type Spot } from './figure.js';
import { about, duration, integer } from './format.js';
import { rowed, spread } from './labels.js';
import { LONGEST_TIMED, type TimePoint } from './measure.js';
import { timeCurves } from './trends.js';

// The axes, a little wider than the dots
const LENGTHS = [215, 78000] as const;
const MILLISECONDS = [0.01, 1e5] as const;

export interface TimeFigureOptions {
  readonly points: readonly Sourced<TimePoint>[];
  readonly ghosts: readonly Sourced<TimePoint>[];
  readonly width: number;
}

export function drawTimes({ points, ghosts, width }: TimeFigureOptions): Figure {
  const narrow = width < NARROW;
  const curves = timeCurves(points);
  const rowsOf = (of: readonly Sourced<TimePoint>[]) =>
    of.map((point) => {
      const y = clamp(point.forward + point.backward, MILLISECONDS);
      return { point, x: point.length, y, colour: colourOf(point.degree) };
    });
  type Row = ReturnType<typeof rowsOf>[number];
  const rows = rowsOf(points);
  const curve = { x: 'x', y: 'y', stroke: 'colour', z: (row: Row) => row.point.degree ?? 0 };

  // The fitted law, drawn on to the end of the axis beyond the last point
  const extensions = curves.flatMap(({ degree, points: own, law }) => {
    const last = own[own.length - 1]!.length;
    if (law === null || last >= LONGEST_TIMED) return [];
    return [last, LONGEST_TIMED].map((x) => ({ degree: degree ?? 0, x, y: law.factor * x ** law.slope, colour: colourOf(degree) }));
  });
  const ends = spread(
    curves.map(({ degree, points: own, law }) => {
      const last = own[own.length - 1]!;
      const end = law ? law.factor * LONGEST_TIMED ** law.slope : last.forward + last.backward;
      const y = clamp(end, [MILLISECONDS[0] * 2, MILLISECONDS[1] * 0.9]);
      const name = degree === null ? 'exact' : `degree ${degree}`;
      return { x: law ? LONGEST_TIMED : last.length, y, text: law ? `${name}${narrow ? '' : ', slope'} ${law.slope.toFixed(2)}` : name, colour: colourOf(degree) };
    }),
    0.32,
  );
  const level = curves.flatMap(({ degree, crossover: at }) =>
    at !== null && typeof at === 'object' ? [{ ...at, colour: colourOf(degree), text: `${narrow ? '' : 'N\u00a0≈\u00a0'}${about(at.x)}` }] : [],
  );
  const crossings = rowed(level, narrow ? 3.2 : 2);
  const rowHeight = ({ row }: { row: number }) => MILLISECONDS[0] * 2.1 ** row;

  const frame: Plot.PlotOptions = {
    width,
    height: narrow ? 440 : 372,
    marginLeft: 48,
    marginRight: narrow ? 92 : 136,
    marginTop: 26,
    marginBottom: 40,
    style: STYLE,
    x: { type: 'log', base: 2, domain: LENGTHS },
    y: { type: 'log', domain: MILLISECONDS },
    color: { type: 'identity' },
  };
  const chart = Plot.plot({
    ...frame,
    marks: [
      yAxis([0.01, 0.1, 1, 10, 100, 1e3, 1e4, 1e5], duration, MILLISECONDS[0]),
      xAxis('sequence length N', narrow ? [256, 2048, 16384] : [256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536], integer),
      Plot.text([narrow ? 'Forward and backward, one head' : 'Time of forward and backward, one head'], HEADING),
      Plot.line(rowsOf(ghosts), { ...curve, ...GHOST }),
      Plot.ruleX(crossings, { x: 'x', y1: MILLISECONDS[0], y2: 'y', stroke: 'colour', strokeDasharray: '1 3', strokeLinecap: 'round' }),
      Plot.line(extensions, { x: 'x', y: 'y', stroke: 'colour', z: 'degree', strokeWidth: 1, strokeDasharray: '2 4', clip: true }),
      Plot.line(rows, { ...curve, strokeWidth: 1.5 }),
      Plot.dot(rows, { x: 'x', y: 'y', r: 3, stroke: 'colour', strokeWidth: 1.4, fill: fillOf, className: 'measured' }),
      Plot.dot(crossings, { x: 'x', y: 'y', r: 7, stroke: 'colour', strokeWidth: 1.4, className: 'crossover' }),
      Plot.text(crossings, { x: 'x', y: rowHeight, text: 'text', fill: 'colour', dy: -8, fontWeight: 600, ...HALO }),
      Plot.text(ends, { x: 'x', y: 'y', text: 'text', fill: 'colour', dx: 12, textAnchor: 'start', fontWeight: 600 }),
    ],
  }) as Chart;

  const spots = rows.map(({ point, x, y, colour }): Spot => {
    const title = [
      `${point.degree === null ? 'exact' : `degree ${point.degree}`}, N = ${integer(point.length)}`,
      `forward ${duration(point.forward)}`,
      `backward ${duration(point.backward)}`,
      point.source,
    ].join('\n');
    return { fx: 0, fy: 0, x, y, curve: point.degree ?? 0, colour, title };
  });
  return { chart, spots, tip: (spot) => drawTip(frame, spot) };
}
