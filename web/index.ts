// SPDX-License-Identifier: MIT
//
// The package's front door. Importing it does nothing: no fetch, no compilation, no worker.

export { createRopeAttention } from './attention.js';
export { createRopeAttentionWorker } from './worker-client.js';
export { mergeStates } from './merge.js';
export { gradientParts } from './gradient-parts.js';
export { reference } from './reference.js';
export { rotaryFrequencies } from './scaling.js';
export * as theory from './theory.js';
export type {
  ReferenceBackward,
  ReferenceBackwardArgs,
  ReferenceForward,
  ReferenceForwardArgs,
  ReferenceLoss,
  ReferenceLossArgs,
  ReferenceRotateArgs,
} from './reference.js';
export type { GradientMatrices, GradientParts, GradientPartsArgs, LowRank } from './gradient-parts.js';
export type { MergeOptions } from './merge.js';
export type { RotaryFrequencies, RotaryFrequenciesArgs } from './scaling.js';
export type * from './types.js';
