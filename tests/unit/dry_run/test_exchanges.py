"""How often the runs of a pair leave the turn to each other, as plans count it, against the turns of a dry run."""

from collections import Counter
from contextlib import nullcontext

import pytest

from megatron_deepseek.arguments import parse
from megatron_deepseek.dry_run.loads import drawn
from megatron_deepseek.dry_run.rank import run_rank
from megatron_deepseek.dry_run.routing import BALANCED
from megatron_deepseek.dry_run.storages import StorageLog
from megatron_deepseek.parallel.micro_batch_overlap import MicroBatchOverlap
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.layer_bytes import layer_bytes

# Rank 1 of the pipeline holds the two stages in the middle, all of whose layers have experts.
TINY = ("--data-path x --train-iters 1 --model tiny --bf16 --seq-length 128 --num-layers 4 --mtp-num-layers 0 "
        "--pipeline-model-parallel-size 2 --pipeline-schedule DualPipeV --overlap-moe-expert-parallel-comm")
RUNS = {
    "all-to-all": (2, ""),
    "two nodes": (2, "--moe-token-dispatcher-type grouped --moe-ranks-per-node 1"),
    "a node": (2, "--moe-token-dispatcher-type grouped --moe-ranks-per-node 2"),
    "nodes of two ranks": (4, "--moe-token-dispatcher-type grouped --moe-ranks-per-node 2"),
    "FP8": (2, "--fp8-format e4m3"),
    "FP8, nodes of two ranks": (4, "--fp8-format e4m3 --moe-token-dispatcher-type grouped --moe-ranks-per-node 2"),
    "layers made again": (2, "--recompute-granularity full"),
}


@pytest.mark.parametrize("name", RUNS)
def test_turns_are_left_as_often_as_planned(name, monkeypatch):
    ep, more = RUNS[name]
    settings = parse(f"{TINY} --expert-model-parallel-size {ep} --global-batch-size {4 * ep} {more}".split(), 2 * ep)
    log, counts = StorageLog(), Counter()
    wait = MicroBatchOverlap.wait

    def counted(overlap, work):
        counts[log.now()] += 1
        wait(overlap, work)

    monkeypatch.setattr(MicroBatchOverlap, "wait", counted)
    run_rank(settings, ep, drawn(settings, BALANCED), log, nullcontext(), gpu=True)
    job, again = Job(settings), "full" in more
    forward, backward = job.exchanges.out + job.exchanges.back, job.exchanges.to_experts + job.exchanges.home
    of_act = {"F": forward, "B": backward + again * forward, "I": backward + again * forward}
    layers = {f"stage {stage}": sum(map(job.model.is_moe_layer, job.layers_of(stage))) for stage in job.held(1)}
    assert counts == {place: of_act[place[0]] * layers[place[-7:]] for place in counts}
    assert {place[0] for place in counts} == set(of_act)
    index = job.layers_of(1)[0]
    assert layer_bytes(job.shapes(), index, job.modes_of(1)[0], True).exchanges == of_act["B"]
