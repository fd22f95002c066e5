"""Work that has nothing to wait for, beside work that waits for the network.

On CUDA it is queued on a stream of its own, and the current stream joins it where the result is used. A backward runs
on the streams of its forward, and autograd makes each wait for what it uses, so the same holds there. On a CPU it is
done at once: the numbers are the same.
"""

from collections.abc import Callable

import torch

from megatron_deepseek.ops.fp8.block_scaled import parts_of


class RunInLine:
    """`start` the work, do something else, then take the `result`."""

    def start(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
        self._result = function(x)

    def result(self) -> torch.Tensor:
        return self._result


class RunOnSideStream(RunInLine):
    """On the CUDA stream `side`. A tensor made on one stream and used on the other is recorded there, so that its
    memory is not given to others while it is read.
    """

    def __init__(self, side: torch.cuda.Stream):
        self._side = side

    def start(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
        self._side.wait_stream(torch.cuda.current_stream())
        for part in parts_of(x):
            part.record_stream(self._side)
        with torch.cuda.stream(self._side):
            self._result = function(x)

    def result(self) -> torch.Tensor:
        current = torch.cuda.current_stream()
        current.wait_stream(self._side)
        self._result.record_stream(current)
        return self._result
