"""Routing and balance losses as the papers write them: a token, an expert, a sequence at a time.

V2: arXiv 2405.04434, sections 2.1.2 and 2.2.3-2.2.4 (equations 23-31). V3: arXiv 2412.19437, equations 12-20.
"""

import torch

from megatron_deepseek.model.architecture.config import ModelConfig


def groups_of(config: ModelConfig) -> list[range]:
    size = config.n_routed_experts // config.n_group
    return [range(g * size, (g + 1) * size) for g in range(config.n_group)]


def choose(scores: list[float], bias: list[float] | None, config: ModelConfig) -> list[int]:
    """One token's experts, best first."""
    choice = scores if bias is None else [s + b for s, b in zip(scores, bias)]
    candidates = range(config.n_routed_experts)
    if config.topk_method != "greedy":
        best = 2 if config.topk_method == "noaux_tc" else 1
        worth = {group: sum(sorted((choice[e] for e in group), reverse=True)[:best]) for group in groups_of(config)}
        kept = sorted(worth, key=worth.get, reverse=True)[:config.topk_group]
        candidates = [e for group in kept for e in group]
    return sorted(candidates, key=lambda e: -choice[e])[:config.num_experts_per_tok]


def weights_of_choice(scores: torch.Tensor, chosen: list[int], config: ModelConfig) -> torch.Tensor:
    """One token's gate values [K]; normalisation is for more than one expert, as DeepSeek's own code has it."""
    weights = torch.stack([scores[e] for e in chosen])
    if config.norm_topk_prob and len(chosen) > 1:
        weights = weights / weights.sum()
    return weights * config.routed_scaling_factor


def balance_factors(scores: torch.Tensor, config: ModelConfig) -> tuple[torch.Tensor, ...]:
    """f_i, f'_d, f''_d, P_i and P'_d of one sequence's scores [T, E]; f without gradient."""
    num_tokens, num_experts = scores.shape
    groups = groups_of(config)
    count, sent = torch.zeros(num_experts), torch.zeros(len(groups))
    for row in scores.detach().tolist():
        chosen = choose(row, None, config)
        count[chosen] += 1
        for d, group in enumerate(groups):
            sent[d] += any(e in group for e in chosen)
    affinity = scores / scores.sum(-1, keepdim=True) if config.scoring_func == "sigmoid" else scores
    f = count.double() * num_experts / (config.num_experts_per_tok * num_tokens)
    f_device = torch.stack([f[list(group)].mean() for group in groups])
    f_communication = sent.double() * len(groups) / (config.topk_group * num_tokens)
    p = affinity.sum(0) / num_tokens
    return f, f_device, f_communication, p, torch.stack([p[list(group)].sum() for group in groups])


def balance_loss(scores: torch.Tensor, config: ModelConfig, expert: float, device: float = 0.0,
                 communication: float = 0.0) -> torch.Tensor:
    """The three levels' losses over one sequence's scores [T, E], weighted and added."""
    f, f_device, f_communication, p, p_device = balance_factors(scores, config)
    return (expert * sum(f[i] * p[i] for i in range(len(f)))
            + device * sum(f_device[d] * p_device[d] for d in range(config.n_group))
            + communication * sum(f_communication[d] * p_device[d] for d in range(config.n_group)))
