"""What every layer needs to know of the tokens of a micro-batch: where they stand, and what each of them sees."""

from dataclasses import dataclass

import torch

from megatron_deepseek.model.attention.mask import CausalMask


@dataclass(frozen=True, eq=False)
class Positions:
    """`rope_2SD` is the rotary table of this rank's S positions, `mask` what the tokens at these positions see."""

    rope_2SD: torch.Tensor
    mask: CausalMask = CausalMask()
