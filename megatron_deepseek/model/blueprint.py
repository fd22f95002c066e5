"""What every layer of a model is built from."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch.distributed as dist

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.balance_loss import BalanceWeights
from megatron_deepseek.model.capacity import Capacity
from megatron_deepseek.ops.precision_recipe import PrecisionRecipe
from megatron_deepseek.ops.side_stream import RunInLine
from megatron_deepseek.parallel.context import ContextParallel
from megatron_deepseek.parallel.expert import Dispatcher
from megatron_deepseek.parallel.expert_tensor import ExpertTensorParallel
from megatron_deepseek.parallel.micro_batch_overlap import MicroBatchOverlap
from megatron_deepseek.parallel.tensor import TensorParallel


@dataclass(frozen=True, eq=False, kw_only=True)
class Blueprint:
    """What every layer of a model is built from.

    `sequence_group` are the ranks that share a sequence's tokens, over TP and CP, or None where one rank has them all.
    `recomputed` holds names of RecomputeSettings.modules. `recipe` has the GEMMs of attention, MLP and experts.
    `side_stream` runs the shared experts during dispatch. `overlap` lets one of two paired chunks compute while the
    other's tokens are on their way.
    """

    config: ModelConfig
    tp: TensorParallel
    cp: ContextParallel
    sequence_group: dist.ProcessGroup | None
    dispatcher: Dispatcher | None
    etp: ExpertTensorParallel
    balance: BalanceWeights = BalanceWeights()
    recomputed: frozenset[str] = frozenset()
    forced_balance: bool = False
    recipe: PrecisionRecipe = PrecisionRecipe()
    capacity: Capacity | None = None
    side_stream: Callable[[], RunInLine] = RunInLine
    overlap: MicroBatchOverlap = field(default_factory=MicroBatchOverlap)
