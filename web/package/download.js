// The files of a model at a URL: downloaded into the browser's storage, where they stay, and continued
// where they were cut; or, without room for them, read from the server as they are needed.
//
// A file that the engine reads has `name`, `size` and `read(offset, buffer)`, which fills the buffer or
// throws. A worker may read synchronously, and so the engine asks for no more than it needs at a time.

import { openedBuild } from './builds.js';
import { Entry, fail } from './cache.js';

/** Attempts that bring nothing before a download fails. */
const ATTEMPTS = 5;
/** Bytes after which a download is noted as done so far. */
const FLUSH_BYTES = 1 << 25;
/** Bytes that are read at once to be checked. */
const CHECK_BYTES = 1 << 22;
/** The most that a server without ranges may put into memory. */
const MAX_MEMORY_BYTES = 1 << 28;
/** Small pieces of a URL are read with what is around them, and kept for a while. */
const BLOCK_BYTES = 1 << 16;
const MAX_BLOCKS = 64;

/** What a checkpoint directory may have beside its weights. */
const SIDE_FILES = [
  'config.json', 'tokenizer.json', 'generation_config.json', 'tokenizer_config.json', 'chat_template.jinja',
];
const INDEX = 'model.safetensors.index.json';

const pause = (ms) => new Promise((wake) => setTimeout(wake, ms));

/** The beginning and the length of a range that a server sends: `bytes 5-9/10`. */
function rangeOf(response) {
  const found = /^bytes (\d+)-(\d+)\/(\d+)$/.exec(response.headers.get('Content-Range') ?? '');
  return found && { first: Number(found[1]), total: Number(found[3]) };
}

/** What tells one version of a file from another, if the server says. */
function tagOf(response) {
  const tag = response.headers.get('ETag');
  const strong = tag && !tag.startsWith('W/') ? tag : undefined;
  return strong ?? response.headers.get('Last-Modified') ?? undefined;
}

/** The SHA-256 that the server promises, in hexadecimal: Hugging Face's header, or the one of RFC 9530. */
function promisedHash(response) {
  const linked = /^"?([0-9a-f]{64})"?$/.exec(response.headers.get('X-Linked-ETag') ?? '');
  if (linked) return linked[1];
  const digest = /(?:^|[,\s])sha-256=:([A-Za-z0-9+/]{43}=):/.exec(response.headers.get('Repr-Digest') ?? '');
  if (!digest) return undefined;
  return [...atob(digest[1])].map((c) => c.charCodeAt(0).toString(16).padStart(2, '0')).join('');
}

function refused(url, { status, statusText }) {
  return fail('Download', `${url}: the server answered ${status} ${statusText}`.trim());
}

const isFinal = ({ status }) => status >= 400 && status < 500 && ![408, 416, 429].includes(status);

/**
 * Downloads a file into `target`: from `target.done` on, as long as it is the version of `target.tag`.
 * Returns its SHA-256; `undefined` if it is not there and need not be.
 */
async function transfer(url, target, progress, optional) {
  const hash = new (await openedBuild()).wasm.Sha256();
  await target.hashDone(hash);
  if (target.done > 0 && target.done === target.total) return hash.hex();
  const restart = async () => {
    hash.hex();
    await target.reset();
  };
  const isOwn = new URL(url).origin === self.location.origin;
  let attempts = 0;
  let problem = '';
  while (attempts < ATTEMPTS) {
    if (attempts > 0) await pause(100 * 2 ** attempts);
    attempts += 1;
    try {
      const headers = target.done > 0 ? { Range: `bytes=${target.done}-` } : {};
      // Another origin would have to allow this header; its tag is compared below.
      if (target.done > 0 && isOwn && target.tag) headers['If-Range'] = target.tag;
      const response = await fetch(url, { headers, cache: 'no-store' });
      if (optional && response.status === 404) return undefined;
      if (isFinal(response)) throw refused(url, response);
      if (!response.ok) {
        if (response.status === 416) await restart();
        problem = `the server answered ${response.status}`;
        continue;
      }
      const length = Number(response.headers.get('Content-Length') ?? NaN);
      const isEncoded = Boolean(response.headers.get('Content-Encoding'));
      const range = response.status === 206 ? rangeOf(response) : undefined;
      const first = response.status === 206 ? range?.first ?? target.done : 0;
      const total = range?.total ?? (isEncoded || Number.isNaN(length) ? undefined : first + length);
      const tag = tagOf(response);
      const isOther = target.done > 0 && ((tag && target.tag && tag !== target.tag)
        || (total !== undefined && target.total !== undefined && total !== target.total));
      if (first !== target.done || isOther) {
        // The server begins again, or the file is another one.
        await restart();
        if (first > 0) {
          await response.body.cancel();
          problem = 'the file has changed, or another part of it came';
          continue;
        }
      }
      await target.begin(total, tag);
      const begun = { time: performance.now(), done: target.done };
      const reader = response.body.getReader();
      for (;;) {
        const { value, done: isEnd } = await reader.read();
        if (isEnd) break;
        try {
          await target.write(value);
        } catch (error) {
          await reader.cancel();
          throw error;
        }
        hash.update(value);
        attempts = 0;
        const rate = (target.done - begun.done) / (performance.now() - begun.time);
        progress(target.done, total, total && (total - target.done) / rate / 1000);
      }
      await target.note();
      if (total !== undefined && target.done !== total) {
        problem = `the connection ended after ${target.done} of ${total} bytes`;
        // More than there is can only be another file.
        if (target.done > total) await restart();
        continue;
      }
      const [found, promised] = [hash.hex(), promisedHash(response)];
      if (!promised || found === promised) return found;
      await restart();
      problem = `expected the SHA-256 ${promised}, found ${found}`;
    } catch (error) {
      if (error.code && typeof error.code === 'string') throw error;
      await target.note();
      problem = error.message;
    }
  }
  throw fail('Download', `${url}: ${problem}`);
}

/** A download in memory, for what is small. */
class MemoryTarget {
  done = 0;
  total;
  tag;
  #parts = [];

  constructor(url) {
    this.url = url;
  }

  async hashDone() {}

  async reset() {
    this.#parts = [];
    this.done = 0;
  }

  async begin(total, tag) {
    [this.total, this.tag] = [total, tag];
    this.#limit(total ?? 0);
  }

  #limit(bytes) {
    if (bytes <= MAX_MEMORY_BYTES) return;
    throw fail('TooLarge', `${this.url}: expected at most ${MAX_MEMORY_BYTES} bytes, found ${bytes}`);
  }

  async write(bytes) {
    this.#parts.push(bytes);
    this.done += bytes.length;
    this.#limit(this.done);
  }

  async note() {}

  file(name) {
    const bytes = new Uint8Array(this.done);
    let at = 0;
    for (const part of this.#parts) {
      bytes.set(part, at);
      at += part.length;
    }
    return inMemory(name, bytes);
  }
}

/** A download in the browser's storage. */
class StoredTarget {
  #entry;
  #handle;
  #noted;

  constructor(entry, file, handle) {
    [this.#entry, this.file, this.#handle, this.#noted] = [entry, file, handle, file.done];
  }

  get done() { return this.file.done; }
  get total() { return this.file.length; }
  get tag() { return this.file.tag; }

  /** What was done before, as far as it is known to be of one version. */
  async hashDone(hash) {
    const { file } = this;
    if (!file.tag || this.#handle.getSize() < file.done) return this.reset();
    this.#handle.truncate(file.done);
    for (const bytes of pieces(this.#handle, file.done)) hash.update(bytes);
  }

  async reset() {
    Object.assign(this.file, { done: 0, length: undefined, tag: undefined, sha256: undefined });
    this.#handle.truncate(0);
    await this.note();
  }

  async begin(total, tag) {
    Object.assign(this.file, { length: total, tag });
    const { quota, usage } = await navigator.storage.estimate();
    const [needed, left] = [(total ?? 0) - this.done, quota - usage];
    if (needed > left) throw this.#noRoom(needed, left);
  }

  #noRoom(needed, left) {
    return fail('NoRoom', `${this.file.url}: expected ${needed} bytes of storage, found ${left}; delete other models`);
  }

  async write(bytes) {
    let written = 0;
    try {
      written = this.#handle.write(bytes, { at: this.done });
    } catch (error) {
      if (error.name !== 'QuotaExceededError') throw fail('Storage', `${this.file.url}: ${error.message}`);
    }
    if (written !== bytes.length) throw this.#noRoom(bytes.length, written);
    this.file.done += written;
    if (this.done - this.#noted >= FLUSH_BYTES) await this.note();
  }

  /** What is here stays, whatever happens to the page. */
  async note() {
    this.#handle.flush();
    this.#noted = this.done;
    await this.#entry.save();
  }
}

/** The bytes of a stored file, piece by piece. */
function* pieces(handle, length) {
  const buffer = new Uint8Array(Math.min(length, CHECK_BYTES));
  for (let at = 0; at < length; at += buffer.length) {
    const piece = buffer.subarray(0, Math.min(buffer.length, length - at));
    if (handle.read(piece, { at }) !== piece.length) throw fail('Storage', 'the browser keeps less than it was given');
    yield piece;
  }
}

function short(name, offset, wanted, found) {
  return new Error(`expected ${wanted} bytes at ${offset} of ${name}, found ${found}`);
}

/** Bytes in memory as a file. */
export function inMemory(name, bytes) {
  const read = (offset, buffer) => {
    const part = bytes.subarray(offset, offset + buffer.length);
    if (part.length !== buffer.length) throw short(name, offset, buffer.length, part.length);
    buffer.set(part);
  };
  return { name, size: bytes.length, read };
}

/** A file of the user's. */
export function ofUser(file) {
  const read = (offset, buffer) => {
    const part = new Uint8Array(new FileReaderSync().readAsArrayBuffer(file.slice(offset, offset + buffer.length)));
    if (part.length !== buffer.length) throw short(file.name, offset, buffer.length, part.length);
    buffer.set(part);
  };
  return { name: file.name, size: file.size, read };
}

/** A file in the browser's storage. */
function stored(name, handle) {
  const read = (offset, buffer) => {
    const found = handle.read(buffer, { at: offset });
    if (found !== buffer.length) throw short(name, offset, buffer.length, found);
  };
  return { name, size: handle.getSize(), read };
}

/** A file at a URL that is read in ranges, each when it is asked for. */
class Remote {
  #url;
  #tag;
  #blocks = new Map();

  constructor(name, url, size, tag) {
    [this.name, this.#url, this.size, this.#tag] = [name, url, size, tag];
  }

  read(offset, buffer) {
    if (offset + buffer.length > this.size) throw short(this.name, offset, buffer.length, this.size - offset);
    if (buffer.length > BLOCK_BYTES) return buffer.set(this.#fetch(offset, buffer.length));
    for (let at = 0; at < buffer.length;) {
      const start = offset + at;
      const part = this.#block(Math.floor(start / BLOCK_BYTES)).subarray(start % BLOCK_BYTES);
      const piece = part.subarray(0, buffer.length - at);
      buffer.set(piece, at);
      at += piece.length;
    }
  }

  #block(index) {
    let bytes = this.#blocks.get(index);
    if (!bytes) {
      const first = index * BLOCK_BYTES;
      bytes = this.#fetch(first, Math.min(BLOCK_BYTES, this.size - first));
      if (this.#blocks.size >= MAX_BLOCKS) this.#blocks.delete(this.#blocks.keys().next().value);
      this.#blocks.set(index, bytes);
    }
    return bytes;
  }

  #fetch(offset, length) {
    let problem;
    for (let attempt = 0; attempt < ATTEMPTS; attempt += 1) {
      try {
        const request = new XMLHttpRequest();
        request.open('GET', this.#url, false);
        request.responseType = 'arraybuffer';
        request.setRequestHeader('Range', `bytes=${offset}-${offset + length - 1}`);
        request.send();
        const tag = request.getResponseHeader('ETag');
        if (this.#tag && tag && tag !== this.#tag) throw fail('Download', `${this.#url}: the file has changed`);
        const bytes = new Uint8Array(request.response ?? 0);
        if (request.status === 206 && bytes.length === length) return bytes;
        problem = `the server answered ${request.status} with ${bytes.length} bytes of ${length}`;
      } catch (error) {
        if (error.code === 'Download') throw error;
        problem = error.message;
      }
    }
    throw fail('Download', `${this.#url}: ${problem}`);
  }
}

/** Calls `onProgress` now and then, and for what is complete. */
function progressOf(onProgress, name) {
  let last = -Infinity;
  return (done, total, secondsLeft, stage = 'download') => {
    const now = performance.now();
    if (now - last < 50 && done !== total) return;
    last = now;
    onProgress({ stage, file: name, done, total, secondsLeft });
  };
}

/** A file at a URL, in memory. */
async function intoMemory(name, url, onProgress, optional) {
  const target = new MemoryTarget(url);
  const hash = await transfer(url, target, progressOf(onProgress, name), optional);
  return hash && target.file(name);
}

/** A file at a URL as it is read there; one that comes only as a whole is kept in memory. */
async function fromServer(name, url, onProgress, optional) {
  const response = await fetch(url, { headers: { Range: 'bytes=0-0' }, cache: 'no-store' });
  await response.body?.cancel();
  if (optional && response.status === 404) return undefined;
  if (!response.ok) throw refused(url, response);
  const total = rangeOf(response)?.total;
  if (response.status !== 206 || total === undefined) return intoMemory(name, url, onProgress, optional);
  return new Remote(name, url, total, response.headers.get('ETag'));
}

/** A file at a URL that is in the browser's storage when this is done. */
async function intoStorage(entry, name, url, onProgress, optional) {
  const { files } = entry.record;
  let index = files.findIndex((file) => file.url === url);
  if (index < 0) index = files.push({ name, url, done: 0 }) - 1;
  const file = files[index];
  if (file.absent) return undefined;
  const handle = await entry.handle(index);
  const isWhole = file.sha256 && file.done === file.length && handle.getSize() === file.length;
  if (!isWhole) {
    file.sha256 = undefined;
    const target = new StoredTarget(entry, file, handle);
    const hash = await transfer(url, target, progressOf(onProgress, name), optional);
    Object.assign(file, { length: file.done, sha256: hash, absent: !hash });
    await entry.save();
  }
  return file.absent ? undefined : stored(name, handle);
}

const textOf = (file) => {
  const bytes = new Uint8Array(Math.min(file.size, MAX_MEMORY_BYTES));
  file.read(0, bytes);
  return new TextDecoder().decode(bytes);
};

/** The names in the index of a checkpoint in several files. */
function shardsOf(url, index) {
  try {
    return new Set(Object.values(JSON.parse(textOf(index)).weight_map));
  } catch (error) {
    throw fail('Json', `${url}${INDEX}: ${error.message}`);
  }
}

/** All files of the model at `url`, each by `get(name, url, optional)`. */
async function gather(url, get) {
  const files = [];
  const base = new URL('.', url).href;
  const add = async (name, { optional = false, at = new URL(encodeURIComponent(name), base) } = {}) => {
    // An index names files of its directory and no others.
    if (at.href === base || !at.href.startsWith(base)) throw fail('Download', `${name}: not a file of ${base}`);
    const file = await get(name, at.href, optional);
    if (file) files.push(file);
    return file;
  };
  if (!url.endsWith('/')) {
    const name = decodeURIComponent(new URL(url).pathname.split('/').pop());
    const split = /^(.*)-\d{5}-of-(\d{5})\.gguf$/.exec(name);
    if (!split) {
      await add(name, { at: new URL(url) });
      return files;
    }
    for (let no = 1; no <= Number(split[2]); no += 1) {
      await add(`${split[1]}-${String(no).padStart(5, '0')}-of-${split[2]}.gguf`);
    }
    return files;
  }
  for (const name of SIDE_FILES) await add(name, { optional: true });
  const index = await add(INDEX, { optional: true });
  const names = index ? shardsOf(url, index) : ['model.safetensors'];
  for (const name of names) await add(String(name));
  return files;
}

/** Finds files that are not what was downloaded; they are to be downloaded again. Whether there are any. */
async function findDamage(entry, onProgress) {
  let isDamaged = false;
  for (const [index, file] of entry.record.files.entries()) {
    if (!file.sha256) continue;
    const handle = await entry.handle(index);
    const hash = new (await openedBuild()).wasm.Sha256();
    const progress = progressOf(onProgress, file.name);
    let done = 0;
    const isLong = handle.getSize() === file.length;
    for (const bytes of isLong ? pieces(handle, file.length) : []) {
      hash.update(bytes);
      done += bytes.length;
      progress(done, file.length, undefined, 'check');
    }
    if (isLong && hash.hex() === file.sha256) continue;
    isDamaged = true;
    Object.assign(file, { done: 0, length: undefined, tag: undefined, sha256: undefined });
  }
  if (isDamaged) {
    entry.record.complete = false;
    await entry.save();
  }
  return isDamaged;
}

/**
 * The model at a URL: `files`, `close()` for when they have been read, and `isDamaged()`, which holds
 * them against their checksums and sees to it that what is wrong is downloaded by the next call.
 */
export async function openModel(url, onProgress, { check = false } = {}) {
  const entry = await Entry.open(url);
  const get = (how) => (name, at, optional) => how(name, at, onProgress, optional);
  const unkept = async () => ({ files: await gather(url, get(fromServer)), close() {}, isDamaged: async () => false });
  if (!entry) return unkept();
  const { record } = entry;
  try {
    if (check) await findDamage(entry, onProgress);
    let files;
    if (record.complete) files = await kept(entry);
    if (!files) {
      record.complete = false;
      const store = (...file) => intoStorage(entry, ...file);
      files = await gather(url, get(store));
      Object.assign(record, { complete: true, when: Date.now() });
      await entry.save();
    }
    return { files, close: () => entry.close(), isDamaged: () => findDamage(entry, onProgress) };
  } catch (error) {
    const hasNoRoom = error.code === 'NoRoom';
    try {
      if (hasNoRoom) await entry.remove();
    } finally {
      entry.close();
    }
    if (!hasNoRoom) throw error;
    try {
      return await unkept();
    } catch (other) {
      // What would have helped is room.
      throw other.code === 'TooLarge' ? error : other;
    }
  }
}

/** The files of a complete model without a request; `undefined` if one has not the length that it had. */
async function kept(entry) {
  const files = [];
  for (const [index, { name, length, absent }] of entry.record.files.entries()) {
    if (absent) continue;
    const handle = await entry.handle(index);
    if (handle.getSize() !== length) return undefined;
    files.push(stored(name, handle));
  }
  return files;
}

/** Holds a kept model against its checksums: `true`, or `false` if it has to be downloaded again. */
export async function checkModel(url, onProgress) {
  const entry = await Entry.open(url);
  if (!entry) throw fail('Storage', `${url}: this browser keeps no models here`);
  try {
    if (!entry.record.complete) return false;
    return !(await findDamage(entry, onProgress));
  } finally {
    entry.close();
  }
}

/** Files of a directory that are small, in memory. */
export function small(base, names, onProgress) {
  return Promise.all(names.map((name) => intoMemory(name, new URL(name, base).href, onProgress, false)));
}
