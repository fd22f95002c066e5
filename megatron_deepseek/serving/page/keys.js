// Shortcuts, which the dialog #keys lists.

import { dialogOf } from "./dialogs.js";
import { byId } from "./dom.js";

export function bindKeys(app) {
  const dialog = dialogOf("keys");
  byId("open-keys").addEventListener("click", () => dialog.showModal());
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing || document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") {
      if (app.sidebar.isOver) app.sidebar.toggle(false);
      else app.stop();
    } else if (event.ctrlKey || event.metaKey) return;
    else if (event.altKey) withAlt(event, app);
    else if (event.target === app.composer) {
      if (event.key !== "ArrowUp" || app.composer.value || app.running.has(app.current?.id)) return;
      event.preventDefault();
      app.messages.editLast();
    } else if (!event.target.closest("input, textarea, select")) {
      if (event.key !== "/" && event.key !== "?") return;
      event.preventDefault();
      if (event.key === "/") app.composer.focus();
      else dialog.showModal();
    }
  });
}

function withAlt(event, app) {
  const actions = {
    KeyN: () => app.open(null),
    KeyS: () => app.settings.open(),
    KeyB: () => app.sidebar.toggle(),
    KeyF: () => byId("search").focus(),
  };
  const action = actions[event.code];
  if (!action) return;
  event.preventDefault();
  action();
}
