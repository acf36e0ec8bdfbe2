// SPDX-License-Identifier: MIT
//
// Which functions time goes to, by V8's sampling profiler.

import { Session } from 'node:inspector/promises';

/** Microseconds between samples. */
const INTERVAL = 100;

/** Milliseconds that each function takes by itself while `work` runs: Maps by name, of WebAssembly and of JavaScript. */
export async function selfTimes(work) {
  const session = new Session();
  session.connect();
  await session.post('Profiler.enable');
  await session.post('Profiler.setSamplingInterval', { interval: INTERVAL });
  await session.post('Profiler.start');
  work();
  const { profile } = await session.post('Profiler.stop');
  session.disconnect();
  const functions = new Map(profile.nodes.map(({ id, callFrame }) => [id, callFrame]));
  const [wasm, javascript] = [new Map(), new Map()];
  profile.samples.forEach((id, n) => {
    const { url, functionName } = functions.get(id);
    const times = url.startsWith('wasm:') ? wasm : javascript;
    times.set(functionName, (times.get(functionName) ?? 0) + profile.timeDeltas[n] / 1000);
  });
  return { wasm, javascript };
}
