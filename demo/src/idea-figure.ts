// SPDX-License-Identifier: MIT
//
// The idea: exp and its Taylor polynomials against the score, and the band where the scores of uniform entries lie.

import * as Plot from '@observablehq/plot';
import { colourOf, HALO, STYLE, xAxis, yAxis, type Chart } from './figure.js';

export interface IdeaFigureOptions {
  readonly entryBound: number;
  readonly maxDegree: number;
  readonly width: number;
}

/** The standard deviation of the scores is B^2/3; the band is three of them to either side. */
export function drawIdea({ entryBound, maxDegree, width }: IdeaFigureOptions): Chart {
  const step = 0.05;
  const scores = Array.from({ length: Math.round(7 / step) + 1 }, (_, i) => -4 + i * step);
  const curves = Array.from({ length: maxDegree }, (_, i) => i + 1).flatMap((degree) =>
    scores.map((s) => {
      let term = 1;
      let sum = 1;
      for (let m = 1; m <= degree; m++) sum += term *= s / m;
      return { degree, s, value: sum, colour: colourOf(degree) };
    }),
  );
  type Sample = (typeof curves)[number];
  // Low degrees are named on the right, where they leave exp early; the others on the left
  const ends = [...new Set(curves.map((c) => c.degree))].map((degree) => {
    const inside = curves.filter((c) => c.degree === degree && c.s >= -3.6 && c.s <= 2.7 && c.value > -1.6 && c.value < 7.4);
    return inside[degree <= 2 ? inside.length - 1 : 0]!;
  });
  const reach = Math.min(4, 3 * (entryBound ** 2 / 3));
  return Plot.plot({
    width,
    height: Math.min(300, Math.max(220, width * 0.5)),
    marginLeft: 32,
    marginRight: 12,
    marginTop: 24,
    marginBottom: 40,
    style: STYLE,
    x: { domain: [-4, 3], axis: null },
    y: { domain: [-2, 8], axis: null },
    color: { type: 'identity' },
    marks: [
      Plot.rect([{ x1: -reach, x2: Math.min(3, reach) }], { x1: 'x1', x2: 'x2', fill: 'var(--band)', clip: true }),
      yAxis([0, 2, 4, 6, 8], String),
      xAxis('score s', [-4, -3, -2, -1, 0, 1, 2, 3], (s) => String(s).replace('-', '−')),
      Plot.line(curves, { x: 's', y: 'value', stroke: 'colour', z: 'degree', strokeWidth: 1.5, clip: true }),
      Plot.line(scores, { x: (s: number) => s, y: (s: number) => Math.exp(s), stroke: 'var(--exact)', strokeWidth: 2.25, clip: true }),
      Plot.text([`scores at B = ${entryBound}`], { x: () => 0, frameAnchor: 'top', dy: -16, fill: 'var(--muted)', fontSize: 11.5 }),
      Plot.text([{ s: 1.95, v: 7.2 }], { x: 's', y: 'v', text: () => 'exp(s)', fill: 'var(--exact)', fontWeight: 600, textAnchor: 'end', dx: -6 }),
      Plot.text(ends, { x: 's', y: 'value', text: (c: Sample) => String(c.degree), fill: 'colour', fontWeight: 700, ...HALO }),
    ],
  }) as Chart;
}
