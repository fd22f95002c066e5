"""Reward functions, run where they can do no harm: in processes that are killed when they take too long.

    with RewardWorkers(parse_rewards(["math", "format:0.5", "mine.py:short:0.1"]), seconds=30) as workers:
        result = workers.score(prompts, completions, rows)
        result.total, result.values["math"], result.failures

A function is called with the whole batch; ready ones, which look at one completion at a time, with a part of it in each
process. Where a call fails as a whole, the function is called for each completion alone, so that a bad one costs no
other its reward.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

from megatron_deepseek.rewards.process import Worker
from megatron_deepseek.rewards.result import (
    DIED, RAISED, TIMED_OUT, Failure, RewardResult, Value, result_of)
from megatron_deepseek.rewards.spec import RewardSpec
from megatron_deepseek.rewards.worker import call, load

_TRIED = 8  # completions, alone, after which a function that never ends is not tried any more
Batch = tuple[list[str], list[str], list[dict]]


@dataclass(frozen=True)
class _Pool:
    """Workers of which any free one may be asked. `each`: the time limit is for a completion, not for a call."""

    specs: tuple[RewardSpec, ...]
    workers: tuple[Worker, ...]
    free: SimpleQueue
    each: bool = False

    @classmethod
    def of(cls, specs: Sequence[RewardSpec], count: int, memory_bytes: int | None, each: bool = False) -> "_Pool":
        workers, free = tuple(Worker(specs, memory_bytes) for _ in range(count)), SimpleQueue()
        for worker in workers:
            free.put(worker)
        return cls(tuple(specs), workers, free, each)

    def call(self, spec: RewardSpec, batch: Batch, seconds: float) -> list[Value] | Failure:
        worker = self.free.get()
        try:
            limit = seconds * max(len(batch[0]), 1) if self.each else seconds
            return worker.call(self.specs.index(spec), batch, limit)
        finally:
            self.free.put(worker)


class RewardWorkers:
    """Processes that reward completions by `specs`. A call may take `seconds`; `processes` calls run at a time.

    `memory_bytes`: of a process, None for no limit. A reward model has a process of its own, without that
    limit, and `seconds` for each completion. Programs that a model wrote run in the sandbox, with their own limits.
    """

    def __init__(self, specs: Sequence[RewardSpec], seconds: float = 30.0, processes: int = 2,
                 memory_bytes: int | None = 8 * 2**30):
        assert seconds > 0 and processes > 0, (seconds, processes)
        self.specs, self.seconds, self.processes = tuple(specs), seconds, processes
        functions = [spec for spec in self.specs if not spec.is_model and not spec.sandboxed]
        self._pools = {spec.name: _Pool.of([spec], 1, None, each=True) for spec in self.specs if spec.is_model}
        self._pools |= dict.fromkeys((spec.name for spec in functions), _Pool.of(functions, processes, memory_bytes))
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> "RewardWorkers":
        """Start the processes. Raise ValueError, of one line, for a function that cannot be loaded."""
        self._threads = ThreadPoolExecutor(self.processes + len(self._pools))
        try:
            for started in [self._threads.submit(worker.start) for worker in self._workers()]:
                started.result()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, whatever they do."""
        if self._threads is None:
            return
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers():
            worker.kill()
        self._threads.shutdown()

    def _workers(self) -> Iterator[Worker]:
        pools = {id(pool): pool for pool in self._pools.values()}
        return (worker for pool in pools.values() for worker in pool.workers)

    def score(self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict]) -> RewardResult:
        """Return the rewards of completions. `prompts` are as the model saw them, `rows` those of the data.

        Nothing that a function does raises anything here: `failures` of the result tells it.
        """
        count = len(prompts)
        assert len(completions) == len(rows) == count, (count, len(completions), len(rows))
        batch = (list(prompts), list(completions), list(rows))
        begun = {spec.name: [self._threads.submit(self._call, spec, part) for part in self._parts(spec, batch)]
                 for spec in self.specs}
        found = {spec.name: self._gathered(spec, begun[spec.name], batch) for spec in self.specs}
        return result_of(self.specs, found, count)

    def _parts(self, spec: RewardSpec, batch: Batch) -> list[Batch]:
        """Return what the function is called with: all of the batch, unless it looks at one completion at a time."""
        count = len(batch[0])
        parts = min(self.processes, count) if spec.is_ready and not spec.sandboxed else min(1, count)
        return [_cut(batch, count * part // parts, count * (part + 1) // parts) for part in range(parts)]

    def _call(self, spec: RewardSpec, batch: Batch) -> list[Value] | Failure:
        if spec.name in self._pools:
            return self._pools[spec.name].call(spec, batch, self.seconds)
        told = call(load(spec), batch)
        return Failure(*told["failed"]) if "failed" in told else told["values"]

    def _gathered(self, spec: RewardSpec, begun: Sequence[Future], batch: Batch) -> list[Value]:
        """Return the values of all parts; those of a part that failed, of each of its completions alone."""
        values: list[Value] = []
        for part, future in zip(self._parts(spec, batch), begun, strict=True):
            found = future.result()
            values += self._alone(spec, part, found) if isinstance(found, Failure) else found
        return values

    def _alone(self, spec: RewardSpec, batch: Batch, failure: Failure) -> list[Value]:
        """Return what a function gives for each completion of a batch that it failed on.

        One that broke its contract would break it again, and a single completion has had its chance.
        """
        count = len(batch[0])
        if failure.kind not in (RAISED, TIMED_OUT, DIED) or count == 1:
            return [failure] * count
        first = self._each(spec, batch, 0, min(_TRIED, count))
        if all(isinstance(each, Failure) and each.kind in (TIMED_OUT, DIED) for each in first):
            return first + [first[-1]] * (count - len(first))
        return first + self._each(spec, batch, len(first), count)

    def _each(self, spec: RewardSpec, batch: Batch, begin: int, end: int) -> list[Value]:
        singles = [_cut(batch, place, place + 1) for place in range(begin, end)]
        found = self._threads.map(lambda single: self._call(spec, single), singles)
        return [each if isinstance(each, Failure) else each[0] for each in found]


def _cut(batch: Batch, begin: int, end: int) -> Batch:
    return tuple(each[begin:end] for each in batch)
