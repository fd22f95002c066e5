"""How long collectives take on a network of two levels: links inside a node or rack, and NICs beyond.

Ranks are placed as parallel/mesh.py places them: a group of `size` ranks that are `stride` apart. All are lower bounds
of bytes over the bandwidth that was reached (gpus.json), and a latency.
"""

from dataclasses import dataclass

from megatron_deepseek.planning.gpus import Gpu

LATENCY_INSIDE, LATENCY_ACROSS = 10e-6, 25e-6  # seconds of one collective or message


@dataclass(frozen=True)
class Network:
    """The links of one GPU, `per_node` of which are joined by the fast ones. Bandwidths in bytes a second."""

    gpu: Gpu
    per_node: int

    @property
    def inside(self) -> float:
        """Return the bandwidth to ranks of the same node."""
        return self.gpu.scale_up_gb_s * self.gpu.reached_scale_up * 1e9

    @property
    def across(self) -> float:
        """Return the bandwidth to other nodes."""
        return self.gpu.network_gb_s * self.gpu.reached_network * 1e9

    def neighbours(self, size: int, stride: int) -> int:
        """Return how many ranks of a group are on one node."""
        return max(1, min(size, self.per_node // stride))

    def nodes(self, size: int, stride: int) -> int:
        """Return over how many nodes a group lies."""
        return -(-size // self.neighbours(size, stride))

    def gather(self, whole: float, size: int, stride: int) -> float:
        """Return the seconds of an all-gather to `whole` bytes on each rank, or of a reduce-scatter from them. The
        ranks of a node take what comes from others over all their NICs and pass it on.
        """
        if size == 1 or not whole:
            return 0.0
        near = self.neighbours(size, stride)
        inside = whole * (1 - 1 / near) / self.inside if near > 1 else 0.0
        if near == size:
            return whole * (1 - 1 / size) / self.inside + LATENCY_INSIDE
        return max(inside, whole * (1 - near / size) / (near * self.across)) + LATENCY_ACROSS

    def all_to_all(self, inside: float, across: float, in_turn: bool = False) -> float:
        """Return the seconds in which each rank sends so many bytes to its node's ranks and to others. Both levels work
        at once, or `in_turn` where what crossed is sent on.
        """
        here = inside / self.inside + LATENCY_INSIDE if inside else 0.0
        there = across / self.across + LATENCY_ACROSS if across else 0.0
        return here + there if in_turn else max(here, there)

    def message(self, size: float, stride: int) -> float:
        """Return the seconds of a message to the rank `stride` further."""
        if stride < self.per_node:
            return size / self.inside + LATENCY_INSIDE
        return size / self.across + LATENCY_ACROSS
