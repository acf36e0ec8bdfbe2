// SPDX-License-Identifier: MIT
//
// From whatever holds the WebAssembly to a compiled module: by default the bytes that the package carries (gzipped: a third of the size
// in a bundle, a few milliseconds to inflate; no fetch, no address to configure), else an address, bytes, a Response or a module of the caller's. Nothing happens at import.

import { simd128, relaxed } from './generated/wasm-bytes.js';
import { builtin } from './host.js';
import { hasRelaxedSimd, hasSimd } from './probe.js';
import type { CreateOptions, WasmSource } from './types.js';

interface NodeFiles {
  promises: { readFile(path: URL): Promise<Uint8Array> };
}

const NAME = 'createRopeAttention';
const MAGIC = [0x00, 0x61, 0x73, 0x6d];

/** One compilation for each embedded binary, shared by all instances; a failed one is forgotten. */
const compiled = new Map<boolean, Promise<WebAssembly.Module>>();

/**
 * The module to instantiate.
 *
 * @throws Error where WebAssembly SIMD is missing or a source cannot be fetched or compiled; RangeError when relaxed SIMD is
 *   asked for and missing; TypeError for a source of another kind.
 */
export async function loadModule(options: Pick<CreateOptions, 'wasm' | 'relaxedSimd'>): Promise<WebAssembly.Module> {
  if (!hasSimd()) throw new Error(`${NAME}: this JavaScript engine has no WebAssembly SIMD (simd128), which is needed`);
  const choice = options.relaxedSimd ?? 'auto';
  if (choice === true && !hasRelaxedSimd()) {
    throw new RangeError(`${NAME}: relaxedSimd is true, but this JavaScript engine has no relaxed SIMD`);
  }
  if (options.wasm === undefined) return embedded(choice === 'auto' ? hasRelaxedSimd() : choice);
  return fromSource(await options.wasm);
}

function embedded(useRelaxed: boolean): Promise<WebAssembly.Module> {
  const known = compiled.get(useRelaxed);
  if (known) return known;
  const promise = inflate(useRelaxed ? relaxed : simd128).then((bytes) => WebAssembly.compile(bytes));
  compiled.set(useRelaxed, promise);
  promise.catch(() => compiled.delete(useRelaxed));
  return promise;
}

/** The bytes of an embedded binary. */
async function inflate(text: string): Promise<ArrayBuffer> {
  if (typeof DecompressionStream === 'undefined') {
    throw new Error(`${NAME}: this JavaScript engine has no DecompressionStream, which the embedded binary needs; give the option wasm`);
  }
  const zipped = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const reader = new Blob([zipped]).stream().pipeThrough(new DecompressionStream('gzip')).getReader();
  const parts: Uint8Array<ArrayBuffer>[] = [];
  for (let part = await reader.read(); !part.done; part = await reader.read()) parts.push(part.value);
  return new Blob(parts).arrayBuffer(); // a Response would do the same, but in Node it loads all of fetch
}

async function fromSource(source: WasmSource): Promise<WebAssembly.Module> {
  // By tag, not by instanceof: objects may come from another realm (a frame, a worker, a test runner).
  const tag = Object.prototype.toString.call(source).slice(8, -1);
  if (tag === 'WebAssembly.Module') return source as WebAssembly.Module;
  if (typeof source === 'string' || tag === 'URL') return fromAddress(String(source));
  if (tag === 'Response') return fromResponse(source as Response);
  if (ArrayBuffer.isView(source)) {
    return compile(new Uint8Array(source.buffer, source.byteOffset, source.byteLength), 'the given view');
  }
  if (tag === 'ArrayBuffer' || tag === 'SharedArrayBuffer')
    return compile(new Uint8Array(source as ArrayBuffer), `the given ${tag}`);
  const kind = source === null || typeof source !== 'object' ? String(source) : tag;
  throw new TypeError(`${NAME}: wasm must be an address, bytes, a Response or a WebAssembly.Module, got ${kind}`);
}

async function fromAddress(address: string): Promise<WebAssembly.Module> {
  const files = /^file:/i.test(address) ? builtin<NodeFiles>('node:fs') : undefined;
  if (files) {
    const bytes = await attempt(() => files.promises.readFile(new URL(address)), `cannot read ${address}`);
    return compile(bytes, address);
  }
  return fromResponse(await attempt(() => fetch(address), `cannot fetch ${address}`), address);
}

async function fromResponse(
  response: Response,
  address = response.url || 'the given Response',
): Promise<WebAssembly.Module> {
  if (!response.ok) throw new Error(`${NAME}: ${address} answered ${response.status} ${response.statusText}`.trimEnd());
  const bytes = await attempt(() => response.arrayBuffer(), `cannot read the body of ${address}`);
  return compile(new Uint8Array(bytes), address, response.headers.get('content-type') ?? 'none');
}

/** Compiles a copy: the bytes may be shared memory, which WebAssembly.compile refuses. */
async function compile(bytes: Uint8Array, origin: string, contentType?: string): Promise<WebAssembly.Module> {
  if (!MAGIC.every((byte, n) => bytes[n] === byte)) {
    const found = Array.from(bytes.subarray(0, 4), (byte) => byte.toString(16).padStart(2, '0')).join(' ') || 'nothing';
    const type = contentType === undefined ? '' : `, content type ${contentType}`;
    const html =
      bytes[0] === 0x3c ? '; this looks like HTML, so the file is probably not where the server was asked for it' : '';
    throw new Error(
      `${NAME}: ${origin} is not WebAssembly: expected magic word 00 61 73 6d, found ${found} (${bytes.length} bytes${type})${html}`,
    );
  }
  return attempt(() => WebAssembly.compile(bytes.slice()), `cannot compile ${origin}`);
}

/** The promise's value; what it rejects with becomes the cause of an Error that says what was being done. */
async function attempt<T>(act: () => Promise<T>, failure: string): Promise<T> {
  try {
    return await act();
  } catch (cause) {
    throw new Error(`${NAME}: ${failure}: ${(cause as Partial<Error> | null)?.message ?? String(cause)}`, { cause });
  }
}
