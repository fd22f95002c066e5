"""Nodes: the ranks that share one, and the bytes that are sent inside nodes and between them.

Rank r is on node r // ranks_per_node, as torchrun numbers them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_deepseek.ops.fp8.block_scaled import bytes_of_row
from megatron_deepseek.parallel.layout import Layout, nodes_divide

Sent = Callable[[dist.ProcessGroup, torch.Tensor], None]


def uncounted(group: dist.ProcessGroup, x: torch.Tensor) -> None:
    """Count nothing (in place of `CommunicationCounter.everyone`)."""


@dataclass(frozen=True)
class Traffic:
    """What one rank sent to other ranks of its node, and to other nodes: bytes, unless stated otherwise."""

    within_node: int = 0
    across_nodes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.within_node + other.within_node, self.across_nodes + other.across_nodes)


class CommunicationCounter:
    """Adds up the bytes that this rank sends. Every send reports to it: forward, backward and recomputed."""

    def __init__(self, ranks_per_node: int):
        self.ranks_per_node = ranks_per_node
        self._total = Traffic()

    def take(self) -> Traffic:
        """Return what was sent since the last call."""
        total, self._total = self._total, Traffic()
        return total

    def rows(self, group: dist.ProcessGroup, rows_to_rank: list[int], x: torch.Tensor) -> None:
        """Count `rows_to_rank` rows of x sent to each rank of `group`."""
        row = bytes_of_row(x)
        self._total += self.divide(group, [number * row for number in rows_to_rank])

    def everyone(self, group: dist.ProcessGroup, x: torch.Tensor) -> None:
        """Count x, or as much as x, sent to every other rank of `group`."""
        self.rows(group, [len(x)] * group.size(), x)

    def divide(self, group: dist.ProcessGroup, amounts: list[int]) -> Traffic:
        """Return the sums of the amounts for each rank of `group`, by its node; what a rank keeps is not sent."""
        here, node = dist.get_rank(), dist.get_rank() // self.ranks_per_node
        sent = [(rank, number) for rank, number in zip(dist.get_process_group_ranks(group), amounts, strict=True)
                if rank != here]
        within = sum(number for rank, number in sent if rank // self.ranks_per_node == node)
        return Traffic(within, sum(number for _, number in sent) - within)


@dataclass(frozen=True, eq=False)
class TwoLevels:
    """The expert ranks of a stage as nodes x places: `across` links equal places of all nodes, `within` is one node."""

    across: DeviceMesh
    within: DeviceMesh


def places_per_node(layout: Layout, ranks_per_node: int) -> int:
    """Return how many ranks of an expert group share a node.

    Raise ValueError where expert groups straddle nodes unevenly.
    """
    if not nodes_divide(layout.ep, layout.etp, ranks_per_node):
        raise ValueError(f"nodes of {ranks_per_node} ranks do not divide expert groups of {layout.ep * layout.etp} "
                         f"ranks (ep {layout.ep} x etp {layout.etp}) evenly")
    return min(layout.ep, ranks_per_node // layout.etp)


def build_levels(layout: Layout, device: torch.device, ranks_per_node: int) -> TwoLevels:
    """Create the process groups of both levels. All ranks call it."""
    places = places_per_node(layout, ranks_per_node)
    mesh = init_device_mesh(device.type, (layout.pp, layout.edp, layout.ep // places, places, layout.etp),
                            mesh_dim_names=("pp", "edp", "ep_across", "ep_within", "etp"))
    return TwoLevels(mesh["ep_across"], mesh["ep_within"])
