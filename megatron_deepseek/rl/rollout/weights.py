"""The weights of a training job as a model that answers, on the same ranks: resharded in memory, never on disk.

The engine's copy is built as for any checkpoint (inference/loading.py), over meshes of its own, and filled from the
shards that training has: of tensor, expert and data ranks, of pipeline stages and their copies
(parallel/resharding.py). It has the numbers that training's forward computes with: masters are converted to the dtype
of the layers, routers keep theirs. MTP modules are left out, since nothing is drafted.

Adapters of LoRA stay beside their base, as in training: merged into weights of bfloat16 most of a small change would be
rounded away. A base that is kept as bytes stays so, and makes plain numbers for each product. A model that is trained
with products in FP8 answers with plain ones of its masters: how far that is from training's own is measured, with
everything else, by the log-probabilities of rollout and training.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_deepseek.inference.loading import checked_length, make_local
from megatron_deepseek.inference.packed import pack
from megatron_deepseek.inference.quantised import AdaptedExperts, AdaptedWeight, HeldWeight, PlainWeight, exchange
from megatron_deepseek.model.architecture.adapters import A, B, factor_name
from megatron_deepseek.model.architecture.base_weights import SCALES
from megatron_deepseek.model.build import shape_whole
from megatron_deepseek.model.deepseek import DeepseekStage
from megatron_deepseek.model.moe import Experts
from megatron_deepseek.ops.frozen_weight import FrozenWeight, multiply
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.parallel.regions import Region
from megatron_deepseek.parallel.resharding import ROUND_BYTES, Part, Parts, Resharding
from megatron_deepseek.parallel.shards import shard_regions
from megatron_deepseek.parallel.tensor import ParallelLinear
from megatron_deepseek.rl.rollout.layout import check_base
from megatron_deepseek.training.trainer import Trainer

MATRICES = {"gate_up_proj": 2, "down_proj": 1}


@dataclass(frozen=True, eq=False)
class FrozenHeld(HeldWeight):
    """A frozen base that is kept as bytes, which multiplies as it does in training."""

    weight: FrozenWeight

    def multiply(self, x):
        return multiply(x, self.weight)

    def multiply_grouped(self, rows_RK, counts):
        return multiply(rows_RK, self.weight, counts)

    def dense(self, dtype):
        return self.weight.dense(dtype)

    @property
    def shape(self):
        return torch.Size((*self.weight.codes.shape[:-1], self.weight.form.columns))

    @property
    def nbytes(self):
        return self.weight.codes.nbytes + self.weight.scales.nbytes


class EngineWeights:
    """The way from a trainer's weights to those of an engine in `layout`. Every rank of the job makes one.

    `max_length`: of a text in tokens. `round_bytes` is as for `Resharding`. Raise ValueError for a length that the
    model cannot see, and for a layout that cannot take the base's bytes as they are.
    """

    def __init__(self, trainer: Trainer, layout: Layout, max_length: int, round_bytes: int = ROUND_BYTES):
        build, self.trainer = trainer.spec.build, trainer
        self.config = replace(trainer.spec.model, num_nextn_predict_layers=0)
        self.max_length = checked_length(self.config, max_length)
        self.dtype = build.precision.activations
        if build.base is not None:
            check_base(self.config, build.base, trainer.meshes.layout, layout)
        self.meshes = build_meshes(layout, trainer.meshes.device)
        self.resharding = Resharding(parts_of(trainer.stages), parts_of([self._shape()]), self.meshes.device,
                                     round_bytes)

    def load(self) -> DeepseekStage:
        """Return a new copy of the weights as they are now, ready to answer. Every rank calls it, between steps."""
        stage = self._shape()
        stage.to_empty(device=self.meshes.device)
        self.resharding.move(parts_of(self.trainer.stages), parts_of([stage]))
        make_local(stage)
        _hold(stage)
        pack(stage)
        if stage.lora is not None:
            for module in list(stage.modules()):
                _join_adapters(module, stage.lora.scale)
        return stage.eval().requires_grad_(False)

    def _shape(self) -> DeepseekStage:
        """Return the whole model without memory, with the adapters and the form of base that training has."""
        build = self.trainer.spec.build
        return shape_whole(self.config, self.meshes, self.max_length, self.dtype, build.lora, build.base)


def parts_of(stages: Iterable[nn.Module]) -> Parts:
    """Return what this rank has of parameters and router biases, by name; of several copies the first."""
    found: dict[str, list[Part]] = {}
    for stage in stages:
        for name, tensor in (*stage.named_parameters(), *stage.named_buffers()):
            if name not in found:
                found[name] = _parts(tensor.detach())
    return found


def _parts(tensor: torch.Tensor) -> list[Part]:
    if not isinstance(tensor, DTensor):
        return [Part(Region((0,) * tensor.ndim, tuple(tensor.shape)), tensor)]
    return [Part(Region(each.offset, tuple(each.local.shape)), each.local) for each in shard_regions(tensor)]


def _hold(stage: DeepseekStage) -> None:
    """Put each base weight of bytes, with its scales, in place as one weight."""
    for held in stage.held:
        codes, scales = held.codes.detach(), held.scales.detach()
        delattr(held.module, held.name + SCALES)
        exchange(held.module, held.name, FrozenHeld(FrozenWeight(held.form, codes, scales)))
    stage.held = ()


def _join_adapters(module: nn.Module, scale: float) -> None:
    """Put adapters beside the weights of a linear layer or of experts; those of routers stay where they are."""
    if isinstance(module, ParallelLinear) and hasattr(module, A):
        a, b = (getattr(module, factor).weight.detach() for factor in (A, B))
        base = _held(module.weight)
        delattr(module, A), delattr(module, B)
        exchange(module, "weight", AdaptedWeight(base, a, b, scale))
    elif isinstance(module, Experts):
        for name, matrices in MATRICES.items():
            if hasattr(module, factor_name(name, A)):
                a, b = (getattr(module, factor_name(name, factor)).detach() for factor in (A, B))
                base = _held(getattr(module, name))
                delattr(module, factor_name(name, A)), delattr(module, factor_name(name, B))
                exchange(module, name, AdaptedExperts(base, a, b * scale, matrices))


def _held(weight: torch.Tensor | HeldWeight) -> HeldWeight:
    return weight if isinstance(weight, HeldWeight) else PlainWeight(weight.detach())
