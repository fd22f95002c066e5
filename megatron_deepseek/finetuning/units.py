"""Units of packing: which samples of a dataset always share a row.

A conversation is a unit by itself. The two sides of a pair, neighbours in the dataset, are one. Labelled answers, good
or bad ones, are put together two by two at random, drawn from the seed: KTO estimates its KL term from the answer to
one question behind the other question, and two answers to the same question, which often stand side by side in files,
would not do for that. If their number is odd, the last one is a unit by itself.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_deepseek.finetuning.settings import LABELLED, DataSettings


@dataclass(frozen=True)
class Units:
    """The units of a dataset whose samples have so many tokens each; `source` is its number in the blend."""

    lengths: np.ndarray
    settings: DataSettings
    source: int

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.settings.together)

    @cached_property
    def order(self) -> np.ndarray | None:
        """Return the samples in the order in which they form units, None for that of the dataset."""
        if self.settings.kind != LABELLED:
            return None
        return np.random.default_rng((self.settings.seed, self.source, len(self.lengths))).permutation(
            len(self.lengths))

    @cached_property
    def places(self) -> np.ndarray:
        """Return how many places of a row each unit takes: a sample of n tokens takes n - 1."""
        own = self.lengths - 1
        if self.settings.together == 1:
            return own
        ordered = own if self.order is None else own[self.order]
        return np.add.reduceat(ordered, np.arange(0, len(own), self.settings.together))

    def members(self, units: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the samples of `units`, uint32, and where among them rows begin that begin at the units `starts`."""
        together = self.settings.together
        if together == 1:
            return units.astype(np.uint32, copy=False), starts
        members = units.astype(np.int64)[:, None] * together + np.arange(together)
        there = members < len(self.lengths)
        samples = members[there] if self.order is None else self.order[members[there]]
        return samples.astype(np.uint32), np.concatenate([[0], np.cumsum(there.sum(1))])[starts]

    @cached_property
    def partners(self) -> np.ndarray:
        """Return the other sample of each sample's unit, -1 where there is none; for units of two."""
        order = np.arange(len(self.lengths)) if self.order is None else self.order
        other = np.arange(len(order)) ^ 1
        partners = np.full(len(order), -1)
        there = other < len(order)
        partners[order[there]] = order[other[there]]
        return partners
