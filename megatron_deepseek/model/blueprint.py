"""What layers are built from, the same for every layer of a model."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch.distributed as dist

from megatron_deepseek.config import ModelConfig
from megatron_deepseek.model.balance_loss import BalanceWeights
from megatron_deepseek.model.capacity import Capacity
from megatron_deepseek.ops.products import Numerics
from megatron_deepseek.ops.side_stream import Beside
from megatron_deepseek.parallel.context import ContextParallel
from megatron_deepseek.parallel.expert import Dispatcher
from megatron_deepseek.parallel.expert_tensor import ExpertTensorParallel
from megatron_deepseek.parallel.tensor import TensorParallel
from megatron_deepseek.parallel.turns import Turns


@dataclass(frozen=True, eq=False, kw_only=True)
class Blueprint:
    """What every layer of a model is built from.

    `sharers` are the ranks that share a sequence's tokens, over TP and CP, or None where one rank has them all;
    `recomputed` holds names of RecomputeSettings.modules; `numerics` are the products of attention, MLP and experts;
    `beside` runs the shared experts beside dispatch; `turns` lets two paired chunks compute while the other's
    tokens travel.
    """

    config: ModelConfig
    tp: TensorParallel
    cp: ContextParallel
    sharers: dist.ProcessGroup | None
    dispatcher: Dispatcher | None
    etp: ExpertTensorParallel
    balance: BalanceWeights = BalanceWeights()
    recomputed: frozenset[str] = frozenset()
    forced_balance: bool = False
    numerics: Numerics = Numerics()
    capacity: Capacity | None = None
    beside: Callable[[], Beside] = Beside
    turns: Turns = field(default_factory=Turns)
