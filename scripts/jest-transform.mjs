// Jest transform: TypeScript to ES modules by the compiler that builds the package. Types are checked by `make lint`.
//
// The modules of a test file share a global object of their own, which answers each look-up outside of compiled code: a
// third of a microsecond for every `Math` of an inner loop, and most of the time of some tests. So modules, those of dist/
// too, begin by taking what they use.

import ts from 'typescript';

const compilerOptions = {
  module: ts.ModuleKind.ESNext,
  target: ts.ScriptTarget.ES2022,
  verbatimModuleSyntax: true,
  sourceMap: true,
};

const GLOBALS = 'const { Array, Float32Array, Float64Array, Infinity, Int32Array, Math, Number, Uint32Array, Uint8Array } = globalThis;';

export default {
  process(text, fileName) {
    if (!fileName.endsWith('.ts')) return { code: `${GLOBALS} ${text}` }; // lines stay where they are
    const { outputText, sourceMapText } = ts.transpileModule(text, { compilerOptions, fileName });
    return { code: `${GLOBALS} ${outputText}`, map: JSON.parse(sourceMapText) };
  },
};
