"""The layout of a job and its process groups: one immutable object that is passed to whatever communicates.

Two meshes cover the same ranks (parallel folding, arXiv 2504.14960):

  dense mesh   (pp, dp, cp, tp)      attention, dense MLPs, embedding, head
  expert mesh  (pp, edp, ep, etp)    routed experts; dp * cp * tp == edp * ep * etp

The last axis changes fastest, so TP ranks are neighbours; that is Megatron's default order (tp-cp-ep-dp-pp).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_deepseek.parallel.layout import Layout


@dataclass(frozen=True, eq=False)
class Meshes:
    """The process groups of a layout on this rank. Build them with `build_meshes`.

    `dense` is (pp, dp, cp, tp), `expert` is (pp, edp, ep, etp). The groups below sum over these axes:

      dense_fsdp   dp x cp       gradients of dense parameters (FSDP)
      expert_fsdp  edp           gradients of routed experts (FSDP)
      sequence     cp x tp       counts of one sequence, whose tokens these ranks share
      stage        dp x cp x tp  counts of all tokens by one stage's routers
      tp, ep, etp                partial sums inside a layer (tensor.py, expert.py, expert_tensor.py)
    """

    layout: Layout
    device: torch.device
    dense: DeviceMesh
    expert: DeviceMesh
    dense_fsdp: DeviceMesh
    sequence: DeviceMesh
    stage: DeviceMesh

    @property
    def tp(self) -> DeviceMesh:
        return self.dense["tp"]

    @property
    def cp(self) -> DeviceMesh:
        return self.dense["cp"]

    @property
    def ep(self) -> DeviceMesh:
        return self.expert["ep"]

    @property
    def experts(self) -> DeviceMesh:
        """Return the mesh (ep, etp) of the ranks that share one copy of a stage's experts."""
        return self.expert["ep", "etp"]

    @property
    def expert_fsdp(self) -> DeviceMesh:
        return self.expert["edp"]

    def rank(self, axis: str) -> int:
        """Return this rank's coordinate on `axis` of the dense mesh, or of the expert mesh for edp, ep and etp."""
        mesh = self.expert if axis in ("edp", "ep", "etp") else self.dense
        return mesh.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        mesh = self.expert if axis in ("edp", "ep", "etp") else self.dense
        return mesh.get_group(axis)


def build_meshes(layout: Layout, device: torch.device) -> Meshes:
    """Create every process group of `layout`. All ranks call it, in the same order of layouts.

    Raise ValueError if the job's world size is not the layout's.
    """
    if dist.get_world_size() != layout.world_size:
        raise ValueError(f"the layout needs {layout.world_size} ranks, the job has {dist.get_world_size()}")
    dense = init_device_mesh(device.type, (layout.pp, layout.dp, layout.cp, layout.tp),
                             mesh_dim_names=("pp", "dp", "cp", "tp"))
    expert = init_device_mesh(device.type, (layout.pp, layout.edp, layout.ep, layout.etp),
                              mesh_dim_names=("pp", "edp", "ep", "etp"))
    dense_fsdp = dense["dp", "cp"]._flatten("dp_cp")
    sequence = dense["cp", "tp"]._flatten("cp_tp")
    stage = dense["dp", "cp", "tp"]._flatten("dp_cp_tp")
    return Meshes(layout, device, dense, expert, dense_fsdp, sequence, stage)
