"""Where the tokens of a micro-batch stand, the same for every layer."""

from dataclasses import dataclass

import torch

from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.parallel.context import BlockMask


@dataclass(frozen=True, eq=False)
class Positions:
    """rope_2SD: the rotary table of this rank's S positions. `documents` are those of the whole sequences, None where
    attention sees across documents; `block_mask` is what this rank sees of its context group's blocks, None where it
    has whole sequences.
    """

    rope_2SD: torch.Tensor
    documents: Documents | None = None
    block_mask: BlockMask | None = None
