"""What every layer needs to know of the tokens of a micro-batch: where they stand, what each of them sees, and by which
numbers random ones are drawn for them, and which experts were chosen for them already.

Shapes: B rows, L tokens of a whole sequence, S of it on this context rank, T any, M MoE layers, K experts of a token.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_deepseek.model.attention.mask import CausalMask
from megatron_deepseek.parallel.context import ContextParallel, zigzag

TOKEN_KEYS = "token_keys"  # the names of a batch's `per_token` inputs
REPLAYED = "replayed_experts"  # [B, L, M, K] integers: see Replay


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
class Replay:
    """The experts to which a micro-batch's tokens go, whatever routers would choose: those of a rollout.

    experts_BSMK: integers of any width, for each of the main model's MoE layers in their order, whichever of them this
    pipeline rank has. A row of K that begins with -1 leaves that token to the layer's router. Without any, all are left
    to it.
    """

    experts_BSMK: torch.Tensor | None = None

    def of_layer(self, place: int | None) -> torch.Tensor | None:
        """Return those of the MoE layer at `place`, [B, S, K]; of a layer without a place, an MTP module's, none."""
        return None if self.experts_BSMK is None or place is None else self.experts_BSMK[:, :, place]


@dataclass(frozen=True, eq=False)
class Positions:
    """`rope_2SD` is the rotary table of this rank's S positions, `mask` what the tokens at these positions see, `keys`
    what adapters' dropout knows them by, `replay` the experts that were chosen for them.
    """

    rope_2SD: torch.Tensor
    mask: CausalMask = CausalMask()
    keys: TokenKeys = TokenKeys()
    replay: Replay = Replay()
