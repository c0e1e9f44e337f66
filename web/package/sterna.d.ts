/** Where a model comes from. */
export type Source =
  /** The model that comes with the package: a small teller of stories. */
  | 'built-in'
  /**
   * A GGUF file (of a split one, any part), or a directory of a checkpoint (with a slash at its end);
   * other origins need CORS. It is downloaded once and kept in the browser's storage; without room for
   * it, it is read from the server each time, which needs ranges.
   */
  | URL
  /** A URL as text, or `built-in`. */
  | string
  /** A GGUF file of the user's, which is read where it is. */
  | File
  /** The files of a checkpoint directory, or the parts of a split GGUF model. */
  | Iterable<File>;

/** `auto` is the GPU where there is a hardware one, else `cpu`: WebAssembly. `ref` is the slow reference. */
export type Device = 'auto' | 'gpu' | 'cpu' | 'ref';

/** How far a load has come; `check` is what was downloaded before and is held against its checksum. */
export type Progress =
  | { stage: 'check'; file: string; done: number; total: number; secondsLeft: undefined }
  | { stage: 'download'; file: string; done: number; total: number | undefined; secondsLeft: number | undefined }
  | { stage: 'layers'; done: number; total: number };

export interface LoadOptions {
  onProgress?: (progress: Progress) => void;
  device?: Device;
  signal?: AbortSignal;
  /** Most positions of a text. */
  context?: number;
  /** Holds a kept model against its checksums first; what is damaged is downloaded again. */
  check?: boolean;
  /**
   * How the kernels of a GPU are chosen, all of which are checked: by speed (the default), which the
   * first load on a GPU measures for less than two seconds and later ones know, or by what it is.
   */
  tune?: 'auto' | 'off';
  /**
   * Threads of `cpu`. More than one takes a cross-origin isolated page and a browser with relaxed SIMD;
   * `Info.notes` tells where there are fewer than asked for.
   */
  threads?: number;
  /** Where the worker is, for bundlers that move it. */
  worker?: string | URL;
}

/** What there is to know of a loaded model. */
export interface Info {
  model: string;
  architecture: string;
  device: string;
  description: string;
  /** What the browser tells of the GPU, if anything. */
  adapter?: string;
  kernels: string;
  head: string;
  notes: string[];
  context: number;
  hasChat: boolean;
  layers: number;
  hiddenSize: number;
  vocabSize: number;
  /** What WebAssembly's memory has grown to; buffers of the GPU are not in it. */
  memoryBytes: number;
}

/** A model in the browser's storage. */
export interface Cached {
  url: string;
  /** Whether all of it is there; else the next load goes on with it. */
  complete: boolean;
  bytes: number;
  /** When it was complete. */
  when: Date;
}

export interface Message {
  role: 'system' | 'user' | 'assistant';
  content: string;
}

export interface GenerateOptions {
  signal?: AbortSignal;
  /** Hears how many tokens of the prompt have run. */
  onPrompt?: (done: number, total: number) => void;
  maxTokens?: number;
  /** 0, the default, takes the most probable token. */
  temperature?: number;
  topK?: number;
  topP?: number;
  minP?: number;
  seed?: number;
  /** Above 1 makes tokens that have occurred less probable. */
  repetitionPenalty?: number;
}

export interface Piece {
  token: number;
  /** What the token completes; nothing as long as a character lacks bytes. */
  text: string;
}

export interface Summary {
  /** The model ended the text, all tokens were made, the context is full, or the caller ended it. */
  finishReason: 'stop' | 'length' | 'context' | 'abort';
  promptTokens: number;
  cachedTokens: number;
  generatedTokens: number;
  timeToFirstTokenMs: number;
  decodeMs: number;
  promptTokensPerSecond: number | null;
  tokensPerSecond: number | null;
}

/** A text in the making. Leaving its loop ends it. */
export interface Generation extends AsyncIterable<Piece> {
  /** What came of it, once it has ended. */
  readonly summary: Promise<Summary>;
}

export interface Verification {
  passed: boolean;
  /** Of the integer results of every kernel, the same on every machine. */
  integerHash: string;
  variants: {
    device: string;
    description: string;
    variant: string;
    passed: boolean;
    integerHash: string;
    checks: { kernel: string; cases: number; problem: string | null }[];
  }[];
}

export interface Benchmark {
  device: string;
  description: string;
  promptTokens: number;
  promptTokensPerSecond: number | null;
  timeToFirstTokenMs: number;
  generatedTokens: number;
  tokensPerSecond: number | null;
}

/**
 * What went wrong. `code` is the name of a variant of the Rust library's `Error` (such as `NoAdapter`
 * or `MissingTensor`), or one of:
 *
 * - `DeviceLost`: the GPU is gone; the next text loads the model again
 * - `Download`: a file did not arrive, or is not the one that its server promised
 * - `NoRoom`: the browser has no storage left for it, and its server sends no ranges
 * - `Storage`: the browser's storage failed
 * - `TooLarge`: a file that can only be had as a whole does not fit the memory
 * - `InvalidOptions`, `Busy`, `Disposed`
 * - `Crashed`: the worker has ended
 */
export class SternaError extends Error {
  readonly code: string;
}

/** A model in a worker of its own. */
export class Sterna {
  /** Loads a model. An aborted load rejects with the signal's reason. */
  static load(source?: Source, options?: LoadOptions): Promise<Sterna>;
  /** The models that were loaded from URLs and are kept, the newest first. */
  static cached(): Promise<Cached[]>;
  /** Deletes a kept model; `false` if there was none. Rejects with `Busy` while it is being loaded. */
  static forget(url: string | URL): Promise<boolean>;
  /**
   * Holds a kept model against the checksums of its download. If it is damaged or not complete, the
   * answer is `false`, and the next load downloads what is wrong.
   */
  static check(
    url: string | URL,
    options?: { onProgress?: (progress: Progress) => void; worker?: string | URL },
  ): Promise<boolean>;
  /** As of the last load. */
  readonly info: Info;
  /** Continues a text, or answers the last message. One text at a time. */
  generate(prompt: string | Message[], options?: GenerateOptions): Generation;
  /** Checks every kernel of the model's device against the reference. */
  verify(): Promise<Verification>;
  /** How fast the model writes here: greedily, after a prompt. */
  bench(options?: { prompt?: string; maxTokens?: number }): Promise<Benchmark>;
  /** Ends the worker and frees all that it holds. */
  dispose(): void;
}
