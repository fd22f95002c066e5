"""One matrix product per expert over rows sorted by expert.

CUDA in bfloat16 runs `torch.nn.functional.grouped_mm`. Everywhere else each group is a plain product written straight
into the result: on CPU grouped_mm in bfloat16 was measured 7x slower than that loop, and it has no float64.

Shapes: R rows, E experts, I inputs, O outputs. counts_E are Python integers that sum to R.
"""

import torch
import torch.nn.functional as F


class _GroupedGemmLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RI, weight_EOI, counts_E):
        ctx.save_for_backward(x_RI, weight_EOI)
        ctx.counts_E = counts_E
        y_RO = x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])
        for x, weight, y in zip(x_RI.split(counts_E), weight_EOI.unbind(), y_RO.split(counts_E)):
            torch.mm(x, weight.t(), out=y)
        return y_RO

    @staticmethod
    def backward(ctx, grad_RO):
        x_RI, weight_EOI = ctx.saved_tensors
        grad_RO = grad_RO.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x_RI)
            for grad, weight, out in zip(grad_RO.split(ctx.counts_E), weight_EOI.unbind(), grad_x.split(ctx.counts_E)):
                torch.mm(grad, weight, out=out)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight_EOI)
            for grad, x, out in zip(grad_RO.split(ctx.counts_E), x_RI.split(ctx.counts_E), grad_weight.unbind()):
                torch.mm(grad.t(), x, out=out)
        return grad_x, grad_weight, None


def grouped_gemm(x_RI: torch.Tensor, weight_EOI: torch.Tensor, counts_E: list[int]) -> torch.Tensor:
    """y [R, O]: rows of expert e, `counts_E[e]` of them in order of e, times that expert's weight transposed."""
    assert sum(counts_E) == x_RI.shape[0] and len(counts_E) == weight_EOI.shape[0], (x_RI.shape, counts_E)
    if x_RI.is_cuda and x_RI.dtype == torch.bfloat16 and x_RI.shape[0] > 0:
        offsets = torch.tensor(counts_E, device=x_RI.device).cumsum(0, dtype=torch.int32)
        return F.grouped_mm(x_RI, weight_EOI.transpose(-2, -1), offs=offsets)
    return _GroupedGemmLoop.apply(x_RI, weight_EOI, counts_E)
