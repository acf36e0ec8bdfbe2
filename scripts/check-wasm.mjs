// check-wasm.mjs FILE BYTES: fails unless FILE is smaller than BYTES, imports nothing and exports `memory` and
// `__heap_base`. Reads the sections itself, since the running Node may not know relaxed SIMD.

import { readFileSync } from 'node:fs';

const [file, limit] = process.argv.slice(2);
const bytes = readFileSync(file);
let at = 8; // after the magic word and the version

function number() {
  let value = 0;
  for (let shift = 0; ; shift += 7) {
    const byte = bytes[at++];
    value += (byte & 127) * 2 ** shift;
    if (byte < 128) return value;
  }
}

function name() {
  const length = number();
  at += length;
  return bytes.toString('utf8', at - length, at);
}

let imports = 0;
const exports = [];
while (at < bytes.length) {
  const section = bytes[at++];
  const end = number() + at;
  if (section === 2) imports = number();
  if (section === 7) {
    for (let count = number(); count > 0; count--) {
      exports.push(name());
      at++; // kind
      number(); // index
    }
  }
  at = end;
}

const faults = [];
if (bytes.length >= Number(limit)) faults.push(`${bytes.length} bytes, the limit is ${limit}`);
if (imports > 0) faults.push(`${imports} imports (is a libc function used that needs JavaScript?)`);
for (const needed of ['memory', '__heap_base']) {
  if (!exports.includes(needed)) faults.push(`no export ${needed}`);
}
for (const fault of faults) console.error(`${file}: ${fault}`);
process.exit(faults.length > 0 ? 1 : 0);
