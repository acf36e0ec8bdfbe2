// SPDX-License-Identifier: MIT
//
// The page's side of chromium.mjs: globalThis.runJob(job) gives { result } or { failed }.

import { failureText, runJob } from './jobs.mjs';

const modules = './node_modules';

function script(address) {
  return new Promise((done, fail) => {
    const element = document.createElement('script');
    element.src = address;
    element.onload = done;
    element.onerror = () => fail(new Error(`cannot load ${address}`));
    document.head.append(element);
  });
}

const host = {
  libraries: {
    'rope-attention': () => import('../../../dist/index.js'),
    'onnxruntime-web': () => import(`${modules}/onnxruntime-web/dist/ort.wasm.bundle.min.mjs`),
    '@jax-js/jax': () => import(`${modules}/@jax-js/jax/dist/index.js`),
    async '@tensorflow/tfjs'() {
      if (!globalThis.tf) {
        await script(`${modules}/@tensorflow/tfjs/dist/tf.min.js`);
        await script(`${modules}/@tensorflow/tfjs-backend-wasm/dist/tf-backend-wasm.min.js`);
        globalThis.tf.wasm.setWasmPaths(`${modules}/@tensorflow/tfjs-backend-wasm/dist/`);
      }
      return globalThis.tf;
    },
  },
  binary: async (name) => (await fetch(`../../../dist/${name}`)).arrayBuffer(),
  residentBytes: () => globalThis.residentBytes(),
  note: (note) => void globalThis.noteJob(note),
};

globalThis.runJob = async (job) => {
  try {
    return { result: await runJob(host, job) };
  } catch (error) {
    return { failed: failureText(error) };
  }
};
