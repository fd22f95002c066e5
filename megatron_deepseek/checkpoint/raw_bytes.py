"""Copying tensors' bytes from file to file where their type stays the same: they are read in blocks, as they are.

A block stays in a core's cache until it has been counted in a checksum and written. Smaller blocks cost more calls and
make the kernel allocate its page cache in smaller pieces (docs/benchmarks.md).
"""

import os
from collections.abc import Iterator

BLOCK_BYTES = 1 << 20


def blocks(descriptor: int, position: int, nbytes: int, buffer: memoryview | None = None) -> Iterator[memoryview]:
    """Yield bytes position..position + nbytes of an open file in order; each block is overwritten by the next.

    `buffer` is memory for a block, made here if None. Raise OSError or EOFError if the bytes cannot be read.
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
    """Read from `position` on until `buffer` is full, in several calls, for a single one stops at 2 GiB."""
    while len(buffer):
        count = os.preadv(descriptor, [buffer], position)
        if not count:
            raise EOFError(f"the file ends {len(buffer)} bytes too early")
        buffer, position = buffer[count:], position + count
