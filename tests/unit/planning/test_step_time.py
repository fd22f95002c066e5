"""Seconds of a step: table 4 of ISCA'25 from its own operations, published orders, and what must hold of any plan."""

import json
from dataclasses import replace

import pytest

from megatron_deepseek.arguments import parse
from megatron_deepseek.planning.engines import MEGATRON, OURS
from megatron_deepseek.planning.gpus import find_gpu
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.operations import means_of, step_of_operations
from megatron_deepseek.planning.stage_time import Scales
from megatron_deepseek.planning.step_time import step_time
from megatron_deepseek.planning.trace import trace

V3 = "--model deepseek-v3 --seq-length 4096 --bf16 --fp8-format e4m3 --moe-router-force-load-balancing " \
     "--data-path any --train-iters 1000000 "
TINY = "--model tiny --data-path any --train-iters 10 --seq-length 64 "


def job_of(arguments, ranks, engine=OURS, per_node=8, **more):
    return Job(parse(arguments.split(), ranks, min(ranks, per_node)), engine, **more)


@pytest.mark.parametrize("sums, optimizer, step", [
    ({"F": 1.13, "B": 1.99, "W": 0.48, "pair": 13.95}, 0.29, 19.926),
    ({"F": 1.13, "B": 1.99, "W": 0.48, "pair": 14.00}, 0.31, 19.946)])
def test_table_4(sums, optimizer, step):
    """V3 on 2,048 H800, PP16, 120 micro-batches (arXiv 2505.09343). Its bubble also has uneven stages and messages."""
    assert step_of_operations("DualPipe", 16, 120, sums) + optimizer == pytest.approx(step, rel=0.07)


def test_means_are_the_tables_operations():
    """facts: a rank does 19.6 forwards, 100.4 pairs, 8.1 whole backwards, 11.5 of inputs and of weights on average."""
    means = means_of("DualPipe", 16, 120, {"F": 1.13, "B": 1.99, "W": 0.48, "pair": 13.95})
    assert {name: round(1e3 * each, 1) for name, each in means.items()} == {
        "F": 57.6, "pair": 139.0, "W": 41.7, "I": 84.1, "B": 125.9}


def b200(arguments):
    return step_time(job_of(V3 + arguments + " --global-batch-size 4096", 256, MEGATRON), find_gpu("b200"))


def test_b200_with_16_pipeline_ranks_is_below_8_of_two_stages():
    """Megatron Bridge: 2,815 and 3,328 tokens a second and GPU, MXFP8; this one is not calibrated."""
    sixteen = b200("--pipeline-model-parallel-size 16 --expert-model-parallel-size 8")
    eight = b200("--pipeline-model-parallel-size 8 --num-virtual-stages-per-pipeline-rank 2 "
                 "--expert-model-parallel-size 32")
    assert sixteen.tokens_per_second_per_gpu < eight.tokens_per_second_per_gpu
    assert sixteen.tokens_per_second_per_gpu == pytest.approx(2815, rel=0.2)
    assert eight.tokens_per_second_per_gpu == pytest.approx(3328, rel=0.2)


def test_a_longer_step_has_a_smaller_bubble():
    """Megatron Bridge, 256 GB300: 6,338 tokens a second and GPU at 4,096 sequences, 6,422 at 15,360."""
    arguments = V3 + ("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 8 "
                      "--expert-model-parallel-size 32 --global-batch-size ")
    short, long = (step_time(job_of(arguments + size, 256, MEGATRON, 72), find_gpu("gb300")) for size in
                   ("1024", "4096"))
    assert long.bubble < short.bubble
    assert 1 < long.tokens_per_second_per_gpu / short.tokens_per_second_per_gpu < 1.1


def test_an_operation_that_takes_longer_makes_the_step_longer():
    job = job_of(TINY + "--pipeline-model-parallel-size 2 --global-batch-size 32", 4)
    gpu = find_gpu("h100")
    plain = step_time(job, gpu)
    assert step_time(job, gpu, Scales(2.0, 2.0)).pipeline_seconds == pytest.approx(2 * plain.pipeline_seconds)
    base = TINY + "--pipeline-model-parallel-size 2 --global-batch-size 32 "
    full = job_of(base + "--recompute-granularity full", 4)
    offloaded = job_of(base + "--cpu-offloading-num-layers 1", 4)
    assert step_time(full, gpu).step_seconds > plain.step_seconds
    assert step_time(offloaded, gpu).step_seconds > plain.step_seconds


def test_rows_of_the_fullest_rank_take_their_time():
    arguments = "--model deepseek-v2-lite --bf16 --data-path any --train-iters 9 --expert-model-parallel-size 8"
    even, uneven = (step_time(job_of(arguments, 8), find_gpu("h100"), imbalance=factor) for factor in (1.0, 2.0))
    assert uneven.step_seconds > 1.05 * even.step_seconds


def test_no_rank_does_two_things_at_once_and_the_parts_are_the_step():
    step = step_time(job_of(TINY + "--pipeline-model-parallel-size 2 --pipeline-schedule DualPipeV "
                            "--num-virtual-stages-per-pipeline-rank 2 --global-batch-size 32", 4), find_gpu("h100"))
    for spans in step.spans:
        assert all(before.end <= after.start + 1e-12 for before, after in zip(spans, spans[1:]))
    assert step.step_seconds == step.pipeline_seconds + step.data_seconds + step.optimizer_seconds
    assert 0 <= step.bubble < 1


@pytest.mark.parametrize("schedule", ["1F1B", "DualPipeV", "ZBVZeroBubble"])
def test_trace_is_chromes(schedule):
    """The trace event format: complete events with ts and dur, metadata, counters; all of it JSON."""
    step = step_time(job_of(TINY + f"--pipeline-model-parallel-size 2 --pipeline-schedule {schedule} "
                            "--global-batch-size 32", 4), find_gpu("h100"))
    found = json.loads(json.dumps(trace(step), allow_nan=False))
    events = found["traceEvents"]
    assert {each["ph"] for each in events} == {"M", "X", "C"}
    whole = [each for each in events if each["ph"] == "X"]
    assert all(isinstance(each["name"], str) and each["ts"] >= 0 and each["dur"] >= 0 for each in whole)
    runs = [each for each in whole if each["cat"] in "FBIW"]
    acts = [act for rank in range(2) for act in step.job.actions(rank)]
    assert len(runs) == sum(map(len, acts))
    assert max(each["ts"] + each["dur"] for each in whole) == pytest.approx(1e6 * step.step_seconds)
    memory = [each["args"]["GiB"] for each in events if each["ph"] == "C" and each["pid"] == 0]
    assert min(memory) > 0 and memory[-1] == min(memory) < max(memory)


def test_the_planned_dualpipe_is_at_most_what_was_published():
    """ISCA'25: 1,542 tokens a second and GPU without MTP. A plan that is not calibrated is within a fifth."""
    job = job_of(V3 + "--mtp-num-layers 0 --pipeline-model-parallel-size 16 --expert-model-parallel-size 64 "
                 "--global-batch-size 15360", 2048, MEGATRON, schedule_name="DualPipe")
    assert step_time(job, find_gpu("h800")).tokens_per_second_per_gpu == pytest.approx(1542, rel=0.2)


def test_gpus_without_a_faster_network_are_slower():
    job = job_of(TINY + "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --global-batch-size 32", 4)
    gpu = find_gpu("h100")
    slow = replace(gpu, scale_up_gb_s=gpu.scale_up_gb_s / 100)
    assert step_time(job, slow).step_seconds > step_time(job, gpu).step_seconds
