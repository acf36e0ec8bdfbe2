// SPDX-License-Identifier: MIT
//
// Counts the bytes of every WebAssembly memory that libraries make, whichever way they make it. Memories never shrink, so
// what they hold at the end is their peak.

/** To be called before the libraries are loaded. */
export function watchMemories() {
  const memories = new Set();
  const { instantiate, instantiateStreaming, Instance } = WebAssembly;
  const look = (object) => {
    for (const value of Object.values(object ?? {})) if (value instanceof WebAssembly.Memory) memories.add(value);
  };
  const seen = (instance, imports) => {
    look(instance.exports);
    for (const module of Object.values(imports ?? {})) look(module);
  };
  const watched =
    (make) =>
    async (source, imports, ...rest) => {
      const result = await make(source, imports, ...rest);
      seen(result.instance ?? result, imports);
      return result;
    };
  WebAssembly.instantiate = watched(instantiate);
  if (instantiateStreaming) WebAssembly.instantiateStreaming = watched(instantiateStreaming);
  WebAssembly.Instance = new Proxy(Instance, {
    construct(target, [module, imports]) {
      const instance = new target(module, imports);
      seen(instance, imports);
      return instance;
    },
  });
  return { bytes: () => [...memories].reduce((sum, memory) => sum + memory.buffer.byteLength, 0) };
}
