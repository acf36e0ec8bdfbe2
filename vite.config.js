import { fileURLToPath } from 'node:url';
import { defineConfig } from 'vite';

const dist = fileURLToPath(new URL('dist/', import.meta.url));

// The demo imports the package by its name, as a user would, and gets what `make build` left in dist/.
export default defineConfig({
  root: 'demo',
  base: './',
  resolve: {
    alias: [
      { find: /^rope-attention$/, replacement: `${dist}index.js` },
      { find: /^rope-attention\/worker$/, replacement: `${dist}worker.js` },
      { find: /^rope-attention\/(.*\.wasm)/, replacement: `${dist}$1` },
    ],
  },
  worker: { format: 'es' },
  build: { outDir: '../build/demo', emptyOutDir: true, target: 'es2022' },
});
