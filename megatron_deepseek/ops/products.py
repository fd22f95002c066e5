"""Products of matrices, in float32 where a processor has no instructions for bfloat16.

torch multiplies bfloat16 on a CPU by oneDNN, which needs AVX-512 for it. On other CPUs, as of many laptops, it runs
a plain loop, with which a training step took 12 times as long as with what is here (docs/benchmarks.md): operands are
made float32, some columns at a time, and the result is rounded once, as oneDNN and GPUs do.

Shapes: M rows, K inputs of a product, N outputs, B products at once.
"""

import torch
import torch.nn.functional as F

from megatron_deepseek.device import on_accelerator
from megatron_deepseek.torch_private import multiplies_bfloat16

WIDENED_NUMBERS = 1 << 24  # of the second operand at a time: 64 MiB


def is_widened(x: torch.Tensor) -> bool:
    """Return whether products of x are computed in float32."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not on_accelerator(x) and not multiplies_bfloat16()


def multiply(a_MK: torch.Tensor, b_KN: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return a times b, [M, N], written into `out` where that is given. Gradients do not pass."""
    if not is_widened(a_MK):
        return torch.mm(a_MK, b_KN, out=out)
    out = a_MK.new_empty(len(a_MK), b_KN.shape[1]) if out is None else out
    a_MK, step = a_MK.float(), max(1, WIDENED_NUMBERS // max(1, len(b_KN)))
    for start in range(0, b_KN.shape[1], step):
        out[:, start:start + step] = a_MK @ b_KN[:, start:start + step].float()
    return out


def multiply_each(a_BMK: torch.Tensor, b_BKN: torch.Tensor) -> torch.Tensor:
    """Return the B products a times b, [B, M, N]."""
    return torch.bmm(a_BMK.float(), b_BKN.float()).to(a_BMK.dtype) if is_widened(a_BMK) else torch.bmm(a_BMK, b_BKN)


def linear(x: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """Return F.linear of x [..., K], [..., N], with its gradients."""
    return _Linear.apply(x, weight_NK) if is_widened(x) else F.linear(x, weight_NK)


def by_weight(grad: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """Return grad [..., N] times the weight, [..., K]: of a linear's output gradient that of its x."""
    if not is_widened(grad):
        return grad @ weight_NK
    return multiply(grad.flatten(0, -2), weight_NK).unflatten(0, grad.shape[:-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_NK):
        x_needed, weight_needed = ctx.needs_input_grad[1::-1]  # each is needed for the gradient of the other
        ctx.save_for_backward(x if x_needed else None, weight_NK if weight_needed else None)
        return by_weight(x, weight_NK.t())

    @staticmethod
    def backward(ctx, grad):
        x, weight_NK = ctx.saved_tensors
        return (by_weight(grad, weight_NK) if ctx.needs_input_grad[0] else None,
                multiply(grad.flatten(0, -2).t(), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None)
