// SPDX-License-Identifier: MIT
//
// The far side of createRopeAttentionWorker: one instance, calls in the order of their arrival. Between slices of work it
// lets messages in, so that a cancellation is heard while a call computes. Runs as a module worker of a browser and in
// node:worker_threads; loaded anywhere else it does nothing.

import { createAttention, type Attention } from './attention.js';
import { builtin } from './host.js';
import type {
  AttentionLossArgs,
  BackwardArgs,
  CreateOptions,
  ForwardArgs,
  PlanArgs,
  RopeAttention,
  RotateArgs,
} from './types.js';
import type { CallName } from './validate.js';

/** To the worker. `create` comes first and once. */
export type Request =
  | { kind: 'create'; options: CreateOptions }
  | { kind: 'call'; id: number; name: CallName; args: unknown; progress: boolean }
  | { kind: 'cancel'; id: number };

/** From the worker. `id` null belongs to `create`; a call that was cancelled gets no reply. */
export type Reply =
  | { kind: 'ready'; simd: RopeAttention['simd'] }
  | { kind: 'progress'; id: number; fraction: number }
  | { kind: 'result'; id: number; value: unknown }
  | { kind: 'error'; id: number | null; type: 'TypeError' | 'RangeError' | 'Error'; message: string };

type CallRequest = Extract<Request, { kind: 'call' }>;
type Post = (reply: Reply, transfer?: ArrayBuffer[]) => void;

/** Milliseconds: of work before messages are let in, and between reports of progress. */
const BREATH = 15;
const PROGRESS = 50;

function serve(post: Post): (request: Request) => void {
  const queue: CallRequest[] = [];
  const pause = createPause();
  let attention: Promise<Attention>;
  let current: number | null = null;
  let cancelled = false;

  async function run(request: CallRequest): Promise<void> {
    current = request.id;
    cancelled = false;
    try {
      const value = await perform(await attention, request);
      if (!cancelled) post({ kind: 'result', id: request.id, value }, buffersOf(value));
    } catch (error) {
      if (!cancelled) post({ kind: 'error', id: request.id, ...describe(error) });
    }
    current = null;
    const next = queue.shift();
    if (next) void run(next);
  }

  async function perform(instance: Attention, { id, name, args, progress }: CallRequest): Promise<unknown> {
    const steps = begin(instance, name, args);
    let [breath, told] = [performance.now(), -Infinity];
    for (;;) {
      const step = steps.next();
      if (step.done) return step.value;
      const now = performance.now();
      if (progress && (step.value === 1 || now - told >= PROGRESS)) {
        post({ kind: 'progress', id, fraction: step.value });
        told = now;
      }
      if (now - breath < BREATH) continue;
      await pause();
      breath = performance.now();
      if (!cancelled) continue;
      steps.return(undefined);
      return undefined;
    }
  }

  return (request) => {
    if (request.kind === 'create') {
      attention = createAttention(request.options);
      attention.then(
        ({ simd }) => post({ kind: 'ready', simd }),
        (error: unknown) => post({ kind: 'error', id: null, ...describe(error) }),
      );
    } else if (request.kind === 'cancel') {
      const waiting = queue.findIndex(({ id }) => id === request.id);
      if (waiting >= 0) queue.splice(waiting, 1);
      else if (current === request.id) cancelled = true;
    } else if (current === null) {
      void run(request);
    } else {
      queue.push(request);
    }
  };
}

/** The arguments were checked on the other side, and are again by the instance. */
function begin(instance: Attention, name: CallName, args: unknown): Generator<number, unknown, undefined> {
  switch (name) {
    case 'forward':
      return instance.forwardSteps(args as ForwardArgs);
    case 'backward':
      return instance.backwardSteps(args as BackwardArgs);
    case 'rotate':
      return instance.rotateSteps(args as RotateArgs);
    case 'plan':
      return instance.planSteps(args as PlanArgs);
    case 'attentionLoss':
      return instance.attentionLossSteps(args as AttentionLossArgs);
  }
}

/**
 * A promise that is kept once waiting messages were heard. In browsers by a message to itself (a timer would take 4 ms); Node
 * hands out up to a thousand messages of one channel in a row, before those of others, but has setImmediate.
 */
function createPause(): () => Promise<void> {
  const { setImmediate } = globalThis as { setImmediate?: (callback: () => void) => void };
  if (setImmediate) return () => new Promise((resolve) => setImmediate(resolve));
  const { port1, port2 } = new MessageChannel();
  let resume = () => {};
  port1.onmessage = () => resume();
  return () =>
    new Promise((resolve) => {
      resume = resolve;
      port2.postMessage(null);
    });
}

/** Results own their buffers, so these can be handed over instead of copied. */
function buffersOf(value: unknown): ArrayBuffer[] {
  if (ArrayBuffer.isView(value)) return [(value as Float32Array<ArrayBuffer>).buffer];
  return typeof value === 'object' && value !== null ? Object.values(value).flatMap(buffersOf) : [];
}

function describe(error: unknown): { type: 'TypeError' | 'RangeError' | 'Error'; message: string } {
  const type = error instanceof TypeError ? 'TypeError' : error instanceof RangeError ? 'RangeError' : 'Error';
  return { type, message: error instanceof Error ? error.message : String(error) };
}

interface NodePort {
  on(event: 'message', listener: (request: Request) => void): void;
  postMessage: Post;
}

interface WorkerScope {
  onmessage: ((event: { data: Request }) => void) | null;
  postMessage: Post;
}

/** Listens, if this is a worker. */
function start(): void {
  if ('WorkerGlobalScope' in globalThis) {
    const scope = globalThis as unknown as WorkerScope;
    const receive = serve((reply, transfer = []) => scope.postMessage(reply, transfer));
    scope.onmessage = ({ data }) => receive(data);
    return;
  }
  const port = builtin<{ parentPort: NodePort | null }>('node:worker_threads')?.parentPort;
  if (port)
    port.on(
      'message',
      serve((reply, transfer = []) => port.postMessage(reply, transfer)),
    );
}

start();
