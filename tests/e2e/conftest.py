"""The commands as a user gives them, on a corpus of a few documents and a model that trains in seconds."""

import signal
from collections.abc import Iterator

import pytest
from workshop import Workshop, make_workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Let Ctrl-C reach what the tests start: a shell's background jobs, and their children, ignore SIGINT."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
