"""Which ranks share a node, and the bytes that travel inside nodes and between them.

Rank r is on node r // ranks_per_node, as torchrun numbers them.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_deepseek.ops.block_scaled import bytes_of_row
from megatron_deepseek.parallel.layout import Layout, nodes_divide


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sent to other ranks of its node, and to other nodes; `crossings`: how often it sent a token, or
    a copy of one, to another node.
    """

    within_node: int = 0
    across_nodes: int = 0
    crossings: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.within_node + other.within_node, self.across_nodes + other.across_nodes,
                       self.crossings + other.crossings)


@dataclass(frozen=True, eq=False)
class NodeMap:
    """Where each rank of a process group is, seen from this rank."""

    group: dist.ProcessGroup
    ranks_per_node: int

    def traffic(self, bytes_to_rank: list[int]) -> Traffic:
        """`bytes_to_rank`: sent to each rank of the group; what a rank keeps is not sent."""
        here, node = dist.get_rank(), dist.get_rank() // self.ranks_per_node
        sent = [(rank, number) for rank, number in zip(dist.get_process_group_ranks(self.group), bytes_to_rank,
                                                       strict=True) if rank != here]
        within = sum(number for rank, number in sent if rank // self.ranks_per_node == node)
        return Traffic(within, sum(number for _, number in sent) - within)

    def dispatched(self, rows_to_rank: list[int], *rows: torch.Tensor) -> Traffic:
        """Of tokens on their way to experts: `rows_to_rank` rows of every one of `rows` to each rank of the group."""
        return replace(self.traffic(bytes_of(rows_to_rank, *rows)), crossings=self.traffic(rows_to_rank).across_nodes)


@dataclass(frozen=True, eq=False)
class TwoLevels:
    """The expert ranks of a stage as nodes x places: `across` links the same place on all nodes, `within` is a node."""

    across: DeviceMesh
    within: DeviceMesh


def places_per_node(layout: Layout, ranks_per_node: int) -> int:
    """Ranks of an expert group that share a node.

    Raises ValueError where expert groups straddle nodes unevenly.
    """
    if not nodes_divide(layout.ep, layout.etp, ranks_per_node):
        raise ValueError(f"nodes of {ranks_per_node} ranks do not divide expert groups of {layout.ep * layout.etp} "
                         f"ranks (ep {layout.ep} x etp {layout.etp}) evenly")
    return min(layout.ep, ranks_per_node // layout.etp)


def build_levels(layout: Layout, device: torch.device, ranks_per_node: int) -> TwoLevels:
    """All ranks call it: it creates process groups."""
    places = places_per_node(layout, ranks_per_node)
    mesh = init_device_mesh(device.type, (layout.pp, layout.edp, layout.ep // places, places, layout.etp),
                            mesh_dim_names=("pp", "edp", "ep_across", "ep_within", "etp"))
    return TwoLevels(mesh["ep_across"], mesh["ep_within"])


def bytes_of(rows: list[int], *tensors: torch.Tensor) -> list[int]:
    """Of `rows` rows of every one of `tensors` [any, ...]."""
    row = sum(map(bytes_of_row, tensors))
    return [number * row for number in rows]
