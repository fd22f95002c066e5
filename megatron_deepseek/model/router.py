"""DeepSeek's routers: which experts a token goes to, and with what weight.

  V2  softmax scores, greedy or limited to the best groups by each group's best expert (arXiv 2405.04434, 2.1.2)
  V3  sigmoid scores; a bias steers the choice but not the weights; groups by their best two (arXiv 2412.19437, 2.1.2)

Shapes: B batch, S sequence, T = B*S tokens, H hidden, E experts, K top-k, G groups of e = E/G experts.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import Partial, Replicate

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.ops.precision_recipe import Gemm, WideLinear
from megatron_deepseek.parallel.tensor import TensorParallel, local_weight, sharded_parameter


class Routing(NamedTuple):
    """The router's choice. `scores_TE` are un-biased, for the balance losses.

    It is a tuple because FSDP looks for tensors in a module's output there: their gradients make it gather the weight
    again.
    """

    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    scores_TE: torch.Tensor


class Router(nn.Module):
    """weight [E, H], and for noaux_tc the bias [E] that training/balance.py updates after each step.

    Logits, scores and bias are kept in at least float32. Under TP each rank routes its own slice of the sequence, so
    the weight's local gradient is partial.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, forced: bool = False):
        super().__init__()
        self.config, self.forced = config, forced
        self.weight = sharded_parameter((config.n_routed_experts, config.hidden_size), tp.mesh, Replicate())
        self.weight_grad = Partial() if tp.size > 1 else Replicate()
        self.gemm: Gemm = WideLinear()
        self.choose = route
        if config.topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x_TH: torch.Tensor, positions_T: torch.Tensor | None = None, keys_T: torch.Tensor | None = None,
                replayed_TK: torch.Tensor | None = None) -> Routing:
        """Route tokens. `positions_T`, their places in their sequences, are read only where the balance is forced,
        `keys_T` where an adapter drops features. `replayed_TK`: the experts of tokens that were routed before
        (model/positions.py).
        """
        assert not self.forced or replayed_TK is None, "a forced balance leaves nothing to replay"
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        weight_EH = local_weight(self.weight, self.weight_grad)
        logits_TE = self.gemm.keyed(keys_T)(x_TH, weight_EH.to(wide))
        bias_E = self.e_score_correction_bias if self.config.topk_method == "noaux_tc" else None
        given_TK = balanced_choice(positions_T, self.config) if self.forced else replayed_TK
        return Routing(*self.choose(logits_TE, bias_E, given_TK, self.config))


def route(logits_TE: torch.Tensor, bias_E: torch.Tensor | None, given_TK: torch.Tensor | None, config: ModelConfig
          ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return Routing's tensors of the router's logits, for the experts `given_TK` where they are given.

    A row of these that begins with -1 is left to the router. The weights of given experts are made from all scores as
    those of chosen ones are, so that gradients go the same way; neither the bias nor a group limit has a say in them.
    """
    scores_TE = logits_TE.softmax(-1) if config.scoring_func == "softmax" else logits_TE.sigmoid()
    experts_TK = choose_experts(scores_TE, bias_E, config)
    if given_TK is not None:
        experts_TK = experts_TK.where(given_TK[:, :1] < 0, given_TK)
    return experts_TK, expert_weights(scores_TE, experts_TK, config), scores_TE


@torch.no_grad()
def choose_experts(scores_TE: torch.Tensor, bias_E: torch.Tensor | None, config: ModelConfig) -> torch.Tensor:
    """Return the indices [T, K] of the chosen experts, in no particular order."""
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if config.topk_method != "greedy":
        choice_TE = limit_to_groups(choice_TE, config)
    return choice_TE.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices


def balanced_choice(positions_T: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Return experts [T, K] by position, in `topk_group` groups: E consecutive positions use each K times."""
    k = torch.arange(config.num_experts_per_tok, device=positions_T.device)
    groups, each = config.n_group, config.n_routed_experts // config.n_group
    position_T1 = positions_T.unsqueeze(1)
    group_TK = (position_T1 + k % config.topk_group) % groups
    return group_TK * each + (position_T1 // groups + k // config.topk_group) % each


def limit_to_groups(choice_TE: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Return the scores with every expert outside the token's best `topk_group` groups at -inf.

    A group is rated by its best expert (group_limited_greedy) or by the sum of its best two (noaux_tc).
    """
    if config.topk_group == config.n_group:
        return choice_TE
    choice_TGe = choice_TE.unflatten(-1, (config.n_group, -1))
    best = 2 if config.topk_method == "noaux_tc" else 1
    group_scores_TG = choice_TGe.topk(best, dim=-1).values.sum(-1)
    kept = group_scores_TG.topk(config.topk_group, dim=-1, sorted=False).indices
    dropped_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(-1, kept, False)
    return choice_TGe.masked_fill(dropped_TG.unsqueeze(-1), float("-inf")).flatten(-2)


def expert_weights(scores_TE: torch.Tensor, experts_TK: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Return weights [T, K] from the un-biased scores: normalised where asked, then scaled, as Hugging Face does both.

    A single expert's weight is not normalised, as in DeepSeek's own code: it would be a constant without gradient.
    """
    weights_TK = scores_TE.gather(-1, experts_TK)
    if config.norm_topk_prob and config.num_experts_per_tok > 1:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK * config.routed_scaling_factor
