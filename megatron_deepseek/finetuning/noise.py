"""NEFTune (arXiv 2310.05914): a training batch says which stream of random numbers each token draws from.

The noise of a token is uniform within +-alpha / sqrt(L * d), L the tokens of its sample and d the hidden size. It
depends on (seed, epoch, number of the sample, position in the sample, hidden index): a sample occurs once in an epoch,
so this names the step, and the noise is the same in every layout, packed or not, and after a resume.
"""

from dataclasses import replace

import torch

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.data.batches import Sampler, sample_indices
from megatron_deepseek.finetuning.rows import Rows
from megatron_deepseek.model.noise import BOUNDS, KEYS, token_keys

_SOURCE = 1 << 40  # more than the samples of a dataset


class NoisySampler:
    """A sampler of rows that also asks for noise on their embeddings."""

    def __init__(self, sampler: Sampler, rows: Rows, alpha: float, hidden_size: int, seed: int):
        self.sampler, self.rows, self.scale, self.seed = sampler, rows, alpha / hidden_size**0.5, seed
        self.source_names = sampler.source_names

    def batch(self, consumed_samples: int, global_batch_size: int, micro_batch_size: int,
              dp_rank: int = 0, dp_size: int = 1) -> Batch:
        where = consumed_samples, global_batch_size, micro_batch_size, dp_rank, dp_size
        batch = self.sampler.batch(*where)
        made = [self._noise(number, documents_S) for number, documents_S
                in zip(sample_indices(*where), batch.documents_BS)]
        keys_BS, bounds_BS = (torch.stack(each) for each in zip(*made))
        return replace(batch, per_token={**batch.per_token, KEYS: keys_BS, BOUNDS: bounds_BS})

    def _noise(self, number: int, documents_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys of a row's tokens, and the bounds of their noise, 0 for padding."""
        samples = [_SOURCE * source + sample for source, sample in self.rows.samples_in(number)]
        stream = f"{self.seed}:neftune:{number // self.rows.rows_per_epoch}"
        lengths_D = torch.bincount(documents_S, minlength=len(samples) + 1)  # the last one is padding
        starts_D = lengths_D.cumsum(0) - lengths_D
        position_S = torch.arange(len(documents_S)) - starts_D[documents_S]
        sample_S = torch.tensor([*samples, 0])[documents_S]
        bounds_D = self.scale / lengths_D.clamp(min=1).double().sqrt()
        bounds_D[len(samples)] = 0.0
        return token_keys(stream, sample_S, position_S), bounds_D[documents_S]
