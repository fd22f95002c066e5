"""A faster start of the tools, of which importing torch takes most of the time."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Turn the garbage collector off for the imports in the block, and keep it from ever searching what they made.

    Otherwise Python searches torch's modules again and again while they load, and once more at the end: 0.5 s of 1.7 s
    of processor time for `import torch` alone. Where torch is loaded already this does nothing.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
