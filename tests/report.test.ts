// SPDX-License-Identifier: MIT
//
// The report (`make report`): its statistics, every experiment at tiny sizes (figures with numbers that are finite and
// sentences that follow them), the page that is built from them, and the driver, whose page is opened in Chromium.

import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';

import { createRopeAttention, theory, type RopeAttention } from '../dist/index.js';
import { openBrowser, openTab } from './support-page.js';

type Row = Record<string, string | number | boolean | null | undefined>;
interface Figure {
  id: string;
  kind: string;
  title: string;
  sentence: string;
  note: string;
  columns: { key: string; label: string; kind?: string }[];
  rows: Row[];
}
type Sizes = Record<string, number | number[]>;
interface Experiment {
  title: string;
  about: string;
  sizes: Record<'full' | 'quick' | 'tiny', Sizes>;
  run(context: { attention: RopeAttention; sizes: Sizes; seed: number; progress: (what: string, share: number) => void }): Figure[];
  finding(figures: Figure[]): string;
}
type XY = { x: number; y: number };
interface Statistics {
  quantile(values: ArrayLike<number>, share: number): number;
  median(values: ArrayLike<number>): number;
  powerLaw(points: XY[]): { slope: number; factor: number } | null;
  halfRange(v: ArrayLike<number>, columns: number): number;
  outputError(got: ArrayLike<number>, exact: ArrayLike<number>, range: number): number;
  relativeError(got: ArrayLike<number>, exact: ArrayLike<number>): number;
  takesOver(challenger: XY[], holder: XY[]): number | null;
}
type Words = Record<'error' | 'number' | 'duration' | 'percent' | 'ratio' | 'integer', (value: number) => string>;
interface Page {
  buildPage(parts: { report: object; script: string; style: string }): string;
}

/** The modules are JavaScript; a path that is not a literal is none of the compiler's business. */
const load = async <T>(name: string): Promise<T> => (await import(`../report/${name}.mjs`)) as T;

const { EXPERIMENTS } = await load<{ EXPERIMENTS: Record<string, Experiment> }>('experiments');
const statistics = await load<Statistics>('statistics');
const words = await load<Words>('words');
const { buildPage } = await load<Page>('page');

describe('statistics', () => {
  test('the slope of an exact power law', () => {
    const points = [1, 10, 300, 7000].map((x) => ({ x, y: 0.25 * x ** 1.75 }));
    const law = statistics.powerLaw([...points, { x: 5, y: NaN }, { x: 0, y: 1 }])!;
    expect(law.slope).toBeCloseTo(1.75, 12);
    expect(law.factor).toBeCloseTo(0.25, 12);
    expect(statistics.powerLaw(points.slice(0, 1))).toBeNull();
    expect(statistics.powerLaw([])).toBeNull();
  });

  test('medians and quantiles', () => {
    expect(statistics.median([9, 1, 5])).toBe(5);
    expect(statistics.median([100, 9, 1, 5])).toBe(7);
    expect(statistics.quantile([3, 1, 2], 1)).toBe(3);
    expect(statistics.quantile([0, 10], 0.99)).toBeCloseTo(9.9, 12);
  });

  test('errors in the units of the package', () => {
    expect(statistics.halfRange([1, -10, 3, 30, 2, 0], 2)).toBe(20);
    expect(statistics.outputError([1, 2.5], [1, 2], 4)).toBe(0.125);
    expect(statistics.outputError([NaN, 2], [1, 2], 4)).toBe(Infinity);
    expect(statistics.relativeError([3, 4], [0, 4])).toBe(0.75);
    expect(statistics.relativeError([NaN], [1])).toBe(Infinity);
  });

  test('where one curve takes over from another', () => {
    const curve = (...ys: number[]) => ys.map((y, n) => ({ x: 2 ** n, y }));
    expect(statistics.takesOver(curve(5, 1, 5, 5, 5), curve(1, 2, 4, 8, 16))).toBe(8);
    expect(statistics.takesOver(curve(1, 1), curve(2, 2))).toBe(1);
    expect(statistics.takesOver(curve(1, 3), curve(2, 2))).toBeNull();
  });
});

test('numbers as they are written', () => {
  expect([8.1e-7, 0.001, 0.0123, 5].map(words.error)).toEqual(['8.1 × 10⁻⁷', '10⁻³', '0.012', '5']);
  expect([0.0123, 12.345, 1234.5].map(words.duration)).toEqual(['12.3 µs', '12.3 ms', '1.23 s']);
  expect([0.5, 0.99999, 1].map(words.percent)).toEqual(['50 %', 'over 99.9 %', '100 %']);
  expect(words.ratio(0.256)).toBe('0.26x');
  expect(words.integer(262144)).toBe('262,144');
});

describe.each(Object.entries(EXPERIMENTS))('experiment %s', (_, { title, about, sizes, run, finding }) => {
  let attention: RopeAttention;
  let figures: Figure[];
  const shares: number[] = [];
  const compute = (some: Sizes) => run({ attention, sizes: some, seed: 1, progress: (__, share) => shares.push(share) });

  beforeAll(async () => {
    attention = await createRopeAttention();
    figures = compute(sizes.tiny);
  });
  afterAll(() => attention.dispose());

  test('tells how far it is', () => {
    expect(shares.length).toBeGreaterThan(1);
    expect(shares[0]).toBe(0);
    expect([...shares].sort((a, b) => a - b)).toEqual(shares);
    expect(Math.max(...shares)).toBeLessThan(1);
  });

  test('gives figures whose numbers are finite and survive JSON', () => {
    expect(figures.length).toBeGreaterThan(1);
    for (const { id, rows, columns } of figures) {
      expect(id).toMatch(/^[a-z-]+$/);
      expect(rows.length).toBeGreaterThan(1);
      const wrong = rows.flatMap((row) => Object.entries(row)).filter(([, value]) => typeof value === 'number' && !Number.isFinite(value));
      expect(wrong).toEqual([]);
      for (const { key } of columns) expect(rows.every((row) => key in row)).toBe(true);
    }
    expect(JSON.parse(JSON.stringify(figures))).toEqual(figures);
  });

  test('says in sentences what the numbers are', () => {
    expect(title).not.toBe('');
    expect(about).toMatch(/\.$/);
    for (const { note } of figures) expect(note).toMatch(/^[\dA-Zdn].*\.$/); // n and d are names
    for (const text of [...figures.map(({ sentence }) => sentence), finding(figures)]) {
      expect(text).toMatch(/^[A-Z].*\d.*\.$/);
      expect(text).not.toMatch(/NaN|Infinity|undefined|null|\bnone\b/);
    }
  });

  test('says something else about other numbers', () => {
    const change = (value: number | number[], name: string) => {
      const factor = /ength|exactUpTo|UpTo|dims|matrix$/.test(name) ? 2 : /bounds|spectra/.test(name) ? 1.5 : 1;
      return Array.isArray(value) ? value.map((one) => factor * one) : factor * value;
    };
    const other = compute(Object.fromEntries(Object.entries(sizes.tiny).map(([name, value]) => [name, change(value, name)])));
    expect(other.map(({ id }) => id)).toEqual(figures.map(({ id }) => id));
    other.forEach(({ sentence }, n) => expect(sentence).not.toBe(figures[n]!.sentence));
    expect(finding(other)).not.toBe(finding(figures));
  });
});

describe('the routes of the same polynomial', () => {
  const { run, sizes } = EXPERIMENTS['routes']!;
  const tiny = sizes.tiny as { dims: number[]; lengths: number[]; degree: number } & Sizes;
  let rows: Row[];
  const find = (headDim: number, length: number, route: string) =>
    rows.find((row) => row['headDim'] === headDim && row['length'] === length && row['route'] === route)!;
  const places = tiny.dims.flatMap((headDim) => tiny.lengths.map((length) => [headDim, length] as const));

  beforeAll(async () => {
    const attention = await createRopeAttention();
    rows = run({ attention, sizes: tiny, seed: 1, progress: () => undefined })[0]!.rows;
    attention.dispose();
  });

  test('have the terms and transforms of the theory', () => {
    for (const [headDim, length] of places) {
      const maps = { W_t: { places: 2 * headDim }, 'complex pairs': { rotaryDim: headDim }, 'one matrix': {} };
      for (const [route, map] of Object.entries(maps)) {
        const { terms, transforms } = find(headDim, length, route);
        const args = { queryLength: length, headDim, degree: tiny.degree, ...map };
        expect(terms).toBe(theory.terms(args));
        expect(transforms).toBe(theory.transforms({ ...args, pass: 'forward' }).count + theory.transforms({ ...args, pass: 'backward' }).count);
      }
      expect(find(headDim, length, 'states')).toMatchObject({ terms: theory.rank(headDim, tiny.degree), transforms: 0 });
    }
  });

  test('have the same errors', () => {
    for (const [headDim, length] of places) {
      for (const error of ['output', 'gradient']) {
        const [literal, pairs, one, states] = ['W_t', 'complex pairs', 'one matrix', 'states'].map(
          (route) => find(headDim, length, route)[error] as number,
        );
        // up to rounding with and without the mean key, and these two up to what it changes
        expect(Math.abs(literal! / pairs! - 1)).toBeLessThan(0.01);
        expect(Math.abs(one! / states! - 1)).toBeLessThan(0.01);
        expect(Math.abs(literal! / states! - 1)).toBeLessThan(0.5);
      }
    }
  });
});

describe('page', () => {
  const figure = {
    ...{ id: 'a-b', kind: 'lines', title: 'T < U', sentence: 'Half of </script><b> is 0.5 & `code`.', note: 'N.' },
    ...{ x: { key: 'x' }, y: { key: 'y', label: 'y' }, columns: [{ key: 'x', label: 'x', kind: 'integer' }, { key: 'y', label: 'y' }] },
    rows: [{ x: 4096, y: '</script><!--' }],
  };
  const report = {
    ...{ title: 'A & B', version: '1', date: 'today', machine: 'M', quick: false, seconds: 61 },
    experiments: [{ id: 'e', title: 'E', about: 'About.', finding: 'Found.', seconds: 2, figures: [figure] }],
  };
  const html = buildPage({ report, script: 'let s = "</script><!--";', style: 'p {}' });

  test('holds the JSON, and nothing in it ends a script early', () => {
    const [, data] = /<script type="application\/json" id="report-data">(.*?)<\/script>/s.exec(html)!;
    expect(JSON.parse(data)).toEqual(report);
    expect(data).not.toContain('<');
    expect(html.match(/<script/g)).toHaveLength(2);
    expect(html.match(/<\/script>/g)).toHaveLength(2);
    expect(html).toContain('let s = "<\\/script><\\!--";');
  });

  test('shows the numbers of a figure that is a table, and has no place for a drawing', () => {
    const table = { ...figure, kind: 'table' };
    const page = buildPage({ report: { ...report, experiments: [{ ...report.experiments[0], figures: [table] }] }, script: '', style: '' });
    expect(page).toContain('<td>4,096</td>');
    expect(page).not.toMatch(/<details|class="panels"/);
    expect(html).toMatch(/class="panels"[^]*<details/);
  });

  test('has its sentences and tables without the script, escaped', () => {
    expect(html).toContain('<title>A &amp; B</title>');
    expect(html).toContain('<p>Half of &lt;/script&gt;&lt;b&gt; is 0.5 &amp; <code>code</code>.</p>');
    expect(html).toContain('<td>4,096</td><td>&lt;/script&gt;&lt;!--</td>');
    expect(html).toContain('aria-label="T &lt; U. Half of');
    expect(html).toContain('<html lang="en">');
  });
});

test('the driver writes a page that opens from disk, draws every figure and asks for nothing', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'rope-report-'));
  try {
    const driver = fileURLToPath(new URL('../report/report.mjs', import.meta.url));
    const flags = process.execArgv.filter((flag) => flag.includes('relaxed-simd'));
    const args = [...flags, driver, '--quick', '--only', 'rank,frontier,routes', '--out', folder];
    const { status, stdout, stderr } = spawnSync(process.execPath, args, { encoding: 'utf8' });
    expect([status, stderr]).toEqual([0, '']);
    expect(stdout).toMatch(/ 0 %.*\n[^]*written: .*report\.json/);
    const report = JSON.parse(readFileSync(join(folder, 'report.json'), 'utf8')) as { experiments: { figures: Figure[] }[] };
    const figures = report.experiments.flatMap((experiment) => experiment.figures);

    const browser = await openBrowser();
    try {
      const { page, complaints, requests } = await openTab(browser, { viewport: { width: 390, height: 800 }, colorScheme: 'dark' });
      const address = pathToFileURL(join(folder, 'index.html')).href;
      await page.goto(address);
      await page.waitForSelector('html[data-drawn]');
      expect(figures.map(({ kind }) => kind)).toContain('table');
      for (const { id, kind, sentence } of figures) {
        if (kind === 'table') {
          expect(await page.locator(`#${id} td`).first().isVisible()).toBe(true);
          continue;
        }
        expect(await page.locator(`#${id} svg`).count()).toBeGreaterThan(0);
        expect(await page.locator(`#${id} .panels`).getAttribute('aria-label')).toContain(sentence.slice(0, 20));
      }
      expect(await page.evaluate(() => document.documentElement.scrollWidth - innerWidth)).toBeLessThanOrEqual(0);
      expect(complaints).toEqual([]);
      expect(requests.filter((request) => request !== address && !request.startsWith('data:'))).toEqual([]);
    } finally {
      await browser.close();
    }
  } finally {
    rmSync(folder, { recursive: true });
  }
});
