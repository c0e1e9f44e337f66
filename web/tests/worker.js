// The package's worker, with something done to WebGPU or to its threads first.

const how = new URL(self.location.href).search.slice(1);
if (how === 'no-gpu') {
  Object.defineProperty(navigator, 'gpu', { value: undefined });
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
await import('/worker.js');
for (const event of early) self.onmessage(event);
