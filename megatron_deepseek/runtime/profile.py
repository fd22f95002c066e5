"""A trace of a few steps of every rank, for chrome://tracing or Perfetto.

Steps are counted from the start of this process, so that a resumed run profiles its own steps. Files appear as
`<save>/profile/rank_00003_steps_10-12.json.gz` once step profile_step_end begins.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from megatron_deepseek.settings import RunSettings


class Profiler(Protocol):
    def step(self) -> None:
        """Say that a training step has ended."""


class NoProfiler:
    def step(self) -> None:
        pass


@contextmanager
def profiler(run: RunSettings, rank: int) -> Iterator[Profiler]:
    """Trace the steps [profile_step_start, profile_step_end), counted from 0, if `run.profile`; else do nothing."""
    if not run.profile:
        yield NoProfiler()
        return
    import torch

    path = _trace_path(run, rank)
    start, end = run.profile_step_start, run.profile_step_end
    # The tracer's first step pays for its own start-up, so the step before the first traced one warms it up.
    warmup = min(start, 1)
    schedule = torch.profiler.schedule(wait=start - warmup, warmup=warmup, active=end - start, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=lambda done: done.export_chrome_trace(str(path)),
                                record_shapes=True, experimental_config=all_threads()) as active:
        yield active


def all_threads():
    """Return the setting by which torch.profiler traces all threads.

    Without it, it would leave out the second thread that paired chunks run in (parallel/micro_batch_overlap.py).
    """
    from megatron_deepseek.torch_private import _ExperimentalConfig

    return _ExperimentalConfig(profile_all_threads=True)


def check_profile(run: RunSettings) -> None:
    """Raise ValueError for a profile of no steps or without a place; the arguments call it before anything is built."""
    if not run.profile:
        return
    if not 0 <= run.profile_step_start < run.profile_step_end:
        raise ValueError(f"profile_step_start {run.profile_step_start} is not between 0 and "
                         f"profile_step_end {run.profile_step_end}")
    if run.save is None:
        raise ValueError("profile True needs save, which is None: traces are written to <save>/profile")


def _trace_path(run: RunSettings, rank: int) -> Path:
    check_profile(run)
    folder = Path(run.save) / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"rank_{rank:05d}_steps_{run.profile_step_start}-{run.profile_step_end}.json.gz"
