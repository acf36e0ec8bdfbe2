// A page: the package on its main thread, its worker, and both again inside a worker of the page's own.

import { createRopeAttention, createRopeAttentionWorker } from 'rope-attention';
import { compute } from './compute.js';

async function run() {
  const thread = await compute(await createRopeAttention());
  const worker = await compute(await createRopeAttentionWorker());
  return { thread, worker, ...(await inOwnWorker()) };
}

function inOwnWorker() {
  const own = new Worker(new URL('./own-worker.js', import.meta.url), { type: 'module' });
  return new Promise((resolve, reject) => {
    own.onmessage = ({ data }) => resolve(data);
    own.onerror = ({ message }) => reject(new Error(`own-worker.js: ${message}`));
    own.postMessage('go');
  });
}

run()
  .catch((error) => ({ error: String(error) }))
  .then(
    (outcome) => (document.body.appendChild(document.createElement('output')).textContent = JSON.stringify(outcome)),
  );
