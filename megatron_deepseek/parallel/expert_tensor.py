"""Expert tensor parallelism: the ranks of an etp group hold slices of the same experts.

Each rank was sent rows of its own. All ranks compute on everyone's rows and make a partial sum over their slice of the
experts' width; the sums return to the ranks that the rows came from:

    rows of each rank, padded to the longest   all-gather       / backward reduce-scatter
    sorted by expert, the slices of gate, up and down
    partial sums                               reduce-scatter   / backward all-gather

The collectives are around the experts, not around dispatch, so that between expert ranks nothing is sent twice.

Shapes: R rows of this rank, M of the longest, G = etp*M gathered, r ranks of the group, e local experts, H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from megatron_deepseek.device import send
from megatron_deepseek.ops.copies import copy_keys, copy_rows, sort_choices, sum_copies
from megatron_deepseek.parallel.collectives import all_gather, gather_sum, scatter_sum
from megatron_deepseek.parallel.nodes import CommunicationCounter

# Maps rows sorted by expert, with the number of rows of each, and the rows' keys if any, to rows of the same shape.
ExpertMLP = Callable[[torch.Tensor, list[int], torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True, eq=False)
class ExpertTensorParallel:
    """`mesh` is (ep, etp): experts are divided over the first axis, each expert over the second."""

    mesh: DeviceMesh
    counter: CommunicationCounter

    def counts(self, counts_e: torch.Tensor) -> torch.Tensor:
        """Return the counts of every rank's rows for the local experts, [r, e], given those of this rank's."""
        group = self.mesh.get_group("etp")
        return counts_e.unsqueeze(0) if group.size() == 1 else all_gather(counts_e.unsqueeze(0), 0, group)

    def __call__(self, rows_RH: torch.Tensor, counts_re: list[list[int]], mlp: ExpertMLP,
                 keys_R: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the whole experts make of `rows_RH`, [R, H]. `counts_re` is what `counts` returned.

        `mlp` uses this rank's slices of the experts; its result is a partial sum.
        """
        group = self.mesh.get_group("etp")
        if group.size() == 1:
            return mlp(rows_RH, *counts_re, keys_R)
        longest = max(map(sum, counts_re))
        of_rank = _expert_of_row(send(counts_re, rows_RH.device), longest)
        counts_e = [sum(counts) for counts in zip(*counts_re)]
        copies = sort_choices(of_rank, len(counts_e)).cut(counts_e)
        keys_G = None
        if keys_R is not None:
            padded_M = F.pad(keys_R, (0, longest - len(keys_R)))
            self.counter.everyone(group, padded_M)
            keys_G = all_gather(padded_M, 0, group)
        missing, everyone = longest - len(rows_RH), self.counter.everyone
        y = mlp(copy_rows(gather_sum(F.pad(rows_RH, (0, 0, 0, missing)), 0, group, everyone), copies), copies.counts,
                copy_keys(keys_G, copies))  # nothing holds what was gathered
        y_GH = sum_copies(y, y.new_ones(longest * group.size(), 1), copies)
        return F.pad(scatter_sum(y_GH, 0, group, everyone), (0, 0, 0, -missing))


def _expert_of_row(counts_re: torch.Tensor, longest: int) -> torch.Tensor:
    """Return the local expert of each gathered row, [G, 1]; for padding, the number behind the last expert."""
    positions_M = torch.arange(longest, device=counts_re.device)
    ends_re = counts_re.cumsum(1)
    return torch.searchsorted(ends_re, positions_M.repeat(len(counts_re), 1), right=True).flatten().unsqueeze(1)
