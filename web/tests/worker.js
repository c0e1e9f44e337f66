// The package's worker, with something done to WebGPU first. Where this is served in its place, the query
// below is what tells the two apart.

const how = new URL(import.meta.url).search.slice(1);
if (how === 'no-gpu') {
  Object.defineProperty(navigator, 'gpu', { value: undefined });
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

// Nothing that arrives before the package listens is lost.
const early = [];
self.onmessage = (event) => early.push(event);
await import('/worker.js?tested');
for (const event of early) self.onmessage(event);
