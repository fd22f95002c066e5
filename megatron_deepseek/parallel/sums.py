"""Sums of single numbers over ranks, which the host reads: all that it needs at one time, in one collective."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_deepseek.device import send, start_read


def sum_numbers(values: Sequence[float | torch.Tensor], device: torch.device, group: dist.ProcessGroup | None = None
                ) -> list[float]:
    """Return the sum of each of `values` over the ranks of `group`, in float64; without a group over all ranks.

    Tensors of one element are read from `device` after the sum, all at once: the host waits for it a single time.
    """
    there = [i for i, value in enumerate(values) if isinstance(value, torch.Tensor)]
    known = [0.0 if isinstance(value, torch.Tensor) else float(value) for value in values]
    together = send(known, device, torch.float64)  # in this order on every rank: a tensor here may be a number there
    if there:
        computed = torch.stack([values[i].detach().to(device, torch.float64, non_blocking=True) for i in there])
        together.index_copy_(0, send(there, device), computed)
    dist.all_reduce(together, group=group)
    (sums,) = start_read(together)()
    return sums
