"""megatron-core's GPTDataset, repeated epoch after epoch. Importing this imports megatron-core, which takes seconds."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_deepseek.settings import DataSettings


@dataclass(frozen=True)
class DatasetIdentity:
    """What GPTDataset wants of a tokenizer: the id that ends a document, and what names the indices in the cache."""

    eod: int
    fingerprint: str
    vocab_size: None = None

    @property
    def unique_identifiers(self) -> OrderedDict:
        return OrderedDict(data=self.fingerprint)


class RepeatedGPTDataset(GPTDataset):
    """Samples k, counted on without end: epoch k // samples_per_epoch, in an order of its own for each epoch.

    Documents are packed into samples once (as GPTDataset does for one epoch); an epoch after the first takes the same
    samples in the order of a permutation drawn from (seed, epoch).
    """

    def __init__(self, indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config):
        super().__init__(indexed_dataset, dataset_path, indexed_indices, None, index_split, config)
        self.num_samples = num_samples
        self.samples_per_epoch = self.sample_index.shape[0] - 1
        self._order = (0, None)

    def __len__(self) -> int:
        """Whole epochs, at least `num_samples`; items beyond exist all the same."""
        return -(-(self.num_samples or 1) // self.samples_per_epoch) * self.samples_per_epoch

    def __getitem__(self, index: int):
        epoch, place = divmod(int(index), self.samples_per_epoch)
        return super().__getitem__(place if epoch == 0 else int(self._order_of(epoch)[place]))

    def _order_of(self, epoch: int) -> np.ndarray:
        """Kept for the epoch last asked for: they are read in order."""
        if self._order[0] != epoch:
            generator = np.random.default_rng((self.config.random_seed, epoch))
            self._order = (epoch, generator.permutation(self.samples_per_epoch).astype(np.uint32))
        return self._order[1]


def build_splits(settings: DataSettings, prefixes, weights, num_samples, eod: int, folder: Path, fingerprint: str):
    """(train, valid, test) datasets, None for a split without samples; on all ranks of the default process group."""
    blend = (list(prefixes), None if len(prefixes) == 1 else list(weights))
    config = GPTDatasetConfig(
        random_seed=settings.seed,
        sequence_length=settings.seq_length,
        blend=blend,
        split=settings.split,
        path_to_cache=str(folder),
        tokenizer=DatasetIdentity(eod, fingerprint),
        mid_level_dataset_surplus=1.0,  # costs nothing here: samples repeat, and no index grows with their number
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=settings.eod_mask_loss,
        create_attention_mask=False,
    )
    # GPTDataset would count epochs for ever in a split without tokens, wanted or not.
    config.split_matrix = [bounds if needed else None for bounds, needed in zip(config.split_matrix, num_samples)]
    return tuple(BlendedMegatronDatasetBuilder(RepeatedGPTDataset, list(num_samples), lambda: True, config).build())
