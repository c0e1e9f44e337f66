// The package's worker, with something done to WebGPU or the storage first.

const how = new URL(self.location.href).search.slice(1);
if (how === 'no-gpu') {
  Object.defineProperty(navigator, 'gpu', { value: undefined });
}
if (how === 'no-storage') {
  navigator.storage.getDirectory = async () => { throw new DOMException('', 'SecurityError'); };
}
if (how === 'no-room') {
  navigator.storage.estimate = async () => ({ quota: 1_000_000, usage: 0 });
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

// Nothing that arrives before the package listens is lost.
const early = [];
self.onmessage = (event) => early.push(event);
await import('/worker.js');
for (const event of early) self.onmessage(event);
