// SPDX-License-Identifier: MIT
//
// The package as it is published: packed, installed without a network in a project of its own (build/package/), and
// used there as users do, without any configuration: from Node, TypeScript, plain modules, Vite and webpack. Every
// consumer, tests/package/, computes the same problem on its thread and in a worker, and is compared with the float64
// reference.

import { afterAll, beforeAll, describe, expect, test } from '@jest/globals';
import { execFile, spawn } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { basename, extname, join, relative, resolve } from 'node:path';
import { createInterface } from 'node:readline';
import { pathToFileURL } from 'node:url';
import { promisify } from 'node:util';
import type { Browser } from 'playwright-core';

import { reference, type BackwardArgs } from '../dist/index.js';
import { openBrowser, openTab, type Site } from './support-page.js';
import { lazy } from './support.js';

const root = resolve('.');
const folder = resolve('build/package');
const app = join(folder, 'app');
const installed = join(app, 'node_modules/rope-attention');

/** Bytes of the tarball and of its content: 404 KB and 1,010 KB with binaries of 130 KB, which may have 160 KB (Makefile). */
const PACKED_LIMIT = 520_000;
const UNPACKED_LIMIT = 1_400_000;

/** What README says that a page has to allow. */
const POLICY = "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'";

/** Every gzipped binary starts with the same bytes, which base64 turns into this. */
const WASM_AS_TEXT = 'H4sIAAAAAAAC';

interface Packed {
  filename: string;
  size: number;
  unpackedSize: number;
  files: { path: string; size: number }[];
}

/** What compute.js makes. */
interface Outcome {
  simd: string;
  output: number[];
  lse: number[];
  dq: number[];
  dk: number[];
  dv: number[];
}

let packed: Packed;
let expected: Omit<Outcome, 'simd'>;
let browser: Browser;

beforeAll(async () => {
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(app, { recursive: true });
  [packed] = JSON.parse(
    await run('npm', ['pack', '--json', '--ignore-scripts', '--pack-destination', folder], root),
  ) as [Packed];
  for (const name of readdirSync('tests/package')) {
    if (!['vite.js', 'webpack.js'].includes(name))
      cpSync(join('tests/package', name), join(app, name), { recursive: true });
  }
  writeFileSync(join(app, 'package.json'), '{ "name": "consumer", "private": true, "type": "module" }\n');
  mkdirSync(join(app, 'public'));
  writeFileSync(join(app, 'public/favicon.ico'), ''); // browsers ask for it
  await run(
    'npm',
    ['install', '--offline', '--ignore-scripts', '--no-audit', '--no-fund', join(folder, packed.filename)],
    app,
  );

  const { backwardArgs } = (await import(pathToFileURL(join(app, 'inputs.js')).href)) as { backwardArgs: BackwardArgs };
  const { dOutput: _, ...forwardArgs } = backwardArgs;
  const values = { ...reference.forward(forwardArgs), ...reference.backward(backwardArgs) };
  expected = Object.fromEntries(Object.entries(values).map(([name, array]) => [name, [...array]])) as typeof expected;
  browser = await openBrowser();
});
afterAll(() => browser?.close());

describe('the tarball', () => {
  test('holds what was built and nothing else', () => {
    const sources = readdirSync('web', { recursive: true, encoding: 'utf8' }).filter((name) => name.endsWith('.ts'));
    const built = sources.flatMap((name) => ['.js', '.d.ts'].map((ending) => `dist/${name.replace(/\.ts$/, ending)}`));
    const binaries = ['dist/rope-attention.wasm', 'dist/rope-attention.relaxed.wasm'];
    const docs = readdirSync('docs').filter((name) => name.endsWith('.md')).map((name) => `docs/${name}`);
    const texts = ['README.md', 'LICENSE', 'CHANGELOG.md', 'src/MATH.md', 'src/rope_attention.h', 'dist/kissfft.COPYING', ...docs];
    expect(packed.files.map(({ path }) => path).sort()).toEqual(
      ['package.json', ...texts, ...built, ...binaries].sort(),
    );
    for (const { path, size } of packed.files) expect(size).toBe(readFileSync(join(installed, path)).length);
  });

  test('carries the licence of what is compiled in', () => {
    const text = readFileSync(join(installed, 'dist/kissfft.COPYING'), 'utf8');
    expect(text).toContain('Mark Borgerding');
    expect(text).toContain('Redistributions in binary form must reproduce the above copyright notice');
  });

  test(`is below ${PACKED_LIMIT / 1000} KB, ${UNPACKED_LIMIT / 1000} KB unpacked`, () => {
    expect(packed.size).toBeLessThan(PACKED_LIMIT);
    expect(packed.unpackedSize).toBeLessThan(UNPACKED_LIMIT);
    expect(packed.unpackedSize).toBeGreaterThan(PACKED_LIMIT); // that is, it was measured
  });

  test('names no folder of the machine it was built on', () => {
    for (const { path } of packed.files)
      expect([path, readFileSync(join(installed, path)).includes(root)]).toEqual([path, false]);
  });

  test('depends on nothing and runs nothing when installed; types come first', () => {
    const manifest = JSON.parse(readFileSync(join(installed, 'package.json'), 'utf8')) as Record<
      string,
      Record<string, object | string>
    >;
    for (const kind of ['dependencies', 'peerDependencies', 'optionalDependencies'])
      expect(manifest[kind]).toBeUndefined();
    for (const script of ['preinstall', 'install', 'postinstall', 'prepare'])
      expect(manifest.scripts).not.toHaveProperty(script);
    const conditions = Object.values(manifest.exports).filter((target) => typeof target === 'object');
    expect(conditions.length).toBeGreaterThan(1);
    for (const target of conditions) expect(Object.keys(target)[0]).toBe('types');
    expect(readdirSync(join(app, 'node_modules')).filter((name) => !name.startsWith('.'))).toEqual(['rope-attention']);
  });
});

describe('Node', () => {
  const versions = [
    ['this Node', process.execPath],
    ['the Node of the benchmarks', resolve('node_modules/node/bin/node')],
  ].filter(([, node]) => existsSync(node));

  describe.each(versions)('%s', (_, node) => {
    test.each(['node.js', 'node.cjs'])('%s', async (name) => {
      const { reference: output, ...outcomes } = JSON.parse(await run(node, [name], app)) as Record<
        'thread' | 'worker',
        Outcome
      > & { reference: number[] };
      expectOutcomes(outcomes, ['thread', 'worker']);
      expect(output).toEqual(expected.output);
    });
  });

  test('importing does nothing', async () => {
    const { atImport, atCreate } = JSON.parse(await run(process.execPath, ['quiet.js'], app)) as Record<
      string,
      string[]
    >;
    expect(atImport).toEqual([]);
    expect(atCreate).toEqual(expect.arrayContaining(['compile', 'validate', 'atob', 'new Worker'])); // the watch works
    expect(atCreate).not.toContain('fetch');
  });

  test('importing works without WebAssembly, where only the reference does', async () => {
    const { refusal, reference: output } = JSON.parse(
      await run(process.execPath, ['no-webassembly.js'], app),
    ) as Record<string, unknown>;
    expect(output).toEqual(expected.output);
    expect(refusal).toMatch(/^Error: createRopeAttention: .*no WebAssembly SIMD/);
  });

  test('subpaths lead to their files, and to no others', async () => {
    const files = {
      '': 'dist/index.js',
      '/worker': 'dist/worker.js',
      '/worker.js': 'dist/worker.js',
      '/rope-attention.wasm': 'dist/rope-attention.wasm',
      '/rope-attention.relaxed.wasm': 'dist/rope-attention.relaxed.wasm',
      '/package.json': 'package.json',
      '/dist/load.js': null,
      '/reference': null,
    };
    const names = Object.keys(files).map((name) => `rope-attention${name}`);
    const found = JSON.parse(await run(process.execPath, ['subpaths.js', ...names], app)) as Record<
      string,
      { address?: string; code?: string; outcome?: Outcome }
    >;
    for (const [name, file] of Object.entries(files)) {
      const { address, code } = found[`rope-attention${name}`];
      if (file === null) expect(code).toBe('ERR_PACKAGE_PATH_NOT_EXPORTED');
      else expect(address).toBe(pathToFileURL(join(installed, file)).href);
      if (file !== null) expect(existsSync(join(installed, file))).toBe(true);
    }
    expectOutcomes({ thread: found['rope-attention/rope-attention.wasm'].outcome }, ['thread']);
  });
});

describe('TypeScript', () => {
  test.each([
    ['node16', 'node16', ['consumer.ts']],
    ['nodenext', 'nodenext', ['consumer.ts', 'consumer.cts']],
    ['esnext', 'bundler', ['consumer.ts']],
  ])('module %s, resolution %s', async (module, moduleResolution, files) => {
    const options = {
      module,
      moduleResolution,
      target: 'es2022',
      strict: true,
      noEmit: true,
      skipLibCheck: false,
      types: [],
    };
    const file = join(app, `types/tsconfig.${module}.json`);
    writeFileSync(file, JSON.stringify({ compilerOptions: options, files }));
    const compiler = resolve('node_modules/typescript/bin/tsc');
    const listed = await run(process.execPath, [compiler, '-p', file, '--listFiles'], app);
    for (const name of ['index.d.ts', 'worker.d.ts']) expect(listed).toContain(join(installed, 'dist', name));
  });
});

describe('plain modules', () => {
  /** As for a page without bundler: the name of the package is replaced by its path. */
  const site = lazy(() => {
    const plain = join(app, 'plain');
    mkdirSync(plain);
    for (const name of ['index.html', 'app.js', 'own-worker.js', 'compute.js', 'inputs.js']) {
      const text = readFileSync(join(app, name), 'utf8');
      writeFileSync(
        join(plain, name),
        text.replace("'rope-attention'", "'../node_modules/rope-attention/dist/index.js'"),
      );
    }
    return app;
  });

  test('run under a strict content security policy', async () => {
    await usePage(await serve(site(), POLICY), 'plain/');
  });

  test('need what the policy allows', async () => {
    const strictest = await serve(site(), POLICY.replace(" 'wasm-unsafe-eval'", ''));
    const { outcome } = await visit(strictest, 'plain/');
    expect(outcome).toEqual({ error: expect.stringMatching(/Content Security Policy/) });
  });

  test('without the worker beside them, say where it should be', async () => {
    const plain = await serve(site(), POLICY);
    const { page, close } = await openTab(browser);
    const asked: string[] = [];
    await page.route('**/worker.js', (route) => {
      asked.push(route.request().url());
      return route.fulfill({ status: 404 });
    });
    await page.goto(`${plain.address}plain/`);
    const { error } = JSON.parse((await page.textContent('output', { timeout: 15_000 }))!) as { error: string };
    await close();
    await plain.close();
    expect(asked.length).toBe(1);
    expect(error).toContain(`the worker ${asked[0]} did not start; the package's export ./worker must be there`);
  });
});

describe('Vite', () => {
  let child: ReturnType<typeof startVite> | undefined;
  const vite = lazy(() => {
    child = startVite();
    const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
    const read = async () =>
      JSON.parse(((await lines.next()) as IteratorYieldResult<string>).value) as {
        address: string;
        complaints: string[];
      };
    return { started: read(), end: () => (child!.stdin.write('\n'), read()) };
  });
  afterAll(() => void child?.kill());

  test('dev server', async () => {
    const requests = await usePage({ address: (await vite().started).address, close: async () => {} });
    // What makes it hard: the package was bundled beforehand, away from its other files
    expect(requests.filter((address) => address.includes('/node_modules/.vite/deps/rope-attention.js'))).not.toEqual(
      [],
    );
  });

  test('build', async () => {
    await vite().started;
    await usePage(await serve(join(app, 'build-vite/app'), POLICY));
  });

  test('leaves out what is not used, and nothing else', async () => {
    await vite().started;
    // Vite also writes the worker, whether the page still starts it or not
    expectShaken('build-vite', /^(index|theory-only|worker-only)-[^/]*\.js$/);
  });

  test('has nothing to complain about', async () => {
    await vite().started;
    expect((await vite().end()).complaints).toEqual([]);
  });
});

/** Webpack remarks on every script of more than 250 KB, and then on how to have smaller ones. */
const SIZE_REMARKS = /^(AssetsOverSizeLimit|EntrypointsOverSizeLimit|RuntimeInLargeChunk|NoAsyncChunks)Warning:/;

describe('webpack', () => {
  const webpack = lazy(async () => {
    const result = JSON.parse(await run(process.execPath, [resolve('tests/package/webpack.js')], app)) as Record<
      'errors' | 'warnings',
      string[]
    >;
    writeFileSync(
      join(app, 'build-webpack/app/index.html'),
      '<!doctype html><body><script src="main.js"></script></body>',
    );
    return result;
  });

  test('build', async () => {
    await webpack();
    await usePage(await serve(join(app, 'build-webpack/app'), POLICY));
  });

  test('has nothing to complain about', async () => {
    const { errors, warnings } = await webpack();
    expect({ errors, warnings: warnings.filter((warning) => !SIZE_REMARKS.test(warning)) }).toEqual({
      errors: [],
      warnings: [],
    });
  });

  test('leaves out what is not used, and nothing else', async () => {
    await webpack();
    expectShaken('build-webpack', /^main\.js$/);
  });
});

// --- Consumers -------------------------------------------------------------------------------------------------------

/** The environment without what Jest, and the npm that may have started it, put there. */
const env = Object.fromEntries(
  Object.entries(process.env).filter(([name]) => !/^(npm_.*|NODE_OPTIONS|NODE_ENV|JEST_.*)$/i.test(name)),
);

/** Standard output of a program, which has to end well and to write no errors or warnings. */
async function run(program: string, args: string[], cwd: string): Promise<string> {
  const { stdout, stderr } = await promisify(execFile)(program, args, { cwd, env, maxBuffer: 2 ** 26 }).catch(
    (error: { stdout?: string; stderr?: string; message: string }) => {
      throw new Error(
        `${basename(program)} ${args.join(' ')}: ${error.message}\n${error.stdout ?? ''}\n${error.stderr ?? ''}`,
      );
    },
  );
  if (program !== 'npm') expect(stderr).toBe(''); // npm remarks on the user's settings
  return stdout;
}

function startVite() {
  return spawn(process.execPath, [resolve('tests/package/vite.js')], {
    cwd: app,
    env,
    stdio: ['pipe', 'pipe', 'inherit'],
  });
}

/** The consumer computed at these places, everywhere what the reference says. */
function expectOutcomes(outcomes: Record<string, Outcome | undefined>, places: string[]): void {
  expect(Object.keys(outcomes).sort()).toEqual([...places].sort());
  for (const place of places) {
    const { simd, ...arrays } = outcomes[place]!;
    expect(['simd128', 'relaxed-simd']).toContain(simd);
    expect(Object.keys(arrays).sort()).toEqual(['dk', 'dq', 'dv', 'lse', 'output']);
    for (const [name, array] of Object.entries(arrays)) {
      expect(array).toBeAllclose(expected[name as keyof typeof expected], {
        rtol: 1e-5,
        atol: 1e-6,
        name: `${place}: ${name}`,
      });
    }
  }
}

/** Files with a content security policy on each (a worker has that of its own file). */
async function serve(files: string, policy: string): Promise<Site> {
  const types: Record<string, string> = { '.html': 'text/html; charset=utf-8', '.js': 'text/javascript' };
  const server = createServer((request, response) => {
    const path = new URL(request.url ?? '/', 'http://localhost').pathname;
    const file = resolve(files, `.${path.endsWith('/') ? `${path}index.html` : path}`);
    const inside = !relative(files, file).startsWith('..');
    if (path === '/favicon.ico') response.writeHead(204).end();
    else if (!inside || !existsSync(file)) response.writeHead(404).end();
    else
      response
        .writeHead(200, { 'content-type': types[extname(file)], 'content-security-policy': policy })
        .end(readFileSync(file));
  });
  await new Promise<void>((done) => server.listen(0, '127.0.0.1', done));
  return {
    address: `http://127.0.0.1:${(server.address() as AddressInfo).port}/`,
    close: async () => void server.close().closeAllConnections(),
  };
}

interface Visit {
  outcome: Record<string, Outcome>;
  complaints: string[];
  requests: string[];
}

/** What the page of app.js shows in the end. */
async function visit(site: Site, path = ''): Promise<Visit> {
  const { page, complaints, requests, close } = await openTab(browser);
  try {
    await page.goto(`${site.address}${path}`);
    const shown = await page.textContent('output', { timeout: 15_000 }).catch((error: Error) => {
      throw new Error([error.message, ...complaints].join('\n'));
    });
    return { outcome: JSON.parse(shown!) as Record<string, Outcome>, complaints, requests };
  } finally {
    await close();
    await site.close();
  }
}

/** The page computes the right numbers everywhere, has no complaint and stays on its host. Returns its requests. */
async function usePage(site: Site, path = ''): Promise<string[]> {
  const { outcome, complaints, requests } = await visit(site, path);
  expect(outcome).not.toHaveProperty('error');
  expectOutcomes(outcome, ['thread', 'worker', 'ownWorker', 'workerOfOwnWorker']);
  expect(complaints).toEqual([]);
  expect(requests.filter((address) => !address.startsWith(site.address))).toEqual([]);
  return requests;
}

/** The pages' scripts: `theory` is without the binaries, the worker (imported for its effect alone) with them. */
function expectShaken(builds: string, entry: RegExp): void {
  const text = (name: string) => {
    const files = readdirSync(join(app, builds, name), { recursive: true, encoding: 'utf8' }).filter((file) =>
      entry.test(basename(file)),
    );
    expect(files).toHaveLength(1);
    return readFileSync(join(app, builds, name, files[0]), 'utf8');
  };
  expect(text('theory-only')).toMatch(/console\.log/);
  expect(text('theory-only').length).toBeLessThan(1000);
  expect(text('worker-only')).toContain(WASM_AS_TEXT);
  expect(text('app')).toContain(WASM_AS_TEXT);
}
