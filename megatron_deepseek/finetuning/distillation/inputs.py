"""What a batch of distillation from a cache has beside its tokens: the teacher's likeliest ids of each label token.

Shapes: B rows, S tokens, K ids of a token, N label tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_deepseek.data.batch import Batch
from megatron_deepseek.data.batches import sample_indices
from megatron_deepseek.finetuning.distillation.cache_files import CachedDataset
from megatron_deepseek.finetuning.distillation.objective import IDS, LOG_PROBABILITIES, REST
from megatron_deepseek.finetuning.rows import Rows
from megatron_deepseek.runtime.task import TrainingData


class CachedSampler:
    """A sampler of rows with what the cache has of their label tokens; on all other tokens stands what counts nothing.
    """

    def __init__(self, sampler: TrainingData, rows: Rows, datasets: Sequence[CachedDataset]):
        self.sampler, self.rows, self.datasets = sampler, rows, tuple(datasets)
        self.source_names = sampler.source_names

    def batch(self, consumed_samples: int, global_batch_size: int, micro_batch_size: int,
              dp_rank: int = 0, dp_size: int = 1) -> Batch:
        where = consumed_samples, global_batch_size, micro_batch_size, dp_rank, dp_size
        batch = self.sampler.batch(*where)
        found = [self._of_row(number, weights_S) for number, weights_S in
                 zip(sample_indices(*where), batch.weights_BS)]
        more = dict(zip((IDS, LOG_PROBABILITIES, REST), map(torch.stack, zip(*found))))
        return replace(batch, per_token={**batch.per_token, **more})

    def _of_row(self, number: int, weights_S: torch.Tensor) -> list[torch.Tensor]:
        """Return int32 [S, K], float32 [S, K] and float32 [S] of a row."""
        labels_N = torch.nonzero(weights_S).squeeze(-1)
        parts = [self.datasets[source].of(sample) for source, sample in self.rows.samples_in(number)]
        kinds = (np.int32, np.float32, np.float32)
        width = self.datasets[0].description.top_k
        row = [torch.from_numpy(np.zeros((len(weights_S), *more), kind)) for kind, more in
               zip(kinds, ((width,), (width,), ()))]
        if parts:
            for placed, kind, of_samples in zip(row, kinds, zip(*parts)):
                placed[labels_N] = torch.from_numpy(np.concatenate(of_samples).astype(kind))
        return row
