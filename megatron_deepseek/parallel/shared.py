"""Parameters of more than one pipeline stage: the embedding, at the MTP modules or tied to the head.

Each such stage holds a copy. Copies start equal (initial weights depend on the name alone), their gradients are summed
before the optimizer steps, and one copy is counted and saved.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_deepseek.parallel.mesh import Meshes


@dataclass(frozen=True, eq=False)
class SharedParameter:
    """The copies of one parameter on this rank, in stage order, and the group of the pipeline ranks that hold any.

    `counted_here`: this rank's first copy is the one that norms and counts include.
    """

    name: str
    copies: tuple[nn.Parameter, ...]
    group: dist.ProcessGroup | None
    counted_here: bool

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Give every copy the sum of all copies' gradients; a copy that got none counts as zero.

        A frozen parameter is frozen in every copy, and has nothing to sum.
        """
        if not self.copies or not self.copies[0].requires_grad:
            return
        total = torch.zeros_like(_local(self.copies[0]))
        for copy in self.copies:
            if copy.grad is not None:
                total += _local(copy.grad)
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        for copy in self.copies:
            if copy.grad is None:
                copy.grad = torch.zeros_like(copy)
            _local(copy.grad).copy_(total)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def find_shared(holders: dict[str, Sequence[int]], rank_of_stage: Sequence[int], stages: dict[int, nn.Module],
                meshes: Meshes) -> list[SharedParameter]:
    """Return the parameters with several holders, in the order of `holders`. Every rank of the job calls it.

    `holders` maps a parameter's name to all stages that hold it; `stages` are this rank's.
    """
    shared = []
    for name, holding in holders.items():
        if len(holding) < 2:
            continue
        ranks = sorted({rank_of_stage[s] for s in holding})
        copies = tuple(dict(stages[s].named_parameters())[name] for s in holding if s in stages)
        counted = rank_of_stage[holding[0]] == meshes.rank("pp")
        shared.append(SharedParameter(name, copies, _subgroup(ranks, meshes), counted))
    return shared


def _subgroup(pp_ranks: list[int], meshes: Meshes) -> dist.ProcessGroup | None:
    """Return this rank's group among the ranks with its own dp, cp and tp place and a pipeline rank in `pp_ranks`."""
    if len(pp_ranks) < 2:
        return None
    ranks_of_pp = meshes.dense.mesh.flatten(1).tolist()
    lines = [list(line) for line in zip(*(ranks_of_pp[pp_rank] for pp_rank in pp_ranks))]
    group, _ = dist.new_subgroups_by_enumeration(lines, group_desc="shared_parameters")
    return group
