"""Uniform noise on the embeddings of input tokens: NEFTune (arXiv 2310.05914).

The noise of a token depends on its key and the hidden index alone, never on where the token is computed: the same in
every layout, and a resumed run needs no saved state of a generator. Who makes the batch gives each token its key.

Shapes: B rows, S tokens of each on this context rank, H hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_deepseek.ops.hashing import ELEMENTS_AT_A_TIME, split_mix, stream_key, uniform

KEYS, BOUNDS = "embedding_noise_keys", "embedding_noise_bounds"  # the names of a batch's `per_token` inputs


@dataclass(frozen=True, eq=False)
class EmbeddingNoise:
    """The noise of a micro-batch: for each token the key of its stream, int64, and the largest size of its noise."""

    keys_BS: torch.Tensor
    bounds_BS: torch.Tensor

    @classmethod
    def of(cls, inputs: Mapping[str, torch.Tensor]) -> "EmbeddingNoise | None":
        """Return the noise that a batch asks for by its inputs KEYS and BOUNDS, None if it asks for none."""
        return cls(inputs[KEYS], inputs[BOUNDS]) if KEYS in inputs else None

    def add_to(self, embeddings_BSH: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Return the embeddings with noise, uniform within +-bound.

        Under sequence parallelism they are the slice of S that begins at `first`.
        """
        length = embeddings_BSH.shape[1]
        keys_T, bounds_T = (x_BS[:, first:first + length].flatten() for x_BS in (self.keys_BS, self.bounds_BS))
        noise_TH = torch.empty_like(embeddings_BSH, requires_grad=False).flatten(0, 1)
        index_H = torch.arange(embeddings_BSH.shape[2], device=keys_T.device)
        tokens = max(1, ELEMENTS_AT_A_TIME // len(index_H))
        for chosen in (slice(start, start + tokens) for start in range(0, len(keys_T), tokens)):
            within_one_TH = 2 * uniform(index_H, keys_T[chosen, None]) - 1
            noise_TH[chosen] = (within_one_TH * bounds_T[chosen, None]).to(noise_TH.dtype)
        return embeddings_BSH + noise_TH.view_as(embeddings_BSH)


def token_keys(stream: str, sample_S: torch.Tensor, position_S: torch.Tensor) -> torch.Tensor:
    """Return the key of each token, int64 [S] or any other shape, from its sample's number and its position in it.

    `stream` names the seed, the purpose and the time: keys of two streams have nothing in common.
    """
    return split_mix(position_S, split_mix(sample_S, stream_key(stream)))
