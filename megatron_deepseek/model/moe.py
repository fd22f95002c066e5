"""DeepSeekMoE (arXiv 2401.06066): shared experts that see every token, routed experts that each see their share.

Shapes: B batch, S sequence, T tokens, H hidden, I expert width, E experts, K top-k, R rows (token copies).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard

from megatron_deepseek.config import ModelConfig
from megatron_deepseek.model.balance_loss import BalanceWeights, attach_loss, balance_loss
from megatron_deepseek.model.router import Router
from megatron_deepseek.ops.products import Linear, Numerics, Product
from megatron_deepseek.parallel.context import ContextParallel
from megatron_deepseek.parallel.expert import Dispatcher
from megatron_deepseek.parallel.nodes import Traffic
from megatron_deepseek.parallel.tensor import (
    TensorParallel,
    column_linear,
    local_weight,
    row_linear,
    sharded_parameter,
)


@dataclass(frozen=True)
class RouterStats:
    """Of one layer and micro-batch on this rank: tokens per expert [E] int64, and its share of the balance loss,
    and the bytes that its dispatch and combination sent in the forward.
    """

    counts_E: torch.Tensor
    balance_loss: torch.Tensor
    traffic: Traffic


class MLP(nn.Module):
    """SwiGLU feed-forward block; column- then row-parallel over TP."""

    def __init__(self, hidden_size: int, intermediate_size: int, tp: TensorParallel, product: Product = Linear()):
        super().__init__()
        self.tp = tp
        self.gate_proj = column_linear(hidden_size, intermediate_size, tp, product)
        self.up_proj = column_linear(hidden_size, intermediate_size, tp, product)
        self.down_proj = row_linear(intermediate_size, hidden_size, tp, product=product)

    def forward(self, x_BSH: torch.Tensor) -> torch.Tensor:
        return self.tp.leave(self.gate_proj.product.shared(self.tp.enter(x_BSH), self._from_input))

    def _from_input(self, x_BSH: torch.Tensor) -> torch.Tensor:
        return self.down_proj.after_swiglu(self.gate_proj(x_BSH), self.up_proj(x_BSH))


class Experts(nn.Module):
    """This rank's routed experts, stacked: gate_up_proj [E, 2I, H] and down_proj [E, H, I], sharded by E over EP."""

    def __init__(self, config: ModelConfig, dispatcher: Dispatcher, numerics: Numerics):
        super().__init__()
        shape = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = sharded_parameter((shape[0], 2 * shape[1], shape[2]), dispatcher.mesh, Shard(0))
        self.down_proj = sharded_parameter((shape[0], shape[2], shape[1]), dispatcher.mesh, Shard(0))
        self.up_product, self.down_product = numerics.experts_up, numerics.experts_down

    def forward(self, rows_RH: torch.Tensor, counts: list[int]) -> torch.Tensor:
        gate_up = local_weight(self.gate_up_proj, Shard(0))
        down = local_weight(self.down_proj, Shard(0))
        gate_RI, up_RI = self.up_product(rows_RH, gate_up, counts).chunk(2, -1)
        return self.down_product.after_swiglu(gate_RI, up_RI, down, counts)


class MoE(nn.Module):
    """Routed plus shared experts. Each TP rank routes its own slice of the sequence."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, dispatcher: Dispatcher,
                 balance: BalanceWeights, cp: ContextParallel, sharers: dist.ProcessGroup | None,
                 numerics: Numerics = Numerics(), forced_balance: bool = False):
        super().__init__()
        self.config, self.tp, self.dispatcher, self.balance, self.sharers = config, tp, dispatcher, balance, sharers
        self.cp = cp
        self.gate = Router(config, tp, forced_balance)
        self.experts = Experts(config, dispatcher, numerics)
        if config.n_shared_experts:
            self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts, tp,
                                      numerics.linear)

    def forward(self, x_BSH: torch.Tensor, global_sequences: int) -> tuple[torch.Tensor, RouterStats]:
        own_BSH = self.tp.own_tokens(x_BSH)
        x_TH = own_BSH.flatten(0, 1)
        routing = self.gate(x_TH, self._positions(own_BSH) if self.gate.forced else None)
        rows_TH = self.experts.up_product.rows(x_TH)
        y_TH, traffic = self.dispatcher(rows_TH, routing.experts_TK, routing.weights_TK, self.experts)
        loss = routing.scores_TE.new_zeros(())
        if self.balance.any and self.training:
            loss = balance_loss(routing, x_BSH.shape[0], self.config, self.balance, self.sharers) / global_sequences
            y_TH = attach_loss(y_TH, loss)
        counts_E = routing.experts_TK.flatten().bincount(minlength=self.config.n_routed_experts)
        y_BSH = self.tp.all_tokens(y_TH.view_as(own_BSH))
        if self.config.n_shared_experts:
            y_BSH = y_BSH + self.shared_experts(x_BSH)
        return y_BSH, RouterStats(counts_E, loss.detach(), traffic)

    def _positions(self, own_BSH: torch.Tensor) -> torch.Tensor:
        """Where each of this rank's B*S tokens stands in its sequence."""
        sequences, length = own_BSH.shape[:2]
        positions_S = self.cp.positions(length * self.tp.size * self.cp.size)
        return positions_S[self.tp.rank * length:][:length].to(own_BSH.device).repeat(sequences)
