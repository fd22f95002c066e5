"""Reads a request's body: JSON, not too long, and not too slowly."""

from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread
from starlette.requests import Request

from megatron_deepseek.foreign_json import parse_json
from megatron_deepseek.serving.errors import ApiError
from megatron_deepseek.serving.limits import Limits

_IN_THE_LOOP = 1 << 16  # bytes of a body that is read at once; longer ones in a thread, while others are answered
_DISCARDED = 8  # times the longest body: what is read of a longer one, so that its sender comes to read the answer

T = TypeVar("T")


async def read_request(request: Request, limits: Limits, read: Callable[[dict], T]) -> T:
    """Return what `read` makes of the object in a request's body, in a thread if it is long.

    Raise ApiError: 415, 413, 408, 400 for what is no JSON object, and what `read` raises.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "The body must be JSON, with Content-Type: application/json.",
                       headers={"Connection": "close"})
    content = await _receive(request, limits)
    if len(content) <= _IN_THE_LOOP:
        return read(_parsed(content))
    return await anyio.to_thread.run_sync(lambda: read(_parsed(content)))


def _parsed(content: bytes) -> dict:
    try:
        found = parse_json(content, "The body")
    except ValueError as error:
        raise ApiError(400, str(error)) from error
    if not isinstance(found, dict):
        raise ApiError(400, "The body is JSON, but no object.")
    return found


async def _receive(request: Request, limits: Limits) -> bytes:
    """Return the body. What is refused before all of it was read closes the connection: the rest is no request."""
    closed, most = {"Connection": "close"}, _DISCARDED * limits.body_bytes
    too_long = ApiError(413, f"The body is longer than {limits.body_bytes:,} bytes.", headers=closed)
    declared = request.headers.get("content-length", "")
    length = int(declared) if declared.isdigit() else 0
    if length > (limits.body_bytes if "expect" in request.headers else most):
        raise too_long
    content, size = bytearray(), 0
    try:
        with anyio.fail_after(limits.body_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > most:
                    break
                if size <= limits.body_bytes:
                    content += chunk
    except TimeoutError as error:
        raise ApiError(408, f"The body did not arrive within {limits.body_seconds:g} s.", headers=closed) from error
    if size > limits.body_bytes:
        raise too_long
    return bytes(content)
