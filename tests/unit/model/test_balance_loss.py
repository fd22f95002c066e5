"""Balance losses against loops over the papers' formulas, in float64 (differences are rounding: 1e-12), and the
bias update on counts worked by hand."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from reference_routing import balance_loss as slow_loss
from small_models import V2_SMALL, V3_SMALL, forward, random_batch, whole_model

from megatron_deepseek.model.balance_loss import BalanceWeights, attach_loss, balance_loss
from megatron_deepseek.model.router import Routing, choose_experts
from megatron_deepseek.settings import LossSettings
from megatron_deepseek.training.balance import update_expert_bias

EXACT = {"rtol": 1e-12, "atol": 1e-14}
SEQUENCES, TOKENS = 3, 11
ALPHAS = {"expert": 0.3, "device": 0.05, "communication": 0.02}
V3_ONE_OF_TWO = replace(V3_SMALL, n_group=2, topk_group=1, num_experts_per_tok=2)


def routing_of(config, bias: float = 0.0, seed: int = 0) -> Routing:
    """Random scores; noaux_tc chooses with a bias that prefers the last experts."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(SEQUENCES * TOKENS, config.n_routed_experts, generator=generator, dtype=torch.float64)
    scores = logits.softmax(-1) if config.scoring_func == "softmax" else logits.sigmoid()
    bias_E = bias * torch.arange(config.n_routed_experts) if config.topk_method == "noaux_tc" else None
    return Routing(choose_experts(scores, bias_E, config), scores, scores.requires_grad_())


@pytest.mark.parametrize("config", [V2_SMALL, replace(V2_SMALL, topk_method="greedy"), V3_SMALL, V3_ONE_OF_TWO])
@pytest.mark.parametrize("level", ["expert", "device", "communication", "all"])
def test_loss_and_gradient_by_loops(config, level):
    alphas = ALPHAS if level == "all" else {"expert": 0.0, level: ALPHAS[level]}
    routing = routing_of(config, bias=0.4)
    loss = balance_loss(routing, SEQUENCES, config, BalanceWeights(**alphas), None)
    (gradient,) = torch.autograd.grad(loss, routing.scores_TE)

    scores = routing.scores_TE.detach().clone().requires_grad_()
    expected = sum(slow_loss(scores_TE, config, **alphas) for scores_TE in scores.split(TOKENS))
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, scores)[0], **EXACT)


def test_without_sequences_the_micro_batch_is_one():
    """seq_aux false pools the tokens; the loss keeps the weight of its sequences in the mean over the batch."""
    routing = routing_of(V2_SMALL)
    loss = balance_loss(routing, SEQUENCES, V2_SMALL, BalanceWeights(**ALPHAS, per_sequence=False), None)
    torch.testing.assert_close(loss / SEQUENCES, slow_loss(routing.scores_TE, V2_SMALL, **ALPHAS), **EXACT)


@pytest.mark.parametrize("config", [V2_SMALL, V3_SMALL])
def test_tokens_that_are_not_routed_are_not_there(config):
    """Sequences of 11, 4 and no tokens: the loss and gradient of the tokens alone."""
    routing, lengths = routing_of(config, bias=0.4), torch.tensor([TOKENS, 4, 0])
    routed_BS = torch.arange(TOKENS) < lengths.unsqueeze(1)
    loss = balance_loss(routing, SEQUENCES, config, BalanceWeights(**ALPHAS), None, routed_BS)
    (gradient,) = torch.autograd.grad(loss, routing.scores_TE)
    scores = routing.scores_TE.detach().clone().requires_grad_()
    expected = sum(slow_loss(each[:length], config, **ALPHAS) for each, length in zip(scores.split(TOKENS), (11, 4)))
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, scores)[0], **EXACT)


def test_uniform_use_by_hand():
    """4 experts in 2 groups, top-1, each expert chosen once by a score of 0.7 over three of 0.1.

    f_i = 4/(1*4)*1 = 1, P_i = (0.7 + 3*0.1)/4 = 0.25: expert level 1. f' = 1, P' = 0.5: device level 1. Each of the
    2 devices receives 2 tokens, M = 1: f'' = 2/(1*4)*2 = 1: communication level 1.
    """
    config = replace(V2_SMALL, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=1)
    scores = 0.1 + 0.6 * torch.eye(4, dtype=torch.float64)
    routing = Routing(torch.arange(4).unsqueeze(1), scores, scores)
    for level in ALPHAS:
        weights = BalanceWeights(**{level: 0.25})
        assert balance_loss(routing, 1, config, weights, None).item() == pytest.approx(0.25, rel=1e-12)


def test_collapse_by_hand():
    """All 4 tokens at expert 0, which has 0.7: f = (4, 0, 0, 0), P_0 = 0.7, expert level 2.8. f' = (2, 0),
    P'_0 = 0.8: device level 1.6. f'' = (2/4*4, 0): communication level 1.6."""
    config = replace(V2_SMALL, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=1)
    scores = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 4, dtype=torch.float64)
    routing = Routing(torch.zeros(4, 1, dtype=torch.int64), scores, scores)
    for level, expected in (("expert", 2.8), ("device", 1.6), ("communication", 1.6)):
        weights = BalanceWeights(**{level: 1.0})
        assert balance_loss(routing, 1, config, weights, None).item() == pytest.approx(expected, rel=1e-12)


def test_the_bias_changes_the_choice_but_not_the_loss():
    """V3 counts the choice that un-biased scores would make (equation 18)."""
    plain, biased = routing_of(V3_SMALL), routing_of(V3_SMALL, bias=5.0)
    assert not torch.equal(plain.experts_TK.sort(-1).values, biased.experts_TK.sort(-1).values)
    weights = BalanceWeights(expert=1.0)
    losses = [balance_loss(routing, SEQUENCES, V3_SMALL, weights, None) for routing in (plain, biased)]
    assert torch.equal(*losses)


def test_v3_affinities_are_normalised():
    """Scaling all of a token's sigmoid scores changes nothing (equation 19)."""
    routing = routing_of(V3_SMALL)
    halved = Routing(routing.experts_TK, routing.weights_TK, routing.scores_TE / 2)
    losses = [balance_loss(each, SEQUENCES, V3_SMALL, BalanceWeights(expert=1.0), None) for each in (routing, halved)]
    torch.testing.assert_close(*losses, **EXACT)


def test_attached_loss_is_back_propagated_once():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    parameter = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    y = attach_loss(x, parameter**3)
    assert torch.equal(y, x)
    (5 * y).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 5))
    assert parameter.grad.item() == 12  # of parameter^3, whatever y's gradient is


def test_counts_are_exact_and_add_up(meshes):
    """Two forwards into one statistics: int64 counts of every routed copy, the MTP layer's included."""
    config = replace(V3_SMALL, num_nextn_predict_layers=1)
    model = whole_model(config, meshes, TOKENS)
    tokens, labels, mask = random_batch(config, SEQUENCES, TOKENS)
    counts = forward(model, tokens, labels, mask).statistics.expert_counts
    assert counts.keys() == {"model.layers.1.mlp", "model.layers.2.mlp"}
    for counts_E in counts.values():
        assert counts_E.dtype == torch.int64
        assert counts_E.sum() == SEQUENCES * TOKENS * config.num_experts_per_tok


def test_no_balance_loss_in_evaluation(meshes):
    loss = LossSettings(balance_type="seq_aux_loss", moe_aux_loss_coeff=1.0)
    model = whole_model(V3_SMALL, meshes, TOKENS, loss=loss)
    batch = random_batch(V3_SMALL, SEQUENCES, TOKENS)
    assert forward(model, *batch).statistics.balance_loss > 0
    assert forward(model.eval(), *batch).statistics.balance_loss == 0


def test_bias_moves_toward_the_unloaded(meshes):
    """Mean of the counts is 4: above it the bias falls, below it rises, at it nothing moves; by the rate exactly."""
    model = whole_model(replace(V3_SMALL, first_k_dense_replace=1), meshes, TOKENS, torch.float32)
    counts = torch.tensor([0, 3, 4, 5, 8, 4, 4, 4])
    total = update_expert_bias([model], {"model.layers.1.mlp": counts}, 0.001, dist.group.WORLD)
    bias = model.model.layers["1"].mlp.gate.e_score_correction_bias
    expected = 0.001 * torch.tensor([1, 1, 0, -1, -1, 0, 0, 0], dtype=torch.float32)
    assert torch.equal(bias, expected)
    assert torch.equal(total["model.layers.1.mlp"], counts)


def test_bias_sign_is_right_for_large_counts(meshes):
    """2^24 + 1 against a mean of 2^24 + 1/8: float32 (and bfloat16 long before) would see no difference."""
    model = whole_model(V3_SMALL, meshes, TOKENS, torch.float32)
    counts = torch.full((8,), 2**24)
    counts[3] += 1
    update_expert_bias([model], {"model.layers.1.mlp": counts}, 0.5, dist.group.WORLD)
    bias = model.model.layers["1"].mlp.gate.e_score_correction_bias
    assert bias.tolist() == [0.5, 0.5, 0.5, -0.5, 0.5, 0.5, 0.5, 0.5]


def test_rate_zero_and_softmax_routers_change_nothing(meshes):
    model = whole_model(V3_SMALL, meshes, TOKENS, torch.float32)
    counts = {"model.layers.1.mlp": torch.arange(8)}
    update_expert_bias([model], counts, 0.0, dist.group.WORLD)
    assert not model.model.layers["1"].mlp.gate.e_score_correction_bias.any()
    v2 = whole_model(V2_SMALL, meshes, TOKENS, torch.float32)
    assert update_expert_bias([v2], counts, 0.1, dist.group.WORLD).keys() == counts.keys()
