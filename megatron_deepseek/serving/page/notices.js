// Short words at the edge of the page, and what only screen readers hear.

import { byId, element } from "./dom.js";

// Shows a line for some seconds, with a button if `action` is {label, run()}.
export function notice(text, action = null) {
  const line = element("div", { class: "notice" }, element("span", {}, text));
  const away = () => line.remove();
  if (action) {
    line.append(
      element(
        "button",
        {
          type: "button",
          class: "quiet",
          onclick: () => {
            away();
            action.run();
          },
        },
        action.label,
      ),
    );
  }
  byId("notices").replaceChildren(line);
  setTimeout(away, action ? 9000 : 5000);
}

export function say(text) {
  byId("status").textContent = text;
}
