"""The keys of a training batch's tokens, by which dropout of adapters draws its masks (ops/dropout.py).

A token's key is a hash of (seed, number of its sample among all that the run consumes, position in the row): the number
names the step, so that a row that comes again in another epoch has other masks, and every layout, every division into
micro-batches and a resumed run draw the same ones. What is held out gets no keys, and so loses nothing.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.data.batches import sample_indices
from megatron_deepseek.model.noise import token_keys
from megatron_deepseek.model.positions import TOKEN_KEYS


class Rows(Protocol):
    """The rows of a run, by the number of consumed samples."""

    source_names: tuple[str, ...]

    def batch(self, consumed_samples: int, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
              ) -> Batch: ...


@dataclass(frozen=True)
class KeyedRows:
    """The same rows with a key for each token."""

    rows: Rows
    seed: int

    @property
    def source_names(self) -> tuple[str, ...]:
        return self.rows.source_names

    def batch(self, consumed_samples: int, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
              ) -> Batch:
        where = consumed_samples, global_batch_size, micro_batch_size, dp_rank, dp_size
        batch = self.rows.batch(*where)
        keys_BS = keys_of(self.seed, torch.tensor(sample_indices(*where)), batch.tokens_BS.shape[1])
        return replace(batch, per_token={**batch.per_token, TOKEN_KEYS: keys_BS})


def keys_of(seed: int, numbers_B: torch.Tensor, length: int) -> torch.Tensor:
    """Return the keys of the tokens of the samples `numbers_B`, rows of `length` tokens, int64 [B, S]."""
    return token_keys(f"{seed}:dropout", numbers_B.unsqueeze(1), torch.arange(length))
