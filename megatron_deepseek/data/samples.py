"""Datasets of samples, from one indexed dataset, epoch after epoch, or from a blend of several.

An item is a dict: tokens and labels, int64 [seq_length], labels[s] being the token after tokens[s]; loss_mask, bool
[seq_length]; source, the number of the dataset in its blend. Files are opened and mapped when a sample is first read
from them, so that a blend of hundreds costs nothing at the start.
"""

import os
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from megatron_deepseek.data.blend import short_names
from megatron_deepseek.data.blend_index import BlendIndex
from megatron_deepseek.data.index_file import IndexFile, mapped, open_index
from megatron_deepseek.data.sample_index import PackedSplit


class PackedSamples:
    """The samples of one dataset without end: sample k belongs to epoch k // samples_per_epoch.

    Documents are packed into samples once. An epoch after the first takes the same samples in the order of a
    permutation drawn from (seed, epoch). `masked` is the token after which no loss is taken, or None.
    """

    def __init__(self, split: PackedSplit, folder: Path, num_samples: int, masked: int | None = None):
        self.split, self.folder, self.num_samples, self.masked = split, folder, num_samples, masked
        self.samples_per_epoch = split.num_samples
        self._order = (0, None)

    def __len__(self) -> int:
        """Return the samples of as many whole epochs as `num_samples` take; items beyond them exist all the same."""
        return -(-(self.num_samples or 1) // self.samples_per_epoch) * self.samples_per_epoch

    def __getitem__(self, number: int) -> dict:
        epoch, k = divmod(int(number), self.samples_per_epoch)
        order = self._index[0]
        ids = torch.from_numpy(self.read(int(order[k if epoch == 0 else self._order_of(epoch)[k]])))
        tokens, labels = ids[:-1], ids[1:]
        mask = torch.ones(len(tokens), dtype=torch.bool) if self.masked is None else tokens != self.masked
        return {"tokens": tokens, "labels": labels, "loss_mask": mask, "source": 0}

    def read(self, place: int) -> np.ndarray:
        """Return the sample at a place of the stream of packed documents, int64 [seq_length + 1]."""
        _, documents, starts, offsets = self._index
        (first, last), (begin, end) = starts[place:place + 2].tolist(), offsets[place:place + 2].tolist()
        parts = [self._sequence(int(documents[number])) for number in range(first, last + 1)]
        parts[-1] = parts[-1][:end + 1]
        parts[0] = parts[0][begin:]
        return np.concatenate(parts, dtype=np.int64)

    def _sequence(self, number: int) -> np.ndarray:
        pointers, lengths, data = self._files
        return np.frombuffer(data, self._index_file.token_dtype, int(lengths[number]), int(pointers[number]))

    @cached_property
    def _index_file(self) -> IndexFile:
        return open_index(self.split.prefix, "dataset")

    @cached_property
    def _files(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the pointers and lengths of the sequences and the bytes of the .bin, all mapped."""
        index = self._index_file
        data = mapped(index.prefix + ".bin", np.uint8, 0, os.path.getsize(index.prefix + ".bin"))
        return index.map(index.pointers), index.map(index.lengths), data

    @cached_property
    def _index(self) -> tuple[np.ndarray, ...]:
        return self.split.map(self.folder)

    def _order_of(self, epoch: int) -> np.ndarray:
        """Return the permutation of an epoch. Only the last one is kept, as epochs are read in order."""
        order = self._order  # once: another thread may read another epoch
        if order[0] != epoch:
            generator = np.random.default_rng((self.split.seed, epoch))
            order = self._order = (epoch, generator.permutation(self.samples_per_epoch).astype(np.uint32))
        return order[1]


class EverySample:
    """Every sample of some datasets once, one dataset after the other, and over again."""

    def __init__(self, datasets: list[PackedSamples]):
        self.datasets = datasets
        self.names = short_names([each.split.prefix for each in datasets]) if len(datasets) > 1 else ()
        self._ends = np.cumsum([each.samples_per_epoch for each in datasets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> dict:
        place = number % len(self)
        source = int(np.searchsorted(self._ends, place, "right"))
        return self.datasets[source][place - int(self._ends[source] - self.datasets[source].samples_per_epoch)] | {
            "source": source}


class BlendedSamples:
    """The samples of several datasets, in the order of a blend's index."""

    def __init__(self, datasets: list[PackedSamples], index: BlendIndex, folder: Path):
        self.datasets, self.index, self.folder = datasets, index, folder
        self.names = short_names([dataset.split.prefix for dataset in datasets])

    def __len__(self) -> int:
        return self.index.size

    def __getitem__(self, number: int) -> dict:
        sources, numbers = self._index
        source = int(sources[number])
        return self.datasets[source][int(numbers[number])] | {"source": source}

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        return self.index.map(self.folder)
