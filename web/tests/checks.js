// What must hold in every browser. Runs in a page beside the package; run.mjs says what is expected.

import { Sterna } from '/sterna.js';

const PROMPT = 'Once upon a time';
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
    equal(await tokens(model, { maxTokens: expected.tokens.length }), expected.tokens, 'tokens');
    const again = model.generate(PROMPT, { maxTokens: 60 });
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

  async a_lost_device_is_said_and_replaced({ expected }) {
    return withModel({ device: 'gpu', worker: worker('destroys') }, async (model) => {
      equal(await tokens(model, { maxTokens: 5 }), expected.tokens.slice(0, 5), 'before');
      const destroy = new BroadcastChannel('sterna-test');
      const text = model.generate('A long story', { maxTokens: 400 });
      const code = await codeOf((async () => {
        let count = 0;
        for await (const _ of text) if (++count === 3) destroy.postMessage('destroy');
      })());
      destroy.close();
      equal(code, 'DeviceLost', 'code');
      equal(await tokens(model, { maxTokens: 5 }), expected.tokens.slice(0, 5), 'after');
    });
  },

  async without_webgpu_the_wasm_takes_over({ expected }) {
    return withModel({ device: 'auto', worker: worker('no-gpu') }, async (model) => {
      equal(model.info.device, 'cpu', 'device');
      equal(await tokens(model, { maxTokens: 5 }), expected.tokens.slice(0, 5), 'tokens');
      equal(await codeOf(Sterna.load('built-in', { device: 'gpu', worker: worker('no-gpu') })), 'NoAdapter', 'gpu');
    });
  },

  async files_and_urls_are_loaded({ expected }) {
    const names = ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json'];
    const files = await Promise.all(names.map(async (name) => {
      return new File([await (await fetch(`/model/${name}`)).arrayBuffer()], name);
    }));
    for (const source of [files, '/model/', new URL('/model/', location.href)]) {
      await withModel({ source, device: 'cpu' }, async (model) => {
        equal(await tokens(model, { maxTokens: 5 }), expected.tokens.slice(0, 5), 'tokens');
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
    const { requests } = await (await fetch('/tests/cuts')).json();
    if (requests < 2) throw new Error(`${requests} requests: nothing was cut`);
    return { requests };
  },
};

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
