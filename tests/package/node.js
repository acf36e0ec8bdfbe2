// An ES module in Node.

import { createRopeAttention, createRopeAttentionWorker, reference } from 'rope-attention';
import { compute } from './compute.js';
import { forwardArgs } from './inputs.js';

const thread = await compute(await createRopeAttention());
const worker = await compute(await createRopeAttentionWorker());
console.log(JSON.stringify({ thread, worker, reference: [...reference.forward(forwardArgs).output] }));
