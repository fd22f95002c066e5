"""Grouped GEMM, one for each expert over rows sorted by expert: forward, input gradient, weight gradient.

CUDA in bfloat16 runs `torch.nn.functional.grouped_mm`. Everywhere else each group is an ordinary GEMM written straight
into the result: on CPU grouped_mm in bfloat16 was measured 7x slower than that loop, and it has no float64.

In bfloat16 on CPU the number of rows of each group is rounded up (rounded_rows.py): by rows of the next groups, so that
nothing is copied. Their results are overwritten by those groups' own, and a gradient of zero adds nothing of them.

Shapes: R rows, E experts, I inputs, O outputs. counts_E are Python integers that sum to R.
"""

from itertools import accumulate

import torch
import torch.nn.functional as F

from megatron_deepseek.device import on_accelerator, send
from megatron_deepseek.ops.products import multiply
from megatron_deepseek.ops.rounded_rows import round_up, rows_of_kernel


def _products(x_RI: torch.Tensor, weight_EIO: torch.Tensor, counts_E: list[int]) -> torch.Tensor:
    """Return each expert's rows times its matrix, [R, O]."""
    out_RO, start = x_RI.new_empty(x_RI.shape[0], weight_EIO.shape[2]), 0
    for weight, count in zip(weight_EIO.unbind(), counts_E):
        x = _rounded_rows(x_RI, start, count)
        if start + len(x) <= len(out_RO):
            multiply(x, weight, out=out_RO[start:start + len(x)])  # rows behind this expert's are written again
        else:
            out_RO[start:].copy_(multiply(x, weight)[:len(out_RO) - start])
        start += count
    return out_RO


def _rounded_rows(x_RI: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Return `count` rows from `start` on, and as many of those behind them as a kernel is given, else of zeros."""
    rows = rows_of_kernel(x_RI, count)
    return x_RI[start:start + rows] if start + rows <= len(x_RI) else round_up(x_RI[start:start + count])


def has_native_kernel(x: torch.Tensor, *widths: int) -> bool:
    """Return whether grouped_mm takes x: rows of all operands must begin at multiples of 16 bytes."""
    return on_accelerator(x) and x.dtype == torch.bfloat16 and x.shape[0] > 0 and not any(width % 8 for width in widths)


def _offsets(counts_E: list[int], device: torch.device) -> torch.Tensor:
    return send(counts_E, device).cumsum(0, dtype=torch.int32)


def grouped_forward(x_RI: torch.Tensor, weight_EOI: torch.Tensor, counts_E: list[int]) -> torch.Tensor:
    """Return y [R, O]: each expert's rows times its weight transposed."""
    if has_native_kernel(x_RI, *weight_EOI.shape[1:]):
        return F.grouped_mm(x_RI, weight_EOI.transpose(-2, -1), offs=_offsets(counts_E, x_RI.device))
    return _products(x_RI, weight_EOI.mT, counts_E)


def grouped_dgrad(grad_RO: torch.Tensor, weight_EOI: torch.Tensor, counts_E: list[int]) -> torch.Tensor:
    """Return the gradient of x [R, I]: each expert's output gradients times its weight."""
    if has_native_kernel(grad_RO, *weight_EOI.shape[1:]):
        return F.grouped_mm(grad_RO, weight_EOI, offs=_offsets(counts_E, grad_RO.device))
    return _products(grad_RO, weight_EOI, counts_E)


def grouped_wgrad(grad_RO: torch.Tensor, x_RI: torch.Tensor, counts_E: list[int]) -> torch.Tensor:
    """Return the gradient of the weights [E, O, I], zero for an expert without rows."""
    if has_native_kernel(x_RI, grad_RO.shape[1], x_RI.shape[1]):
        grad_EOI = F.grouped_mm(grad_RO.t(), x_RI, offs=_offsets(counts_E, x_RI.device))
        for grad, count in zip(grad_EOI, counts_E, strict=True):
            if not count:
                grad.zero_()  # not written on compute capability 10.0 (pytorch issue 172439)
        return grad_EOI
    grad_EOI = x_RI.new_empty(len(counts_E), grad_RO.shape[1], x_RI.shape[1])
    starts_E = accumulate(counts_E, initial=0)
    for grad, start, count, out in zip(grad_RO.split(counts_E), starts_E, counts_E, grad_EOI.unbind()):
        multiply(round_up(grad).t(), _rounded_rows(x_RI, start, count), out=out)
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
