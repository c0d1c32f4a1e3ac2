// The page's pure modules, without a browser: node --test tests/browser

import assert from "node:assert/strict";
import { test } from "node:test";

import { fromBase64, toBase64 } from "../../lfm2_mm/web/static/pcm.js";
import { events, Lines } from "../../lfm2_mm/web/static/sse.js";
import { place } from "../../lfm2_mm/web/static/turns.js";

const TEXT = 'data: {"a": "é😀"}\n\n: comment\n\ndata: two\r\ndata: lines\r\n\r\ndata: [DONE]\n\n';

test("events come out whole, however the text is cut", () => {
  for (let size = 1; size < TEXT.length; size += 1) {
    const lines = new Lines();
    const found = [];
    for (let at = 0; at < TEXT.length; at += size) found.push(...lines.push(TEXT.slice(at, at + size)));
    assert.deepEqual(found, ['{"a": "é😀"}', "two\nlines", "[DONE]"]);
  }
});

test("bytes cut within a character are one character again", async () => {
  const bytes = new TextEncoder().encode('data: {"a": "é😀"}\n\ndata: {"a": "z"}\n\ndata: [DONE]\n\n');
  for (let size = 1; size < bytes.length; size += 1) {
    const body = new ReadableStream({
      start(controller) {
        for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
        controller.close();
      },
    });
    const found = [];
    for await (const value of events(body)) found.push(value.a);
    assert.deepEqual(found, ["é😀", "z"]);
  }
});

test("a stream that ends without a last blank line loses nothing", async () => {
  const body = new Response('data: {"a": 1}').body;
  const found = [];
  for await (const value of events(body)) found.push(value.a);
  assert.deepEqual(found, [1]);
});

test("samples survive the way to 16 bits and back", () => {
  const samples = Float32Array.from({ length: 20001 }, (_, i) => Math.sin(i / 7) * 0.99);
  const back = fromBase64(toBase64(samples));
  assert.equal(back.length, samples.length);
  for (let i = 0; i < samples.length; i += 1) assert.ok(Math.abs(back[i] - samples[i]) < 1e-4);
});

test("what is too loud is clipped, not wrapped", () => {
  const back = fromBase64(toBase64(Float32Array.of(2, -2, 1, -1)));
  assert.deepEqual([...back].map((value) => Math.sign(value)), [1, -1, 1, -1]);
});

/** Ids as they stand after news of turns, each [id, who, after]. */
function standing(...news) {
  const turns = [];
  for (const [id, who, after] of news) turns.splice(place(turns, who, after), 0, { id, who });
  return turns.map((turn) => turn.id).join(" ");
}

test("turns stand as their items do, whatever comes first", () => {
  assert.equal(standing(["q1", "you", null], ["a1", "model", "q1"], ["q2", "you", "a1"]), "q1 a1 q2");
  // the next question is committed while the answer before it is not announced
  assert.equal(standing(["q1", "you", null], ["q2", "you", "q1"], ["a1", "model", "q1"]), "q1 a1 q2");
});

test("a question does not come between another and its answer, of which nothing was heard", () => {
  assert.equal(standing(["q1", "you", null], ["a1", "model", "q1"], ["q2", "you", "q1"]), "q1 a1 q2");
});

test("a turn behind one that is not shown stands at the end", () => {
  assert.equal(standing(["q1", "you", null], ["a1", "model", "q1"], ["q2", "you", "gone"], ["a2", "model"]), "q1 a1 q2 a2");
});
