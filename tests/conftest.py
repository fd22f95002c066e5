"""What holds for all tests."""

import gc
import os
import signal
from collections.abc import Iterator

import pytest


def pytest_collection_finish() -> None:
    """Keep garbage collections from going through what is there now, two million objects: half a second for each of
    those that Megatron-LM's readers of datasets ask for, and for those of Python itself.
    """
    gc.freeze()


def pytest_sessionstart() -> None:
    """Have a forked child leave the garbage of its parent alone: to collect a process group of gloo is to wait for
    threads that a child does not have.
    """
    os.register_at_fork(after_in_child=gc.freeze)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Let Ctrl-C reach what the tests start: a shell's background jobs, and their children, ignore SIGINT."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
