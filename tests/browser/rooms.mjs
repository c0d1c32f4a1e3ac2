// The page in a real browser, each room from end to end, against a server on the embedded models.
//
//   node rooms.mjs BASE_URL PICTURES_FOLDER [DOCUMENT…]
//
// Fails on any console error, any request that leaves the origin, and any finding of axe. Needs
// Chromium (CHROMIUM names it), playwright-core and axe-core; `make test-browser` brings all but
// the first. Screenshots go into PICTURES_FOLDER.

import assert from "node:assert/strict";
import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

import { chromium } from "playwright-core";

const [base, folder, ...documents] = process.argv.slice(2);
const here = (path) => fileURLToPath(new URL(`../../${path}`, import.meta.url));
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const speech = process.env.SPEECH ?? "";
mkdirSync(folder, { recursive: true });

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
    "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
    ...(speech ? [`--use-file-for-fake-audio-capture=${speech}%noloop`] : []),
  ],
});

/** A fresh page that remembers what must not happen. */
async function visit(options = {}) {
  const context = await browser.newContext({ viewport: { width: 1100, height: 720 }, ...options });
  const page = await context.newPage();
  const wrong = [];
  page.on("console", (message) => message.type() === "error" && wrong.push(message.text()));
  page.on("pageerror", (error) => wrong.push(String(error)));
  page.on("request", (request) => {
    if (!/^(data|blob):/.test(request.url()) && !request.url().startsWith(base)) wrong.push(`left the origin: ${request.url()}`);
  });
  await page.goto(base);
  await page.waitForFunction(() => document.getElementById("state")?.textContent === "ready", null, { timeout: 120000 });
  return { page, wrong };
}

async function accessible(page, room) {
  await page.evaluate(`${axe};0`);
  const found = await page.evaluate(async () => {
    const { violations } = await globalThis.axe.run();
    return violations.map((one) => `${one.id}: ${one.nodes.map((node) => node.html.slice(0, 120)).join(" | ")}`);
  });
  assert.deepEqual(found, [], `axe in the ${room} room`);
}

const open = (page, room) => page.getByRole("link", { name: room }).click();
const shot = (page, name) => page.screenshot({ path: join(folder, `page-${name}.png`) });

async function picture() {
  const { page, wrong } = await visit();
  await page.setInputFiles("picture-room input[type=file]", here("vision/lfm2_vision/examples/wide.png"));
  await page.waitForSelector("picture-room canvas:visible");
  await page.locator("picture-room").getByLabel("Question").fill("What colour is the circle?");
  await page.getByRole("button", { name: "Ask", exact: true }).click();
  await page.waitForSelector("picture-room .card .small:not(:empty)");
  assert.equal(await page.textContent("picture-room .card p"), "red");
  await page.locator("picture-room").getByLabel("Question").fill("What colour is the star?");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelectorAll("picture-room .card .small:not(:empty)").length === 2);
  assert.match(await page.textContent("picture-room .card .small"), /cached/);
  await page.getByLabel("Show tiles").check();
  await accessible(page, "picture");
  await shot(page, "picture");
  await page.setViewportSize({ width: 390, height: 800 });
  const width = await page.evaluate(() => document.documentElement.scrollWidth);
  assert.ok(width <= 390, `the page is ${width} wide on a phone`);
  await page.getByRole("button", { name: "Camera" }).click();
  await page.getByRole("button", { name: "Take picture" }).click();
  await page.waitForSelector("picture-room canvas:visible");
  assert.deepEqual(wrong, []);
  await page.context().close();
}

async function search() {
  const { page, wrong } = await visit({ colorScheme: "dark" });
  await open(page, "Search");
  await page.waitForFunction(() => /documents/.test(document.querySelector("search-room [role=status]")?.textContent ?? ""));
  await page.setInputFiles("search-room input[type=file] >> nth=0", documents);
  await page.waitForFunction(() => /indexed in/.test(document.querySelector("search-room [role=status]")?.textContent ?? ""), null, { timeout: 120000 });
  await page.locator("search-room").getByLabel("Question").fill("How do I clean the washing machine?");
  await page.keyboard.press("Enter");
  await page.waitForSelector("search-room li mark");
  await accessible(page, "search");
  await shot(page, "search");
  await page.locator("search-room li").first().getByRole("button", { name: "Source" }).click();
  await page.waitForSelector("dialog[open] pre");
  await page.keyboard.press("Escape");
  assert.equal(await page.locator("dialog[open]").count(), 0);
  assert.deepEqual(wrong, []);
  await page.context().close();
}

async function voice() {
  const { page, wrong } = await visit();
  await open(page, "Voice");
  await accessible(page, "voice");
  const start = page.getByRole("button", { name: "Start" });
  if (await start.isDisabled()) {
    assert.match(await page.textContent("voice-room [role=status]"), /no voice model/);
    console.log("voice: no model; the room says so");
  } else if (speech) {
    await start.click();
    await page.waitForFunction(() => /listening|you speak/.test(document.querySelector("voice-room [role=status]")?.textContent ?? ""), null, { timeout: 60000 });
    await page.waitForSelector("voice-room .card.you", { timeout: 120000 });
    const wanted = process.env.ANSWER ?? "";
    await page.waitForFunction((text) => [...document.querySelectorAll("voice-room .card:not(.you) p:first-of-type")]
      .some((one) => one.textContent && one.textContent.includes(text)), wanted, { timeout: 120000 });
    await page.waitForFunction(() => /first sound/.test(document.querySelector("voice-room .card:not(.you) .small")?.textContent ?? ""), null, { timeout: 120000 });
    await page.waitForFunction(() => !["", "(spoken)"].includes(document.querySelector("voice-room .card.you p")?.textContent ?? ""), null, { timeout: 120000 });
    await page.waitForFunction(() => /real time/.test(document.querySelector("voice-room .card:not(.you)")?.textContent ?? ""), null, { timeout: 60000 });
    const order = await page.locator("voice-room .card h2").allTextContents();
    assert.deepEqual(order, ["You", "Model"], "a question stands above its answer");
    await accessible(page, "voice");
    await shot(page, "voice");
    await page.getByRole("button", { name: "Stop" }).click();
    await page.setViewportSize({ width: 390, height: 800 });
    const width = await page.evaluate(() => document.documentElement.scrollWidth);
    assert.ok(width <= 390, `the voice room is ${width} wide on a phone`);
    await page.emulateMedia({ colorScheme: "dark" });
    await shot(page, "phone");
  }
  assert.deepEqual(wrong, []);
  await page.context().close();
}

async function offline() {
  const { page } = await visit();
  await page.context().setOffline(true);
  await page.waitForFunction(() => /offline/.test(document.getElementById("state")?.textContent ?? ""), null, { timeout: 60000 });
  await page.context().close();
}

try {
  for (const room of [picture, search, voice, offline]) {
    await room();
    console.log(`${room.name}: ok`);
  }
} finally {
  await browser.close();
}
