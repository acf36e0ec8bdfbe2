// Where the names given as arguments lead to, and what an instance made of each binary calculates.

import { createRopeAttention } from 'rope-attention';
import { compute } from './compute.js';

const found = {};
for (const name of process.argv.slice(2)) {
  try {
    const address = import.meta.resolve(name);
    found[name] = { address };
    if (/(?<!relaxed)\.wasm$/.test(name))
      found[name].outcome = await compute(await createRopeAttention({ wasm: address }));
  } catch ({ code }) {
    found[name] = { code };
  }
}
console.log(JSON.stringify(found));
