// SPDX-License-Identifier: MIT
//
// What the figures have in common. They are drawn by Observable Plot; all axes are fixed: a curve moves, the paper does not.
// Colours are the style sheet's variables, so that light and dark need no second drawing.

import * as Plot from '@observablehq/plot';

export type Chart = (SVGSVGElement | HTMLElement) & Plot.Plot;

/** One mark that can be pointed at: where it is and what it says. */
export interface Spot {
  readonly fx: number;
  readonly fy: number;
  readonly x: number;
  readonly y: number;
  /** Curves are walked through with the arrow keys: left and right along one, up and down between them. */
  readonly curve: number;
  readonly colour: string;
  readonly title: string;
}

export interface Figure {
  readonly chart: Chart;
  readonly spots: readonly Spot[];
  /** The same frame with nothing but a ring and a tip at one spot. */
  tip(spot: Spot): Chart;
}

/** Pixels of width below which a figure takes its narrow form. */
export const NARROW = 720;

export const STYLE = { background: 'none', fontFamily: 'var(--sans)', fontSize: '12px', color: 'var(--ink)', overflow: 'visible' };
export const HEADING = { frameAnchor: 'top-left', dy: -22, dx: -1, fontWeight: 600, fontSize: 13 } as const;
export const GHOST = { strokeOpacity: 0.22, strokeWidth: 1.25 };
/** Keeps text readable on lines. */
export const HALO = { stroke: 'var(--paper)', strokeWidth: 4 };

export const colourOf = (degree: number | null): string => (degree === null ? 'var(--exact)' : `var(--degree-${degree})`);

/** A dot is hollow until its number is live. */
export const fillOf = (row: { point: { source: string }; colour: string }): string =>
  row.point.source === 'live' ? row.colour : 'var(--paper)';

export const clamp = (value: number, [low, high]: readonly [number, number]): number => Math.min(high, Math.max(low, value));

export function xAxis(label: string, ticks: readonly number[], tickFormat: (value: number) => string): Plot.Markish {
  return Plot.axisX({ ticks, tickFormat, tickSize: 4, label, labelAnchor: 'center', labelArrow: 'none', labelOffset: 36 });
}

/** Ticks with their lines, and the line that the x axis stands on. */
export function yAxis(ticks: readonly number[], tickFormat: (value: number) => string, base?: number): Plot.Markish[] {
  return [
    Plot.gridY({ ticks, stroke: 'var(--rule)', strokeOpacity: 1 }),
    base === undefined ? null : Plot.ruleY([base], { stroke: 'var(--edge)' }),
    Plot.axisY({ ticks, tickFormat, tickSize: 0, label: null }),
  ];
}

export function drawTip(frame: Plot.PlotOptions, spot: Spot): Chart {
  const position = frame.fx ? { x: 'x', y: 'y', fx: 'fx', fy: 'fy' } : { x: 'x', y: 'y' };
  const text = { title: 'title', fontSize: 12.5, lineHeight: 1.35, textPadding: 9 };
  return Plot.plot({
    ...frame,
    axis: null,
    x: { ...frame.x, axis: null },
    y: { ...frame.y, axis: null },
    marks: [
      Plot.dot([spot], { ...position, r: 6.5, stroke: 'colour', strokeWidth: 2 }),
      Plot.tip([spot], { ...position, ...text, fill: 'var(--paper)', stroke: 'var(--muted)', pointerSize: 8 }),
    ],
  }) as Chart;
}

/** Where a spot is in the drawing, in its own pixels. */
export function pixelOf(chart: Chart, spot: Spot): { x: number; y: number } {
  const along = (axis: 'x' | 'y', facet: 'fx' | 'fy') => {
    const scale = chart.scale(axis)!;
    const offset = chart.scale(facet);
    const inside = scale.apply(spot[axis]) as number;
    if (offset === undefined) return inside;
    const start = Math.min(...(scale.range as Iterable<number>));
    return inside - start + (offset.apply(spot[facet]) as number);
  };
  return { x: along('x', 'fx'), y: along('y', 'fy') };
}
