"""Auxiliary-loss-free load balancing: after each step the router's bias moves toward the unloaded experts.

V3 report, section 2.1.2: b_i rises by gamma where expert i got fewer tokens than the mean, and falls where more.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from megatron_deepseek.model.moe import MoE


@torch.no_grad()
def update_expert_bias(stages: Iterable[nn.Module], counts: dict[str, torch.Tensor], rate: float,
                       group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    """Sum `counts` (int64 [E] by layer, of this rank's tokens) over `group` and move every bias. Return the sums.

    `group` has every rank of a pipeline stage. Counts are integers, so their sum is exact in every layout. The bias
    of a router that is frozen, and has no adapter, stays as it is, so that it goes on choosing as it did.
    """
    total = {}
    for stage in stages:
        for name, module in stage.named_modules():
            if not isinstance(module, MoE) or name not in counts:  # an objective may leave out MTP modules
                continue
            total[name] = counts[name].clone()
            dist.all_reduce(total[name], group=group)
            bias = getattr(module.gate, "e_score_correction_bias", None)
            if bias is not None and rate and any(each.requires_grad for each in module.gate.parameters()):
                mean = total[name].double().mean()
                bias += rate * torch.sign(mean - total[name].double()).to(bias.dtype)
    return total
