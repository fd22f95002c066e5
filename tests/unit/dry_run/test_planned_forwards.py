"""What is planned of forwards, act by act, against dry runs: layers with routed experts hold what is sent until results
are back. A step's peak seldom shows it, but where layers run again in their backward.
"""

import pytest
from test_covered_plans import settings_of

from megatron_deepseek.arguments import parse
from megatron_deepseek.arguments.dry_run import DryRun
from megatron_deepseek.dry_run.rank import dry_rank
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.replay import levels
from megatron_deepseek.planning.stage_bytes import arrived, stage_bytes
from megatron_deepseek.planning.state_bytes import standing_states
from megatron_deepseek.settings import Settings

MIDDLE_STAGES = (
    "--data-path x --train-iters 1 --model deepseek-v2 --num-layers 9 --moe-layer-freq ([0]*1+[1]*8) "
    "--mtp-num-layers 0 --bf16 --pipeline-model-parallel-size 8 --tensor-model-parallel-size 2 --sequence-parallel "
    "--seq-length 1024 --expert-model-parallel-size 32 --global-batch-size 1024 --moe-router-topk 1 "
    "--recompute-granularity full --exp-avg-sq-dtype bf16 --data-parallel-sharding-strategy optim_grads_params")


@pytest.mark.parametrize("number, pp_rank, within", [
    (65, 0, 0.001),  # slices of experts
    (61, 1, 0.001),  # alltoall
    pytest.param(9, 0, 0.002, marks=pytest.mark.slow),  # slices, and a pipeline
    pytest.param(32, 1, 0.01, marks=pytest.mark.slow),  # allgather
    pytest.param(56, 0, 0.003, marks=pytest.mark.slow),  # grouped
    pytest.param(3, 0, 0.01, marks=pytest.mark.slow),  # attention by blocks, to the host
    pytest.param(23, 1, 0.002, marks=pytest.mark.slow),  # the same, while routed experts are not gathered yet
    pytest.param(1, 0, 0.015, marks=pytest.mark.slow),  # by the layer, masters from the host
], ids=str)
def test_forwards_take_what_is_planned(number, pp_rank, within):
    assert_as_planned(settings_of(number), pp_rank, within)


@pytest.mark.parametrize("pp_rank", [5, pytest.param(6, marks=pytest.mark.slow)])
def test_forwards_behind_a_backward_find_what_it_has_gathered(pp_rank):
    """Of a stage without weights outside of layers it is the last layer's; rank 6 has the last norm."""
    assert_as_planned(parse(MIDDLE_STAGES.split(), 1024), pp_rank, 0.006)


def assert_as_planned(settings: Settings, pp_rank: int, within: float) -> None:
    """Compare each forward of a rank."""
    layout, job = settings.layout, Job(settings)
    found = dry_rank(DryRun(True, False, layout.world_size, micro_batches=job.micro_batches), settings,
                     pp_rank * layout.world_size // layout.pp)
    stages = {stage: stage_bytes(job, stage, job.shapes()).replayed for stage in job.held(pp_rank)}
    acts, standing = job.actions(pp_rank), standing_states(job, pp_rank)
    planned = {f"F{act[0].micro_batch} of stage {act[0].stage}": standing + during
               for act, (during, _) in zip(acts, levels(acts, stages, arrived=arrived(job, pp_rank)))
               if act and act[0].kind == "F"}
    seen = {level.act: level.bytes for level in found.timeline.levels if level.act in planned}
    assert planned and planned == pytest.approx(seen, rel=within)
