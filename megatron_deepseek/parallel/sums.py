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
    here = [i for i in range(len(values)) if i not in there]
    computed = [values[i].detach().to(device, torch.float64, non_blocking=True).reshape(1) for i in there]
    together = torch.cat([*computed, send([float(values[i]) for i in here], device, torch.float64)])
    dist.all_reduce(together, group=group)
    (sums,) = start_read(together)()
    ordered = dict(zip(there + here, sums, strict=True))
    return [ordered[i] for i in range(len(values))]
