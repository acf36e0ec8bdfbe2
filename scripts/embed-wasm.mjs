// Writes web/generated/wasm-bytes.ts: both binaries of dist/, gzipped, in base64, and the compiler that made them. The file is left
// alone when nothing changed, so that nothing after it is rebuilt.

import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { gzipSync } from 'node:zlib';

const root = new URL('..', import.meta.url);
const base64 = (file) => gzipSync(readFileSync(new URL(file, root)), { level: 9 }).toString('base64');
const version = /^EMCC_VERSION := (.+)$/m.exec(readFileSync(new URL('.toolchain/env', root), 'utf8'))[1];

const text = `// Written by scripts/embed-wasm.mjs.

/** The compiler of both binaries. */
export const compiler: string = 'emcc ${version}';

/** rope-attention.wasm, gzipped, in base64. */
export const simd128: string = '${base64('dist/rope-attention.wasm')}';

/** rope-attention.relaxed.wasm, gzipped, in base64. */
export const relaxed: string = '${base64('dist/rope-attention.relaxed.wasm')}';
`;

const file = new URL('web/generated/wasm-bytes.ts', root);
let old = '';
try {
  old = readFileSync(file, 'utf8');
} catch {
  mkdirSync(new URL('.', file), { recursive: true });
}
if (text !== old) writeFileSync(file, text);
