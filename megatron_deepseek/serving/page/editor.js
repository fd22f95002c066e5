// A message being edited, and what text fields for messages have in common.

import { element } from "./dom.js";

// A form with the text in it; calls done(new text), or done(null) when it is given up.
export function editor(text, done) {
  const area = element("textarea", { "aria-label": "Edit message", rows: "1" });
  area.value = text;
  const form = element(
    "form",
    { class: "editor" },
    area,
    element(
      "div",
      { class: "editor-buttons" },
      element("button", { type: "button", class: "quiet", onclick: () => done(null) }, "Cancel"),
      element("button", { type: "submit", class: "primary" }, "Send"),
    ),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    done(area.value);
  });
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    done(null);
  });
  sendsOnEnter(area, () => form.requestSubmit());
  growsWithText(area);
  return form;
}

// Enter sends and Shift+Enter makes a line, except where Enter chooses a word of an input method. On phones Enter is a line.
export function sendsOnEnter(area, send) {
  const phone = window.matchMedia("(pointer: coarse) and (max-width: 700px)");
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.isComposing || event.shiftKey || event.altKey) return;
    if (phone.matches && !event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    send();
  });
}

export function growsWithText(area) {
  if (CSS.supports("field-sizing", "content")) return;
  area.addEventListener("input", () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight}px`;
  });
}
