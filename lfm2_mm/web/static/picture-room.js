// Picture: drop or take one, ask, see how it was cut, the boxes that were found, and the speed.

import { chat, Problem } from "./api.js";
import { choices, labelled, make, seconds } from "./dom.js";

const LARGEST = 24 << 20; // bytes of a file

class PictureRoom extends HTMLElement {
  connectedCallback() {
    this.picture = null; // {url, image}
    this.turns = [];
    this.stop = null;
    this.model = make("select", {});
    this.file = make("input", { type: "file", accept: "image/*", onchange: () => this.take(this.file.files[0]) });
    this.canvas = make("canvas", { hidden: true, role: "img" });
    this.video = make("video", { hidden: true, muted: true, playsinline: true, "aria-label": "Camera" });
    this.hint = make("p", {}, "Drop a picture here, paste one, or choose a file.");
    this.drop = make(
      "div",
      {
        class: "drop",
        ondragover: (event) => { event.preventDefault(); this.drop.classList.add("over"); },
        ondragleave: () => this.drop.classList.remove("over"),
        ondrop: (event) => {
          event.preventDefault();
          this.drop.classList.remove("over");
          this.take(event.dataTransfer.files[0]);
        },
      },
      this.hint, this.canvas, this.video,
    );
    this.camera = make("button", { type: "button", onclick: () => this.useCamera() }, "Camera");
    this.tiles = make("input", { type: "checkbox", onchange: () => this.draw() });
    this.question = make("input", { class: "grow", autocomplete: "off", required: true });
    this.send = make("button", { class: "main" }, "Ask");
    this.answers = make("div", { role: "log", "aria-label": "Answers" });
    const form = make("form", { class: "row", onsubmit: (event) => { event.preventDefault(); this.ask(); } },
      ...labelled("Question", this.question), this.send);
    this.replaceChildren(make("div", { class: "columns" },
      make("section", { "aria-label": "Picture" },
        this.drop,
        make("p", { class: "row" }, ...labelled("File", this.file), this.camera),
        make("p", { class: "row" }, ...labelled("Show tiles", this.tiles), ...labelled("Model", this.model))),
      make("section", { "aria-label": "Conversation" }, form, make("p"), this.answers)));
    document.addEventListener("paste", (event) => {
      if (!this.hidden && event.clipboardData?.files.length) this.take(event.clipboardData.files[0]);
    });
  }

  models(ready) {
    choices(this.model, ready.filter((one) => one.abilities.includes("image")).map((one) => one.id));
    this.send.disabled = this.model.options.length === 0;
  }

  shown(yes) {
    if (!yes) this.stopCamera();
  }

  /** @param {File|Blob|undefined} file */
  async take(file) {
    if (!file) return;
    this.stopCamera();
    if (file.size > LARGEST) return this.complain(`the picture has ${Math.round(file.size / 1e6)} MB; choose one below ${LARGEST >> 20} MB`);
    const url = await new Promise((resolve) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.readAsDataURL(file);
    });
    const image = new Image();
    image.onload = () => {
      this.picture = { url, image, info: null, boxes: [] };
      this.turns = [];
      this.answers.replaceChildren();
      this.draw();
      this.question.focus();
    };
    image.onerror = () => this.complain("this file is no picture that the browser can show; choose another");
    image.src = url;
  }

  async useCamera() {
    if (this.stream) {
      const shot = make("canvas", { width: this.video.videoWidth, height: this.video.videoHeight });
      shot.getContext("2d").drawImage(this.video, 0, 0);
      shot.toBlob((blob) => this.take(blob), "image/jpeg", 0.92);
      return;
    }
    try {
      this.stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch {
      this.complain("the camera cannot be used; allow it in the browser, or choose a file");
      return;
    }
    this.video.srcObject = this.stream;
    await this.video.play();
    this.video.hidden = false;
    this.canvas.hidden = this.hint.hidden = true;
    this.camera.textContent = "Take picture";
  }

  stopCamera() {
    this.stream?.getTracks().forEach((track) => track.stop());
    this.stream = null;
    if (this.video) {
      this.video.hidden = true;
      this.camera.textContent = "Camera";
    }
  }

  draw() {
    if (!this.picture) return;
    const { image, info, boxes } = this.picture;
    this.hint.hidden = true;
    this.canvas.hidden = false;
    const [width, height] = [image.naturalWidth, image.naturalHeight];
    this.canvas.width = width;
    this.canvas.height = height;
    this.canvas.setAttribute("aria-label", `Picture of ${width} by ${height} pixels`);
    const pen = this.canvas.getContext("2d");
    pen.drawImage(image, 0, 0);
    const stroke = Math.max(2, Math.min(width, height) / 160);
    pen.lineWidth = stroke;
    if (this.tiles.checked && info) {
      const [columns, rows] = info.tiles ?? [1, 1];
      pen.strokeStyle = "#ff3bd4";
      for (let x = 0; x < columns; x += 1) for (let y = 0; y < rows; y += 1)
        pen.strokeRect((x * width) / columns, (y * height) / rows, width / columns, height / rows);
    }
    pen.strokeStyle = pen.fillStyle = "#ff9500";
    pen.font = `${Math.max(12, Math.min(width, height) / 28)}px system-ui, sans-serif`;
    for (const { bbox_2d: [left, top, right, bottom], label } of boxes) {
      pen.strokeRect((left * width) / 1000, (top * height) / 1000, ((right - left) * width) / 1000, ((bottom - top) * height) / 1000);
      pen.fillText(label ?? "", (left * width) / 1000 + stroke, (top * height) / 1000 - stroke);
    }
  }

  complain(text) {
    this.answers.prepend(make("p", { class: "bad", role: "alert" }, text));
  }

  async ask() {
    if (this.stop) return this.stop.abort();
    const text = this.question.value.trim();
    if (!text) return;
    if (!this.picture) return this.complain("there is no picture yet; drop or choose one first");
    const first = { type: "image_url", image_url: { url: this.picture.url } };
    this.turns.push({ role: "user", content: this.turns.length ? text : [first, { type: "text", text }] });
    const body = make("p", {});
    const note = make("p", { class: "small" });
    this.answers.prepend(make("article", { class: "card" }, make("h2", {}, text), body, note));
    this.question.value = "";
    this.send.textContent = "Stop";
    this.stop = new AbortController();
    const began = performance.now();
    let firstAt = 0;
    let answer = "";
    try {
      const asked = { model: this.model.value, messages: this.turns };
      for await (const chunk of chat(asked, this.stop.signal)) {
        const piece = chunk.choices[0]?.delta.content;
        if (piece) {
          firstAt ||= performance.now();
          answer += piece;
          body.textContent = answer;
        }
        if (chunk.usage) this.told(chunk, note, (firstAt - began) / 1000);
      }
      this.turns.push({ role: "assistant", content: answer });
      if (!answer) body.textContent = "(no answer)";
      this.picture.boxes = boxesIn(answer);
      this.draw();
    } catch (error) {
      this.turns.pop();
      if (error instanceof Problem) note.replaceChildren(make("span", { class: "bad", role: "alert" }, error.message));
      else note.textContent = "stopped";
    }
    this.stop = null;
    this.send.textContent = "Ask";
    this.question.focus();
  }

  /** The line below an answer. */
  told(chunk, note, firstSeen) {
    const { usage, lfm2_mm: own } = chunk;
    const parts = [];
    const info = own?.attachments?.[0];
    if (info?.tiles) parts.push(`${info.tiles[0]}×${info.tiles[1]} tiles`);
    if (info?.tokens) parts.push(`${info.tokens} image tokens`);
    if (usage.prompt_tokens_details?.cached_tokens) parts.push(`${usage.prompt_tokens_details.cached_tokens} of ${usage.prompt_tokens} cached`);
    parts.push(`first token ${seconds(firstSeen)}`);
    if (own?.tokens_per_second) parts.push(`${own.tokens_per_second} tokens/s`);
    note.textContent = parts.join(" · ");
    if (info) this.picture.info = info;
    this.draw();
  }
}

/**
 * Boxes in a grounding answer; none in any other.
 * @param {string} text
 */
export function boxesIn(text) {
  const start = text.indexOf("[");
  const end = text.lastIndexOf("]");
  if (start < 0 || end <= start) return [];
  try {
    const found = JSON.parse(text.slice(start, end + 1));
    return found.filter((box) => Array.isArray(box?.bbox_2d) && box.bbox_2d.length === 4 && box.bbox_2d.every(Number.isFinite));
  } catch {
    return [];
  }
}

customElements.define("picture-room", PictureRoom);
