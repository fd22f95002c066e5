// The settings sheet: API key, system prompt, sampling, looks. An empty field leaves the choice to the server.

import { dialogOf } from "./dialogs.js";
import { byId } from "./dom.js";

// name -> [field of the request, lowest, highest, whole number]
const NUMBERS = {
  temperature: ["temperature", 0, 2, false],
  top_p: ["top_p", 0, 1, false],
  top_k: ["top_k", 0, 1000000, true],
  min_p: ["min_p", 0, 1, false],
  repetition_penalty: ["repetition_penalty", 0.01, 10, false],
  max_tokens: ["max_tokens", 1, 10000000, true],
  seed: ["seed", 0, 2 ** 53 - 1, true],
};
const KEPT = "settings";
const KEY = "api-key";

export class Settings {
  // `changed()` is called whenever the user has changed something.
  constructor(changed) {
    this.values = kept();
    this.changed = changed;
    this.dialog = dialogOf("settings");
    byId("reset-sampling").addEventListener("click", () => this.reset());
    for (const name of [...Object.keys(NUMBERS), "stop_texts", "thinking"]) this.bind(name);
    this.bindKey();
    this.bindTheme();
  }

  bind(name) {
    const field = byId(name);
    field.value = this.values[name] ?? "";
    field.addEventListener("input", () => {
      this.values[name] = field.value;
      field.setAttribute("aria-invalid", String(this.wrong(name) !== null));
      byId("settings-problem").textContent = this.problem() ?? "";
      this.keep();
    });
  }

  bindKey() {
    const [field, remember] = [byId("api-key"), byId("remember-key")];
    field.value = this.key;
    remember.checked = stored(() => localStorage.getItem(KEY)) !== null;
    const keep = () => {
      stored(() => sessionStorage.setItem(KEY, field.value));
      stored(() =>
        remember.checked && field.value ? localStorage.setItem(KEY, field.value) : localStorage.removeItem(KEY),
      );
    };
    field.addEventListener("input", keep);
    remember.addEventListener("change", keep);
    field.addEventListener("change", () => this.changed("key"));
    byId("show-key").addEventListener("click", (event) => {
      field.type = field.type === "password" ? "text" : "password";
      event.currentTarget.setAttribute("aria-pressed", String(field.type === "text"));
    });
  }

  bindTheme() {
    for (const choice of document.querySelectorAll("input[name=theme]")) {
      choice.checked = choice.value === (document.documentElement.dataset.theme ?? "system");
      choice.addEventListener("change", () => this.setTheme(choice.value));
    }
  }

  setTheme(theme) {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    stored(() => (theme === "system" ? localStorage.removeItem("theme") : localStorage.setItem("theme", theme)));
    for (const choice of document.querySelectorAll("input[name=theme]")) choice.checked = choice.value === theme;
  }

  get key() {
    return stored(() => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY)) ?? byId("api-key").value;
  }

  get system() {
    return this.values.system ?? "";
  }

  set system(text) {
    this.values.system = text;
    this.keep();
  }

  // What is wrong with a number, or null.
  wrong(name) {
    const text = String(this.values[name] ?? "").trim();
    if (!text || !NUMBERS[name]) return null;
    const [field, lowest, highest, whole] = NUMBERS[name];
    const value = Number(text);
    if (!Number.isFinite(value) || (whole && !Number.isInteger(value)))
      return `${field}: ${text} is not a ${whole ? "whole " : ""}number`;
    return value < lowest || value > highest ? `${field}: ${text} is not between ${lowest} and ${highest}` : null;
  }

  problem() {
    return (
      Object.keys(NUMBERS)
        .map((name) => this.wrong(name))
        .find((text) => text !== null) ?? null
    );
  }

  // The fields of the request that the user has set.
  request() {
    const fields = {};
    for (const [name, [field]] of Object.entries(NUMBERS)) {
      const text = String(this.values[name] ?? "").trim();
      if (text && this.wrong(name) === null) fields[field] = Number(text);
    }
    const stop = (this.values.stop_texts ?? "")
      .split("\n")
      .filter(Boolean)
      .map((line) => line.replaceAll("\\n", "\n"));
    if (stop.length) fields.stop = stop;
    if (this.values.thinking) fields.chat_template_kwargs = { thinking: this.values.thinking === "on" };
    return fields;
  }

  reset() {
    for (const name of [...Object.keys(NUMBERS), "stop_texts", "thinking"]) {
      this.values[name] = byId(name).value = "";
      byId(name).removeAttribute("aria-invalid");
    }
    byId("settings-problem").textContent = "";
    this.keep();
  }

  keep() {
    stored(() => localStorage.setItem(KEPT, JSON.stringify(this.values)));
    this.changed("values");
  }

  open(focus = null) {
    this.dialog.showModal();
    if (focus) byId(focus).focus();
  }
}

function kept() {
  try {
    const found = JSON.parse(localStorage.getItem(KEPT));
    return typeof found === "object" && found !== null ? found : {};
  } catch {
    return {};
  }
}

// Storage may be switched off: then nothing is kept, and all else works.
function stored(action) {
  try {
    return action();
  } catch {
    return null;
  }
}
