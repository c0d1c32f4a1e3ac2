// Voice: speak, hear the answer, interrupt it. A client of the realtime socket.

import { socket } from "./api.js";
import { choices, labelled, make, seconds } from "./dom.js";
import { fromBase64, toBase64 } from "./pcm.js";
import { place } from "./turns.js";

const RATE = 24000;
const EARLY = 250; // pieces of 20 ms
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
      make("div", { class: "stays" },
        make("p", { class: "row" }, this.start, ...labelled("Model", this.model), make("span", { class: "pair" }, ...labelled("Push to talk", this.hold)), this.key),
        this.meter, this.note),
      this.log);
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
    this.talking = { stream, context, player, line, item: null, heard: 0, spoke: 0, pressed: false, turns: [], early: [] };
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
    if (this.hold.checked && !this.talking?.pressed) return;
    if (this.talking?.early) this.talking.early.push(samples);
    else this.send({ type: "input_audio_buffer.append", audio: toBase64(samples) });
  }

  /** Send what was said while the line was being opened: its last seconds. */
  catchUp() {
    const { early } = this.talking;
    this.talking.early = null;
    for (const samples of early.slice(-EARLY)) this.send({ type: "input_audio_buffer.append", audio: toBase64(samples) });
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

  /** The card of one turn, where the item stands in the conversation. */
  turn(id, who, after) {
    const { turns } = this.talking;
    const known = turns.find((one) => one.id === id);
    if (known) return known;
    const [text, note, times] = [make("p", { dir: "auto" }), make("p", { class: "small" }), make("p", { class: "small" })];
    const box = make("article", { class: who === "you" ? "card you" : "card" },
      make("h2", {}, who === "you" ? "You" : "Model"), text, note, times);
    const card = { id, who, box, text, note, times, said: "", response: null };
    const at = place(turns, who, after);
    this.follow(() => this.log.insertBefore(box, turns[at]?.box ?? null));
    turns.splice(at, 0, card);
    return card;
  }

  /** Let the log grow; whoever reads its end goes on reading its end. */
  follow(grow) {
    const page = document.documentElement;
    const atEnd = page.scrollHeight - page.clientHeight - page.scrollTop < 80;
    grow();
    if (atEnd && !this.hidden) page.scrollTop = page.scrollHeight;
  }

  write(card, text) {
    card.said = text;
    this.follow(() => { card.text.textContent = text; });
  }

  told(event) {
    const open = this.talking;
    if (!open) return;
    switch (event.type) {
      case "session.created":
        this.note.textContent = "listening";
        this.configure();
        this.catchUp();
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
        this.write(card, event.transcript ?? card.said + (event.delta ?? ""));
        break;
      }
      case "input_audio_buffer.committed":
        this.turn(event.item_id, "you", event.previous_item_id).text.textContent ||= "(spoken)";
        break;
      case "conversation.item.added":
        if (event.item.role === "assistant") this.turn(event.item.id, "model", event.previous_item_id);
        break;
      case "conversation.item.deleted": {
        const at = open.turns.findIndex((one) => one.id === event.item_id);
        if (at >= 0) open.turns.splice(at, 1)[0].box.remove();
        break;
      }
      case "response.output_audio_transcript.delta":
      case "response.output_text.delta": {
        const card = this.turn(event.item_id, "model");
        card.response = event.response_id;
        this.write(card, card.said + event.delta);
        break;
      }
      case "response.output_audio.delta": {
        const card = this.turn(event.item_id, "model");
        if (open.spoke) {
          card.note.textContent = `first sound ${seconds((performance.now() - open.spoke) / 1000)} after your turn ended`;
          open.spoke = 0;
        }
        open.player.port.postMessage({ item: event.item_id, samples: fromBase64(event.delta) });
        this.note.textContent = "answering";
        break;
      }
      case "response.done":
        if (event.response.status === "cancelled") {
          for (const item of event.response.output ?? []) {
            const card = open.turns.find((one) => one.id === item.id);
            if (card) card.note.textContent = [card.note.textContent, "interrupted"].filter(Boolean).join(" · ");
          }
          if (!this.hold.checked) this.cut();
        } else this.note.textContent = "listening";
        break;
      case "lfm2_mm.turn.latency": {
        const card = open.turns.find((one) => one.response === event.response_id);
        if (card && event.text) this.follow(() => { card.times.textContent = event.text; });
        break;
      }
      case "error":
        if (HARMLESS.includes(event.error.code)) break;
        this.complain(event.error.message);
        break;
    }
  }
}

customElements.define("voice-room", VoiceRoom);
