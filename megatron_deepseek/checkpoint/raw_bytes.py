"""Bytes that keep their type on the way from file to file: read in blocks, never looked at.

A block is as large as stays in a core's cache until it has been counted in a checksum and written. Smaller ones cost
more calls and make the kernel take the memory of its page cache in smaller pieces (docs/benchmarks.md).
"""

import os
from collections.abc import Iterator

BLOCK_BYTES = 1 << 20


def blocks(descriptor: int, position: int, nbytes: int, buffer: memoryview | None = None) -> Iterator[memoryview]:
    """Bytes position..position + nbytes of an open file, in order; each block is overwritten by the next.

    `buffer` holds a block, if there is one already. OSError or EOFError where they cannot be read.
    """
    if buffer is None:
        buffer = memoryview(bytearray(min(BLOCK_BYTES, nbytes)))
    end = position + nbytes
    while position < end:
        block = buffer[:min(len(buffer), end - position)]
        fill(descriptor, block, position)
        position += len(block)
        yield block


def fill(descriptor: int, buffer: memoryview, position: int) -> None:
    """Read from `position` on until `buffer` is full; a single read stops at 2 GiB."""
    while len(buffer):
        count = os.preadv(descriptor, [buffer], position)
        if not count:
            raise EOFError(f"the file ends {len(buffer)} bytes too early")
        buffer, position = buffer[count:], position + count
