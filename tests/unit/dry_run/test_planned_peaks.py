"""The peaks that tools/plan.py memory calculates, against dry runs on a GPU: within 3 %, for layers as large as
V3's, in layouts and schedules of all kinds.
"""

import pytest

from megatron_deepseek.arguments import parse
from megatron_deepseek.arguments.dry_run import DryRun
from megatron_deepseek.dry_run.rank import dry_rank

V3 = "--data-path x --train-iters 1 --model deepseek-v3 --bf16"
RUNS = {
    "tensors": (64, 0, "--num-layers 4 --tensor-model-parallel-size 4 --sequence-parallel "
                       "--expert-model-parallel-size 8 --global-batch-size 48"),
    "1F1B, FP8": (64, 24, "--num-layers 16 --fp8-format e4m3 --pipeline-model-parallel-size 8 "
                          "--expert-model-parallel-size 8 --global-batch-size 128"),
    "the head alone": (64, 56, "--num-layers 16 --fp8-format e4m3 --pipeline-model-parallel-size 8 "
                               "--expert-model-parallel-size 8 --global-batch-size 128"),
    "DualPipeV, modules recomputed": (64, 56, "--num-layers 32 --pipeline-model-parallel-size 8 --pipeline-schedule "
                                              "DualPipeV --expert-model-parallel-size 8 --global-batch-size 128 "
                                              "--recompute-granularity selective"),
    "V3 itself, layers recomputed": (2048, 1920, "--fp8-format e4m3 --pipeline-model-parallel-size 16 "
                                                 "--pipeline-schedule DualPipeV --expert-model-parallel-size 64 "
                                                 "--global-batch-size 15360 --recompute-granularity full"),
    "DualPipeV, runs that take turns, by the layer": (
        32, 8, "--num-layers 16 --pipeline-model-parallel-size 4 --pipeline-schedule DualPipeV "
               "--overlap-moe-expert-parallel-comm --expert-model-parallel-size 8 --global-batch-size 64 "
               "--data-parallel-sharding-strategy optim_grads_params"),
    "context ring": (32, 0, "--num-layers 4 --pipeline-model-parallel-size 2 --context-parallel-size 2 "
                            "--expert-model-parallel-size 8 --global-batch-size 32"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_what_is_planned_is_what_the_code_takes(name):
    ranks, rank, arguments = RUNS[name]
    found = dry_rank(DryRun(True, False, ranks), parse(f"{V3} {arguments}".split(), ranks), rank)
    assert found.planned.peak_bytes == pytest.approx(found.timeline.peak.bytes, rel=0.03)
