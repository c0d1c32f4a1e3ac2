// Voice: speak, hear the answer, interrupt it. A client of the realtime socket.

import { socket } from "./api.js";
import { choices, labelled, make, seconds } from "./dom.js";
import { fromBase64, toBase64 } from "./pcm.js";

const RATE = 24000;
// a key was pressed without a word, or with nothing to stop
const HARMLESS = ["response_cancel_not_active", "input_audio_buffer_commit_empty", "nothing_to_answer", "item_not_found"];

class VoiceRoom extends HTMLElement {
  connectedCallback() {
    this.talking = null; // what is open while a conversation runs
    this.model = make("select", {});
    this.start = make("button", { class: "main", type: "button", onclick: () => this.toggle() }, "Start");
    this.hold = make("input", { type: "checkbox", onchange: () => this.configure() });
    this.key = make("button", {
      type: "button", hidden: true, "aria-pressed": "false",
      onpointerdown: () => this.press(true), onpointerup: () => this.press(false), onpointerleave: () => this.press(false),
      onkeydown: (event) => { if (event.key === " " && !event.repeat) this.press(true); },
      onkeyup: (event) => { if (event.key === " ") this.press(false); },
    }, "Hold to talk");
    this.meter = make("meter", { min: 0, max: 1, low: 0.02, high: 0.7, optimum: 0.3, "aria-label": "Microphone level" });
    this.note = make("p", { class: "small", role: "status" });
    this.log = make("div", { role: "log", "aria-label": "Conversation" });
    this.replaceChildren(
      make("p", { class: "row" }, this.start, ...labelled("Model", this.model), ...labelled("Push to talk", this.hold), this.key),
      this.meter, this.note, this.log);
  }

  models(ready) {
    choices(this.model, ready.filter((one) => one.abilities.includes("realtime")).map((one) => one.id));
    const able = this.model.options.length > 0;
    this.start.disabled = !able && !this.talking;
    if (!able) this.note.textContent = "This server has no voice model; start it with -m nano-audio.";
    else if (!this.talking && this.note.textContent?.startsWith("This server")) this.note.textContent = "";
  }

  shown(yes) {
    if (!yes && this.talking) this.end("");
  }

  complain(text) {
    this.note.replaceChildren(make("span", { class: "bad", role: "alert" }, text));
  }

  async toggle() {
    if (this.talking) return this.end("ended");
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({
        audio: { echoCancellation: true, noiseSuppression: true, channelCount: 1 },
      });
    } catch {
      return this.complain("the microphone cannot be used; allow it in the browser and look whether one is plugged in");
    }
    const context = new AudioContext({ sampleRate: RATE });
    await context.audioWorklet.addModule("/static/worklets.js");
    const capture = new AudioWorkletNode(context, "capture", { numberOfOutputs: 0 });
    const player = new AudioWorkletNode(context, "player", { numberOfInputs: 0, outputChannelCount: [2] });
    context.createMediaStreamSource(stream).connect(capture);
    player.connect(context.destination);
    const line = socket(`/v1/realtime?model=${encodeURIComponent(this.model.value)}`);
    this.talking = { stream, context, player, line, item: null, heard: 0, spoke: 0, pressed: false, turns: new Map() };
    this.start.textContent = "Stop";
    this.note.textContent = "connecting…";
    line.onmessage = ({ data }) => this.told(JSON.parse(data));
    line.onclose = () => this.end("the conversation has ended");
    line.onerror = () => this.complain("the server closed the line; is the model loaded, and no other conversation in its place?");
    capture.port.onmessage = ({ data }) => this.heardMicrophone(data);
    player.port.onmessage = ({ data }) => {
      if (this.talking) [this.talking.item, this.talking.heard] = [data.item, data.heard];
    };
    stream.getTracks()[0].onended = () => this.end("the microphone was unplugged");
  }

  end(text) {
    const open = this.talking;
    if (!open) return;
    this.talking = null;
    open.line.onclose = null;
    open.line.close();
    open.stream.getTracks().forEach((track) => track.stop());
    open.context.close();
    this.start.textContent = "Start";
    this.meter.value = 0;
    this.note.textContent = text;
  }

  send(event) {
    if (this.talking?.line.readyState === WebSocket.OPEN) this.talking.line.send(JSON.stringify(event));
  }

  configure() {
    this.key.hidden = !this.hold.checked;
    const detection = this.hold.checked ? null : { type: "server_vad", interrupt_response: true };
    const input = { turn_detection: detection, transcription: {} };
    this.send({ type: "session.update", session: { type: "realtime", audio: { input } } });
  }

  press(down) {
    if (!this.talking || this.talking.pressed === down) return;
    this.talking.pressed = down;
    this.key.setAttribute("aria-pressed", String(down));
    if (down) {
      this.cut();
      this.send({ type: "response.cancel" });
      this.send({ type: "input_audio_buffer.clear" });
    } else {
      this.talking.spoke = performance.now();
      this.send({ type: "input_audio_buffer.commit" });
      this.send({ type: "response.create" });
    }
  }

  heardMicrophone(samples) {
    let loudest = 0;
    for (const sample of samples) loudest = Math.max(loudest, Math.abs(sample));
    this.meter.value = Math.max(loudest, this.meter.value * 0.9);
    if (!this.hold.checked || this.talking?.pressed)
      this.send({ type: "input_audio_buffer.append", audio: toBase64(samples) });
  }

  /** Stop what is playing, and tell the server how much of it was heard. */
  cut() {
    const open = this.talking;
    open.player.port.postMessage({ clear: true });
    if (open.item)
      this.send({
        type: "conversation.item.truncate", item_id: open.item, content_index: 0,
        audio_end_ms: Math.floor((open.heard / RATE) * 1000),
      });
    open.item = null;
  }

  /** The card of one turn. */
  turn(id, who) {
    let card = this.talking.turns.get(id);
    if (!card) {
      const [text, note] = [make("p", {}), make("p", { class: "small" })];
      card = { text, note, said: "" };
      this.talking.turns.set(id, card);
      this.log.prepend(make("article", { class: who === "you" ? "card you" : "card" },
        make("h2", {}, who === "you" ? "You" : "Model"), text, note));
    }
    return card;
  }

  told(event) {
    const open = this.talking;
    if (!open) return;
    switch (event.type) {
      case "session.created":
        this.note.textContent = "listening";
        this.configure();
        break;
      case "input_audio_buffer.speech_started":
        this.cut();
        this.note.textContent = "you speak";
        break;
      case "input_audio_buffer.speech_stopped":
        open.spoke = performance.now();
        this.note.textContent = "thinking";
        break;
      case "lfm2_mm.output.paused":
        open.player.port.postMessage({ pause: true });
        break;
      case "lfm2_mm.output.resumed":
        open.player.port.postMessage({ pause: false });
        this.note.textContent = "answering";
        break;
      case "conversation.item.input_audio_transcription.delta":
      case "conversation.item.input_audio_transcription.completed": {
        const card = this.turn(event.item_id, "you");
        card.said = event.transcript ?? card.said + (event.delta ?? "");
        card.text.textContent = card.said;
        break;
      }
      case "input_audio_buffer.committed":
        this.turn(event.item_id, "you").text.textContent ||= "(spoken)";
        break;
      case "response.output_audio_transcript.delta":
      case "response.output_text.delta": {
        const card = this.turn(event.item_id, "model");
        card.said += event.delta;
        card.text.textContent = card.said;
        break;
      }
      case "response.output_audio.delta": {
        const card = this.turn(event.item_id, "model");
        if (open.spoke) {
          card.note.textContent = `first sound ${seconds((performance.now() - open.spoke) / 1000)} after the last word`;
          open.spoke = 0;
        }
        open.player.port.postMessage({ item: event.item_id, samples: fromBase64(event.delta) });
        this.note.textContent = "answering";
        break;
      }
      case "response.done":
        if (event.response.status === "cancelled") {
          for (const item of event.response.output ?? []) {
            const card = open.turns.get(item.id);
            if (card) card.note.textContent += " · interrupted";
          }
          if (!this.hold.checked) this.cut();
        } else this.note.textContent = "listening";
        break;
      case "lfm2_mm.turn.latency":
        this.note.textContent = event.text ?? this.note.textContent;
        break;
      case "error":
        if (HARMLESS.includes(event.error.code)) break;
        this.complain(event.error.message);
        break;
    }
  }
}

customElements.define("voice-room", VoiceRoom);
