// SPDX-License-Identifier: MIT
//
// The engines alone, without what a call has around them: copies, planning (which also finds means), checks of errors.

import { readFileSync } from 'node:fs';

import { Kernel } from '../../../dist/kernel.js';
import { readCall } from '../../../dist/validate.js';

/**
 * Both passes of an engine as functions that run all of it, on arrays that are there already.
 *
 * @param call the arguments of `backward`, with output and lse.
 * @param degree null: exact. The polynomial is that of Taylor, as dear as any.
 */
export async function enginesAlone(binary, call, degree) {
  const kernel = await Kernel.create('bench', await WebAssembly.compile(readFileSync(binary)), 2 ** 32);
  const { problem, inputs } = readCall('backward', call);
  const session = kernel.open('bench', problem);
  const workspace = Math.max(...['forward', 'backward'].map((pass) => session.workspaceBytes(pass, degree)));
  session.load(inputs, 'backward', workspace);
  session.setWorkspace(workspace);
  const taylor = [1];
  for (let m = 1; m <= (degree ?? 0); m++) taylor.push(taylor[m - 1] / m);
  const heads = problem.batch * problem.kvHeads;
  session.setEngine(degree, Float32Array.from({ length: heads * taylor.length }, (_, n) => taylor[n % taylor.length]));
  if (degree !== null) session.prepareAll(); // means are there, as planning leaves them
  const whole = (pass) => () => session.run(pass, 0, session.units(pass));
  return { forward: whole('forward'), backward: whole('backward') };
}
