// The choice of the model, and how much of what it can read a conversation takes.

import { byId, element } from "./dom.js";

const KEPT = "model";

export class ModelChoice {
  // list(): the server's models; failed(error) hears why there are none.
  constructor(list, failed) {
    this.list = list;
    this.failed = failed;
    this.lengths = new Map();
    this.used = 0;
    this.select = byId("model");
    this.select.addEventListener("change", () => {
      try {
        localStorage.setItem(KEPT, this.select.value);
      } catch {
        /* not kept */
      }
      this.showContext(this.used);
    });
  }

  get chosen() {
    return this.select.value;
  }

  async load() {
    try {
      const models = await this.list();
      this.lengths = new Map(models.map((model) => [model.id, model.max_model_len]));
      const before = this.chosen || kept();
      this.select.replaceChildren(...models.map((model) => element("option", { value: model.id }, model.id)));
      if (this.lengths.has(before)) this.select.value = before;
      document.body.classList.add("connected");
    } catch (error) {
      document.body.classList.remove("connected");
      this.failed(error);
    }
    this.showContext(this.used);
  }

  showContext(used) {
    this.used = used;
    const length = this.lengths.get(this.chosen);
    const place = byId("context");
    place.hidden = !used || !length;
    if (place.hidden) return;
    const meter = place.querySelector("meter");
    [meter.max, meter.high, meter.value] = [length, 0.85 * length, used];
    place.querySelector("span").textContent = `${used.toLocaleString("en")} of ${length.toLocaleString("en")} tokens`;
  }
}

function kept() {
  try {
    return localStorage.getItem(KEPT);
  } catch {
    return null;
  }
}
