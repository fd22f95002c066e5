// What all dialogs do: their button and a click beside them close them; Esc does so by itself.

import { byId } from "./dom.js";

export function dialogOf(name) {
  const dialog = byId(name);
  byId(`close-${name}`).addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  // Chromium leaves the caret in a field of the closed dialog, and letters then go nowhere, whatever has the focus.
  dialog.addEventListener("close", () => window.getSelection()?.removeAllRanges());
  return dialog;
}
