"""The line of this package's code that is at work: the innermost one that is not the dry run's own."""

from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType

import torch

PACKAGE = Path(__file__).parents[1]
_OWN, _RECORD = Path(__file__).parent, "recorded_collectives.py"  # who only look


_SHAPES_ALONE = "torch/distributed/tensor/_sharding_prop.py"  # DTensor asks for shapes, by fake tensors of its own


@lru_cache(None)
def _place(code: CodeType) -> str | None:
    """Return the file of `code` from the package on, None for code that is not the package's or is the dry run's."""
    path = Path(code.co_filename)
    if code.co_filename.endswith(_SHAPES_ALONE):
        return _SHAPES_ALONE
    if not path.is_relative_to(PACKAGE) or path.is_relative_to(_OWN) or path.name == _RECORD:
        return None
    return str(path.relative_to(PACKAGE))


def line_of(frame: FrameType | None) -> str | None:
    """Return "file:line function" of the innermost frame of the package from `frame` outwards; None where nothing is
    made, because DTensor only asks for shapes.

    While autograd runs, torch's own node of the graph is named as well: its line is that of the backward's beginning.
    """
    node = torch._C._current_autograd_node()
    while frame is not None:
        place = _place(frame.f_code)
        if place is _SHAPES_ALONE:
            return None
        if place is not None:
            line = f"{place}:{frame.f_lineno} {frame.f_code.co_name}"
            return line if node is None else f"{line} ({node.name()})"
        frame = frame.f_back
    return "outside of the package"
