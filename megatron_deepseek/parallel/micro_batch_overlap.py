"""Two runs in turn: while one waits for the network, the other computes.

DualPipeV pairs the forward of one micro-batch with the backward of another (arXiv 2412.19437, section 3.2.1). Both send
tokens to experts and back many times. Here a run that has begun an exchange lets the other compute until that begins
one too, and only then waits for its own:

    forward    attention  send |                      | wait, experts  send |
    backward                   | dgrad of experts send |                    | wait, attention ...

Only one of them runs at a time, so the order of everything, collectives included, is the same on every rank, and so are
the numbers. On CUDA what is queued while a run waits stands before its wait on the one compute stream.
"""

import threading
from collections.abc import Callable

import torch
import torch.distributed as dist

_HERE, _THERE = 0, 1


class MicroBatchOverlap:
    """Whoever exchanges tokens calls `wait`; without a pair that runs, that is all it does."""

    def __init__(self):
        self._pair: _Pair | None = None

    def wait(self, work: dist.Work) -> None:
        """Until the exchange `work` that was just begun is done; the other run goes on meanwhile."""
        if self._pair is not None:
            self._pair.pass_on()
        work.wait()

    def run(self, here: Callable[[], None], there: Callable[[], None]) -> None:
        """Both, `here` first and in this thread. Raises what either raised, this thread's own first."""
        self._pair = _Pair()
        thread = threading.Thread(target=self._pair.run_there, args=(_on_same_device(there),), name="paired backward")
        thread.start()
        try:
            here()
        finally:
            self._pair.finish(_HERE)
            thread.join()
            failure, self._pair = self._pair.failure, None
        if failure is not None:
            raise failure


class _Pair:
    """Whose turn it is, and who has come to an end."""

    def __init__(self):
        self.failure: BaseException | None = None
        self._condition = threading.Condition()
        self._here = threading.current_thread()
        self._turn, self._finished = _HERE, [False, False]

    def pass_on(self) -> None:
        """On CUDA autograd calls from a thread of its own, so: whoever is not the one here."""
        me = _HERE if threading.current_thread() is self._here else _THERE
        with self._condition:
            if not self._finished[1 - me]:
                self._turn = 1 - me
                self._condition.notify_all()
            self._condition.wait_for(lambda: self._turn == me)

    def run_there(self, there: Callable[[], None]) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._turn == _THERE)
        try:
            there()
        except BaseException as failure:
            self.failure = failure
        self.finish(_THERE)

    def finish(self, me: int) -> None:
        with self._condition:
            self._finished[me], self._turn = True, 1 - me
            self._condition.notify_all()


def _on_same_device(function: Callable[[], None]) -> Callable[[], None]:
    """A thread begins on device 0 and its default stream."""
    if not torch.cuda.is_initialized():
        return function
    stream = torch.cuda.current_stream()

    def run():
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            function()

    return run
