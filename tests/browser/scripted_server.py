"""A server that keeps the contract of tools/serve.py and whose answers are scripts: a tiny model would only babble.

    python tests/browser/scripted_server.py [--port P] [--key K]

The last message chooses the answer by its first word: a name of ANSWERS, or one of busy, broken, cut, slow, length and
request (which is answered with the request itself). Pieces of text are cut in the middle of words, as tokens are.
"""

import argparse
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from answers import ANSWERS, THOUGHTS

PAGE = Path(__file__).parents[2] / "megatron_deepseek" / "serving" / "page"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
          "font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


class ScriptedServer(ThreadingHTTPServer):
    """Keeps what was asked; `closed` counts the answers whose reader went away."""

    daemon_threads = True

    def __init__(self, port: int = 0, key: str | None = None, pause: float = 0.004):
        self.key, self.pause = key, pause
        self.requests: list[dict] = []
        self.closed = 0
        self.models = ["deepseek-r1-small", "deepseek-v3.1-small"]
        super().__init__(("127.0.0.1", port), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def start(self) -> "ScriptedServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def log_message(self, *_) -> None:
        pass

    def whole(self, status: int, content: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, text in {"Content-Type": kind, "Content-Length": str(len(content)),
                           "Content-Security-Policy": POLICY, "Cache-Control": "no-store", **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content)

    def error(self, status: int, message: str, **headers: str) -> None:
        body = {"error": {"message": message, "type": "error", "param": None, "code": status}}
        self.whole(status, json.dumps(body).encode(), **headers)

    def allowed(self) -> bool:
        if self.server.key is None or self.headers.get("Authorization") == f"Bearer {self.server.key}":
            return True
        self.error(401, "An API key is needed: Authorization: Bearer KEY.")
        return False

    def do_GET(self) -> None:
        name = {"/": "index.html"}.get(self.path, self.path.removeprefix("/page/"))
        if self.path == "/v1/models":
            if self.allowed():
                data = [{"id": name, "object": "model", "max_model_len": 4096} for name in self.server.models]
                self.whole(200, json.dumps({"object": "list", "data": data}).encode())
        elif re.fullmatch(r"[\w.]+", name) and (PAGE / name).is_file():
            self.whole(200, (PAGE / name).read_bytes(), TYPES[Path(name).suffix])
        else:
            self.error(404, "There is nothing here.")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        self.server.requests.append(request)
        text = request["messages"][-1]["content"]
        if text.startswith("busy"):
            self.error(429, "64 requests are waiting already.", **{"Retry-After": "7"})
        elif text.startswith("refused"):
            self.error(400, "temperature: -1 is below 0.")
        else:
            self.stream(request, text)

    def stream(self, request: dict, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            self.answer(request, text)
        except (BrokenPipeError, ConnectionResetError):
            self.server.closed += 1

    def answer(self, request: dict, text: str) -> None:
        word = text.split()[0].lower().strip(".,!?") if text.split() else ""
        self.delta({"role": "assistant", "content": ""})
        pieces = 0
        if word in THOUGHTS:
            pieces += self.tell("reasoning_content", THOUGHTS[word], self.server.pause)
        made = json.dumps(request) if word == "request" else ANSWERS.get(word, f"You said: {text}")
        pause = 0.05 if word == "slow" else self.server.pause
        pieces += self.tell("content", made, pause)
        if word == "cut":
            return
        if word == "broken":
            self.event({"error": {"message": "The engine stopped.", "type": "server_error", "code": 500}})
        else:
            self.delta({}, "length" if word == "length" else "stop")
            prompt = sum(len(message["content"]) for message in request["messages"]) // 4
            self.event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": pieces,
                                                 "total_tokens": prompt + pieces}})
        self.wfile.write(b"data: [DONE]\n\n")

    def tell(self, name: str, text: str, pause: float) -> int:
        pieces = re.findall(r"[\s\S]{1,5}", text)
        for piece in pieces:
            self.delta({name: piece})
            time.sleep(pause)
        return len(pieces)

    def delta(self, delta: dict, finish: str | None = None) -> None:
        self.event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m",
                    "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    def event(self, data: dict) -> None:
        self.wfile.write(f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode())
        self.wfile.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--key")
    args = parser.parse_args()
    server = ScriptedServer(args.port, args.key, pause=0.03)
    print(f"ready: {server.url}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        sys.exit(0)
