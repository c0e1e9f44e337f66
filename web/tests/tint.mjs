// Has Tint, the compiler of Chromium, make every pipeline of published models, within WebGPU's default
// limits and without optional features.
//
//   node web/tests/tint.mjs WGSL
//
// WGSL is the folder that `sterna-tools wgsl` writes. Needs webgpu (npm: Dawn for Node) to be found from
// this folder or in NODE_PATH. Dawn's null backend computes nothing: all that there is to refuse a kernel
// is Tint and the limits.
import fs from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const [wgslDir] = process.argv.slice(2);
if (!wgslDir) {
  console.error('usage: node tint.mjs WGSL');
  process.exit(2);
}
const dawn = createRequire(import.meta.url).resolve('webgpu');
const { create, globals } = await import(pathToFileURL(dawn));
Object.assign(globalThis, globals);
const gpu = create(['backend=null']);
const adapter = await gpu.requestAdapter();
const device = await adapter.requestDevice();

/** Why a pipeline is refused; `undefined` if it is not. */
async function refusal(text, { constants, buffers }) {
  device.pushErrorScope('validation');
  const module = device.createShaderModule({ code: text });
  const layout = device.createBindGroupLayout({
    entries: buffers.map((type, binding) => ({
      binding, visibility: GPUShaderStage.COMPUTE, buffer: { type, hasDynamicOffset: type === 'uniform' },
    })),
  });
  device.createComputePipeline({
    layout: device.createPipelineLayout({ bindGroupLayouts: [layout] }),
    compute: { module, entryPoint: 'main', constants },
  });
  return (await device.popErrorScope())?.message;
}

// What has to be refused: without this, a Dawn that refuses nothing would pass everything.
const kernel = (lanes, body) => `override K: u32;
@group(0) @binding(0) var<storage, read_write> y: array<u32>;
@compute @workgroup_size(${lanes}) fn main(@builtin(local_invocation_index) lane: u32) { ${body} }`;
const one = { constants: { K: 3 }, buffers: ['storage'] };
for (const [what, text, pipeline] of [
  ['subgroups', kernel(64, 'y[0] = subgroupAdd(lane);'), one],
  ['a barrier that some lanes do not reach', kernel(64, 'if lane < K { workgroupBarrier(); }'), one],
  ['too many lanes', kernel(257, 'y[0] = K;'), one],
  ['too much workgroup memory', `var<workgroup> a: array<u32, 4097>; ${kernel(64, 'a[lane] = K; y[0] = a[K];')}`, one],
  ['an unknown constant', kernel(64, 'y[0] = K;'), { ...one, constants: { N: 3 } }],
  ['another binding', kernel(64, 'y[0] = K;'), { ...one, buffers: ['read-only-storage'] }],
]) {
  if (!(await refusal(text, pipeline))) throw new Error(`${what}: not refused`);
}
const sound = await refusal(kernel(64, 'y[0] = K;'), one);
if (sound) throw new Error(`a sound kernel is refused: ${sound}`);

const pipelines = JSON.parse(fs.readFileSync(path.join(wgslDir, 'pipelines.json'), 'utf8'));
const files = fs.readdirSync(wgslDir).filter((name) => name.endsWith('.wgsl')).map((name) => name.slice(0, -5));
const missing = files.filter((name) => !pipelines.some((pipeline) => pipeline.kernel === name));
/** What wgpu alone knows, and asks an adapter for: no browser is given these kernels. */
const NATIVE = /^enable wgpu_/m;
let native = 0;
let failed = 0;
const fail = (name, problem) => {
  failed += 1;
  console.log(`FAILED ${name} ${problem.split('\n').slice(0, 3).join(' ')}`);
};
for (const name of missing) fail(name, 'no pipeline has this kernel');
for (const pipeline of pipelines) {
  const text = fs.readFileSync(path.join(wgslDir, `${pipeline.kernel}.wgsl`), 'utf8');
  const problem = await refusal(text, pipeline);
  if (NATIVE.test(text)) {
    if (!problem) fail(pipeline.kernel, 'an extension of wgpu is not refused: it can be tested like the others');
    native += 1;
  } else if (problem) fail(`${pipeline.kernel} ${JSON.stringify(pipeline.constants)}`, problem);
}
console.log(failed === 0 ? `passed: ${pipelines.length - native} pipelines of ${files.length} kernels; ${native} are for wgpu alone` : `${failed} failed`);
// Dawn's threads would keep Node alive.
process.exit(failed === 0 && pipelines.length > native ? 0 : 1);
