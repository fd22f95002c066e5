"""A job of one process, so that the layers run as they are: their meshes have one rank on every axis."""

import pytest
import torch
import torch.distributed as dist

from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import Meshes, build_meshes


@pytest.fixture(scope="module")
def meshes() -> Meshes:
    """It costs 20 ms; ending it with the module leaves others free to make process groups of their own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_meshes(Layout(), torch.device("cpu"))
    dist.destroy_process_group()
