// The package's worker, with something done to WebGPU, the storage or its threads first. Where this is served
// in its place, the query below is what tells the two apart.

const how = new URL(import.meta.url).search.slice(1);
if (how === 'no-gpu') {
  Object.defineProperty(navigator, 'gpu', { value: undefined });
}
if (how === 'no-storage') {
  navigator.storage.getDirectory = async () => { throw new DOMException('', 'SecurityError'); };
}
if (how === 'no-room') {
  navigator.storage.estimate = async () => ({ quota: 1_000_000, usage: 0 });
}
if (how === 'unknown-gpu') {
  // Software adapters are not measured.
  const values = { isFallbackAdapter: false, vendor: 'tests', architecture: '', device: '', description: '' };
  for (const [name, value] of Object.entries(values)) {
    Object.defineProperty(GPUAdapterInfo.prototype, name, { get: () => value });
  }
}
if (how === 'destroys') {
  const devices = [];
  const requestDevice = GPUAdapter.prototype.requestDevice;
  GPUAdapter.prototype.requestDevice = async function (...args) {
    const device = await requestDevice.apply(this, args);
    devices.push(device);
    return device;
  };
  new BroadcastChannel('sterna-test').onmessage = () => devices.forEach((device) => device.destroy());
}
if (how.startsWith('helpers-')) {
  const { Worker } = self;
  let first = true;
  self.Worker = class extends Worker {
    constructor(url, options) {
      if (how === 'helpers-lock') url = '/tests/helper.js?lock';
      if (how === 'helpers-fail' && first) url = '/tests/nothing.js';
      first = false;
      super(url, options);
    }

    postMessage(message) {
      super.postMessage(message);
      // One more on the same memory.
      if (how === 'helpers-crash') new Worker('/tests/helper.js?crash', { type: 'module' }).postMessage(message);
    }
  };
}

// Nothing that arrives before the package listens is lost.
const early = [];
self.onmessage = (event) => early.push(event);
await import('/worker.js?tested');
for (const event of early) self.onmessage(event);
