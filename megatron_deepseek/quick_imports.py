"""Start-up of the tools, of which torch is the most."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """For the imports of a short-lived program: what they make is there to stay, and nobody looks for garbage in it.

    Otherwise Python looks through torch's modules again and again while they load, and once more at the end: 0.5 s of
    1.7 s of processor time for `import torch` alone. Where torch is loaded already this does nothing.
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
