// SPDX-License-Identifier: MIT
//
// The key of the figures: what each mark means.

import { degreesOf, type State } from './state.js';

/** In words, for a file. */
export function keyText(state: State): string {
  return state.panel === 'time'
    ? 'Dots: medians measured (hollow: stored). Lines: one degree each. Dotted: fitted power of N. Rings: as fast as exact.'
    : 'Dots: measured (hollow: stored). Lines: one degree each, its number beside it. Dashed: certified bound of the output.';
}

function item(mark: string, text: string, colour?: string): HTMLElement {
  const span = document.createElement('span');
  const swatch = document.createElement('i');
  swatch.className = mark;
  if (colour) swatch.style.setProperty('--colour', colour);
  span.append(swatch, text);
  return span;
}

export function showKey(box: HTMLElement, state: State): void {
  const degrees = degreesOf(state).map((degree) => item('line', String(degree), `var(--degree-${degree})`));
  const group = document.createElement('span');
  group.className = 'group';
  group.append('degree', ...degrees);
  const marks =
    state.panel === 'time'
      ? [item('ring', 'as fast as exact'), item('dots', 'fitted power of N')]
      : [item('dashes', 'certified bound')];
  const exact = state.panel === 'time' ? [item('line', 'exact', 'var(--exact)')] : [];
  box.replaceChildren(...exact, group, item('dot full', 'measured'), item('dot', 'stored'), ...marks);
}
