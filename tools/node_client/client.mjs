// OpenAI's own client for node against a running server: node client.mjs BASE PICTURE SPEECH
import assert from "node:assert/strict";
import { createReadStream, readFileSync } from "node:fs";
import OpenAI, { APIError } from "openai";
import { OpenAIRealtimeWS } from "openai/realtime/ws";

const [base, picture, speech] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: "none", maxRetries: 0 });
const url = `data:image/png;base64,${readFileSync(picture).toString("base64")}`;
const asked = (text) => [
  {
    role: "user",
    content: [
      { type: "image_url", image_url: { url } },
      { type: "text", text },
    ],
  },
];
const model = "nano-vl";
const messages = asked("What colour is the circle?");
const parameters = {
  type: "object",
  properties: { colour: { enum: ["red", "blue"] } },
  required: ["colour"],
  additionalProperties: false,
};

const parts = {
  async "chat with a picture"() {
    const answer = await client.chat.completions.create({ model, messages });
    assert.equal(answer.choices[0].message.content, "red");
    assert.ok(answer.usage.completion_tokens > 0);
  },

  async streaming() {
    const stream = await client.chat.completions.create({
      model,
      messages,
      stream: true,
      stream_options: { include_usage: true },
    });
    let text = "";
    let usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, "red");
    assert.ok(usage.completion_tokens > 0);
  },

  async "a tool"() {
    const answer = await client.chat.completions.create({
      model,
      messages,
      tools: [{ type: "function", function: { name: "paint", parameters } }],
      tool_choice: "required",
    });
    const call = answer.choices[0].message.tool_calls[0];
    assert.equal(call.function.name, "paint");
    assert.ok(["red", "blue"].includes(JSON.parse(call.function.arguments).colour));
  },

  async "a JSON schema"() {
    const answer = await client.chat.completions.create({
      model,
      messages,
      response_format: { type: "json_schema", json_schema: { name: "a", schema: parameters } },
    });
    // which colour is left open: nano-vl was never taught JSON
    assert.match(answer.choices[0].message.content, /^\s*\{\s*"colour"\s*:\s*"(red|blue)"\s*\}\s*$/);
  },

  async embeddings() {
    const found = await client.embeddings.create({
      model: "nano-colbert",
      input: ["a red circle", "a blue square"],
      encoding_format: "float",
    });
    assert.equal(found.data.length, 2);
  },

  async transcription() {
    const found = await client.audio.transcriptions.create({
      model: "nano-audio",
      file: createReadStream(speech),
    });
    assert.match(found.text, /open/i);
  },

  async speech() {
    const answer = await client.audio.speech.create({
      model: "nano-audio",
      voice: "default",
      input: "open",
      response_format: "wav",
    });
    const sound = Buffer.from(await answer.arrayBuffer());
    assert.equal(sound.subarray(0, 4).toString(), "RIFF");
    assert.ok(sound.length > 1000);
  },

  async "an error"() {
    const wrong = client.chat.completions.create({ model: "no-such", messages });
    await assert.rejects(wrong, (error) => {
      assert.ok(error instanceof APIError);
      assert.equal(error.status, 404);
      assert.equal(error.code, "model_not_found");
      return true;
    });
  },

  async models() {
    const names = [];
    for await (const one of client.models.list()) names.push(one.id);
    assert.ok(names.includes(model));
  },

  async realtime() {
    const line = new OpenAIRealtimeWS({ model: "nano-audio" }, client);
    const kinds = [];
    await new Promise((resolve, reject) => {
      line.on("error", reject);
      line.on("event", (event) => {
        kinds.push(event.type);
        if (event.type === "session.created") {
          line.send({ type: "session.update", session: { type: "realtime", max_output_tokens: 20 } });
          const content = [{ type: "input_text", text: "Hello" }];
          line.send({
            type: "conversation.item.create",
            item: { type: "message", role: "user", content },
          });
          line.send({ type: "response.create" });
        }
        if (event.type === "response.done") resolve();
      });
    });
    line.close();
    assert.ok(kinds.includes("conversation.item.added"));
    assert.ok(kinds.includes("response.created"));
  },
};

let failed = 0;
for (const [name, part] of Object.entries(parts)) {
  try {
    await part();
    console.log(`ok      ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  ${name}: ${error.stack ?? error}`);
  }
}
console.log(`${Object.keys(parts).length - failed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
