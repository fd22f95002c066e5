"""SwiGLU, silu(gate) * up (arXiv 2002.05202), which saves only its inputs for the backward."""

import torch
import torch.nn.functional as F


def gate_and_up(*parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gate and up, given as two tensors or as one with gate's columns before up's."""
    return parts[0].chunk(2, -1) if len(parts) == 1 else parts


def swiglu_forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, without a gradient."""
    return F.silu(gate).mul_(up)


def swiglu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up."""
    grad_up = F.silu(gate).mul_(grad)
    return torch.ops.aten.silu_backward(grad * up, gate), grad_up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx, grad):
        return swiglu_backward(grad, *ctx.saved_tensors)


def swiglu(*parts: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, element by element, of what `gate_and_up` takes."""
    return _SwiGLU.apply(*gate_and_up(*parts))
