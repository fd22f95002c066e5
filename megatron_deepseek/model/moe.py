"""DeepSeekMoE (arXiv 2401.06066): shared experts that see every token, routed experts that each see their share.

Shapes: B batch, S sequence, T tokens, H hidden, I expert width, E experts, K top-k, R rows (token copies).
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import Shard

from megatron_deepseek.config import ModelConfig
from megatron_deepseek.model.balance_loss import attach_loss, balance_loss
from megatron_deepseek.model.blueprint import Blueprint
from megatron_deepseek.model.router import Router
from megatron_deepseek.ops.block_scaled import whole
from megatron_deepseek.ops.products import Linear, Numerics, Product
from megatron_deepseek.parallel.expert import NOBODY
from megatron_deepseek.parallel.expert_tensor import ExpertTensorParallel
from megatron_deepseek.parallel.pieces import stacked_shard
from megatron_deepseek.parallel.tensor import (
    TensorParallel,
    column_linear,
    local_weight,
    row_linear,
    sharded_parameter,
)

# Placements of stacked experts on the mesh (ep, etp), and of their gradients.
COLUMN_PARALLEL = Shard(0), stacked_shard(1, matrices=2)
ROW_PARALLEL = Shard(0), Shard(2)


@dataclass(frozen=True)
class RouterStats:
    """Of one layer and micro-batch on this rank: tokens that chose each expert [E] int64, how many of these copies were
    dropped, its share of the balance loss, how often a token was sent to another node, and which experts each of its
    tokens chose, int64 [B, S, K] with NOBODY for those that are not routed.
    """

    counts_E: torch.Tensor
    dropped: torch.Tensor
    balance_loss: torch.Tensor
    crossings: int
    experts_BSK: torch.Tensor


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
    """This rank's routed experts, stacked: gate_up_proj [E, 2I, H] and down_proj [E, H, I].

    E is sharded over EP. Over ETP the first is column-parallel, gate and up rows each, and the second row-parallel.
    """

    def __init__(self, config: ModelConfig, etp: ExpertTensorParallel, numerics: Numerics):
        super().__init__()
        num, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.etp = etp
        self.gate_up_proj = sharded_parameter((num, 2 * width, hidden), etp.mesh, *COLUMN_PARALLEL)
        self.down_proj = sharded_parameter((num, hidden, width), etp.mesh, *ROW_PARALLEL)
        self.up_product, self.down_product = numerics.experts_up, numerics.experts_down

    @property
    def weight_products(self) -> dict[str, Product]:
        """Who alone reads a weight, by the weight's name (parallel/data.py)."""
        return {"gate_up_proj": self.up_product, "down_proj": self.down_product}

    def forward(self, rows_RH: torch.Tensor, counts: list[int]) -> torch.Tensor:
        return self.etp(rows_RH, counts, self._mlp)

    def _mlp(self, rows_RH: torch.Tensor, counts: list[int]) -> torch.Tensor:
        gate_up = local_weight(self.gate_up_proj, *COLUMN_PARALLEL)
        down = local_weight(self.down_proj, *ROW_PARALLEL)
        return self.down_product.after_swiglu((self.up_product(rows_RH, gate_up, counts),), down, counts)


class MoE(nn.Module):
    """Routed plus shared experts. Each TP rank routes its own slice of the sequence."""

    def __init__(self, blueprint: Blueprint):
        super().__init__()
        config, tp, numerics = blueprint.config, blueprint.tp, blueprint.numerics
        self.config, self.tp, self.cp, self.sharers = config, tp, blueprint.cp, blueprint.sharers
        self.dispatcher, self.balance = blueprint.dispatcher, blueprint.balance
        self.capacity, self.beside = blueprint.capacity, blueprint.beside
        self.gate = Router(config, tp, blueprint.forced_balance)
        self.experts = Experts(config, blueprint.etp, numerics)
        if config.n_shared_experts:
            self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts, tp,
                                      numerics.linear)

    def forward(self, x_BSH: torch.Tensor, global_sequences: int, routed_BS: torch.Tensor | None = None
                ) -> tuple[torch.Tensor, RouterStats]:
        """`routed_BS`: the tokens of this rank's part of the sequences, whole over TP, that go to routed experts and
        count for their balance; None for all.
        """
        shared = self.beside()
        if self.config.n_shared_experts:
            shared.start(self.shared_experts, x_BSH)
        own_BSH = self.tp.own_tokens(whole(x_BSH))
        if routed_BS is not None:
            routed_BS = routed_BS.chunk(self.tp.size, 1)[self.tp.rank]
        x_TH, num_sequences = own_BSH.flatten(0, 1), len(own_BSH)
        routing = self.gate(x_TH, self._positions(own_BSH).repeat(num_sequences) if self.gate.forced else None)
        chosen_TK = routing.experts_TK
        if routed_BS is not None:
            chosen_TK = chosen_TK.where(routed_BS.reshape(-1, 1), NOBODY)
        kept_TK = chosen_TK if self.capacity is None else self._within_capacity(own_BSH, chosen_TK, routing.weights_TK)
        rows_TH = self.experts.up_product.rows(x_TH)
        y_TH, crossings = self.dispatcher(rows_TH, kept_TK, routing.weights_TK, self.experts)
        loss = routing.scores_TE.new_zeros(())
        if self.balance.any and self.training:
            loss = balance_loss(routing, num_sequences, self.config, self.balance, self.sharers, routed_BS)
            loss = loss / global_sequences
            y_TH = attach_loss(y_TH, loss)
        counts_E = (chosen_TK.flatten() + 1).bincount(minlength=self.config.n_routed_experts + 1)[1:]
        y_BSH = self.tp.all_tokens(y_TH.view_as(own_BSH))
        if self.config.n_shared_experts:
            y_BSH = y_BSH + shared.result()
        return y_BSH, RouterStats(counts_E, (kept_TK != chosen_TK).sum(), loss.detach(), crossings,
                                  chosen_TK.unflatten(0, own_BSH.shape[:2]))

    def _positions(self, own_BSH: torch.Tensor) -> torch.Tensor:
        """Where this rank's S tokens of each sequence stand in it."""
        length = own_BSH.shape[1]
        positions_S = self.cp.positions(length * self.tp.size * self.cp.size)
        return positions_S[self.tp.rank * length:][:length].to(own_BSH.device)

    def _within_capacity(self, own_BSH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor
                         ) -> torch.Tensor:
        experts_BSK, weights_BSK = (x.unflatten(0, own_BSH.shape[:2]) for x in (experts_TK, weights_TK))
        return self.capacity.keep(experts_BSK, weights_BSK, self._positions(own_BSH), self.sharers).flatten(0, 1)
