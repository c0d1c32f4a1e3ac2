// Server-sent events out of a byte stream, as chat completions send them.

/** Takes text in any pieces and gives the data of whole events. */
export class Lines {
  constructor() {
    this.rest = "";
  }

  /**
   * @param {string} piece
   * @returns {string[]} the data of every event that is now complete
   */
  push(piece) {
    this.rest += piece;
    const events = this.rest.split(/\r?\n\r?\n/);
    this.rest = events.pop() ?? "";
    return events
      .map((event) =>
        event
          .split(/\r?\n/)
          .filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).replace(/^ /, ""))
          .join("\n"),
      )
      .filter((data) => data !== "");
  }
}

/**
 * The JSON values of a stream, up to `[DONE]`.
 * @param {ReadableStream<Uint8Array>} body
 */
export async function* events(body) {
  const lines = new Lines();
  const decoder = new TextDecoder();
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      for (const data of lines.push(done ? decoder.decode() + "\n\n" : decoder.decode(value, { stream: true }))) {
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
