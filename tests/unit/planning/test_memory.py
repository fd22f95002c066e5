"""The memory of every rank: published numbers, each for its engine, and sums by hand."""

from dataclasses import replace

import pytest

from megatron_deepseek.arguments import parse
from megatron_deepseek.cli.plan_options import settings_of
from megatron_deepseek.planning.anchors import ANCHORS, SCIENCE_ONE, science_job
from megatron_deepseek.planning.engines import ENGINES
from megatron_deepseek.planning.gpus import find_gpu
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.memory import FITS, OOM, all_ranks, largest_terms, rank_memory, verdict, worst
from megatron_deepseek.planning.report import plan_memory
from megatron_deepseek.planning.stage_bytes import arrived
from megatron_deepseek.planning.state_bytes import Divided, state_parts
from megatron_deepseek.planning.tasks import Task, cache_bytes_of_token
from megatron_deepseek.settings import Settings

GIB = 2**30
STATE = 4096 * 7168 * 2  # bytes that a stage of V3 passes on in bfloat16


def settings(arguments: str, ranks: int, model: str = "deepseek-v3") -> Settings:
    return parse(f"--data-path x --train-iters 1 --bf16 --model {model} {arguments}".split(), ranks)


def job(arguments: str, ranks: int, engine=ENGINES["ours"], model: str = "deepseek-v3") -> Job:
    return Job(settings(arguments, ranks, model), engine)


@pytest.mark.parametrize("anchor", ANCHORS, ids=lambda anchor: anchor.what)
def test_published_numbers(anchor):
    """Four ZeRO stages of arXiv 2502.07846, Megatron's report of V3, and two peaks that SimuMax measured."""
    assert anchor.calculated(settings_of) == pytest.approx(anchor.published, rel=anchor.within)


def test_megatrons_activations_rest_on_fifteen_chunks():
    """An inferred count: pipeline rank 2 of PP4 VPP4 keeps as many, of 4 MoE layers each."""
    anchor = next(each for each in ANCHORS if "activations" in each.what)
    planned = Job(settings_of(anchor.arguments, anchor.ranks), anchor.engine)
    assert sum(rank_memory(planned, 2).peak.in_flight.values()) == 15


@pytest.mark.parametrize("row", SCIENCE_ONE)
def test_science_ones_verdicts(row):
    """Fine-tuning V3 at 32K under ZeRO-3 on H100 of 80 GB: which rows ran. The numbers themselves do not grow with the
    tokens of a GPU, so they are not compared.
    """
    *job_of_row, seen = row
    assert (verdict(all_ranks(science_job(settings_of, *job_of_row)), find_gpu("h100")) == OOM) == (seen is None)


V3 = ("--pipeline-model-parallel-size 16 --pipeline-schedule DualPipeV --expert-model-parallel-size 64 "
      "--global-batch-size 15360")


def test_weights_that_are_gathered_by_the_layer():
    """Two layers at a time instead of four, of one only the routed experts, and sums of gradients still whole. Where
    weight gradients are made apart, all of them.
    """
    by_layer = "--data-parallel-sharding-strategy optim_grads_params"
    for schedule, dense, experts in (("1F1B", 2, 4), ("DualPipeV", 1, 1)):
        plain = V3.replace("DualPipeV", schedule)
        once, divided = (state_parts(job(f"{plain} {more}", 2048), 5) for more in ("", by_layer))
        assert divided.gathered == Divided(once.gathered.dense / dense, once.gathered.experts / experts)
        assert divided.gradients == once.gradients


def test_every_part_is_in_the_largest_terms():
    planned = job(V3 + " --recompute-granularity selective --cpu-offloading-num-layers 1", 2048)
    for memory in all_ranks(planned):
        assert sum(size for _, size in largest_terms(planned, memory)) == pytest.approx(memory.peak_bytes, rel=1e-9)


def test_what_has_arrived_does_not_grow_with_the_micro_batches():
    """V3 under DualPipeV: at the peak three hidden states and gradients are there, 56 MiB each, and while an act runs
    never more than two of a kind for a stage, while torch's own stages keep four for each of 120 micro-batches.
    """
    few, many = (job(V3.replace("15360", str(size)), 2048) for size in (4096, 15360))
    assert rank_memory(few, 5).receive == rank_memory(many, 5).receive == 3 * STATE
    most = [max(counts) for counts in zip(*(sum(of_act, ()) for of_act in arrived(many, 5)))]
    assert most == [1, 2, 1, 1]


def test_less_is_kept_the_more_is_made_again():
    ladder = ["", "--recompute-granularity selective --recompute-modules layernorm",
              "--recompute-granularity selective", "--recompute-granularity full"]
    planned = [rank_memory(job(f"{V3} {arguments}", 2048), 5).peak.kept for arguments in ladder]
    assert planned == sorted(planned, reverse=True) and planned[-1] < planned[0] / 20


def test_weight_gradients_that_wait_make_the_last_rank_fullest_under_full_recomputation():
    """DualPipeV's cool-down runs p backwards before their W on the last rank (MindSpeed's pull request 2154)."""
    ranks = all_ranks(job(f"{V3} --recompute-granularity full", 2048))
    assert worst(ranks).pp_rank == 15 and ranks[15].peak.waiting > 10 * ranks[15].peak.kept


def test_imbalance_adds_rows_of_experts_alone():
    plan = plan_memory(job(V3, 2048), find_gpu("h800"))
    assert [*plan.uneven] == [1.25, 2.0]
    peaks = [worst(ranks).peak_bytes for ranks in (plan.ranks, *plan.uneven.values())]
    assert peaks == sorted(peaks) and peaks[2] - peaks[0] == pytest.approx(4 * (peaks[1] - peaks[0]), rel=0.05)
    bounded = plan_memory(job(f"{V3} --moe-expert-capacity-factor 1.5", 2048), find_gpu("h800")).uneven
    assert peaks[1] == worst(bounded[1.25]).peak_bytes < worst(bounded[2.0]).peak_bytes < peaks[2]
    forced = plan_memory(job(f"{V3} --moe-router-force-load-balancing", 2048), find_gpu("h800"))
    assert not forced.uneven and not plan_memory(job("", 1, model="tiny"), find_gpu("h20")).uneven


def test_verdicts():
    planned = job("", 1, model="tiny")
    memory = all_ranks(planned)
    gpu = find_gpu("a100")
    assert verdict(memory, gpu) == FITS
    assert verdict(memory, gpu, memory[0].low * 1.001) == "tight" and verdict(memory, gpu, memory[0].low * 0.99) == OOM


@pytest.mark.parametrize("task", ["lora", "qlora", "serve", "grpo"])
def test_tasks(task):
    planned = job("--expert-model-parallel-size 8 --recompute-granularity full", 8, model="deepseek-v2-lite")
    whole = worst(plan_memory(planned, find_gpu("h100")).ranks)
    other = worst(plan_memory(planned, find_gpu("h100"), task=Task(task, users=10, context=1000)).ranks)
    assert (other.peak_bytes > whole.peak_bytes) == (task == "grpo")
    assert other.states.device < whole.states.device or task == "grpo"


def test_the_cache_of_v3_is_seventy_kilobytes_a_token():
    """arXiv 2505.09343, table 1: 70.272 KB."""
    planned = job("", 1)
    assert cache_bytes_of_token(planned.model) == 70272
    served = plan_memory(job("--expert-model-parallel-size 16 --mtp-num-layers 0", 16), find_gpu("h200"),
                         task=Task("serve", users=16, context=1000)).ranks[0]
    assert served.extra == {"cache": 70272 * 1000} and not served.states.gradients.all


def test_a_mode_for_every_layer():
    """What a search chooses: one layer recomputed wholly keeps its input alone."""
    planned = job(V3, 2048)
    modes = tuple(planned.modes_of(stage) for stage in range(len(planned.stages)))
    changed = tuple(tuple(replace(mode, full=stage == 5 and number == 0) for number, mode in enumerate(of_stage))
                    for stage, of_stage in enumerate(modes))
    before, after = (rank_memory(replace(planned, layer_modes=each), 5).peak.kept for each in (modes, changed))
    assert after < before
