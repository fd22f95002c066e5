"""Connections that somebody else opened get the kernel's limits."""

import os
import socket
import sys
import time

import pytest

from megatron_deepseek.launch import links


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's options are Linux's")
def test_every_connection_of_the_process(monkeypatch):
    """Opened before and meanwhile; a listener and others are left alone, and nothing is closed."""
    monkeypatch.setattr(links, "LOOK_SECONDS", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as listener, links.silence_limited(100.0):
        with socket.create_connection(listener.getsockname()) as connection:
            deadline = time.monotonic() + 20
            while not connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) and time.monotonic() < deadline:
                time.sleep(0.01)
            number = len(os.listdir("/proc/self/fd"))
            time.sleep(0.3)  # it looks many times
            assert abs(len(os.listdir("/proc/self/fd")) - number) <= 1
            found = [connection.getsockopt(socket.IPPROTO_TCP, option) for option in (
                socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)]
            assert found == [52, 8, 6, 100_000]  # 52 + 6 * 8 seconds
            accepted, _ = listener.accept()
            with accepted:
                connection.sendall(b"still open")
                assert accepted.recv(10) == b"still open"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's options are Linux's")
def test_patience_of_a_year():
    """--distributed-timeout-minutes 600000 is more milliseconds than the kernel's number can hold."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as one:
        links.limit_silence(one, 60 * 600_000.0)
        assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2**31 - 1
