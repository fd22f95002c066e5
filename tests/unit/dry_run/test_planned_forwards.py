"""What is planned of forwards, act by act, against dry runs: layers with routed experts hold what is sent until results
are back. A step's peak seldom shows it, but where layers run again in their backward.
"""

import pytest
from test_covered_plans import settings_of

from megatron_deepseek.arguments.dry_run import DryRun
from megatron_deepseek.dry_run.rank import dry_rank
from megatron_deepseek.planning.job import Job
from megatron_deepseek.planning.replay import levels
from megatron_deepseek.planning.stage_bytes import arrived, stage_bytes
from megatron_deepseek.planning.state_bytes import standing_states


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
    settings = settings_of(number)
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
