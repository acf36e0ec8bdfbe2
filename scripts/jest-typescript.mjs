// Jest transform: TypeScript to ES modules by the compiler that builds the package. Types are checked by `make lint`.

import ts from 'typescript';

const compilerOptions = {
  module: ts.ModuleKind.ESNext,
  target: ts.ScriptTarget.ES2022,
  verbatimModuleSyntax: true,
  sourceMap: true,
};

export default {
  process(text, fileName) {
    const { outputText, sourceMapText } = ts.transpileModule(text, { compilerOptions, fileName });
    return { code: outputText, map: JSON.parse(sourceMapText) };
  },
};
