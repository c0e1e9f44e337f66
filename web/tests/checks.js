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
  async isolated() {
    equal(crossOriginIsolated, true, 'crossOriginIsolated');
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
        for await (const { token, text } of model.generate(messages.map(({ role, content }) => ({ role, content })), { maxTokens: 12 })) {
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

/** Runs the checks and reports each. */
export async function run(expected, report) {
  for (const [name, check] of Object.entries(CHECKS).filter(([name]) => name.includes(expected.only))) {
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
