"""What torch.save writes around a tensor's numbers, so that they can be streamed between the two from anywhere.

torch.save wants the whole tensor in memory, and computes a CRC-32 of it that torch.load never looks at. Under
`skip_data` it leaves the space of the numbers out by a seek; what it writes before and after is kept here. The CRC
in the zip's directory is then 0, as torch.serialization.set_crc32_options(False) has it.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch.serialization import skip_data


@dataclass(frozen=True)
class Frame:
    """Bytes before and after the numbers."""

    head: bytes
    tail: bytes


class _Gap:
    """A file for torch.save that notes where it skips."""

    def __init__(self):
        self.parts: list[bytes] = []
        self.skipped: tuple[int, int] | None = None

    def write(self, data) -> int:
        self.parts.append(bytes(data))
        return len(self.parts[-1])

    def seek(self, offset: int, whence: int) -> None:
        assert whence == 1 and self.skipped is None, (offset, whence)
        self.skipped = len(self.parts), offset

    def flush(self) -> None:
        """Nothing is buffered; torch.save asks."""


@lru_cache(maxsize=4096)
def frame(shape: tuple[int, ...], dtype: torch.dtype) -> Frame:
    """Of a contiguous tensor with at least one number; the memory for it is reserved for a moment, never touched."""
    file = _Gap()
    with skip_data():
        torch.save(torch.empty(shape, dtype=dtype), file)
    assert file.skipped is not None and file.skipped[1] == prod(shape) * dtype.itemsize, (shape, file.skipped)
    middle = file.skipped[0]
    return Frame(b"".join(file.parts[:middle]), b"".join(file.parts[middle:]))
