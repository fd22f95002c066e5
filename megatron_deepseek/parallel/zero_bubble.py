"""Zero-bubble schedules (arXiv 2401.10241) split a backward in two steps, B and W, for input and weight gradients.

The previous stage waits for B only; W fills the bubbles. Here B is an ordinary backward in which the GEMMs leave their
weight gradients as closures; W runs them. PyTorch can also cut the autograd graph itself, but that was seen to fail
where a stage uses a parameter twice (a head or embedding shared with MTP modules), and with recomputed layers it runs
their forward and collectives twice.

Autograd nodes hold the weight itself and do not save it: what checkpointing's hooks return for a saved leaf is a copy
that holds the leaf's accumulator weakly, so that a gradient given to it after the graph has gone is lost. An input
waits for W detached from its graph, which would hold what the stage received.

A frozen weight defers nothing, and its input is not saved.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn

from megatron_deepseek.ops.grouped_gemm import grouped_dgrad, grouped_forward, grouped_wgrad
from megatron_deepseek.ops.precision_recipe import Gemm
from megatron_deepseek.ops.products import by_weight, linear, multiply
from megatron_deepseek.parallel.data import accumulate_gradients, gathered


class DeferredGradients:
    """The weight gradients that one stage's last backward left behind.

    `weight` in the closures is the local tensor that the forward used, held by the node and not among its saved
    tensors, which a recomputed forward replaces by detached ones; back-propagating into it reaches the parameter as any
    backward would. `finish` is called at the end of each W step. `gathered` gathers the stage's weights that are in
    none of its layers: between B and W another forward may have freed them.
    """

    def __init__(self, finish: Callable[[], None] = lambda: None,
                 gathered: Callable[[], AbstractContextManager] = nullcontext):
        self._finish, self._gathered = finish, gathered
        self._pending: list[tuple[torch.Tensor, Callable[[], torch.Tensor]]] = []

    def defer(self, weight: torch.Tensor, gradient: Callable[[], torch.Tensor]) -> None:
        self._pending.append((weight, gradient))

    def defer_reading(self, weight: torch.Tensor, gradient: Callable[[], torch.Tensor]) -> None:
        def make() -> torch.Tensor:
            with self._gathered():
                return gradient()

        self.defer(weight, make)

    def take(self) -> Callable[[], None]:
        """Return the W step of the backward that just ended (`PipelineStage`'s dw_builder)."""
        pending, self._pending = self._pending, []

        def run():
            while pending:
                _Made.apply(*pending.pop()).backward()
            self._finish()

        return run

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return DeferringLinear.apply(x, weight, self)

    def grouped_gemm(self, x_RI: torch.Tensor, weight_EOI: torch.Tensor, counts_E: list[int]) -> torch.Tensor:
        return _GroupedGemm.apply(x_RI, weight_EOI, counts_E, self)


class _Made(torch.autograd.Function):
    """A number whose backward gives a weight the gradient that a closure makes, and keeps no reference to it: the
    parameter takes it as it is. Of a gradient that somebody holds, autograd makes a copy.
    """

    @staticmethod
    def forward(ctx, weight, gradient):
        ctx.gradient = gradient
        return torch.zeros((), device=weight.device)

    @staticmethod
    def backward(ctx, _):
        gradient, ctx.gradient = ctx.gradient, None
        return gradient(), None


class DeferringLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, deferred):
        ctx.save_for_backward(*(x,) * ctx.needs_input_grad[1])
        ctx.weight, ctx.deferred = weight, deferred
        return linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        weight = ctx.weight
        if ctx.needs_input_grad[1]:
            x = ctx.saved_tensors[0].detach()
            ctx.deferred.defer(weight, lambda: multiply(grad.flatten(0, -2).t(), x.flatten(0, -2)))
        return by_weight(grad, weight) if ctx.needs_input_grad[0] else None, None, None


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RI, weight_EOI, counts_E, deferred):
        ctx.save_for_backward(*(x_RI,) * ctx.needs_input_grad[1])
        ctx.weight, ctx.counts_E, ctx.deferred = weight_EOI, counts_E, deferred
        return grouped_forward(x_RI, weight_EOI, counts_E)

    @staticmethod
    def backward(ctx, grad_RO):
        weight_EOI, grad_RO, counts_E = ctx.weight, grad_RO.contiguous(), ctx.counts_E
        if ctx.needs_input_grad[1]:
            x_RI = ctx.saved_tensors[0].detach()
            ctx.deferred.defer(weight_EOI, lambda: grouped_wgrad(grad_RO, x_RI, counts_E))
        grad_x = grouped_dgrad(grad_RO, weight_EOI, counts_E) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None


def defer_weight_gradients(stage: nn.Module) -> DeferredGradients:
    """Make every GEMM that a module of `stage` holds defer its weight gradient."""
    deferred = DeferredGradients(partial(accumulate_gradients, stage), partial(gathered, stage))
    for module in stage.modules():
        for name, gemm in [*vars(module).items()]:
            if isinstance(gemm, Gemm):
                setattr(module, name, gemm.deferring(deferred))
    return deferred
