// Says what is called while the package is imported, and then while an instance is made.

import threads from 'node:worker_threads';

let calls = [];
function watch(owner, name) {
  owner[name] = new Proxy(owner[name] ?? class {}, {
    apply: (target, self, args) => (calls.push(name), Reflect.apply(target, self, args)),
    construct: (target, args) => (calls.push(`new ${name}`), Reflect.construct(target, args)),
  });
}
const wasm = [
  'compile',
  'compileStreaming',
  'instantiate',
  'instantiateStreaming',
  'validate',
  'Module',
  'Instance',
  'Memory',
];
for (const name of wasm) watch(WebAssembly, name);
for (const name of ['fetch', 'atob', 'setTimeout', 'MessageChannel', 'Blob']) watch(globalThis, name);
watch(threads, 'Worker');
watch(process, 'getBuiltinModule');

const globals = Object.getOwnPropertyNames(globalThis);
const { createRopeAttention, createRopeAttentionWorker } = await import('rope-attention');
const atImport = [...calls, ...Object.getOwnPropertyNames(globalThis).filter((name) => !globals.includes(name))];

calls = [];
(await createRopeAttention()).dispose();
(await createRopeAttentionWorker()).dispose();
console.log(JSON.stringify({ atImport, atCreate: calls }));
