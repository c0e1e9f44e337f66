/** Where a model comes from. */
export type Source =
  /** The model that comes with the package: a small teller of stories. */
  | 'built-in'
  /** A GGUF file, or a directory of a checkpoint (with a slash at its end); other origins need CORS. */
  | URL
  /** A URL as text, or `built-in`. */
  | string
  /** A GGUF file of the user's. */
  | File
  /** The files of a checkpoint directory, or the parts of a split GGUF model. */
  | Iterable<File>;

/** `auto` is the GPU where there is a hardware one, else `cpu`: WebAssembly. `ref` is the slow reference. */
export type Device = 'auto' | 'gpu' | 'cpu' | 'ref';

/** How far a load has come. */
export type Progress =
  | { stage: 'download'; file: string; done: number; total: number | undefined; secondsLeft: number | undefined }
  | { stage: 'layers'; done: number; total: number };

export interface LoadOptions {
  onProgress?: (progress: Progress) => void;
  device?: Device;
  signal?: AbortSignal;
  /** Most positions of a text. */
  context?: number;
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
 * - `Download`: a file did not arrive
 * - `TooLarge`: the model does not fit the memory that WebAssembly may have
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
