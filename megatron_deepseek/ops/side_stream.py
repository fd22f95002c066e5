"""Side-stream overlap: work that needs no network is computed while other work waits for the network.

On an accelerator this work is queued on a stream of its own, and the current stream waits for it where the result is
used. A backward runs on the streams of its forward, and autograd makes each stream wait for what it uses, so the same
holds there. On a CPU the work is done at once. The numbers are the same.
"""

from collections.abc import Callable

import torch

from megatron_deepseek.device import Stream, current_stream, on_stream
from megatron_deepseek.ops.fp8.block_scaled import parts_of


class RunInLine:
    """The caller does `start`, then something else, then takes the `result`. Here the work is done in `start`."""

    def start(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
        """Begin function(x)."""
        self._result = function(x)

    def result(self) -> torch.Tensor:
        """Return what the function that was started last gave."""
        return self._result


class RunOnSideStream(RunInLine):
    """The work is done on the stream `side`.

    A tensor that is made on one stream and used on the other is recorded there, so that the allocator does not reuse
    its memory while it is read.
    """

    def __init__(self, side: Stream):
        self._side = side

    def start(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
        self._side.wait_stream(current_stream())
        for part in parts_of(x):
            part.record_stream(self._side)
        with on_stream(self._side):
            self._result = function(x)

    def result(self) -> torch.Tensor:
        current = current_stream()
        current.wait_stream(self._side)
        self._result.record_stream(current)
        return self._result
