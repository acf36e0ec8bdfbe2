// serve.mjs PORT: serves build/demo on this machine only, says where, and opens a browser if there is a desktop.

import { spawn } from 'node:child_process';
import { preview } from 'vite';

const port = Number(process.argv[2]);
if (!Number.isInteger(port) || port < 1 || port > 65535) {
  console.error(`PORT must be 1 to 65535, got ${process.argv[2]}`);
  process.exit(1);
}

try {
  await preview({ configFile: 'vite.config.js', logLevel: 'warn', preview: { host: '127.0.0.1', port, strictPort: true } });
} catch (error) {
  const taken = /already in use/.test(error.message);
  console.error(taken ? `Port ${port} is in use. Try another: make demo PORT=${port < 65535 ? port + 1 : 8080}` : error);
  process.exit(1);
}

const address = `http://127.0.0.1:${port}/`;
console.log(`Demo on ${address} (Ctrl-C stops it)`);

const desktop = process.platform === 'linux' ? process.env.DISPLAY || process.env.WAYLAND_DISPLAY : !process.env.CI;
const opener = { linux: ['xdg-open'], darwin: ['open'], win32: ['cmd', '/c', 'start'] }[process.platform];
if (desktop && opener) {
  const [command, ...first] = opener;
  spawn(command, [...first, address], { stdio: 'ignore', detached: true }).on('error', () => {}).unref();
}
