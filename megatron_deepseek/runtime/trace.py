"""Measures how much communication a rank hid behind computation, from the CUDA kernels of a trace (`--profile`).

A collective is hidden while any other kernel of the same device runs; two collectives side by side hide nothing.
Kernels are told apart by name: NCCL's begin with "nccl". PyTorch notes beside each which collective it is, and of which
group.
"""

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

Interval = tuple[float, float]  # begin and end, in microseconds


@dataclass(frozen=True)
class Overlap:
    """The overlap of one kind of communication: how many kernels, how long they ran, how much of that was hidden."""

    kind: str
    count: int
    microseconds: float
    hidden: float

    @property
    def share(self) -> float:
        return self.hidden / self.microseconds if self.microseconds else 1.0


def overlaps(trace: dict) -> list[Overlap]:
    """Return the overlap of each kind of communication, longest first. Raise ValueError without CUDA kernels."""
    computing, kinds = defaultdict(list), defaultdict(list)
    for event in trace.get("traceEvents", ()):
        if event.get("ph") != "X" or event.get("cat") != "kernel":
            continue
        begin = float(event["ts"])
        interval, device = (begin, begin + float(event["dur"])), event["args"].get("device")
        if event["name"].startswith("nccl"):
            kinds[_kind(event)].append((device, interval))
        else:
            computing[device].append(interval)
    if not computing and not kinds:
        raise ValueError("the trace has no CUDA kernels; on a CPU nothing overlaps")
    busy = {device: list(_union(intervals)) for device, intervals in computing.items()}
    found = [Overlap(kind, len(own), sum(end - begin for _, (begin, end) in own), _hidden(own, busy))
             for kind, own in kinds.items()]
    return sorted(found, key=lambda overlap: -overlap.microseconds)


def total(found: Iterable[Overlap]) -> Overlap:
    found = list(found)
    return Overlap("all", sum(each.count for each in found), sum(each.microseconds for each in found),
                   sum(each.hidden for each in found))


def read_trace(path: Path) -> dict:
    """Read a trace. Raise ValueError naming a file that is none: the profiler's JSON is large and not always strict."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            trace = json.load(file)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise ValueError(f"{path} is no trace: {error}") from error
    events = trace.get("traceEvents") if isinstance(trace, dict) else None
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise ValueError(f"{path} is no trace: it has no traceEvents")
    return trace


def _kind(event: dict) -> str:
    """Return the collective and the group's name where PyTorch notes them, else the kernel's name."""
    name, group = event["args"].get("Collective name"), event["args"].get("Process Group Description")
    if not name:
        return event["name"].split("(")[0]
    return f"{name.strip('_')} over {group}" if group else name.strip("_")


def _union(intervals: Iterable[Interval]) -> Iterator[Interval]:
    """Yield the union of `intervals` as intervals that don't touch, in order."""
    begin = end = None
    for start, stop in sorted(intervals):
        if end is None or start > end:
            if end is not None:
                yield begin, end
            begin, end = start, stop
        end = max(end, stop)
    if end is not None:
        yield begin, end


def _hidden(own: list[tuple[int, Interval]], busy: dict[int, list[Interval]]) -> float:
    """Return how long the intervals `own` of devices lie within the `busy` ones there; one pass over both, in order."""
    hidden = 0.0
    for device in {device for device, _ in own}:
        others, at = busy.get(device, []), 0
        for begin, end in sorted(interval for where, interval in own if where == device):
            while at < len(others) and others[at][1] <= begin:
                at += 1
            later = takewhile(lambda other: other[0] < end, islice(others, at, None))
            hidden += sum(min(end, stop) - max(begin, start) for start, stop in later)
    return hidden
