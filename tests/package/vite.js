// Vite with its default configuration on the folder it is run in: production builds into build-vite/, then a dev
// server. Prints its address; when it is sent a line, prints what Vite complained about until then, and ends.

import { once } from 'node:events';
import { build, createLogger, createServer } from 'vite';

const complaints = [];
const customLogger = createLogger('warn');
for (const kind of ['warn', 'warnOnce', 'error']) customLogger[kind] = (message) => complaints.push(message);

await build({ customLogger, build: { outDir: 'build-vite/app' } });
for (const name of ['theory-only', 'worker-only']) {
  await build({ customLogger, build: { outDir: `build-vite/${name}`, rollupOptions: { input: `${name}.js` } } });
}
const server = await createServer({ customLogger, server: { host: '127.0.0.1' } });
await server.listen();
console.log(JSON.stringify({ address: server.resolvedUrls.local[0] }));

await once(process.stdin, 'data');
await server.close();
console.log(JSON.stringify({ complaints }));
process.exit();
