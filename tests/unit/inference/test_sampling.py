"""Choosing a token: against transformers' logits processors, and by counting draws."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_deepseek.inference.request import Numbers, Request, Sequence
from megatron_deepseek.inference.sampling import adjusted, candidates, draw, next_token
from megatron_deepseek.inference.sampling_parameters import SamplingParameters

SIZE = 50


def sequence(prompt=(1, 2), answer=(), seed=0, ends=(), **parameters) -> Sequence:
    request = Request("a", 1, tuple(prompt), SamplingParameters(**parameters), frozenset(ends), None, seed)
    made = Sequence(request, 0, list(prompt), Numbers(seed), None)
    for token in answer:
        made.append(token)
    return made


def random_logits(size: int = SIZE, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def probabilities(logits_V: torch.Tensor, parameters: SamplingParameters) -> torch.Tensor:
    """Of every id, from what `candidates` leaves."""
    weights, ids = candidates(logits_V / parameters.temperature, parameters)
    dense = torch.zeros_like(logits_V)
    dense[torch.arange(len(weights)) if ids is None else ids] = weights
    return dense / dense.sum()


@pytest.mark.parametrize("size", [SIZE, 1000])  # of the larger one only some are sorted at first
@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.6}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_p": 0.999, "temperature": 3.0},
    {"top_k": 300, "top_p": 0.99, "temperature": 2.0}, {"top_k": 10, "top_p": 0.7, "min_p": 0.2, "temperature": 1.3},
    {"top_k": 10**6, "top_p": 1e-9}])
def test_probabilities_are_those_of_transformers(options, size):
    parameters, logits = SamplingParameters(**options), random_logits(size)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(parameters.temperature))])
    warpers += [TopKLogitsWarper(parameters.top_k)] if parameters.top_k else []
    warpers += [TopPLogitsWarper(parameters.top_p)] if parameters.top_p < 1 else []
    warpers += [MinPLogitsWarper(parameters.min_p)] if parameters.min_p else []
    expected = warpers(torch.zeros(1, 1, dtype=torch.int64), logits.unsqueeze(0))[0].softmax(-1)
    torch.testing.assert_close(probabilities(logits, parameters), expected, rtol=1e-5, atol=1e-7)


def test_the_repetition_penalty_is_that_of_transformers():
    made, logits = sequence((1, 2, 2), (7, 9, 7), repetition_penalty=1.7), random_logits()
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([made.tokens]), logits.unsqueeze(0).clone())[0]
    torch.testing.assert_close(adjusted(logits, made), expected)


def test_penalties_biases_and_bans_by_hand():
    logits = random_logits()
    made = sequence((1, 2), (7, 9, 7), frequency_penalty=0.5, presence_penalty=0.25, logit_bias={3: 2.0, 4: -math.inf},
                    min_tokens=4, ends=(5, 6))
    expected = logits.clone()
    expected[7] -= 2 * 0.5 + 0.25
    expected[9] -= 0.5 + 0.25
    expected[3] += 2
    expected[[4, 5, 6]] = -math.inf
    before = logits.clone()
    assert adjusted(logits, made).equal(expected) and logits.equal(before)
    made.append(8)
    assert adjusted(logits, made)[5] == logits[5]  # four tokens are enough


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8, "temperature": 0.7}])
def test_draws_follow_the_probabilities(options):
    """Chi-square of 1e5 draws: with 7 degrees of freedom 29.9 is exceeded once in 10,000 times; the seed is fixed."""
    logits, parameters = random_logits(8, seed=3), SamplingParameters(**{"temperature": 1.2} | options)
    numbers = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    weights, ids = candidates(logits / parameters.temperature, parameters)
    counts = draw(weights, ids, numbers).bincount(minlength=8)
    expected = 100_000 * probabilities(logits, parameters)
    assert not counts[expected == 0].any()
    assert ((counts - expected).square() / expected)[expected > 0].sum() < 29.9


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 400, "top_p": 0.9}, {"min_p": 0.01}, {}])
def test_rows_together_have_the_candidates_of_each_alone(options):
    """Of a peaked row the first few tokens are enough, of a flat one all are sorted."""
    parameters = SamplingParameters(**options)
    rows = torch.stack([random_logits(1000) * 3, random_logits(1000, seed=1) * 0.1, random_logits(1000, seed=2) * 3])
    numbers = torch.rand(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    weights, ids = candidates(rows, parameters)
    drawn = draw(weights, ids, numbers)
    for row, logits in enumerate(rows):
        own = weights[row].new_zeros(1000)
        own[torch.arange(1000) if ids is None else ids[row, :1000]] += weights[row]
        expected = probabilities(logits, parameters)
        torch.testing.assert_close(own / own.sum(), expected, rtol=1e-6, atol=0)
        assert drawn[row].equal(draw(*candidates(logits, parameters), numbers[row]))


def test_a_draw_of_a_token_without_weight_is_impossible():
    weights, numbers = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]), torch.tensor([0.0, 0.49999, 0.5, 1.0]).double()
    assert draw(weights, None, numbers).tolist() == [1, 1, 3, 3]
    assert draw(weights, torch.arange(10, 15), numbers).tolist() == [11, 11, 13, 13]


def test_a_seed_gives_the_same_draws_and_another_one_others():
    def draws(seed):
        made = sequence(seed=seed)
        return [next_token(random_logits(seed=step), made).token for step in range(40)]

    assert draws(1) == draws(1) != draws(2)


def test_greedy_takes_the_likeliest_after_penalties():
    logits = random_logits()
    best, second = logits.topk(2).indices.tolist()
    assert next_token(logits, sequence(temperature=0)).token == best
    assert next_token(logits, sequence(temperature=0, logit_bias={best: -math.inf})).token == second


def test_one_parameter_alone_is_replaced():
    assert replace(SamplingParameters(top_p=0.5), temperature=0).greedy
