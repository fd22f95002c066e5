"""A step of a rank with numbers, and a dry run of the same rank, as they are compared: bytes, collectives, routes.

The routers of a dry run compute nothing, so its dispatchers are given the counts that the real ones read.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from random_base import RandomBase
from settled_gloo import SettledGloo

from megatron_deepseek.checkpoint.job.base_weights import fill_held
from megatron_deepseek.dry_run.loads import with_dispatchers
from megatron_deepseek.dry_run.rank import objective_of, run_rank, step
from megatron_deepseek.dry_run.storages import StorageLog
from megatron_deepseek.dry_run.timeline import Level, bytes_over_time
from megatron_deepseek.model.build import build_stages
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.parallel.recorded_collectives import Collective, RecordedCollectives
from megatron_deepseek.settings import Settings


class Recording:
    """A layer's dispatcher that keeps what its host reads."""

    def __init__(self, dispatcher, reads: list):
        self.dispatcher, self.reads = dispatcher, reads

    def __getattr__(self, name):
        return getattr(self.dispatcher, name)

    def route(self, experts_TK):
        route = self.dispatcher.route(experts_TK)
        return replace(route, read=partial(self._keep, route.read))

    def _keep(self, read):
        self.reads.append(read())
        return self.reads[-1]

    def __call__(self, *args):
        return self.dispatcher(*args)


class Replaying(Recording):
    """A layer's dispatcher whose host reads what a recording one's did, in the same order."""

    def _keep(self, read):
        return self.reads.pop(0)


@dataclass
class Seen:
    """The fullest moments of a step from the first act on, its collectives, and what the host read of each layer."""

    levels: list[Level]
    collectives: list[Collective]
    reads: dict[int, list]


def seen(log: StorageLog, calls: RecordedCollectives, reads: dict) -> Seen:
    in_acts = [each for each in calls.calls if "first act" not in each.place]
    return Seen(list(bytes_over_time(log).levels[1:]), in_acts, reads)


def real_step(settings: Settings) -> Seen:
    """A step of this rank on tensors with numbers."""
    reads: dict[int, list] = {}

    def make(config, mine, meshes, *others):
        stages = build_stages(config, mine, meshes, *others)
        fill_held(stages, RandomBase(config, 0.1), meshes.device)
        return with_dispatchers(stages, wrap, meshes)

    def wrap(dispatcher, index, meshes):
        return Recording(dispatcher, reads.setdefault(index, []))

    meshes, log = build_meshes(settings.layout, torch.device("cpu")), StorageLog()
    with SettledGloo(), log.watching(), RecordedCollectives(log.now) as calls:
        kept = step(settings, meshes, log, make, objective_of(settings))
    del kept
    return seen(log, calls, reads)


def dry_step(settings: Settings, rank: int, reads: dict[int, list]) -> Seen:
    log, left = StorageLog(), {index: list(counts) for index, counts in reads.items()}
    calls = RecordedCollectives(log.now)
    run_rank(settings, rank, lambda dispatcher, index, meshes: Replaying(dispatcher, left[index]), log, calls,
             objective_of(settings))
    assert not any(left.values())
    return seen(log, calls, reads)
