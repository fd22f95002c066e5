"""The peaks of plans in FP8 against dry runs on a GPU: within 0.6 %, where what a layer's backward makes and frees is a
large part of the peak, of middle ranks of 1F1B with a layer each.
"""

import pytest

from megatron_deepseek.arguments import parse
from megatron_deepseek.arguments.dry_run import DryRun
from megatron_deepseek.dry_run.rank import dry_rank

FP8 = "--data-path x --train-iters 1 --bf16 --fp8-format e4m3 --pipeline-model-parallel-size 4"
V3 = ("--model deepseek-v3 --num-layers 6 --pipeline-model-parallel-layout Et*3|t|t|tmL "
      "--expert-model-parallel-size 32")
DENSE = "--model deepseek-llm-67b --num-layers 4"
RUNS = {
    "SwiGLU": (16, 4, f"{DENSE} --global-batch-size 64 --micro-batch-size 4"),
    "SwiGLU of experts": (128, 64, "--model deepseek-v2-lite --num-layers 4 --expert-model-parallel-size 32 "
                                   "--global-batch-size 256 --micro-batch-size 2"),
    "attention": (128, 64, f"{V3} --global-batch-size 256 --recompute-granularity full --exp-avg-dtype bf16 "
                           "--exp-avg-sq-dtype bf16 --moe-router-topk 4"),
    "tensors": (128, 64, f"{V3} --global-batch-size 64 --tensor-model-parallel-size 2 --sequence-parallel"),
    "context": (128, 64, f"{V3} --global-batch-size 64 --context-parallel-size 2"),
    "rows that arrive": (512, 256, "--model kimi-k2 --num-layers 6 --pipeline-model-parallel-layout Et*3|t|t|tL "
                                   "--expert-model-parallel-size 128 --global-batch-size 1024"),
    "groups of heads, context": (16, 4, f"{DENSE} --global-batch-size 16 --context-parallel-size 2 "
                                        "--micro-batch-size 2"),
}
QUICK = ("SwiGLU", "SwiGLU of experts")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(each, marks=pytest.mark.slow) for each in RUNS
                                            if each not in QUICK)])
def test_a_layer_in_fp8_takes_what_is_planned(name):
    ranks, rank, arguments = RUNS[name]
    found = dry_rank(DryRun(True, False, ranks), parse(f"{FP8} {arguments}".split(), ranks), rank)
    assert found.planned.peak_bytes == pytest.approx(found.timeline.peak.bytes, rel=0.006)
