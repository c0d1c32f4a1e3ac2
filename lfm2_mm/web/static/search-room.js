// Search: put documents in, ask in any language, see the words that matched and the source.

import { ask, call, Problem } from "./api.js";
import { choices, labelled, make, seconds } from "./dom.js";

const BATCH = 24 << 20; // bytes of one upload
const FILES = 200; // of one upload

class SearchRoom extends HTMLElement {
  connectedCallback() {
    this.index = make("select", { onchange: () => this.count() });
    this.query = make("input", { class: "grow", type: "search", autocomplete: "off", required: true });
    this.send = make("button", { class: "main" }, "Search");
    this.files = make("input", { type: "file", multiple: true, onchange: () => this.add(this.files.files) });
    this.folder = make("input", { type: "file", webkitdirectory: true, onchange: () => this.add(this.folder.files) });
    this.bar = make("progress", { hidden: true, "aria-label": "Indexing" });
    this.note = make("p", { class: "small", role: "status" });
    this.results = make("ol", { class: "plain", "aria-live": "polite", "aria-label": "Passages found" });
    this.source = make("dialog", { "aria-label": "Source" });
    this.replaceChildren(
      make("form", { class: "row", onsubmit: (event) => { event.preventDefault(); this.search(); } },
        ...labelled("Question", this.query), this.send, ...labelled("Index", this.index)),
      make("p", { class: "row" }, ...labelled("Add files", this.files), ...labelled("Add a folder", this.folder)),
      this.bar, this.note, this.results, this.source);
  }

  async models(ready) {
    this.able = ready.some((one) => one.abilities.includes("embeddings"));
    this.send.disabled = !this.able;
    if (!this.able) {
      this.note.textContent = "This server has no retriever; start it with -m nano-colbert.";
      return;
    }
    if (this.index.options.length) return;
    try {
      const { data } = await ask("/v1/indexes");
      choices(this.index, data.map((one) => one.id));
      await this.count();
    } catch (error) {
      this.complain(error);
    }
  }

  async count() {
    try {
      const status = await ask(`/v1/indexes/${encodeURIComponent(this.index.value)}`);
      this.note.textContent = `${status.documents} documents, ${status.passages} passages`;
    } catch (error) {
      this.complain(error);
    }
  }

  complain(error) {
    if (!(error instanceof Problem)) throw error;
    this.note.replaceChildren(make("span", { class: "bad", role: "alert" }, error.message));
  }

  /** @param {FileList} chosen */
  async add(chosen) {
    const files = [...chosen].filter((file) => !file.name.startsWith("."));
    if (!files.length) return;
    const began = performance.now();
    const skipped = [];
    let [added, done] = [0, 0];
    this.bar.hidden = false;
    this.bar.max = files.length;
    try {
      while (done < files.length) {
        const form = new FormData();
        let [bytes, count] = [0, 0];
        while (done + count < files.length && count < FILES && (count === 0 || bytes + files[done + count].size < BATCH)) {
          const file = files[done + count];
          form.append("files", file, /** @type {any} */ (file).webkitRelativePath || file.name);
          bytes += file.size;
          count += 1;
        }
        this.note.textContent = `indexing ${done + count} of ${files.length}…`;
        const path = `/v1/indexes/${encodeURIComponent(this.index.value)}/documents`;
        const report = await (await call(path, { method: "POST", body: form })).json();
        added += report.added + report.updated;
        skipped.push(...report.skipped);
        done += count;
        this.bar.value = done;
      }
      const time = seconds((performance.now() - began) / 1000);
      const parts = [`${files.length} files: ${added} documents indexed in ${time}`];
      for (const one of skipped.slice(0, 5)) parts.push(`${one.path}: ${one.reason}`);
      if (skipped.length > 5) parts.push(`and ${skipped.length - 5} more could not be read`);
      this.note.textContent = parts.join(" · ");
    } catch (error) {
      this.complain(error);
    }
    this.bar.hidden = true;
    this.files.value = this.folder.value = "";
    this.query.focus();
  }

  async search() {
    const query = this.query.value.trim();
    if (!query) return;
    const began = performance.now();
    try {
      const { data } = await ask("/v1/search", { method: "POST", json: { query, index: this.index.value, k: 10 } });
      this.note.textContent = data.length
        ? `${data.length} passages in ${seconds((performance.now() - began) / 1000)}`
        : "nothing was found; is there a document in the index?";
      this.results.replaceChildren(...data.map((hit) => this.hit(hit)));
    } catch (error) {
      this.complain(error);
    }
  }

  hit(hit) {
    const where = [hit.path ?? hit.id];
    if (hit.page != null) where.push(`page ${hit.page}`);
    else if (hit.line != null) where.push(`line ${hit.line}`);
    where.push(`score ${hit.score.toFixed(2)}`);
    return make("li", { class: "card" },
      make("h2", { dir: "auto" }, hit.title ?? hit.path ?? hit.id),
      make("p", { dir: "auto" }, ...shortened(hit)),
      make("p", { class: "small row" }, where.join(" · "),
        make("button", { type: "button", onclick: () => this.open(hit) }, "Source")));
  }

  open(hit) {
    const close = make("button", { onclick: () => this.source.close() }, "Close");
    this.source.replaceChildren(make("h2", {}, hit.path ?? hit.id), make("pre", { dir: "auto" }, ...marked(hit)), close);
    this.source.showModal();
  }
}

/** The part of a long passage around its strongest words; the server counts whole characters. */
export function snippet(hit, width = 420) {
  const letters = Array.from(hit.text);
  if (letters.length <= width) return hit;
  const best = hit.spans.reduce((a, b) => (b[2] > a[2] ? b : a), [0, 0, 0]);
  const start = Math.max(0, Math.min(best[0] - width / 2, letters.length - width)) | 0;
  const spans = hit.spans
    .filter(([from, to]) => from >= start && to <= start + width)
    .map(([from, to, weight]) => [from - start, to - start, weight]);
  return { text: letters.slice(start, start + width).join(""), spans };
}

/** The same, marked, with dots where the passage goes on. */
function shortened(hit) {
  const part = snippet(hit);
  const [whole, cut] = [hit.text, part.text];
  return [whole.startsWith(cut) ? null : "…", ...marked(part), whole.endsWith(cut) ? null : "…"];
}

/** Text with its matched words marked; of spans that overlap, the first. */
export function marked({ text, spans }) {
  const letters = Array.from(text);
  const part = (from, to) => letters.slice(from, to).join("");
  const pieces = [];
  let at = 0;
  for (const [from, to, weight] of [...spans].sort((a, b) => a[0] - b[0])) {
    if (from < at) continue;
    pieces.push(part(at, from), make("mark", weight > 0.6 ? { class: "strong" } : {}, part(from, to)));
    at = to;
  }
  return [...pieces, part(at, letters.length)];
}

customElements.define("search-room", SearchRoom);
