"""The number of ranks on each axis of parallelism: arithmetic without torch, so that arguments are checked at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The number of ranks on each axis: dp data, pp pipeline, tp tensor, cp context, ep expert, etp expert-tensor.

    `sequence_parallel` shards the activations between tensor-parallel regions along the sequence (arXiv 2205.05198).
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False

    def __post_init__(self):
        for name in ("dp", "pp", "tp", "cp", "ep", "etp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.dp * self.cp * self.tp % (self.ep * self.etp):
            raise ValueError(f"ep {self.ep} x etp {self.etp} does not divide the {self.dp * self.cp * self.tp} "
                             f"ranks of a stage (dp {self.dp} x cp {self.cp} x tp {self.tp})")

    @property
    def edp(self) -> int:
        return self.dp * self.cp * self.tp // (self.ep * self.etp)

    @property
    def world_size(self) -> int:
        return self.dp * self.pp * self.tp * self.cp

    @property
    def shares_experts(self) -> bool:
        """Return whether ranks of several tensor-parallel groups share experts, so that all must step together."""
        return self.tp % self.ep != 0


def nodes_divide(ep: int, etp: int, ranks_per_node: int) -> bool:
    """Return whether ep x etp expert ranks are on one node, or on whole nodes that keep etp ranks together."""
    block = ep * etp
    return ranks_per_node % block == 0 or block % ranks_per_node == 0 and ranks_per_node % etp == 0
