"""--manual-gc: all ranks search for garbage at the same steps, so that none waits for one that happens to search."""

import gc

from megatron_deepseek.settings import RunSettings


class GarbageCollection:
    """Python's collector while a run trains: left alone, or with --manual-gc off but for steps that the interval says.

    A context manager, which turns the collector on again.
    """

    def __init__(self, run: RunSettings):
        self.manual, self.interval, self.around_evaluations = run.manual_gc, run.manual_gc_interval, run.manual_gc_eval

    def __enter__(self) -> "GarbageCollection":
        if self.manual:
            gc.disable()
            gc.collect()
        return self

    def __exit__(self, *_) -> None:
        if self.manual:
            gc.enable()

    def after_step(self, iteration: int) -> None:
        """Collect where the interval is over; with an interval of 0 never."""
        if self.manual and self.interval and iteration % self.interval == 0:
            gc.collect()

    def around_evaluation(self) -> None:
        """Collect before and after an evaluation, whose tensors have other sizes than those of training."""
        if self.manual and self.around_evaluations:
            gc.collect(generation=0)
