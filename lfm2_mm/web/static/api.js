// The server, as any client sees it: /v1 and nothing else.

import { events } from "./sse.js";

const KEY = "lfm2_mm.key";

/** What went wrong, as the server says it. */
export class Problem extends Error {
  /**
   * @param {number} status 0 where the server could not be reached
   * @param {string} message
   */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** @param {string} key kept for this tab only */
export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

export function getKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

/**
 * @param {string} path
 * @param {RequestInit & {json?: any}} [options]
 */
export async function call(path, options = {}) {
  const headers = new Headers(options.headers);
  if (getKey()) headers.set("authorization", `Bearer ${getKey()}`);
  if (options.json !== undefined) headers.set("content-type", "application/json");
  let answer;
  try {
    answer = await fetch(path, {
      ...options,
      headers,
      body: options.json === undefined ? options.body : JSON.stringify(options.json),
    });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new Problem(0, "the server cannot be reached; is it still running?");
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    throw new Problem(answer.status, told?.error?.message ?? `the server answered ${answer.status}`);
  }
  return answer;
}

/** JSON of an answer. */
export async function ask(path, options) {
  return (await call(path, options)).json();
}

/** Chunks of a chat completion. @param {any} body @param {AbortSignal} signal */
export async function* chat(body, signal) {
  const json = { ...body, stream: true, stream_options: { include_usage: true } };
  const answer = await call("/v1/chat/completions", { method: "POST", json, signal });
  for await (const chunk of events(/** @type {ReadableStream} */ (answer.body))) {
    if (chunk.error) throw new Problem(503, chunk.error.message);
    yield chunk;
  }
}

/** Address of a socket on this server. @param {string} path */
export function socket(path) {
  const url = new URL(path, location.href);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  const protocols = ["realtime"];
  if (getKey()) protocols.push(`openai-insecure-api-key.${getKey()}`);
  return new WebSocket(url, protocols);
}
