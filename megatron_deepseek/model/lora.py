"""Puts adapters of LoRA beside the weights of built stages, while these are on the meta device, and freezes the rest.

A and B are parameters like all others: named after their weight (model/architecture/adapters.py), initialised by hash,
gathered with the layer, updated by the optimizer. Which shard of them a rank has, and what its local gradient is of the
whole, follows from the weight (Shapes: O outputs, I inputs, r rank, E experts):

    weight                        A [r, I]                       B [O, r]
    outputs divided over TP       whole; sees a part of B:       divided; complete
                                  its gradient is partial
    inputs divided over TP        divided; complete              whole; makes a partial sum of a part of A: partial
    whole on every rank           as the weight's                as the weight's
    experts, width over ETP       the same over ETP, E over EP

The output of B is of the same kind as that of the weight: this rank's outputs, or a partial sum.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from megatron_deepseek.model.architecture.adapters import (
    A,
    B,
    LoraSettings,
    adapted_rows,
    factor_name,
    factor_of,
    is_adapter,
)
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.moe import COLUMN_PARALLEL, ROW_PARALLEL, Experts
from megatron_deepseek.model.router import Router
from megatron_deepseek.ops.dropout import Dropout
from megatron_deepseek.ops.hashing import stream_key
from megatron_deepseek.ops.lora import adapted
from megatron_deepseek.ops.precision_recipe import Grouped
from megatron_deepseek.parallel.tensor import ParallelLinear, TensorParallel, local_weight, sharded_parameter


class Factor(nn.Module):
    """A or B of one linear layer; `weight_grad` states what its local gradient is of the whole."""

    def __init__(self, shape: tuple[int, int], mesh: DeviceMesh, placement: Placement, weight_grad: Placement):
        super().__init__()
        self.weight = sharded_parameter(shape, mesh, placement)
        self.weight_grad = weight_grad

    def local_weight(self) -> torch.Tensor:
        """Return this rank's shard."""
        return local_weight(self.weight, self.weight_grad)


def add_adapters(stages: Iterable[nn.Module], config: ModelConfig, lora: LoraSettings, tp: TensorParallel) -> None:
    """Give every layer that `lora` names its adapter, on the device and in the dtype of the defaults."""
    targets = {row.name: row.shape for row in adapted_rows(config, lora)}
    for stage in stages:
        stage.lora = lora
        for path, module in list(stage.named_modules()):
            if isinstance(module, (ParallelLinear, Router)) and f"{path}.weight" in targets:
                _adapt(module, f"{path}.weight", targets[f"{path}.weight"], lora, tp)
            elif isinstance(module, Experts):
                for name, matrices, placements in (("gate_up_proj", 2, COLUMN_PARALLEL),
                                                   ("down_proj", 1, ROW_PARALLEL)):
                    if f"{path}.{name}" in targets:
                        _adapt_experts(module, path, name, matrices, placements, targets[f"{path}.{name}"], lora)


def freeze_base(stages: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Turn off the gradients of everything that is no adapter, before FSDP takes it over and keeps it so.

    What is not trained needs no master in a wider dtype than layers compute in: it is kept in `dtype`. Routers compute
    in that of the masters, and keep it.
    """
    for module in (module for stage in stages for module in stage.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(module, Factor) or is_adapter(name):
                continue
            kept = parameter.dtype if isinstance(module, Router) or not parameter.is_floating_point() else dtype
            setattr(module, name, nn.Parameter(parameter.detach().to(kept), requires_grad=False))


def _adapt(linear: ParallelLinear | Router, name: str, shape: tuple[int, int], lora: LoraSettings, tp: TensorParallel
           ) -> None:
    (outputs, inputs), rank = shape, lora.lora_rank
    placement = linear.placement if isinstance(linear, ParallelLinear) else Replicate()
    of_a, of_b = (linear.weight_grad, linear.weight_grad) if placement == Replicate() else (
        (Partial(), Shard(0)) if placement == Shard(0) else (Shard(1), Partial()))
    linear.lora_A = Factor((rank, inputs), tp.mesh, placement if placement == Shard(1) else Replicate(), of_a)
    linear.lora_B = Factor((outputs, rank), tp.mesh, placement if placement == Shard(0) else Replicate(), of_b)
    first = tp.rank * (inputs // tp.size) if placement == Shard(1) else 0
    linear.gemm = adapted(linear.gemm, linear.lora_A.local_weight, linear.lora_B.local_weight, lora.scale,
                          dropout=_dropout(lora, name, first))


def _adapt_experts(experts: Experts, path: str, name: str, matrices: int, placements: tuple[Placement, Placement],
                   shape: tuple[int, int, int], lora: LoraSettings) -> None:
    (num, outputs, inputs), rank, mesh = shape, lora.lora_rank, experts.etp.mesh
    by_expert, within = placements
    by_outputs = within != Shard(2)
    of_a, of_b = (Replicate(), within) if by_outputs else (within, Replicate())
    for factor, of_etp, size in ((A, of_a, (num, matrices * rank, inputs)), (B, of_b, (num, outputs, rank))):
        setattr(experts, factor_name(name, factor), sharded_parameter(size, mesh, by_expert, of_etp))
    gemm = "up_gemm" if name == "gate_up_proj" else "down_gemm"
    a, b = (partial(_local_factor, experts, factor_name(name, factor), by_expert,
                    Partial() if of_etp == Replicate() else of_etp) for factor, of_etp in ((A, of_a), (B, of_b)))
    first = 0 if by_outputs else mesh.get_local_rank("etp") * (inputs // mesh.size(1))
    setattr(experts, gemm, adapted(getattr(experts, gemm), a, b, lora.scale, Grouped, matrices,
                                   _dropout(lora, f"{path}.{name}", first)))


def _dropout(lora: LoraSettings, name: str, first: int) -> Dropout | None:
    """Return the dropout of the adapter of the weight `name`, whose inputs begin with number `first` on this rank."""
    return Dropout(lora.lora_dropout, stream_key(f"dropout:{name}"), first) if lora.lora_dropout else None


def _local_factor(experts: Experts, name: str, *gradient: Placement) -> torch.Tensor:
    return local_weight(getattr(experts, name), *gradient)


@contextmanager
def adapters_off(stages: Iterable[nn.Module]) -> Iterator[None]:
    """Make the stages compute as their base alone while the block runs: every B is 0, and then what it was.

    No weights may be gathered when it begins or ends, so that shards alone are changed.
    """
    factors = [parameter.to_local() for stage in stages for name, parameter in stage.named_parameters()
               if factor_of(name) == B]
    with torch.no_grad():
        before = [factor.clone() for factor in factors]
        for factor in factors:
            factor.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for factor, values in zip(factors, before):
                factor.copy_(values)
