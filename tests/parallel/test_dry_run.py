"""A dry run of a rank against that rank in a job over gloo: every byte that the tensors of a step take, by category and
in every act, and every collective.

The routers of a dry run compute nothing, so its dispatchers are given the counts that the real ones read.
"""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from small_models import V3_SMALL

from megatron_deepseek.arguments import parse
from megatron_deepseek.dry_run.loads import with_dispatchers
from megatron_deepseek.dry_run.rank import run_rank, step
from megatron_deepseek.dry_run.storages import StorageLog
from megatron_deepseek.dry_run.timeline import Level, bytes_over_time
from megatron_deepseek.model.build import build_stages
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.parallel.recorded_collectives import Collective, RecordedCollectives
from megatron_deepseek.settings import Settings

MODEL = replace(V3_SMALL, num_attention_heads=4, num_hidden_layers=4)


def settings_of(arguments: str, ranks: int) -> Settings:
    text = (f"--model tiny --data-path x --train-iters 1 --micro-batch-size 2 --seq-length 16 --mtp-num-layers 0 "
            f"{arguments}")
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
        return with_dispatchers(build_stages(config, mine, meshes, *others), wrap, meshes)

    def wrap(dispatcher, index, meshes):
        return Recording(dispatcher, reads.setdefault(index, []))

    meshes, log = build_meshes(settings.layout, torch.device("cpu")), StorageLog()
    with log.watching(), RecordedCollectives(log.now) as calls:
        kept = step(settings, meshes, log, make)
    del kept
    return seen(log, calls, reads)


def dry_step(settings: Settings, rank: int, reads: dict[int, list]) -> Seen:
    log, left = StorageLog(), {index: list(counts) for index, counts in reads.items()}
    calls = RecordedCollectives(log.now)
    run_rank(settings, rank, lambda dispatcher, index, meshes: Replaying(dispatcher, left[index]), log, calls)
    assert not any(left.values())
    return seen(log, calls, reads)


LAYOUTS = {
    "one rank": (1, "--bf16 --global-batch-size 4 --recompute-granularity full --mtp-num-layers 1"),
    "pipeline, experts": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --bf16 "
                             "--mtp-num-layers 1 --global-batch-size 16 --pipeline-schedule ZBVZeroBubble"),
    "tensors, two micro-batches": (2, "--tensor-model-parallel-size 2 --sequence-parallel --global-batch-size 4 "
                                      "--recompute-granularity full"),
}
SLOW = {
    "one rank, FP8": (1, "--bf16 --fp8-format e4m3 --global-batch-size 4 --recompute-granularity selective"),
    "context ring": (2, "--context-parallel-size 2 --bf16 --mtp-num-layers 1"),
    "context gathered": (2, "--context-parallel-size 2 --cp-comm-type allgather --bf16 "
                            "--recompute-granularity selective"),
    "all-gather, ZeRO-3": (2, "--expert-model-parallel-size 2 --bf16 --moe-token-dispatcher-type allgather "
                              "--data-parallel-sharding-strategy optim_grads_params --global-batch-size 8"),
    "two levels": (4, "--expert-model-parallel-size 4 --moe-token-dispatcher-type grouped --moe-ranks-per-node 2"),
    "sliced experts": (2, "--expert-tensor-parallel-size 2 --bf16"),
    "pairs that overlap": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --global-batch-size 16 "
                              "--pipeline-schedule DualPipeV --overlap-moe-expert-parallel-comm --bf16"),
}


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_dry_run_takes_and_sends_what_the_rank_does(ranks, name):
    """Ranks that communicate: gloo's threads free tensors of collectives earlier or later, in each run anew."""
    number, arguments = (LAYOUTS | SLOW)[name]
    settings = settings_of(arguments, number)
    for rank, real in enumerate(ranks.run(number, real_step, settings)):
        dry = dry_step(settings, rank, real.reads)
        assert [each.act for each in dry.levels] == [each.act for each in real.levels]
        assert dry.collectives == real.collectives
        if number == 1:
            assert dry.levels == real.levels
        assert [each.bytes for each in dry.levels] == pytest.approx([each.bytes for each in real.levels], rel=0.01)
