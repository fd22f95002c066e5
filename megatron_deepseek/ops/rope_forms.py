"""RoPE in forms that a compiler turns into one pass over memory, and derives itself; rope.py has those for eager torch.

Shapes are those of rope.py.
"""

import torch


def turn_halves_in_a_pass(x: torch.Tensor, table_2SD: torch.Tensor) -> torch.Tensor:
    """Return what `apply_rope_to_halves` does."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = table_2SD.to(wide).unsqueeze(2)
    half = cos.shape[-1]
    first, second, rest = x.to(wide).split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(x.dtype)


def _turn_pairs(x: torch.Tensor, table_2SD: torch.Tensor) -> torch.Tensor:
    """Return what `rope.apply_rope` does."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = table_2SD.to(wide).unsqueeze(2)
    even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def rope_queries_in_a_pass(x_BSNX: torch.Tensor, table_2SD: torch.Tensor, nope: int) -> torch.Tensor:
    """Return what `rope_queries` does."""
    return torch.cat([x_BSNX[..., :nope], _turn_pairs(x_BSNX[..., nope:], table_2SD)], -1)


def assemble_keys_in_a_pass(kv_BSNX: torch.Tensor, k_pe_BSD: torch.Tensor, table_2SD: torch.Tensor | None, nope: int
                            ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `assemble_keys` does."""
    k_pe_BS1D = k_pe_BSD.unsqueeze(2)
    turned_BS1D = k_pe_BS1D if table_2SD is None else _turn_pairs(k_pe_BS1D, table_2SD)
    return torch.cat([kv_BSNX[..., :nope], turned_BS1D.expand(-1, -1, kv_BSNX.shape[2], -1)], -1), kv_BSNX[..., nope:]
