"""From rewards to advantages: how much better each sample is than the others of its prompt (arXiv 2402.03300, 4.1.2).

    A = (reward - mean of the group) / (spread of the group + epsilon)

Three libraries call three numbers by that name. Of rewards 1 and 0:

    sample-std, epsilon 1e-4        +-0.707007      TRL
    sample-std, epsilon 1e-6        +-0.707106      verl
    population-std, epsilon 1e-4    +-0.999800      Megatron-LM; the paper's formula has no epsilon and gives +-1
    none                            +-0.5           Dr. GRPO (arXiv 2503.20783), DeepSeek-V3.2 (arXiv 2512.02556, 3.1)

Shapes: N samples.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_deepseek.rl_settings import PolicyLossSettings

ADVANTAGES = ("sample-std", "population-std", "none")


@dataclass(frozen=True, eq=False)
class Advantages:
    """The advantage of each sample, float64 [N], and the numbers of the groups without any difference of rewards.

    A group teaches nothing if all its known rewards are equal, or if it has fewer than two of them.
    """

    values_N: torch.Tensor
    even_groups: tuple[int, ...] = ()


def group_advantages(rewards: Sequence[float | None], groups: Sequence[int],
                     settings: PolicyLossSettings = PolicyLossSettings()) -> Advantages:
    """Return the advantages of samples by their rewards and the numbers of their groups, which may stand in any order.

    A reward that is None or NaN is unknown: it has no part in the group's mean and spread, and its advantage is 0. So
    is the advantage of every sample in an even group, exactly; verl takes the reward itself where a group has one
    sample, which would depend on where rewards have their zero.

    Raise ValueError for an unknown `advantage` and for an infinite reward.
    """
    if settings.advantage not in ADVANTAGES:
        raise ValueError(f"--advantage {settings.advantage} is not one of {', '.join(ADVANTAGES)}")
    rewards_N = torch.tensor([torch.nan if each is None else each for each in rewards], dtype=torch.float64)
    if rewards_N.isinf().any():
        raise ValueError(f"a reward is infinite: {rewards_N[rewards_N.isinf()][0].item()}; no mean can be taken of it")
    values_N, even = torch.zeros_like(rewards_N), []
    for group, members in _members(groups).items():
        known = [number for number in members if not rewards_N[number].isnan()]
        own = rewards_N[known]
        if len(known) < 2 or own.min() == own.max():
            even.append(group)
        else:
            values_N[known] = (own - own.mean()) / _divisor(own, settings)
    return Advantages(values_N, tuple(even))


def _members(groups: Sequence[int]) -> dict[int, list[int]]:
    """Return the places of each group's samples."""
    found = defaultdict(list)
    for place, group in enumerate(groups):
        found[group].append(place)
    return found


def _divisor(rewards: torch.Tensor, settings: PolicyLossSettings) -> torch.Tensor | float:
    """Return what the differences from the mean of one group are divided by."""
    if settings.advantage == "none":
        return 1.0
    return rewards.std(correction=1 if settings.advantage == "sample-std" else 0) + settings.advantage_epsilon
