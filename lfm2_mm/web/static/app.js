// The page: which room is open, which models there are, and whether the server is well.

import { ask, Problem, setKey } from "./api.js";
import "./picture-room.js";
import "./search-room.js";
import "./voice-room.js";

const rooms = ["picture", "voice", "search"];
const state = /** @type {HTMLElement} */ (document.getElementById("state"));
const keyForm = /** @type {HTMLFormElement} */ (document.getElementById("key"));
const keyField = /** @type {HTMLInputElement} */ (document.getElementById("key-field"));

function say(text, bad = false) {
  if (state.textContent !== text) state.textContent = text;
  state.classList.toggle("bad", bad);
}

function open() {
  const wanted = rooms.includes(location.hash.slice(1)) ? location.hash.slice(1) : rooms[0];
  for (const name of rooms) {
    const room = /** @type {any} */ (document.getElementById(name));
    room.hidden = name !== wanted;
    room.shown?.(name === wanted);
    const link = document.querySelector(`[data-room=${name}]`);
    if (name === wanted) link?.setAttribute("aria-current", "page");
    else link?.removeAttribute("aria-current");
  }
}

/** Ask how the server is; again soon while it loads or is away, seldom while all is well. */
async function look() {
  let again = 15000;
  try {
    const { data } = await ask("/v1/models");
    keyForm.hidden = true;
    const ready = data.filter((model) => model.status === "ready");
    const loading = data.filter((model) => model.status === "loading");
    for (const name of rooms) /** @type {any} */ (document.getElementById(name)).models?.(ready);
    if (loading.length) {
      say(`loading ${loading.map((model) => model.id).join(", ")}…`);
      again = 1000;
    } else if (ready.length) say("ready");
    else say("no model could be loaded; the server's log says why", true);
  } catch (error) {
    if (error instanceof Problem && error.status === 401) {
      say("locked: the API key is needed", true);
      if (keyForm.hidden) {
        keyForm.hidden = false;
        keyField.focus();
      }
    } else {
      say("offline: the server cannot be reached", true);
      again = 3000;
    }
  }
  setTimeout(look, again);
}

keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(keyField.value);
  keyField.value = "";
  location.reload();
});
addEventListener("hashchange", open);
open();
look();
