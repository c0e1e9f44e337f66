// A thread of the engine that can be watched, or that crashes when the page says so.

import { initSync, lentThreadCrashed } from '/sterna_web_fast.js';

const how = new URL(self.location.href).search.slice(1);
const early = [];
self.onmessage = (event) => early.push(event);
if (how === 'lock') {
  // Held until this worker ends.
  await new Promise((held) => {
    navigator.locks.request('sterna-helper', { mode: 'shared' }, () => {
      held();
      return new Promise(() => {});
    });
  });
  await import('/helper.js');
} else {
  self.onmessage = ({ data: { module, memory } }) => {
    initSync({ module, memory });
    new BroadcastChannel('sterna-test').onmessage = lentThreadCrashed;
  };
}
for (const event of early) self.onmessage(event);
