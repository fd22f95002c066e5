"""Jobs of fake ranks one after another in a process: none meets the meshes of another, whose groups are gone."""

import torch
from torch.distributed.tensor import DTensor, Replicate

from megatron_deepseek.parallel.fake_job import fake_job
from megatron_deepseek.parallel.layout import Layout


def test_results_are_on_the_meshes_of_their_own_job():
    """DTensor keeps the results of operators by the meshes of their arguments, of which those of two jobs are equal."""
    for _ in range(2):
        with fake_job(Layout(tp=2, pp=2), 0) as meshes:
            mesh = meshes.tp
            x = DTensor.from_local(torch.ones(4), mesh, [Replicate()], run_check=False)
            assert (x + x).device_mesh is mesh
