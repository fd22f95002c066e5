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
    layers = {name: module for stage in stages for name, module in stage.named_modules()
              if isinstance(module, MoE) and name in counts}  # an objective may leave out MTP modules
    if not layers:
        return {}
    total_LE = torch.stack([counts[name] for name in layers])
    dist.all_reduce(total_LE, group=group)
    for module, total_E in zip(layers.values(), total_LE.double(), strict=True):
        bias = getattr(module.gate, "e_score_correction_bias", None)
        if bias is not None and rate and any(each.requires_grad for each in module.gate.parameters()):
            bias += rate * torch.sign(total_E.mean() - total_E).to(bias.dtype)
    return dict(zip(layers, total_LE, strict=True))
