// The same package from CommonJS, which may require ES modules under nodenext.

// eslint-disable-next-line @typescript-eslint/no-require-imports
import rope = require('rope-attention');

async function use(): Promise<Float32Array> {
  const attention = await rope.createRopeAttention();
  // @ts-expect-error: x is missing
  attention.rotate({ shape: { heads: 1, queryLength: 1, headDim: 2 } });
  return attention.rotate({ x: new Float32Array(2), shape: { heads: 1, queryLength: 1, headDim: 2 } });
}

export = use;
