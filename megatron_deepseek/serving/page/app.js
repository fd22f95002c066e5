// Joins the parts: what the user does, what it changes in the conversation, what is shown of that.

import { Answer } from "./answer.js";
import { listModels } from "./client.js";
import { Shelf, append, branch, newConversation, showVersion, titleOf } from "./conversations.js";
import { byId } from "./dom.js";
import { growsWithText, sendsOnEnter } from "./editor.js";
import { Messages } from "./messages.js";
import { notice, say } from "./notices.js";
import { Scroll } from "./scroll.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { bindTransfer } from "./transfer_menu.js";
import { bindKeys } from "./keys.js";
import { ModelChoice } from "./models.js";

const SAVE_EVERY = 1000; // milliseconds, while an answer streams

class App {
  constructor() {
    this.shelf = new Shelf((text) => notice(text));
    this.running = new Map(); // conversation id -> Answer
    this.current = null;
    this.composer = byId("composer-text");
    this.settings = new Settings((what) => this.settingsChanged(what));
    this.models = new ModelChoice(
      () => listModels(this.settings.key),
      (error) => this.modelsFailed(error),
    );
    this.scroll = new Scroll(byId("scroller"), byId("to-end"));
    this.messages = new Messages(byId("messages"), {
      edit: (message, text) => this.edit(message, text),
      regenerate: (message) => this.regenerate(message),
      show: (message) => this.showVersion(message),
      resume: (message) => this.resume(message),
      retry: (message) => this.regenerate(message, true),
      settings: (field) => this.settings.open(field),
    });
    this.sidebar = new Sidebar(this.shelf, {
      open: (id) => this.open(id),
      remove: (conversation) => this.remove(conversation),
      rename: (conversation, title) =>
        this.change(conversation, () => {
          conversation.title = title;
        }),
    });
    this.bind();
    this.mendInterrupted();
    this.open(location.hash.slice(1));
    this.models.load();
  }

  bind() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    sendsOnEnter(this.composer, () => this.send());
    growsWithText(this.composer);
    this.composer.addEventListener("input", () => this.showComposer());
    byId("stop").addEventListener("click", () => this.stop());
    byId("new-chat").addEventListener("click", () => this.open(null));
    byId("new-chat-top").addEventListener("click", () => this.open(null));
    byId("open-settings").addEventListener("click", () => this.settings.open());
    byId("open-system").addEventListener("click", () => this.settings.open("system"));
    byId("system").addEventListener("input", (event) => this.setSystem(event.target.value));
    for (const button of document.querySelectorAll("[data-prompt]")) {
      button.addEventListener("click", () => {
        this.composer.value = button.dataset.prompt;
        this.send();
      });
    }
    window.addEventListener("hashchange", () => this.open(location.hash.slice(1)));
    window.addEventListener("pagehide", () =>
      this.running.forEach((answer, id) => {
        answer.stop();
        this.shelf.save(this.shelf.get(id));
      }),
    );
    this.shelf.watch((id) => (id === this.current?.id && !this.running.has(id) ? this.open(id) : this.showList()));
    bindTransfer({ shelf: this.shelf, current: () => this.current, added: (id) => this.open(id) });
    bindKeys(this);
  }

  // An answer that a closed page was waiting for has ended where it stood.
  mendInterrupted() {
    for (const conversation of this.shelf.all()) {
      for (const message of Object.values(conversation.messages))
        if (message.pending) Object.assign(message, { pending: false, finish: "stopped" });
    }
  }

  open(id) {
    this.current = this.shelf.get(id) ?? null;
    history.replaceState(null, "", this.current ? `#${this.current.id}` : location.pathname + location.search);
    byId("system").value = this.current?.system ?? this.settings.system;
    this.show();
    this.scroll.toEnd();
    if (!window.matchMedia("(pointer: coarse)").matches) this.composer.focus();
  }

  show() {
    const running = this.running.get(this.current?.id) ?? null;
    this.messages.show(this.current, running);
    byId("empty").hidden = Boolean(this.current?.leaf);
    byId("title").textContent = this.current ? titleOf(this.current) : "New conversation";
    document.title = this.current ? `${titleOf(this.current)} – Chat` : "Chat";
    this.showComposer();
    this.showList();
  }

  showList() {
    this.sidebar.show(this.current?.id, this.running);
  }

  showComposer() {
    const busy = this.running.has(this.current?.id);
    byId("stop").hidden = !busy;
    byId("send").hidden = busy;
    byId("send").disabled = !this.composer.value.trim();
    byId("open-system").classList.toggle("set", Boolean((this.current?.system ?? this.settings.system).trim()));
    const usage = this.current ? branch(this.current).findLast((message) => message.usage)?.usage : null;
    this.models.showContext(usage ? usage.prompt + usage.completion : 0);
  }

  change(conversation, action) {
    action();
    this.shelf.save(conversation);
    this.show();
  }

  setSystem(text) {
    if (this.current)
      this.change(this.current, () => {
        this.current.system = text;
      });
    if (!this.current || byId("system-for-all").checked) this.settings.system = text;
    this.showComposer();
  }

  settingsChanged(what) {
    if (what === "key") this.models.load();
  }

  modelsFailed(error) {
    if (error.status === 401 || error.status === 403)
      notice("This server wants an API key.", { label: "Enter key", run: () => this.settings.open("api-key") });
    else notice(`${error.message} ${error.advice}`, { label: "Try again", run: () => this.models.load() });
  }

  send() {
    const text = this.composer.value;
    if (!text.trim() || this.running.has(this.current?.id)) return;
    if (this.refuse()) return;
    this.current ??= newConversation(this.settings.system);
    append(this.current, this.current.leaf, { role: "user", content: text });
    this.composer.value = "";
    this.composer.style.height = "";
    history.replaceState(null, "", `#${this.current.id}`);
    this.ask(this.current);
  }

  // Says what is wrong with the settings before anything is lost or sent.
  refuse() {
    const problem = this.settings.problem();
    if (problem) this.settings.open();
    return problem !== null;
  }

  edit(message, text) {
    if (this.running.has(this.current.id) || this.refuse()) return;
    append(this.current, message.parent, { role: "user", content: text });
    this.ask(this.current);
  }

  // Another answer beside this one; in place of it if it failed before it began.
  regenerate(message, instead = false) {
    if (this.running.has(this.current.id) || this.refuse()) return;
    if (instead && !message.content && !message.reasoning) delete this.current.messages[message.id];
    this.current.leaf = message.parent;
    this.ask(this.current);
  }

  resume(message) {
    if (this.running.has(this.current.id) || this.refuse()) return;
    Object.assign(message, { finish: undefined, pending: true });
    this.run(this.current, message, { continue_final_message: true, add_generation_prompt: false });
  }

  showVersion(message) {
    this.change(this.current, () => showVersion(this.current, message));
  }

  ask(conversation) {
    const message = append(conversation, conversation.leaf, {
      role: "assistant",
      content: "",
      reasoning: "",
      model: this.models.chosen,
      pending: true,
    });
    this.run(conversation, message, {});
  }

  run(conversation, message, more) {
    const before = branch(conversation, message.content ? message.id : message.parent);
    const system = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
    const messages = [...system, ...before.map(({ role, content }) => ({ role, content }))];
    if (message.content && message.reasoning) messages.at(-1).reasoning_content = message.reasoning; // it goes on after it
    const request = { model: this.models.chosen, messages, ...this.settings.request(), ...more };
    let [drawn, saved] = [false, performance.now()];
    const answer = new Answer(message, request, this.settings.key, {
      onchange: () => {
        if (performance.now() - saved > SAVE_EVERY) {
          saved = performance.now();
          this.shelf.save(conversation);
        }
        if (drawn || this.current !== conversation) return;
        drawn = true;
        requestAnimationFrame(() => {
          drawn = false;
          if (this.running.get(conversation.id) === answer) this.grow(answer);
        });
      },
      onend: () => this.ended(conversation, message),
    });
    this.running.set(conversation.id, answer);
    this.shelf.save(conversation);
    say("Answering");
    this.show();
    this.scroll.toEnd();
  }

  grow(answer) {
    this.messages.grow(answer);
    this.scroll.follow();
  }

  ended(conversation, message) {
    this.running.delete(conversation.id);
    conversation.updated = Date.now();
    if (this.shelf.get(conversation.id)) this.shelf.save(conversation);
    say(message.error ? "" : message.finish === "stopped" ? "Stopped" : `Answer: ${message.content.slice(0, 2000)}`);
    if (conversation !== this.current) return this.showList();
    this.show();
    this.scroll.follow();
  }

  stop() {
    this.running.get(this.current?.id)?.stop();
    this.composer.focus();
  }

  remove(conversation) {
    this.running.get(conversation.id)?.stop();
    this.shelf.remove(conversation.id);
    if (conversation === this.current) this.open(null);
    else this.showList();
    notice("Conversation deleted.", {
      label: "Undo",
      run: () => {
        this.shelf.save(conversation);
        this.open(conversation.id);
      },
    });
  }
}

new App();
