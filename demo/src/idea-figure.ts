// SPDX-License-Identifier: MIT
//
// The drawings of the idea: exp and its polynomial over the scores; weights; the factors beside their product; the difference;
// and the same factors to scale in longer sequences.

import * as Plot from '@observablehq/plot';
import { colourOf, HALO, STYLE, xAxis, yAxis, type Chart } from './figure.js';
import { integer } from './format.js';
import { drawHeatMap, type Ink, inkOf, SHADES, shadeOfError, shadeOfFeature, shadeOfWeight, svgElement } from './heat-map.js';
import { type Idea, polynomial, TOKENS } from './idea.js';

/** A query and a key. */
export interface Cell {
  readonly i: number;
  readonly j: number;
}

/** Features of the highest degree that can be chosen: room for this many is kept, so that nothing moves. */
export const MOST_FEATURES = 15;
/** Pixels between neighbours in a row. */
export const COLUMN_GAP = 24;
/** Between the product and its factors, in cells. */
const GAP = 1;
/** From the drawing's corner to the product's. */
export const STRIP = MOST_FEATURES + GAP;

const WEIGHT = { full: '--weight', negative: '--negative' };
/** Outlines are not cut at the edge. */
const STYLES = 'display: block; overflow: visible';

function canvas(columns: number, rows: number, cell: number): SVGSVGElement {
  return svgElement('svg', { width: columns * cell, height: rows * cell, viewBox: `0 0 ${columns} ${rows}`, style: STYLES });
}

/** A frame around some cells. */
function frame(x: number, y: number, width: number, height: number): SVGRectElement {
  const attributes = { fill: 'none', stroke: 'var(--ink)', 'stroke-width': 2, 'vector-effect': 'non-scaling-stroke', class: 'chosen' };
  return svgElement('rect', { x, y, width, height, ...attributes });
}

function square(shadeAt: (row: number, column: number) => number, colours: { full: string; negative?: string }, cell: number, chosen: Cell | null): SVGSVGElement {
  const svg = canvas(TOKENS, TOKENS, cell);
  svg.append(drawHeatMap({ rows: TOKENS, columns: TOKENS, x: 0, y: 0, shadeAt, ...colours }));
  if (chosen) svg.append(frame(chosen.j, chosen.i, 1, 1));
  return svg;
}

export const drawWeights = ({ weights }: Idea, cell: number, chosen: Cell | null): SVGSVGElement =>
  square((i, j) => shadeOfWeight(weights[i * TOKENS + j]!), WEIGHT, cell, chosen);

export const drawDifference = ({ difference }: Idea, cell: number, chosen: Cell | null): SVGSVGElement =>
  square((i, j) => shadeOfError(difference[i * TOKENS + j]!), { full: '--error' }, cell, chosen);

/**
 * U to the left of the product, V^T above it: cell (i, j) is row i of the one times column j of the other. With `sign` where what it is
 * nearly equal to stands to the left.
 */
export function drawProduct({ u, v, product, features }: Idea, cell: number, chosen: Cell | null, sign: boolean): SVGSVGElement {
  const rank = features.length;
  const side = STRIP + TOKENS;
  const svg = canvas(side, side, cell);
  const start = MOST_FEATURES - rank;
  svg.append(
    drawHeatMap({ rows: TOKENS, columns: rank, x: start, y: STRIP, shadeAt: (i, n) => shadeOfFeature(u[i * rank + n]!), ...WEIGHT }),
    drawHeatMap({ rows: rank, columns: TOKENS, x: STRIP, y: start, shadeAt: (n, j) => shadeOfFeature(v[j * rank + n]!), ...WEIGHT }),
    drawHeatMap({ rows: TOKENS, columns: TOKENS, x: STRIP, y: STRIP, shadeAt: (i, j) => shadeOfWeight(product[i * TOKENS + j]!), ...WEIGHT }),
  );
  if (sign) {
    const place = { x: start - (start + COLUMN_GAP / cell) / 2, y: STRIP + TOKENS / 2, 'text-anchor': 'middle', 'dominant-baseline': 'central' };
    const text = svgElement('text', { ...place, 'font-size': 24 / cell, fill: 'var(--soft)' });
    text.textContent = '≈';
    svg.append(text);
  }
  if (chosen) {
    const { i, j } = chosen;
    svg.append(frame(start, STRIP + i, rank, 1), frame(STRIP + j, start, 1, rank), frame(STRIP + j, STRIP + i, 1, 1));
  }
  return svg;
}

const SCORES = [-4, 3] as const;
const BINS = 70;

/** exp and the polynomial on the scores that there are; axes are fixed, the scores' distribution is drawn below the curves. */
export function drawCurves({ scores, coefficients, degree }: Idea, width: number, height: number, chosen: Cell | null): Chart {
  const [low, high] = SCORES;
  const step = (high - low) / BINS;
  const counts = new Array<number>(BINS).fill(0);
  for (const s of scores) {
    const bin = Math.floor((s - low) / step);
    if (bin >= 0 && bin < BINS) counts[bin]!++;
  }
  const most = Math.max(1, ...counts);
  const bars = counts.flatMap((count, bin) => (count === 0 ? [] : [{ x1: low + bin * step, x2: low + (bin + 1) * step, y: -2 + (1.8 * count) / most }]));
  const abscissae = Array.from({ length: 141 }, (_, n) => low + (n * (high - low)) / 140);
  const extremes = [Math.min(...scores), Math.max(...scores)];
  const colour = colourOf(degree);
  const s = chosen ? scores[chosen.i * TOKENS + chosen.j]! : null;
  const inside = s !== null && s >= low && s <= high && Math.exp(s) <= 8;
  return Plot.plot({
    width,
    height,
    marginLeft: 22,
    marginRight: 4,
    marginTop: 6,
    marginBottom: 38,
    style: STYLE,
    x: { domain: [low, high], axis: null },
    y: { domain: [-2, 8], axis: null },
    color: { type: 'identity' },
    marks: [
      Plot.rect([{ x1: Math.max(low, extremes[0]!), x2: Math.min(high, extremes[1]!) }], { x1: 'x1', x2: 'x2', fill: 'var(--band)', fillOpacity: 0.55 }),
      yAxis([0, 2, 4, 6, 8], String),
      xAxis('score s', [-4, -2, 0, 2], (value) => String(value).replace('-', '−')),
      Plot.rect(bars, { x1: 'x1', x2: 'x2', y1: -2, y2: 'y', fill: 'var(--muted)', fillOpacity: 0.6, clip: true }),
      Plot.line(abscissae, { x: (x: number) => x, y: (x: number) => Math.exp(x), stroke: 'var(--exact)', strokeWidth: 2.25, clip: true }),
      Plot.line(abscissae, { x: (x: number) => x, y: (x: number) => polynomial(coefficients, x), stroke: colour, strokeWidth: 2, clip: true }),
      Plot.text([{ s: -3.9, v: 7.4 }], { x: 's', y: 'v', text: () => 'exp(s)', fill: 'var(--exact)', fontWeight: 600, textAnchor: 'start', ...HALO }),
      Plot.text([{ s: -3.9, v: 7.4 }], { x: 's', y: 'v', text: () => 'p(s)', dy: 17, fill: colour, fontWeight: 600, textAnchor: 'start', ...HALO }),
      ...(inside
        ? [
            Plot.ruleX([s], { stroke: 'var(--ink)', strokeOpacity: 0.4 }),
            Plot.dot([s], { x: (x: number) => x, y: (x: number) => Math.exp(x), r: 4, fill: 'var(--paper)', stroke: 'var(--exact)', strokeWidth: 2 }),
          ]
        : []),
    ],
  }) as Chart;
}

/** What shades mean: a strip with its ticks. */
function scale(width: number, shades: readonly number[], ink: (shade: number) => Ink, ticks: readonly { at: number; text: string }[]): SVGSVGElement {
  const svg = svgElement('svg', { width, height: 28, style: STYLES, 'font-size': 11.5 });
  const step = width / shades.length;
  shades.forEach((shade, n) => {
    svg.append(svgElement('rect', { x: n * step, width: step, height: 7, 'shape-rendering': 'crispEdges', ...ink(shade) }));
  });
  svg.append(svgElement('rect', { width, height: 7, fill: 'none', stroke: 'var(--edge)' }));
  for (const { at, text } of ticks) {
    const x = (at + 0.5) * step;
    const anchor = x < 20 ? 'start' : x > width - 20 ? 'end' : 'middle';
    const label = svgElement('text', { x: anchor === 'start' ? 0 : anchor === 'end' ? width : x, y: 22, 'text-anchor': anchor, fill: 'var(--muted)' });
    label.textContent = text;
    svg.append(label);
  }
  return svg;
}

export function drawWeightScale(width: number): SVGSVGElement {
  const shades = Array.from({ length: 33 }, (_, n) => n - 9);
  const ticks = [
    [-0.75, '< 0'],
    [0, '0'],
    [1, 'average'],
    [2, '2 ×'],
  ] as const;
  return scale(
    width,
    shades,
    (shade) => inkOf(shade, WEIGHT.full, WEIGHT.negative),
    ticks.map(([value, text]) => ({ at: shades.indexOf(shadeOfWeight(value)), text })),
  );
}

export function drawErrorScale(width: number): SVGSVGElement {
  const shades = Array.from({ length: SHADES + 1 }, (_, n) => n);
  const ticks = [
    [1e-4, '10⁻⁴'],
    [1e-2, '10⁻²'],
    [1, '1'],
  ] as const;
  return scale(
    width,
    shades,
    (shade) => inkOf(shade, '--error'),
    ticks.map(([value, text]) => ({ at: shadeOfError(value), text })),
  );
}

const LENGTHS = [1, 4, 16, 64].map((factor) => factor * TOKENS);

/** The same features of longer sequences: U and V^T along the edges of the matrix that they stand for, to scale. */
export function drawLengths({ features }: Idea, width: number): SVGSVGElement {
  const gap = 22;
  const side = Math.min(84, Math.floor((width - gap * (LENGTHS.length - 1)) / LENGTHS.length));
  const svg = svgElement('svg', { width: LENGTHS.length * (side + gap) - gap, height: side + 36, style: STYLES, 'font-size': 11.5 });
  LENGTHS.forEach((length, n) => {
    const thick = (side * features.length) / length;
    const group = svgElement('g', { transform: `translate(${n * (side + gap)} 0)` });
    group.append(
      svgElement('path', { d: `M0 0H${side}V${thick}H${thick}V${side}H0z`, fill: 'var(--weight)' }),
      svgElement('rect', { width: side, height: side, fill: 'none', stroke: 'var(--edge)' }),
    );
    const lines = [`N = ${integer(length)}`, `${Number(((200 * features.length) / length).toPrecision(2))} %`];
    lines.forEach((content, line) => {
      const label = svgElement('text', { x: 0, y: side + 16 + 15 * line, fill: line === 0 ? 'var(--muted)' : 'var(--ink)', 'font-weight': line === 0 ? 400 : 600 });
      label.textContent = content;
      group.append(label);
    });
    svg.append(group);
  });
  return svg;
}
