"""Grouped GEMM, one for each expert over rows sorted by expert: forward, input gradient, weight gradient.

CUDA in bfloat16 runs `torch.nn.functional.grouped_mm`. Everywhere else each group is an ordinary GEMM written straight
into the result: on CPU grouped_mm in bfloat16 was measured 7x slower than that loop, and it has no float64.

In bfloat16 on CPU the number of rows of each group is rounded up (rounded_rows.py).

Shapes: R rows, E experts, I inputs, O outputs. counts_E are Python integers that sum to R.
"""

import torch
import torch.nn.functional as F

from megatron_deepseek.device import on_accelerator, send
from megatron_deepseek.ops.rounded_rows import round_up


def _mm(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Write x @ weight into `out`."""
    rounded = round_up(x)
    if rounded.shape == x.shape:
        torch.mm(x, weight, out=out)
    else:
        out.copy_((rounded @ weight)[:x.shape[0]])


def has_native_kernel(x: torch.Tensor, *widths: int) -> bool:
    """Return whether grouped_mm takes x: rows of all operands must begin at multiples of 16 bytes."""
    return on_accelerator(x) and x.dtype == torch.bfloat16 and x.shape[0] > 0 and not any(width % 8 for width in widths)


def _offsets(counts_E: list[int], device: torch.device) -> torch.Tensor:
    return send(counts_E, device).cumsum(0, dtype=torch.int32)


def grouped_forward(x_RI: torch.Tensor, weight_EOI: torch.Tensor, counts_E: list[int]) -> torch.Tensor:
    """Return y [R, O]: each expert's rows times its weight transposed."""
    if has_native_kernel(x_RI, *weight_EOI.shape[1:]):
        return F.grouped_mm(x_RI, weight_EOI.transpose(-2, -1), offs=_offsets(counts_E, x_RI.device))
    y_RO = x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])
    for x, weight, y in zip(x_RI.split(counts_E), weight_EOI.unbind(), y_RO.split(counts_E)):
        if len(x):
            _mm(x, weight.t(), y)
    return y_RO


def grouped_dgrad(grad_RO: torch.Tensor, weight_EOI: torch.Tensor, counts_E: list[int]) -> torch.Tensor:
    """Return the gradient of x [R, I]: each expert's output gradients times its weight."""
    if has_native_kernel(grad_RO, *weight_EOI.shape[1:]):
        return F.grouped_mm(grad_RO, weight_EOI, offs=_offsets(counts_E, grad_RO.device))
    grad_RI = grad_RO.new_empty(grad_RO.shape[0], weight_EOI.shape[2])
    for grad, weight, out in zip(grad_RO.split(counts_E), weight_EOI.unbind(), grad_RI.split(counts_E)):
        _mm(grad, weight, out)
    return grad_RI


def grouped_wgrad(grad_RO: torch.Tensor, x_RI: torch.Tensor, counts_E: list[int]) -> torch.Tensor:
    """Return the gradient of the weights [E, O, I], zero for an expert without rows."""
    if has_native_kernel(x_RI, grad_RO.shape[1], x_RI.shape[1]):
        grad_EOI = F.grouped_mm(grad_RO.t(), x_RI, offs=_offsets(counts_E, x_RI.device))
        for grad, count in zip(grad_EOI, counts_E, strict=True):
            if not count:
                grad.zero_()  # not written on compute capability 10.0 (pytorch issue 172439)
        return grad_EOI
    grad_EOI = x_RI.new_empty(len(counts_E), grad_RO.shape[1], x_RI.shape[1])
    for grad, x, out in zip(grad_RO.split(counts_E), x_RI.split(counts_E), grad_EOI.unbind()):
        torch.mm(round_up(grad).t(), round_up(x), out=out)
    return grad_EOI


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RI, weight_EOI, counts_E):
        x_needed, weight_needed = ctx.needs_input_grad[1::-1]  # each is needed for the gradient of the other
        ctx.save_for_backward(x_RI if x_needed else None, weight_EOI if weight_needed else None)
        ctx.counts_E = counts_E
        return grouped_forward(x_RI, weight_EOI, counts_E)

    @staticmethod
    def backward(ctx, grad_RO):
        x_RI, weight_EOI = ctx.saved_tensors
        grad_RO = grad_RO.contiguous()
        grad_x = grouped_dgrad(grad_RO, weight_EOI, ctx.counts_E) if ctx.needs_input_grad[0] else None
        grad_weight = grouped_wgrad(grad_RO, x_RI, ctx.counts_E) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def grouped_gemm(x_RI: torch.Tensor, weight_EOI: torch.Tensor, counts_E: list[int]) -> torch.Tensor:
    """Return y [R, O]: the `counts_E[e]` rows of each expert e, in order of e, times its weight transposed."""
    assert sum(counts_E) == x_RI.shape[0] and len(counts_E) == weight_EOI.shape[0], (x_RI.shape, counts_E)
    return _GroupedGemm.apply(x_RI, weight_EOI, counts_E)
