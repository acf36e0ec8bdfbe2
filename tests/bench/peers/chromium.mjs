// SPDX-License-Identifier: MIT
//
// Jobs in headless Chromium, a browser for each, pages from the loopback address. They are not isolated from other origins, as
// on an ordinary static host; everybody has one thread.

import { existsSync, readFileSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import { delimiter, extname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { chromium } from 'playwright-core';

const root = new URL('../../../', import.meta.url);
const folder = '/tests/bench/peers/';
const TYPES = {
  '.html': 'text/html; charset=utf-8',
  '.js': 'text/javascript',
  '.mjs': 'text/javascript',
  '.wasm': 'application/wasm',
};
const PAGE = '<!doctype html><title>peers</title><link rel="icon" href="data:,"><script type="module" src="page.mjs"></script>';

/** CHROMIUM, what `make tools-browser` has found, or one on PATH. */
function findChromium() {
  const names = ['chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'];
  const folders = (process.env.PATH ?? '').split(delimiter);
  const onPath = names.flatMap((name) => folders.map((place) => join(place, name)));
  const places = [process.env.CHROMIUM, fileURLToPath(new URL('.toolchain/chromium', root)), ...onPath];
  const found = places.find((place) => place && existsSync(place));
  if (!found) throw new Error('no Chromium: set CHROMIUM to its path, or run make tools-browser');
  return found;
}

async function serve() {
  const server = createServer(async (request, response) => {
    const { pathname } = new URL(request.url, 'http://localhost');
    if (pathname === folder) {
      response.writeHead(200, { 'content-type': TYPES['.html'] }).end(PAGE);
      return;
    }
    try {
      if (!/^\/(dist|tests\/bench\/peers)\//.test(pathname)) throw new Error(`not served: ${pathname}`);
      const body = await readFile(new URL(`.${pathname}`, root));
      response.writeHead(200, { 'content-type': TYPES[extname(pathname)] ?? 'application/octet-stream' }).end(body);
    } catch {
      response.writeHead(404).end();
    }
  });
  await new Promise((done) => server.listen(0, '127.0.0.1', done));
  return server;
}

function launch() {
  const switches = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run'];
  const quiet = ['--disable-background-networking', '--disable-component-update', '--disable-sync'];
  return chromium.launch({ executablePath: findChromium(), handleSIGTERM: false, args: [...switches, ...quiet] });
}

/** Resident bytes of the browser's largest renderer, now and at most; null where the system has no /proc. */
async function rendererBytes(browser) {
  try {
    const session = await browser.newBrowserCDPSession();
    const { processInfo } = await session.send('SystemInfo.getProcessInfo');
    await session.detach();
    const sizes = processInfo
      .filter(({ type }) => type === 'renderer')
      .map(({ id }) => readFileSync(`/proc/${id}/status`, 'utf8'))
      .map((status) => ({ now: 1024 * /VmRSS:\s+(\d+)/.exec(status)[1], peak: 1024 * /VmHWM:\s+(\d+)/.exec(status)[1] }));
    return sizes.sort((a, b) => b.peak - a.peak)[0] ?? null;
  } catch {
    return null;
  }
}

/** { run(job, milliseconds), version, close }; run gives { result } or { failed, note } like the Node host. */
export async function openChromium() {
  const server = await serve();
  const address = `http://127.0.0.1:${server.address().port}${folder}`;

  async function inBrowser(work) {
    const browser = await launch();
    try {
      return await work(browser);
    } finally {
      await browser.close();
    }
  }

  const run = (job, milliseconds) =>
    inBrowser(async (browser) => {
      let note = null;
      let timer;
      const page = await browser.newPage();
      const died = new Promise((_, fail) => {
        page.on('crash', () => fail(new Error('the page crashed')));
        timer = setTimeout(() => fail(new Error(`no end within ${milliseconds / 1000} s`)), milliseconds);
      });
      died.catch(() => {});
      try {
        await page.exposeFunction('noteJob', (now) => {
          note = now;
        });
        await page.exposeFunction('residentBytes', async () => (await rendererBytes(browser))?.now);
        await page.goto(address);
        await page.waitForFunction(() => globalThis.runJob);
        const answer = await Promise.race([page.evaluate((given) => globalThis.runJob(given), job), died]);
        if (answer.result) answer.result.peakBytes = (await rendererBytes(browser))?.peak;
        return { ...answer, note };
      } catch (error) {
        return { failed: error.message.split('\n')[0], died: true, note };
      } finally {
        clearTimeout(timer);
      }
    });

  const version = await inBrowser((browser) => browser.version());
  return { version: `Chromium ${version}`, run, close: () => server.close() };
}
