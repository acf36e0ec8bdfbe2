// CommonJS in Node.

/* eslint-disable @typescript-eslint/no-require-imports */
const { createRopeAttention, createRopeAttentionWorker, reference } = require('rope-attention');
const { compute } = require('./compute.js');
const { forwardArgs } = require('./inputs.js');

async function main() {
  const thread = await compute(await createRopeAttention());
  const worker = await compute(await createRopeAttentionWorker());
  console.log(JSON.stringify({ thread, worker, reference: [...reference.forward(forwardArgs).output] }));
}
main();
