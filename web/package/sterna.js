// Ternary language models in the browser. The engine runs in a worker; this is its other end.
// Types and their documentation: sterna.d.ts.

import { cached, forget } from './cache.js';

export class SternaError extends Error {
  constructor(code, message) {
    super(message);
    this.name = 'SternaError';
    this.code = code;
  }
}

/** Requests to a worker, and what comes back. */
class Remote {
  #worker;
  #calls = new Map();
  #lastId = 0;
  #ended;

  constructor(url) {
    this.#worker = new Worker(url, { type: 'module', name: 'sterna' });
    this.#worker.onmessage = ({ data }) => this.#receive(data);
    this.#worker.onerror = (event) => {
      event.preventDefault?.();
      this.end(new SternaError('Crashed', `the worker has ended: ${event.message ?? 'it did not load'}`));
    };
  }

  /** Calls a method of the worker; `on` has functions for events on the way. */
  call(method, args, on = {}) {
    const id = ++this.#lastId;
    const done = new Promise((resolve, reject) => {
      if (this.#ended) return reject(this.#ended);
      if (this.#calls.size > 0) return reject(new SternaError('Busy', 'the model is at work on something else'));
      this.#calls.set(id, { resolve, reject, on });
      this.#worker.postMessage({ id, method, args });
    });
    return { done, send: (message) => this.#calls.has(id) && this.#worker.postMessage({ id, ...message }) };
  }

  #receive({ id, event, value, result, error }) {
    const call = this.#calls.get(id);
    if (!call) return;
    if (event) return call.on[event]?.(value);
    this.#calls.delete(id);
    if (error) call.reject(new SternaError(error.code, error.message));
    else call.resolve(result);
  }

  /** Ends the worker; whoever waits hears why. */
  end(reason) {
    if (this.#ended) return;
    this.#ended = reason;
    this.#worker.terminate();
    for (const { reject } of this.#calls.values()) reject(reason);
    this.#calls.clear();
  }
}

/** A cell that both threads see, where the page is isolated; a message takes its place elsewhere. */
const stopCell = () => (globalThis.crossOriginIsolated ? new Int32Array(new SharedArrayBuffer(4)) : undefined);

class Generation {
  #pieces = [];
  #waiting;
  #ended = false;
  #stop;

  constructor(remote, prompt, { signal, onPrompt, ...options }, onInfo) {
    signal?.throwIfAborted();
    const cell = stopCell();
    const call = remote.call('generate', { prompt, options, cell }, {
      piece: (piece) => this.#push(piece),
      prompt: ({ done, total }) => onPrompt?.(done, total),
      info: onInfo,
    });
    this.#stop = () => {
      if (this.#ended) return;
      if (cell) Atomics.store(cell, 0, 1);
      call.send({ method: 'stop' });
    };
    signal?.addEventListener('abort', this.#stop, { once: true });
    this.summary = call.done.finally(() => {
      this.#ended = true;
      signal?.removeEventListener('abort', this.#stop);
      this.#waiting?.();
    });
    // Whoever iterates hears of the error there.
    this.summary.catch(() => {});
  }

  #push(piece) {
    this.#pieces.push(piece);
    this.#waiting?.();
  }

  async *[Symbol.asyncIterator]() {
    try {
      for (;;) {
        while (this.#pieces.length > 0) yield this.#pieces.shift();
        if (this.#ended) break;
        await new Promise((wake) => (this.#waiting = wake));
      }
      await this.summary;
    } finally {
      this.#stop();
      await this.summary.catch(() => {});
    }
  }
}

export class Sterna {
  #remote;
  #info;

  constructor(remote, info) {
    this.#remote = remote;
    this.#info = info;
  }

  static async load(
    source = 'built-in',
    { onProgress, device = 'auto', signal, context, threads, tune, check = false, worker } = {},
  ) {
    signal?.throwIfAborted();
    const remote = new Remote(worker ?? new URL('worker.js', import.meta.url));
    const abort = () => remote.end(signal.reason);
    signal?.addEventListener('abort', abort, { once: true });
    try {
      const args = { source: portable(source), device, options: { context, threads, tune }, check };
      const info = await remote.call('load', args, { progress: onProgress }).done;
      return new Sterna(remote, info);
    } catch (error) {
      remote.end(error);
      throw error;
    } finally {
      signal?.removeEventListener('abort', abort);
    }
  }

  static cached() {
    return cached();
  }

  static async forget(url) {
    try {
      return await forget(hrefOf(url));
    } catch (error) {
      throw error.code === 'Busy' ? new SternaError(error.code, error.message) : error;
    }
  }

  static async check(url, { onProgress, worker } = {}) {
    const remote = new Remote(worker ?? new URL('worker.js', import.meta.url));
    try {
      return await remote.call('checkCached', { url: hrefOf(url) }, { progress: onProgress }).done;
    } finally {
      remote.end(new SternaError('Disposed', 'the check is over'));
    }
  }

  get info() {
    return this.#info;
  }

  generate(prompt, options = {}) {
    return new Generation(this.#remote, prompt, options, (info) => (this.#info = info));
  }

  verify() {
    return this.#remote.call('verify', {}).done;
  }

  async bench({ prompt = 'Once upon a time there was a little bird who', maxTokens = 64 } = {}) {
    // The first text pays for what is done once.
    for await (const _ of this.generate(prompt.slice(0, -1), { maxTokens: 4 })) { /* warming up */ }
    const { promptTokens, promptTokensPerSecond, timeToFirstTokenMs, generatedTokens, tokensPerSecond } =
      await this.generate(prompt, { maxTokens }).summary;
    const { device, description } = this.#info;
    return {
      device, description, promptTokens, promptTokensPerSecond, timeToFirstTokenMs, generatedTokens,
      tokensPerSecond,
    };
  }

  dispose() {
    this.#remote.end(new SternaError('Disposed', 'this model was disposed of'));
  }
}

/** A URL in full, as models are kept by it. */
function hrefOf(url) {
  const found = new URL(url, globalThis.location?.href);
  found.hash = '';
  return found.href;
}

/** A source as it can be sent to a worker. */
function portable(source) {
  if (source === 'built-in') return { builtIn: true };
  if (typeof source === 'string' || source instanceof URL) {
    return { url: hrefOf(source) };
  }
  const files = source instanceof File ? [source] : [...source];
  if (files.length === 0 || !files.every((file) => file instanceof File)) {
    throw new SternaError('InvalidOptions', 'expected a URL, a File or several');
  }
  return { files };
}
