"""RMSNorm (arXiv 1910.07467) that saves only its input and one number for each row for the backward."""

import torch

from megatron_deepseek.ops.backends.registry import with_backends


def norm_forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y [..., H] in x's dtype and 1 / root mean square [..., 1] in at least float32, without a gradient."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    norm = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True)
    rstd = (norm.square() / x.shape[-1] + eps).rsqrt()
    return ((x_wide * rstd).to(x.dtype) * weight).to(x.dtype), rstd


@with_backends("norm_backward")
def norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
                  ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and of the weight."""
    normed = x.to(rstd.dtype) * rstd
    grad = grad.to(rstd.dtype)
    grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
    return _input_gradient(grad, normed, weight, rstd).to(x.dtype), grad_weight


def _input_gradient(grad: torch.Tensor, normed: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    grad_normed = grad * weight
    inner = torch.linalg.vecdot(grad_normed, normed).unsqueeze(-1) / normed.shape[-1]
    return (grad_normed.addcmul_(normed, inner, value=-1)).mul_(rstd)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, rstd = norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            return *norm_backward.reference(grad, x, weight, rstd), None
        return _input_gradient(grad.to(rstd.dtype), x.to(rstd.dtype) * rstd, weight, rstd).to(x.dtype), None, None


@with_backends("rms_norm")
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x [..., H] / sqrt(mean(x^2) + eps) * weight [H] in x's dtype; statistics are in at least float32."""
    return _RMSNorm.apply(x, weight, eps)
