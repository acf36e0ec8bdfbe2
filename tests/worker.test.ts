// SPDX-License-Identifier: MIT
//
// createRopeAttentionWorker in Node's worker threads (browsers have suites of their own): the same numbers, progress,
// cancellation while computing, order, errors, and an end that lets the process go.

import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';

import { createRopeAttention, createRopeAttentionWorker } from '../dist/index.js';
import type { CreateWorkerOptions, ForwardArgs, RemoteRopeAttention } from '../dist/index.js';
import { problem, training } from './support.js';

const dist = new URL('../dist/', import.meta.url);

const small = problem({ shape: { heads: 4, kvHeads: 2, queryLength: 33, headDim: 8 } }, 1);
const { dOutput: _small, ...smallForward } = small;
/** Some seconds of work on one core, in many slices. */
const large = problem({ shape: { heads: 4, queryLength: 8192, headDim: 64 }, causal: true }, 2);
const { dOutput: _large, ...largeForward } = large;
const slow: ForwardArgs = { ...largeForward, method: 'exact' };

let remote: RemoteRopeAttention;
beforeAll(async () => {
  remote = await createRopeAttentionWorker();
});
afterAll(() => remote.dispose());

describe('results', () => {
  test('are those of an instance on this thread', async () => {
    const local = await createRopeAttention();
    expect(remote.simd).toBe(local.simd);
    const [forward, backward] = [await remote.forward(smallForward), await remote.backward(small)];
    expect(plain(forward.output)).toEqual(plain(local.forward(smallForward).output));
    expect(plain(forward.lse)).toEqual(plain(local.forward(smallForward).lse));
    const expected = local.backward(small);
    for (const name of ['dq', 'dk', 'dv'] as const) expect(plain(backward[name])).toEqual(plain(expected[name]));
    const { milliseconds: _time, ...report } = local.forward(smallForward).report;
    expect(forward.report).toMatchObject(report);

    const rotation = { x: small.q, shape: small.shape, queryOffset: 5 };
    expect(plain(await remote.rotate(rotation))).toEqual(plain(local.rotate(rotation)));
    expect(await remote.plan(smallForward)).toEqual(local.plan(smallForward));
    const fitted = training({ shape: small.shape }, 3);
    const [far, near] = [await remote.attentionLoss(fitted), local.attentionLoss(fitted)];
    expect(far.loss).toBe(near.loss);
    for (const name of ['dx1', 'dx2', 'dy'] as const) expect(plain(far[name])).toEqual(plain(near[name]));
    expect(plain(far.saved.output)).toEqual(plain(near.saved.output));
    local.dispose();
  });

  test('of every option too, and of arrays of every kind', async () => {
    const local = await createRopeAttention();
    const positions = {
      queryPositions: Array.from({ length: 33 }, (_, n) => n / 3),
      keyPositions: Uint8Array.of(7, ...new Array(32).fill(1)),
    };
    const scores = { mask: Uint8Array.from({ length: 33 * 33 }, (_, n) => n % 3), bias: new Float32Array(65).fill(1) };
    const more = { ...small, ...scores, sinks: new Float32Array(new SharedArrayBuffer(16)) };
    const { dBias, dSinks } = await remote.backward(more);
    expect([dBias!, dSinks!].map(plain)).toEqual([local.backward(more).dBias, local.backward(more).dSinks]);
    const saved = await remote.forward(smallForward);
    const given = await remote.backward({ ...small, saved, checkFinite: true });
    expect(plain(given.dq)).toEqual(local.backward(small).dq);
    expect(given.report.flops).toBeLessThan((await remote.backward(small)).report.flops);
    for (const options of [{ rotary: positions }, { segments: Uint32Array.of(0, 9) }, { segments: [0, 9], window: [4, 1] as const }]) {
      const given = { ...smallForward, ...options };
      expect(plain((await remote.forward(given)).output)).toEqual(plain(local.forward(given).output));
    }
    const relative = { support: Uint32Array.of(0, 1, 2, 2), weights: Float32Array.from({ length: 130 }, (_, n) => (n % 5) - 2) };
    const mapped = { ...small, relative };
    const { dk, dWeights } = await remote.backward(mapped);
    expect([dk, dWeights!].map(plain)).toEqual([local.backward(mapped).dk, local.backward(mapped).dWeights]);
    local.dispose();
  });

  test('arguments are copied when the call is made', async () => {
    const { output } = await remote.forward(smallForward);
    const given = { ...smallForward, q: small.q.slice() };
    const call = remote.forward(given);
    given.q.fill(NaN);
    expect(given.q.length).toBe(small.q.length);
    expect(plain((await call).output)).toEqual(plain(output));
  });

  test('views of large and of shared buffers send their part', async () => {
    const { output } = await remote.forward(smallForward);
    const wide = new Float32Array(new SharedArrayBuffer(4 * small.q.length + 40), 12, small.q.length);
    wide.set(small.q);
    const frequencies = new Float32Array(1000).subarray(7, 11).fill(0.25);
    const got = await remote.forward({ ...smallForward, q: wide });
    expect(plain(got.output)).toEqual(plain(output));
    const turned = await remote.forward({ ...smallForward, rotary: { frequencies } });
    expect(plain(turned.output)).not.toEqual(plain(output));
  });
});

describe('progress', () => {
  test('rises from 0 to 1, and ends with 1 before the promise', async () => {
    const seen: number[] = [];
    await remote.forward({ ...slow, onProgress: (fraction) => seen.push(fraction) });
    expect(seen.length).toBeGreaterThan(3);
    expect(seen).toEqual([...seen].sort((a, b) => a - b));
    expect(seen[0]).toBeLessThan(0.5);
    expect(seen.at(-1)).toBe(1);
    expect(seen.filter((fraction) => fraction === 1)).toHaveLength(1);
    expect(seen[0]).toBeGreaterThanOrEqual(0);
  });

  test('of attentionLoss as well, over all of its parts', async () => {
    const seen: number[] = [];
    const args = training({ shape: { heads: 1, queryLength: 6000, headDim: 64 }, method: 'exact' as const }, 4);
    await remote.attentionLoss({ ...args, onProgress: (fraction) => seen.push(fraction) });
    expect(seen.length).toBeGreaterThan(5);
    expect(seen).toEqual([...seen].sort((a, b) => a - b));
    expect(seen.filter((fraction) => fraction === 1)).toHaveLength(1);
    expect(seen.at(-1)).toBe(1);
  });

  test('a function that throws ends its call with that error', async () => {
    const reason = new Error('enough');
    const call = remote.forward({
      ...slow,
      onProgress: () => {
        throw reason;
      },
    });
    await expect(call).rejects.toBe(reason);
    await expect(remote.forward(smallForward)).resolves.toBeDefined();
  });
});

describe('cancellation', () => {
  test('stops a call that computes, with the reason of the signal', async () => {
    const start = performance.now();
    await remote.forward(slow);
    const whole = performance.now() - start;

    const controller = new AbortController();
    const reason = new Error('changed my mind');
    let told = performance.now();
    const call = remote.forward({
      ...slow,
      signal: controller.signal,
      onProgress: (fraction) => {
        if (fraction > 0.05 && !controller.signal.aborted) {
          told = performance.now();
          controller.abort(reason);
        }
      },
    });
    await expect(call).rejects.toBe(reason);
    // The worker is free again long before the call would have ended.
    await remote.forward(smallForward);
    expect(performance.now() - told).toBeLessThan(whole / 2);
  });

  test('stops attentionLoss between its parts', async () => {
    const controller = new AbortController();
    const args = training({ shape: { heads: 1, queryLength: 6000, headDim: 64 }, method: 'exact' as const }, 4);
    const onProgress = (fraction: number) => (fraction > 0.2 ? controller.abort() : undefined);
    await expect(remote.attentionLoss({ ...args, signal: controller.signal, onProgress })).rejects.toThrow('aborted');
    await expect(remote.forward(smallForward)).resolves.toBeDefined();
  });

  test('a signal that is aborted already rejects at once', async () => {
    const signal = AbortSignal.abort();
    await expect(remote.forward({ ...slow, signal })).rejects.toBe(signal.reason);
    expect((signal.reason as DOMException).name).toBe('AbortError');
  });

  test('of a waiting call leaves the others alone', async () => {
    const controller = new AbortController();
    const first = remote.forward({ ...slow, shape: slow.shape });
    const second = remote.forward({ ...slow, signal: controller.signal });
    const third = remote.forward(smallForward);
    controller.abort();
    await expect(second).rejects.toThrow('aborted');
    await expect(first).resolves.toBeDefined();
    await expect(third).resolves.toBeDefined();
  });

  test('after the end does nothing', async () => {
    const controller = new AbortController();
    await remote.forward({ ...smallForward, signal: controller.signal });
    controller.abort();
    await expect(remote.forward(smallForward)).resolves.toBeDefined();
  });
});

test('calls are served in order', async () => {
  const order: number[] = [];
  const calls = [slow, smallForward, smallForward].map((args, n) => remote.forward(args).then(() => order.push(n)));
  calls.push(remote.rotate({ x: small.q, shape: small.shape }).then(() => order.push(3)));
  await Promise.all(calls);
  expect(order).toEqual([0, 1, 2, 3]);
});

describe('errors', () => {
  const CASES: [Record<string, unknown>, typeof TypeError | typeof RangeError, string][] = [
    [{ q: [1] }, TypeError, 'forward: q must be a Float32Array, got an array'],
    [{ k: small.k.subarray(1) }, RangeError, 'forward: k has 527 values, shape needs 528'],
    [{ tolerance: 0 }, RangeError, 'forward: tolerance must be finite'],
    [{ casual: true }, TypeError, 'forward: there is no option casual'],
    [{ signal: 'stop' }, TypeError, 'forward: signal must be an AbortSignal, got stop'],
    [{ onProgress: 1 }, TypeError, 'forward: onProgress must be a function, got 1'],
    // Found by the worker, while computing
    [
      { method: 'polynomial', degree: 0 },
      RangeError,
      "forward: method 'polynomial' misses the tolerance 0.001: degree 0 has a sampled error of",
    ],
  ];
  test.each(CASES)('%o', async (changes, kind, message) => {
    const call = remote.forward({ ...smallForward, ...changes } as ForwardArgs);
    await expect(call).rejects.toThrow(kind);
    await expect(call).rejects.toThrow(message);
    await expect(remote.forward(smallForward)).resolves.toBeDefined();
  });

  test('memory that is not there', async () => {
    const tight = await createRopeAttentionWorker({ maxMemoryBytes: 2 ** 20 });
    await expect(tight.forward(largeForward)).rejects.toThrow(
      /^forward: needs \d+ bytes of WebAssembly memory, the limit is 1048576$/,
    );
    await expect(tight.forward(largeForward)).rejects.toThrow(RangeError);
    await expect(tight.forward(smallForward)).resolves.toBeDefined();
    tight.dispose();
  });

  const CREATE: [CreateWorkerOptions, string][] = [
    [{ url: new URL('nowhere.js', dist) }, 'the url option'],
    [{ url: new URL('nowhere.js', dist) }, 'nowhere.js did not start'],
    [{ url: 3 as never }, 'createRopeAttentionWorker: url must be a string or a URL, got 3'],
    [
      { wasm: new Response('') as never },
      'createRopeAttentionWorker: wasm must be an address, bytes or a WebAssembly.Module, got a Response',
    ],
    [{ wasm: new URL('nothing.wasm', dist) }, 'cannot read file:'],
    [{ wasm: Uint8Array.of(1, 2, 3) }, 'is not WebAssembly: expected magic word'],
    [{ relaxedSimd: 'no' as never }, "createRopeAttentionWorker: relaxedSimd must be 'auto', true or false, got 'no'"],
    [{ workers: 4 } as never, 'createRopeAttentionWorker: there is no option workers; known are url, wasm'],
  ];
  test.each(CREATE)('createRopeAttentionWorker(%o)', async (options, message) => {
    await expect(createRopeAttentionWorker(options)).rejects.toThrow(message);
  });
});

describe('sources', () => {
  const bytes = new Uint8Array(readFileSync(new URL('rope-attention.wasm', dist)));
  const SOURCES: [string, CreateWorkerOptions][] = [
    ['url', { url: new URL('worker.js', dist) }],
    ['url as text', { url: new URL('worker.js', dist).href }],
    ['relaxedSimd: false', { relaxedSimd: false }],
    ['a file URL', { wasm: new URL('rope-attention.wasm', dist) }],
    ['a file address', { wasm: new URL('rope-attention.wasm', dist).href }],
    ['bytes', { wasm: bytes }],
    ['a view with an offset', { wasm: Uint8Array.from([1, 2, ...bytes, 3]).subarray(2, -1) }],
    ['a module', { wasm: new WebAssembly.Module(bytes.slice()) }],
  ];
  test.each(SOURCES)('%s', async (_, options) => {
    const other = await createRopeAttentionWorker(options);
    if (options.url === undefined) expect(other.simd).toBe('simd128');
    const { output } = await other.forward(smallForward);
    expect(output).toHaveLength(small.q.length);
    other.dispose();
  });
});

describe('the end', () => {
  test('rejects what is under way and what comes after', async () => {
    const other = await createRopeAttentionWorker();
    const calls = [other.forward(slow), other.backward(small)];
    other.dispose();
    other.dispose();
    await expect(calls[0]).rejects.toThrow('forward: this worker was disposed');
    await expect(calls[1]).rejects.toThrow('backward: this worker was disposed');
    await expect(other.plan(smallForward)).rejects.toThrow('plan: this worker was disposed');
  });

  const script = (end: string) => `
    const { createRopeAttentionWorker } = await import(${JSON.stringify(new URL('index.js', dist).href)});
    const remote = await createRopeAttentionWorker();
    const x = Float32Array.of(1, 2, 3, 4);
    const call = remote.rotate({ x, shape: { heads: 1, queryLength: 2, headDim: 2 } });
    console.log((await call)[0]);
    ${end}`;
  test.each([
    ['after dispose', 'remote.dispose();'],
    ['with an idle worker', ''],
  ])('a process ends %s, not before its calls', (_, end) => {
    const { status, stdout, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', script(end)], {
      timeout: 20_000,
      encoding: 'utf8',
    });
    expect({ status, stdout, stderr }).toEqual({ status: 0, stdout: '1\n', stderr: '' });
  });
});

/** Values that came from another realm, as values of this one. */
function plain(values: Float32Array): Float32Array {
  return Float32Array.from(values);
}
