// A worker of the page's own that uses the package, and still hears its own messages.

import { createRopeAttention, createRopeAttentionWorker } from 'rope-attention';
import { compute } from './compute.js';

async function run() {
  const ownWorker = await compute(await createRopeAttention());
  const workerOfOwnWorker = await compute(await createRopeAttentionWorker());
  return { ownWorker, workerOfOwnWorker };
}

self.onmessage = () => run().then(postMessage, (error) => postMessage({ error: String(error) }));
