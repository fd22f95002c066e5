"""What every layer needs to know of the tokens of a micro-batch: where they stand, what each of them sees, and by which
numbers random ones are drawn for them.

Shapes: B rows, L tokens of a whole sequence, S of it on this context rank, T any.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_deepseek.model.attention.mask import CausalMask
from megatron_deepseek.parallel.context import ContextParallel, zigzag

TOKEN_KEYS = "token_keys"  # the name of a batch's `per_token` input


@dataclass(frozen=True, eq=False)
class TokenKeys:
    """A number for each token of a micro-batch, int64; without `sequence_BL` there are none, and nothing is dropped.

    Every rank has those of whole sequences, so that it knows the tokens of which another context rank sends it latents.
    """

    sequence_BL: torch.Tensor | None = None
    cp: ContextParallel | None = None

    @property
    def own_BS(self) -> torch.Tensor | None:
        """Return those of this context rank's tokens."""
        return None if self.sequence_BL is None else self._parts[self.cp.rank]

    def of(self, rank: int, tokens: slice) -> torch.Tensor | None:
        """Return those of some of the tokens of a context rank, [B, T]."""
        return None if self.sequence_BL is None else self._parts[rank][:, tokens]

    @cached_property
    def _parts(self) -> list[torch.Tensor]:
        length, size = self.sequence_BL.shape[1], self.cp.size
        return [self.sequence_BL[:, zigzag(length, rank, size).to(self.sequence_BL.device)] for rank in range(size)]


@dataclass(frozen=True, eq=False)
class Positions:
    """`rope_2SD` is the rotary table of this rank's S positions, `mask` what the tokens at these positions see, `keys`
    what adapters' dropout knows them by.
    """

    rope_2SD: torch.Tensor
    mask: CausalMask = CausalMask()
    keys: TokenKeys = TokenKeys()
