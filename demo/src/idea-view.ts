// SPDX-License-Identifier: MIT
//
// The idea's place on the page: draws what fits the width, and shows one weight everywhere when it is pointed at, tapped or
// walked to.

import { element } from './controls.js';
import { ideaFinding, ideaReadout } from './findings.js';
import { computeIdea, type Idea, type IdeaSettings, TOKENS } from './idea.js';
import { type Cell, COLUMN_GAP, drawCurves, drawDifference, drawErrorScale, drawLengths, drawProduct, drawWeights, drawWeightScale, STRIP } from './idea-figure.js';

/** What stands beside what; the style sheet goes by it. */
type Form = 'wide' | 'row' | 'middle' | 'narrow';

interface Sizes {
  readonly form: Form;
  /** Pixels of a cell of the product, and of the two others. */
  readonly product: number;
  readonly other: number;
  readonly curves: readonly [width: number, height: number];
}

function sizesFor(width: number): Sizes {
  const side = 5 * TOKENS;
  const broad = 5 * (TOKENS + STRIP);
  if (width >= 1040) return { form: 'wide', product: 5, other: 5, curves: [width - broad - 2 * side - 3 * COLUMN_GAP, broad + 36] };
  if (width >= broad + 2 * (side + COLUMN_GAP)) return { form: 'row', product: 5, other: 5, curves: [width, 190] };
  if (width >= 620) return { form: 'middle', product: 5, other: 5, curves: [width - broad - COLUMN_GAP, side + 36] };
  const quarters = (pixels: number) => Math.floor(4 * pixels) / 4;
  return { form: 'narrow', product: Math.min(6, quarters(width / (TOKENS + STRIP))), other: Math.min(5, quarters((width - COLUMN_GAP) / 2 / TOKENS)), curves: [width, 190] };
}

export interface IdeaView {
  show(settings: IdeaSettings): void;
}

export function createIdeaView(): IdeaView {
  const box = element('matrices');
  const place = (id: string, drawing: Element) => element(id).replaceChildren(drawing);
  let settings: IdeaSettings | null = null;
  let idea: Idea | null = null;
  let chosen: Cell | null = null;

  const draw = () => {
    const width = box.clientWidth;
    if (idea === null || width === 0) return;
    const { form, product, other, curves } = sizesFor(width);
    element('idea').dataset.form = form;
    place('idea-curves', drawCurves(idea, ...curves, chosen));
    place('idea-weights', drawWeights(idea, other, chosen));
    place('idea-product', drawProduct(idea, product, chosen, form === 'wide' || form === 'row'));
    place('idea-difference', drawDifference(idea, other, chosen));
    place('weight-scale', drawWeightScale(other * TOKENS));
    place('error-scale', drawErrorScale(other * TOKENS));
    place('idea-lengths', drawLengths(idea, element('idea-lengths').clientWidth));
  };

  const choose = (cell: Cell | null, aloud: boolean) => {
    if (cell?.i === chosen?.i && cell?.j === chosen?.j) return;
    chosen = cell;
    draw();
    const text = idea && cell ? ideaReadout(idea, cell.i, cell.j) : '';
    element('idea-cell').textContent = text;
    element('idea-help').hidden = cell !== null;
    if (aloud) element('idea-readout').textContent = text;
  };

  /** The weight under a pointer, in whichever of the squares it is. */
  const cellAt = (event: PointerEvent): Cell | null => {
    for (const [id, offset] of [['idea-weights', 0], ['idea-product', STRIP], ['idea-difference', 0]] as const) {
      const drawing = element(id).firstElementChild;
      if (drawing === null) continue;
      const frame = drawing.getBoundingClientRect();
      const cell = frame.height / (TOKENS + offset);
      const [j, i] = [Math.floor((event.clientX - frame.left) / cell) - offset, Math.floor((event.clientY - frame.top) / cell) - offset];
      if (i >= 0 && i < TOKENS && j >= 0 && j < TOKENS) return { i, j };
    }
    return null;
  };
  const point = (event: PointerEvent) => choose(cellAt(event), false);
  box.addEventListener('pointermove', point);
  box.addEventListener('pointerdown', point);
  box.addEventListener('pointerleave', (event) => {
    if (event.pointerType === 'mouse') choose(null, false);
  });

  const STEPS: Record<string, readonly [number, number]> = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  box.addEventListener('keydown', (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const step = STEPS[event.key];
    if (step === undefined && event.key !== 'Escape') return;
    event.preventDefault();
    if (step === undefined) return choose(null, true);
    const within = (index: number) => Math.min(TOKENS - 1, Math.max(0, index));
    choose(chosen === null ? { i: 0, j: 0 } : { i: within(chosen.i + step[0]), j: within(chosen.j + step[1]) }, true);
  });
  box.addEventListener('blur', () => choose(null, true));

  let width = box.clientWidth;
  new ResizeObserver(() => {
    if (box.clientWidth === width) return;
    width = box.clientWidth;
    draw();
  }).observe(box);

  const compute = () => {
    idea = computeIdea(settings!);
    const rank = idea.features.length;
    element('idea-finding').textContent = ideaFinding(idea);
    element('product-size').textContent = `${TOKENS} × ${rank} times ${rank} × ${TOKENS}, one column a feature`;
    element('product-names').textContent = idea.features.map((feature) => feature.name).join(', ');
    element('lengths-name').textContent = `the same ${rank} features, to scale, and their numbers as a share of N²`;
    if (chosen) element('idea-cell').textContent = ideaReadout(idea, chosen.i, chosen.j);
    draw();
  };

  let waiting = 0;
  return {
    show({ entryBound, degree, seed }) {
      if (settings !== null && settings.entryBound === entryBound && settings.degree === degree && settings.seed === seed) return;
      settings = { entryBound, degree, seed };
      if (idea === null) compute();
      else if (waiting === 0) {
        // At most once a frame
        waiting = requestAnimationFrame(() => {
          waiting = 0;
          compute();
        });
      }
    },
  };
}
