"""A dry step as a trace for Perfetto: acts, collectives and the bytes of each category, in order.

Nothing was timed: an act takes a unit of time, and what is between two acts another one. Chrome's trace format: "X"
events for acts and collectives, "C" events for bytes, a process for each rank.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from megatron_deepseek.arguments.dry_run import DryRun
from megatron_deepseek.dry_run.rank import RankStep
from megatron_deepseek.settings import Settings

_UNIT = 1000.0  # microseconds of an act
_ACTS, _COLLECTIVES = 1, 2  # threads


def trace(wanted: DryRun, settings: Settings, found: Sequence[RankStep]) -> dict:
    """Return the trace as JSON."""
    return {"displayTimeUnit": "ms", "traceEvents": [event for each in found for event in _events(wanted, each)],
            "otherData": {"times": "none was measured: an act takes 1 ms"}}


def _events(wanted: DryRun, found: RankStep) -> Iterator[dict]:
    rank = found.rank
    yield {"ph": "M", "pid": rank, "tid": 0, "name": "process_name", "args": {"name": f"rank {rank}"}}
    for thread, name in ((_ACTS, "acts"), (_COLLECTIVES, "collectives")):
        yield {"ph": "M", "pid": rank, "tid": thread, "name": "thread_name", "args": {"name": name}}
    collectives = defaultdict(list)
    for each in found.collectives:
        collectives[each.place].append(each)
    for number, level in enumerate(found.timeline.levels):
        start = number * _UNIT
        yield _span(rank, _ACTS, level.act, start, _UNIT, {"bytes": level.bytes})
        if wanted.memory:
            yield {"ph": "C", "pid": rank, "name": "GiB", "ts": start,
                   "args": {name: round(size / 2**30, 6) for name, size in level.categories.items()}}
        inside = collectives.pop(level.act, ())
        for place, each in enumerate(inside):
            yield _span(rank, _COLLECTIVES, f"{each.kind} over {each.group}", start + place * _UNIT / len(inside),
                        _UNIT / len(inside), {"sent_bytes": each.sent, "received_bytes": each.received,
                                              "ranks": len(each.ranks), "peer": each.peer})


def _span(rank: int, thread: int, name: str, start: float, length: float, more: dict) -> dict:
    return {"ph": "X", "pid": rank, "tid": thread, "name": name, "ts": start, "dur": length, "args": more}
