"""The routers on cases worked by hand, then against a token-at-a-time reference on random scores.

Choices are integers and must be equal; weights are float64 and differ by rounding alone (1e-12).
"""

from dataclasses import replace

import pytest
import torch
from reference_routing import choose, weights_of_choice
from small_models import V2_SMALL, V3_SMALL

from megatron_deepseek.model.router import Router, choose_experts, expert_weights
from megatron_deepseek.parallel.tensor import TensorParallel

# 8 experts in 4 groups of 2, two groups kept
V2_SCORES = [0.30, 0.01, 0.02, 0.25, 0.20, 0.19, 0.01, 0.02]


def experts_of(scores: list[float], config, bias: list[float] | None = None) -> set[int]:
    scores_TE = torch.tensor([scores], dtype=torch.float64)
    bias_E = None if bias is None else torch.tensor(bias, dtype=torch.float64)
    (chosen,) = choose_experts(scores_TE, bias_E, config).tolist()
    assert len(set(chosen)) == len(chosen)
    return set(chosen)


def test_v2_groups_count_by_their_best_expert():
    """Best experts of the groups are 0.30, 0.25, 0.20, 0.02: groups 0 and 1 stay, though group 2's sum is larger."""
    config = replace(V2_SMALL, num_experts_per_tok=3)
    assert experts_of(V2_SCORES, config) == {0, 3, 2}


def test_greedy_knows_no_groups():
    assert experts_of(V2_SCORES, replace(V2_SMALL, topk_method="greedy")) == {0, 3, 4}


def test_v3_groups_count_by_their_best_two():
    """Sums of the groups' best two are 0.31, 0.27, 0.39, 0.03: groups 2 and 0 stay."""
    assert experts_of(V2_SCORES, V3_SMALL, [0.0] * 8) == {0, 4, 5}


def test_only_two_of_a_group_count():
    """Three middling experts do not outweigh two good ones: 0.5 + 0.5 > 0.4 + 0.4, though 1.0 < 1.2."""
    config = replace(V3_SMALL, n_group=2, topk_group=1, num_experts_per_tok=2)
    scores = [0.5, 0.5, 0.0, 0.0, 0.4, 0.4, 0.4, 0.0]
    assert experts_of(scores, config, [0.0] * 8) == {0, 1}


def test_bias_steers_groups_and_choice():
    """+1 on expert 7 brings group 3 in (0.01 + 1.02) beside group 2 (0.39), and expert 7 before all."""
    assert experts_of(V2_SCORES, V3_SMALL, [0, 0, 0, 0, 0, 0, 0, 1.0]) == {7, 4, 5}


def test_negative_scores_of_kept_groups_win_over_dropped_groups():
    """A bias can make every choice score negative; an expert outside the kept groups must still not be chosen."""
    config = replace(V3_SMALL, topk_group=1, num_experts_per_tok=2)
    assert experts_of(V2_SCORES, config, [-5.0] * 8) == {4, 5}


def test_all_groups_kept_is_no_limit():
    config = replace(V2_SMALL, topk_group=4)
    assert experts_of(V2_SCORES, config) == experts_of(V2_SCORES, replace(config, topk_method="greedy"))


@pytest.mark.parametrize("normalised, factor, expected", [
    (False, 1.0, [0.30, 0.20]), (False, 16.0, [4.8, 3.2]), (True, 1.0, [0.6, 0.4]), (True, 2.5, [1.5, 1.0])])
def test_weights_by_hand(normalised, factor, expected):
    """Scaling is never dropped where weights are normalised; the weights are those of experts 0 and 4."""
    config = replace(V3_SMALL, num_experts_per_tok=2, norm_topk_prob=normalised, routed_scaling_factor=factor)
    scores = torch.tensor([V2_SCORES], dtype=torch.float64)
    weights = expert_weights(scores, torch.tensor([[0, 4]]), config)
    torch.testing.assert_close(weights, torch.tensor([expected], dtype=torch.float64), rtol=1e-12, atol=0)


def test_one_expert_is_not_normalised():
    config = replace(V3_SMALL, num_experts_per_tok=1, norm_topk_prob=True, routed_scaling_factor=2.0)
    weights = expert_weights(torch.tensor([V2_SCORES], dtype=torch.float64), torch.tensor([[3]]), config)
    assert weights.item() == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("config", [
    V2_SMALL, replace(V2_SMALL, topk_method="greedy"), V3_SMALL, replace(V3_SMALL, n_group=2, topk_group=1),
    replace(V3_SMALL, n_group=1, topk_group=1), replace(V3_SMALL, scoring_func="softmax")])
def test_random_scores_against_the_reference(config):
    generator = torch.Generator().manual_seed(3)
    scores_TE = torch.rand(200, config.n_routed_experts, generator=generator, dtype=torch.float64)
    biased = config.topk_method == "noaux_tc"
    bias_E = torch.randn(config.n_routed_experts, generator=generator, dtype=torch.float64) if biased else None
    chosen_TK = choose_experts(scores_TE, bias_E, config)
    weights_TK = expert_weights(scores_TE, chosen_TK, config)
    for scores, chosen, weights in zip(scores_TE, chosen_TK.tolist(), weights_TK):
        expected = choose(scores.tolist(), bias_E.tolist() if biased else None, config)
        assert set(chosen) == set(expected)
        torch.testing.assert_close(weights, weights_of_choice(scores, chosen, config), rtol=1e-12, atol=0)


def router(config, meshes) -> Router:
    torch.manual_seed(0)
    gate = Router(config, TensorParallel(meshes.tp, False))
    torch.nn.init.normal_(gate.weight)
    return gate


def test_bias_leaves_the_weights_alone(meshes):
    """A bias that chooses other experts: their weights are still their own scores, and no gradient goes to it."""
    config = replace(V3_SMALL, topk_group=4, norm_topk_prob=False, routed_scaling_factor=1.0)
    gate = router(config, meshes)
    x_TH = torch.randn(5, config.hidden_size)
    plain = gate(x_TH)
    gate.e_score_correction_bias += torch.tensor([10.0, 20.0, 30.0, 0, 0, 0, 0, 0])
    steered = gate(x_TH)
    assert steered.experts_TK.sort(-1).values.tolist() == [[0, 1, 2]] * 5
    assert torch.equal(steered.scores_TE, plain.scores_TE)
    assert torch.equal(steered.weights_TK, plain.scores_TE.gather(-1, steered.experts_TK))
    assert "e_score_correction_bias" not in dict(gate.named_parameters())


def test_router_is_float32_under_bfloat16_activations(meshes):
    """Logits of bfloat16 inputs are not rounded to bfloat16, and scores are those of float32 arithmetic."""
    gate = router(V3_SMALL, meshes)
    x_TH = torch.randn(5, V3_SMALL.hidden_size).bfloat16()
    routing = gate(x_TH)
    assert routing.scores_TE.dtype == routing.weights_TK.dtype == torch.float32
    assert torch.equal(routing.scores_TE, (x_TH.float() @ gate.weight.t()).sigmoid())


def test_gradient_goes_through_weights_to_input_and_router(meshes):
    """Normalised weights of a token add up to the factor, so only their differences have gradients; here, by autograd
    of the written-out formula."""
    gate = router(V3_SMALL, meshes)
    x_TH = torch.randn(4, V3_SMALL.hidden_size, requires_grad=True)
    upstream = torch.randn(4, 3)
    routing = gate(x_TH)
    (routing.weights_TK * upstream).sum().backward()

    x = x_TH.detach().clone().requires_grad_()
    weight = gate.weight.detach().clone().requires_grad_()
    chosen = (x @ weight.t()).sigmoid().gather(-1, routing.experts_TK)
    (2.5 * chosen / chosen.sum(-1, keepdim=True) * upstream).sum().backward()
    torch.testing.assert_close(x_TH.grad, x.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gate.weight.grad, weight.grad, rtol=1e-5, atol=1e-6)
