// As where pages are rendered on a server that has no WebAssembly.

import { forwardArgs } from './inputs.js';

delete globalThis.WebAssembly;
const { createRopeAttention, reference } = await import('rope-attention');
await import('rope-attention/worker');
const refusal = await createRopeAttention().catch(String);
console.log(JSON.stringify({ refusal, reference: [...reference.forward(forwardArgs).output] }));
