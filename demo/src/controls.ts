// SPDX-License-Identifier: MIT
//
// The forms: sliders over lists of values, two check boxes, a seed. They show a state and report a new one. The entry bound has a
// slider in both.

import { integer } from './format.js';
import { BOUNDS, DEGREES, HEAD_DIMS, IDEA_DEGREES, LENGTHS, MAX_SEED, parseSeed, type State } from './state.js';

export function element<T extends HTMLElement = HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`no element #${id}`);
  return found as T;
}

interface Slider {
  readonly id: string;
  readonly key: 'headDim' | 'maxDegree' | 'entryBound' | 'length' | 'degree';
  readonly values: readonly number[];
  readonly say: (value: number) => string;
}

const SLIDERS: readonly Slider[] = [
  { id: 'entries', key: 'entryBound', values: BOUNDS, say: String },
  { id: 'degree', key: 'degree', values: IDEA_DEGREES, say: String },
  { id: 'D', key: 'headDim', values: HEAD_DIMS, say: String },
  { id: 'degrees', key: 'maxDegree', values: DEGREES, say: (value) => (value === 1 ? '1' : `1 to ${value}`) },
  { id: 'B', key: 'entryBound', values: BOUNDS, say: String },
  { id: 'N', key: 'length', values: LENGTHS, say: integer },
];

const FLAGS = ['causal', 'certified'] as const;

export interface Controls {
  show(state: State): void;
}

/** `changed` is called at every step, with `done` false while a slider is still moving. */
export function createControls(changed: (change: Partial<State>, done: boolean) => void): Controls {
  const seed = element<HTMLInputElement>('seed');

  const place = ({ id, values, say }: Slider, value: number) => {
    const input = element<HTMLInputElement>(id);
    const text = say(value);
    input.value = String(values.indexOf(value));
    input.style.setProperty('--filled', `${(100 * values.indexOf(value)) / (values.length - 1)}%`);
    input.setAttribute('aria-valuetext', text);
    element(`${id}-value`).textContent = text;
  };

  for (const slider of SLIDERS) {
    const input = element<HTMLInputElement>(slider.id);
    input.min = '0';
    input.max = String(slider.values.length - 1);
    input.step = '1';
    const report = (done: boolean) => {
      const value = slider.values[Number(input.value)]!;
      place(slider, value);
      changed({ [slider.key]: value }, done);
    };
    input.addEventListener('input', () => report(false));
    input.addEventListener('change', () => report(true));
  }

  for (const id of FLAGS) {
    const box = element<HTMLInputElement>(id);
    box.addEventListener('change', () => changed({ [id]: box.checked }, true));
  }
  let own = 0; // the last one that was one
  seed.addEventListener('input', () => {
    const value = parseSeed(seed.value);
    seed.setAttribute('aria-invalid', String(value === undefined));
    if (value !== undefined) changed({ seed: (own = value) }, false);
  });
  seed.addEventListener('change', () => {
    seed.value = String(own);
    seed.setAttribute('aria-invalid', 'false');
    changed({ seed: own }, true);
  });
  element('reseed').addEventListener('click', () => {
    seed.value = String(Math.floor(Math.random() * 10_000) % MAX_SEED);
    seed.dispatchEvent(new Event('input'));
    seed.dispatchEvent(new Event('change'));
  });
  for (const id of ['idea-controls', 'controls']) element(id).addEventListener('submit', (event) => event.preventDefault());

  return {
    show(state) {
      for (const slider of SLIDERS) place(slider, state[slider.key]);
      for (const id of FLAGS) element<HTMLInputElement>(id).checked = state[id];
      own = state.seed;
      if (parseSeed(seed.value) !== own) seed.value = String(own);
      seed.setAttribute('aria-invalid', 'false');
    },
  };
}
