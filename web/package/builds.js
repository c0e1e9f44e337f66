// The engine is there twice: for one thread, and for threads that share its memory, with relaxed SIMD.
// This chooses, and has the threads started.

/**
 * A module with `sum(a, b, c)`, one lane of `i32x4.relaxed_dot_i8x16_i7x16_add_s` of vectors full of these
 * numbers: `4·a·b + c`.
 */
const RELAXED_SIMD = new Uint8Array([
  0, 97, 115, 109, 1, 0, 0, 0, 1, 8, 1, 96, 3, 127, 127, 127, 1, 127, 3, 2, 1, 0, 7, 7, 1, 3, 115, 117, 109, 0, 0,
  10, 22, 1, 20, 0, 32, 0, 253, 15, 32, 1, 253, 15, 32, 2, 253, 17, 253, 147, 2, 253, 27, 0, 11,
]);

/** Pages of the shared memory at first: the 8 MiB of tools/build-web.sh, and room for what wasm-bindgen adds. */
const FIRST_PAGES = 136;

/** Most pages of it: some systems have not the address space for 4 GiB. */
const MOST_PAGES = [65536, 32768, 16384];

/** Most threads that nobody has asked for. */
const MOST_THREADS = 8;

/** How long threads may take to start. */
const PATIENCE_MS = 10_000;

/** Why this browser, or this page, cannot have the engine with threads. */
function lack() {
  if (!globalThis.crossOriginIsolated) return 'the page is not cross-origin isolated';
  if (!WebAssembly.validate(RELAXED_SIMD)) return 'the browser has no relaxed SIMD';
  // V8's first compiler has forgotten to add in some of its versions (11.3, which node 20 has).
  const { sum } = new WebAssembly.Instance(new WebAssembly.Module(RELAXED_SIMD)).exports;
  return sum(-128, 2, 1000) === -24 ? undefined : 'the relaxed SIMD of the browser computes wrongly';
}

let opened;

/** The engine of this worker, made ready when it is first wanted; see `openBuild`. */
export function openedBuild() {
  return (opened ??= openBuild());
}

/**
 * Makes an engine ready: `wasm` has what it exports, `memory` is its memory, `threads(wanted)` starts threads and says how many
 * there are, with the caller, and what there is to tell about it.
 */
async function openBuild() {
  let why = lack();
  if (!why) {
    try {
      return await openFast();
    } catch (error) {
      why = `the engine with threads cannot be had (${error.message})`;
    }
  }
  const wasm = await import('./sterna_web.js');
  const { memory } = await wasm.default();
  return { wasm, memory, threads: async () => ({ threads: 1, notes: [`one thread and no relaxed SIMD: ${why}`] }) };
}

async function openFast() {
  const wasm = await import('./sterna_web_fast.js');
  const response = await fetch(new URL('sterna_web_fast_bg.wasm', import.meta.url));
  if (!response.ok) throw new Error(`${response.url}: ${response.status}`);
  const streams = response.headers.get('Content-Type')?.startsWith('application/wasm');
  const module = await (streams ? WebAssembly.compileStreaming(response) : WebAssembly.compile(await response.arrayBuffer()));
  const memory = sharedMemory();
  await wasm.default({ module_or_path: module, memory });
  const helpers = new Helpers(wasm, module, memory);
  return { wasm, memory, threads: (wanted) => helpers.threads(wanted) };
}

function sharedMemory() {
  for (const maximum of MOST_PAGES) {
    try {
      return new WebAssembly.Memory({ initial: FIRST_PAGES, maximum, shared: true });
    } catch (error) {
      if (maximum === MOST_PAGES.at(-1)) throw error;
    }
  }
}

/** As many threads as there are cores: of more than four, half are taken for second threads of a core. */
function usualThreads() {
  const logical = navigator.hardwareConcurrency ?? 1;
  return Math.min(MOST_THREADS, logical > 4 ? Math.ceil(logical / 2) : logical);
}

/** Workers on the engine's memory, which compute for it and never answer: they end with this worker. */
class Helpers {
  #wasm;
  #start;
  #alive = 0;
  #problem;

  constructor(wasm, module, memory) {
    this.#wasm = wasm;
    this.#start = () => {
      const worker = new Worker(new URL('helper.js', import.meta.url), { type: 'module', name: 'sterna-helper' });
      this.#alive += 1;
      worker.onerror = (event) => {
        event.preventDefault?.();
        this.#alive -= 1;
        this.#problem = event.message || 'helper.js did not load';
      };
      worker.postMessage({ module, memory });
    };
  }

  /** Threads, with this one: as many as wanted if all start. No model may be on them. */
  async threads(wanted = usualThreads()) {
    this.#problem = undefined;
    while (this.#alive < wanted - 1) this.#start();
    const end = performance.now() + PATIENCE_MS;
    // A helper says that it is there by waiting in the engine.
    while (this.#wasm.lentThreads() < Math.min(this.#alive, wanted - 1) && performance.now() < end) {
      await new Promise((wake) => setTimeout(wake, 5));
    }
    const threads = Math.min(this.#wasm.lentThreads() + 1, wanted);
    const short = threads < wanted && `${threads} of ${wanted} threads: ${this.#problem ?? 'the others did not start in time'}`;
    return { threads, notes: short ? [short] : [] };
  }
}
