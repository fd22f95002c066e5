"""Connections that may not stand still: neither before a request is there, nor while nobody reads its answer.

uvicorn knows a time between two requests alone. A client that never ends its headers, or never reads a stream, would
hold its connection for ever.
"""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_deepseek.serving.errors import ApiError
from megatron_deepseek.serving.limits import Limits
from megatron_deepseek.serving.responses import dump


def connection_class(limits: Limits) -> type[H11Protocol]:
    """Return uvicorn's protocol with these limits: it makes its connections itself, and passes them nothing else."""

    class Connection(H11Protocol):
        _headers_due: asyncio.TimerHandle | None = None
        _reader_due: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.abort()
            else:
                self._expect_headers()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._expect_headers()
            else:
                self._headers_due = cancelled(self._headers_due)

        def connection_lost(self, exc: Exception | None) -> None:
            self._headers_due, self._reader_due = cancelled(self._headers_due), cancelled(self._reader_due)
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reader_due = self.loop.call_later(limits.idle_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._reader_due = cancelled(self._reader_due)

        def send_400_response(self, msg: str) -> None:
            """Answer what is no HTTP request, in the form of all errors."""
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                          h11.Data(data=dump(ApiError(400, msg).body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
            self.transport.close()

        def _expect_headers(self) -> None:
            if self._headers_due is None:
                self._headers_due = self.loop.call_later(limits.idle_seconds, self.transport.abort)

    return Connection


def cancelled(timer: asyncio.TimerHandle | None) -> None:
    """Cancel a timer, if it runs; return what stands for none."""
    if timer is not None:
        timer.cancel()
