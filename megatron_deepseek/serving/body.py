"""Reads a request's body: JSON, not too long, and not too slowly."""

import anyio
import anyio.to_thread
from starlette.requests import Request

from megatron_deepseek.foreign_json import parse_json
from megatron_deepseek.serving.errors import ApiError
from megatron_deepseek.serving.limits import Limits

_IN_THE_LOOP = 1 << 16  # bytes that are parsed at once; longer ones in a thread, while others are answered


async def read_body(request: Request, limits: Limits) -> dict:
    """Return the object in a request's body. Raise ApiError: 415, 413, 408, or 400 for what is no JSON object."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "The body must be JSON, with Content-Type: application/json.",
                       headers={"Connection": "close"})
    content = await _receive(request, limits)
    try:
        if len(content) <= _IN_THE_LOOP:
            found = parse_json(content, "The body")
        else:
            found = await anyio.to_thread.run_sync(parse_json, content, "The body")
    except ValueError as error:
        raise ApiError(400, str(error)) from error
    if not isinstance(found, dict):
        raise ApiError(400, "The body is JSON, but no object.")
    return found


async def _receive(request: Request, limits: Limits) -> bytes:
    """Return the body. What is refused before it was all read closes the connection: the rest would be a request."""
    closed = {"Connection": "close"}
    too_long = ApiError(413, f"The body is longer than {limits.body_bytes:,} bytes.", headers=closed)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limits.body_bytes:
        raise too_long
    content = bytearray()
    try:
        with anyio.fail_after(limits.body_seconds):
            async for chunk in request.stream():
                content += chunk
                if len(content) > limits.body_bytes:
                    raise too_long
    except TimeoutError as error:
        raise ApiError(408, f"The body did not arrive within {limits.body_seconds:g} s.", headers=closed) from error
    return bytes(content)
