"""Runs the application under uvicorn: an early socket, a line when it is ready, an orderly end."""

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from megatron_deepseek.serving.connections import connection_class
from megatron_deepseek.serving.limits import Limits
from megatron_deepseek.serving.service import Service

_SEND_BUFFER = 1 << 17  # bytes of a connection that the kernel keeps: a reader that stands still is seen after these

_LAST_WORDS = 1.0  # seconds in which clients are told that their answers will not be finished


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that has the address, and does not listen yet: before a model is loaded, for a taken port.

    Raise OSError that names the address.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise OSError(f"--host {host}: {error.strerror}") from error
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(f"--host {host} --port {port}: {error.strerror}") from error
    return bound


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server. It ends in order on a signal, which is not raised again; a second one ends it at once."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]):
        super().__init__(config)
        self._service, self._ready = service, ready

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {each: signal.signal(each, self.handle_exit) for each in signals}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._service.engine.start()
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._service.limits.drain_seconds, self._service.end)
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._service.failed.is_set()


def serve(app, service: Service, bound: socket.socket, limits: Limits, ready: Callable[[], None]) -> int:
    """Answer until a signal tells to end, and then what was begun, within `drain_seconds`; return the exit status.

    It is 1 where the engine has stopped by itself.
    """
    config = uvicorn.Config(
        app, http=connection_class(limits), ws="none", lifespan="off", log_config=None, log_level="critical",
        access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=limits.idle_seconds,
        timeout_graceful_shutdown=limits.drain_seconds + _LAST_WORDS, loop="asyncio", backlog=limits.connections)
    server = Server(config, service, ready)
    server.run([bound])
    service.engine.close(limits.drain_seconds)
    return int(service.failed.is_set())
