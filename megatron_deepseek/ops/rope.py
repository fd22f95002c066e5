"""Rotary position embedding, RoPE (arXiv 2104.09864): on interleaved pairs, as DeepSeek applies it, and on halves.

Shapes: B batch, S positions, N heads, X = nope + rotary (or value) dimensions of a head, D rotary dimensions, V value
width.
"""

import torch

from megatron_deepseek.ops.backends.registry import with_backends


def apply_rope(x: torch.Tensor, table_2SD: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ... of x [B, S, heads, D] by their position's angle.

    The pairs stay interleaved. transformers moves even dimensions before odd ones, in queries and keys alike, so scores
    are the same. Computed in at least float32, returned in x's dtype.
    """
    return _RotatePairs.apply(x, table_2SD)


class _RotatePairs(torch.autograd.Function):
    """Keeps the table alone; the backward turns the gradient back."""

    @staticmethod
    def forward(ctx, x, table_2SD):
        ctx.save_for_backward(table_2SD)
        return _turn_pairs(x, *table_2SD, torch.empty_like(x))

    @staticmethod
    def backward(ctx, grad):
        cos_SD, sin_SD = ctx.saved_tensors[0]
        return _turn_pairs(grad, cos_SD, -sin_SD, torch.empty_like(grad)), None


def _turn_pairs(x: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write the turned pairs of x [B, S, heads, D] into `out`, and return it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (each.to(wide).unsqueeze(1) for each in (cos_SD, sin_SD))
    even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    out_even, out_odd = out.unflatten(-1, (-1, 2)).unbind(-1)
    out_even.copy_((even * cos).sub_(odd * sin))
    out_odd.copy_((even * sin).add_(odd * cos))
    return out


def apply_rope_to_halves(x: torch.Tensor, table_2SD: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x0, x[R/2]), (x1, x[R/2 + 1]), ... of the first R dimensions of x [B, S, heads, X].

    R is twice the table's number of pairs. Llama's and Qwen's weights are in this order. Computed in at least float32,
    returned in x's dtype.
    """
    return _RotateHalves.apply(x, table_2SD)


class _RotateHalves(torch.autograd.Function):
    """Keeps the table alone; the backward turns the gradient back."""

    @staticmethod
    def forward(ctx, x, table_2SD):
        ctx.save_for_backward(table_2SD)
        return _turn_halves(x, *table_2SD)

    @staticmethod
    def backward(ctx, grad):
        cos_SD, sin_SD = ctx.saved_tensors[0]
        return _turn_halves(grad, cos_SD, -sin_SD), None


def _turn_halves(x: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (each.to(wide).unsqueeze(1) for each in (cos_SD, sin_SD))
    half, x_wide = cos.shape[-1], x.to(wide)
    first, second, rest = x_wide.tensor_split((half, 2 * half), -1)
    out = torch.empty_like(x_wide)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:2 * half]).addcmul_(first, sin)
    if rest.shape[-1]:
        out[..., 2 * half:] = rest
    return out.to(x.dtype)


@with_backends("rope_queries")
def rope_queries(x_BSNX: torch.Tensor, table_2SD: torch.Tensor, nope: int) -> torch.Tensor:
    """Apply RoPE to the dimensions of each head from `nope` on, MLA's decoupled queries; return all dimensions."""
    return _TurnQueries.apply(x_BSNX, table_2SD, nope)


class _TurnQueries(torch.autograd.Function):
    """Copies the dimensions before the rotary ones and turns these, forth and back."""

    @staticmethod
    def forward(ctx, x_BSNX, table_2SD, nope):
        ctx.save_for_backward(table_2SD)
        ctx.nope = nope
        return _turn_from(x_BSNX, *table_2SD, nope)

    @staticmethod
    def backward(ctx, grad_BSNX):
        cos_SD, sin_SD = ctx.saved_tensors[0]
        return _turn_from(grad_BSNX, cos_SD, -sin_SD, ctx.nope), None, None


def _turn_from(x_BSNX: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor, nope: int) -> torch.Tensor:
    out = torch.empty(x_BSNX.shape, dtype=x_BSNX.dtype, device=x_BSNX.device)
    out[..., :nope] = x_BSNX[..., :nope]
    _turn_pairs(x_BSNX[..., nope:], cos_SD, sin_SD, out[..., nope:])
    return out


@with_backends("assemble_keys")
def assemble_keys(kv_BSNX: torch.Tensor, k_pe_BSD: torch.Tensor, table_2SD: torch.Tensor | None, nope: int
              ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys [B, S, N, nope + D], with the rotary part that all heads share, and values [B, S, N, V].

    They come from `kv_BSNX`, whose heads have nope + V dimensions, and `k_pe_BSD`. RoPE is applied to the latter here,
    unless no table is given: then it has been applied already.
    """
    k_pe_BS1D = k_pe_BSD.unsqueeze(2)
    turned_BS1D = k_pe_BS1D if table_2SD is None else apply_rope(k_pe_BS1D, table_2SD)
    return _KeysAndValues.apply(kv_BSNX, turned_BS1D, nope)


class _KeysAndValues(torch.autograd.Function):
    """Keys are a copy, values a view. The gradient of what both came from is written once, each half in its place."""

    @staticmethod
    def forward(ctx, kv_BSNX, turned_BS1D, nope):
        ctx.nope = nope
        k_BSND = kv_BSNX.new_empty(*kv_BSNX.shape[:3], nope + turned_BS1D.shape[-1])
        k_BSND[..., :nope] = kv_BSNX[..., :nope]
        k_BSND[..., nope:] = turned_BS1D
        return k_BSND, kv_BSNX[..., nope:]

    @staticmethod
    def backward(ctx, grad_k, grad_v):
        nope = ctx.nope
        grad_kv = grad_v.new_empty(*grad_v.shape[:3], nope + grad_v.shape[-1])
        grad_kv[..., :nope] = grad_k[..., :nope]
        grad_kv[..., nope:] = grad_v
        return grad_kv, grad_k[..., nope:].sum(2, keepdim=True), None
