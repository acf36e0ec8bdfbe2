// A strict TypeScript consumer. Each @ts-expect-error is an error itself as soon as the types let the next line pass.

import { createRopeAttention, createRopeAttentionWorker, reference, theory } from 'rope-attention';
import type {
  BackwardResult,
  ForwardArgs,
  ForwardResult,
  RemoteRopeAttention,
  Report,
  RopeAttention,
  Shape,
} from 'rope-attention';
import type {} from 'rope-attention/worker';

/** Only for equal types; `any` equals nothing but itself. */
type Same<A, B> = (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? true : false;
function exactly<A>(): <B>(value: B, ...differs: Same<A, B> extends true ? [] : [never]) => void {
  return () => {};
}

const shape: Shape = { heads: 1, queryLength: 2, headDim: 2 };
const args: ForwardArgs = { shape, q: new Float32Array(4), k: new Float32Array(4), v: new Float32Array(4) };

export async function use(): Promise<Report> {
  const attention = await createRopeAttention({ relaxedSimd: 'auto', maxMemoryBytes: 2 ** 20 });
  exactly<RopeAttention>()(attention);
  exactly<'simd128' | 'relaxed-simd'>()(attention.simd);

  const { output, lse, report } = attention.forward({
    ...args,
    rotary: { base: 500_000 },
    causal: true,
    tolerance: 1e-4,
  });
  exactly<Float32Array>()(output);
  exactly<Float32Array>()(lse);
  exactly<number | null>()(report.errorBound);
  exactly<'exact' | 'polynomial' | 'toeplitz'>()(report.method);

  const gradients = attention.backward({ ...args, dOutput: output, output, lse });
  exactly<BackwardResult>()(gradients);
  exactly<Float32Array>()(gradients.dq);

  const remote: RemoteRopeAttention = await createRopeAttentionWorker({
    url: new URL('https://example.org/worker.js'),
  });
  const slow = remote.forward({
    ...args,
    signal: AbortSignal.timeout(1000),
    onProgress: (fraction) => fraction.toFixed(),
  });
  exactly<ForwardResult>()(await slow);
  exactly<Float64Array>()(reference.forward(args).output);
  exactly<number>()(theory.rank(16, 3));

  // @ts-expect-error: the shape is missing
  attention.forward({ q: args.q, k: args.k, v: args.v });
  // @ts-expect-error: float64 arrays are for the reference
  attention.forward({ ...args, q: new Float64Array(4) });
  // @ts-expect-error: there is no such method
  attention.forward({ ...args, method: 'quick' });
  // @ts-expect-error: there is no such option
  attention.forward({ ...args, temperature: 1 });
  // @ts-expect-error: backward needs dOutput
  attention.backward(args);
  // @ts-expect-error: a promise has no output
  void remote.forward(args).output;
  // @ts-expect-error: may be null
  report.errorBound.toFixed();
  // @ts-expect-error: there is no such option
  await createRopeAttention({ url: 'worker.js' });
  return report;
}
