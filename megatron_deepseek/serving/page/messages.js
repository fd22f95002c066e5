// The conversation as it is seen: an article for each message of the branch, kept while the message stays.

import { copy, element, icon, iconButton } from "./dom.js";
import { rateOf } from "./answer.js";
import { branch, versions } from "./conversations.js";
import { editor } from "./editor.js";
import { showMarkdown } from "./markdown.js";

const FINISHES = { stopped: "stopped", length: "cut at its limit of tokens", tool_calls: "asks for a tool" };

export class Messages {
  // actions: {edit(message, text), regenerate(message), show(message), resume(message), retry(message), settings()}
  constructor(container, actions) {
    this.container = container;
    this.actions = actions;
    this.views = new Map();
  }

  show(conversation, running) {
    const shown = conversation ? branch(conversation) : [];
    const wanted = shown.map((message) => this.viewOf(message));
    for (const [id, view] of this.views) {
      if (wanted.includes(view)) continue;
      view.node.remove();
      this.views.delete(id);
    }
    wanted.forEach((view, place) => {
      if (this.container.children[place] !== view.node)
        this.container.insertBefore(view.node, this.container.children[place] ?? null);
      const last = place === wanted.length - 1;
      view.update(running?.message === view.message ? running : null, {
        last,
        busy: Boolean(running),
        versions: versions(conversation, view.message),
      });
    });
  }

  viewOf(message) {
    const there = this.views.get(message.id);
    if (there?.message === message) return there;
    there?.node.remove();
    const made = message.role === "user" ? new UserView(message, this.actions) : new AnswerView(message, this.actions);
    this.views.set(message.id, made);
    return made;
  }

  // While an answer streams only its own article changes.
  grow(running) {
    this.views.get(running.message.id)?.grow(running);
  }

  editLast() {
    [...this.views.values()]
      .filter((view) => view instanceof UserView && view.node.isConnected)
      .at(-1)
      ?.edit();
  }
}

function versionSwitch(message, all, busy, actions) {
  if (all.length < 2) return null;
  const place = all.indexOf(message);
  const to = (step, name, label) =>
    iconButton(name, label, () => actions.show(all[place + step]), { disabled: busy || !all[place + step] });
  return element(
    "span",
    { class: "versions", role: "group", "aria-label": "Versions" },
    to(-1, "left", "Previous version"),
    element("span", {}, `${place + 1}/${all.length}`),
    to(1, "right", "Next version"),
  );
}

class UserView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.bubble = element("div", { class: "bubble" }, message.content);
    this.row = element("div", { class: "actions" });
    this.node = element("article", { class: "message user", "aria-label": "You" }, this.bubble, this.row);
  }

  update(running, { busy, versions: all }) {
    const button = iconButton("copy", "Copy message", () => copy(this.message.content, button));
    this.row.replaceChildren(
      ...[
        versionSwitch(this.message, all, busy, this.actions),
        button,
        iconButton("edit", "Edit message", () => this.edit(), { disabled: busy }),
      ].filter(Boolean),
    );
  }

  edit() {
    if (!this.bubble.isConnected) return;
    const done = (text) => {
      form.replaceWith(this.bubble);
      this.row.hidden = false;
      if (text !== null && text.trim()) this.actions.edit(this.message, text);
      else this.row.querySelector("[aria-label='Edit message']")?.focus();
    };
    const form = editor(this.message.content, done);
    this.bubble.replaceWith(form);
    this.row.hidden = true;
    form.querySelector("textarea").focus();
  }
}

class AnswerView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.summary = element("span", { class: "summary-text" });
    this.thoughts = element("div", { class: "markdown" });
    this.folded = element(
      "details",
      { class: "thoughts" },
      element("summary", {}, icon("thought"), this.summary, icon("down")),
      this.thoughts,
    );
    this.folded.addEventListener("toggle", () => this.showThoughts());
    this.body = element("div", { class: "markdown answer" });
    this.calls = element("div", { class: "calls" });
    this.problem = element("div", { class: "problem", role: "alert" });
    this.waiting = element(
      "div",
      { class: "waiting", "aria-hidden": "true" },
      element("i"),
      element("i"),
      element("i"),
    );
    this.row = element("div", { class: "actions" });
    this.node = element(
      "article",
      { class: "message assistant", "aria-label": "Answer" },
      this.folded,
      this.body,
      this.calls,
      this.waiting,
      this.problem,
      this.row,
    );
  }

  showThoughts() {
    if (this.folded.open) showMarkdown(this.thoughts, this.message.reasoning.trim());
  }

  grow(running) {
    const message = this.message;
    this.folded.hidden = !message.reasoning;
    const thinking = Boolean(running) && !message.content && !message.calls;
    this.folded.classList.toggle("active", thinking);
    const seconds = message.thoughtSeconds;
    this.summary.textContent = thinking
      ? "Thinking…"
      : `Thought${seconds === undefined ? "" : ` for ${duration(seconds)}`}`;
    this.showThoughts();
    showMarkdown(this.body, message.content);
    this.waiting.hidden = !running || Boolean(message.content || message.reasoning || message.calls);
    this.showCalls();
    this.node.setAttribute("aria-busy", String(Boolean(running)));
    this.node.classList.toggle("growing", Boolean(running) && Boolean(message.content));
    const rate = running?.rate;
    if (rate) this.meta.textContent = `${rate.toFixed(1)} tokens/s`;
  }

  showCalls() {
    this.calls.replaceChildren(
      ...(this.message.calls ?? []).map((call) =>
        element(
          "div",
          { class: "call" },
          element("span", {}, "The model asks for the tool ", element("code", {}, call.name || "…")),
          element("pre", { tabindex: "0" }, call.arguments),
        ),
      ),
    );
  }

  update(running, { last, busy, versions: all }) {
    this.meta = element("span", { class: "meta" }, running ? "" : statistics(this.message));
    this.meta.title = running ? "" : explained(this.message);
    this.grow(running);
    this.showProblem(busy);
    if (running) {
      this.row.replaceChildren(this.meta);
      return;
    }
    if (this.message.error && !this.message.content) {
      this.row.replaceChildren(...[versionSwitch(this.message, all, busy, this.actions)].filter(Boolean));
      return;
    }
    const button = iconButton("copy", "Copy answer", () => copy(this.message.content, button));
    const more =
      last &&
      !busy &&
      this.message.content &&
      !this.message.error &&
      ["length", "stopped"].includes(this.message.finish);
    this.row.replaceChildren(
      ...[
        versionSwitch(this.message, all, busy, this.actions),
        button,
        iconButton("again", "Answer again", () => this.actions.regenerate(this.message), { disabled: busy }),
        more
          ? element(
              "button",
              { type: "button", class: "quiet", onclick: () => this.actions.resume(this.message) },
              "Continue",
            )
          : null,
        this.meta,
      ].filter(Boolean),
    );
  }

  showProblem(busy) {
    const { error } = this.message;
    this.problem.hidden = !error;
    if (!error) return;
    const wait = error.retryAfter ? ` It asks to wait ${Math.ceil(error.retryAfter)} s.` : "";
    const ofKey = error.status === 401 || error.status === 403;
    this.problem.replaceChildren(
      icon("warning"),
      element("div", {}, element("strong", {}, error.message), ` ${error.advice}${wait}`),
      ofKey
        ? element(
            "button",
            { type: "button", class: "quiet", onclick: () => this.actions.settings("api-key") },
            "Enter key",
          )
        : "",
      element(
        "button",
        { type: "button", class: "quiet", disabled: busy, onclick: () => this.actions.retry(this.message) },
        "Try again",
      ),
    );
  }
}

function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  return seconds < 90 ? `${Math.round(seconds)} s` : `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

// "120 tokens · 18.3 tokens/s · stopped"
function statistics(message) {
  const tokens = message.usage?.completion ?? message.pieces;
  const rate = rateOf(tokens ?? 0, message.seconds ?? 0);
  return [
    tokens ? `${tokens.toLocaleString("en")} token${tokens === 1 ? "" : "s"}` : "",
    rate ? `${rate.toFixed(1)} tokens/s` : "",
    FINISHES[message.finish] ?? "",
  ]
    .filter(Boolean)
    .join(" · ");
}

function explained(message) {
  if (message.firstSeconds === undefined) return "";
  const read = message.usage ? `${message.usage.prompt.toLocaleString("en")} tokens read, ` : "";
  return `${message.model ?? ""}\n${read}first token after ${duration(message.firstSeconds)}`.trim();
}
