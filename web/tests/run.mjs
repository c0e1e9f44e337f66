// Runs the checks of web/tests in headless browsers with software WebGPU, then uses the page as a
// person would and takes pictures of it.
//
//   node web/tests/run.mjs PACKAGE OUT STERNA [chromium] [firefox] [chromium-page] [firefox-page]
//
// PACKAGE is the folder that tools/build-web.sh makes, OUT takes pictures and results, STERNA is the
// native program, whose tokens and hash the browsers must have. Needs playwright-core (npm) to be found
// from this folder or in NODE_PATH, and Chromium and Firefox (CHROMIUM, FIREFOX: their programs).
//
// ONLY=NAME runs the checks with that in their name. LARGE=DIRECTORY adds the check "large_model", which
// loads that model under its memory bound and over a cut connection; for the dimensions of BitNet 2B4T:
//
//   sterna-tools synth --shape bitnet-2b4t --out DIRECTORY && cp models/stories/tokenizer.json DIRECTORY
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import http from 'node:http';
import { createRequire } from 'node:module';
import path from 'node:path';

import { usePage } from './page.mjs';

const [packageDir, outDir, sterna, ...asked] = process.argv.slice(2);
if (!sterna) {
  console.error('usage: node run.mjs PACKAGE OUT STERNA [chromium] [firefox] [chromium-page] [firefox-page]');
  process.exit(2);
}
const browsers = asked.length > 0 ? asked : ['chromium', 'firefox', 'chromium-page', 'firefox-page'];
const testsDir = import.meta.dirname ?? path.dirname(new URL(import.meta.url).pathname);
const TIMEOUT_MS = Number(process.env.TIMEOUT_MS ?? 600_000);
fs.mkdirSync(outDir, { recursive: true });

const native = JSON.parse(execFileSync(sterna, ['verify', '--device', 'cpu', '--json'], { maxBuffer: 1 << 26 }));
// ONLY names the checks that run: a part of their names.
const only = process.env.ONLY ?? '';
const expected = { hash: native.integer_hash, tokens: native.generations[0].token_ids, only };
const large = process.env.LARGE;
if (large) {
  const how = ['run', '--model', large, '--device', 'cpu', '--json', '--temp', '0', '--tokens', '5', '--context', '256'];
  const { token_ids: tokens } = JSON.parse(execFileSync(sterna, [...how, 'Once upon a time'], { maxBuffer: 1 << 26 }));
  expected.large = { tokens, bytes: fs.statSync(path.join(large, 'model.safetensors')).size };
}
// The built-in model as a GGUF file.
const gguf = path.join(outDir, 'stories.gguf');
execFileSync(sterna, ['convert', path.join(packageDir, 'model'), gguf, '--force'], { stdio: 'ignore' });

const TYPES = {
  '.html': 'text/html; charset=utf-8', '.js': 'text/javascript', '.css': 'text/css', '.json': 'application/json',
  '.wasm': 'application/wasm', '.svg': 'image/svg+xml', '.webmanifest': 'application/manifest+json',
};

/** Directories that are the built-in model, each for a check of its own, and what is wrong with them. */
const ALIASES = ['cut', 'kept', 'broken', 'damaged', 'ranges', 'room'];
/** Bytes after which an answer from "cut" ends, and the first one from "broken". */
const CUT_BYTES = 900_000;

/** Serves package and checks, as a server on the internet might: it cuts, and it can be gone. */
class Server {
  offline = false;
  /** What is done in the page's worker, as worker.js has it; and a file that is not there. */
  worker = '';
  missing = '';
  /** Of the aliases, the large model, and the GGUF file. */
  requests = [];
  isBroken = true;
  /** Whether the connection of the large model has been cut. */
  isCut = false;
  /** Whether pages may share memory between threads: most servers say nothing about that. */
  isolated = true;
  onResult = () => {};
  onEnd = () => {};

  async start() {
    this.http = http.createServer((request, response) => this.#answer(request, response));
    await new Promise((ready) => this.http.listen(0, '127.0.0.1', ready));
    return `http://127.0.0.1:${this.http.address().port}`;
  }

  async #answer(request, response) {
    const url = new URL(request.url, 'http://localhost');
    if (request.method === 'POST') {
      const chunks = [];
      for await (const chunk of request) chunks.push(chunk);
      const value = JSON.parse(Buffer.concat(chunks).toString() || '{}');
      if (url.pathname === '/tests/result') this.onResult(value);
      if (url.pathname === '/tests/end') this.onEnd(value);
      if (url.pathname === '/tests/mend') this.isBroken = false;
      return response.writeHead(204).end();
    }
    if (this.offline) return request.socket.destroy();
    const headers = this.isolated ? { 'Cross-Origin-Opener-Policy': 'same-origin', 'Cross-Origin-Embedder-Policy': 'require-corp' } : {};
    const json = (value) => response.writeHead(200, { ...headers, 'Content-Type': TYPES['.json'] }).end(JSON.stringify(value));
    if (url.pathname === '/tests/expected.json') return json({ ...expected, isolated: this.isolated });
    let name = decodeURIComponent(url.pathname);
    if (name === '/tests/requests') {
      const of = url.searchParams.get('of');
      return json(this.requests.filter(({ name }) => name === of || (of.endsWith('/') && name.startsWith(of))));
    }
    const [, first] = name.split('/');
    const range = /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? '');
    let [root, rest] = [packageDir, name];
    if (first === 'tests') [root, rest] = [testsDir, name.slice(6)];
    if (ALIASES.includes(first)) rest = name.replace(`/${first}/`, '/model/');
    if (first === 'gguf') [root, rest] = [outDir, name.slice(5)];
    if (first === 'large') [root, rest] = [large, name.slice(6)];
    if (rest.endsWith('/')) rest += 'index.html';
    if (ALIASES.includes(first) || first === 'gguf' || first === 'large') {
      this.requests.push({ name, range: request.headers.range, condition: request.headers['if-range'] });
    }
    if (this.worker && name === '/worker.js' && !url.search) {
      response.writeHead(200, { ...headers, 'Content-Type': TYPES['.js'] });
      return response.end(`import '/tests/worker.js?${this.worker}';`);
    }
    const file = path.join(root, path.normalize(rest));
    if (name === this.missing || !fs.existsSync(file)) return response.writeHead(404, headers).end();
    const { size, mtimeMs } = fs.statSync(file);
    headers['Content-Type'] = TYPES[path.extname(file)] ?? 'application/octet-stream';
    headers.ETag = `"${size}-${Math.round(mtimeMs)}"`;
    headers['Cache-Control'] = 'no-store';
    const start = range ? Number(range[1]) : 0;
    if (range && start >= size) return response.writeHead(416, headers).end();
    const end = Math.min(range?.[2] ? Number(range[2]) : size - 1, size - 1);
    if (range) headers['Content-Range'] = `bytes ${start}-${end}/${size}`;
    headers['Content-Length'] = end + 1 - start;
    const isWeights = file.endsWith('model.safetensors');
    const isResumed = start > 0;
    if (first === 'broken' && isWeights && this.isBroken && isResumed) return request.socket.destroy();
    let limit = Infinity;
    if (isWeights && (first === 'cut' || (first === 'broken' && this.isBroken))) limit = CUT_BYTES;
    if (isWeights && first === 'large' && !this.isCut) {
      this.isCut = true;
      limit = Math.floor(size / 2);
    }
    response.writeHead(range ? 206 : 200, headers);
    if (size === 0) return response.end();
    const last = Math.min(end, start + limit - 1);
    const stream = fs.createReadStream(file, { start, end: last });
    stream.pipe(response, { end: last === end });
    if (last !== end) stream.on('end', () => response.write('', () => request.socket.destroySoon()));
    response.on('close', () => stream.destroy());
  }
}

const { chromium, firefox } = createRequire(path.join(testsDir, 'run.mjs'))('playwright-core');

/** How each browser starts, with a software adapter. */
const LAUNCH = {
  chromium: () => chromium.launch({
    executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
    headless: true,
    chromiumSandbox: false,
    args: [
      '--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader', '--disable-quic', '--no-first-run',
      '--disable-background-networking', '--disable-component-update', '--disable-sync',
    ],
  }),
  firefox: () => firefox.launch({
    executablePath: process.env.FIREFOX ?? '/usr/bin/firefox-esr',
    // The Firefox that people have, not one that was made for tests.
    channel: 'moz-firefox',
    headless: true,
    firefoxUserPrefs: { 'dom.webgpu.enabled': true, 'gfx.webgpu.ignore-blocklist': true, 'dom.webgpu.service-workers.enabled': true },
  }),
};

/** Colour schemes that each can be told to prefer; ESR's is that of its settings. */
const SCHEMES = { chromium: ['light', 'dark'], firefox: ['light'] };

/** Runs the checks in a browser, in an isolated page and in another; returns how many failed. */
async function check(name) {
  const browser = await LAUNCH[name]();
  const failed = (await checkPage(name, browser, true)) + (await checkPage(`${name}-not-isolated`, browser, false));
  await browser.close();
  return failed;
}

async function checkPage(name, browser, isolated) {
  const server = new Server();
  server.isolated = isolated;
  const origin = await server.start();
  const results = [];
  let failed = 0;
  server.onResult = (result) => {
    results.push(result);
    count += 1;
    if (result.problem) failed += 1;
    const found = result.found ? ` ${JSON.stringify(result.found).slice(0, 400)}` : '';
    console.log(`${name} ${result.problem ? 'FAILED' : 'ok'} ${result.name} (${result.ms} ms)${result.problem ? ` ${result.problem}` : found}`);
  };
  let timer;
  const ended = new Promise((resolve, reject) => {
    server.onEnd = ({ problem }) => (problem ? reject(new Error(problem)) : resolve());
    timer = setTimeout(() => reject(new Error(`no end after ${TIMEOUT_MS} ms`)), TIMEOUT_MS);
  });
  const page = await browser.newPage();
  page.on('console', (message) => console.log(`[${name} ${message.type()}] ${message.text()}`));
  page.on('pageerror', (error) => console.log(`[${name} error] ${error}`));
  try {
    await page.goto(`${origin}/tests/`);
    await ended;
    // ONLY may name what runs in one kind of page.
    if (results.length === 0 && !only) throw new Error('no check has run');
  } catch (error) {
    failed += 1;
    console.log(`${name} FAILED ${error.message}`);
  } finally {
    clearTimeout(timer);
    await page.close();
    server.http.closeAllConnections();
    server.http.close();
    fs.writeFileSync(path.join(outDir, `${name}.json`), JSON.stringify(results, null, 2));
  }
  return failed;
}

let failed = 0;
/** Checks that have run. */
let count = 0;
for (const name of ['chromium', 'firefox']) {
  if (browsers.includes(name)) failed += await check(name);
  if (browsers.includes(`${name}-page`) && 'page'.includes(only)) {
    const browser = await LAUNCH[name]();
    failed += await usePage(`${name}-page`, browser, SCHEMES[name], new Server(), outDir);
    count += 1;
    await browser.close();
  }
}
if (count === 0) {
  failed += 1;
  console.log(`FAILED no check is called ${only}`);
}
console.log(failed === 0 ? 'passed' : `${failed} failed`);
process.exit(failed === 0 ? 0 : 1);
