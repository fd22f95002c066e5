"""Describes a collective that timed out: which group it was of, and where the ranks of that group are.

The rank that waited is rarely the one that hung. Each rank has a thread beside the training that can say where its
training stands (`location`), so the report can name the ranks that are in no collective at all.
"""

import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# What gloo, NCCL and torch say of a collective that took too long.
_TIMED_OUT = ("Timed out waiting", "timeout of collective", "collective operation timeout", "Wait timeout")
_DISTRIBUTED = str(Path(dist.__file__).parent)
_LIBRARIES = (str(Path(dist.__file__).parents[1]), str(Path(threading.__file__).parent))
_MOST_NAMED = 16


def timed_out(error: BaseException) -> bool:
    """Return whether `error` says that a collective took longer than its group allows. A slow store is another case."""
    return isinstance(error, RuntimeError) and not isinstance(error, dist.DistStoreError) and any(
        words in str(error) for words in _TIMED_OUT)


def group_of(error: BaseException) -> dist.ProcessGroup | None:
    """Return the process group that the innermost frame of `error` with one refers to; None if no frame does."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        found = next(_groups(frame.f_locals.values(), depth=2), None)
        if found is not None:
            return found
    return None


def _groups(values, depth: int) -> Iterator[dist.ProcessGroup]:
    """Yield the process groups among `values`, then those in the attributes of `values`; nearer ones first."""
    values = list(values)
    for value in values:
        if isinstance(value, dist.ProcessGroup):
            yield value
        elif isinstance(value, DeviceMesh) and value.ndim == 1:
            yield value.get_group()
    if depth:
        inner = (value[0] if isinstance(value, (list, tuple)) and value else value for value in values)
        attributes = [attribute for value in inner if hasattr(value, "__dict__") and not isinstance(value, type)
                      for attribute in vars(value).values()]
        yield from _groups(attributes, depth - 1) if attributes else ()


def describe_group(group: dist.ProcessGroup | None) -> str:
    """Return the name of a group and its ranks, as text."""
    if group is None:
        return "a group that the traceback does not tell"
    ranks = dist.get_process_group_ranks(group)
    name = (group.group_desc or group.group_name).removeprefix("mesh_")
    return f"the group {name} ({'all ' if len(ranks) == dist.get_world_size() else ''}{_listed(ranks)})"


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:_MOST_NAMED])) + (", ..." if len(ranks) > _MOST_NAMED else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def location() -> str:
    """Return where the main thread of this process is: the innermost frame outside libraries; "" in a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        if frame.f_code.co_filename.startswith(_DISTRIBUTED):
            return ""
        frame = frame.f_back
    return _place(frame)


def _place(frame: FrameType | None) -> str:
    return "outside Python code" if frame is None else \
        f"in {frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}, line {frame.f_lineno})"


def missing_ranks(answers: dict[int, str | None]) -> str:
    """Say in a sentence where the ranks of a group are. In `answers` None is no answer, "" is in a collective."""
    lines = [f"rank {rank} gives no sign of life" if place is None else f"rank {rank} is in no collective but {place}"
             for rank, place in sorted(answers.items()) if place != ""]
    if not lines:
        return "Every rank of it is in a collective: they do not agree on which"
    more = f"; and {len(lines) - _MOST_NAMED} more" if len(lines) > _MOST_NAMED else ""
    return "; ".join(lines[:_MOST_NAMED]) + more
