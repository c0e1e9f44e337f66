// Downloads that go on where they were cut.

/** Attempts that bring nothing before a download fails. */
const ATTEMPTS = 5;
/** The most that WebAssembly can hold of a model's files. */
const MAX_BYTES = 1 << 30;

function fail(code, message) {
  return Object.assign(new Error(message), { code });
}

const pause = (ms) => new Promise((wake) => setTimeout(wake, ms));

/** The end and the length of a range that a server sends: `bytes 5-9/10`. */
function rangeOf(response) {
  const found = /^bytes (\d+)-(\d+)\/(\d+)$/.exec(response.headers.get('Content-Range') ?? '');
  return found && { first: Number(found[1]), total: Number(found[3]) };
}

/**
 * The bytes of a URL. A connection that ends early is made again for the rest, if the file is still the
 * same. `onProgress` hears of bytes, of all there are (where that is known) and of the time left.
 */
export async function download(url, onProgress, { optional = false } = {}) {
  const file = decodeURIComponent(new URL(url).pathname.split('/').pop());
  const begin = performance.now();
  let parts = [];
  let done = 0;
  let total;
  let tag;
  let attempts = 0;
  let problem = '';
  while (attempts < ATTEMPTS) {
    if (attempts > 0) await pause(100 * 2 ** attempts);
    attempts += 1;
    try {
      const headers = done > 0 ? { Range: `bytes=${done}-`, ...(tag && { 'If-Range': tag }) } : {};
      const response = await fetch(url, { headers });
      if (optional && response.status === 404) return undefined;
      if (response.status >= 400 && response.status < 500 && response.status !== 408 && response.status !== 429) {
        throw fail('Download', `${url}: the server answered ${response.status} ${response.statusText}`.trim());
      }
      if (!response.ok) {
        problem = `the server answered ${response.status}`;
        continue;
      }
      const range = response.status === 206 ? rangeOf(response) : undefined;
      if (done > 0 && range?.first !== done) {
        // The server begins again, or the file is another one.
        parts = [];
        done = 0;
        if (response.status === 206) {
          problem = 'the server sent another range than it was asked for';
          continue;
        }
      }
      const encoded = response.headers.get('Content-Encoding');
      const length = Number(response.headers.get('Content-Length') ?? NaN);
      total = range?.total ?? (encoded || Number.isNaN(length) ? undefined : length);
      tag = response.headers.get('ETag') ?? response.headers.get('Last-Modified') ?? undefined;
      if (tag?.startsWith('W/')) tag = undefined;
      if (total > MAX_BYTES) {
        throw fail('TooLarge', `${url}: expected at most ${MAX_BYTES} bytes, found ${total}`);
      }
      const reader = response.body.getReader();
      for (;;) {
        const { value, done: end } = await reader.read();
        if (end) break;
        parts.push(value);
        done += value.length;
        attempts = 0;
        if (done > MAX_BYTES) {
          await reader.cancel();
          throw fail('TooLarge', `${url}: expected at most ${MAX_BYTES} bytes, found more`);
        }
        const seconds = (performance.now() - begin) / 1000;
        const secondsLeft = total && (total - done) * (seconds / done);
        onProgress({ stage: 'download', file, done, total, secondsLeft });
      }
      if (total !== undefined && done !== total) {
        problem = `the connection ended after ${done} of ${total} bytes`;
        continue;
      }
      return joined(parts, done);
    } catch (error) {
      if (error.code) throw error;
      problem = error.message;
    }
  }
  throw fail('Download', `${url}: ${problem}`);
}

function joined(parts, length) {
  const bytes = new Uint8Array(length);
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

/** A file of a directory, with its name; `undefined` if it is not there and need not be. */
export async function named(base, name, onProgress, options) {
  const url = new URL(encodeURI(name), base);
  // An index names files of its directory and no others.
  if (!url.href.startsWith(base)) throw fail('Download', `${name}: not a file of ${base}`);
  const bytes = await download(url.href, onProgress, options);
  return bytes && [name, bytes];
}
