"""Micro-batch overlap: two runs take turns, so that while one waits for the network the other computes.

DualPipeV pairs the forward of one micro-batch with the backward of another (arXiv 2412.19437, section 3.2.1). Both send
tokens to experts and back many times. A run that has begun an exchange lets the other compute until that one begins an
exchange too. Only then does it wait for its own:

    forward    attention  send |                      | wait, experts  send |
    backward                   | dgrad of experts send |                    | wait, attention ...

Only one of them runs at a time, so the order of all operations, collectives included, is the same on every rank, and
the numbers are the same as without overlap. On an accelerator both queue their work on one compute stream: what the
other run queues comes before this run's wait.
"""

import threading
from collections.abc import Callable
from contextlib import ExitStack

import torch.distributed as dist

from megatron_deepseek.device import current_stream, is_accelerator_in_use, on_device, on_stream
from megatron_deepseek.torch_private import _get_current_dispatch_mode_stack, _get_current_function_mode_stack

_HERE, _THERE = 0, 1


class MicroBatchOverlap:
    """The turns of two runs. Code that exchanges tokens calls `wait`; outside of `run` that only waits."""

    def __init__(self):
        self._pair: _Pair | None = None

    def wait(self, work: dist.Work) -> None:
        """Wait until the exchange `work`, which was just begun, is done; the other run computes meanwhile."""
        if self._pair is not None:
            self._pair.pass_on()
        work.wait()

    def run(self, here: Callable[[], None], there: Callable[[], None]) -> None:
        """Run both, `here` first and in this thread. Raise what either raised, this thread's own first."""
        self._pair = _Pair()
        thread = threading.Thread(target=self._pair.run_there, args=(_as_here(_on_same_device(there)),),
                                  name="paired backward")
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
    """Two runs that take turns: the one whose turn it is, and which of them have ended."""

    def __init__(self):
        self.failure: BaseException | None = None
        self._condition = threading.Condition()
        self._here = threading.current_thread()
        self._turn, self._finished = _HERE, [False, False]

    def pass_on(self) -> None:
        """Give the turn to the other run, and wait until it comes back.

        On CUDA autograd calls this from a thread of its own, so the run there is any thread but the one here.
        """
        me = _HERE if threading.current_thread() is self._here else _THERE
        with self._condition:
            if not self._finished[1 - me]:
                self._turn = 1 - me
                self._condition.notify_all()
            self._condition.wait_for(lambda: self._turn == me)

    def run_there(self, there: Callable[[], None]) -> None:
        """Run `there` when its turn comes, and keep what it raises as `failure`."""
        with self._condition:
            self._condition.wait_for(lambda: self._turn == _THERE)
        try:
            there()
        except BaseException as failure:
            self.failure = failure
        self.finish(_THERE)

    def finish(self, me: int) -> None:
        """Give the turn to the other run for good."""
        with self._condition:
            self._finished[me], self._turn = True, 1 - me
            self._condition.notify_all()


def _as_here(function: Callable[[], None]) -> Callable[[], None]:
    """Return `function` as a new thread must run it, which would begin without the modes that see operators here."""
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]

    def run():
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            function()

    return run if modes else function


def _on_same_device(function: Callable[[], None]) -> Callable[[], None]:
    """Return `function` as a new thread must run it, which would begin on device 0 and its default stream."""
    if not is_accelerator_in_use():
        return function
    stream = current_stream()

    def run():
        with on_device(stream.device), on_stream(stream):
            function()

    return run
