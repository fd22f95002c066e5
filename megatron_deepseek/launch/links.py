"""A time limit for silent connections that C++ opened in this process; the kernel breaks them off.

torch's store waits for an answer without a limit, so a torchrun behind a cut link would wait for as long as TCP repeats
its packets: a quarter of an hour, or for ever where it has nothing to send.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PROBES = 6
LOOK_SECONDS = 5.0
_LARGEST_INT = 2**31 - 1  # milliseconds: 24 days


def limit_silence(connection: socket.socket, seconds: float) -> None:
    """Let the kernel break off `connection` when its other end has acknowledged nothing for `seconds`.

    A process that is slow or stopped is not silent: its kernel answers. Elsewhere than on Linux the kernel's own times
    hold.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        return
    interval = max(1, min(int(seconds / (2 * PROBES)), 600))
    idle = max(1, min(int(seconds - interval * PROBES), 32000))
    for option, value in ((socket.TCP_KEEPIDLE, idle), (socket.TCP_KEEPINTVL, interval), (socket.TCP_KEEPCNT, PROBES),
                          (socket.TCP_USER_TIMEOUT, min(int(1000 * seconds), _LARGEST_INT))):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


@contextmanager
def silence_limited(seconds: float) -> Iterator[None]:
    """Apply `limit_silence` to every TCP connection of this process while the block runs, to new ones too."""
    done = threading.Event()

    def look():
        while not done.wait(LOOK_SECONDS):
            for connection in _connections():
                with connection:
                    limit_silence(connection, seconds)

    thread = threading.Thread(target=look, daemon=True, name="links")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _connections() -> Iterator[socket.socket]:
    """Yield the TCP connections in /proc/self/fd, each by a new file descriptor; none where there is no /proc."""
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            found = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # closed in the meantime
            continue
        if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
            yield found
        else:
            found.close()
