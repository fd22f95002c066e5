"""The memory of every rank: published numbers, each for its engine, and sums by hand."""

from dataclasses import replace

import pytest

from megatron_deepseek.arguments import parse
from megatron_deepseek.planning.engines import ENGINES, MEGATRON, ZERO3, zero_stage
from megatron_deepseek.planning.gpus import find_gpu
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.memory import FITS, OOM, all_ranks, largest_terms, rank_memory, verdict, worst
from megatron_deepseek.planning.report import plan_memory
from megatron_deepseek.planning.state_bytes import state_parts
from megatron_deepseek.planning.states import state_bytes
from megatron_deepseek.planning.tasks import Task, cache_bytes_of_token
from megatron_deepseek.settings import Settings

GIB = 2**30


def settings(arguments: str, ranks: int, model: str = "deepseek-v3") -> Settings:
    return parse(f"--data-path x --train-iters 1 --bf16 --model {model} {arguments}".split(), ranks)


def job(arguments: str, ranks: int, engine=ENGINES["ours"], model: str = "deepseek-v3") -> Job:
    return Job(settings(arguments, ranks, model), engine)


@pytest.mark.parametrize("stage, published", [(0, 81.5), (1, 40.5), (2, 19.9), (3, 9.7)])
def test_zero_stages_of_memory_analysis(stage, published):
    """arXiv 2502.07846: V3 on 1,024 GPUs, PP16 TP2 EP8 DP32, a middle stage of 4 MoE layers; moments in bf16."""
    planned = job("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 16 --expert-model-parallel-size 8 "
                  "--mtp-num-layers 0 --pipeline-model-parallel-layout Etttt|(tttt|)*14tL --global-batch-size 512",
                  1024, zero_stage(stage, moments=4))
    assert state_parts(planned, 5).device / GIB == pytest.approx(published, rel=0.04)


def test_megatrons_report_of_v3():
    """arXiv 2603.07685: 256 GPUs, PP4 VPP4 EP64 TP1: weights and gradients 36.4 GiB, master weights and moments 32.1.
    Activations 131.0 GiB rest on an inferred count: 15 chunks of 4 MoE layers wait on pipeline rank 2.
    """
    planned = job("--pipeline-model-parallel-size 4 --pipeline-schedule Interleaved1F1B --mtp-num-layers 0 "
                  "--expert-model-parallel-size 64 --pipeline-model-parallel-layout Ettt|(tttt|)*14ttL "
                  "--global-batch-size 4096", 256, MEGATRON)
    states, peak = state_parts(planned, 2), rank_memory(planned, 2).peak
    assert (states.weights.all + states.gradients.all) / GIB == pytest.approx(36.4, rel=0.01)
    assert states.optimizer.all / GIB == pytest.approx(32.1, rel=0.01)
    assert sum(peak.in_flight.values()) == 15 and peak.kept / GIB == pytest.approx(131.0, rel=0.03)


@pytest.mark.parametrize("layout, measured", [
    ("--expert-model-parallel-size 8 --global-batch-size 32", 104.30),
    ("--expert-model-parallel-size 4 --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ett|ttL "
     "--global-batch-size 16", 114.00)])
def test_simumax_measured_v3_cut_to_four_layers(layout, measured):
    """MooreThreads/SimuMax docs/b200: the allocator's peak on 8 B200, one dense layer of four, fused cross-entropy."""
    planned = job(f"--num-layers 4 --moe-layer-freq ([0]*1+[1]*3) --mtp-num-layers 0 {layout}", 8, MEGATRON)
    assert worst(all_ranks(planned)).peak_bytes / GIB == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("ranks, sequence_ranks, batch, offload, measured", [
    (256, 1, 1, False, "OOM"), (256, 4, 1, False, "OOM"), (256, 4, 1, True, 25), (256, 4, 2, True, 74),
    (256, 1, 1, True, 30), (256, 8, 1, True, 32), (256, 1, 2, True, "OOM"), (128, 8, 2, True, 30)])
def test_science_ones_verdicts(ranks, sequence_ranks, batch, offload, measured):
    """Fine-tuning V3 at 32K under ZeRO-3 on H100 of 80 GB: which rows ran. The numbers themselves do not fall with the
    tokens of a GPU, so they are not compared.
    """
    host = "--optimizer-cpu-offload --cpu-offloading-num-layers 61" if offload else ""
    planned = job(f"--mtp-num-layers 0 --seq-length 32768 --context-parallel-size {sequence_ranks} --micro-batch-size "
                  f"{batch} --recompute-granularity full {host}", ranks, ZERO3)
    assert (verdict(all_ranks(planned), find_gpu("h100")) == OOM) == (measured == "OOM")


V3 = ("--pipeline-model-parallel-size 16 --pipeline-schedule DualPipeV --expert-model-parallel-size 64 "
      "--global-batch-size 15360")


@pytest.mark.parametrize("arguments, ranks", [
    (V3, 2048), (f"{V3} --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16", 1024), (f"{V3} --optimizer-cpu-offload", 2048),
    ("--tensor-model-parallel-size 4 --expert-model-parallel-size 8", 64)])
def test_states_are_those_of_explain_layout(arguments, ranks):
    """Two ways to the same numbers; in planning/states.py they serve --explain-layout."""
    planned, said = job(arguments, ranks), state_bytes(settings(arguments, ranks))
    parts = state_parts(planned, said.pp_rank)
    assert (parts.device, parts.host) == pytest.approx((said.device, said.host), rel=1e-6)


def test_every_part_is_in_the_largest_terms():
    planned = job(V3 + " --recompute-granularity selective --cpu-offloading-num-layers 1", 2048)
    for memory in all_ranks(planned):
        assert sum(size for _, size in largest_terms(planned, memory)) == pytest.approx(memory.peak_bytes, rel=1e-9)


def test_receive_buffers_grow_with_the_micro_batches():
    """torch's pipeline stages have one for each, of activations and of gradients: V3, 120 x 56 MiB x 4."""
    few, many = (rank_memory(job(V3.replace("15360", str(size)), 2048), 5).receive for size in (4096, 15360))
    assert many == 120 * 4096 * 7168 * 2 * 4 and few * 120 == many * 32


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
