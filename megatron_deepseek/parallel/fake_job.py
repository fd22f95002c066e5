"""A job of ranks that do not exist: one process stands for any rank of a layout, and no byte leaves it.

torch's `fake` process group returns at once from every collective and leaves its results as they are. So groups, meshes
and shards are those of the rank, and numbers are not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import Meshes, build_meshes
from megatron_deepseek.torch_private import FakeStore, _clear_sharding_prop_cache


@contextmanager
def fake_job(layout: Layout, rank: int) -> Iterator[Meshes]:
    """Be rank number `rank` of `layout` for a `with` block, and yield its meshes, whose device is the CPU.

    DTensor remembers what operators gave for equal meshes, with the meshes themselves. Those of a job that is over have
    no groups any more.
    """
    assert not dist.is_initialized(), "a job of fake ranks is made outside of jobs"
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        yield build_meshes(layout, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()
