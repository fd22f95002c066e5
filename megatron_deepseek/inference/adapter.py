"""A LoRA adapter of PEFT beside the base weights of a model that answers.

Each adapted linear layer gets W + scale * B A as its weight (quantised.py), and each stack of routed experts the
adapters of all its experts beside it. W may be plain, FP8 or NF4, and is not changed. Under tensor parallelism a rank
takes the rows of B or the columns of A that its part of W has, so that sums over ranks stay what they are; under expert
parallelism those of its experts. The files are those of checkpoint/adapter/peft_files.py.
"""

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import nn

from megatron_deepseek.checkpoint.adapter.peft_files import Adapter, Pair
from megatron_deepseek.inference.quantised import (
    AdaptedExperts,
    AdaptedWeight,
    HeldWeight,
    PlainWeight,
    exchange,
    held_weight,
)
from megatron_deepseek.model.moe import COLUMN_PARALLEL, Experts
from megatron_deepseek.model.router import Router
from megatron_deepseek.ops.lora import adapted
from megatron_deepseek.parallel.mesh import Meshes
from megatron_deepseek.parallel.tensor import ParallelLinear, local_weight

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)")
_STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
OfExperts = Mapping[tuple[int, str], Pair]  # by the expert's number and its projection


def attach(adapter: Adapter, stage: nn.Module, meshes: Meshes, dtype: torch.dtype) -> None:
    """Put the adapter beside this rank's weights. Raise ValueError for a layer that the model has not, or of another
    shape.
    """
    modules = dict(stage.named_modules())
    of_experts: dict[str, dict[tuple[int, str], Pair]] = defaultdict(dict)
    for name, pair in adapter.pairs.items():
        module, expert = modules.get(name), _EXPERT.fullmatch(name)
        if expert is not None and isinstance(modules.get(expert[1]), Experts):
            of_experts[expert[1]][int(expert[2]), expert[3]] = pair
        elif isinstance(module, Router):
            _beside_router(module, name, pair, adapter)
        elif isinstance(module, ParallelLinear) and name != "lm_head":
            _beside_linear(module, name, pair, adapter, meshes, dtype)
        else:
            raise ValueError(f"--adapter {adapter.directory} adapts {name}, which is no linear layer of this model's "
                             "attention, MLPs, experts or routers; merge the adapter into its base instead")
    for path, pairs in of_experts.items():
        _beside_experts(modules[path], path, pairs, adapter, meshes.device, dtype)


def _beside_linear(linear: ParallelLinear, name: str, pair: Pair, adapter: Adapter, meshes: Meshes, dtype: torch.dtype
                   ) -> None:
    base = held_weight(linear)
    a, b = (factor.read().to(meshes.device, dtype) for factor in (pair.a, pair.b))
    a, b = (_own(each, dim, base.shape[dim], meshes, adapter, name) for each, dim in ((a, 1), (b, 0)))
    exchange(linear, "weight", AdaptedWeight(base, a, b, pair.scale))


def _own(whole: torch.Tensor, dim: int, size: int, meshes: Meshes, adapter: Adapter, name: str) -> torch.Tensor:
    """Return this rank's `size` rows or columns of A or B; all of them where the base has all."""
    if whole.shape[dim] == size:
        return whole
    if whole.shape[dim] != size * meshes.layout.tp:
        raise _wrong_size(adapter, name, dim, whole.shape[dim], size * meshes.layout.tp)
    return whole.narrow(dim, meshes.rank("tp") * size, size).contiguous()


def _beside_router(router: Router, name: str, pair: Pair, adapter: Adapter) -> None:
    """Add the adapter to a router's product, in the wide dtype of its logits."""
    weight = router.weight
    for factor, dim in ((pair.a, 1), (pair.b, 0)):
        if factor.shape[dim] != weight.shape[dim]:
            raise _wrong_size(adapter, name, dim, factor.shape[dim], weight.shape[dim])
    a, b = (factor.read().to(weight.device, weight.dtype) for factor in (pair.a, pair.b))
    router.gemm = adapted(router.gemm, lambda: a, lambda: b, pair.scale)


def _beside_experts(experts: Experts, path: str, pairs: OfExperts, adapter: Adapter, device: torch.device,
                    dtype: torch.dtype) -> None:
    """Stack the adapters of this rank's experts; an expert without one gets zeros.

    Raise ValueError for an expert that the model has not.
    """
    beyond = [number for number, _ in pairs if number >= experts.num]
    if beyond:
        raise ValueError(f"--adapter {adapter.directory} adapts {path}.{min(beyond)}, the model has {experts.num} "
                         "experts")
    for stack, projections in _STACKS.items():
        chosen = {key: pair for key, pair in pairs.items() if key[1] in projections}
        if chosen:
            base = _held_experts(experts, stack)
            a, b = _stacked(base.shape, chosen, projections, experts.first, path, adapter)
            exchange(experts, stack, AdaptedExperts(base, a.to(device, dtype), b.to(device, dtype), len(projections)))


def _held_experts(experts: Experts, stack: str) -> HeldWeight:
    weight = getattr(experts, stack)
    return weight if isinstance(weight, HeldWeight) else PlainWeight(local_weight(weight, *COLUMN_PARALLEL).detach())


def _stacked(shape: torch.Size, pairs: OfExperts, projections: tuple[str, ...], first: int, path: str, adapter: Adapter
             ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [e, m r, K] and B [e, N, r] of a stack of m projections, float32, B with the scale in it. Where ranks
    differ, the smaller ones are filled up with zeros.
    """
    (number, outputs, inputs), matrices = shape, len(projections)
    rank, sizes = max(pair.rank for pair in pairs.values()), (outputs // matrices, inputs)
    a, b = torch.zeros(number, matrices, rank, inputs), torch.zeros(number, matrices, sizes[0], rank)
    for (expert, projection), pair in pairs.items():
        found = pair.b.shape[0], pair.a.shape[1]
        for dim in (0, 1):
            if found[dim] != sizes[dim]:
                raise _wrong_size(adapter, f"{path}.{expert}.{projection}", dim, found[dim], sizes[dim])
        if first <= expert < first + number:
            place = expert - first, projections.index(projection)
            a[place][:pair.rank] = pair.a.read()
            b[place][:, :pair.rank] = pair.b.read() * pair.scale
    return a.flatten(1, 2), b.flatten(1, 2)


def _wrong_size(adapter: Adapter, name: str, dim: int, found: int, wanted: int) -> ValueError:
    return ValueError(f"--adapter {adapter.directory}: {name} has {found} {'inputs' if dim else 'outputs'} there, the "
                      f"model's has {wanted}")
