// Conversations as trees of messages, in the browser's storage: an edit or another answer is a branch, nothing is lost.
//
// A conversation is {id, title, created, updated, system, leaf, messages: {id: message}}, a message {id, parent, role,
// content, created} and of an answer also {reasoning, thoughtSeconds, finish, model, usage, seconds, firstSeconds,
// error, calls}. `leaf` is the last message of the branch that is shown.

const PREFIX = "conversation:";

export const newId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(36).padStart(2, "0")).join("");

export function newConversation(system) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, system, leaf: null, messages: {} };
}

export function append(conversation, parent, fields) {
  const message = { id: newId(), parent, created: Date.now(), ...fields };
  conversation.messages[message.id] = message;
  conversation.leaf = message.id;
  conversation.updated = message.created;
  return message;
}

// The messages from the first to `leaf`.
export function branch(conversation, leaf = conversation.leaf) {
  const found = [];
  for (let id = leaf; id && conversation.messages[id] && found.length < 10000; id = conversation.messages[id].parent) {
    found.push(conversation.messages[id]);
  }
  return found.reverse();
}

// The messages that stand where `message` does, oldest first: its other versions and itself.
export function versions(conversation, message) {
  return Object.values(conversation.messages)
    .filter((each) => each.parent === message.parent && each.role === message.role)
    .sort((one, other) => one.created - other.created);
}

// Shows `message` and, of what follows it, the newest.
export function showVersion(conversation, message) {
  let last = message;
  for (;;) {
    const next = Object.values(conversation.messages).filter((each) => each.parent === last.id);
    if (!next.length) break;
    last = next.reduce((one, other) => (other.created > one.created ? other : one));
  }
  conversation.leaf = last.id;
}

export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first =
    branch(conversation).find((message) => message.role === "user") ?? Object.values(conversation.messages)[0];
  const text = (first?.content ?? "").replace(/\s+/g, " ").trim();
  return text.length > 60 ? `${text.slice(0, 57).trimEnd()}…` : text || "New conversation";
}

// A map of all conversations that keeps the storage in step; `onerror(message)` hears that it is full or switched off.
export class Shelf {
  constructor(onerror) {
    this.onerror = onerror;
    this.held = new Map();
    try {
      this.storage = window.localStorage;
      for (const key of Object.keys(this.storage)) if (key.startsWith(PREFIX)) this.read(key);
    } catch {
      this.storage = null;
    }
  }

  read(key) {
    const found = checked(parsed(this.storage.getItem(key)));
    if (found && PREFIX + found.id === key) this.held.set(found.id, found);
    else this.held.delete(key.slice(PREFIX.length));
    return found;
  }

  // Newest first.
  all() {
    return [...this.held.values()].sort((one, other) => other.updated - one.updated);
  }

  get(id) {
    return this.held.get(id);
  }

  save(conversation) {
    this.held.set(conversation.id, conversation);
    try {
      if (!this.storage) throw new Error("this browser keeps nothing for this page");
      this.storage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    } catch (error) {
      const full = error.name === "QuotaExceededError";
      this.onerror(
        full
          ? "The browser's storage is full: export conversations and delete some. This one is not kept."
          : `This conversation is not kept: ${error.message}.`,
      );
    }
  }

  remove(id) {
    this.held.delete(id);
    this.storage?.removeItem(PREFIX + id);
  }

  // Calls back when another tab has changed a conversation.
  watch(changed) {
    window.addEventListener("storage", (event) => {
      if (!event.key?.startsWith(PREFIX)) return;
      this.read(event.key);
      changed(event.key.slice(PREFIX.length));
    });
  }
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

const ROLES = new Set(["user", "assistant"]);
const TEXTS = ["title", "system"];

// A conversation of a file or of the storage with only what it may have; null if it is none.
export function checked(given) {
  if (
    typeof given !== "object" ||
    given === null ||
    typeof given.messages !== "object" ||
    Array.isArray(given.messages)
  )
    return null;
  const messages = {};
  for (const [id, message] of Object.entries(given.messages ?? {})) {
    if (!ROLES.has(message?.role) || typeof message.content !== "string") return null;
    messages[id] = {
      ...message,
      id,
      parent: typeof message.parent === "string" ? message.parent : null,
      created: Number(message.created) || 0,
    };
    if (message.role === "assistant" && typeof message.reasoning !== "string") messages[id].reasoning = "";
  }
  if (Object.values(messages).some((message) => message.parent && !messages[message.parent])) return null;
  const texts = Object.fromEntries(TEXTS.map((name) => [name, typeof given[name] === "string" ? given[name] : ""]));
  const leaf = messages[given.leaf] ? given.leaf : (Object.keys(messages).at(-1) ?? null);
  return {
    id: typeof given.id === "string" && given.id ? given.id : newId(),
    ...texts,
    leaf,
    messages,
    created: Number(given.created) || Date.now(),
    updated: Number(given.updated) || Date.now(),
  };
}
