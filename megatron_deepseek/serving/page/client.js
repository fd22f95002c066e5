// The server's API, as OpenAI's clients use it, and its errors in words for a person.

export class ServerError extends Error {
  // status 0: no answer came at all.
  constructor(message, { status = 0, advice = "", retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.advice = advice;
    this.retryAfter = retryAfter;
  }
}

const ADVICE = {
  0: "Is it still running, and can this device reach it?",
  401: "Enter the API key in the settings.",
  403: "Enter the API key in the settings.",
  404: "Choose another model at the top of the page.",
  413: "Shorten the message, or begin a new conversation.",
  429: "The server has as many requests as it takes.",
  503: "The server is starting or about to stop.",
};

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function ask(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer.", { advice: ADVICE[0] });
  }
}

async function refusal(response) {
  let message = "";
  try {
    const body = JSON.parse(await response.text());
    message = body?.error?.message ?? body?.message ?? (typeof body?.detail === "string" ? body.detail : "");
  } catch {
    /* a proxy's page, or nothing */
  }
  const seconds = Number(response.headers.get("Retry-After"));
  return new ServerError(message || `The server answered ${response.status} ${response.statusText}`.trim() + ".", {
    status: response.status,
    advice: ADVICE[response.status] ?? "",
    retryAfter: seconds > 0 ? Math.min(seconds, 600) : null,
  });
}

// [{id, max_model_len}] of the server.
export async function listModels(key) {
  const response = await ask("v1/models", { headers: headers(key), cache: "no-store" });
  if (!response.ok) throw await refusal(response);
  try {
    return (await response.json()).data;
  } catch {
    throw new ServerError("The answer for the list of models is not JSON.", { status: response.status });
  }
}

// Yields {content}, {reasoning}, {finish} and {usage} as they arrive. An answer that ends without [DONE] was cut off.
export async function* chat(request, key, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await ask("v1/chat/completions", { method: "POST", headers: headers(key), body, signal });
  if (!response.ok) throw await refusal(response);
  let ended = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk.error)
      throw new ServerError(chunk.error.message ?? "The server failed.", { status: Number(chunk.error.code) || 500 });
    if (chunk.usage) yield { usage: chunk.usage };
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    const { content, reasoning_content: thoughts, reasoning, tool_calls: calls } = choice.delta ?? {};
    if (thoughts ?? reasoning) yield { reasoning: thoughts ?? reasoning };
    if (content) yield { content };
    for (const call of calls ?? []) yield { call };
    if (choice.finish_reason) {
      ended = true;
      yield { finish: choice.finish_reason };
    }
  }
  if (!ended) throw new ServerError("The connection ended before the answer did.", { advice: "What came is kept." });
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ServerError("The server sent something that is not JSON.", { status: 500 });
  }
}

// The data of the events of a text/event-stream (SSE), whose pieces may be cut anywhere.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  let lines = [];
  try {
    for (;;) {
      const { value, done } = await read(reader);
      held += value ?? "";
      const parts = held.split(/\r\n|\n|\r(?!$)/);
      held = done ? "" : parts.pop();
      for (const line of parts) {
        if (line.startsWith("data:")) lines.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && lines.length) {
          yield lines.join("\n");
          lines = [];
        }
      }
      if (done) break;
    }
    if (lines.length) yield lines.join("\n");
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection ended before the answer did.", { advice: "What came is kept." });
  }
}
