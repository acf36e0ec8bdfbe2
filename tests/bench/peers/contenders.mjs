// SPDX-License-Identifier: MIT
//
// Who takes part: this package and its peers, each peer in its ordinary and its expert forms. A contender is named
// 'library form'; the modules load nothing before `open`.

import * as jax from './jax.mjs';
import * as onnxruntime from './onnxruntime.mjs';
import * as ropeAttention from './rope-attention.mjs';
import * as tfjs from './tfjs.mjs';

export const peers = [onnxruntime, tfjs, jax];
export const libraries = Object.fromEntries([ropeAttention, ...peers].map((library) => [library.name, library]));
export const OURS = `${ropeAttention.name} exact`;

export const idOf = (library, form) => `${library} ${form}`;

export function contenderOf(id) {
  const [library, form] = id.split(' ');
  return { id, library, form, ...libraries[library].forms[form] };
}

export const contenders = Object.values(libraries).flatMap(({ name, forms }) =>
  Object.keys(forms).map((form) => contenderOf(idOf(name, form))),
);

export const canRun = ({ passes, minimumHeads = 1 }, pass, heads) => passes.includes(pass) && heads >= minimumHeads;

const opened = new Map();

/** Loads the library on first use. */
export async function prepare(host, id, problem, pass) {
  const { library, form } = contenderOf(id);
  if (!opened.has(library)) opened.set(library, await libraries[library].open(host));
  return libraries[library].prepare(opened.get(library), problem, form, pass);
}

export const openedLibrary = (library) => opened.get(library);
