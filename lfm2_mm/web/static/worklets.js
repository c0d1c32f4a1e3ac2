// Runs on the audio thread: hands the microphone out in pieces, and plays what is queued.

const PIECE = 480; // samples: 20 ms at 24 kHz

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.held = new Float32Array(PIECE);
    this.count = 0;
  }

  process([[samples]]) {
    if (!samples) return true;
    for (const sample of samples) {
      this.held[this.count] = sample;
      this.count += 1;
      if (this.count === PIECE) {
        this.port.postMessage(this.held.slice());
        this.count = 0;
      }
    }
    return true;
  }
}

/** Plays pieces without gaps between them and tells how many samples of each item were heard. */
class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    this.queue = []; // {item, samples, at}
    this.paused = false;
    this.heard = 0;
    this.item = null;
    this.port.onmessage = ({ data }) => {
      if (data.samples) this.queue.push({ item: data.item, samples: data.samples, at: 0 });
      if (data.pause !== undefined) this.paused = data.pause;
      if (data.clear) {
        this.port.postMessage({ item: this.item, heard: this.heard, cleared: true });
        this.queue = [];
        this.paused = false;
      }
    };
  }

  process(_, [channels]) {
    const out = channels[0];
    let filled = 0;
    while (!this.paused && filled < out.length && this.queue.length) {
      const piece = this.queue[0];
      if (piece.item !== this.item) {
        this.item = piece.item;
        this.heard = 0;
      }
      const count = Math.min(out.length - filled, piece.samples.length - piece.at);
      out.set(piece.samples.subarray(piece.at, piece.at + count), filled);
      filled += count;
      piece.at += count;
      this.heard += count;
      if (piece.at === piece.samples.length) this.queue.shift();
    }
    for (let i = 1; i < channels.length; i += 1) channels[i].set(out);
    if (filled && currentFrame % 2400 < out.length) this.port.postMessage({ item: this.item, heard: this.heard });
    return true;
  }
}

registerProcessor("capture", Capture);
registerProcessor("player", Player);
