// SPDX-License-Identifier: MIT
//
// Where the WebAssembly may come from, what is said when it does not come, and what the binaries are.

import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { gunzipSync } from 'node:zlib';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { afterAll, beforeAll, describe, expect, jest, test } from '@jest/globals';

import { createRopeAttention } from '../dist/index.js';
import { hasRelaxedSimd, hasSimd } from '../dist/probe.js';
import type { CreateOptions, WasmSource } from '../dist/index.js';
import { binaries, problem } from './support.js';

const dist = new URL('../dist/', import.meta.url);
const file = new URL('rope-attention.wasm', dist);
const bytes = new Uint8Array(readFileSync(file));
const HTML = '<!DOCTYPE html><title>Not found</title>';

const { dOutput: _dOutput, ...args } = problem({ shape: { heads: 2, queryLength: 9, headDim: 8 } }, 1);

let server: Server;
let origin: string;
beforeAll(async () => {
  server = createServer((request, response) => {
    const routes: Record<string, [status: number, type: string, body: Uint8Array | string]> = {
      '/rope-attention.wasm': [200, 'application/wasm', bytes],
      '/octets.wasm': [200, 'application/octet-stream', bytes],
      '/page.wasm': [200, 'text/html', HTML],
      '/half.wasm': [200, 'application/wasm', bytes.subarray(0, 500)],
    };
    const [status, type, body] = routes[request.url ?? ''] ?? [404, 'text/html', HTML];
    response.writeHead(status, { 'content-type': type }).end(body);
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  origin = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
});
afterAll(async () => {
  await new Promise((resolve) => server.close(resolve));
});

describe('sources', () => {
  const SOURCES: [string, () => NonNullable<CreateOptions['wasm']>][] = [
    ['an http address', () => `${origin}/rope-attention.wasm`],
    ['an http URL', () => new URL(`${origin}/rope-attention.wasm`)],
    ['an http address with another content type', () => `${origin}/octets.wasm`],
    ['a file address', () => file.href],
    ['a file URL', () => file],
    ['an ArrayBuffer', () => bytes.slice().buffer],
    ['a Uint8Array', () => bytes],
    ['a view with an offset', () => Uint8Array.from([1, 2, 3, 4, ...bytes, 5]).subarray(4, -1)],
    ['a DataView', () => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)],
    ['a view on shared memory', () => shared(bytes)],
    ['a Response', () => new Response(bytes.slice())],
    ['a module', () => new WebAssembly.Module(bytes.slice())],
    ['a promise of a Response', () => fetch(`${origin}/rope-attention.wasm`)],
    ['a promise of a module', () => WebAssembly.compile(bytes.slice())],
  ];
  test.each(SOURCES)('%s', async (_, source) => {
    const expected = await createRopeAttention({ relaxedSimd: false });
    const attention = await createRopeAttention({ wasm: source() });
    expect(attention.simd).toBe('simd128');
    expect(attention.forward(args).output).toEqual(expected.forward(args).output);
    attention.dispose();
    expected.dispose();
  });

  test('bytes are not detached, nor written', async () => {
    const given = bytes.slice();
    await createRopeAttention({ wasm: given });
    expect(given).toEqual(bytes);
  });

  const FAULTS: [string, () => CreateOptions['wasm'], RegExp][] = [
    [
      'a page instead of the file',
      () => `${origin}/page.wasm`,
      /^createRopeAttention: http:.*page\.wasm is not WebAssembly: expected magic word 00 61 73 6d, found 3c 21 44 4f \(39 bytes, content type text\/html\); this looks like HTML/,
    ],
    [
      'an address that is not there',
      () => `${origin}/nothing.wasm`,
      /^createRopeAttention: http:.*nothing\.wasm answered 404 Not Found$/,
    ],
    ['half a file', () => `${origin}/half.wasm`, /^createRopeAttention: cannot compile http:.*half\.wasm: /],
    [
      'a server that is not there',
      () => 'http://127.0.0.1:9/x.wasm',
      /^createRopeAttention: cannot fetch http:\/\/127\.0\.0\.1:9\/x\.wasm: /,
    ],
    [
      'a file that is not there',
      () => new URL('nothing.wasm', dist),
      /^createRopeAttention: cannot read file:.*nothing\.wasm: ENOENT/,
    ],
    ['an address that is none', () => 'no address', /^createRopeAttention: cannot fetch no address: /],
    [
      'no bytes',
      () => new Uint8Array(0),
      /^createRopeAttention: the given view is not WebAssembly: .* found nothing \(0 bytes\)$/,
    ],
    [
      'a used Response',
      () => used(new Response(bytes.slice())),
      /^createRopeAttention: cannot read the body of the given Response: /,
    ],
    [
      'a module of another program',
      () => new WebAssembly.Module(bytes.slice(0, 8)),
      /^createRopeAttention: the given WebAssembly is not rope-attention's \(it has no memory\)$/,
    ],
    [
      'a module with imports',
      () => importing(),
      /^createRopeAttention: the given WebAssembly is not rope-attention's \(it imports a\.b\)$/,
    ],
  ];
  test.each(FAULTS)('%s', async (_, source, message) => {
    await expect(createRopeAttention({ wasm: source() as WasmSource })).rejects.toThrow(message);
  });

  test('a promise that rejects, rejects', async () => {
    const reason = new Error('no network today');
    await expect(createRopeAttention({ wasm: Promise.reject(reason) })).rejects.toBe(reason);
  });

  test('a binary other than relaxedSimd says is refused', async () => {
    const module = new WebAssembly.Module(bytes.slice());
    const expected = hasRelaxedSimd()
      ? 'relaxedSimd is true, the given wasm is the simd128 binary'
      : 'this JavaScript engine has no relaxed SIMD';
    await expect(createRopeAttention({ wasm: module, relaxedSimd: true })).rejects.toThrow(RangeError);
    await expect(createRopeAttention({ wasm: module, relaxedSimd: true })).rejects.toThrow(expected);
  });
});

describe('the embedded binaries', () => {
  test('the choice follows the probe', async () => {
    expect(hasSimd()).toBe(true);
    const automatic = await createRopeAttention();
    expect(automatic.simd).toBe(hasRelaxedSimd() ? 'relaxed-simd' : 'simd128');
    const plain = await createRopeAttention({ relaxedSimd: false });
    expect(plain.simd).toBe('simd128');
    automatic.dispose();
    plain.dispose();
  });

  test('the probe knows what the relaxed binary needs', () => {
    const relaxed = readFileSync(new URL('rope-attention.relaxed.wasm', dist));
    expect(WebAssembly.validate(new Uint8Array(relaxed))).toBe(hasRelaxedSimd());
  });

  test('without SIMD, or without relaxed SIMD, an error says so', async () => {
    const validate = jest.spyOn(WebAssembly, 'validate').mockReturnValue(false);
    await expect(createRopeAttention()).rejects.toThrow(
      'createRopeAttention: this JavaScript engine has no WebAssembly SIMD',
    );
    validate.mockImplementation((probe) => !contains(probe as Uint8Array, [0xfd, 0x85, 0x02]));
    await expect(createRopeAttention({ relaxedSimd: true })).rejects.toThrow(RangeError);
    const attention = await createRopeAttention();
    expect(attention.simd).toBe('simd128');
    attention.dispose();
    validate.mockRestore();
  });

  test('each is compiled once, and again after a failure', () => {
    const lines = inNode(`
      const compile = WebAssembly.compile;
      let calls = 0;
      WebAssembly.compile = async (bytes) => {
        if (calls++ === 0) throw new Error('out of luck');
        return compile(bytes);
      };
      const { createRopeAttention } = await import(index);
      await createRopeAttention({ relaxedSimd: false }).catch((error) => console.log(error.message));
      await Promise.all([1, 2, 3].map(() => createRopeAttention({ relaxedSimd: false })));
      await createRopeAttention({ relaxedSimd: false });
      console.log(calls);
    `);
    expect(lines).toEqual(['out of luck', '2']);
  });

  test.each(['rope-attention.wasm', 'rope-attention.relaxed.wasm'])(
    '%s imports nothing and is smaller than 160 KB',
    (name) => {
      const content = new Uint8Array(readFileSync(new URL(name, dist)));
      expect(content.length).toBeLessThan(160 * 1024);
      // Sections are id, length (LEB128), content; imports are section 2. Read here, for engines that refuse the binary.
      const sections: number[] = [];
      for (let at = 8; at < content.length;) {
        sections.push(content[at++]);
        let length = 0;
        for (let shift = 0; ; shift += 7) {
          const byte = content[at++];
          length += (byte & 127) * 2 ** shift;
          if (byte < 128) break;
        }
        at += length;
      }
      expect(sections).toContain(7); // exports
      expect(sections).not.toContain(2);
    },
  );

  test.each(binaries)('$file is the one that is embedded', async ({ relaxed, file: name }) => {
    const generated = await import('../dist/generated/wasm-bytes.js');
    const embedded = gunzipSync(Buffer.from(relaxed ? generated.relaxed : generated.simd128, 'base64'));
    expect(embedded.equals(readFileSync(new URL(name, dist)))).toBe(true);
    expect(generated.compiler).toMatch(/^emcc \d/);
  });
});

test('an engine that cannot inflate is told so, and can be given a binary', () => {
  const lines = inNode(`
    delete globalThis.DecompressionStream;
    const { createRopeAttention } = await import(index);
    await createRopeAttention().catch((error) => console.log(error.message));
    const attention = await createRopeAttention({ wasm: new URL('rope-attention.wasm', index) });
    console.log(attention.simd);
  `);
  const missing = 'createRopeAttention: this JavaScript engine has no DecompressionStream, which the embedded binary needs; give the option wasm';
  expect(lines).toEqual([missing, 'simd128']);
});

test('importing the package does nothing', () => {
  const lines = inNode(`
    const touched = [];
    const watch = (owner, name) => {
      const original = owner[name];
      owner[name] = (...args) => (touched.push(name), original.apply(owner, args));
    };
    for (const name of ['compile', 'instantiate', 'validate', 'Module', 'Memory']) watch(WebAssembly, name);
    for (const name of ['fetch', 'atob', 'MessageChannel', 'setTimeout']) watch(globalThis, name);
    const globals = Object.getOwnPropertyNames(globalThis).length;
    await import(index);
    console.log(touched.join(), Object.getOwnPropertyNames(globalThis).length - globals);
  `);
  expect(lines).toEqual([' 0']);
});

/** Lines that a script prints in a Node of its own; `index` is the package. */
function inNode(script: string): string[] {
  const whole = `const index = ${JSON.stringify(new URL('index.js', dist).href)};${script}`;
  const { stdout, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', whole], { encoding: 'utf8' });
  expect(stderr).toBe('');
  return stdout.trimEnd().split('\n');
}

function shared(content: Uint8Array): Uint8Array {
  const view = new Uint8Array(new SharedArrayBuffer(content.length));
  view.set(content);
  return view;
}

function used(response: Response): Promise<Response> {
  return response.arrayBuffer().then(() => response);
}

/** (module (import "a" "b" (func))) */
function importing(): WebAssembly.Module {
  const imports = [2, 7, 1, 1, 0x61, 1, 0x62, 0, 0];
  return new WebAssembly.Module(Uint8Array.from([...bytes.subarray(0, 8), ...[1, 4, 1, 0x60, 0, 0], ...imports]));
}

function contains(content: Uint8Array, part: number[]): boolean {
  return content.some((_, at) => part.every((byte, n) => content[at + n] === byte));
}
