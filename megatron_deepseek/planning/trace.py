"""A planned step as a trace for Perfetto or chrome://tracing: what each pipeline rank does when, and its memory.

Chrome's trace format: "X" events with ts and dur in microseconds, a process for each pipeline rank, "C" events for
counters. One rank stands for all of its data ranks, which do the same.
"""

from collections.abc import Iterator

from megatron_deepseek.planning.memory import rank_memory
from megatron_deepseek.planning.replay import levels
from megatron_deepseek.planning.stage_bytes import arrived, stage_bytes
from megatron_deepseek.planning.step_time import StepTime, acts_of

KINDS = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}
_COLOURS = {"F": "thread_state_running", "B": "thread_state_iowait", "I": "thread_state_runnable", "W": "good"}
_ACTS, _BESIDE = 1, 2  # threads


def trace(step: StepTime) -> dict:
    """Return the trace as JSON."""
    return {"displayTimeUnit": "ms", "traceEvents": list(_events(step)),
            "otherData": {"gpu": step.gpu.name, "step_seconds": step.step_seconds,
                          "calibrated": step.durations.scales.source or "not calibrated"}}


def _events(step: StepTime) -> Iterator[dict]:
    for rank, (acts, spans) in enumerate(zip(acts_of(step.job), step.spans)):
        yield _named(rank, "process_name", f"pipeline rank {rank}", 0)
        yield {"ph": "M", "pid": rank, "tid": 0, "name": "process_sort_index", "args": {"sort_index": rank}}
        yield _named(rank, "thread_name", "acts", _ACTS)
        if any(len(act) > 1 for act in acts):
            yield _named(rank, "thread_name", "the backward of a pair", _BESIDE)
        for act, span in zip(acts, spans):
            for place, run in enumerate(act):
                yield {"ph": "X", "pid": rank, "tid": _BESIDE if place else _ACTS, "cat": run.kind,
                       "name": f"{run.kind}{run.micro_batch} of stage {run.stage}", "ts": span.start * 1e6,
                       "dur": (span.end - span.start) * 1e6, "cname": _COLOURS[run.kind],
                       "args": {"kind": KINDS[run.kind], "stage": run.stage, "micro_batch": run.micro_batch,
                                "waited_ms": span.waits * 1e3}}
        end = spans[-1].end
        for name, seconds in (("data ranks", step.data_seconds), ("optimizer", step.optimizer_seconds)):
            start = max(end, step.pipeline_seconds)
            yield {"ph": "X", "pid": rank, "tid": _ACTS, "cat": "step", "name": name, "ts": start * 1e6,
                   "dur": seconds * 1e6, "args": {}}
            end = start + seconds
        yield from _memory(step, rank, acts)


def _memory(step: StepTime, rank: int, acts: list) -> Iterator[dict]:
    """Yield the allocated bytes at the start of each act and behind its end, states included."""
    job = step.job
    memory = rank_memory(job, rank)
    standing = memory.peak_bytes - memory.peak.bytes
    shapes = job.shapes()
    stages = {stage: stage_bytes(job, stage, shapes).replayed for stage in job.held(rank)}
    found = levels(acts, stages, job.pairs_at_once, arrived(job, rank), job.regathers)
    for (during, behind), span in zip(found, step.spans[rank]):
        for when, size in ((span.start, during), (span.end, behind)):
            yield {"ph": "C", "pid": rank, "name": "memory", "ts": when * 1e6,
                   "args": {"GiB": round((standing + size) / 2**30, 3)}}


def _named(rank: int, kind: str, name: str, thread: int) -> dict:
    return {"ph": "M", "pid": rank, "tid": thread, "name": kind, "args": {"name": name}}
