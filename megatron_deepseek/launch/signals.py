"""Signals for a thread: Python runs its handlers in the main thread alone, which may be in C code for minutes."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def numbers_read(read: Callable[[int], None]) -> Iterator[None]:
    """Run `read(file)` in a thread; each signal that Python handles puts its number, a byte, into `file`."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=read, args=(reading,), daemon=True, name="signal-watch")
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        thread.join()
        os.close(reading)
