// The list of conversations: found by words, opened, renamed, deleted and brought back.

import { byId, element, iconButton } from "./dom.js";
import { titleOf } from "./conversations.js";

const DAY = 24 * 3600 * 1000;

export class Sidebar {
  // actions: {open(id), rename(conversation, title), remove(conversation)}
  constructor(shelf, actions) {
    this.shelf = shelf;
    this.actions = actions;
    this.list = byId("conversation-list");
    this.search = byId("search");
    this.search.addEventListener("input", () => this.show(this.current, this.running));
    byId("open-sidebar").addEventListener("click", () => this.toggle());
    byId("close-sidebar").addEventListener("click", () => this.toggle(false));
    byId("shade").addEventListener("click", () => this.toggle(false));
  }

  get overlays() {
    return window.matchMedia("(max-width: 820px)").matches;
  }

  // Narrow: over the page. Wide: beside it, and it may be put away.
  toggle(open) {
    const name = this.overlays ? "sidebar-over" : "sidebar-away";
    const isOpen = document.body.classList.contains(name) === this.overlays;
    const wanted = open ?? !isOpen;
    document.body.classList.toggle(name, wanted === this.overlays);
    byId("open-sidebar").setAttribute("aria-expanded", String(wanted));
    if (this.overlays) byId(wanted ? "close-sidebar" : "open-sidebar").focus();
  }

  get isOver() {
    return this.overlays && document.body.classList.contains("sidebar-over");
  }

  // current: id of the open conversation; running: ids of those that are being answered.
  show(current, running) {
    [this.current, this.running] = [current, running];
    const words = this.search.value.trim().toLowerCase();
    const found = this.shelf.all().filter((each) => !words || textOf(each).includes(words));
    const rows = [];
    let period = null;
    for (const each of found) {
      if (periodOf(each.updated) !== period) {
        period = periodOf(each.updated);
        rows.push(element("li", { class: "period", role: "presentation" }, period));
      }
      rows.push(this.row(each));
    }
    if (!rows.length)
      rows.push(
        element(
          "li",
          { class: "nothing" },
          words ? "Nothing found." : "Your conversations will be listed here. They stay in this browser.",
        ),
      );
    this.list.replaceChildren(...rows);
  }

  row(conversation) {
    const title = titleOf(conversation);
    const open = element(
      "button",
      {
        type: "button",
        class: "open",
        "aria-current": conversation.id === this.current ? "page" : false,
        title,
        onclick: () => {
          this.actions.open(conversation.id);
          if (this.isOver) this.toggle(false);
        },
      },
      element("span", {}, title),
      this.running?.has(conversation.id)
        ? element("span", { class: "dot", role: "img", "aria-label": "being answered" })
        : null,
    );
    const row = element(
      "li",
      { class: "row" },
      open,
      iconButton("edit", `Rename ${title}`, () => this.rename(row, conversation)),
      iconButton("trash", `Delete ${title}`, () => this.actions.remove(conversation)),
    );
    return row;
  }

  rename(row, conversation) {
    const field = element("input", { type: "text", "aria-label": "Title", maxlength: "120" });
    field.value = titleOf(conversation);
    let done = false;
    const end = (keep) => {
      if (done) return;
      done = true;
      if (keep && field.value.trim()) this.actions.rename(conversation, field.value.trim());
      else this.show(this.current, this.running);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") end(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        end(false);
      }
    });
    field.addEventListener("blur", () => end(true));
    row.replaceChildren(field);
    field.focus();
    field.select();
  }
}

function textOf(conversation) {
  return [titleOf(conversation), ...Object.values(conversation.messages).map((message) => message.content)]
    .join("\n")
    .toLowerCase();
}

function periodOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY) return "Yesterday";
  return time >= midnight - 7 * DAY ? "This week" : "Earlier";
}
