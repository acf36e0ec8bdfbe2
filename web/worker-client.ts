// SPDX-License-Identifier: MIT
//
// createRopeAttentionWorker: the calls of an instance as promises, computed in a worker. Arguments are checked here, copied,
// and the copies handed over; results come back the same way. The only file that knows its own address (import.meta.url).

import { builtin } from './host.js';
import type {
  AttentionLossArgs,
  AttentionLossResult,
  BackwardArgs,
  BackwardResult,
  CreateWorkerOptions,
  ForwardArgs,
  ForwardResult,
  PlanArgs,
} from './types.js';
import type { RemoteControls, RemoteRopeAttention, Report, RopeAttention, RotateArgs } from './types.js';
import { DecayFits } from './states.js';
import { readCall, readCreate, readLoss, readRotate, type CallName } from './validate.js';
import type { Reply, Request } from './worker.js';

const NAME = 'createRopeAttentionWorker';

/** A worker of either kind. */
interface Channel {
  post(request: Request, transfer: Transferable[]): void;
  /** Whether the worker keeps a Node process alive. */
  hold(on: boolean): void;
  end(): void;
}

interface Listener {
  reply(reply: Reply): void;
  /** The worker did not load, or broke; `why` is empty when the host does not say. */
  failure(why: string): void;
}

/**
 * Starts a worker and makes an instance in it.
 *
 * @throws Error when the worker or the WebAssembly cannot be loaded; TypeError and RangeError for wrong options.
 */
export async function createRopeAttentionWorker(options: CreateWorkerOptions = {}): Promise<RemoteRopeAttention> {
  const { relaxedSimd, maxMemoryBytes } = readCreate(NAME, options, ['url', 'wasm', 'relaxedSimd', 'maxMemoryBytes']);
  const url = readAddress(options.url);
  const [wasm, transfer] = copySource(options.wasm);
  const remote = new Remote(url ?? defaultAddress());
  remote.connect(openWorker(url, remote));
  await remote.create({ wasm, relaxedSimd, maxMemoryBytes }, transfer);
  return remote;
}

interface Pending {
  name: CallName;
  resolve(value: unknown): void;
  reject(reason: unknown): void;
  onProgress: ((fraction: number) => void) | undefined;
}

class Remote implements RemoteRopeAttention, Listener {
  simd: RopeAttention['simd'] = 'simd128';
  readonly #address: string;
  readonly #pending = new Map<number, Pending>();
  readonly #fits = new DecayFits();
  #channel: Channel | null = null;
  /** Makes the error of every call once there is no channel any more. */
  #ended: ((name: string) => Error) | null = null;
  #ready: { resolve(): void; reject(reason: unknown): void } | null = null;
  #calls = 0;

  constructor(address: string) {
    this.#address = address;
  }

  connect(channel: Channel): void {
    this.#channel = channel;
  }

  create(options: Extract<Request, { kind: 'create' }>['options'], transfer: Transferable[]): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#ready = { resolve, reject };
      this.#channel?.post({ kind: 'create', options }, transfer);
    });
  }

  forward(args: ForwardArgs & RemoteControls): Promise<ForwardResult> {
    return this.#call('forward', args, (rest) => readCall('forward', rest as ForwardArgs, this.#fits));
  }

  backward(args: BackwardArgs & RemoteControls): Promise<BackwardResult> {
    return this.#call('backward', args, (rest) => readCall('backward', rest as BackwardArgs, this.#fits));
  }

  rotate(args: RotateArgs & RemoteControls): Promise<Float32Array> {
    return this.#call('rotate', args, (rest) => readRotate(rest as RotateArgs));
  }

  plan(args: PlanArgs & RemoteControls): Promise<Report> {
    return this.#call('plan', args, (rest) => readCall('plan', rest as PlanArgs, this.#fits));
  }

  attentionLoss(args: AttentionLossArgs & RemoteControls): Promise<AttentionLossResult> {
    return this.#call('attentionLoss', args, (rest) => readLoss(rest as AttentionLossArgs, this.#fits));
  }

  dispose(): void {
    this.#fits.clear();
    this.#end((name) => new Error(`${name}: this worker was disposed`));
  }

  reply(reply: Reply): void {
    if (reply.kind === 'ready') {
      this.simd = reply.simd;
      this.#channel?.hold(false);
      this.#ready?.resolve();
      this.#ready = null;
      return;
    }
    if (reply.kind === 'error' && reply.id === null) {
      this.#end(() => errorOf(reply));
      return;
    }
    const pending = this.#pending.get(reply.id!);
    if (!pending) return; // cancelled
    if (reply.kind === 'result') pending.resolve(reply.value);
    else if (reply.kind === 'error') pending.reject(errorOf(reply));
    else this.#progress(pending, reply.id, reply.fraction);
  }

  failure(why: string): void {
    const reason = why === '' ? '' : ` (${why})`;
    const advice = "the package's export ./worker must be there, or its address be given by the url option";
    const message = this.#ready
      ? `the worker ${this.#address} did not start${reason}; ${advice}`
      : `the worker ${this.#address} broke off${reason}`;
    this.#end((name) => new Error(`${name}: ${message}`));
  }

  /** One call. What goes wrong before it is sent rejects as well. */
  async #call<T>(name: CallName, args: unknown, check: (rest: unknown) => void): Promise<T> {
    if (this.#ended) throw this.#ended(name);
    const { controls, rest } = separate(args);
    check(rest);
    const { signal, onProgress } = readControls(name, controls);
    signal?.throwIfAborted();
    const [copy, transfer] = copyArguments(rest as object);
    const id = this.#calls++;
    const abort = () => this.#cancel(id, signal?.reason);
    try {
      return await new Promise<T>((resolve, reject) => {
        this.#pending.set(id, { name, resolve: resolve as (value: unknown) => void, reject, onProgress });
        signal?.addEventListener('abort', abort, { once: true });
        this.#channel?.hold(true);
        this.#channel?.post({ kind: 'call', id, name, args: copy, progress: onProgress !== undefined }, transfer);
      });
    } finally {
      signal?.removeEventListener('abort', abort);
      this.#pending.delete(id);
      if (this.#pending.size === 0) this.#channel?.hold(false);
    }
  }

  /** Rejects a call and tells the worker to leave it. */
  #cancel(id: number, reason: unknown): void {
    const pending = this.#pending.get(id);
    if (!pending) return;
    this.#pending.delete(id);
    this.#channel?.post({ kind: 'cancel', id }, []);
    pending.reject(reason);
  }

  /** An error of the caller's function ends its call. */
  #progress(pending: Pending, id: number, fraction: number): void {
    try {
      pending.onProgress?.(fraction);
    } catch (error) {
      this.#cancel(id, error);
    }
  }

  #end(error: (name: string) => Error): void {
    if (this.#ended) return;
    this.#ended = error;
    this.#channel?.end();
    this.#channel = null;
    this.#ready?.reject(error(NAME));
    this.#ready = null;
    for (const pending of this.#pending.values()) pending.reject(error(pending.name));
  }
}

function errorOf({ type, message }: Extract<Reply, { kind: 'error' }>): Error {
  return type === 'TypeError'
    ? new TypeError(message)
    : type === 'RangeError'
      ? new RangeError(message)
      : new Error(message);
}

/** The controls of the call, and the arguments without them. */
function separate(args: unknown): { controls: Record<keyof RemoteControls, unknown>; rest: unknown } {
  if (typeof args !== 'object' || args === null || Array.isArray(args))
    return { controls: { signal: undefined, onProgress: undefined }, rest: args };
  const { signal, onProgress, ...rest } = args as Record<string, unknown>;
  return { controls: { signal, onProgress }, rest };
}

function readControls(name: string, { signal, onProgress }: Record<keyof RemoteControls, unknown>): RemoteControls {
  if (signal !== undefined && typeof (signal as AbortSignal | null)?.throwIfAborted !== 'function') {
    throw new TypeError(`${name}: signal must be an AbortSignal, got ${String(signal)}`);
  }
  if (onProgress !== undefined && typeof onProgress !== 'function') {
    throw new TypeError(`${name}: onProgress must be a function, got ${String(onProgress)}`);
  }
  return { signal: signal as AbortSignal, onProgress: onProgress as (fraction: number) => void };
}

/** Checked arguments with every array copied, tightly (a view may show a small part of a large buffer), and the copies. */
function copyArguments(args: object): [copy: object, transfer: Transferable[]] {
  const transfer: Transferable[] = [];
  const copy = (value: unknown): unknown => {
    if (ArrayBuffer.isView(value)) {
      // By tag: of its own kind, from whatever realm, and not as a Buffer would copy itself.
      const kinds = globalThis as unknown as Record<string, new (values: unknown) => Float32Array<ArrayBuffer>>;
      const own = new kinds[(value as Float32Array)[Symbol.toStringTag]](value);
      transfer.push(own.buffer);
      return own;
    }
    if (typeof value !== 'object' || value === null || Array.isArray(value)) return value;
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, copy(inner)]));
  };
  return [copy(args) as object, transfer];
}

function readAddress(url: unknown): string | undefined {
  if (url === undefined || typeof url === 'string') return url;
  if (Object.prototype.toString.call(url) === '[object URL]') return String(url);
  throw new TypeError(`${NAME}: url must be a string or a URL, got ${String(url)}`);
}

/** The source of the WebAssembly as it can be sent: addresses as absolute text, bytes as a copy. */
function copySource(wasm: unknown): [wasm: CreateWorkerOptions['wasm'], transfer: Transferable[]] {
  const tag = Object.prototype.toString.call(wasm).slice(8, -1);
  if (wasm === undefined || tag === 'WebAssembly.Module') return [wasm as WebAssembly.Module | undefined, []];
  if (typeof wasm === 'string') return [absolute(wasm), []];
  if (tag === 'URL') return [String(wasm), []];
  if (ArrayBuffer.isView(wasm) || tag === 'ArrayBuffer' || tag === 'SharedArrayBuffer') {
    const bytes = ArrayBuffer.isView(wasm)
      ? new Uint8Array(wasm.buffer, wasm.byteOffset, wasm.byteLength)
      : new Uint8Array(wasm as ArrayBuffer);
    const copy = bytes.slice();
    return [copy, [copy.buffer]];
  }
  throw new TypeError(
    `${NAME}: wasm must be an address, bytes or a WebAssembly.Module, got ${tag === 'Response' ? 'a Response' : String(wasm)}`,
  );
}

/** Addresses are relative to the page, not to the worker. */
function absolute(address: string): string {
  const { document, location } = globalThis as { document?: { baseURI: string }; location?: { href: string } };
  const base = document?.baseURI ?? location?.href;
  return base === undefined ? address : new URL(address, base).href;
}

/** Of the worker that openWorker takes, as far as no bundler has moved it. The comments keep these from taking it for one more asset. */
function defaultAddress(): string {
  const path = typeof Worker === 'function' ? './rope-attention/worker.js' : './worker.js';
  return new URL(/* webpackIgnore: true */ /* @vite-ignore */ path, import.meta.url).href;
}

interface NodeWorker {
  on(event: 'message', listener: (reply: Reply) => void): void;
  on(event: 'error', listener: (error: Error) => void): void;
  on(event: 'exit', listener: (code: number) => void): void;
  postMessage(request: Request, transfer: Transferable[]): void;
  ref(): void;
  unref(): void;
  terminate(): Promise<number>;
}

/** The worker at `url`, or the package's own. */
function openWorker(url: string | undefined, listener: Listener): Channel {
  try {
    if (typeof Worker === 'function') {
      if (url !== undefined) return openWebWorker(new Worker(url, { type: 'module' }), listener);
      // Vite and webpack know this expression, word for word, and bundle the worker. The address is a path from here, and the
      // package's export of that name as well: the dev server of Vite before 8 moves this module to node_modules/.vite/deps,
      // beside which there is no worker, and finds it by its name.
      return openWebWorker(
        new Worker(new URL('rope-attention/worker.js', import.meta.url), { type: 'module' }),
        listener,
      );
    }
    const threads = builtin<{ Worker: new (url: URL | string, options: { execArgv: string[] }) => NodeWorker }>(
      'node:worker_threads',
    );
    if (!threads) throw new Error('this JavaScript engine has no workers');
    const address = url ?? defaultAddress();
    // Options of the process (--input-type, --import) are for its own modules.
    return openNodeWorker(
      new threads.Worker(/^[a-z]+:/i.test(address) ? new URL(address) : address, { execArgv: [] }),
      listener,
    );
  } catch (cause) {
    const why = cause instanceof Error ? cause.message : String(cause);
    throw new Error(
      `${NAME}: cannot start the worker ${url ?? defaultAddress()}: ${why}; another address can be given by the url option`,
      { cause },
    );
  }
}

function openWebWorker(worker: Worker, listener: Listener): Channel {
  worker.onmessage = ({ data }: MessageEvent<Reply>) => listener.reply(data);
  worker.onerror = (event) => {
    event.preventDefault();
    listener.failure(event.message ?? ''); // a worker that cannot be loaded gives an Event without a message
  };
  worker.onmessageerror = () => listener.failure('a message could not be read');
  return {
    post: (request, transfer) => worker.postMessage(request, transfer),
    hold: () => {},
    end: () => worker.terminate(),
  };
}

function openNodeWorker(worker: NodeWorker, listener: Listener): Channel {
  worker.on('message', (reply) => listener.reply(reply));
  worker.on('error', (error) => listener.failure(error.message));
  worker.on('exit', (code) => listener.failure(`it ended with code ${code}`));
  return {
    post: (request, transfer) => worker.postMessage(request, transfer),
    hold: (on) => (on ? worker.ref() : worker.unref()),
    end: () => void worker.terminate(),
  };
}
