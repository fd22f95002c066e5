"""Every rank's initial shards are the very slices of the whole that its places in the meshes say, bit for bit.

The ranks are torch's `fake` ones: they form meshes and shards without communicating. torch caches what it computes for
a mesh by the mesh's shape, so each rank is a fresh process, forked from one that has done the imports.
"""

import os
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from forked import run_script
from small_models import V3_SMALL, whole_stage

from megatron_deepseek.model.build import BuildOptions, Precision, build_stages
from megatron_deepseek.model.init import normal
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import Meshes, build_meshes

# widths that do not divide evenly over the data ranks: shards differ in size, and some are empty
CONFIG = replace(V3_SMALL, num_nextn_predict_layers=1, hidden_size=20, intermediate_size=28, q_lora_rank=9,
                 kv_lora_rank=7, n_routed_experts=12)
SEED = 5
LAYOUTS = (Layout(dp=4), Layout(tp=2, dp=3, ep=3, sequence_parallel=True))


def test_shards_are_slices_of_the_whole(tmp_path):
    script, out, errors = (tmp_path / name for name in ("check.py", "out", "errors"))
    script.write_text(f"import sys\nsys.path[:] = {sys.path!r}\nimport {__name__} as here\nsys.exit(here.main())\n")
    assert run_script([str(script)], out, errors) == 0, errors.read_text()


def expected_shard(name: str, shape: torch.Size, meshes: Meshes) -> torch.Tensor:
    """The whole parameter, cut over TP (or EP) along the dimension that its name says, then over data along rows."""
    whole = (normal(torch.arange(shape.numel()), SEED, name) * CONFIG.initializer_range).view(shape)
    columns = ("q_b_proj", "kv_b_proj", "lm_head", "embed_tokens", "gate_proj", "up_proj")
    outer, inner, dim = meshes.tp, meshes.dense_fsdp, None
    if ".mlp.experts." in name:
        outer, inner, dim = meshes.ep, meshes.expert_fsdp, 0
    elif any(f"{part}.weight" in name for part in columns):
        dim = 0
    elif any(f"{part}.weight" in name for part in ("o_proj", "down_proj")):
        dim = 1
    if dim is not None:
        whole = whole.chunk(outer.size(), dim)[outer.get_local_rank()]
    parts, place = whole.chunk(inner.size(), 0), inner.get_local_rank()
    return parts[place] if place < len(parts) else whole[:0]


def check_rank(layout: Layout, rank: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    meshes = build_meshes(layout, torch.device("cpu"))
    (stage,) = build_stages(CONFIG, [whole_stage(CONFIG)], meshes, 4,
                            BuildOptions(seed=SEED, precision=Precision(torch.float64)))
    checked = 0
    for name, parameter in stage.named_parameters():
        local = parameter.to_local()
        if name.endswith("norm.weight"):
            assert (local == 1).all(), (rank, name)
        else:
            assert torch.equal(local, expected_shard(name, parameter.shape, meshes)), (rank, name)
            checked += 1
    assert checked > 20


def main() -> int:
    """Exit status 1 if any rank's differs; its traceback is on stderr."""
    children = []
    for layout in LAYOUTS:
        for rank in range(layout.world_size):
            children.append(os.fork())
            if children[-1] == 0:
                check_rank(layout, rank)
                os._exit(0)  # nothing to tidy up, and interpreters are slow to leave
    return max([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])

