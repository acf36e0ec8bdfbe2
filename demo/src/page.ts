// SPDX-License-Identifier: MIT
//
// The page: state from the address, curves from the store, then from the worker; what the reader changes goes back to the
// address and starts the computation again.

import { createRopeAttentionWorker, type RemoteRopeAttention } from 'rope-attention';
import stored from '../stored.json' with { type: 'json' };
import { createChartView } from './chart.js';
import { createControls, element } from './controls.js';
import { toCsv } from './csv.js';
import { Dataset } from './dataset.js';
import { drawErrors } from './error-figure.js';
import { download, toPng, toSheet, toSvg } from './export.js';
import type { Figure } from './figure.js';
import { finding, omissionText } from './findings.js';
import { integer } from './format.js';
import { createIdeaView } from './idea-view.js';
import { keyText, showKey } from './key.js';
import { type Job, measure, type Omission, rank } from './measure.js';
import { formatState, type Panel, PANELS, parseState, sameSettings, type State } from './state.js';
import { type StoredFile, storedPoints } from './stored.js';
import { fillTable } from './table.js';
import { drawTimes } from './time-figure.js';

const TITLES: Record<Panel, string> = { length: 'Error by length', bound: 'Error by bound', time: 'Time' };
/** A slider that moves on within this time does not start a computation. */
const PAUSE_MS = 300;

const file = stored as unknown as StoredFile;
let state: State = parseState(location.hash);
let dataset = new Dataset(state, storedPoints(file, state));
/** The curves of the settings before, as long as the new ones are not complete. */
let before: Dataset | null = null;
let omissions: Omission[] = [];
let run: AbortController | null = null;
let pause = 0;
let engine: Promise<RemoteRopeAttention> | null = null;

// --- drawing ---------------------------------------------------------------------------------------------------------

const view = createChartView(() => redraw());
const idea = createIdeaView();
const controls = createControls((part, settled) => change(part, settled));

function drawFigure(): Figure {
  const width = view.width;
  if (state.panel === 'time') return drawTimes({ points: dataset.times(), ghosts: before?.times() ?? dataset.retiredTimes, width });
  const of = (set: Dataset | null) => (set === null ? [] : state.panel === 'length' ? set.byLength() : set.byBound());
  return drawErrors({ points: of(dataset), ghosts: of(before), by: state.panel, entryBound: state.entryBound, width });
}

let waiting = 0;
/** At most once a frame. */
function redraw(): void {
  if (waiting !== 0) return;
  waiting = requestAnimationFrame(() => {
    waiting = 0;
    drawNow();
  });
}

function drawNow(): void {
  view.show(drawFigure());
  const sentence = finding(state.panel, dataset);
  if (element('finding').textContent !== sentence) element('finding').textContent = sentence;
  const missing = omissionText(
    omissions.filter((omission) => omission.panel === state.panel),
    state,
  );
  const stored = state.panel === 'time' && dataset.retiredTimes.length > 0;
  const faint = before !== null ? 'Faint: the settings before. ' : stored ? 'Faint: stored. ' : '';
  element('remarks').textContent = faint + missing;
  if (element<HTMLDetailsElement>('numbers').open) fillTable(element('table'), state.panel, dataset);
}

/** All that depends on the state but not on the points. */
function showState(): void {
  controls.show(state);
  for (const panel of PANELS) {
    const tab = element(`tab-${panel}`);
    tab.setAttribute('aria-selected', String(panel === state.panel));
    tab.tabIndex = panel === state.panel ? 0 : -1;
  }
  element('panel').setAttribute('aria-labelledby', `tab-${state.panel}`);
  element('chart-name').textContent = TITLES[state.panel];
  showKey(element('key'), state);
  const ranks = Array.from({ length: state.maxDegree }, (_, i) => integer(rank(state.headDim, i + 1)));
  element('ranks').textContent = `${ranks.join(', ')} features for ${state.maxDegree === 1 ? 'degree 1' : `degrees 1 to ${state.maxDegree}`}`;
  idea.show(state);
  redraw();
}

// --- computing -------------------------------------------------------------------------------------------------------

const NAMES: Record<Panel, string> = { length: 'error by length', bound: 'error by bound', time: 'time' };

function say(text: string, aloud: boolean): void {
  element('status').textContent = text;
  if (aloud) element('announcement').textContent = text;
}

function showRunning(running: boolean): void {
  element('run').textContent = running ? 'Cancel' : 'Compute again';
  element('progress').classList.toggle('idle', !running);
  document.body.dataset.run = running ? 'running' : 'idle';
}

function describe(panel: Panel, job: Job, fraction: number): string {
  const what = job.kind === 'error' && panel === 'bound' ? `B = ${job.entryBound}` : `N = ${integer(job.length)}`;
  return `Computing ${NAMES[panel]}, ${what}: ${Math.round(100 * fraction)} % done`;
}

/** One worker for the page; another one after a failure. */
function openEngine(): Promise<RemoteRopeAttention> {
  engine ??= createRopeAttentionWorker().catch((error: unknown) => {
    engine = null;
    throw error;
  });
  return engine;
}

async function start(): Promise<void> {
  stop();
  const controller = new AbortController();
  const { signal } = controller;
  run = controller;
  omissions = [];
  // A result that is on its way when the settings change still belongs to these
  const target = dataset;
  const bar = element<HTMLProgressElement>('progress');
  const began = performance.now();
  let fraction = 0;
  bar.value = 0;
  showRunning(true);
  say('Computing in a worker', true);
  try {
    const remote = await openEngine();
    signal.throwIfAborted();
    await measure(state, remote, {
      signal,
      panelInView: () => state.panel,
      onPoints(points) {
        target.add(points, 'live');
        redraw();
      },
      onProgress(now, panel, job) {
        fraction = Math.max(fraction, now);
        bar.value = fraction;
        say(describe(panel, job, fraction), false);
      },
      onPanel(panel) {
        element('announcement').textContent = `${TITLES[panel]}: complete`;
      },
      onOmission(omission) {
        if (run === controller) omissions.push(omission);
      },
    });
    signal.throwIfAborted();
    target.dropStored();
    before = null;
    bar.value = 1;
    document.body.dataset.source = 'live';
    say(`Computed live in your browser in ${((performance.now() - began) / 1000).toFixed(1)} s (${remote.simd})`, true);
  } catch (error) {
    if (run !== controller) return; // a newer run has taken over
    if (signal.aborted) say(`Stopped at ${Math.round(100 * fraction)} %. What was computed stays.`, true);
    else {
      void engine?.then(
        (broken) => broken.dispose(),
        () => {},
      );
      engine = null;
      say(`Could not compute here: ${error instanceof Error ? error.message : String(error)}`, true);
    }
  } finally {
    if (run === controller) {
      run = null;
      showRunning(false);
      redraw();
    }
  }
}

function stop(): void {
  clearTimeout(pause);
  pause = 0;
  const running = run;
  run = null;
  running?.abort();
}

/** New settings: stored curves if there are any, else the old ones faintly until the new ones come. */
function renew(): void {
  const previous = dataset;
  stop();
  dataset = new Dataset(state, storedPoints(file, state));
  before = dataset.size > 0 ? null : previous.size > 0 ? previous : before;
  omissions = [];
  document.body.dataset.source = dataset.size > 0 ? 'stored' : 'none';
  pause = window.setTimeout(() => void start(), PAUSE_MS);
  showRunning(true);
}

// --- what the reader does --------------------------------------------------------------------------------------------

let pushed = { key: '', at: -Infinity };

/** Puts the state into the address. Steps of one control in quick succession are one step of the history. */
function remember(key: string): void {
  const address = formatState(state);
  if (address === location.hash) return;
  const now = performance.now();
  if (key === pushed.key && now - pushed.at < 1000) history.replaceState(null, '', address);
  else history.pushState(null, '', address);
  pushed = { key, at: now };
}

/** `settled` is false while a slider is still moving. */
function change(part: Partial<State>, settled: boolean): void {
  const next = { ...state, ...part };
  const same = sameSettings(next, state);
  if (next.panel !== state.panel) view.clear();
  state = next;
  if (settled) remember(Object.keys(part).join());
  if (!same) renew();
  showState();
}

for (const panel of PANELS) {
  const tab = element(`tab-${panel}`);
  tab.addEventListener('click', () => change({ panel }, true));
  tab.addEventListener('keydown', (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = step === undefined ? { Home: PANELS[0], End: PANELS[2] }[event.key] : PANELS.at((PANELS.indexOf(panel) + step) % 3);
    if (next === undefined) return;
    event.preventDefault();
    change({ panel: next }, true);
    element(`tab-${next}`).focus();
  });
}

element('run').addEventListener('click', () => {
  if (run === null && pause === 0) {
    void start();
    return;
  }
  const { signal } = run ?? {};
  clearTimeout(pause);
  pause = 0;
  if (signal === undefined) {
    say('Stopped.', true);
    showRunning(false);
  } else run?.abort();
});

window.addEventListener('popstate', () => {
  const next = parseState(location.hash);
  const same = sameSettings(next, state);
  if (next.panel !== state.panel) view.clear();
  state = next;
  if (!same) renew();
  showState();
});

document.querySelector('.skip')?.addEventListener('click', (event) => {
  event.preventDefault();
  element('chart').focus();
});

element('numbers').addEventListener('toggle', () => redraw());

const fileName = (ending: string) => `rope-attention-${formatState(state).slice(1).replace(/[&=]/g, '-')}.${ending}`;

element('csv').addEventListener('click', () => {
  download(new Blob([toCsv(dataset)], { type: 'text/csv' }), fileName('csv'));
});

function sheet() {
  const { headDim, entryBound, length, causal, certified, seed } = state;
  const variant = `${causal ? 'causal' : 'not causal'}, ${certified ? 'certified' : 'fitted'} polynomials`;
  const settings = `D = ${headDim}, B = ${entryBound}, N = ${integer(length)}, ${variant}, seed ${seed}`;
  return toSheet(view.drawing, TITLES[state.panel], [finding(state.panel, dataset), keyText(state), `rope-attention: ${settings}`]);
}

element('svg').addEventListener('click', () => download(toSvg(sheet()), fileName('svg')));
element('png').addEventListener('click', () => {
  void toPng(sheet()).then(
    (blob) => download(blob, fileName('png')),
    (error: unknown) => say(`No image: ${String(error)}`, true),
  );
});

element('about-stored').textContent = file.about;
document.body.dataset.source = dataset.size > 0 ? 'stored' : 'none';
showState();
drawNow();
void start();
