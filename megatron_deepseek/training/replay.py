"""Kept routing: the experts of a batch's tokens, as a rollout's engine or a scoring names them, given to training.

Shapes: B rows, S tokens of a sequence, T any tokens, L the main model's MoE layers, K experts of a token.
"""

from collections.abc import Mapping

import torch

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.settings import LossSettings


def layers_to_replay(config: ModelConfig) -> tuple[str, ...]:
    """Return the names of the main model's MoE layers ("model.layers.3.mlp"), in the order in which they are given."""
    return tuple(f"model.layers.{index}.mlp" for index in range(config.num_hidden_layers) if config.is_moe_layer(index))


def stack_experts(experts: Mapping[str, torch.Tensor], config: ModelConfig) -> torch.Tensor:
    """Return the experts of tokens, [..., L, K] int16, of those of each layer by its name, [..., K].

    Two bytes are enough for any expert's number; V3's 58 layers take 928 bytes a token, a hidden state 14,336.
    """
    return torch.stack([experts[name] for name in layers_to_replay(config)], -2).to(torch.int16)


def check_replay(replayed_BSLK: torch.Tensor | None, config: ModelConfig, loss: LossSettings) -> None:
    """Raise ValueError for given experts that this model cannot send tokens to, and beside a forced balance."""
    if replayed_BSLK is None:
        return
    found, wanted = tuple(replayed_BSLK.shape[2:]), (config.num_moe_layers, config.num_experts_per_tok)
    if not config.n_routed_experts or found != wanted:
        raise ValueError(f"replayed experts are {' x '.join(map(str, found))} for each token, and the model has "
                         f"{config.num_moe_layers} MoE layers with {config.num_experts_per_tok} experts of a token")
    if replayed_BSLK.is_floating_point():
        raise ValueError(f"replayed experts are {replayed_BSLK.dtype}: they must be integers")
    if loss.moe_router_force_load_balancing:
        raise ValueError("--moe-router-force-load-balancing chooses all experts, and the batch has experts to replay")
