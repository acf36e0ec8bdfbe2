// SPDX-License-Identifier: MIT
//
// The built-in modules of Node, without an import that a bundler or a browser would see.

interface Host {
  process?: { getBuiltinModule?: (name: string) => unknown };
}

/** The Node module `name` ('node:fs'), undefined where there is none: browsers, and Node before 20.16. */
export function builtin<T>(name: string): T | undefined {
  const { process } = globalThis as Host;
  return typeof process?.getBuiltinModule === 'function'
    ? (process.getBuiltinModule(name) as T | undefined)
    : undefined;
}
