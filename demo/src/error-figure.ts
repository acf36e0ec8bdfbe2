// SPDX-License-Identifier: MIT
//
// Error of the output, dq, dk and dv against length or entry bound: four frames, one curve for each degree, the certified
// bound of the output dashed.

import * as Plot from '@observablehq/plot';
import type { Sourced } from './dataset.js';
import { clamp, colourOf, drawTip, fillOf, GHOST, HALO, HEADING, NARROW, STYLE, xAxis, yAxis, type Chart, type Figure, type Spot } from './figure.js';
import { errorText, integer, powerOfTen } from './format.js';
import { spread } from './labels.js';
import type { ErrorPoint } from './measure.js';

const QUANTITIES = ['output', 'dq', 'dk', 'dv'] as const;
type Quantity = (typeof QUANTITIES)[number];
const TITLES: Record<Quantity, string> = { output: 'Error of the output', dq: 'Error of dq', dk: 'Error of dk', dv: 'Error of dv' };

// The axes, a little wider than the dots
const ERRORS = [1e-9, 10] as const;
const LENGTHS = [50, 20500] as const;
const BOUNDS = [0.09, 4.45] as const;

/** Half the distance between 1 and the next float32: one rounding. */
const FLOAT32 = 2 ** -24;

/** 16384 -> 16k, where there is no room */
const thousands = (value: number): string => (value < 1024 ? String(value) : `${value / 1024}k`);

interface ErrorRow {
  readonly point: Sourced<ErrorPoint>;
  readonly quantity: Quantity;
  readonly fx: number;
  readonly fy: number;
  readonly x: number;
  /** On the axis; a value beyond it, or none, sits at its upper end. */
  readonly y: number;
  readonly off: boolean;
  readonly colour: string;
}

export interface ErrorFigureOptions {
  readonly points: readonly Sourced<ErrorPoint>[];
  /** Curves of the settings before, drawn faintly until the new ones are there. */
  readonly ghosts: readonly Sourced<ErrorPoint>[];
  readonly by: 'length' | 'bound';
  readonly entryBound: number;
  readonly width: number;
}

export function drawErrors({ points, ghosts, by, entryBound, width }: ErrorFigureOptions): Figure {
  const narrow = width < NARROW;
  const columns = narrow ? 2 : 4;
  const abscissa = (point: ErrorPoint) => (by === 'length' ? point.length : point.entryBound);
  const place = (quantity: Quantity) => {
    const i = QUANTITIES.indexOf(quantity);
    return { fx: i % columns, fy: Math.floor(i / columns) };
  };
  const rowsOf = (of: readonly Sourced<ErrorPoint>[]): ErrorRow[] =>
    QUANTITIES.flatMap((quantity) =>
      of.map((point) => {
        const value = point[quantity];
        const off = !(value <= ERRORS[1]);
        const y = off ? ERRORS[1] : clamp(value, ERRORS);
        return { point, quantity, ...place(quantity), x: abscissa(point), y, off, colour: colourOf(point.degree) };
      }),
    );
  const rows = rowsOf(points);
  const titles = QUANTITIES.map((quantity) => ({ ...place(quantity), text: TITLES[quantity] }));
  const facet = { fx: 'fx', fy: 'fy' } as const;
  const curve = { ...facet, x: 'x', y: 'y', stroke: 'colour', z: (row: ErrorRow) => row.point.degree };
  const allTicks = { length: [[64, 512, 4096, 16384], [64, 1024, 16384]], bound: [[0.1, 0.2, 0.5, 1, 2, 4], [0.1, 0.5, 1, 4]] };
  const ticks = allTicks[by][narrow ? 1 : 0]!;

  const frame: Plot.PlotOptions = {
    width,
    height: narrow ? Math.max(440, Math.min(520, width * 0.9)) : 330,
    marginLeft: 40,
    marginRight: 14,
    marginTop: 26,
    marginBottom: 40,
    style: STYLE,
    x: { type: 'log', base: by === 'length' ? 2 : 10, domain: by === 'length' ? LENGTHS : BOUNDS },
    y: { type: 'log', domain: ERRORS },
    fx: { domain: [...Array(columns).keys()], axis: null, paddingInner: narrow ? 0.16 : 0.12, paddingOuter: 0 },
    fy: { domain: [...Array(4 / columns).keys()], axis: null, paddingInner: narrow ? 0.24 : 0, paddingOuter: 0 },
    color: { type: 'identity' },
  };

  const small = { fontSize: 10.5, fill: 'var(--muted)' };
  const dot = { ...facet, x: 'x', y: 'y', stroke: 'colour', strokeWidth: 1.4, fill: fillOf, className: 'measured' };
  const certified = (row: ErrorRow) => row.point.certified ?? NaN;
  const chart = Plot.plot({
    ...frame,
    marks: [
      yAxis([1e-8, 1e-6, 1e-4, 1e-2, 1], powerOfTen, ERRORS[0]),
      xAxis(by === 'length' ? 'sequence length N' : 'entry bound B', ticks, by === 'bound' ? String : narrow ? thousands : integer),
      Plot.text(titles, { ...facet, text: 'text', ...HEADING }),
      Plot.ruleY([FLOAT32], { stroke: 'var(--muted)', strokeDasharray: '1 4', strokeLinecap: 'round' }),
      // Where no curve comes that low
      Plot.text([{ ...place('dq'), text: 'one float32 rounding' }], {
        ...{ ...facet, y: () => FLOAT32, text: 'text' },
        ...{ frameAnchor: 'right', dy: 8, ...small },
      }),
      by === 'bound' ? Plot.ruleX([entryBound], { stroke: 'var(--muted)', strokeOpacity: 0.5 }) : null,
      by === 'bound' && !narrow
        ? Plot.text([{ ...place('output'), x: entryBound, text: `B = ${entryBound}` }], {
            ...{ ...facet, x: 'x', text: 'text' },
            ...{ frameAnchor: 'top', textAnchor: 'start', dx: 5, dy: 3, ...HALO, ...small },
          })
        : null,
      Plot.line(rowsOf(ghosts), { ...curve, ...GHOST }),
      Plot.line(
        rows.filter((row) => row.quantity === 'output'),
        { ...curve, y: certified, strokeWidth: 1.25, strokeDasharray: '4 3', clip: true, className: 'certified' },
      ),
      Plot.line(rows, { ...curve, strokeWidth: 1.5 }),
      Plot.dot(rows.filter((row) => !row.off), { ...dot, r: narrow ? 2.4 : 3 }),
      Plot.dot(rows.filter((row) => row.off), { ...dot, r: 3.4, symbol: 'triangle' }),
      Plot.text(errorLabels(rows, by, narrow), {
        ...{ ...facet, x: 'x', y: 'y', text: 'text', fill: 'colour' },
        ...{ dx: by === 'length' ? 9 : 0, fontWeight: 700, ...HALO },
      }),
    ],
  }) as Chart;

  const spots = rows.map((row): Spot => {
    const { point } = row;
    const where = by === 'length' ? `N = ${integer(point.length)}` : `B = ${point.entryBound}`;
    const value = point[row.quantity];
    const lines = [`degree ${point.degree}, ${where}`, `${row.quantity} error ${Number.isFinite(value) ? errorText(value) : 'not a number'}`];
    if (row.quantity === 'output') lines.push(`certified ${errorText(point.certified)}`);
    lines.push(point.source);
    const curveIndex = QUANTITIES.indexOf(row.quantity) * 16 + point.degree;
    return { fx: row.fx, fy: row.fy, x: row.x, y: row.y, curve: curveIndex, colour: row.colour, title: lines.join('\n') };
  });
  return { chart, spots, tip: (spot) => drawTip(frame, spot) };
}

interface Label {
  readonly fx: number;
  readonly fy: number;
  readonly x: number;
  readonly y: number;
  readonly text: string;
  readonly colour: string;
}

/** A digit on each curve. By length: at its right end. By bound: where it crosses a given height, as on contour lines. */
function errorLabels(rows: readonly ErrorRow[], by: 'length' | 'bound', narrow: boolean): Label[] {
  const result: Label[] = [];
  for (const quantity of QUANTITIES) {
    const curves = new Map<number, ErrorRow[]>();
    for (const row of rows) {
      if (row.quantity === quantity) curves.set(row.point.degree, [...(curves.get(row.point.degree) ?? []), row]);
    }
    const labels = [...curves.values()].map((curve) => {
      const anchor = by === 'length' ? curve[curve.length - 1]! : crossing(curve, quantity === 'output' ? 3e-6 : 3e-5);
      return { fx: anchor.fx, fy: anchor.fy, x: anchor.x, y: anchor.y, text: String(curve[0]!.point.degree), colour: anchor.colour };
    });
    result.push(...(by === 'length' ? spread(labels, narrow ? 0.62 : 0.38) : labels));
  }
  return result;
}

function crossing(curve: readonly ErrorRow[], height: number): ErrorRow {
  for (let i = 1; i < curve.length; i++) {
    const [a, b] = [curve[i - 1]!, curve[i]!];
    if (a.y < height && b.y >= height) {
      const t = Math.log(height / a.y) / Math.log(b.y / a.y);
      return { ...a, x: a.x * (b.x / a.x) ** t, y: height };
    }
  }
  return curve[0]!.y >= height ? curve[0]! : curve[curve.length - 1]!;
}
