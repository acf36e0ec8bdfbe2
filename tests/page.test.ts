// SPDX-License-Identifier: MIT
//
// The interactive page. First its parts that need no browser (demo/src/state, statistics, idea, measure, stored, csv), then the
// built page of build/demo (`make page`) in Chromium: what is drawn, what the controls do, what goes into the address and
// the files, and that it stays on its own host and is usable by keyboard, on a narrow screen, in light and dark.

import { afterAll, afterEach, beforeAll, describe, expect, test } from '@jest/globals';
import { spawn } from 'node:child_process';
import { existsSync, readFileSync, statSync } from 'node:fs';
import type { Browser, Page } from 'playwright-core';

import { toCsv } from '../demo/src/csv.js';
import { Dataset } from '../demo/src/dataset.js';
import { finding, ideaFinding, ideaReadout, omissionText } from '../demo/src/findings.js';
import { duration, errorText } from '../demo/src/format.js';
import { outlines, SHADES, shadeOfError, shadeOfFeature, shadeOfWeight } from '../demo/src/heat-map.js';
import { computeIdea, featuresOf, HEAD_DIM, polynomial, TOKENS } from '../demo/src/idea.js';
import { MOST_FEATURES } from '../demo/src/idea-figure.js';
import { InputSource } from '../demo/src/inputs.js';
import { coarseToFine, cost, jobsFor, measure, rank, timedLengths, type Engine, type Point } from '../demo/src/measure.js';
import * as states from '../demo/src/state.js';
import { DEFAULTS, formatState, PANELS, parseState, type Panel, type Settings, type State } from '../demo/src/state.js';
import { crossover, median, outputError, powerLaw, relativeError } from '../demo/src/statistics.js';
import { pack, storedPoints, unpack, type StoredFile } from '../demo/src/stored.js';
import { openBrowser, openTab, serve, type Site, type Tab } from './support-page.js';

const stored = JSON.parse(readFileSync('demo/stored.json', 'utf8')) as StoredFile;

describe('state', () => {
  test('survives the address, whatever it is', () => {
    for (const panel of states.PANELS)
      for (const headDim of states.HEAD_DIMS)
        for (const maxDegree of states.DEGREES)
          for (const entryBound of states.BOUNDS)
            for (const length of states.LENGTHS)
              for (const causal of [false, true]) {
                const certified = causal !== (length > 1000);
                const degree = states.IDEA_DEGREES[maxDegree % states.IDEA_DEGREES.length];
                const state: State = { panel, headDim, maxDegree, entryBound, length, causal, certified, seed: states.MAX_SEED - headDim, degree };
                expect(parseState(formatState(state))).toEqual(state);
              }
  });

  test.each([
    '',
    '#',
    '#chart',
    '#D=17&degrees=0&B=nan&N=4097&causal=yes&seed=-1&panel=table&g=5',
    '#D=&degrees=&B=&N=&causal=&seed=&panel=',
    '#D=%zz&B=%E0%A4%A',
    '#seed=4294967296&D=1e1&degrees=Infinity',
    '#seed=0x10&D=[object Object]&panel=__proto__&causal=__proto__&certified=true',
  ])('falls back to the default: %s', (hash) => {
    expect(parseState(hash)).toEqual(DEFAULTS);
  });

  test('keeps the values that make sense beside those that do not', () => {
    expect(parseState('#panel=time&D=64&B=7&causal=1&seed=42&g=3')).toEqual({ ...DEFAULTS, panel: 'time', headDim: 64, causal: true, seed: 42, degree: 3 });
  });
});

describe('statistics', () => {
  test('the output error does not change when a constant is added to a column of the values', () => {
    const exact = Float32Array.of(0.25, 0.5, -0.25, 0);
    const approximate = Float32Array.of(0.25, 0.625, -0.25, 0);
    const v = Float32Array.of(-1, 0.5, 1, -0.5);
    expect(outputError(approximate, exact, v, 2)).toBe(0.125);
    const shift = (x: Float32Array) => x.map((value, i) => value + (i % 2 === 0 ? 8 : -4));
    expect(outputError(shift(approximate), shift(exact), shift(v), 2)).toBe(0.125);
    expect(outputError(Float32Array.of(NaN, 0, 0, 0), exact, v, 2)).toBeNaN();
  });

  test('the relative error is a ratio of norms', () => {
    expect(relativeError(Float32Array.of(3, 4.5), Float32Array.of(3, 4))).toBeCloseTo(0.1, 12);
  });

  test('median', () => {
    expect(median([5, 1, 3])).toBe(3);
    expect(median([4, 1, 3, 2])).toBe(2.5);
  });

  test('a power law is found from its points', () => {
    const law = powerLaw([1, 2, 8, 64].map((x) => ({ x, y: 3 * x ** 1.7 })));
    expect(law?.slope).toBeCloseTo(1.7, 12);
    expect(law?.factor).toBeCloseTo(3, 12);
    expect(powerLaw([{ x: 1, y: 1 }, { x: 2, y: 2 }])).toBeNull();
  });

  test('the crossover of two powers is where they meet', () => {
    const lengths = [256, 1024, 4096, 16384];
    const linear = lengths.map((x) => ({ x, y: 1000 * x }));
    const square = lengths.map((x) => ({ x, y: x * x }));
    const at = crossover(linear, square);
    expect(at).toEqual({ x: expect.closeTo(1000, 6), y: expect.closeTo(1e6, 3) });
    expect(crossover(square, linear)).toBe('before');
    expect(crossover(linear.map(({ x, y }) => ({ x, y: 1e3 * y })), square)).toBe('after');
    expect(crossover([{ x: 1, y: 1 }], square)).toBeNull();
  });
});

describe('inputs', () => {
  test('are the same for the same seed, in range, and shorter ones begin longer ones', () => {
    const long = new InputSource(7).take(1000, 0.5);
    const source = new InputSource(7);
    const short = source.take(10, 0.5);
    expect([...short.k]).toEqual([...long.k.subarray(0, 10)]);
    expect([...source.take(1000, 0.5).dOutput]).toEqual([...long.dOutput]);
    expect(Math.max(...long.q.map(Math.abs))).toBeLessThanOrEqual(0.5);
    expect(Math.max(...long.q.map(Math.abs))).toBeGreaterThan(0.48);
    for (const other of [long.k, long.v, long.dOutput, new InputSource(8).take(1000, 0.5).q]) {
      expect(other.slice(0, 4)).not.toEqual(long.q.slice(0, 4));
    }
  });
});

describe('the idea', () => {
  const ideas = states.BOUNDS.flatMap((entryBound) => states.IDEA_DEGREES.map((degree) => computeIdea({ entryBound, degree, seed: 3 })));
  const ideaOf = (entryBound: number, degree: number) => ideas.find((idea) => idea.entryBound === entryBound && idea.degree === degree)!;
  const rowsOf = (matrix: Float64Array, width = TOKENS) => Array.from({ length: matrix.length / width }, (_, i) => [...matrix.subarray(i * width, (i + 1) * width)]);
  const average = (row: number[]) => row.reduce((sum, x) => sum + x, 0) / row.length;
  const largest = (values: Iterable<number>) => Math.max(...[...values].map(Math.abs));

  test('features have the names and the number that they should', () => {
    expect(featuresOf(3).map(({ name }) => name)).toEqual(['1', 'x', 'y', 'x²', 'xy', 'y²', 'x³', 'x²y', 'xy²', 'y³']);
    for (const degree of states.IDEA_DEGREES) expect(featuresOf(degree)).toHaveLength(rank(HEAD_DIM, degree));
    expect(MOST_FEATURES).toBe(rank(HEAD_DIM, Math.max(...states.IDEA_DEGREES)));
  });

  test('named features are what the factors hold: each column the same multiple of its monomial', () => {
    const { q, k } = new InputSource(3).take(TOKENS * HEAD_DIM, 1);
    const turn = (x: Float32Array) => rowsOf(Float64Array.from(x), 2).map(([a, b], i) => [a * Math.cos(i) - b * Math.sin(i), a * Math.sin(i) + b * Math.cos(i)]);
    const keys = turn(k);
    const mean = [0, 1].map((d) => average(keys.map((key) => key[d])));
    const { u, v, features } = ideaOf(1, 4);
    const width = features.length;
    const ratios = (rows: number[][], factor: Float64Array, column: number, divide: (i: number) => number) =>
      rows.map(([x, y], i) => {
        const name = features[column].name;
        const power = (letter: string) => (name.includes(letter) ? Math.max(1, '⁰¹²³⁴'.indexOf(name[name.indexOf(letter) + 1] ?? '⁰')) : 0);
        return factor[i * width + column] / (x ** power('x') * y ** power('y') * divide(i));
      });
    for (let column = 0; column < width; column++) {
      const ofKeys = ratios(keys.map((key) => key.map((x, d) => x - mean[d])), v, column, () => 1);
      const ofQueries = ratios(turn(q), u, column, (i) => u[i * width] / u[0]);
      for (const all of [ofKeys, ofQueries]) for (const ratio of all) expect(Math.abs(ratio / all[0] - 1)).toBeLessThan(1e-5);
    }
  });

  test('weights are softmax of the scores; the product is that of the factors, and softmax with p for exp', () => {
    const apart = (a: ArrayLike<number>, b: ArrayLike<number>) => largest(Array.from(a, (x, n) => x - b[n]));
    for (const { weights, product, difference, scores, coefficients, u, v, features } of ideas) {
      const [ofQueries, ofKeys] = [u, v].map((factor) => rowsOf(factor, features.length));
      const ofFactors = ofQueries.flatMap((query) => ofKeys.map((key) => query.reduce((sum, x, n) => sum + x * key[n], 0)));
      const normalised = (f: (s: number) => number) =>
        rowsOf(scores).map((row) => {
          const values = row.map(f);
          const mean = average(values);
          return { values: values.map((x) => x / mean), digits: largest(values) / Math.abs(mean) };
        });
      expect(apart(product, ofFactors)).toBeLessThanOrEqual(1e-12 * largest(product));
      expect(apart(difference, product.map((x, n) => x - weights[n]))).toBe(0);
      expect(apart(weights, normalised(Math.exp).flatMap(({ values }) => values))).toBeLessThan(1e-12 * largest(weights));
      // Where values of p cancel in a row their mean has lost digits
      normalised((s) => polynomial(coefficients, s)).forEach(({ values, digits }, i) =>
        expect(apart(rowsOf(product)[i], values)).toBeLessThan(1e-12 * digits ** 2),
      );
      for (const row of rowsOf(weights)) expect(average(row)).toBeCloseTo(1, 12);
    }
  });

  test('every degree is worth a factor where entries are small, none where they are large', () => {
    for (const entryBound of [0.1, 0.25, 0.5, 0.8]) {
      const errors = states.IDEA_DEGREES.map((degree) => largest(ideaOf(entryBound, degree).difference));
      errors.slice(1).forEach((error, i) => expect(error).toBeLessThan(errors[i] / 3));
    }
    for (const degree of states.IDEA_DEGREES) expect(largest(ideaOf(4, degree).difference)).toBeGreaterThan(1);
  });

  test('each feature is as large in one factor as in the other, and fades with its degree', () => {
    for (const { u, v, features, entryBound } of ideas) {
      const sizes = [u, v].map((factor) => features.map((_, n) => largest(rowsOf(factor, features.length).map((row) => row[n]))));
      sizes[0].forEach((size, n) => expect(size / sizes[1][n]).toBeCloseTo(1, 9));
      if (entryBound <= 0.5) {
        const byDegree = features.map(({ degree }, n) => ({ degree, size: sizes[0][n] }));
        for (const { degree, size } of byDegree) for (const lower of byDegree) if (lower.degree === degree - 1) expect(size).toBeLessThan(lower.size);
      }
    }
  });

  test('its sentences are sentences, whatever the entries', () => {
    for (const idea of ideas) {
      expect(ideaFinding(idea)).toMatch(/^With entries up to [\d.]+.*\.$/);
      // What is said to be kept is kept, and by no more than rounding
      const [, digits, power, unit] = /(?:within|up to) ([\d.,]+)(?: × 10([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+))?( %)? ?(?:of|times) an average/.exec(ideaFinding(idea))!;
      const exponent = power ? Number([...power].map((c) => (c === '⁻' ? '-' : '⁰¹²³⁴⁵⁶⁷⁸⁹'.indexOf(c))).join('')) : 0;
      const said = Number(digits.replaceAll(',', '')) * 10 ** exponent * (unit ? 0.01 : 1);
      expect(said / largest(idea.difference)).toBeGreaterThanOrEqual(1 - 1e-12);
      expect(said / largest(idea.difference)).toBeLessThan(1.1);
      for (const text of [ideaFinding(idea), ideaReadout(idea, 0, 0), ideaReadout(idea, 47, 5)]) expect(text).not.toMatch(/NaN|undefined|null|Infinity|none/);
    }
    expect(ideaFinding(ideaOf(0.5, 2))).toMatch(/6 features of each token give all 2,304 weights to within 0\.\d\d % of an average one/);
    expect(ideaFinding(ideaOf(2, 2))).toMatch(/too far for degree 2: weights are off by up to [\d.,]+ times an average one, and \d+ are negative/);
  });

  test('outlines cover every cell once, in its shade', () => {
    const shadeAt = (row: number, column: number) => [0, 0, 3, 3, -1, 3][(2 * row + column) % 6];
    const seen = new Map<string, number>();
    for (const [shade, d] of outlines(4, 7, shadeAt)) {
      for (const [, x, y, width] of d.matchAll(/M(\d+) (\d+)h(\d+)v1h-\3z/g))
        for (let column = Number(x); column < Number(x) + Number(width); column++) {
          expect(seen.has(`${y} ${column}`)).toBe(false);
          seen.set(`${y} ${column}`, shade);
        }
    }
    for (let row = 0; row < 4; row++) for (let column = 0; column < 7; column++) expect(seen.get(`${row} ${column}`) ?? 0).toBe(shadeAt(row, column));
  });

  test('shades: the average half way, negative numbers apart, the ends for what is not a number', () => {
    expect([0, 1, -1, Infinity, -Infinity, NaN].map(shadeOfWeight)).toEqual([0, SHADES / 2, -SHADES / 2, SHADES, -SHADES, -SHADES]);
    expect([0, 1, -1].map(shadeOfFeature)).toEqual([0, SHADES / 2, -SHADES / 2]);
    expect([0, 1e-9, 1e-4, 1e-2, -1e-2, 1, 50, NaN].map(shadeOfError)).toEqual([0, 0, 0, SHADES / 2, SHADES / 2, SHADES, SHADES, SHADES]);
  });
});

/** Returns what was asked for at once, off by 1 % for a polynomial. */
function fakeEngine(calls: string[] = []): Engine {
  const values = (count: number, factor: number) => new Float32Array(count).map((_, i) => factor * (1 + (i % 7)));
  const report = (milliseconds: number) => ({ milliseconds, errorBound: 0.5 }) as never;
  return {
    forward: async (args) => {
      args.signal?.throwIfAborted();
      calls.push(`${args.shape.queryLength} ${args.degree ?? 'exact'}`);
      return { output: values(args.q.length, args.degree ? 1.01 : 1), lse: values(args.shape.queryLength, 1), report: report(1) };
    },
    backward: async (args) => {
      const factor = args.degree ? 1.01 : 1;
      return { dq: values(args.q.length, factor), dk: values(args.k.length, factor), dv: values(args.v.length, factor), report: report(2) };
    },
  };
}

const SMALL: Settings = { headDim: 4, maxDegree: 2, entryBound: 0.5, length: 256, causal: false, certified: false, seed: 3 };

interface Log {
  points: Point[];
  panels: Panel[];
  fractions: number[];
}

async function run(settings: Settings, engine: Engine, more: { view?: () => Panel; signal?: AbortSignal; stop?: (log: Log) => void } = {}): Promise<Log> {
  const log: Log = { points: [], panels: [], fractions: [] };
  await measure(settings, engine, {
    signal: more.signal ?? new AbortController().signal,
    panelInView: more.view ?? (() => 'length'),
    onPoints: (points) => {
      log.points.push(...points);
      more.stop?.(log);
    },
    onProgress: (fraction) => log.fractions.push(fraction),
    onPanel: (panel) => log.panels.push(panel),
    onOmission: () => {},
  });
  return log;
}

describe('measuring', () => {
  test('ranks are those of the papers', () => {
    expect([2, 3, 4].map((degree) => rank(16, degree))).toEqual([153, 969, 4845]);
    expect(rank(64, 3)).toBe(47905);
  });

  test('coarse to fine is every value once, the ends first', () => {
    for (let count = 1; count < 40; count++) {
      const values = Array.from({ length: count }, (_, i) => i);
      expect(coarseToFine(values).sort((a, b) => a - b)).toEqual(values);
    }
    expect(coarseToFine([0, 1, 2, 3, 4]).slice(0, 3)).toEqual([0, 4, 2]);
  });

  test('measures every point of every figure once', async () => {
    const { points, panels, fractions } = await run(SMALL, fakeEngine());
    const dataset = new Dataset(SMALL);
    dataset.add(points, 'live');
    expect(dataset.size).toBe(points.length);
    expect(dataset.byLength()).toHaveLength(2 * 3);
    expect(dataset.byBound()).toHaveLength(2 * states.BOUNDS.length);
    expect(dataset.times()).toHaveLength(3 * timedLengths(SMALL).length);
    expect(panels).toEqual(['length', 'bound', 'time']);
    expect(fractions.every((fraction, i) => fraction <= 1 && fraction >= (fractions[i - 1] ?? 0) - 1e-12)).toBe(true);
    for (const point of dataset.byLength()) {
      expect(point.dq).toBeCloseTo(0.01, 6);
      expect(point.certified).toBe(0.5);
    }
    for (const { forward, backward } of dataset.times()) {
      expect(backward).toBe(2 * forward);
      expect(1 / forward).toBeCloseTo(Math.round(1 / forward), 9); // a whole number of heads
    }
  });

  test('works for the figure in view first, also when that changes', async () => {
    expect((await run(SMALL, fakeEngine(), { view: () => 'time' })).panels[0]).toBe('time');
    let view: Panel = 'length';
    const { panels } = await run(SMALL, fakeEngine(), { view: () => view, stop: () => (view = 'bound') });
    expect(panels[0]).toBe('bound');
  });

  test('stops when told to', async () => {
    const controller = new AbortController();
    const calls: string[] = [];
    const running = run(SMALL, fakeEngine(calls), { signal: controller.signal, stop: () => controller.abort(new Error('enough')) });
    await expect(running).rejects.toThrow('enough');
    expect(calls.length).toBeLessThan(4);
  });

  test('leaves out what is too much work, and says so', () => {
    const large = { ...SMALL, headDim: 64, maxDegree: 3, length: 4096 };
    const { queues, omissions } = jobsFor(large);
    expect(omissions.map(({ panel, degree }) => `${panel} ${degree}`)).toContain('bound 3');
    for (const job of [...queues.length, ...queues.bound]) {
      if (job.kind === 'error') for (const degree of job.degrees) expect(cost(large, job.length, degree)).toBeLessThanOrEqual(3e10);
    }
    expect(omissionText(omissions, large)).toMatch(/degree 3 \(47,905 features\)/);
    expect(omissionText([], large)).toBe('');
  });
});

describe('words and files', () => {
  test('numbers', () => {
    expect([8.1e-7, 0.0123, 0.5, null, NaN].map(errorText)).toEqual(['8.1 × 10⁻⁷', '0.012', '0.50', 'none', 'none']);
    expect([0.01, 0.1, 1, 12.34, 1234].map(duration)).toEqual(['10 µs', '100 µs', '1 ms', '12.3 ms', '1.23 s']);
  });

  test('every figure has its sentence, with and without points', async () => {
    const empty = new Dataset(SMALL);
    const full = new Dataset(SMALL);
    full.add((await run(SMALL, fakeEngine())).points, 'live');
    for (const panel of PANELS) {
      expect(finding(panel, empty)).toMatch(/in a moment/);
      expect(finding(panel, full)).toMatch(/^[A-Z].*\.$/);
      expect(finding(panel, full)).not.toMatch(/NaN|undefined|null|Infinity/);
    }
    const begun = new Dataset(SMALL);
    const { points } = await run(SMALL, fakeEngine());
    begun.add(points.filter((point) => point.kind !== 'time' || point.length === timedLengths(SMALL)[0]), 'live');
    expect(begun.times().length).toBeGreaterThan(1);
    expect(finding('time', begun)).toMatch(/in a moment/);
  });

  test('the CSV has one line for each point and its settings', async () => {
    const dataset = new Dataset(SMALL);
    dataset.add((await run(SMALL, fakeEngine())).points, 'live');
    const lines = toCsv(dataset).trimEnd().split('\n');
    expect(lines).toHaveLength(1 + dataset.byLength().length + dataset.byBound().length + dataset.times().length);
    const columns = lines[0].split(',').length;
    expect(lines.every((line) => line.split(',').length === columns)).toBe(true);
    expect(lines[1]).toMatch(/^error_by_length,64,0\.5,4,0,3,polynomial,fitted,1,5,/);
  });
});

describe('stored curves', () => {
  test('are small and hold the default state completely', () => {
    expect(statSync('demo/stored.json').size).toBeLessThan(60_000);
    const dataset = new Dataset(DEFAULTS, storedPoints(stored, DEFAULTS));
    expect(dataset.byLength()).toHaveLength(DEFAULTS.maxDegree * 7);
    expect(dataset.byBound()).toHaveLength(DEFAULTS.maxDegree * states.BOUNDS.length);
    expect(dataset.times().filter((point) => point.degree === null).length).toBeGreaterThan(4);
    expect(storedPoints(stored, { ...DEFAULTS, seed: 2 })).toEqual([]);
    expect(storedPoints(stored, { ...DEFAULTS, maxDegree: 2 }).every((point) => (point.degree ?? 0) <= 2)).toBe(true);
  });

  test('never exceed their certified bounds', () => {
    let bounds = 0;
    for (const set of stored.sets) {
      for (const point of unpack(set)) {
        if (point.kind !== 'error' || point.certified === null) continue;
        bounds++;
        expect(point.output).toBeLessThanOrEqual(point.certified);
      }
    }
    expect(bounds).toBeGreaterThan(50);
  });

  test('are replaced point by point, times all at once', () => {
    const dataset = new Dataset(DEFAULTS, storedPoints(stored, DEFAULTS));
    const [points, times] = [dataset.size, dataset.times()];
    dataset.add([{ ...dataset.byLength()[0], output: 0.5 }], 'live');
    expect(dataset.size).toBe(points);
    expect(dataset.byLength()[0]).toMatchObject({ source: 'live', output: 0.5 });
    expect(dataset.byLength()[1].source).toBe('stored');
    dataset.add([{ kind: 'time', length: 256, degree: null, forward: 1, backward: 2 }], 'live');
    expect(dataset.times()).toHaveLength(1);
    expect(dataset.retiredTimes).toEqual(times);
    dataset.dropStored();
    expect(dataset.size).toBe(2);
    expect(dataset.retiredTimes).toEqual([]);
  });

  test('are what packing makes of them', () => {
    for (const set of stored.sets) expect(pack(set.settings, unpack(set))).toEqual(set);
  });
});

// --- the page ----------------------------------------------------------------------------------------------------------

/** Asks again and again until the check passes. */
async function becomes<T>(get: () => Promise<T>, check: (value: T) => void, within = 5000): Promise<void> {
  const end = Date.now() + within;
  for (;;) {
    const value = await get();
    try {
      check(value);
      return;
    } catch (failure) {
      if (Date.now() > end) throw failure;
    }
    await new Promise((resolve) => setTimeout(resolve, 30));
  }
}

/** All is measured in a few seconds. */
const QUICK = '#panel=length&D=4&degrees=2&B=0.5&N=256&causal=0&certified=0&seed=5';

describe('the page', () => {
  let site: Site;
  let browser: Browser;
  const tabs: Tab[] = [];

  beforeAll(async () => {
    if (!existsSync('build/demo/index.html')) throw new Error('no build/demo/index.html: run make page first');
    site = await serve('build/demo');
    browser = await openBrowser();
  });

  afterAll(async () => {
    await browser?.close();
    await site?.close();
  });

  // Whatever a test does: no complaint in the console, no request to anyone else
  afterEach(async () => {
    for (const { complaints, requests, close } of tabs.splice(0)) {
      await close();
      expect(complaints).toEqual([]);
      expect(requests.filter((url) => !url.startsWith(site.address) && !/^(data|blob):/.test(url))).toEqual([]);
    }
  });

  async function open(hash = '', options?: Parameters<typeof openTab>[1]): Promise<Page> {
    const tab = await openTab(browser, options);
    tabs.push(tab);
    await tab.page.goto(site.address + hash);
    return tab.page;
  }

  const finished = (page: Page) => page.waitForSelector('body[data-run=idle][data-source=live]', { timeout: 50_000 });
  const text = (page: Page, id: string) => page.locator(`#${id}`).innerText();
  // As the page has it: page.url() learns of a new address later
  const hash = (page: Page) => page.evaluate(() => location.hash);
  const stateOf = async (page: Page) => parseState(await hash(page));
  const MARKS = '#drawing .measured circle, #drawing .measured path';
  const dots = (page: Page) => page.locator(MARKS).count();
  const fullDots = (page: Page) =>
    page.locator(MARKS).evaluateAll((marks) => marks.filter((mark) => mark.getAttribute('fill') !== 'var(--paper)').length);

  test('stored curves at first paint, hollow, and a word when nothing can be computed', async () => {
    const tab = await openTab(browser);
    await tab.page.route(/worker/, (route) => route.abort());
    await tab.page.goto(site.address);
    await tab.page.waitForFunction(() => document.getElementById('status')?.textContent?.startsWith('Could not compute'));
    expect(await dots(tab.page)).toBe(4 * 7 * DEFAULTS.maxDegree);
    expect(await fullDots(tab.page)).toBe(0);
    expect(await text(tab.page, 'finding')).toMatch(/the output is off by/);
    expect(await text(tab.page, 'idea-finding')).toMatch(/^With entries up to 0.5, 6 features/);
    await tab.close();
  });

  /** Pixels of the drawn rectangles: a matrix has a frame. */
  const frames = (page: Page, id: string) =>
    page.locator(`#${id} g > rect:last-child`).evaluateAll((all) => all.map((one) => one.getBoundingClientRect()).map(({ x, y, width, height }) => ({ x, y, width, height })));

  test('the idea: two factors to scale at the edges of their product, as large as the weights', async () => {
    const page = await open(QUICK);
    for (const degree of states.IDEA_DEGREES) {
      if (degree !== (await stateOf(page)).degree) {
        await page.focus('#degree');
        await page.keyboard.press('Home');
        for (let step = 1; step < degree; step++) await page.keyboard.press('ArrowRight');
      }
      await becomes(() => text(page, 'product-size'), (value) => expect(value).toContain(`48 × ${rank(2, degree)} times`));
      const [weights] = await frames(page, 'idea-weights');
      const [left, above, product] = await frames(page, 'idea-product');
      const [difference] = await frames(page, 'idea-difference');
      for (const other of [product, difference]) expect(other).toMatchObject({ y: weights.y, width: weights.width, height: weights.height });
      expect(left).toMatchObject({ y: product.y, height: product.height });
      expect(above).toMatchObject({ x: product.x, width: product.width });
      for (const thickness of [left.width, above.height]) expect(thickness / product.width).toBeCloseTo(rank(2, degree) / TOKENS, 6);
    }
    // Features that one can name, and the same numbers of them in longer sequences
    expect(await text(page, 'product-names')).toMatch(/^1, x, y, x², .*, y⁴$/);
    expect(await page.locator('#idea-lengths text').allTextContents()).toEqual(['N = 48', '63 %', 'N = 192', '16 %', 'N = 768', '3.9 %', 'N = 3,072', '0.98 %']);
  });

  test('the idea follows its sliders and the address; the entry bound is one for the page, the degree its own', async () => {
    const page = await open(QUICK);
    await finished(page);
    await page.focus('#degree');
    await page.keyboard.press('ArrowRight');
    await becomes(() => text(page, 'idea-finding'), (value) => expect(value).toMatch(/^With entries up to 0.5, 10 features/));
    expect((await stateOf(page)).degree).toBe(3);
    expect(await page.getAttribute('body', 'data-run')).toBe('idle'); // nothing else depends on it
    await page.focus('#entries');
    await page.keyboard.press('End');
    await becomes(() => text(page, 'idea-finding'), (value) => expect(value).toMatch(/^With entries up to 4 the scores spread too far for degree 3/));
    expect(await Promise.all(['entries-value', 'B-value'].map((id) => text(page, id)))).toEqual(['4', '4']);
    expect(await stateOf(page)).toMatchObject({ degree: 3, entryBound: 4 });
    await page.waitForTimeout(1100); // a step of its own in the history
    await page.focus('#B');
    await page.keyboard.press('Home');
    await becomes(() => text(page, 'idea-finding'), (value) => expect(value).toMatch(/^With entries up to 0.1, 10 features/));
    expect(await page.getAttribute('#entries', 'aria-valuetext')).toBe('0.1');
    await page.goBack();
    await page.goBack();
    await page.goBack();
    await becomes(() => text(page, 'idea-finding'), (value) => expect(value).toMatch(/^With entries up to 0.5, 6 features/));
    const drawn = () => page.locator('#idea-weights').innerHTML();
    const before = await drawn();
    await page.fill('#seed', '6');
    await becomes(drawn, (value) => expect(value).not.toBe(before));
  });

  test('one weight of the idea: by mouse, by touch, by keyboard', async () => {
    const page = await open(`${QUICK}&g=2`, { hasTouch: true });
    const expected = ideaReadout(computeIdea({ entryBound: 0.5, degree: 2, seed: 5 }), 10, 30);
    const chosen = (id: string) => page.locator(`#${id} .chosen`).count();
    for (const [id, offset] of [['idea-weights', 0], ['idea-product', 16], ['idea-difference', 0]] as const) {
      const box = (await page.locator(`#${id} svg`).boundingBox())!;
      const cell = box.height / (TOKENS + offset);
      await page.mouse.move(box.x + (30.5 + offset) * cell, box.y + (10.5 + offset) * cell);
      await becomes(() => text(page, 'idea-cell'), (value) => expect(value).toBe(expected));
      expect(await Promise.all(['idea-weights', 'idea-product', 'idea-difference'].map(chosen))).toEqual([1, 3, 1]);
      await page.mouse.move(5, 5);
      await becomes(() => text(page, 'idea-cell'), (value) => expect(value).toBe(''));
      expect(await chosen('idea-product')).toBe(0);
      await page.touchscreen.tap(box.x + (30.5 + offset) * cell, box.y + (10.5 + offset) * cell);
      await becomes(() => text(page, 'idea-cell'), (value) => expect(value).toBe(expected));
      await page.locator('h1').tap();
    }
    await page.focus('#matrices');
    await page.keyboard.press('ArrowUp');
    expect(await page.locator('#idea-readout').textContent()).toMatch(/^Query 1, key 1: score/);
    await page.keyboard.press('ArrowLeft'); // there is nothing further
    await page.keyboard.press('ArrowDown');
    await page.keyboard.press('ArrowRight');
    expect(await page.locator('#idea-readout').textContent()).toMatch(/^Query 2, key 2: score/);
    await page.keyboard.press('Escape');
    expect(await chosen('idea-product')).toBe(0);
    expect(await page.locator('#idea-help').isVisible()).toBe(true);
  });

  test('on a narrow screen the sliders of the idea stay in sight', async () => {
    const page = await open(QUICK, { viewport: { width: 390, height: 844 } });
    expect(await page.getAttribute('#idea', 'data-form')).toBe('narrow');
    for (const id of ['idea-weights', 'idea-product']) {
      await page.locator(`#${id}`).scrollIntoViewIfNeeded();
      const slider = (await page.locator('#entries').boundingBox())!;
      expect(slider.y).toBeGreaterThan(0);
      expect(slider.y + slider.height).toBeLessThanOrEqual(844);
    }
    await page.setViewportSize({ width: 1280, height: 900 });
    await becomes(() => page.getAttribute('#idea', 'data-form'), (value) => expect(value).toBe('wide'));
  });

  test('live results replace stored ones within seconds; cancelling keeps what is there', async () => {
    const page = await open();
    const all = 4 * 7 * DEFAULTS.maxDegree;
    await page.waitForFunction(
      ([marks, count]) => [...document.querySelectorAll(marks)].filter((mark) => mark.getAttribute('fill') !== 'var(--paper)').length >= count,
      [MARKS, 4 * 4 * 3] as const,
      { timeout: 20_000 },
    );
    expect(await dots(page)).toBe(all);
    await page.click('#run');
    await page.waitForSelector('body[data-run=idle]');
    expect(await text(page, 'status')).toMatch(/^Stopped at \d+ %/);
    expect(await text(page, 'run')).toBe('Compute again');
    const kept = await fullDots(page);
    await page.waitForTimeout(300);
    expect(await fullDots(page)).toBe(kept);
    await page.click('#run');
    expect(await text(page, 'run')).toBe('Cancel');
  });

  test('a link computes its figure: every dot, every bound above its dots, slopes and crossover', async () => {
    const page = await open(QUICK);
    await finished(page);
    expect(await dots(page)).toBe(4 * 3 * 2);
    expect(await fullDots(page)).toBe(4 * 3 * 2);
    expect(await page.locator('#drawing .certified path').count()).toBe(2);
    expect(await text(page, 'status')).toMatch(/^Computed live in your browser in [\d.]+ s/);

    await page.click('#tab-bound');
    await becomes(() => dots(page), (value) => expect(value).toBe(4 * 17 * 2));
    await page.click('#tab-time');
    await becomes(() => dots(page), (value) => expect(value).toBe(3 * 3));
  });

  test('sliders by keyboard and mouse; the address follows, back and forward work', async () => {
    const page = await open(QUICK);
    await page.focus('#B');
    await page.keyboard.press('ArrowRight');
    expect(await text(page, 'B-value')).toBe('0.63');
    expect((await stateOf(page)).entryBound).toBe(0.63);
    expect(await page.getAttribute('#B', 'aria-valuetext')).toBe('0.63');

    const box = (await page.locator('#degrees').boundingBox())!;
    await page.mouse.move(box.x + 0.2 * box.width + 5, box.y + box.height / 2);
    await page.mouse.down();
    await page.mouse.move(box.x + 0.4 * box.width, box.y + box.height / 2, { steps: 5 });
    await page.mouse.up();
    expect(await text(page, 'degrees-value')).toBe('1 to 3');
    expect(await stateOf(page)).toMatchObject({ entryBound: 0.63, maxDegree: 3 });

    await page.check('#causal');
    expect((await stateOf(page)).causal).toBe(true);
    await page.fill('#seed', '77');
    await page.keyboard.press('Tab');
    expect((await stateOf(page)).seed).toBe(77);
    // What is no seed gives way to the last one that was, which the figure is of.
    await page.locator('#seed').press('End');
    await page.keyboard.type('8.5');
    expect(await page.getAttribute('#seed', 'aria-invalid')).toBe('true');
    await page.keyboard.press('Tab');
    expect(await page.inputValue('#seed')).toBe('778');
    expect(await page.getAttribute('#seed', 'aria-invalid')).toBe('false');
    expect((await stateOf(page)).seed).toBe(778);
    await page.fill('#seed', '-5');
    await page.keyboard.press('Tab');
    expect(await page.inputValue('#seed')).toBe('778');

    await page.goBack();
    await page.goBack();
    expect(await stateOf(page)).toMatchObject({ causal: false, maxDegree: 3, seed: 5 });
    expect(await page.isChecked('#causal')).toBe(false);
    await page.goBack();
    expect(await text(page, 'degrees-value')).toBe('1 to 2');
    await page.goForward();
    expect(await text(page, 'degrees-value')).toBe('1 to 3');
    await finished(page);
    expect(await dots(page)).toBe(4 * 3 * 3);
  });

  test('a link restores everything; a broken one gives the default', async () => {
    const page = await open('#panel=time&D=32&degrees=1&B=1.25&N=512&causal=1&seed=9');
    expect(await page.getAttribute('#tab-time', 'aria-selected')).toBe('true');
    const values = async () => Promise.all(['D', 'degrees', 'B', 'N'].map((id) => text(page, `${id}-value`)));
    expect(await values()).toEqual(['32', '1', '1.25', '512']);
    expect(await page.isChecked('#causal')).toBe(true);
    expect(await page.inputValue('#seed')).toBe('9');
    await page.goto(`${site.address}#panel=nothing&D=-1&B=x&seed=%%%`);
    await page.reload();
    expect(await values()).toEqual(['16', '1 to 4', '0.5', '4,096']);
    expect(await page.getAttribute('#tab-length', 'aria-selected')).toBe('true');
  });

  test('axes stay where they are', async () => {
    const page = await open(QUICK);
    const axes = () => page.locator('#drawing [aria-label*="tick label"]').evaluateAll((groups) => groups.map((group) => group.outerHTML).join());
    const before = await axes();
    expect(before).toMatch(/10⁻⁸/);
    for (const [id, key] of [['B', 'End'], ['N', 'ArrowRight'], ['D', 'ArrowRight']] as const) {
      await page.focus(`#${id}`);
      await page.keyboard.press(key);
      await page.waitForTimeout(100);
      expect(await axes()).toBe(before);
    }
  });

  test('tips with values: by mouse, by touch, by keyboard', async () => {
    const page = await open(QUICK, { hasTouch: true });
    await finished(page);
    const mark = page.locator(MARKS).nth(5);
    const tip = page.locator('#tip svg');
    await mark.hover({ force: true });
    await becomes(() => tip.textContent(), (value) => expect(value).toMatch(/degree \d, N = .*error .*certified/s));
    await page.mouse.move(5, 5);
    await becomes(() => tip.count(), (value) => expect(value).toBe(0));
    await mark.tap({ force: true });
    await becomes(() => tip.count(), (value) => expect(value).toBe(1));
    await page.locator('h1').tap();

    await page.focus('#chart');
    await page.keyboard.press('ArrowRight');
    const first = await text(page, 'readout');
    expect(first).toMatch(/^degree 1, N = 64, output error/);
    await page.keyboard.press('ArrowRight');
    expect(await text(page, 'readout')).toMatch(/^degree 1, N = 128/);
    await page.keyboard.press('ArrowDown');
    expect(await text(page, 'readout')).toMatch(/^degree 2, N = 128/);
    await page.keyboard.press('Escape');
    expect(await tip.count()).toBe(0);
  });

  test('downloads: CSV, SVG, PNG', async () => {
    const page = await open(QUICK);
    await finished(page);
    const get = async (id: string) => {
      const [download] = await Promise.all([page.waitForEvent('download'), page.click(`#${id}`)]);
      return { name: download.suggestedFilename(), bytes: readFileSync(await download.path()) };
    };
    const csv = await get('csv');
    expect(csv.name).toMatch(/^rope-attention-panel-length-D-4-.*\.csv$/);
    const rows = csv.bytes.toString().trimEnd().split('\n').map((line) => line.split(','));
    const column = (name: string) => rows[0].indexOf(name);
    expect(rows).toHaveLength(1 + 3 * 2 + 17 * 2 + 3 * 3);
    expect(rows.slice(1).every((row) => row[column('source')] === 'live')).toBe(true);
    for (const row of rows.slice(1).filter((row) => row[column('certified_bound')] !== '')) {
      expect(Number(row[column('output_error')])).toBeLessThanOrEqual(Number(row[column('certified_bound')]));
    }

    const svg = (await get('svg')).bytes.toString();
    expect(svg).toMatch(/^<svg xmlns="http:\/\/www\.w3\.org\/2000\/svg"/);
    expect(svg).not.toMatch(/var\(/);
    expect(svg).toMatch(/certified bound/);
    expect(svg.match(/<circle/g)!.length).toBeGreaterThanOrEqual(24);
    const parsed = await page.evaluate((source) => new DOMParser().parseFromString(source, 'image/svg+xml').querySelector('parsererror') === null, svg);
    expect(parsed).toBe(true);

    const png = await get('png');
    expect([...png.bytes.subarray(0, 4)]).toEqual([0x89, 0x50, 0x4e, 0x47]);
    expect(png.bytes.length).toBeGreaterThan(20_000);
  });

  test('runs under the development server too', async () => {
    const vite = spawn(process.execPath, ['node_modules/vite/bin/vite.js', '--config', 'vite.config.js', '--host', '127.0.0.1', '--port', '0'], {
      env: { ...process.env, NO_COLOR: '1', CI: '1' },
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    try {
      const address = await new Promise<string>((found, failed) => {
        let printed = '';
        vite.stdout.on('data', (chunk) => {
          printed += String(chunk);
          const match = /http:\/\/127\.0\.0\.1:\d+\//.exec(printed);
          if (match) found(match[0]);
        });
        vite.on('exit', () => failed(new Error(`vite ended: ${printed}`)));
      });
      const tab = await openTab(browser);
      await tab.page.goto(address + QUICK);
      await finished(tab.page);
      expect(await fullDots(tab.page)).toBe(4 * 3 * 2);
      expect(tab.complaints).toEqual([]);
      expect(tab.requests.filter((url) => !url.startsWith(address) && !url.startsWith('data:'))).toEqual([]);
      await tab.close();
    } finally {
      vite.kill();
    }
  });

  test('the numbers as a table', async () => {
    const page = await open();
    await page.click('summary');
    await becomes(() => page.locator('#table tbody tr').count(), (value) => expect(value).toBe(7 * DEFAULTS.maxDegree));
    await page.click('#tab-time');
    await becomes(() => page.locator('#table th').allTextContents(), (value) => expect(value).toEqual(['Method', 'N', 'Forward', 'Backward', 'Source']));
  });

  test('Tab reaches every control, and one sees where one is', async () => {
    const page = await open(QUICK);
    const reached = new Set<string>();
    for (let i = 0; i < 40; i++) {
      await page.keyboard.press('Tab');
      const [name, outline] = await page.evaluate(() => {
        const focused = document.activeElement as HTMLElement;
        const { outlineStyle, outlineWidth } = getComputedStyle(focused);
        return [focused.id || focused.className || focused.tagName, `${outlineStyle} ${outlineWidth}`];
      });
      if (name === 'BODY') break;
      expect([name, outline]).toEqual([name, expect.stringMatching(/^(solid|auto) [1-9]/)]);
      reached.add(name);
    }
    const controls = ['skip', 'matrices', 'entries', 'degree', 'tab-length', 'chart', 'run', 'D', 'degrees', 'B', 'N', 'seed', 'reseed', 'causal', 'certified', 'SUMMARY', 'csv', 'svg', 'png', 'A'];
    expect([...reached]).toEqual(expect.arrayContaining(controls));
    await page.focus('#tab-length');
    await page.keyboard.press('ArrowRight');
    expect(await page.evaluate(() => document.activeElement?.id)).toBe('tab-bound');
    expect((await stateOf(page)).panel).toBe('bound');
    await page.keyboard.press('End');
    expect((await stateOf(page)).panel).toBe('time');
  });

  test('screen readers get names, values and progress', async () => {
    const page = await open(QUICK);
    for (const role of ['slider', 'button', 'tab', 'checkbox', 'spinbutton', 'progressbar', 'application'] as const) {
      const named = await page.getByRole(role, { name: /\w/ }).count();
      expect([role, await page.getByRole(role).count()]).toEqual([role, named]);
      expect(named).toBeGreaterThan(0);
    }
    await finished(page);
    expect(await page.locator('#announcement[role=status]').textContent()).toMatch(/^Computed live/);
  });

  test.each(['light', 'dark'] as const)('fits 360 pixels in %s', async (colorScheme) => {
    const page = await open(QUICK, { viewport: { width: 360, height: 740 }, colorScheme });
    for (const panel of PANELS) {
      await page.click(`#tab-${panel}`);
      await page.waitForTimeout(100);
      expect(await page.evaluate(() => document.documentElement.scrollWidth)).toBe(360);
    }
    const small = await page.locator('button:visible, input:visible').evaluateAll((all) =>
      all.filter((one) => one.getBoundingClientRect().height < 24 && !one.closest('label')).map((one) => one.id),
    );
    expect(small).toEqual([]);
    await finished(page);
  });

  test('light and dark differ, and text stands out in both', async () => {
    const looks: { paper: string; ink: string }[] = [];
    for (const colorScheme of ['light', 'dark'] as const) {
      const page = await open(QUICK, { colorScheme });
      looks.push(await page.evaluate(() => ({ paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color })));
      const weak = await page.evaluate(() => {
        const style = getComputedStyle(document.documentElement);
        const luminance = (name: string) => {
          const hex = style.getPropertyValue(name).trim().replace(/^#(.)(.)(.)$/, '#$1$1$2$2$3$3');
          const linear = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
          return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
        };
        const contrast = (name: string) => {
          const [a, b] = [luminance(name), luminance('--paper')].sort((x, y) => y - x);
          return (a + 0.05) / (b + 0.05);
        };
        const lines = ['--exact', '--edge', '--weight', '--negative', '--error', ...[1, 2, 3, 4, 5, 6].map((degree) => `--degree-${degree}`)].filter((name) => !(contrast(name) >= 3));
        return [...lines, ...['--ink', '--soft', '--muted', '--accent'].filter((name) => !(contrast(name) >= 4.5))];
      });
      expect(weak).toEqual([]);
    }
    expect(looks[0].paper).not.toBe(looks[1].paper);
    expect(looks[0].ink).not.toBe(looks[1].ink);
  });

  test('with forced colours the key has those of the figure, and one tab is marked', async () => {
    const page = await open(QUICK, { forcedColors: 'active' });
    const styles = (selector: string, property: 'borderTopColor' | 'borderBottomColor') =>
      page.locator(selector).evaluateAll((all, name) => all.map((one) => getComputedStyle(one)[name]), property);
    const lines = await styles('#key .line', 'borderTopColor');
    expect(new Set(lines).size).toBe(lines.length);
    const tabs = await styles('.tabs button', 'borderBottomColor');
    expect(tabs[1]).toBe(tabs[2]);
    expect(tabs[0]).not.toBe(tabs[1]);
  });

  test('nothing moves for those who asked for that', async () => {
    const page = await open(QUICK, { reducedMotion: 'reduce' });
    const moving = await page.evaluate(() => [...document.querySelectorAll('*')].filter((one) => getComputedStyle(one).transitionDuration.split(',').some((time) => parseFloat(time) > 0)).length);
    expect(moving).toBe(0);
  });
});
