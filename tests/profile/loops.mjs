// SPDX-License-Identifier: MIT
//
// The inner loops of a WebAssembly binary that has names: how many instructions of each kind a turn has.

/** Kinds of instructions, in the order of the tables. */
export const KINDS = ['multiply-add', 'load', 'splat load', 'store', 'other vector', 'scalar'];

class Reader {
  constructor(bytes, at = 0) {
    Object.assign(this, { bytes, at });
  }

  byte() {
    return this.bytes[this.at++];
  }

  /** A LEB128 integer; only those that are counts or numbers of instructions are asked for their value. */
  integer() {
    let [value, shift, byte] = [0, 0, 0];
    do {
      byte = this.byte();
      value += (byte & 127) * 2 ** shift;
      shift += 7;
    } while (byte & 128);
    return value;
  }

  text() {
    const length = this.integer();
    return this.bytes.subarray(this.at, (this.at += length)).toString();
  }

  skip(integers, bytes = 0) {
    for (let n = 0; n < integers; n++) this.integer();
    this.at += bytes;
  }
}

/** Skips what follows a vector instruction in the binary. */
function skipVector(reader, code) {
  if (code <= 11 || code === 92 || code === 93) reader.skip(2);
  else if (code === 12 || code === 13) reader.skip(0, 16);
  else if (code >= 21 && code <= 34) reader.skip(0, 1);
  else if (code >= 84 && code <= 91) reader.skip(2, 1);
}

function kindOfVector(code) {
  if (code === 0x105 || code === 0x106) return 'multiply-add';
  if (code >= 7 && code <= 10) return 'splat load';
  if (code <= 6 || (code >= 84 && code <= 87) || code === 92 || code === 93) return 'load';
  if (code === 11 || (code >= 88 && code <= 91)) return 'store';
  return 'other vector';
}

/** Skips what follows any other instruction. */
function skipScalar(reader, op) {
  if (op >= 0x02 && op <= 0x04) reader.skip(1);
  else if (op === 0x0c || op === 0x0d || op === 0x10 || (op >= 0x20 && op <= 0x26) || op === 0xd0 || op === 0xd2) reader.skip(1);
  else if (op === 0x0e) reader.skip(reader.integer() + 1);
  else if (op === 0x11) reader.skip(2);
  else if (op === 0x1c) reader.skip(0, reader.integer());
  else if (op >= 0x28 && op <= 0x3e) reader.skip(2);
  else if (op >= 0x3f && op <= 0x42) reader.skip(1);
  else if (op === 0x43) reader.skip(0, 4);
  else if (op === 0x44) reader.skip(0, 8);
  else if (op === 0xfc) reader.skip([0, 0, 0, 0, 0, 0, 0, 0, 2, 1, 2, 1, 2, 1, 2, 1, 1, 1][reader.integer()]);
}

const vectorsOf = (counts) => KINDS.slice(0, -1).reduce((sum, kind) => sum + (counts[kind] ?? 0), 0);

/** Locals, constants and what only marks a place become no instructions of their own. */
const isFree = (op) => op <= 0x01 || (op >= 0x20 && op <= 0x22) || op === 0x1a || (op >= 0x41 && op <= 0x44);

/** Loops of a function body that hold no other loop, and vectors. */
function innerLoops(reader, end) {
  // locals: groups of a count and a type
  for (let groups = reader.integer(); groups > 0; groups--) reader.skip(1, 1);
  const found = [];
  const open = [];
  while (reader.at < end) {
    const op = reader.byte();
    let kind = 'scalar';
    if (op === 0xfd) {
      const code = reader.integer();
      kind = kindOfVector(code);
      skipVector(reader, code);
    } else skipScalar(reader, op);
    if (op === 0x03) for (const one of open) one.inner = false;
    if (op >= 0x02 && op <= 0x04) open.push({ loop: op === 0x03, inner: true, counts: {} });
    else if (op === 0x0b) {
      const one = open.pop();
      if (one?.loop && one.inner && vectorsOf(one.counts) > 0) found.push(one.counts);
    } else if (!isFree(op)) for (const one of open) one.counts[kind] = (one.counts[kind] ?? 0) + 1;
  }
  return found;
}

/** Map from a function's name to the counts of its inner loops, the one with the most vector instructions first. */
export function loopsOf(bytes) {
  const reader = new Reader(bytes, 8);
  const [names, bodies] = [new Map(), []];
  let imports = 0;
  while (reader.at < bytes.length) {
    const section = reader.byte();
    const length = reader.integer();
    const end = reader.at + length;
    if (section === 2) imports = reader.integer(); // only functions are imported, if anything is
    if (section === 10) {
      for (let n = reader.integer(); n > 0; n--) {
        const size = reader.integer();
        const until = reader.at + size;
        bodies.push(innerLoops(reader, until));
        reader.at = until;
      }
    }
    if (section === 0 && reader.text() === 'name') {
      while (reader.at < end) {
        const part = reader.byte();
        const size = reader.integer();
        const until = reader.at + size;
        for (let n = part === 1 ? reader.integer() : 0; n > 0; n--) names.set(reader.integer(), reader.text());
        reader.at = until;
      }
    }
    reader.at = end;
  }
  return new Map(
    bodies.map((loops, n) => [names.get(n + imports) ?? String(n), loops.sort((a, b) => vectorsOf(b) - vectorsOf(a))]),
  );
}
