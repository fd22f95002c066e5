"""The large products of the layers as objects, chosen once when a model is built (model/build.py).

A layer says which of its products it means; the object says in which numbers it is computed, what of its inputs is
kept for the backward and when its weight gradient is made. `Linear` and `Grouped` compute in the layer's own dtype,
fp8/recipe.py has the ones of the FP8 recipe.

Shapes: R rows, E experts, I inputs, O outputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from megatron_deepseek.ops.attention import Output, attention
from megatron_deepseek.ops.grouped_gemm import grouped_gemm
from megatron_deepseek.ops.norm import rms_norm
from megatron_deepseek.ops.recompute import kept
from megatron_deepseek.ops.swiglu import gate_and_up, swiglu


class Deferred(Protocol):
    """Where zero-bubble schedules collect weight gradients (parallel/zero_bubble.py)."""

    def defer(self, weight: torch.Tensor, gradient: Callable[[], torch.Tensor]) -> None:
        """Call `gradient` later, and back-propagate what it gives into `weight`."""

    def defer_reading(self, weight: torch.Tensor, gradient: Callable[[], torch.Tensor]) -> None:
        """The same of a `gradient` that reads the weights of the stage itself, outside of its layers."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """F.linear that defers."""

    def grouped_gemm(self, x_RI: torch.Tensor, weight_EOI: torch.Tensor, counts_E: list[int]) -> torch.Tensor:
        """ops/grouped_gemm.py's that defers."""


GateUp = tuple[torch.Tensor, ...]  # gate and up, or one tensor with gate's columns before up's


class Gemm(ABC):
    """x [..., I] times weight [O, I] transposed; or, with `counts`, each expert's rows times its own of [E, O, I].

    `gathered`: what FSDP2 gathers in place of a shard of the weight (parallel/data.py), None for the shard itself.
    """

    gathered: Callable[[torch.Tensor], Any] | None = None

    @abstractmethod
    def __call__(self, x: torch.Tensor, weight: torch.Tensor, *counts: list[int]) -> torch.Tensor:
        """[..., O] in x's dtype."""

    @abstractmethod
    def after_swiglu(self, gate_up: GateUp, weight: torch.Tensor, *counts: list[int]) -> torch.Tensor:
        """The product of silu(gate) * up."""

    @abstractmethod
    def deferring(self, deferred: Deferred) -> "Gemm":
        """The same product, whose weight gradient is left to `deferred`."""

    def shared(self, x: torch.Tensor) -> AbstractContextManager[torch.Tensor]:
        """Give a `with` block x as several products take it: what would be done to it for each is done once."""
        return nullcontext(x)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """x as it travels to where the product is."""
        return x


@dataclass(frozen=True)
class Linear(Gemm):
    """F.linear. `defer` is where those leave the weight's gradient who multiply by the weight themselves."""

    multiply: Callable = F.linear
    activate: Callable[..., AbstractContextManager] = kept
    defer: Callable[[torch.Tensor, Callable[[], torch.Tensor]], None] | None = None

    def __call__(self, x, weight, *counts):
        return self.multiply(x, weight, *counts)

    def after_swiglu(self, gate_up, weight, *counts):
        with self.activate(swiglu, *gate_and_up(*gate_up)) as hidden:
            return self(hidden, weight, *counts)

    def deferring(self, deferred: Deferred) -> "Linear":
        return replace(self, multiply=deferred.linear, defer=deferred.defer_reading)


@dataclass(frozen=True)
class Grouped(Linear):
    """grouped_gemm. `activate` is `recomputed` where SwiGLU's output is not kept."""

    multiply: Callable = grouped_gemm

    def deferring(self, deferred: Deferred) -> "Grouped":
        return replace(self, multiply=deferred.grouped_gemm)


def _unchanged(x: torch.Tensor) -> Any:
    return x


@dataclass(frozen=True)
class PrecisionRecipe:
    """The products of a model. What has no place here (embedding, head, router, norms) is never FP8.

    `to_experts` makes what travels of the gradients that go to the experts in the backward. `attention` is ops/
    attention.py's or a form of it that keeps its output otherwise, and `attention_output_form` how context-parallel
    ranks do.

    `norm` is of norms whose output only `linear` reads, `norm_of_product` of those that get their input from it too,
    straight; `norm_for_all` of norms that others read as well.
    """

    linear: Gemm = Linear()
    attention_output: Gemm = Linear()
    experts_up: Gemm = Grouped()
    experts_down: Gemm = Grouped()
    to_experts: Callable[[torch.Tensor], torch.Tensor] = field(default=_unchanged)
    norm: Callable[..., torch.Tensor] = field(default=rms_norm)
    norm_of_product: Callable[..., torch.Tensor] = field(default=rms_norm)
    norm_for_all: Callable[..., torch.Tensor] = field(default=rms_norm)
    attention: Callable[..., torch.Tensor] = field(default=attention)
    attention_output_form: Output = Output()
