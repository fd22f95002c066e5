"""DeepSeekMoE (arXiv 2401.06066): shared experts that see every token, routed experts that each see their share.

Shapes: B batch, S sequence, T tokens, H hidden, I expert width, E experts, K top-k, R rows (token copies).
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import Shard

from megatron_deepseek.device import send
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.balance_loss import attach_loss, balance_loss
from megatron_deepseek.model.blueprint import Blueprint
from megatron_deepseek.model.router import Router, Routing
from megatron_deepseek.ops.fp8.block_scaled import whole
from megatron_deepseek.ops.hashing import split_mix
from megatron_deepseek.ops.permute import count_choices
from megatron_deepseek.ops.precision_recipe import Gemm, Linear, PrecisionRecipe
from megatron_deepseek.parallel.expert import DROPPED
from megatron_deepseek.parallel.expert_tensor import ExpertTensorParallel
from megatron_deepseek.parallel.shards import stacked_shard
from megatron_deepseek.parallel.tensor import TensorParallel, column_linear, local_weight, row_linear, sharded_parameter

# Placements of stacked experts on the mesh (ep, etp), and of their gradients.
COLUMN_PARALLEL = Shard(0), stacked_shard(1, matrices=2)
ROW_PARALLEL = Shard(0), Shard(2)


@dataclass(frozen=True)
class RouterStats:
    """Statistics of one layer and micro-batch on this rank.

    counts_E: tokens that chose each expert, int64, without those whose experts were given. `copies`: how many copies of
    tokens experts were to get, of both kinds; `dropped`: how many of these were dropped. `balance_loss`: this rank's
    share of it. `cross_node_sends`: how often a token was sent to another node. experts_BSK: the experts that each of
    its tokens has, int64, with DROPPED for tokens that are not routed.
    """

    counts_E: torch.Tensor
    copies: torch.Tensor
    dropped: torch.Tensor
    balance_loss: torch.Tensor
    cross_node_sends: int
    experts_BSK: torch.Tensor


class MLP(nn.Module):
    """The SwiGLU feed-forward block, column- then row-parallel over TP."""

    def __init__(self, hidden_size: int, intermediate_size: int, tp: TensorParallel, gemm: Gemm = Linear()):
        super().__init__()
        self.tp = tp
        self.gate_proj = column_linear(hidden_size, intermediate_size, tp, gemm)
        self.up_proj = column_linear(hidden_size, intermediate_size, tp, gemm)
        self.down_proj = row_linear(intermediate_size, hidden_size, tp, gemm=gemm)

    def forward(self, x_BSH: torch.Tensor, keys_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the block makes of x; `keys_BS` are those of the tokens of the whole sequence."""
        with self.gate_proj.gemm.shared(self.tp.enter(x_BSH)) as x_BSH:
            y_BSH = self.down_proj.after_swiglu(self.gate_proj(x_BSH, keys_BS), self.up_proj(x_BSH, keys_BS),
                                                keys=keys_BS)
        return self.tp.leave(y_BSH)


class Experts(nn.Module):
    """This rank's routed experts, stacked: gate_up_proj [E, 2I, H] and down_proj [E, H, I].

    E is sharded over EP. Over ETP the first is column-parallel, gate and up rows each, and the second row-parallel.
    """

    def __init__(self, config: ModelConfig, etp: ExpertTensorParallel, recipe: PrecisionRecipe):
        super().__init__()
        num, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.etp, self.num = etp, num
        self.gate_up_proj = sharded_parameter((num, 2 * width, hidden), etp.mesh, *COLUMN_PARALLEL)
        self.down_proj = sharded_parameter((num, hidden, width), etp.mesh, *ROW_PARALLEL)
        self.up_gemm, self.down_gemm = recipe.experts_up, recipe.experts_down

    @property
    def weight_gemms(self) -> dict[str, Gemm]:
        """Return the GEMM that alone reads a weight, by the weight's name (parallel/data.py)."""
        return {"gate_up_proj": self.up_gemm, "down_proj": self.down_gemm}

    def forward(self, rows_RH: torch.Tensor, counts_se: list[list[int]], keys_R: torch.Tensor | None = None
                ) -> torch.Tensor:
        return self.etp(rows_RH, counts_se, self._mlp, keys_R)

    def _mlp(self, rows_RH: torch.Tensor, counts: list[int], keys_R: torch.Tensor | None = None) -> torch.Tensor:
        gate_up = local_weight(self.gate_up_proj, *COLUMN_PARALLEL)
        down = local_weight(self.down_proj, *ROW_PARALLEL)
        if keys_R is not None:  # each expert draws for itself
            keys_R = split_mix(expert_of_rows(counts, self.first, keys_R.device), keys_R)
        hidden = self.up_gemm.keyed(keys_R)(rows_RH, gate_up, counts)
        return self.down_gemm.keyed(keys_R).after_swiglu((hidden,), down, counts)

    @property
    def first(self) -> int:
        """Return the number of this rank's first expert."""
        mesh = self.etp.mesh
        return mesh.get_local_rank("ep") * (self.num // mesh.size(0))


def expert_of_rows(counts: list[int], first: int, device: torch.device) -> torch.Tensor:
    """Return the number of each row's expert, int64 [R], of rows sorted by expert from the number `first` on."""
    experts = torch.arange(first, first + len(counts))
    return send(experts.repeat_interleave(torch.tensor(counts), output_size=sum(counts)), device)


class MoE(nn.Module):
    """Routed plus shared experts. Each TP rank routes its own slice of the sequence."""

    def __init__(self, blueprint: Blueprint):
        super().__init__()
        config, tp, recipe = blueprint.config, blueprint.tp, blueprint.recipe
        self.config, self.tp, self.cp, self.sequence_group = config, tp, blueprint.cp, blueprint.sequence_group
        self.dispatcher, self.balance = blueprint.dispatcher, blueprint.balance
        self.capacity, self.side_stream = blueprint.capacity, blueprint.side_stream
        self.gate = Router(config, tp, blueprint.forced_balance)
        self.experts = Experts(config, blueprint.etp, recipe)
        if config.n_shared_experts:
            self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts, tp,
                                      recipe.linear)

    def forward(self, x_BSH: torch.Tensor, global_sequences: int, routed_BS: torch.Tensor | None = None,
                keys_BS: torch.Tensor | None = None, replayed_BSK: torch.Tensor | None = None
                ) -> tuple[torch.Tensor, RouterStats]:
        """Return what the experts make of x, and the router's statistics.

        `routed_BS`: the tokens of this rank's part of the sequences, whole over TP, that go to routed experts and count
        for their balance; None for all. `keys_BS`: those of the same tokens, by which adapters drop features.
        `replayed_BSK`: the experts that the same tokens are given (model/positions.py); these tokens do not count for
        the balance, which this router had no say in.
        """
        # 1. Each tensor-parallel rank routes its own tokens to K of the E routed experts.
        own_BSH, own_routed_BS = self.tp.own_tokens(whole(x_BSH)), self.tp.own_keys(routed_BS)
        keys_T = None if keys_BS is None else self.tp.own_keys(keys_BS).flatten()
        x_TH, num_sequences = own_BSH.flatten(0, 1), len(own_BSH)
        replayed_TK = None if replayed_BSK is None else self.tp.own_keys(replayed_BSK).flatten(0, 1)
        positions_T = self._positions(own_BSH).repeat(num_sequences) if self.gate.forced else None
        routing = self.gate(x_TH, positions_T, keys_T, replayed_TK)
        chosen_TK = _routed(routing.experts_TK, own_routed_BS)
        kept_TK = chosen_TK if self.capacity is None else self._within_capacity(own_BSH, chosen_TK, routing.weights_TK)
        route = self.dispatcher.route(kept_TK)

        # 2. Shared experts see every token. They are queued before the host waits for the route's counts; with a side
        #    stream they run while the routed ones are dispatched.
        shared = self.side_stream()
        if self.config.n_shared_experts:
            shared.start(partial(self.shared_experts, keys_BS=keys_BS), x_BSH)

        # 3. Tokens travel to their experts and back: y_t = sum_i g_i,t FFN_i(x_t).
        rows_TH = self.experts.up_gemm.rows(x_TH)
        y_TH, cross_node_sends = self.dispatcher(rows_TH, route, routing.weights_TK, self.experts, keys_T)

        # 4. The balance loss is attached to y, through which the backward passes in any case.
        counted_BS = _counted(own_routed_BS, replayed_TK, own_BSH)
        y_TH, loss = self._balanced(y_TH, routing, num_sequences, global_sequences, counted_BS)

        # 5. Return to the stream between regions, and add the shared experts' output.
        y_BSH = self.tp.all_tokens(y_TH.view_as(own_BSH))
        if self.config.n_shared_experts:
            y_BSH = y_BSH + shared.result()
        counts_E = count_choices(_routed(chosen_TK, counted_BS) + 1, self.config.n_routed_experts + 1)[1:]
        return y_BSH, RouterStats(counts_E, (chosen_TK != DROPPED).sum(), (kept_TK != chosen_TK).sum(), loss,
                                  cross_node_sends, chosen_TK.unflatten(0, own_BSH.shape[:2]))

    def _balanced(self, y_TH: torch.Tensor, routing: Routing, num_sequences: int, global_sequences: int,
                  counted_BS: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y with this rank's share of the balance loss attached, and the share, without gradient."""
        if not (self.balance.any and self.training):
            return y_TH, routing.scores_TE.new_zeros(())
        loss = balance_loss(routing, num_sequences, self.config, self.balance, self.sequence_group, counted_BS)
        loss = loss / global_sequences
        return attach_loss(y_TH, loss), loss.detach()

    def _positions(self, own_BSH: torch.Tensor) -> torch.Tensor:
        """Return the positions in its sequence of this rank's S tokens of each."""
        length = own_BSH.shape[1]
        positions_S = self.cp.positions(length * self.tp.size * self.cp.size)
        return send(positions_S[self.tp.rank * length:][:length], own_BSH.device)

    def _within_capacity(self, own_BSH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor
                         ) -> torch.Tensor:
        experts_BSK, weights_BSK = (x.unflatten(0, own_BSH.shape[:2]) for x in (experts_TK, weights_TK))
        return self.capacity.keep(experts_BSK, weights_BSK, self._positions(own_BSH), self.sequence_group).flatten(0, 1)


def _routed(experts_TK: torch.Tensor, routed_BS: torch.Tensor | None) -> torch.Tensor:
    """Return the experts with DROPPED in place of those of tokens that are not in `routed_BS`; None for all."""
    return experts_TK if routed_BS is None else experts_TK.where(routed_BS.reshape(-1, 1), DROPPED)


def _counted(routed_BS: torch.Tensor | None, replayed_TK: torch.Tensor | None, own_BSH: torch.Tensor
             ) -> torch.Tensor | None:
    """Return which of this rank's tokens chose experts by themselves, None for all."""
    if replayed_TK is None:
        return routed_BS
    free_BS = (replayed_TK[:, 0] < 0).view(own_BSH.shape[:2])
    return free_BS if routed_BS is None else free_BS & routed_BS
