// SPDX-License-Identifier: MIT
//
// README and docs/: examples run as they stand, names exist, links lead somewhere, headlines say what their tables say.

import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { describe, expect, it, jest } from '@jest/globals';
import * as rope from '../dist/index.js';

const names = ['README.md', 'CHANGELOG.md', 'src/MATH.md', ...readdirSync('docs').filter((name) => name.endsWith('.md')).map((name) => `docs/${name}`)];
const documents = new Map(names.map((name) => [name, readFileSync(name, 'utf8')]));
const [readme, api, guide] = ['README.md', 'docs/api.md', 'docs/guide.md'].map((name) => documents.get(name)!);

const examplesOf = (text: string) => [...text.matchAll(/```js\n([\s\S]*?)```/g)].map(([, code]) => code);

/** What an example prints, one array of arguments a line. */
async function printed(code: string): Promise<unknown[][]> {
  const log = jest.fn();
  const AsyncFunction = (async () => {}).constructor as new (...args: string[]) => (...args: unknown[]) => Promise<void>;
  const body = code.replace(/import (\{.*?\}) from 'rope-attention';/g, 'const $1 = rope;');
  await new AsyncFunction('rope', 'console', body)(rope, { log });
  return log.mock.calls;
}

/** A heading's name in addresses, as GitHub and npm make it. */
const anchor = (heading: string) => heading.toLowerCase().replace(/[^\w\- ]/g, '').replaceAll(' ', '-');
const anchorsOf = (text: string) => [...text.matchAll(/^#+ (.*)$/gm)].map(([, heading]) => anchor(heading));

/** The rows of the first table after a heading, as cells. */
function tableAfter(heading: RegExp, text = readme): string[][] {
  const rows = text.slice(heading.exec(text)!.index).match(/(^\|.*\|\n)+/m)![0].trim().split('\n');
  return rows.slice(2).map((row) => row.slice(1, -1).split(' | ').map((cell) => cell.trim()));
}

describe('examples', () => {
  it('README: one of at most ten lines, that runs and prints what it says', async () => {
    const examples = examplesOf(readme);
    expect(examples.length).toBe(1);
    expect(examples[0].trim().split('\n').filter((line) => line !== '').length).toBeLessThanOrEqual(10);
    const heads = (n: number) => n * 4096 * 16;
    expect(await printed(examples[0])).toEqual([
      [expect.stringMatching(/^polynomial of degree 1/), heads(8)],
      [expect.stringMatching(/^polynomial of degree 2/), heads(8 + 2 + 2)],
    ]);
  });

  it('guide: all in turn', async () => {
    const lines = await printed(examplesOf(guide).join(''));
    expect(lines).toEqual([
      [2, expect.any(Number), expect.any(Number), 8 * 16, expect.any(Number)],
      ...[1, 2, 3, 4, 5].map(() => [expect.any(Number), expect.stringMatching(/^(exact|polynomial)/)]),
      [expect.any(Number), expect.any(Number), 153, expect.any(Number)],
      [expect.stringMatching(/^exact: no polynomial is predicted cheaper/)],
      [16 * 1199],
    ]);
    const losses = lines.slice(1, 6).map(([loss]) => loss as number);
    expect(losses).toEqual([...losses].sort((a, b) => b - a));
    expect(losses[4] / losses[0]).toBeLessThan(0.7);
  });

  it('are nowhere else, so that all of them are run', () => {
    for (const [name, text] of documents) expect([name, examplesOf(text).length > 0]).toEqual([name, text === readme || text === guide]);
  });
});

describe('names', () => {
  it('functions that exist', async () => {
    const attention = await rope.createRopeAttention();
    for (const [, name] of api.matchAll(/`attention\.(\w+)\(/g)) expect(typeof attention[name as 'forward']).toBe('function');
    for (const [, name] of api.matchAll(/^\| `(?:await )?(\w+)\(/gm)) expect(typeof rope[name as 'gradientParts']).toBe('function');
    for (const space of ['reference', 'theory'] as const) {
      const [, list] = new RegExp(`\`${space}\\.([\\w /]+?)( \\.\\.\\.)?\``).exec(api)!;
      for (const name of list.split(' / ')) expect(typeof (rope[space] as Record<string, unknown>)[name]).toBe('function');
    }
    attention.dispose();
  });

  it('every function of the package', () => {
    for (const [name, value] of Object.entries(rope)) if (typeof value === 'function') expect(api).toMatch(new RegExp(`\`(await )?${name}\\(`));
  });

  it('every field of the report', async () => {
    const attention = await rope.createRopeAttention();
    const x = new Float32Array(8).fill(0.1);
    const { report } = attention.forward({ q: x, k: x, v: x, shape: { heads: 1, queryLength: 4, headDim: 2 } });
    const fields = tableAfter(/^## The report/m, api).flatMap(([cell]) => [...cell.matchAll(/`(\w+)`/g)].map(([, field]) => field));
    expect(fields.sort()).toEqual(Object.keys(report).sort());
    attention.dispose();
  });
});

it.each(names)('links in %s lead to files and headings that are there', (name) => {
  for (const [link, path, heading] of documents.get(name)!.matchAll(/\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)/g)) {
    const target = path === '' ? name : join(dirname(name), path);
    expect([link, existsSync(target)]).toEqual([link, true]);
    if (heading) expect(anchorsOf(readFileSync(target, 'utf8'))).toContain(heading);
  }
});

describe('headlines', () => {
  const ratios = (rows: string[][], column: number) => rows.map((row) => Number.parseFloat(row.at(column)!.replaceAll('*', '')));

  it('of the comparison with peers', () => {
    const [, least, most] = /^### Exact: ([\d.]+) to ([\d.]+) times as fast as the fastest peer$/m.exec(readme)!;
    const found = ratios(tableAfter(/^### Exact/m), -2);
    expect([Math.min(...found), Math.max(...found)]).toEqual([Number(least), Number(most)]);
  });

  it('of almost linear time', () => {
    const [, most, length] = /^### Almost linear time: up to (\d+) times as fast as exact at ([\d,]+) tokens$/m.exec(readme)!;
    expect(readme).toContain(`On the same inputs at N = ${length},`);
    expect(Math.max(...ratios(tableAfter(/^`auto` chooses/m), -1))).toBe(Number(most));
  });
});
