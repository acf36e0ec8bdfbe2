// SPDX-License-Identifier: MIT
//
// Matrices as SVG: one path for each shade, coloured by the style sheet, so that light and dark need no second drawing.

export const SVG = 'http://www.w3.org/2000/svg';

/** Shades from nothing to full. */
export const SHADES = 24;

/** From 0, nothing, to SHADES; below 0 for negative numbers, which have another colour. 1 is half way. */
function shadeOf(value: number, steepness: number): number {
  if (Number.isNaN(value)) return -SHADES;
  const size = Math.abs(value) ** steepness;
  return Math.sign(value) * Math.round(SHADES * (size < Infinity ? size / (1 + size) : 1));
}

/** The average weight is half way; a fifth more or less is seen, and four times as much is nearly all. */
export const shadeOfWeight = (value: number): number => shadeOf(value, 2.5);

/** Features begin with 1 and become smaller with the degree. */
export const shadeOfFeature = (value: number): number => shadeOf(value, 1);

/** Differences that one begins to see; an average weight is the other end. Decades, as on the axes of errors. */
const FAINTEST = 1e-4;

export function shadeOfError(value: number): number {
  const size = Math.abs(value);
  if (!(size < 1)) return SHADES; // NaN too
  return Math.max(0, Math.round((SHADES * Math.log(size / FAINTEST)) / Math.log(1 / FAINTEST)));
}

export interface Ink {
  readonly fill: string;
  readonly 'fill-opacity': number;
}

/** A colour between paper, which it is painted on, and a variable of the style sheet. */
export const inkOf = (shade: number, full: string, negative = full): Ink => ({
  fill: `var(${shade < 0 ? negative : full})`,
  'fill-opacity': Math.abs(shade) / SHADES,
});

export function svgElement<K extends keyof SVGElementTagNameMap>(name: K, attributes: Record<string, string | number> = {}): SVGElementTagNameMap[K] {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value));
  return element;
}

/** Outlines of the cells of each shade, in units of cells; runs in a row are one rectangle. Nothing is drawn for shade 0. */
export function outlines(rows: number, columns: number, shadeAt: (row: number, column: number) => number): Map<number, string> {
  const paths = new Map<number, string>();
  for (let row = 0; row < rows; row++) {
    for (let from = 0, to = 1; from < columns; from = to++) {
      const shade = shadeAt(row, from);
      while (to < columns && shadeAt(row, to) === shade) to++;
      if (shade !== 0) paths.set(shade, `${paths.get(shade) ?? ''}M${from} ${row}h${to - from}v1h${from - to}z`);
    }
  }
  return paths;
}

export interface HeatMap {
  readonly rows: number;
  readonly columns: number;
  /** In cells, from the corner of the drawing. */
  readonly x: number;
  readonly y: number;
  readonly shadeAt: (row: number, column: number) => number;
  /** Variables of the style sheet. */
  readonly full: string;
  readonly negative?: string;
}

export function drawHeatMap({ rows, columns, x, y, shadeAt, full, negative }: HeatMap): SVGGElement {
  const group = svgElement('g', { transform: `translate(${x} ${y})`, 'shape-rendering': 'crispEdges' });
  group.append(svgElement('rect', { width: columns, height: rows, fill: 'var(--paper)' }));
  for (const [shade, d] of outlines(rows, columns, shadeAt)) {
    group.append(svgElement('path', { d, ...inkOf(shade, full, negative) }));
  }
  group.append(svgElement('rect', { width: columns, height: rows, fill: 'none', stroke: 'var(--edge)', 'vector-effect': 'non-scaling-stroke' }));
  return group;
}
