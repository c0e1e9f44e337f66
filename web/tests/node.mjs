// Checks the kernels of both engines' CPU levels without a browser.
//
//   node --experimental-wasm-relaxed-simd --no-liftoff web/tests/node.mjs PACKAGE STERNA
//
// PACKAGE is the folder that tools/build-web.sh makes, STERNA is the native program, whose integer hash the
// engines must have. The flags are for node 20: it keeps relaxed SIMD back, and the first of its compilers
// gets it wrong, which web/package/builds.js looks for in browsers.
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const [packageDir, sterna] = process.argv.slice(2);
if (!sterna) {
  console.error('usage: node node.mjs PACKAGE STERNA');
  process.exit(2);
}
const native = JSON.parse(execFileSync(sterna, ['verify', '--device', 'cpu', '--json'], { maxBuffer: 1 << 26 }));
const LEVELS = { sterna_web: ['simd128', 'scalar'], sterna_web_fast: ['relaxed-simd', 'simd128', 'scalar'] };
let failed = 0;
for (const [name, levels] of Object.entries(LEVELS)) {
  const engine = await import(pathToFileURL(path.resolve(packageDir, `${name}.js`)));
  const module = new WebAssembly.Module(fs.readFileSync(path.join(packageDir, `${name}_bg.wasm`)));
  engine.initSync({ module });
  const { variants } = JSON.parse(await engine.verify('cpu'));
  const found = variants.map(({ variant }) => variant);
  if (found.join() !== levels.join()) {
    failed += 1;
    console.log(`${name} FAILED levels: expected ${levels}, found ${found}`);
  }
  for (const { variant, integerHash, checks } of variants) {
    const problems = checks.filter(({ problem }) => problem).map(({ kernel, problem }) => `${kernel}: ${problem}`);
    if (integerHash !== native.integer_hash) problems.push(`hash ${integerHash}, not ${native.integer_hash}`);
    failed += problems.length > 0 ? 1 : 0;
    console.log(`${name} ${variant} ${problems.length > 0 ? `FAILED ${problems.join('; ')}` : `ok ${checks.length} kernels`}`);
  }
}
process.exit(failed === 0 ? 0 : 1);
