// Conversations to files and back: all of a conversation as JSON, its shown branch as markdown, and chats as in training.

import { append, branch, checked, newConversation, newId, titleOf } from "./conversations.js";

const FORMAT = "megatron-deepseek-conversations";
const ROLE_NAMES = { user: "You", assistant: "Model" };

export function toJson(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

export function toMarkdown(conversation) {
  const parts = [`# ${titleOf(conversation)}`];
  if (conversation.system) parts.push(`**System prompt**\n\n${quoted(conversation.system)}`);
  for (const message of branch(conversation)) {
    const model = message.role === "assistant" && message.model ? ` (${message.model})` : "";
    parts.push(`## ${ROLE_NAMES[message.role]}${model}`);
    if (message.reasoning)
      parts.push(`<details><summary>Reasoning</summary>\n\n${message.reasoning.trim()}\n\n</details>`);
    if (message.content) parts.push(message.content.trim());
  }
  return `${parts.join("\n\n")}\n`;
}

const quoted = (text) =>
  text
    .split("\n")
    .map((line) => `> ${line}`.trimEnd())
    .join("\n");

// One line of JSON a conversation, {"messages": [...]}: what preprocessing and fine-tuning read.
export function toMessages(conversation) {
  const system = conversation.system ? [{ role: "system", content: conversation.system }] : [];
  const messages = branch(conversation).map(({ role, content, reasoning }) => ({
    role,
    content,
    ...(reasoning ? { reasoning_content: reasoning } : {}),
  }));
  return `${JSON.stringify({ messages: [...system, ...messages] })}\n`;
}

export const fileName = (conversation, ending) =>
  `${
    titleOf(conversation)
      .replace(/[^\p{L}\p{N}]+/gu, "-")
      .replace(/^-|-$/g, "")
      .slice(0, 50) || "conversation"
  }.${ending}`;

// The conversations of a file: this page's, one conversation alone, {"messages": [...]}, a list or lines of these.
export function fromFile(text) {
  const given = values(text);
  const found = given.flatMap((each) => (each?.format === FORMAT ? (each.conversations ?? []) : [each]));
  const made = found.map((each, place) => {
    const conversation = Array.isArray(each?.messages) ? fromMessages(each.messages) : checked(each);
    if (!conversation) throw new Error(`number ${place + 1} of the file is no conversation`);
    return conversation;
  });
  if (!made.length) throw new Error("the file has no conversations");
  return made;
}

function values(text) {
  try {
    const whole = JSON.parse(text);
    return Array.isArray(whole) ? whole : [whole];
  } catch {
    return text
      .split("\n")
      .filter((line) => line.trim())
      .map((line, place) => {
        try {
          return JSON.parse(line);
        } catch {
          throw new Error(place ? `line ${place + 1} is not JSON` : "it is neither JSON nor lines of JSON");
        }
      });
  }
}

function fromMessages(messages) {
  const conversation = newConversation("");
  for (const message of messages) {
    const content = typeof message?.content === "string" ? message.content : "";
    if (message?.role === "system") conversation.system = content;
    else if (["user", "assistant"].includes(message?.role)) {
      append(conversation, conversation.leaf, {
        role: message.role,
        content,
        reasoning: message.reasoning_content ?? message.reasoning ?? "",
      });
    } else return null;
  }
  return conversation;
}

// Adds conversations to the shelf; one that is there already, and differs, gets a name of its own. Returns how many.
export function addAll(shelf, conversations) {
  for (const conversation of conversations) {
    const there = shelf.get(conversation.id);
    if (there && JSON.stringify(there) !== JSON.stringify(conversation)) conversation.id = newId();
    shelf.save(conversation);
  }
  return conversations.length;
}
