// webpack with its default configuration for production on the folder it is run in: builds into build-webpack/. Prints
// errors and warnings.

import { resolve } from 'node:path';
import webpack from 'webpack';

const configuration = (name) => ({
  mode: 'production',
  entry: `./${name}.js`,
  output: { path: resolve('build-webpack', name) },
});
const compiler = webpack(['app', 'theory-only', 'worker-only'].map(configuration));
const { stats } = await new Promise((done, fail) =>
  compiler.run((error, result) => (error ? fail(error) : done(result))),
);
await new Promise((done) => compiler.close(done));
const list = (kind) =>
  stats.flatMap(({ compilation }) => compilation[kind].map(({ name, message }) => `${name}: ${message}`));
console.log(JSON.stringify({ errors: list('errors'), warnings: list('warnings') }));
