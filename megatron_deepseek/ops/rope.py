"""Rotary position embedding (arXiv 2104.09864) on interleaved pairs, as DeepSeek applies it.

Shapes: B batch, S positions, D rotary dimensions.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Places:
    """Where tokens stand: rows of the rotary table for this rank's positions, and the document of every token of the
    whole sequences, [B, S of the sequence], None where attention sees across documents.
    """

    rope_2SD: torch.Tensor
    documents_BS: torch.Tensor | None = None


def apply_rope(x: torch.Tensor, table_2SD: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x0, x1), (x2, x3), ... of x [B, S, heads, D] by their position's angle.

    The pairs stay interleaved. transformers moves even dimensions before odd ones; queries and keys alike, so scores
    do not change. Computed in at least float32, returned in x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = table_2SD.to(wide).unsqueeze(2)
    even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)
