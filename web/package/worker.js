// The worker: loads models and runs them, one text at a time. Its other end is sterna.js.

import { openedBuild } from './builds.js';
import { checkModel, ofUser, openModel, small } from './download.js';
import { keep, kept } from './measured.js';

/** The files of the built-in model, beside this one. */
const BUILT_IN = [
  'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json',
];

/** Errors of the library for which damage of a file may be the reason. */
const UNREADABLE = new Set([
  'Config', 'Gguf', 'GgufVersion', 'Io', 'Json', 'Metadata', 'MissingTensor', 'NotACheckpoint', 'Safetensors',
  'TensorDtype', 'TensorShape', 'TensorValue', 'Tokenizer', 'UnexpectedTensor', 'UnknownArchitecture',
]);

/** The last load: how to have the model again. */
let request;
let engine;
/** What there is to tell about its threads. */
let threadNotes = [];
/** Texts that are to end. */
const stopped = new Set();

/** The files of a source, until they are closed; see `openModel`. */
async function open(source, onProgress, options) {
  if (source.url) return openModel(source.url, onProgress, options);
  const files = source.builtIn
    ? await small(new URL('model/', import.meta.url), BUILT_IN, onProgress)
    : source.files.map(ofUser);
  return { files, close() {}, isDamaged: async () => false };
}

async function load({ source, device, options, check }, emit) {
  const { wasm: { Engine, Files, measured, remember, resolve }, threads } = await openedBuild();
  const onProgress = (progress) => emit('progress', progress);
  const label = source.builtIn ? 'built-in model' : source.url ?? source.files[0].name;
  const layers = (done, total) => onProgress({ stage: 'layers', done, total });
  engine?.free();
  engine = undefined;
  const before = measured() ?? (await kept());
  if (before !== undefined) remember(before);
  const chosen = await resolve(device);
  const found = chosen === 'cpu' ? await threads(options.threads) : { notes: [] };
  threadNotes = found.notes;
  const loadOptions = JSON.stringify({ ...options, threads: found.threads });
  for (let isRepaired = false; !engine;) {
    const opened = await open(source, onProgress, { check });
    try {
      const files = new Files();
      for (const file of opened.files) files.add(file.name, file);
      engine = await Engine.load(label, files, chosen, loadOptions, layers);
    } catch (error) {
      // What was kept may no longer be what was downloaded.
      if (isRepaired || !UNREADABLE.has(error?.code) || !(await opened.isDamaged())) throw error;
      isRepaired = true;
    } finally {
      opened.close();
    }
  }
  request = { source, device, options };
  const after = measured();
  const problem = after === before ? undefined : await keep(after);
  const loaded = await info();
  if (problem) loaded.notes.push(`what was measured is not kept: ${problem}`);
  return loaded;
}

/** What there is to know of the model, with what the browser tells of the GPU. */
async function info() {
  // WebAssembly's memory never shrinks: this is the most that there was.
  const found = { ...JSON.parse(engine.info()), memoryBytes: (await openedBuild()).memory.buffer.byteLength };
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
  const { verify } = (await openedBuild()).wasm;
  return JSON.parse(await verify(device.replace(/:\d+$/, '')));
}

const checkCached = ({ url }, emit) => checkModel(url, (progress) => emit('progress', progress));

/** What may be called; the other end calls one at a time. */
const METHODS = { load, generate, verify: check, checkCached };

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
