"""What is shown while data is prepared: a bar on a terminal that has a width, lines elsewhere."""

import fcntl
import os
import pty
import struct
import sys
import termios
import time
from contextlib import suppress

import pytest

from megatron_deepseek.data.preprocess import progress as shown
from megatron_deepseek.data.preprocess.workers import Counters


@pytest.mark.parametrize("columns", [100, 0])
def test_a_terminal_without_a_width_gets_lines(monkeypatch, columns):
    """As `script` makes one without a terminal around it; a bar of no columns would show nothing."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    monkeypatch.setattr(shown, "SECONDS_BETWEEN_LINES", 0.0)
    lines, counters = [], Counters()
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        progress = shown.Progress(counters, 2_000_000, 10, lines.append)
        counters.add(1_000_000, 20, 5000)
        time.sleep(0.15)  # tqdm draws ten times a second at most
        progress.tick()
        progress.close()
    written = read_all(ours)
    if columns:
        assert not lines and "50%" in written and "20 documents" in written
    else:
        assert len(lines) == 1 and lines[0].startswith("Processed 20 documents, 1 of 2 MB") and not written


def read_all(terminal: int) -> str:
    """Return what was written until its other end was closed."""
    written = b""
    with suppress(OSError):  # so Linux tells the end
        while more := os.read(terminal, 1 << 16):
            written += more
    os.close(terminal)
    return written.decode()
