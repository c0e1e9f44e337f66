// A thread of the engine: a worker with the engine's module on the engine's memory. See builds.js.

import { initSync, lendThread, lentThreadCrashed } from './sterna_web_fast.js';

self.onmessage = ({ data: { module, memory } }) => {
  initSync({ module, memory });
  try {
    lendThread();
  } catch (error) {
    // Whoever waits for this thread hears nothing else from it.
    lentThreadCrashed();
    throw error;
  }
};
