"""Middleware that counts answers, gives each a name, and says of each a line where that was asked for."""

import sys
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_deepseek.serving.metrics import Metrics

_METHODS = ("GET", "HEAD", "POST", "OPTIONS")
NEVER = 499  # nginx's number for a client that closed its connection before there was an answer


class Watched:
    """Counts in `metrics`. `says` a line on stderr for each request: method, path, status, seconds, and no more."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str], says: bool):
        self.app, self.metrics, self.paths, self.says = app, metrics, paths, says

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.monotonic(), NEVER

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", uuid.uuid4().hex.encode())]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            self._note(scope, status, time.monotonic() - begun)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        """Count the answer. Paths and methods that are none here are counted together: anyone can invent them."""
        path = scope["path"] if scope["path"] in self.paths else "other"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self.metrics.answered(method, path, status)
        if self.says:
            print(f"{method} {path} {status} {seconds:.3f} s", file=sys.stderr, flush=True)
