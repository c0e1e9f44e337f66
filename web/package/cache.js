// Models in the browser's own storage (the origin private file system), where downloads stay.
//
//   sterna-models/KEY/record.json   what there is: see Entry
//   sterna-models/KEY/0, 1, …       the files
//
// KEY is the SHA-256 of the model's URL, so that no name of a server's becomes one of a file here.

const ROOT = 'sterna-models';
const RECORD = 'record.json';
const VERSION = 1;

export function fail(code, message) {
  return Object.assign(new Error(message), { code });
}

async function keyOf(url) {
  const digest = await crypto.subtle.digest('SHA-256', new TextEncoder().encode(url));
  return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

/** The directory of all models; `undefined` where the browser has no such storage. */
async function root() {
  try {
    const storage = await navigator.storage.getDirectory();
    return await storage.getDirectoryHandle(ROOT, { create: true });
  } catch {
    // Private windows, pages without https, and browsers without it say so in various ways.
    return undefined;
  }
}

/** A record that can be trusted to have its fields; `undefined` for anything else. */
function parsed(text) {
  try {
    const record = JSON.parse(text);
    const count = (value) => Number.isSafeInteger(value) && value >= 0;
    const isFile = ({ name, url, done }) => typeof name === 'string' && typeof url === 'string' && count(done);
    const isWhole = ({ absent, done, length, sha256 }) => absent || (done === length && /^[0-9a-f]{64}$/.test(sha256));
    const { version, url, when, complete, files } = record;
    const isRecord = version === VERSION && typeof url === 'string' && count(when) && Array.isArray(files)
      && files.every(isFile) && (!complete || (files.length > 0 && files.every(isWhole)));
    return isRecord ? record : undefined;
  } catch {
    return undefined;
  }
}

async function readRecord(directory) {
  try {
    return parsed(await (await (await directory.getFileHandle(RECORD)).getFile()).text());
  } catch {
    return undefined;
  }
}

/** How long a worker that has ended may keep its locks. */
const RELEASED_MS = 1000;

/** Runs `work` while nobody else has the model's files; where they stay in use, `busy` instead. */
async function locked(key, work, busy) {
  const options = busy ? { signal: AbortSignal.timeout(RELEASED_MS) } : {};
  let isMine = false;
  const mine = () => {
    isMine = true;
    return work();
  };
  try {
    return await navigator.locks.request(`${ROOT}/${key}`, options, mine);
  } catch (error) {
    if (busy && !isMine) return busy();
    throw error;
  }
}

/**
 * A model's files, for the worker that downloads and loads them; no other has them meanwhile.
 *
 * `record`: `url`, `when` (ms), `complete`, and `files`: each with `name`, `url`, `done` (bytes that are
 * safely here), `tag` (of the server's version), `length`, and, of a whole one, `sha256`; or `absent`, of
 * one that the server has not and that the model may lack. Its index is its name here.
 */
export class Entry {
  #directory;
  #release;
  #handles = new Map();

  /** `undefined` where there is no storage. */
  static async open(url) {
    const all = await root();
    const isSynchronous = 'createSyncAccessHandle' in (globalThis.FileSystemFileHandle?.prototype ?? {});
    if (!all || !navigator.locks || !isSynchronous) return undefined;
    const entry = new Entry();
    const key = await keyOf(url);
    await new Promise((resolve, reject) => {
      const hold = () => new Promise((release) => { entry.#release = release; resolve(); });
      locked(key, hold).catch(reject);
    });
    try {
      entry.#directory = await all.getDirectoryHandle(key, { create: true });
      const record = await readRecord(entry.#directory);
      entry.record = record?.url === url ? record : { version: VERSION, url, when: 0, complete: false, files: [] };
      return entry;
    } catch (error) {
      entry.close();
      throw error;
    }
  }

  /** The file of that index, to be read and written at once. */
  async handle(index) {
    let handle = this.#handles.get(index);
    if (!handle) {
      handle = await this.#open(String(index));
      this.#handles.set(index, handle);
    }
    return handle;
  }

  async #open(name) {
    try {
      const file = await this.#directory.getFileHandle(name, { create: true });
      return await file.createSyncAccessHandle();
    } catch (error) {
      throw fail('Storage', `${this.record.url}: ${error.message}`);
    }
  }

  /** Writes the record. */
  async save() {
    const handle = await this.#open(RECORD);
    try {
      const bytes = new TextEncoder().encode(JSON.stringify(this.record));
      handle.write(bytes, { at: 0 });
      handle.truncate(bytes.length);
      handle.flush();
    } finally {
      handle.close();
    }
  }

  /** Deletes all of it. */
  async remove() {
    this.#closeFiles();
    const names = [];
    for await (const name of this.#directory.keys()) names.push(name);
    for (const name of names) await this.#directory.removeEntry(name);
    this.record = { ...this.record, complete: false, files: [] };
  }

  #closeFiles() {
    for (const handle of this.#handles.values()) handle.close();
    this.#handles.clear();
  }

  /** Lets others have the files. */
  close() {
    this.#closeFiles();
    this.#release?.();
  }
}

/** The models that are kept, the newest first; those without `complete` are downloads that were cut. */
export async function cached() {
  const found = [];
  for await (const directory of (await root())?.values() ?? []) {
    if (directory.kind !== 'directory') continue;
    const record = await readRecord(directory);
    if (!record) continue;
    const { url, when, complete, files } = record;
    found.push({ url, complete, bytes: files.reduce((sum, { done }) => sum + done, 0), when: new Date(when) });
  }
  return found.sort((a, b) => b.when - a.when);
}

/** Deletes a model; whether there was one. */
export async function forget(url) {
  const all = await root();
  if (!all || !navigator.locks) return false;
  const key = await keyOf(url);
  const remove = async () => {
    try {
      await all.removeEntry(key, { recursive: true });
      return true;
    } catch (error) {
      if (error.name === 'NotFoundError') return false;
      throw error;
    }
  };
  return locked(key, remove, () => { throw fail('Busy', `${url}: the model is being loaded`); });
}
