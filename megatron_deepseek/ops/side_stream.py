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


class _WaitInBackward(torch.autograd.Function):
    """Returns x. Its backward runs on the stream of its forward, after that of all that used x: sums of weights'
    gradients are queued by then, for autograd adds them as soon as they are there.
    """

    @staticmethod
    def forward(ctx, x, side):
        ctx.side = side
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        current_stream().wait_stream(ctx.side)
        return grad, None


class RunOnSideStream(RunInLine):
    """The work is done on the stream `side`.

    A tensor that is made on one stream and used on the other is recorded there, so that the allocator does not reuse
    its memory while it is read.

    Autograd makes streams wait for the gradients that pass between them, not for those that end in weights: when a
    second micro-batch's is added to the first's on `side`, nothing says so to the stream on which FSDP reads the sum.
    So a backward waits for all of `side` where it leaves it (`_WaitInBackward`).
    """

    def __init__(self, side: Stream):
        self._side = side

    def start(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
        self._side.wait_stream(current_stream())
        for part in parts_of(x):
            part.record_stream(self._side)
        entered = _WaitInBackward.apply(x, self._side) if x.requires_grad else x
        with on_stream(self._side):
            self._result = function(entered)

    def result(self) -> torch.Tensor:
        current = current_stream()
        current.wait_stream(self._side)
        self._result.record_stream(current)
        return self._result
