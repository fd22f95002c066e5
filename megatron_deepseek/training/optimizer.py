"""AdamW over FSDP's shards, and the norm of the whole model's gradient.

Master weights, gradients and moments are shards in the master dtype. Optimizer groups never mix meshes, because fused
updates work on lists of DTensors of one mesh.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from megatron_deepseek.settings import OptimizerSettings


@dataclass(frozen=True, eq=False)
class NamedParameter:
    """`counted` is false for the further copies of a parameter that several stages hold."""

    name: str
    parameter: nn.Parameter
    counted: bool = True


class ShardedAdamW(torch.optim.AdamW):
    """AdamW whose update sees the local shards of DTensors; state and parameters stay DTensors.

    The update is elementwise, so no rank needs more than its shards. Given DTensors, the first step spent most of its
    time working out how to shard the update: 0.2 s of processor time a rank for a model of 4 layers.
    """

    def _init_group(self, group, *lists) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        return has_complex


def build_optimizer(parameters: Iterable[NamedParameter], settings: OptimizerSettings) -> torch.optim.AdamW:
    """Matrices decay, vectors (norm weights, biases) do not, as in Megatron-LM."""
    groups: dict[tuple, list[nn.Parameter]] = {}
    for item in parameters:
        decays = item.parameter.ndim > 1
        groups.setdefault((item.parameter.device_mesh, decays), []).append(item.parameter)
    return ShardedAdamW(
        [{"params": params, "weight_decay": settings.weight_decay if decays else 0.0}
         for (_, decays), params in groups.items()],
        lr=0.0, betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_eps, fused=True)


def _counts_here(item: NamedParameter) -> bool:
    """Whether this rank's shard belongs to the norm: of TP replicas the first counts, of stage copies the first."""
    gradient = item.parameter.grad
    if not item.counted or gradient is None:
        return False
    replicated = [dim for dim, placement in enumerate(gradient.placements) if isinstance(placement, Replicate)]
    return all(gradient.device_mesh.get_local_rank(dim) == 0 for dim in replicated)


@torch.no_grad()
def gradient_norm(parameters: Iterable[NamedParameter], device: torch.device) -> torch.Tensor:
    """Euclidean norm of the gradient of the whole model, float64; each logical parameter counts once."""
    shards = [item.parameter.grad.to_local() for item in parameters if _counts_here(item)]
    shards = [shard for shard in shards if shard.numel()]
    total = torch.zeros((), dtype=torch.float64, device=device)
    if shards:
        total += torch.stack(torch._foreach_norm(shards)).double().square().sum()
    dist.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def clip_gradients(parameters: Iterable[NamedParameter], norm: torch.Tensor, max_norm: float) -> None:
    """Scale every gradient by max_norm / norm where the norm is larger."""
    scale = float(max_norm / (norm + 1e-6))
    if scale < 1.0:
        shards = [item.parameter.grad.to_local() for item in parameters if item.parameter.grad is not None]
        torch._foreach_mul_(shards, scale)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
