"""The memory of past tokens: what each layer's attention keeps of them, in blocks.

A layer keeps `width` numbers a token: with MLA the latent and the rotary key that all heads share, 512 + 64 in V3, with
grouped-query attention keys and values side by side. MTP modules keep theirs in the same blocks, and where they draft,
the states that they start from are kept too.

Shapes: P blocks with the null block, W width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_deepseek.inference.settings import EngineSettings

DEFAULT_BYTES = 2**30


@dataclass(frozen=True)
class PagedCache:
    """One tensor [P * block_size, W] for each name; a token's place is block * block_size + position in the block.

    Block 0 is the null block (blocks.py). On the CPU memory is taken when it is first written.
    """

    tensors: Mapping[str, torch.Tensor]
    block_size: int

    @classmethod
    def make(cls, widths: Mapping[str, int], num_blocks: int, block_size: int, dtype: torch.dtype,
             device: torch.device) -> "PagedCache":
        """Return an empty cache for `num_blocks` blocks beside the null block; `widths` by name."""
        slots = (num_blocks + 1) * block_size
        # Zeros, since padding is multiplied with a probability of zero, and what memory holds may be no number.
        return cls({name: torch.zeros(slots, width, dtype=dtype, device=device) for name, width in widths.items()},
                   block_size)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def blocks(self, name: str, tables_Rn: torch.Tensor) -> torch.Tensor:
        """Return what is kept in the blocks of R sequences, [R, n * block_size, W]."""
        slots_SW = self.tensors[name]
        pages = slots_SW.view(-1, self.block_size * slots_SW.shape[1])
        return pages.index_select(0, tables_Rn.flatten()).view(len(tables_Rn), -1, slots_SW.shape[1])


def bytes_of_token(widths: Mapping[str, int], dtype: torch.dtype) -> int:
    """Return how many bytes one token takes in all layers."""
    return sum(widths.values()) * dtype.itemsize


def count_blocks(settings: EngineSettings, token_bytes: int) -> int:
    """Return how many blocks the settings ask for; raise ValueError if `cache_bytes` do not hold one request."""
    size = settings.block_size
    needed = -(-settings.slots_of_request // size)
    if settings.num_blocks is not None:
        return settings.num_blocks
    if settings.cache_bytes is None:
        return max(needed, min(needed * settings.max_running, DEFAULT_BYTES // (token_bytes * size)))
    blocks = settings.cache_bytes // (token_bytes * size)
    if blocks < needed:
        raise ValueError(f"cache_bytes {settings.cache_bytes:,} hold {blocks * size:,} tokens, and one request of "
                         f"max_length {settings.max_length:,} needs {needed * size * token_bytes:,} bytes")
    return blocks
