// Uses the page as a person would, and takes pictures of it.
import path from 'node:path';

const NARROW = { width: 390, height: 844 };
const WIDE = { width: 1280, height: 800 };
const PATIENCE = { timeout: 300_000 };

function equal(found, expected, what) {
  if (found !== expected) throw new Error(`${what}: expected ${JSON.stringify(expected)}, found ${JSON.stringify(found)}`);
}

/** Returns how many steps failed. `schemes`: the colour schemes that the browser can be told to prefer. */
export async function usePage(name, browser, schemes, server, outDir) {
  const origin = await server.start();
  const foreign = [];
  let page;
  const open = async () => {
    const context = await browser.newContext({ viewport: NARROW });
    page = await context.newPage();
    page.on('pageerror', (error) => console.log(`[page error] ${error}`));
    page.on('request', (request) => { if (!request.url().startsWith(origin)) foreign.push(request.url()); });
  };

  const idle = () => page.waitForFunction(() => !document.getElementById('send').disabled, null, PATIENCE);
  const text = () => page.locator('#texts li').last().innerText();
  const settings = async (change) => {
    await page.click('#open-settings');
    await change();
    await page.click('#settings .title button');
  };
  // Playwright's `fill` adds to what a number's field has, in Firefox.
  const type = async (field, value) => {
    await page.focus(field);
    await page.keyboard.press('ControlOrMeta+A');
    await page.keyboard.type(value);
  };
  const send = async (prompt) => {
    await page.fill('#prompt', prompt);
    await page.press('#prompt', 'Enter');
  };
  const picture = async (of) => {
    for (const [size, viewport] of Object.entries({ narrow: NARROW, wide: WIDE })) {
      await page.setViewportSize(viewport);
      for (const colorScheme of schemes) {
        if (schemes.length > 1) await page.emulateMedia({ colorScheme });
        await page.screenshot({ path: path.join(outDir, `${of}-${size}-${colorScheme}.png`) });
      }
    }
    await page.setViewportSize(NARROW);
  };
  let greedy;

  const steps = {
    async loads_on_the_gpu() {
      // Workers whose devices can be destroyed, which nothing keeps.
      server.worker = 'destroys';
      server.missing = '/offline.js';
      await open();
      await page.goto(`${origin}/`);
      await idle();
      await page.click('#open-settings');
      await page.selectOption('#run-on', 'gpu');
      await page.click('#load-model');
      await page.waitForFunction(() => document.getElementById('device').textContent.startsWith('GPU'), null, PATIENCE);
      await idle();
    },
    async writes_and_regenerates() {
      await settings(async () => {
        await type('#temperature', '0');
        await type('#max-tokens', '24');
      });
      await send('Once upon a time');
      await page.waitForFunction(() => !document.getElementById('stop').disabled, null, PATIENCE);
      await idle();
      greedy = await text();
      if (greedy.length < 50) throw new Error(`a text of ${greedy.length} letters`);
      if (!/tokens\/s/.test(await page.innerText('#stats'))) throw new Error('no speed');
      const width = await page.evaluate(() => document.documentElement.scrollWidth);
      if (width > NARROW.width) throw new Error(`the page is ${width} wide on a screen of ${NARROW.width}`);
      await picture('text');
      await page.click('#again');
      await idle();
      equal(await text(), greedy, 'the same text again');
      equal(await page.locator('#texts li').count(), 2, 'parts');
    },
    async stops() {
      await settings(() => type('#max-tokens', '2000'));
      await page.click('#again');
      await page.waitForFunction(() => (document.querySelector('#texts .writing')?.textContent.length ?? 0) > 20, null, PATIENCE);
      await page.click('#stop');
      await idle();
      if (!/stopped|\d/.test(await page.innerText('#stats'))) throw new Error('not said');
    },
    async verifies_and_compares() {
      await page.click('#open-settings');
      await page.click('#verify');
      await page.waitForFunction(() => /Passed|FAILED/.test(document.getElementById('machine').textContent), null, { timeout: 2 * PATIENCE.timeout });
      equal((await page.innerText('#machine')).slice(0, 6), 'Passed', 'verdict');
      await page.click('#compare');
      await page.waitForSelector('#chart .bar >> nth=1', PATIENCE);
      await page.locator('#chart').scrollIntoViewIfNeeded();
      await picture('machine');
      await page.keyboard.press('Escape');
      if (!/verified/.test(await page.innerText('#device'))) throw new Error('the header does not say so');
    },
    async outlives_its_device() {
      await page.evaluate(() => new BroadcastChannel('sterna-test').postMessage('destroy'));
      await settings(() => type('#max-tokens', '24'));
      await page.click('#again');
      await page.waitForFunction(() => !document.getElementById('problem').hidden, null, PATIENCE);
      await idle();
      const said = await page.innerText('#problem');
      if (!/device was lost.*still here/s.test(said)) throw new Error(`the page says ${said}`);
      equal(await page.locator('#texts li').first().innerText(), 'Once upon a time', 'what was asked');
      await picture('lost');
      await page.click('#again');
      await page.waitForFunction(() => document.querySelectorAll('#texts li').length === 2, null, PATIENCE);
      await idle();
      equal(await text(), greedy, 'the same text on another device');
    },
    async keeps_models_of_urls_and_takes_dropped_files() {
      const greedily = async (what) => {
        await page.click('#clear');
        await settings(() => type('#max-tokens', '24'));
        await send('Once upon a time');
        await page.waitForFunction(() => document.querySelectorAll('#texts li').length === 2, null, PATIENCE);
        await idle();
        equal(await text(), greedy, what);
      };
      // Where a model comes from is the same for every device; the CPU is there at once.
      await page.click('#open-settings');
      await page.selectOption('#run-on', 'cpu');
      await page.selectOption('#source', 'url');
      await page.fill('#url', `${origin}/kept/`);
      await page.click('#load-model');
      await page.waitForFunction(() => document.getElementById('about').textContent.startsWith('http'), null, PATIENCE);
      await idle();
      await greedily('the text of a model of a URL');
      await page.click('#open-settings');
      equal(await page.locator('#kept-models li').count(), 1, 'kept models');
      await page.locator('#kept').scrollIntoViewIfNeeded();
      await picture('kept');
      await page.click('#kept-models button:has-text("Delete")');
      await idle();
      equal(await page.locator('#kept').isHidden(), true, 'a list without models');
      await page.evaluate(async () => {
        const dataTransfer = new DataTransfer();
        const bytes = await (await fetch('/gguf/stories.gguf')).arrayBuffer();
        dataTransfer.items.add(new File([bytes], 'dropped.gguf'));
        dispatchEvent(new DragEvent('drop', { dataTransfer, bubbles: true, cancelable: true }));
      });
      await page.waitForFunction(() => document.getElementById('about').textContent.startsWith('dropped'), null, PATIENCE);
      await idle();
      await greedily('the text of a dropped file');
      await page.click('#open-settings');
      await page.selectOption('#source', 'built-in');
      await page.click('#load-model');
      await page.waitForFunction(() => document.getElementById('about').textContent.startsWith('built-in'), null, PATIENCE);
      await idle();
    },
    async works_by_keyboard_alone() {
      await page.focus('#open-settings');
      await page.keyboard.press('Enter');
      equal(await page.evaluate(() => document.getElementById('settings').open), true, 'the dialog');
      await page.keyboard.press('Escape');
      equal(await page.evaluate(() => document.activeElement.id), 'open-settings', 'focus comes back');
      const unnamed = await page.evaluate(() => [...document.querySelectorAll('input, select, textarea, button')]
        .filter((control) => !(control.labels?.length || control.textContent.trim() || control.ariaLabel)).map((c) => c.id));
      equal(unnamed.join(), '', 'controls without a name');
    },
    async reloads_without_a_network() {
      await page.context().close();
      server.worker = '';
      server.missing = '';
      await open();
      await page.goto(`${origin}/`);
      await idle();
      await page.evaluate(() => navigator.serviceWorker.ready.then(() => {}));
      server.offline = true;
      await page.reload();
      await idle();
      await settings(async () => {
        await type('#temperature', '0');
        await type('#max-tokens', '24');
      });
      await send('Once upon a time');
      await page.waitForFunction(() => document.querySelectorAll('#texts li').length === 2, null, PATIENCE);
      await idle();
      equal(await text(), greedy, 'the same text on the CPU');
      await picture('offline');
    },
    async asks_nobody_else() {
      equal(foreign.join(), '', 'requests');
    },
  };

  let failed = 0;
  for (const [what, step] of Object.entries(steps)) {
    const begin = performance.now();
    try {
      await step();
      console.log(`${name} ok ${what} (${Math.round(performance.now() - begin)} ms)`);
    } catch (error) {
      failed += 1;
      console.log(`${name} FAILED ${what} ${String(error.message).split('\n')[0]}`);
      await page.screenshot({ path: path.join(outDir, `failed-${what}.png`) }).catch(() => {});
      const said = await page.evaluate(() => document.getElementById('problem').textContent).catch(() => '');
      if (said) console.log(`${name} says ${said}`);
    }
  }
  await page.context().close();
  server.http.closeAllConnections();
  server.http.close();
  return failed;
}
