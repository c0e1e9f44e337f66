// The worker: loads models and runs them, one text at a time. Its other end is sterna.js.

import { openBuild } from './builds.js';
import { download, named } from './download.js';

/** The files of the built-in model, beside this one. */
const BUILT_IN = [
  'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json',
];

/** What a checkpoint directory may have beside the first of these. */
const SIDE_FILES = [
  'config.json', 'tokenizer.json', 'generation_config.json', 'tokenizer_config.json', 'chat_template.jinja',
];

/** The engine for this browser, once it is wanted. */
let build;
/** The last load: how to have the model again. */
let request;
let engine;
/** What there is to tell about its threads. */
let threadNotes = [];
/** Texts that are to end. */
const stopped = new Set();

/** The files of a source, as bytes by name. */
async function filesOf(source, onProgress) {
  if (source.files) {
    const read = async (file) => [file.name, new Uint8Array(await file.arrayBuffer())];
    return Promise.all(source.files.map(read));
  }
  const base = source.builtIn ? new URL('model/', import.meta.url).href : source.url;
  if (source.builtIn) return Promise.all(BUILT_IN.map((name) => named(base, name, onProgress)));
  if (!base.endsWith('/')) {
    const name = decodeURIComponent(new URL(base).pathname.split('/').pop());
    return [[name, await download(base, onProgress)]];
  }
  const sides = SIDE_FILES.map((name) => named(base, name, onProgress, { optional: true }));
  const found = (await Promise.all(sides)).filter((file) => file);
  const index = await named(base, 'model.safetensors.index.json', onProgress, { optional: true });
  if (!index) return [...found, await named(base, 'model.safetensors', onProgress)];
  const shards = new Set(Object.values(JSON.parse(new TextDecoder().decode(index[1])).weight_map ?? {}));
  found.push(index);
  for (const name of shards) found.push(await named(base, String(name), onProgress));
  return found;
}

async function load({ source, device, options }, emit) {
  build ??= openBuild();
  const { wasm: { Engine, Files, resolve }, threads } = await build;
  const onProgress = (progress) => emit('progress', progress);
  const files = new Files();
  for (const [name, bytes] of await filesOf(source, onProgress)) files.add(name, bytes);
  const label = source.builtIn ? 'built-in model' : source.url ?? source.files[0].name;
  const layers = (done, total) => onProgress({ stage: 'layers', done, total });
  engine?.free();
  engine = undefined;
  const chosen = await resolve(device);
  const found = chosen === 'cpu' ? await threads(options.threads) : { notes: [] };
  threadNotes = found.notes;
  const loadOptions = JSON.stringify({ ...options, threads: found.threads });
  engine = await Engine.load(label, files, chosen, loadOptions, layers);
  request = { source, device, options };
  return info();
}

/** What there is to know of the model, with what the browser tells of the GPU. */
async function info() {
  const found = JSON.parse(engine.info());
  found.notes.push(...threadNotes);
  if (!found.device.startsWith('gpu')) return found;
  const adapter = (await navigator.gpu?.requestAdapter())?.info;
  const words = [adapter?.vendor, adapter?.architecture, adapter?.device, adapter?.description].filter(Boolean);
  return words.length > 0 ? { ...found, adapter: words.join(' ') } : found;
}

/** A promise that is kept when other messages have been received. */
function breath() {
  return new Promise((wake) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      wake();
    };
    port2.postMessage(null);
  });
}

async function generate({ prompt, options, cell }, emit, id) {
  if (!engine) {
    await load(request, emit);
    emit('info', await info());
  }
  const isStopped = () => (cell ? Atomics.load(cell, 0) === 1 : stopped.has(id));
  let lastBreath = performance.now();
  const onPiece = (token, text) => {
    emit('piece', { token, text });
    if (cell || performance.now() - lastBreath < 30) return isStopped();
    lastBreath = performance.now();
    return breath().then(isStopped);
  };
  const onPrompt = (done, total) => {
    emit('prompt', { done, total });
    return isStopped();
  };
  const what = typeof prompt === 'string' ? { text: prompt } : { messages: prompt };
  try {
    return JSON.parse(
      await engine.generate(JSON.stringify(what), JSON.stringify(options), onPiece, onPrompt),
    );
  } catch (error) {
    if (error?.code !== 'Gpu' && error?.code !== 'DeviceLost') throw error;
    const why = await cause(error);
    // A device that has failed stays so: the next text has the model on another.
    engine.free();
    engine = undefined;
    throw why;
  } finally {
    stopped.delete(id);
  }
}

/** Why the GPU has failed: that a device is lost is said some time after what failed by it. */
async function cause(error) {
  for (let attempt = 0; error.code === 'Gpu' && attempt < 20; attempt += 1) {
    await new Promise((wake) => setTimeout(wake, 25));
    error = await engine.check().then(() => error, (later) => later);
  }
  return error;
}

async function check() {
  const device = request.device === 'auto' && engine ? JSON.parse(engine.info()).device : request.device;
  const { verify } = (await build).wasm;
  return JSON.parse(await verify(device.replace(/:\d+$/, '')));
}

/** What may be called; the other end calls one at a time. */
const METHODS = { load, generate, verify: check };

self.onmessage = async ({ data: { id, method, args } }) => {
  if (method === 'stop') return stopped.add(id);
  const emit = (event, value) => self.postMessage({ id, event, value });
  try {
    self.postMessage({ id, result: await METHODS[method](args, emit, id) });
  } catch (error) {
    const code = error?.code ?? (error instanceof WebAssembly.RuntimeError ? 'Crashed' : 'Internal');
    self.postMessage({ id, error: { code: String(code), message: error?.message ?? String(error) } });
  }
};
