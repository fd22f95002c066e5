"""The GEMMs of the layers as objects, chosen once when a model is built (model/build.py).

A layer names the GEMM it means. The object decides its precision, what of its inputs is saved for the backward and when
its weight gradient is computed. `Linear` and `Grouped` compute in the layer's own dtype; fp8/recipe.py has those of the
FP8 recipe.

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
from megatron_deepseek.ops.products import linear
from megatron_deepseek.ops.recompute import kept
from megatron_deepseek.ops.swiglu import swiglu


class Deferred(Protocol):
    """Collects weight gradients for zero-bubble schedules (parallel/zero_bubble.py)."""

    def defer(self, weight: torch.Tensor, gradient: Callable[[], torch.Tensor]) -> None:
        """Call `gradient` later, and back-propagate its result into `weight`."""

    def defer_reading(self, weight: torch.Tensor, gradient: Callable[[], torch.Tensor]) -> None:
        """Call `gradient` later, which itself reads weights of the stage that belong to none of its layers."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return F.linear(x, weight), deferring the weight's gradient."""

    def grouped_gemm(self, x_RI: torch.Tensor, weight_EOI: torch.Tensor, counts_E: list[int]) -> torch.Tensor:
        """Return ops/grouped_gemm.py's result, deferring the weights' gradient."""


Functions = Callable[[Callable], Callable]  # gives what stands in a function's place: its graph, or itself
GateUp = tuple[torch.Tensor, ...]  # gate and up, or one tensor with gate's columns before up's


class Gemm(ABC):
    """x [..., I] times weight [O, I] transposed; with `counts`, each expert's rows times its weight of [E, O, I].

    `gathered` makes what FSDP2 gathers of a shard of the weight (parallel/data.py); None to gather the shard itself.
    `activate` says how SwiGLU's output is kept for the backward: by `kept` or `recomputed` as an ordinary tensor, which
    others may read as well; None where the GEMM makes it in a format of its own.
    """

    gathered: Callable[[torch.Tensor], Any] | None = None
    activate: Callable[..., AbstractContextManager] | None = None

    @abstractmethod
    def __call__(self, x: torch.Tensor, weight: torch.Tensor, *counts: list[int]) -> torch.Tensor:
        """Return y [..., O] in x's dtype."""

    @abstractmethod
    def after_swiglu(self, gate_up: GateUp, weight: torch.Tensor, *counts: list[int]) -> torch.Tensor:
        """Return the GEMM of silu(gate) * up."""

    @abstractmethod
    def deferring(self, deferred: Deferred) -> "Gemm":
        """Return the same GEMM with its weight gradient left to `deferred`."""

    def shared(self, x: torch.Tensor) -> AbstractContextManager[torch.Tensor]:
        """Yield x in the form that several GEMMs take, so that it is quantised once and not by each."""
        return nullcontext(x)

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """Return the numbers that this GEMM takes x for, as an ordinary tensor with x's gradient."""
        return x

    def gradient_seen(self, y: torch.Tensor) -> torch.Tensor:
        """Return y, whose gradient will be the numbers that this GEMM takes its output's gradient for."""
        return y

    def compiled(self, functions: Functions) -> "Gemm":
        """Return the same GEMM with what it computes beside products taken from `functions`."""
        return self

    def keyed(self, keys: torch.Tensor | None) -> "Gemm":
        """Return the same GEMM for rows that random numbers are drawn for: by int64 keys, of the shape of x without its
        last dimension. None for rows of which none are drawn.
        """
        return self

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return x in the form in which it is dispatched to the rank of this GEMM."""
        return x


@dataclass(frozen=True)
class GemmOver(Gemm):
    """A GEMM that does something around another, `base`, and takes and gives rows in that one's form."""

    base: Gemm

    @property
    def activate(self):
        """Return how `base` keeps SwiGLU's output."""
        return self.base.activate

    def shared(self, x):
        return self.base.shared(x)

    def seen(self, x):
        return self.base.seen(x)

    def gradient_seen(self, y):
        return self.base.gradient_seen(y)

    def rows(self, x):
        return self.base.rows(x)

    def compiled(self, functions):
        return replace(self, base=self.base.compiled(functions))


@dataclass(frozen=True)
class Linear(Gemm):
    """F.linear in the layer's own dtype.

    `activate` is `recomputed` where SwiGLU's output is not saved. `swiglu` is ops/swiglu.py's, or its graph. `defer`
    takes the weight gradient of callers that multiply by the weight themselves (parallel/vocabulary_chunks.py).
    """

    multiply: Callable = linear
    activate: Callable[..., AbstractContextManager] = kept
    swiglu: Callable[..., torch.Tensor] = swiglu
    defer: Callable[[torch.Tensor, Callable[[], torch.Tensor]], None] | None = None

    def __call__(self, x, weight, *counts):
        return self.multiply(x, weight, *counts)

    def after_swiglu(self, gate_up, weight, *counts):
        with self.activate(self.swiglu, *gate_up) as hidden:
            return self(hidden, weight, *counts)

    def compiled(self, functions: Functions) -> "Linear":
        return replace(self, swiglu=functions(self.swiglu))

    def deferring(self, deferred: Deferred) -> "Linear":
        return replace(self, multiply=deferred.linear, defer=deferred.defer_reading)


@dataclass(frozen=True)
class LinearAtOnce(Linear):
    """F.linear whose weight gradient is never left for later: that of the router, whose product is small."""

    def deferring(self, deferred: Deferred) -> "LinearAtOnce":
        return self


class _WideProduct(torch.autograd.Function):
    """x W^T in W's dtype, of which x is kept as it is given: narrow, and often by others as well."""

    @staticmethod
    def forward(ctx, x_RI, weight_OI):
        ctx.save_for_backward(x_RI if ctx.needs_input_grad[1] else None,
                              weight_OI if ctx.needs_input_grad[0] else None)
        ctx.narrow = x_RI.dtype
        return F.linear(x_RI.to(weight_OI.dtype), weight_OI)

    @staticmethod
    def backward(ctx, grad_RO):
        x_RI, weight_OI = ctx.saved_tensors
        grad_x = (grad_RO @ weight_OI).to(ctx.narrow) if ctx.needs_input_grad[0] else None
        return grad_x, grad_RO.t() @ x_RI.to(grad_RO.dtype) if ctx.needs_input_grad[1] else None


@dataclass(frozen=True)
class WideLinear(LinearAtOnce):
    """F.linear of x [R, I] in the dtype of the weight, the wider one: the router's, which computes in float32."""

    multiply: Callable = _WideProduct.apply

    def __call__(self, x, weight, *counts):
        return super().__call__(x, weight, *counts) if x.dtype != weight.dtype else F.linear(x, weight)

    def seen(self, x):
        return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Grouped(Linear):
    """The grouped GEMM of experts in the layer's own dtype."""

    multiply: Callable = grouped_gemm

    def deferring(self, deferred: Deferred) -> "Grouped":
        return replace(self, multiply=deferred.grouped_gemm)


def _unchanged(x: torch.Tensor) -> Any:
    return x


@dataclass(frozen=True)
class PrecisionRecipe:
    """The GEMM, norm and attention that each place of a layer takes. FP8 is never in embedding, head, router or norms.

    `to_experts` converts the gradients that travel to the experts in the backward. `attention` is that of
    ops/attention.py, or one that saves its output in another format; `attention_output_form` is the same for
    context-parallel ranks.

    `norm` is for norms whose output only `linear` reads, `norm_of_product` for those whose input is also a GEMM's
    output, with nothing between; `norm_for_all` is for norms whose output others read as well.
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
