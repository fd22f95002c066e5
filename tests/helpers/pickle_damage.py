"""What a reader of pickles must survive: bytes that are damaged, and objects whose reading would run something."""

import os
import random
from collections.abc import Iterator


class Bomb:
    """An object whose unpickling by Python's own reader makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yield `data` with flipped bits, replaced bytes, cuts, and pieces doubled or left out."""
    rng = random.Random(seed)
    for number in range(count):
        changed, at = bytearray(data), rng.randrange(len(data))
        kind = number % 5
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at:at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            del changed[at:at + rng.randrange(1, 9)]
        else:
            changed[at:at] = changed[max(at - rng.randrange(1, 40), 0):at]
        yield bytes(changed)
