// SPDX-License-Identifier: MIT
//
// Writes ONNX models byte by byte (the wire format of protocol buffers, field numbers of onnx.proto), so that no ONNX
// tooling is needed.

export const FLOAT = 1;
export const INT64 = 7;

const utf8 = new TextEncoder();

function concatenate(parts) {
  const out = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}

function variableLength(value) {
  const out = [];
  let rest = BigInt.asUintN(64, BigInt(value));
  do {
    const low = Number(rest & 127n);
    rest >>= 7n;
    out.push(rest ? low | 128 : low);
  } while (rest);
  return out;
}

// Wire types: 0 a number of variable length, 2 bytes with their length, 5 four bytes
const integer = (field, value) => [...variableLength(field << 3), ...variableLength(value)];
const float = (field, value) => [...variableLength((field << 3) | 5), ...new Uint8Array(Float32Array.of(value).buffer)];
const bytes = (field, value) => concatenate([variableLength((field << 3) | 2), variableLength(value.length), value]);
const text = (field, value) => bytes(field, utf8.encode(value));
const message = (field, ...parts) => bytes(field, concatenate(parts));

function attribute(name, value) {
  if (Array.isArray(value)) return message(5, text(1, name), ...value.map((entry) => integer(8, entry)), integer(20, 7));
  if (Number.isInteger(value)) return message(5, text(1, name), integer(3, value), integer(20, 2));
  return message(5, text(1, name), float(2, value), integer(20, 1));
}

function node({ op, domain = '', inputs, outputs, attributes = {} }) {
  const names = [...inputs.map((input) => text(1, input)), ...outputs.map((output) => text(2, output))];
  const settings = Object.entries(attributes).map(([name, value]) => attribute(name, value));
  return message(1, ...names, text(4, op), ...settings, text(7, domain));
}

function constant(name, { dims, data }) {
  const type = data instanceof Float32Array ? FLOAT : INT64;
  const raw = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  return message(5, ...dims.map((size) => integer(1, size)), integer(2, type), text(8, name), bytes(9, raw));
}

function argument(field, name, dims) {
  const shape = concatenate(dims.map((size) => message(1, integer(1, size))));
  return message(field, text(1, name), message(2, message(1, integer(1, FLOAT), bytes(2, shape))));
}

/**
 * The bytes of a model. inputs and outputs: { name: dims }, all float32; constants: { name: { dims, data } } of Float32Array
 * or BigInt64Array; nodes: [{ op, domain, inputs, outputs, attributes }].
 */
export function createModel({ inputs, outputs, constants, nodes, opset = 23, domains = [] }) {
  const graph = message(
    7,
    ...nodes.map(node),
    text(2, 'attention'),
    ...Object.entries(constants).map(([name, value]) => constant(name, value)),
    ...Object.entries(inputs).map(([name, dims]) => argument(11, name, dims)),
    ...Object.entries(outputs).map(([name, dims]) => argument(12, name, dims)),
  );
  const versions = [['', opset], ...domains.map((domain) => [domain, 1])];
  const imports = versions.map(([domain, version]) => message(8, text(1, domain), integer(2, version)));
  return concatenate([integer(1, 10), graph, ...imports]);
}
