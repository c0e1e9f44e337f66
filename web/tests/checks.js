// What must hold in every browser. Runs in a page beside the package; run.mjs says what is expected.

import { Sterna } from '/sterna.js';

const PROMPT = 'Once upon a time';
/** Tokens of texts that a software GPU writes, where another check has seen them all. */
const FEW = 16;
const worker = (how) => new URL(`/tests/worker.js?${how}`, location.href);

function equal(found, expected, what) {
  const [a, b] = [found, expected].map((value) => JSON.stringify(value));
  if (a !== b) throw new Error(`${what}: expected ${b}, found ${a}`);
}

/** The code that a promise is rejected with. */
async function codeOf(promise) {
  try {
    await promise;
  } catch (error) {
    return error.code ?? error.name;
  }
  return 'none';
}

async function tokens(model, options) {
  const found = [];
  for await (const { token } of model.generate(PROMPT, options)) found.push(token);
  return found;
}

/** The files of the built-in model, some with other text. */
async function builtInFiles(changes = {}) {
  const names = ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json'];
  return Promise.all(names.map(async (name) => {
    const response = await fetch(`/model/${name}`);
    const bytes = changes[name] ? changes[name](await response.text()) : await response.arrayBuffer();
    return new File([bytes], name);
  }));
}

/** That the model can chat, of a kind. */
const CHATS = {
  'tokenizer_config.json': (text) => {
    const template = '{% for message in messages %}{{ message.content }} {% endfor %}';
    return JSON.stringify({ ...JSON.parse(text), chat_template: template });
  },
};

async function withModel(options, run) {
  const model = await Sterna.load(options.source ?? 'built-in', options);
  try {
    return await run(model);
  } finally {
    model.dispose();
  }
}

/** Models that several checks use. */
const models = new Map();

function shared(device) {
  if (!models.has(device)) models.set(device, Sterna.load('built-in', { device }));
  return models.get(device);
}

/** The checks by name; each returns what is worth a line. */
export const CHECKS = {
  async isolated({ expected }) {
    equal(crossOriginIsolated, expected.isolated, 'crossOriginIsolated');
  },

  async gpu_generates_the_native_tokens({ expected }) {
    const model = await shared('gpu');
    equal(model.info.device, 'gpu:0', 'device');
    const begin = performance.now();
    // All of the text once: a page that is not isolated has another engine, and the same kernels.
    const maxTokens = expected.isolated ? expected.tokens.length : FEW;
    equal(await tokens(model, { maxTokens }), expected.tokens.slice(0, maxTokens), 'tokens');
    const again = model.generate(PROMPT, { maxTokens: FEW });
    const { generatedTokens, tokensPerSecond } = await again.summary;
    return { info: model.info, ms: performance.now() - begin, generatedTokens, tokensPerSecond };
  },

  async wasm_generates_the_native_tokens({ expected }) {
    const model = await shared('cpu');
    equal(model.info.device, 'cpu', 'device');
    equal(await tokens(model, { maxTokens: expected.tokens.length }), expected.tokens, 'tokens');
    const { tokensPerSecond } = await model.generate(PROMPT, { maxTokens: 100 }).summary;
    return { description: model.info.description, tokensPerSecond };
  },

  async gpu_verifies({ expected }) {
    const model = await shared('gpu');
    const begin = performance.now();
    const { passed, integerHash, variants } = await model.verify();
    for (const { variant, checks, integerHash: found } of variants) {
      const wrong = checks.filter(({ problem }) => problem);
      equal(wrong, [], variant);
      equal(found, expected.hash, variant);
    }
    equal([passed, integerHash], [true, expected.hash], 'verdict');
    return { variants: variants.length, ms: performance.now() - begin };
  },

  async wasm_verifies({ expected }) {
    const model = await shared('cpu');
    const { passed, variants } = await model.verify();
    equal([passed, ...variants.map((v) => v.integerHash)], [true, ...variants.map(() => expected.hash)], 'verdict');
    return variants.map(({ variant }) => variant);
  },

  async threads_generate_the_native_tokens({ expected }) {
    const found = {};
    for (const threads of [1, 2, 3]) {
      await withModel({ device: 'cpu', threads }, async (model) => {
        const what = `WebAssembly relaxed SIMD, ${threads} thread${threads === 1 ? '' : 's'}`;
        equal([model.info.description, model.info.notes], [what, []], 'description and notes');
        equal(await tokens(model, { maxTokens: expected.tokens.length }), expected.tokens, 'tokens');
        found[threads] = (await model.generate(PROMPT, { maxTokens: 100 }).summary).tokensPerSecond;
      });
    }
    equal(await codeOf(Sterna.load('built-in', { device: 'cpu', threads: 0 })), 'Threads', 'no threads');
    return found;
  },

  async threads_that_do_not_start_are_said_and_not_waited_for({ expected }) {
    const options = { device: 'cpu', threads: 3, worker: worker('helpers-fail') };
    await withModel(options, async (model) => {
      equal(model.info.description, 'WebAssembly relaxed SIMD, 2 threads', 'description');
      const [note, ...more] = model.info.notes;
      if (!note?.startsWith('2 of 3 threads: ') || more.length > 0) throw new Error(`notes: ${model.info.notes}`);
      equal(await tokens(model, { maxTokens: 20 }), expected.tokens.slice(0, 20), 'tokens');
    });
  },

  async a_crashed_thread_ends_the_engine() {
    await withModel({ device: 'cpu', threads: 2, worker: worker('helpers-crash') }, async (model) => {
      const crash = new BroadcastChannel('sterna-test');
      const text = model.generate(PROMPT, { maxTokens: 2000 });
      const code = await codeOf((async () => {
        let count = 0;
        for await (const _ of text) if (++count === 3) crash.postMessage('crash');
      })());
      crash.close();
      equal(code, 'Crashed', 'code');
    });
  },

  async threads_end_with_their_model() {
    // The helpers of this worker hold locks as long as they live.
    const alive = async () => (await navigator.locks.query()).held.filter(({ name }) => name === 'sterna-helper').length;
    const model = await Sterna.load('built-in', { device: 'cpu', threads: 3, worker: worker('helpers-lock') });
    equal([model.info.notes, await alive()], [[], 2], 'notes and helpers');
    model.dispose();
    const end = performance.now() + 10_000;
    while ((await alive()) > 0) {
      if (performance.now() > end) throw new Error(`${await alive()} helpers live on`);
      await new Promise((wake) => setTimeout(wake, 50));
    }
  },

  async without_isolation_there_is_one_thread({ expected }) {
    await withModel({ device: 'cpu', threads: 2 }, async (model) => {
      equal(model.info.description, 'WebAssembly SIMD, 1 thread', 'description');
      equal(model.info.notes, ['one thread and no relaxed SIMD: the page is not cross-origin isolated'], 'notes');
      equal(await tokens(model, { maxTokens: 20 }), expected.tokens.slice(0, 20), 'tokens');
    });
  },

  async texts_are_drawn_as_the_seed_says() {
    const model = await shared('gpu');
    const options = { maxTokens: 12, temperature: 0.9, topP: 0.9, seed: 7 };
    const first = await tokens(model, options);
    equal(await tokens(model, options), first, 'the same seed');
    const other = await tokens(model, { ...options, seed: 8 });
    if (JSON.stringify(other) === JSON.stringify(first)) throw new Error('another seed: the same text');
  },

  async texts_are_aborted() {
    for (const device of ['gpu', 'cpu']) {
      const model = await shared(device);
      const abort = new AbortController();
      const text = model.generate(PROMPT, { maxTokens: 400, signal: abort.signal });
      let count = 0;
      for await (const _ of text) if (++count === 5) abort.abort();
      const { finishReason, generatedTokens } = await text.summary;
      equal(finishReason, 'abort', device);
      if (generatedTokens > 100) throw new Error(`${device}: ${generatedTokens} tokens after an abort at 5`);
      // A loop that is left ends its text, and the next one can begin.
      for await (const _ of model.generate(PROMPT, { maxTokens: 400 })) break;
      equal((await tokens(model, { maxTokens: 3 })).length, 3, 'the text after it');
    }
  },

  async loads_are_aborted() {
    const abort = new AbortController();
    const load = Sterna.load('built-in', { signal: abort.signal, onProgress: () => abort.abort() });
    equal(await codeOf(load), 20, 'code'); // DOMException.ABORT_ERR
  },

  async errors_have_codes() {
    equal(await codeOf(Sterna.load('built-in', { device: 'cuda' })), 'UnknownDevice', 'device');
    equal(await codeOf(Sterna.load('/nothing.gguf')), 'Download', 'no such file');
    const file = new File([new Uint8Array(64)], 'model.gguf');
    equal(await codeOf(Sterna.load(file)), 'Gguf', 'a file of zeros');
    await withModel({ device: 'cpu' }, async (model) => {
      equal(await codeOf(model.generate([{ role: 'user', content: 'Hello' }]).summary), 'NoChatTemplate', 'chat');
      equal(await codeOf(model.generate(PROMPT, { temperature: -1 }).summary), 'Sampling', 'temperature');
      equal(await codeOf(model.generate(PROMPT, { heat: 1 }).summary), 'InvalidOptions', 'unknown option');
      const first = model.generate(PROMPT, { maxTokens: 50 });
      equal(await codeOf(model.generate(PROMPT).summary), 'Busy', 'two texts');
      await first.summary;
      model.dispose();
      equal(await codeOf(model.generate(PROMPT).summary), 'Disposed', 'after dispose');
    });
  },

  async a_conversation_outlives_its_device({ expected }) {
    const options = { device: 'gpu', source: await builtInFiles(CHATS), worker: worker('destroys') };
    return withModel(options, async (model) => {
      const asked = [PROMPT, 'One day she', 'In the end'];
      let messages;
      const ask = async (turn) => {
        messages.push({ role: 'user', content: asked[turn] });
        const answer = { role: 'assistant', content: '', tokens: [] };
        for await (const { token, text } of model.generate(messages.map(({ role, content }) => ({ role, content })), { maxTokens: 6 })) {
          answer.tokens.push(token);
          answer.content += text;
        }
        messages.push(answer);
        return answer.tokens;
      };
      messages = [];
      const undisturbed = [await ask(0), await ask(1), await ask(2)];
      messages = [];
      equal([await ask(0), await ask(1)], undisturbed.slice(0, 2), 'the same conversation again');
      const destroy = new BroadcastChannel('sterna-test');
      const code = await codeOf((async () => {
        let count = 0;
        for await (const _ of model.generate('A long story', { maxTokens: 400 })) if (++count === 3) destroy.postMessage('destroy');
      })());
      destroy.close();
      equal(code, 'DeviceLost', 'code');
      equal(await ask(2), undisturbed[2], 'after the loss');
      equal(model.info.device, 'gpu:0', 'device');
      equal(await tokens(model, { maxTokens: 5 }), expected.tokens.slice(0, 5), 'another text');
    });
  },

  async kernels_are_measured_and_remembered({ expected }) {
    const load = (use) => withModel({ device: 'gpu', worker: worker('unknown-gpu') }, use);
    const cache = await caches.open('measured-by-sterna');
    const put = (text) => cache.put('/measured.json', new Response(text));
    const says = (model, words) => model.info.notes.some((note) => words.test(note));
    try {
      await put('{"key": "of nobody"}');
      const found = await load(async (model) => {
        equal([says(model, /not used/), says(model, /^tuned \d+ matrix steps for tests/)], [true, true], 'notes');
        return model.info.notes;
      });
      // What a longer race might have found, as a later visit finds it.
      const kept = await (await cache.match('/measured.json')).json();
      equal(kept.key.adapter, 'tests', 'adapter');
      const plan = { variant: 'bit_serial', slices: 4, rows: 32, unroll: 1, fused: false };
      const steps = ['qkv 512x256 heads 4/2x64 norm', 'o 256x256 norm', 'gate_up 1536x256 relu2 norm', 'down 256x768 norm'];
      const few = { rows: 32, tokens: 8 };
      kept.plans = Object.fromEntries(steps.map((step) => [step, plan]));
      kept.gemms = { 'gemm_planes 1536x256': few, 'gemm_i2 1536x256': few };
      await put(JSON.stringify(kept));
      return await load(async (model) => {
        equal(model.info.notes, [], 'notes of the second load');
        equal(model.info.kernels, 'gemv_planes (split, 4 slices)', 'kernels');
        equal(await tokens(model, { maxTokens: 5 }), expected.tokens.slice(0, 5), 'tokens');
        return found;
      });
    } finally {
      await cache.delete('/measured.json');
    }
  },

  async without_webgpu_the_wasm_takes_over({ expected }) {
    return withModel({ device: 'auto', worker: worker('no-gpu') }, async (model) => {
      equal(model.info.device, 'cpu', 'device');
      equal(await tokens(model, { maxTokens: 5 }), expected.tokens.slice(0, 5), 'tokens');
      equal(await codeOf(Sterna.load('built-in', { device: 'gpu', worker: worker('no-gpu') })), 'NoAdapter', 'gpu');
    });
  },

  async files_and_urls_are_loaded({ expected }) {
    for (const source of [await builtInFiles(), '/model/', new URL('/model/', location.href)]) {
      await withModel({ source, device: 'cpu' }, async (model) => {
        equal(await tokens(model, { maxTokens: 5 }), expected.tokens.slice(0, 5), 'tokens');
      });
    }
  },

  async gguf_files_give_the_same_tokens({ expected }) {
    const file = new File([await (await fetch('/gguf/stories.gguf')).arrayBuffer()], 'stories.gguf');
    for (const [device, source] of [['cpu', file], ['cpu', '/gguf/stories.gguf'], ['gpu', file]]) {
      await withModel({ source, device }, async (model) => {
        const maxTokens = device === 'cpu' ? expected.tokens.length : FEW;
        equal(await tokens(model, { maxTokens }), expected.tokens.slice(0, maxTokens), device);
      });
    }
  },

  async cut_downloads_are_resumed({ expected }) {
    // The server ends each answer of this directory early.
    let last = 0;
    const onProgress = ({ stage, file, done }) => {
      if (stage !== 'download' || file !== 'model.safetensors') return;
      if (done < last) throw new Error(`began again at ${last}`);
      last = done;
    };
    await withModel({ source: '/cut/', device: 'cpu', onProgress }, async (model) => {
      equal(await tokens(model, { maxTokens: 5 }), expected.tokens.slice(0, 5), 'tokens');
    });
    const asked = (await requests('/cut/model.safetensors')).map(({ range }) => range ?? '');
    // What had come of an answer may be lost with its connection.
    if (!asked.some((range) => isRest(range, 900_000))) throw new Error(`nothing was resumed: ${asked}`);
    return asked;
  },

  async downloads_are_kept_listed_and_deleted({ expected }) {
    const source = new URL('/kept/', location.href).href;
    const load = () => withModel({ source, device: 'cpu' }, async (model) => {
      equal(await tokens(model, { maxTokens: 5 }), expected.tokens.slice(0, 5), 'tokens');
    });
    const entry = async () => (await Sterna.cached()).find(({ url }) => url === source);
    await load();
    const { length } = await requests('/kept/');
    await load();
    equal((await requests('/kept/')).length, length, 'requests of a second load');
    const { bytes, complete, when } = await entry();
    equal([complete, bytes > 1_000_000, Date.now() - when < 600_000], [true, true, true], 'the entry');
    equal(await Sterna.check(source), true, 'the check');
    equal(await Sterna.forget('/kept/'), true, 'deleted');
    equal([await Sterna.forget(source), await entry()], [false, undefined], 'after that');
    await load();
    equal((await requests('/kept/')).length, 2 * length, 'requests of a load after that');
  },

  async a_failed_download_goes_on_in_the_next_load({ expected }) {
    const options = { source: '/broken/', device: 'cpu' };
    equal(await codeOf(Sterna.load(options.source, options)), 'Download', 'the connection fails');
    const [{ complete, bytes }] = (await Sterna.cached()).filter(({ url }) => url.endsWith('/broken/'));
    equal([complete, bytes > 0], [false, true], 'what is there');
    equal(await Sterna.check(options.source), false, 'the check');
    await fetch('/tests/mend', { method: 'POST' });
    const before = (await requests('/broken/model.safetensors')).length;
    await withModel(options, async (model) => {
      equal(await tokens(model, { maxTokens: 5 }), expected.tokens.slice(0, 5), 'tokens');
    });
    const asked = (await requests('/broken/model.safetensors')).slice(before);
    const ranges = asked.map(({ range }) => range ?? '');
    equal(ranges.every((range) => isRest(range, 900_000)), true, `asked for the rest alone (${ranges})`);
    if (!asked[0].condition) throw new Error('nothing says which version the rest is to be of');
  },

  async damage_is_found_and_downloaded_again({ expected }) {
    const source = new URL('/damaged/', location.href).href;
    const load = (options) => withModel({ source, device: 'cpu', ...options }, async (model) => {
      equal(await tokens(model, { maxTokens: 5 }), expected.tokens.slice(0, 5), 'tokens');
    });
    await load();
    const asked = async () => (await requests('/damaged/')).map(({ name }) => name.slice(9));
    const first = await asked();
    // A weight that is another one, which only the checksum tells.
    await damage(source, 'model.safetensors', 500_000);
    await load({ check: true });
    equal((await asked()).slice(first.length), ['model.safetensors'], 'what was downloaded again');
    // A header that cannot be read, which the load itself finds; and a file that is too short.
    await damage(source, 'model.safetensors', 0);
    await load();
    await damage(source, 'tokenizer.json', 100, 100);
    await load();
    equal((await asked()).slice(first.length + 1), ['model.safetensors', 'tokenizer.json'], 'and again');
    await damage(source, 'model.safetensors', 500_000);
    equal([await Sterna.check(source), await Sterna.check(source)], [false, false], 'checks');
    await load();
    equal(await Sterna.check(source), true, 'the check of what is whole again');
  },

  async without_storage_the_server_is_read_in_ranges({ expected }) {
    for (const [how, source] of [['no-storage', '/ranges/'], ['no-room', '/room/']]) {
      await withModel({ source, device: 'cpu', worker: worker(how) }, async (model) => {
        equal(await tokens(model, { maxTokens: 5 }), expected.tokens.slice(0, 5), how);
      });
      const kept = (await Sterna.cached()).filter(({ url, bytes }) => url.endsWith(source) && bytes > 0);
      equal(kept, [], 'what is kept');
      const asked = await requests(`${source}model.safetensors`);
      if (!asked.some(({ range }) => /^bytes=[1-9]\d*-\d+$/.test(range))) throw new Error(`${how}: no ranges`);
    }
  },

  async large_model({ expected }) {
    if (!expected.large) return 'skipped: LARGE names no model';
    const found = { bytes: expected.large.bytes };
    let last = 0;
    const onProgress = ({ stage, file, done, total, secondsLeft }) => {
      if (stage !== 'download' || file !== 'model.safetensors') return;
      if (done < last) throw new Error(`began again at ${last}`);
      if (total !== expected.large.bytes || !(secondsLeft >= 0)) throw new Error(`${total} bytes, ${secondsLeft} s left`);
      last = done;
    };
    await Sterna.forget('/large/');
    for (const pass of ['first', 'second']) {
      const begin = performance.now();
      await withModel({ source: '/large/', device: 'gpu', context: 256, onProgress }, async (model) => {
        const loadSeconds = (performance.now() - begin) / 1000;
        const { memoryBytes, adapter } = model.info;
        if (memoryBytes >= 512 << 20) throw new Error(`${memoryBytes} bytes of memory`);
        const text = model.generate(PROMPT, { maxTokens: expected.large.tokens.length });
        const made = [];
        for await (const { token } of text) made.push(token);
        equal(made, expected.large.tokens, `tokens of the ${pass} load`);
        const { timeToFirstTokenMs, tokensPerSecond } = await text.summary;
        found[pass] = { loadSeconds, memoryBytes, adapter, timeToFirstTokenMs, tokensPerSecond, tokens: made };
      });
      const asked = (await requests('/large/model.safetensors')).map(({ range }) => range ?? '');
      const isResumed = isRest(asked[1] ?? '', expected.large.bytes / 2);
      equal([asked.length, asked[0], isResumed], [2, '', true], `${asked}: ranges after the ${pass} load`);
      found.ranges = asked;
    }
    await Sterna.forget('/large/');
    return found;
  },
};

/** What the server was asked for: a file, or all of a directory. */
async function requests(of) {
  return (await fetch(`/tests/requests?of=${encodeURIComponent(of)}`)).json();
}

/** Whether a range is the rest of a file of which no more than `most` bytes have come. */
function isRest(range, most) {
  const first = Number(/^bytes=(\d+)-$/.exec(range)?.[1] ?? 0);
  return first > 0 && first <= most;
}

/** Overwrites bytes of a kept file, or cuts it. */
async function damage(url, name, at, length) {
  const models = await (await navigator.storage.getDirectory()).getDirectoryHandle('sterna-models');
  for await (const directory of models.values()) {
    const record = JSON.parse(await (await (await directory.getFileHandle('record.json')).getFile()).text());
    if (record.url !== url) continue;
    const index = record.files.findIndex((file) => file.name === name);
    const file = await (await directory.getFileHandle(String(index))).createWritable({ keepExistingData: true });
    if (length !== undefined) await file.truncate(length);
    else await file.write({ type: 'write', position: at, data: new Uint8Array([255, 254, 253, 252, 251, 250, 249, 248]) });
    return file.close();
  }
  throw new Error(`${url} is not kept`);
}
/** Checks that an isolated page does not pass. */
const NOT_ISOLATED = ['without_isolation_there_is_one_thread'];

/** Of the others, those that run in a page that is not isolated as well: what its engine computes. */
const BOTH = [
  'isolated', 'gpu_generates_the_native_tokens', 'wasm_generates_the_native_tokens', 'wasm_verifies', 'texts_are_aborted',
];

/** Runs the checks and reports each. */
export async function run(expected, report) {
  const wanted = (name) => name.includes(expected.only)
    && (expected.isolated ? !NOT_ISOLATED.includes(name) : [...NOT_ISOLATED, ...BOTH].includes(name));
  for (const [name, check] of Object.entries(CHECKS).filter(([name]) => wanted(name))) {
    const begin = performance.now();
    let [problem, found] = [null, null];
    try {
      found = (await check({ expected })) ?? null;
    } catch (error) {
      problem = `${error.code ?? error.name}: ${error.message}`;
    }
    await report({ name, problem, found, ms: Math.round(performance.now() - begin) });
  }
}
