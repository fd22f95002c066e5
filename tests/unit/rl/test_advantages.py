"""Advantages of groups: the numbers of three libraries, and what has no part in a group."""

import math

import pytest
import torch

from megatron_deepseek.rl.advantages import group_advantages
from megatron_deepseek.rl_settings import PolicyLossSettings


def advantages(rewards, groups=None, **settings) -> list[float]:
    found = group_advantages(rewards, groups or [0] * len(rewards), PolicyLossSettings(**settings))
    assert found.values_N.dtype == torch.float64
    return found.values_N.tolist()


@pytest.mark.parametrize("advantage, epsilon, expected", [
    ("sample-std", 1e-4, 0.707007), ("sample-std", 1e-6, 0.707106), ("population-std", 0.0, 1.0),
    ("population-std", 1e-4, 0.9998), ("none", 1e-4, 0.5)])
def test_one_name_and_several_numbers(advantage, epsilon, expected):
    found = advantages([1, 0], advantage=advantage, advantage_epsilon=epsilon)
    assert found == pytest.approx([expected, -expected], abs=5e-7)


def test_the_default_is_that_of_trl():
    assert advantages([1.0, 0.0])[0] == pytest.approx(0.5 / (math.sqrt(0.5) + 1e-4))


def test_groups_may_be_mixed_and_of_any_size():
    """Of groups 7: rewards 0, 3, 3 (deviations -2, 1, 1), and 2: rewards 10 and 20."""
    found = advantages([0, 10, 3, 20, 3], [7, 2, 7, 2, 7], advantage="population-std", advantage_epsilon=0.0)
    assert found == pytest.approx([-math.sqrt(2), -1, math.sqrt(0.5), 1, math.sqrt(0.5)])


def test_an_unknown_reward_has_no_part_in_its_group():
    found = advantages([1, None, 0, math.nan], advantage="population-std", advantage_epsilon=0.0)
    assert found == [1, 0, -1, 0]


def test_even_groups_are_found_and_teach_nothing():
    """0.1 three times has a mean that is not 0.1: without care 1e-17 / 0."""
    found = group_advantages([0.1, 0.1, 0.1, 5.0, 1.0, None, 1.0, 0.0], [4, 4, 4, 9, 2, 2, 3, 3],
                             PolicyLossSettings(advantage="population-std", advantage_epsilon=0.0))
    assert found.even_groups == (4, 9, 2)
    assert found.values_N.tolist() == [0, 0, 0, 0, 0, 0, 1, -1]


def test_a_mistake_is_named():
    with pytest.raises(ValueError, match="--advantage batch is not one of sample-std, population-std, none"):
        advantages([1, 0], advantage="batch")
    with pytest.raises(ValueError, match="a reward is infinite: -inf"):
        advantages([1, -math.inf])
