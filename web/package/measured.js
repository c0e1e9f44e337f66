// What was measured of this machine's GPU, kept for the next load: a text of a few kilobytes that the
// engine reads as it reads any text that may be wrong.

/// Not one of those that offline.js deletes.
const CACHE = 'measured-by-sterna';
const NAME = new URL('measured.json', import.meta.url).href;

/** What was kept; `undefined` if there is nothing, or nothing can be kept here. */
export async function kept() {
  const found = await globalThis.caches?.open(CACHE).then((cache) => cache.match(NAME)).catch(() => undefined);
  return found?.text();
}

/** Keeps a text; returns why it is not kept, if so. */
export async function keep(text) {
  if (!globalThis.caches) return 'this page is not a secure context';
  try {
    const cache = await caches.open(CACHE);
    await cache.put(NAME, new Response(text, { headers: { 'Content-Type': 'application/json' } }));
  } catch (error) {
    return error.message;
  }
}
