"""What layouts, meshes, shards and devices refuse, for those who come by another road than the command line."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from megatron_deepseek.parallel.layout import Layout, nodes_divide
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.parallel.start import choose_device
from megatron_deepseek.parallel.tensor import sharded_parameter


@pytest.mark.parametrize("sizes, words", [
    (dict(tp=0), "tp is 0"), (dict(dp=2, etp=-1), "etp is -1"),
    (dict(dp=2, ep=4), "ep 4 x etp 1 does not divide the 2 ranks of a stage"),
    (dict(dp=2, tp=2, ep=4, etp=2), "ep 4 x etp 2 does not divide the 4 ranks"),
    (dict(pp=4, ep=4), "does not divide the 1 ranks of a stage")])
def test_impossible_layouts(sizes, words):
    with pytest.raises(ValueError, match=words):
        Layout(**sizes)


def test_ranks_of_a_layout():
    """Experts fold over data, context and tensor ranks, not over stages."""
    layout = Layout(dp=2, pp=3, tp=4, cp=5, ep=10, etp=2)
    assert (layout.world_size, layout.edp) == (120, 2)
    assert Layout(dp=4, cp=2, ep=8).edp == 1


@pytest.mark.parametrize("ep, etp, ranks_per_node, divides", [
    (4, 1, 8, True), (4, 2, 4, True), (4, 2, 3, False), (8, 1, 3, False), (2, 4, 2, False), (4, 3, 6, True)])
def test_nodes_and_expert_groups(ep, etp, ranks_per_node, divides):
    assert nodes_divide(ep, etp, ranks_per_node) is divides


def test_a_job_of_another_size(meshes):
    with pytest.raises(ValueError, match="the layout needs 2 ranks, the job has 1"):
        build_meshes(Layout(dp=2), torch.device("cpu"))


def test_shards_are_equal():
    mesh = SimpleNamespace(size=lambda axis=None: 2, mesh_dim_names=("tp",))
    with pytest.raises(ValueError, match=r"dimension 1 of a weight of shape \(4, 7\) .* the 2 ranks of tp"):
        sharded_parameter((4, 7), mesh, Shard(1))
    alone = SimpleNamespace(size=lambda axis=None: 1, mesh_dim_names=("tp",))
    assert sharded_parameter((4, 7), alone, Replicate()).shape == (4, 7)


def test_a_rank_has_a_gpu_of_its_own_or_the_job_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert choose_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 ranks on a node with 2 GPUs"):
        choose_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == torch.device("cpu")
