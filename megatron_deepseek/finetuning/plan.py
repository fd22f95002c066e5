"""The rows of an epoch: the samples of each dataset, packed apart, so that a row has one source.

Samples that belong together (units.py) are packed as one. Without weights every sample is there once. With weights (w
of --dataset) each dataset is there so often that its number of samples follows its weight, and none is left out: the
one that needs it least is there once, others are repeated.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_deepseek.data.indexed import open_indexed
from megatron_deepseek.finetuning.packing import pack
from megatron_deepseek.finetuning.prepare import Prepared
from megatron_deepseek.finetuning.units import Units


@dataclass(frozen=True)
class EpochPlan:
    """Rows of an epoch in the order of the datasets. Row r holds samples[starts[r]:starts[r + 1]] of sources[r].

    `lengths` has the tokens of the samples of each dataset.
    """

    samples: np.ndarray
    starts: np.ndarray
    sources: np.ndarray
    lengths: tuple[np.ndarray, ...]

    @property
    def num_rows(self) -> int:
        return len(self.sources)

    @cached_property
    def num_tokens(self) -> int:
        """Return the positions of an epoch that are no padding: a sample of n tokens has n - 1 with a label."""
        bounds = np.searchsorted(self.sources, np.arange(len(self.lengths) + 1))
        ends = self.starts[bounds]
        return sum(int(lengths[self.samples[begin:end]].sum(dtype=np.int64)) - int(end - begin)
                   for lengths, begin, end in zip(self.lengths, ends[:-1], ends[1:]))


def batches_of(rows: int, global_batch_size: int) -> float:
    """Return how many global batches so many rows are; the last of them may be a part of one."""
    return rows / global_batch_size


def plan_epoch(prepared: Prepared) -> EpochPlan:
    """Return the rows of an epoch."""
    settings = prepared.settings
    lengths = tuple(np.asarray(open_indexed(prefix, settings.option).lengths) for prefix in prepared.prefixes)
    units = [Units(own, settings, source) for source, own in enumerate(lengths)]
    samples, starts, sources, held = [], [0], [], 0
    for source, drawn in enumerate(_drawn(units, prepared)):
        places = units[source].places[drawn]
        if settings.packing:
            order, ends = pack(places, settings.seq_length, settings.seed)
        else:
            order, ends = slice(None), np.arange(len(places) + 1)
        members, ends = units[source].members(drawn[order], ends)
        samples.append(members)
        starts.append(held + ends[1:])
        sources.append(np.full(len(ends) - 1, source, np.uint16))
        held += len(members)
    return EpochPlan(np.concatenate(samples), np.concatenate([np.atleast_1d(each) for each in starts]),
                     np.concatenate(sources), lengths)


def _drawn(units: list[Units], prepared: Prepared) -> list[np.ndarray]:
    """Return the units of each dataset in an epoch, some of them more than once where there are weights."""
    sizes = [len(each) for each in units]
    if prepared.weights is None:
        return [np.arange(size, dtype=np.uint32) for size in sizes]
    most = max(size / weight for size, weight in zip(sizes, prepared.weights))
    drawn = []
    for source, (size, weight) in enumerate(zip(sizes, prepared.weights)):
        whole, rest = divmod(max(size, round(most * weight)), size)
        chosen = np.random.default_rng((prepared.settings.seed, source)).permutation(size)[:rest]
        drawn.append(np.concatenate([np.tile(np.arange(size), whole), np.sort(chosen)]))
    return drawn
