// SPDX-License-Identifier: MIT
//
// The README's example runs as it stands, and the names in its tables exist.

import { readFileSync } from 'node:fs';
import { describe, expect, it, jest } from '@jest/globals';
import * as rope from '../dist/index.js';

const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8');

describe('README', () => {
  it('has an example of at most ten lines that runs and prints what it says, and three that go on from there', async () => {
    const [[, example], [, streaming], [, fitting], [, relative]] = [...readme.matchAll(/```js\n([\s\S]*?)```/g)];
    const lines = example.trim().split('\n').filter((line) => line !== '');
    expect(lines.length).toBeLessThanOrEqual(10);
    const body = (example + streaming + fitting + relative).replace(/import .* from 'rope-attention';/g, '');
    const log = jest.fn();
    const AsyncFunction = (async () => {}).constructor as new (...args: string[]) => (...args: unknown[]) => Promise<void>;
    await new AsyncFunction('createRopeAttention', 'gradientParts', 'console', body)(rope.createRopeAttention, rope.gradientParts, { log });
    const heads = (n: number) => n * 512 * 64;
    expect(log.mock.calls).toEqual([
      [expect.stringMatching(/^(exact|polynomial)/), heads(8), heads(8), heads(2), heads(2)],
      [2, expect.any(Number), expect.any(Number), 8 * 16, expect.any(Number)],
      ...[1, 2, 3, 4, 5].map(() => [expect.any(Number), expect.stringMatching(/^(exact|polynomial)/)]),
      [expect.any(Number), expect.any(Number), 153, expect.any(Number)],
      [expect.stringMatching(/^exact: no polynomial is predicted cheaper/)],
      [16 * 1199],
    ]);
    const losses = log.mock.calls.slice(2, 7).map(([loss]) => loss as number);
    expect(losses).toEqual([...losses].sort((a, b) => b - a));
    expect(losses[4] / losses[0]).toBeLessThan(0.7);
  });

  it('names functions that exist', async () => {
    const attention = await rope.createRopeAttention();
    for (const [, name] of readme.matchAll(/`attention\.(\w+)\(/g)) expect(typeof attention[name as 'forward']).toBe('function');
    for (const space of ['reference', 'theory'] as const) {
      const [, names] = new RegExp(`\`${space}\\.([\\w /]+?)( \\.\\.\\.)?\``).exec(readme)!;
      for (const name of names.split(' / ')) expect(typeof (rope[space] as Record<string, unknown>)[name]).toBe('function');
    }
    attention.dispose();
  });

  it('names every field of the report', async () => {
    const attention = await rope.createRopeAttention();
    const x = new Float32Array(8).fill(0.1);
    const { report } = attention.forward({ q: x, k: x, v: x, shape: { heads: 1, queryLength: 4, headDim: 2 } });
    for (const field of Object.keys(report)) expect(readme).toContain(`\`${field}\``);
    attention.dispose();
  });
});
