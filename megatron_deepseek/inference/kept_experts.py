"""The experts of the tokens in the cache, for requests that ask for them.

They are kept by the slots of the cache, as latents are, in the host's memory. So tokens of shared blocks have theirs,
tokens that are computed again after a preemption or in place of a wrong draft get new ones, and nothing is copied for a
sequence until it ends.

Shapes: T tokens, L MoE layers, K experts of a token.
"""

import torch

from megatron_deepseek.inference.batch import Batch, slots_of
from megatron_deepseek.inference.forward import Chosen
from megatron_deepseek.inference.request import Sequence


class KeptExperts:
    """The experts of `slots` slots, int16; memory for them is taken when the first ones come."""

    def __init__(self, slots: int, block_size: int):
        self._slots, self._block_size = slots, block_size
        self._names: tuple[str, ...] = ()
        self._experts_SLK: torch.Tensor | None = None

    def keep(self, batch: Batch, chosen: Chosen | None) -> None:
        """Keep those of a forward's tokens, by layer [T, K]; None where nobody asked for them."""
        if not chosen:
            return
        experts_TLK = torch.stack([*chosen.values()], 1)[:batch.num_tokens].to("cpu", torch.int16)
        if self._experts_SLK is None:
            self._names = tuple(chosen)
            with torch.inference_mode(False):  # what is given out may be an index in a training step
                self._experts_SLK = torch.empty(self._slots, *experts_TLK.shape[1:], dtype=torch.int16)
        self._experts_SLK[batch.slots_T[:batch.num_tokens].cpu()] = experts_TLK

    def of(self, sequence: Sequence) -> dict[str, torch.Tensor]:
        """Return those of the tokens that the cache has of a sequence, by layer [tokens, K], while it holds its blocks.
        """
        if self._experts_SLK is None or not sequence.num_computed:
            return {}
        slots = slots_of(sequence.blocks, 0, sequence.num_computed, self._block_size)
        with torch.inference_mode(False):
            found_TLK = self._experts_SLK[torch.tensor(slots)]
            return {name: found_TLK[:, place].contiguous() for place, name in enumerate(self._names)}
