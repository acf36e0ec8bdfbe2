// SPDX-License-Identifier: MIT
//
// The figure's place on the page: shows a drawing, and a tip at the dot that is pointed at, tapped or walked to.

import { element } from './controls.js';
import { pixelOf, type Figure, type Spot } from './figure.js';

/** As far as a pointer may be from the dot it means. */
const REACH = 36;

export interface ChartView {
  readonly width: number;
  /** What is shown now. */
  readonly drawing: SVGSVGElement;
  show(figure: Figure): void;
  /** No dot is chosen any more. */
  clear(): void;
}

export function createChartView(resized: () => void): ChartView {
  const box = element('chart');
  const drawing = element('drawing');
  const tip = element('tip');
  const readout = element('readout');
  let figure: Figure | null = null;
  let chosen: Spot | null = null;

  const choose = (spot: Spot | null, aloud: boolean) => {
    chosen = spot;
    tip.replaceChildren(...(figure && spot ? [figure.tip(spot)] : []));
    if (aloud) readout.textContent = spot ? spot.title.replaceAll('\n', ', ') : '';
  };

  const nearest = (event: PointerEvent): Spot | null => {
    if (figure === null) return null;
    const frame = drawing.getBoundingClientRect();
    let best: Spot | null = null;
    let distance = REACH;
    for (const spot of figure.spots) {
      const at = pixelOf(figure.chart, spot);
      const away = Math.hypot(at.x - (event.clientX - frame.left), at.y - (event.clientY - frame.top));
      if (away < distance) {
        distance = away;
        best = spot;
      }
    }
    return best;
  };
  const point = (event: PointerEvent) => {
    const spot = nearest(event);
    if (spot !== chosen) choose(spot, false);
  };
  box.addEventListener('pointermove', point);
  box.addEventListener('pointerdown', point);
  box.addEventListener('pointerleave', (event) => {
    if (event.pointerType === 'mouse') choose(null, false);
  });

  // Left and right along the dots of a curve, up and down to the neighbouring curve at the same abscissa
  const walk = (key: string): Spot | null | undefined => {
    const spots = figure?.spots ?? [];
    if (key === 'Escape') return null;
    const first = spots[0];
    if (first === undefined) return undefined;
    const curves = [...new Set(spots.map((spot) => spot.curve))].sort((a, b) => a - b);
    const from = chosen;
    if (from === null) return ['ArrowLeft', 'ArrowRight', 'ArrowUp', 'ArrowDown', 'Home', 'End'].includes(key) ? first : undefined;
    const own = spots.filter((spot) => spot.curve === from.curve).sort((a, b) => a.x - b.x);
    const index = own.findIndex((spot) => spot.x === from.x);
    const neighbour = (step: number) => {
      const curve = curves[curves.indexOf(from.curve) + step];
      const others = spots.filter((spot) => spot.curve === curve);
      return others.length === 0 ? from : others.reduce((a, b) => (Math.abs(Math.log(b.x / from.x)) < Math.abs(Math.log(a.x / from.x)) ? b : a));
    };
    switch (key) {
      case 'ArrowLeft':
        return own[Math.max(0, index - 1)];
      case 'ArrowRight':
        return own[Math.min(own.length - 1, index + 1)];
      case 'ArrowUp':
        return neighbour(-1);
      case 'ArrowDown':
        return neighbour(1);
      case 'Home':
        return own[0];
      case 'End':
        return own[own.length - 1];
      default:
        return undefined;
    }
  };
  box.addEventListener('keydown', (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const spot = walk(event.key);
    if (spot === undefined) return;
    event.preventDefault();
    choose(spot, true);
  });
  box.addEventListener('blur', () => choose(null, true));

  let width = box.clientWidth;
  new ResizeObserver(() => {
    if (box.clientWidth === width) return;
    width = box.clientWidth;
    resized();
  }).observe(box);

  return {
    get width() {
      return width;
    },
    get drawing() {
      return drawing.firstElementChild as SVGSVGElement;
    },
    show(next) {
      figure = next;
      drawing.replaceChildren(next.chart);
      const before = chosen;
      if (before) choose(next.spots.find((spot) => spot.curve === before.curve && spot.x === before.x) ?? null, false);
    },
    clear() {
      choose(null, true);
    },
  };
}
