"""A dry run of a rank against that rank: every byte that a real step's tensors take, by category, in every act."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from small_models import V3_SMALL

from megatron_deepseek.arguments import parse
from megatron_deepseek.dry_run.rank import run_rank, step, with_dispatchers
from megatron_deepseek.dry_run.storages import StorageLog
from megatron_deepseek.dry_run.timeline import Timeline, timeline
from megatron_deepseek.model.build import build_stages
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.settings import Settings

MODEL = replace(V3_SMALL, num_attention_heads=4, num_hidden_layers=4)


def settings_of(arguments: str, ranks: int) -> Settings:
    text = (f"--model tiny --data-path x --train-iters 1 --micro-batch-size 2 --seq-length 16 "
            f"--moe-router-force-load-balancing --mtp-num-layers 0 {arguments}")
    settings = parse(text.split(), ranks)
    return replace(settings, model=replace(MODEL, num_nextn_predict_layers=settings.model.num_nextn_predict_layers))


class Recording:
    """A layer's dispatcher that keeps what its host reads."""

    def __init__(self, dispatcher, reads: list):
        self.dispatcher, self.reads = dispatcher, reads

    def __getattr__(self, name):
        return getattr(self.dispatcher, name)

    def route(self, experts_TK):
        route = self.dispatcher.route(experts_TK)

        def read():
            self.reads.append(route.read())
            return self.reads[-1]

        return replace(route, read=read)

    def __call__(self, *args):
        return self.dispatcher(*args)


class Replaying(Recording):
    """A layer's dispatcher whose host reads what a recording one's did, in the same order."""

    def route(self, experts_TK):
        route = self.dispatcher.route(experts_TK)
        return replace(route, read=lambda: self.reads.pop(0) if route else None)


def real_step(settings: Settings):
    """Return the timeline of a real step on this rank, and what its host read of each layer."""
    reads: dict[int, list] = {}

    def wrap(dispatcher, index, meshes):
        return Recording(dispatcher, reads.setdefault(index, []))

    def make(config, mine, meshes, *others):
        return with_dispatchers(build_stages(config, mine, meshes, *others), wrap, meshes)

    meshes = build_meshes(settings.layout, torch.device("cpu"))
    with StorageLog().watching() as log:
        kept = step(settings, meshes, log, make)
    del kept
    return timeline(log), reads


def dry_step(settings: Settings, rank: int, reads: dict[int, list]) -> Timeline:
    return timeline(run_rank(settings, rank, lambda dispatcher, index, meshes: Replaying(dispatcher, reads[index])))


@pytest.mark.parametrize("ranks_, arguments", [(1, ""), (2, "--tensor-model-parallel-size 2 --sequence-parallel --bf16")])
def test_equal(ranks, ranks_, arguments):
    settings = settings_of(arguments, ranks_)
    for rank, (real, reads) in enumerate(ranks.run(ranks_, real_step, settings)):
        dry = dry_step(settings, rank, reads)
        for a, b in zip(real.levels, dry.levels):
            if a != b:
                print(rank, a, b)
        import os
        if os.environ.get("DBG"):
            for h in real.largest: print("real", h)
            for h in dry.largest: print("dry", h)
        assert real == dry
