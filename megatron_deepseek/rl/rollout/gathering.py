"""The samples of all replicas, on every rank: tokens at once, and experts some samples at a time, as they are large."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby

import torch.distributed as dist

from megatron_deepseek.rl.samples import Sample

SAMPLES_AT_A_TIME = 64  # of all ranks, whose experts and kept ids travel together
Key = tuple[int, int]  # the number of a group, and that of a sample in it


def gather_samples(own: Mapping[Key, Sample], groups: int) -> list[list[Sample]]:
    """Return the samples that all ranks have, by group. Every rank calls it; a sample is one rank's."""
    small = [(key, replace(sample, experts=None, kept_ids=None)) for key, sample in own.items()]
    samples = dict(sorted(_of_all(small), key=lambda item: item[0]))
    if any(_of_all([any(sample.experts is not None or sample.kept_ids is not None for sample in own.values())])):
        keys = list(samples)
        for begin in range(0, len(keys), SAMPLES_AT_A_TIME):
            some = [(key, own[key].experts, own[key].kept_ids) for key in keys[begin:begin + SAMPLES_AT_A_TIME]
                    if key in own]
            for key, experts, kept_ids in _of_all(some):
                samples[key] = replace(samples[key], experts=experts, kept_ids=kept_ids)
    by_group = {group: [sample for _, sample in items] for group, items in groupby(
        samples.items(), key=lambda item: item[0][0])}
    return [by_group.get(group, []) for group in range(groups)]


def _of_all(own: list) -> list:
    """Return what all ranks have, in their order."""
    told: list = [None] * dist.get_world_size()
    dist.all_gather_object(told, own)
    return [each for of_rank in told for each in of_rank]
