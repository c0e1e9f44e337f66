// The page: a conversation or a text, and what the machine can do.

import { Sterna } from './sterna.js';

const $ = (id) => document.getElementById(id);

/** The loaded model, and what it was loaded from. */
let model;
let source = 'built-in';
/** What has been said: messages of a chat; or one text, whose prompt is the first part. */
let messages = [];
/** How to end what is being written or loaded. */
let abort;
/** `undefined` until it was checked. */
let verified;
/** What "Copy result" copies. */
const result = {};

function say(problem) {
  $('problem').textContent = problem ?? '';
  $('problem').hidden = !problem;
}

/** What a person can do about an error. */
function advice(error) {
  const more = {
    NoAdapter: 'This browser offers no GPU. "Runs on: CPU" works everywhere.',
    DeviceLost: 'The conversation is still here: "Regenerate" loads the model again.',
    ContextFull: 'Begin a new text, or one with fewer words.',
    TooLarge: 'A smaller model fits.',
    NoRoom: 'Delete kept models in the settings, or what other pages keep.',
  }[error.code];
  return more ? `${error.message}. ${more}` : error.message;
}

function showDevice() {
  if (!model) return;
  const { device, description, adapter, kernels } = model.info;
  const check = { true: 'verified', false: 'WRONG RESULTS', undefined: 'not verified yet' }[verified];
  const name = device === 'cpu' ? 'CPU, WebAssembly' : 'GPU, WebGPU';
  $('device').textContent = `${name}: ${adapter ?? description} · ${check}`;
  $('device').title = `${description}; ${kernels}`;
}

function showButtons() {
  const busy = Boolean(abort);
  $('send').disabled = busy || !model;
  $('stop').disabled = !busy;
  $('again').disabled = busy || !model || !messages.some(({ role }) => role === 'user');
  $('clear').disabled = busy || messages.length === 0;
  for (const id of ['load-model', 'verify', 'compare']) $(id).disabled = busy;
}

/** Runs one thing at a time; Stop ends it. */
async function busyWith(work) {
  if (abort) return;
  abort = new AbortController();
  const { signal } = abort;
  say();
  showButtons();
  try {
    await work(signal);
  } catch (error) {
    if (!signal.aborted) say(advice(error));
  } finally {
    abort = undefined;
    showButtons();
  }
}

const mega = (bytes) => (bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`);

function showProgress(progress) {
  const bar = $('load-bar');
  if (progress.stage === 'layers') {
    $('load-text').textContent = `Loading layers: ${progress.done} of ${progress.total}`;
  } else {
    const { stage, file, done, total, secondsLeft } = progress;
    const left = secondsLeft > 1 ? `, ${Math.ceil(secondsLeft)} s left` : '';
    const what = stage === 'check' ? `Checking ${file}` : file;
    $('load-text').textContent = `${what}: ${mega(done)}${total ? ` of ${mega(total)}` : ''}${left}`;
  }
  if (progress.total) [bar.max, bar.value] = [progress.total, progress.done];
  else bar.removeAttribute('value');
}

async function load(signal) {
  $('load').hidden = false;
  $('load-text').textContent = 'Loading';
  try {
    const device = $('run-on').value;
    const loaded = await Sterna.load(source, { device, signal, onProgress: showProgress });
    model?.dispose();
    model = loaded;
    verified = undefined;
  } finally {
    $('load').hidden = true;
    showKept();
  }
  const { info } = model;
  const canChat = info.hasChat;
  $('mode').querySelector('[value=chat]').disabled = !canChat;
  if (!canChat) $('mode').value = 'text';
  const notes = info.notes.map((note) => ` ${note}.`).join('');
  $('about').textContent = `${info.model}: ${info.architecture}, ${info.layers} layers of ${info.hiddenSize}, `
    + `${info.vocabSize} tokens, context ${info.context}; kernels ${info.kernels}; head ${info.head}.${notes}`;
  showDevice();
}

/** A model that is kept, with what can be done with it. */
function keptItem({ url, bytes, complete }) {
  const item = document.createElement('li');
  const button = (text, act) => {
    const made = Object.assign(document.createElement('button'), { type: 'button', textContent: text });
    made.setAttribute('aria-label', `${text} ${url}`);
    made.addEventListener('click', () => {
      $('settings').close();
      busyWith(act);
    });
    return made;
  };
  const buttons = document.createElement('div');
  buttons.className = 'buttons';
  buttons.append(
    button(complete ? 'Load' : 'Continue', (signal) => {
      source = url;
      return load(signal);
    }),
    button('Delete', async () => {
      await Sterna.forget(url);
      await showKept();
    }),
  );
  item.append(`${url}: ${mega(bytes)}${complete ? '' : ', not complete'}`, buttons);
  return item;
}

async function showKept() {
  const kept = await Sterna.cached();
  $('kept').hidden = kept.length === 0;
  $('kept-models').replaceChildren(...kept.map(keptItem));
}

/** The files that were dropped; of a directory, those in it. */
async function droppedFiles(items) {
  const read = (entry) => new Promise((resolve, reject) => entry.file(resolve, reject));
  const inside = async (directory) => {
    const reader = directory.createReader();
    const files = [];
    // It hands out some at a time.
    for (;;) {
      const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (some.length === 0) return files;
      files.push(...(await Promise.all(some.filter((entry) => entry.isFile).map(read))));
    }
  };
  // The items are gone when this function first waits.
  const dropped = [...items].filter(({ kind }) => kind === 'file')
    .map((item) => item.webkitGetAsEntry() ?? item.getAsFile());
  const files = (entry) => (entry instanceof File ? entry : entry.isFile ? read(entry) : inside(entry));
  return (await Promise.all(dropped.map(files))).flat();
}

/** What the model is to be loaded from; `undefined` if that is not said. */
function chosenSource() {
  switch ($('source').value) {
    case 'url': return $('url').value && $('url').reportValidity() ? $('url').value : undefined;
    case 'file': return $('files').files.length > 0 ? [...$('files').files] : undefined;
    default: return 'built-in';
  }
}

function number(id) {
  return $(id).value === '' ? undefined : Number($(id).value);
}

function sampling() {
  return {
    maxTokens: number('max-tokens'),
    temperature: number('temperature'),
    topK: number('top-k') || undefined,
    topP: number('top-p'),
    minP: number('min-p'),
    repetitionPenalty: number('penalty'),
    seed: number('seed') ?? crypto.getRandomValues(new Uint32Array(1))[0],
  };
}

function showMessage({ role, content }) {
  const item = document.createElement('li');
  item.className = role;
  item.textContent = content;
  $('texts').append(item);
  item.scrollIntoView({ block: 'end' });
  return item;
}

/** Writes the answer to the last message, or goes on with the text. */
async function write(signal) {
  const isChat = $('mode').value === 'chat';
  const prompt = isChat ? messages.map(({ role, content }) => ({ role, content })) : messages.map((m) => m.content).join('');
  const answer = { role: isChat ? 'assistant' : 'text', content: '' };
  const item = showMessage(answer);
  item.classList.add('writing');
  const begin = performance.now();
  let [first, count] = [undefined, 0];
  const show = (suffix = '') => {
    const rate = count > 1 ? `${((count - 1) / ((performance.now() - first) / 1000)).toFixed(1)} tokens/s` : '';
    const wait = first ? `first token after ${Math.round(first - begin)} ms` : '';
    $('stats').textContent = [`${count} tokens`, rate, wait, suffix].filter(Boolean).join(' · ');
  };
  const onPrompt = (done, total) => { if (!first) $('stats').textContent = `reading the prompt: ${done} of ${total} tokens`; };
  try {
    const text = model.generate(prompt, { ...sampling(), signal, onPrompt });
    for await (const piece of text) {
      first ??= performance.now();
      count += 1;
      answer.content += piece.text;
      item.append(piece.text);
      const main = document.querySelector('main');
      if (main.scrollHeight - main.scrollTop - main.clientHeight < 120) item.scrollIntoView({ block: 'end' });
      show();
    }
    const { finishReason } = await text.summary;
    show({ stop: '', length: 'the most tokens asked for', context: 'the context is full', abort: 'stopped' }[finishReason]);
  } finally {
    item.classList.remove('writing');
    if (!first) $('stats').textContent = '';
    if (answer.content) messages.push(answer);
    else item.remove();
    showDevice();
  }
}

async function send() {
  const content = $('prompt').value || (messages.length === 0 ? $('prompt').placeholder : '');
  if (content) {
    messages.push({ role: 'user', content });
    showMessage({ role: $('mode').value === 'chat' ? 'user' : 'prompt', content });
    $('prompt').value = '';
  }
  await busyWith(write);
  $('prompt').focus();
}

/** Takes back what came after the last message of the user. */
async function again() {
  while (messages.length > 0 && messages.at(-1).role !== 'user') {
    messages.pop();
    $('texts').lastElementChild?.remove();
  }
  await busyWith(write);
}

function clear() {
  messages = [];
  $('texts').replaceChildren();
  $('stats').textContent = '';
  say();
  showButtons();
  $('prompt').focus();
}

function offerResult() {
  result.page = { agent: navigator.userAgent, threads: navigator.hardwareConcurrency, isolated: crossOriginIsolated };
  result.model = model.info.model;
  $('share').disabled = false;
}

async function verify() {
  $('machine').textContent = 'Verifying every kernel …';
  const found = await model.verify();
  verified = found.passed;
  const checks = found.variants.flatMap((variant) => variant.checks);
  const wrong = checks.filter(({ problem }) => problem);
  const cases = checks.reduce((sum, check) => sum + check.cases, 0);
  $('machine').textContent = found.passed
    ? `Passed: ${cases} cases of ${found.variants.length} variants; integer hash ${found.integerHash}.`
    : `FAILED: ${wrong.map(({ kernel, problem }) => `${kernel}: ${problem}`).join('; ') || 'another integer hash'}. Do not trust this text.`;
  result.verification = found;
  offerResult();
  showDevice();
}

async function compare(signal) {
  $('chart').hidden = true;
  const found = [];
  for (const device of ['cpu', 'gpu']) {
    $('machine').textContent = `Measuring: ${device.toUpperCase()} …`;
    let other;
    try {
      other = await Sterna.load(source, { device, signal });
      found.push(await other.bench());
    } catch (error) {
      if (signal.aborted) throw error;
      found.push({ device, problem: error.message });
    } finally {
      other?.dispose();
    }
  }
  result.comparison = found;
  const most = Math.max(...found.map((bench) => bench.tokensPerSecond ?? 0), 1e-9);
  $('chart').replaceChildren(...found.map((bench) => {
    const row = document.createElement('div');
    row.className = 'bar';
    const name = document.createElement('span');
    name.textContent = bench.device.slice(0, 3).toUpperCase();
    if (bench.problem) {
      row.append(name, bench.problem);
      return row;
    }
    const text = `${bench.tokensPerSecond?.toFixed(1)} tokens/s, prompt ${bench.promptTokensPerSecond?.toFixed(1)} tokens/s`;
    const meter = Object.assign(document.createElement('meter'), { max: most, value: bench.tokensPerSecond ?? 0 });
    meter.setAttribute('aria-label', `${name.textContent}: ${text}`);
    const value = document.createElement('span');
    value.append(meter, text);
    row.append(name, value);
    return row;
  }));
  $('chart').hidden = false;
  $('machine').textContent = 'Greedy text after a short prompt, one model after the other.';
  offerResult();
}

async function share() {
  const text = JSON.stringify(result, null, 2);
  try {
    await navigator.clipboard.writeText(text);
    $('machine').textContent = 'Copied.';
  } catch {
    const link = Object.assign(document.createElement('a'), { download: 'sterna.json' });
    link.href = URL.createObjectURL(new Blob([text], { type: 'application/json' }));
    link.click();
    URL.revokeObjectURL(link.href);
  }
}

function showSourceRows() {
  $('url-row').hidden = $('source').value !== 'url';
  $('file-row').hidden = $('source').value !== 'file';
}

$('composer').addEventListener('submit', (event) => { event.preventDefault(); send(); });
$('prompt').addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!$('send').disabled) send();
});
$('stop').addEventListener('click', () => abort?.abort());
$('again').addEventListener('click', again);
$('clear').addEventListener('click', clear);
$('open-settings').addEventListener('click', () => $('settings').showModal());
$('source').addEventListener('change', showSourceRows);
$('load-model').addEventListener('click', () => {
  source = chosenSource() ?? source;
  busyWith(load);
  $('settings').close();
});
$('verify').addEventListener('click', () => busyWith(verify));
$('compare').addEventListener('click', () => busyWith(compare));
$('share').addEventListener('click', share);
addEventListener('dragover', (event) => event.preventDefault());
addEventListener('drop', (event) => {
  event.preventDefault();
  const dropped = droppedFiles(event.dataTransfer.items);
  busyWith(async (signal) => {
    const files = await dropped;
    if (files.length === 0) return;
    source = files;
    await load(signal);
  });
});

showSourceRows();
navigator.serviceWorker?.register('offline.js', { type: 'module' }).catch((error) => console.warn(error));
await busyWith(load);
$('prompt').focus();
