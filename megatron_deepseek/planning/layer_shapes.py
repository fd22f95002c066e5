"""What the layers of a run are counted on: the shapes of one micro-batch on a rank, and what a tensor is that is kept.

The counts themselves stand in activations.py and attention_activations.py.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.planning.numbers import Numbers

LAYERNORM, UP_PROJECTION, EXPERT_ACTIVATION = "layernorm", "mla_up_proj", "moe_act"  # RecomputeSettings.modules


@dataclass(frozen=True)
class Kept:
    """A tensor that waits for the backward. `again`: the module of --recompute-modules that makes it again instead;
    `for_again`: the one for which alone it is kept, to make others from. `stays`: offloading leaves it on the device,
    as it is an index.
    """

    name: str
    bytes: float
    again: str | None = None
    stays: bool = False
    for_again: str | None = None


class Exchanges(NamedTuple):
    """How often a run leaves the turn to the other one of its pair: a forward with rows on their way to experts (`out`)
    and back, a backward with gradients on their way `to_experts` and `home`. All 0 where no other computes meanwhile.
    """

    out: int = 0
    back: int = 0
    to_experts: int = 0
    home: int = 0


@dataclass(frozen=True)
class Traffic:
    """How tokens reach their experts. `dispatcher`: alltoall, allgather or grouped; `nodes`: on how many of `all_nodes`
    a token has experts, on average; `imbalance`: rows of the fullest rank over the mean.
    """

    dispatcher: str = "alltoall"
    nodes: float = 1.0
    all_nodes: int = 1
    imbalance: float = 1.0
    exchanges: Exchanges = Exchanges()


@dataclass(frozen=True)
class LayerShapes:
    """One micro-batch on a rank: `sequences` of `length` tokens each, of which context ranks have their part.

    `balance`: a balance loss is attached; `per_sequence`, of each sequence by itself. `packed`: attention within
    documents. `weighs_before`: Engine's. `served`: the share of tokens' copies that is not dropped, at most, where
    experts' capacity is less than the mean.
    """

    model: ModelConfig
    layout: Layout
    sequences: int
    length: int
    numbers: Numbers = Numbers()
    traffic: Traffic = field(default_factory=Traffic)
    balance: bool = False
    per_sequence: bool = True
    packed: bool = False
    weighs_before: bool = False
    served: float = 1.0

    @property
    def whole(self) -> int:
        """Return the tokens of a rank between entering and leaving a tensor-parallel region."""
        return self.sequences * self.length // self.layout.cp

    @property
    def stream(self) -> int:
        """Return the tokens of a rank in the stream between such regions."""
        return self.whole // self.layout.tp if self.layout.sequence_parallel else self.whole

    @property
    def own(self) -> int:
        """Return the tokens that a rank routes."""
        return self.whole // self.layout.tp

    @property
    def copies(self) -> float:
        """Return the copies of tokens that a rank sends to experts."""
        return self.own * self.model.num_experts_per_tok * self.served

    @property
    def expert_rows(self) -> float:
        """Return how many rows a rank's experts get."""
        return self.copies * self.layout.etp * (self.traffic.imbalance if self.layout.ep > 1 else 1)

    @property
    def gathers(self) -> bool:
        """Return whether what enters a tensor-parallel region is gathered, and no tensor of the stream."""
        return self.layout.tp > 1 and self.layout.sequence_parallel

    @property
    def heads(self) -> int:
        """Return the heads of queries of a rank."""
        return self.model.num_attention_heads // self.layout.tp

    @property
    def kv_heads(self) -> int:
        """Return the heads of keys and values that a rank's queries see: one where there are fewer than TP ranks."""
        return max(1, self.model.num_kv_heads // self.layout.tp)

    @property
    def kv_product_heads(self) -> int:
        """Return the heads of keys and values that a rank's products make: all where there are fewer than TP ranks."""
        few = self.model.num_kv_heads < self.layout.tp
        return self.model.num_kv_heads if few else self.model.num_kv_heads // self.layout.tp
