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
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = table_2SD.to(wide).unsqueeze(2)
    even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


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


def turn_halves_in_a_pass(x: torch.Tensor, table_2SD: torch.Tensor) -> torch.Tensor:
    """Return what `apply_rope_to_halves` does, in a form that a compiler turns into one pass, and derives itself."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = table_2SD.to(wide).unsqueeze(2)
    half = cos.shape[-1]
    first, second, rest = x.to(wide).split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(x.dtype)


@with_backends("rope_queries")
def rope_queries(x_BSNX: torch.Tensor, table_2SD: torch.Tensor, nope: int) -> torch.Tensor:
    """Apply RoPE to the dimensions of each head from `nope` on, MLA's decoupled queries; return all dimensions."""
    return torch.cat([x_BSNX[..., :nope], apply_rope(x_BSNX[..., nope:], table_2SD)], -1)


@with_backends("assemble_keys")
def assemble_keys(kv_BSNX: torch.Tensor, k_pe_BSD: torch.Tensor, table_2SD: torch.Tensor | None, nope: int
              ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys [B, S, N, nope + D], with the rotary part that all heads share, and values [B, S, N, V].

    They come from `kv_BSNX`, whose heads have nope + V dimensions, and `k_pe_BSD`. RoPE is applied to the latter here,
    unless no table is given: then it has been applied already.
    """
    k_nope, v = kv_BSNX[..., :nope], kv_BSNX[..., nope:]
    k_pe_BS1D = k_pe_BSD.unsqueeze(2)
    rotated = k_pe_BS1D if table_2SD is None else apply_rope(k_pe_BS1D, table_2SD)
    return torch.cat([k_nope, rotated.expand(-1, -1, kv_BSNX.shape[2], -1)], -1), v
