// One answer while it is being made: asks the server, fills the message, tells its listener, and can be stopped.

import { chat } from "./client.js";

export class Answer {
  // `onchange()` after each piece, `onend()` once at the end, whatever it was; message.error says what went wrong.
  constructor(message, request, key, { onchange, onend }) {
    this.message = message;
    this.controller = new AbortController();
    this.started = performance.now();
    this.first = null; // when the first piece came
    this.last = null;
    this.pieces = 0;
    this.stopped = false;
    this.run(request, key, onchange).finally(() => {
      this.settle();
      onend(this);
    });
  }

  stop() {
    this.stopped = true;
    this.controller.abort();
  }

  async run(request, key, onchange) {
    try {
      for await (const piece of chat(request, key, this.controller.signal)) {
        this.take(piece);
        onchange(this);
      }
    } catch (error) {
      if (this.stopped) this.message.finish = "stopped";
      else
        this.message.error = {
          message: error.message,
          status: error.status ?? 0,
          advice: error.advice ?? "",
          retryAfter: error.retryAfter ?? null,
        };
    }
  }

  take(piece) {
    const message = this.message;
    if (piece.usage) message.usage = { prompt: piece.usage.prompt_tokens, completion: piece.usage.completion_tokens };
    if (piece.finish) message.finish = piece.finish;
    if (piece.call) takeCall(message, piece.call);
    if (piece.reasoning === undefined && piece.content === undefined && !piece.call) return;
    this.last = performance.now();
    this.first ??= this.last;
    this.pieces += 1;
    if (piece.reasoning) message.reasoning += piece.reasoning;
    if (piece.content) {
      if (message.reasoning && message.thoughtSeconds === undefined)
        message.thoughtSeconds = (this.last - this.first) / 1000;
      message.content += piece.content;
    }
  }

  settle() {
    const message = this.message;
    message.pending = false;
    if (this.first === null) return;
    message.firstSeconds = (this.first - this.started) / 1000;
    message.seconds = (this.last - this.first) / 1000;
    message.pieces = this.pieces;
    if (message.reasoning && message.thoughtSeconds === undefined) message.thoughtSeconds = message.seconds;
  }

  // Tokens a second since the first one; pieces stand for tokens until the server has counted.
  get rate() {
    return rateOf(this.pieces, this.first === null ? 0 : (performance.now() - this.first) / 1000);
  }
}

export function rateOf(tokens, seconds) {
  return tokens > 1 && seconds > 0.05 ? (tokens - 1) / seconds : null;
}

function takeCall(message, call) {
  message.calls ??= [];
  const there = (message.calls[call.index ?? 0] ??= { name: "", arguments: "" });
  there.name += call.function?.name ?? "";
  there.arguments += call.function?.arguments ?? "";
}
