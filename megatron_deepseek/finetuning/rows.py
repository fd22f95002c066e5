"""The rows of an epoch, by number: what data/batches.py reads global batches from."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from megatron_deepseek.data.blend import short_names
from megatron_deepseek.data.indexed import open_indexed
from megatron_deepseek.finetuning.loss_weights import LossWeights
from megatron_deepseek.finetuning.plan import plan_epoch
from megatron_deepseek.finetuning.prepare import Prepared
from megatron_deepseek.finetuning.sample_values import VALUES, read_values

Sample = tuple[np.ndarray, np.ndarray]  # its ids and loss weights


class Rows:
    """Rows of --seq-length: row n is in epoch n // rows_per_epoch. Each sample is once in an epoch, none is lost.

    An epoch takes the same rows in the order of a permutation drawn from (seed, epoch), so what a run reads depends on
    the number of consumed rows alone, in any layout: give it to `data.batches.Sampler`. `epochs` None goes on for
    ever; otherwise rows after the last epoch are blank (all padding, no loss), so that the last step may be partial.
    `shuffle` False (evaluation) keeps the order of the plan: without packing, that of the files.

    An item is a dict of tensors [seq_length] (torch): tokens int64, labels int64, loss_mask float32 (the weights),
    documents int64 (padding is a document of its own), real bool; and source int, the number of the row's dataset.
    A sample of n tokens takes n - 1 places, as its last token, the end of sentence, is a label only.
    """

    def __init__(self, prepared: Prepared, epochs: int | None = None, shuffle: bool = True):
        self.prepared, self.epochs, self.shuffle = prepared, epochs, shuffle
        self.plan = plan_epoch(prepared)
        self.names = tuple(short_names(list(prepared.names))) if len(prepared.names) > 1 else ()
        self._files = [(open_indexed(prefix, prepared.settings.option), LossWeights(prefix + ".weights"))
                       for prefix in prepared.prefixes]
        self._starts = [np.concatenate([[0], np.cumsum(file.lengths, dtype=np.int64)]) for file, _ in self._files]
        self._order = (-1, None)

    @property
    def rows_per_epoch(self) -> int:
        return self.plan.num_rows

    @property
    def samples_per_epoch(self) -> int:
        return len(self.plan.samples)

    @property
    def tokens_per_epoch(self) -> int:
        """Return the positions of an epoch that are no padding."""
        return self.plan.num_tokens

    def __len__(self) -> int:
        """Return a number that no run reaches: rows go on, blank ones after the last epoch."""
        return 1 << 62

    def place(self, number: int) -> int | None:
        """Return the row of the plan that is the row `number` of the run, None for a blank one."""
        epoch, k = divmod(int(number), self.rows_per_epoch)
        if self.epochs is not None and epoch >= self.epochs:
            return None
        if not self.shuffle:
            return k
        if self._order[0] != epoch:
            generator = np.random.default_rng((self.prepared.settings.seed, epoch))
            self._order = (epoch, generator.permutation(self.rows_per_epoch).astype(np.uint32))
        return int(self._order[1][k])

    def samples_in(self, number: int) -> list[tuple[int, int]]:
        """Return (dataset, sample) of each sample in a row."""
        place = self.place(number)
        if place is None:
            return []
        begin, end = self.plan.starts[place:place + 2].tolist()
        return [(int(self.plan.sources[place]), int(sample)) for sample in self.plan.samples[begin:end]]

    def sample(self, source: int, number: int) -> Sample:
        """Return the ids and the loss weights of a sample."""
        file, weights = self._files[source]
        begin, end = self._starts[source][number:number + 2].tolist()
        return file.ids[begin:end], weights.of(number)

    @cached_property
    def values(self) -> tuple[np.ndarray, ...]:
        """Return the values of each dataset's samples, float32, where the datasets come with some."""
        return tuple(read_values(prefix + VALUES, len(file.lengths))
                     for prefix, (file, _) in zip(self.prepared.prefixes, self._files))

    def __getitem__(self, number: int) -> dict:
        here = self.samples_in(number)
        return self.filled([self.sample(*each) for each in here], here[0][0] if here else 0)

    def filled(self, samples: list[Sample], source: int) -> dict:
        """Return a row of the samples: `filled_row`, with the number of their dataset."""
        return filled_row(samples, self.prepared.settings.seq_length, self.prepared.pad) | {"source": source}


def filled_row(samples: Sequence[Sample], length: int, pad: int) -> dict[str, torch.Tensor]:
    """Return a row of the samples, each its ids and loss weights, one behind the other, filled up with padding.

    These are the tensors of an item of Rows.
    """
    tokens, labels = (np.full(length, pad, np.int64) for _ in range(2))
    weights, documents = np.zeros(length, np.float32), np.full(length, len(samples), np.int64)
    at = 0
    for document, (ids, own) in enumerate(samples):
        place = slice(at, at + len(ids) - 1)
        tokens[place], labels[place], weights[place] = ids[:-1], ids[1:], own[1:]
        documents[place], at = document, place.stop
    arrays = {"tokens": tokens, "labels": labels, "loss_mask": weights, "documents": documents,
              "real": np.arange(length) < at}
    return {name: torch.from_numpy(each) for name, each in arrays.items()}
