"""How answers leave: JSON, errors in OpenAI's form, and streams of server-sent events that end with their reader.

A closed connection cancels what was being done for it, and with that the request in the engine.
"""

import json
import sys
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from megatron_deepseek.serving.errors import ApiError

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


class Json(Response):
    """A JSON body, in which texts stay as they are."""

    media_type = "application/json"

    def render(self, content) -> bytes:
        return dump(content)


def dump(value) -> bytes:
    """Return a value as UTF-8 JSON in one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def error_response(error: ApiError) -> Json:
    return Json(error.body, error.status, headers=dict(error.headers))


def as_api_error(error: Exception, verbose: bool) -> ApiError:
    """Return what a client is told of an error; of our own mistakes it learns nothing more than that they are ours."""
    if isinstance(error, ApiError):
        return error
    print(f"a request failed: {type(error).__name__}", file=sys.stderr, flush=True)
    if verbose:
        traceback.print_exception(error)
    return ApiError(500, "The server made a mistake.")


async def unless_gone(receive: Receive, work: Callable[[], Awaitable[T]]) -> T | None:
    """Return what `work` returns; stop it and return None as soon as the client closes the connection."""
    outcome: list[T] = []
    failure: list[Exception] = []

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        try:
            outcome.append(await work())
        except Exception as error:  # or it would come out in a group of errors
            failure.append(error)
        group.cancel_scope.cancel()
    if failure:
        raise failure[0]
    return outcome[0] if outcome else None


class EventStream(Response):
    """A stream of events: `events` begins it, and is closed at the end, whoever ended it.

    `seconds` is the most that all of it may take. An error before the first event is an ordinary answer with its
    status; later it is an event, after which the stream ends as others do.
    """

    def __init__(self, events: Callable[[], AsyncGenerator[dict, None]], seconds: float, verbose: bool = False):
        super().__init__()
        self._events, self._seconds, self._verbose = events, seconds, verbose

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_gone(receive, lambda: self._send_all(scope, receive, send))

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        events = self._events()
        try:
            with within(self._seconds):
                async for event in events:
                    if not begun:
                        begun = await _begin(send)
                    await _send_event(send, b"data: " + dump(event) + b"\n\n")
        except Exception as error:
            told = as_api_error(error, self._verbose)
            if not begun:
                await error_response(told)(scope, receive, send)
                return
            await _send_event(send, b"data: " + dump(told.body) + b"\n\n")
        finally:
            with anyio.CancelScope(shield=True):
                await events.aclose()
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


async def _begin(send: Send) -> bool:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
               (b"x-accel-buffering", b"no")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    return True


async def _send_event(send: Send, event: bytes) -> None:
    await send({"type": "http.response.body", "body": event, "more_body": True})


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Let the block take so long, and then raise ApiError, which tells the client not to try the same again."""
    try:
        with anyio.fail_after(seconds):
            yield
    except TimeoutError as error:
        raise ApiError(504, f"The answer was not ready within {seconds:g} s.", headers={"x-should-retry": "false"}
                       ) from error
