"""Kept routing on one process, in float64: tokens go to the experts that were given, token by token; losses, gradients,
balance and biases are those of a plain reference that is told the same experts.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from reference_model import ReferenceModel
from reference_routing import weights_of_choice
from small_models import (
    V2_SMALL,
    V3_SMALL,
    enliven,
    gradients_of,
    random_batch,
    relative_error,
    training_batch,
    weights_of,
    whole_stage,
)
from small_trainers import LOSS, NO_CLIPPING, reference_step

from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.model.compiled import compile_stages
from megatron_deepseek.model.positions import REPLAYED
from megatron_deepseek.model.rotary import rope_table
from megatron_deepseek.model.router import route
from megatron_deepseek.settings import LossSettings, RecomputeSettings
from megatron_deepseek.training.replay import layers_to_replay, stack_experts
from megatron_deepseek.training.trainer import Trainer, TrainingSpec

V3 = replace(V3_SMALL, num_hidden_layers=4, num_nextn_predict_layers=1)  # of which the first is dense
LENGTH, ROWS = 6, 4
EXACT = 1e-12  # the same sums
CLOSE = 1e-10  # sums in another order


def trainer(meshes, config=V3, **options) -> Trainer:
    build = BuildOptions(**{"precision": Precision(torch.float64), "loss": LOSS} | options)
    spec = TrainingSpec(config, (whole_stage(config),), "1F1B", LENGTH, 2, build, NO_CLIPPING)
    made = Trainer(spec, meshes)
    enliven(made.stages[0])
    return made


@cache
def given_experts(config=V3, free: float = 0.3) -> torch.Tensor:
    """[B, S, L, K] of which no router chooses anything: K different experts for each token and layer, from groups that
    the limit would not allow together; every row has tokens that are left free in all layers, the first one among them.
    """
    generator = torch.Generator().manual_seed(7)
    order = torch.rand(ROWS, LENGTH, config.num_moe_layers, config.n_routed_experts, generator=generator).argsort(-1)
    experts = order[..., :config.num_experts_per_tok].to(torch.int16)
    left = torch.rand(ROWS, LENGTH, generator=generator) < free
    left[:, 0] = free > 0
    return experts.masked_fill(left[..., None, None], -1)


def given_batch(experts_BSLK: torch.Tensor | None, config=V3):
    more = {} if experts_BSLK is None else {REPLAYED: experts_BSLK}
    return training_batch(*random_batch(config, ROWS, LENGTH), per_token=more)


@pytest.mark.parametrize("config", [V2_SMALL, replace(V2_SMALL, topk_method="greedy"), V3_SMALL],
                         ids=["v2", "greedy", "v3"])
def test_weights_of_given_experts_are_made_of_all_scores_by_the_models_own_rule(config):
    """Of experts in groups that the limit forbids, with a bias that would choose others; a row of -1 is free. By the
    written-out formula, and so are gradients: every given expert's logit gets one, and with softmax every other's too.
    """
    logits_TE = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    bias_E = torch.tensor([9.0, 9, 9, 0, 0, 0, 0, 0]).double() if config.topk_method == "noaux_tc" else None
    given_TK = torch.tensor([[7, 0, 4], [-1, -1, -1], [3, 2, 6]], dtype=torch.int16)
    experts_TK, weights_TK, scores_TE = route(logits_TE, bias_E, given_TK, config)
    free_TK, free_weights_TK, _ = route(logits_TE, bias_E, None, config)
    assert experts_TK[0].tolist() == [7, 0, 4] and experts_TK[2].tolist() == [3, 2, 6]
    assert experts_TK[1].equal(free_TK[1]) and weights_TK[1].equal(free_weights_TK[1])
    upstream_TK = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad((weights_TK * upstream_TK)[[0, 2]].sum(), logits_TE)
    plain = logits_TE.softmax(-1) if config.scoring_func == "softmax" else logits_TE.sigmoid()
    rows = [(weights_of_choice(plain[t], given_TK[t].tolist(), config), upstream_TK[t], weights_TK[t]) for t in (0, 2)]
    for wanted_K, _, found_K in rows:
        torch.testing.assert_close(found_K, wanted_K, rtol=EXACT, atol=0)
    (wanted,) = torch.autograd.grad(sum((wanted_K * upstream_K).sum() for wanted_K, upstream_K, _ in rows), logits_TE)
    torch.testing.assert_close(found, wanted, rtol=EXACT, atol=1e-14)
    assert found[0, [7, 0, 4]].abs().min() > 1e-6


def test_tokens_go_to_the_experts_that_were_given(meshes):
    """Token by token, layer by layer; free tokens, and MTP's, go where their routers say."""
    made, experts_BSLK = trainer(meshes), given_experts()
    replayed = made.score(given_batch(experts_BSLK), experts=True).experts
    free = made.score(given_batch(None), experts=True).experts
    assert tuple(replayed) == layers_to_replay(V3) == ("model.layers.1.mlp", "model.layers.2.mlp", "model.layers.3.mlp")
    found_BSLK, free_BSLK = stack_experts(replayed, V3), stack_experts(free, V3)
    left_BS = experts_BSLK[..., 0, 0] < 0
    assert 0 < left_BS.sum() < left_BS.numel()
    assert torch.equal(found_BSLK[~left_BS], experts_BSLK[~left_BS])
    assert torch.equal(found_BSLK[:, 0, 0], free_BSLK[:, 0, 0]), "what comes before is the same"
    assert (found_BSLK[left_BS] >= 0).all() and not torch.equal(found_BSLK, free_BSLK)


@pytest.mark.parametrize("config", [V3, replace(V2_SMALL, num_hidden_layers=3, num_nextn_predict_layers=1)],
                         ids=["v3", "v2"])
def test_a_step_is_that_of_a_plain_model_that_is_told_the_experts(meshes, config):
    """Losses, the balance loss of free tokens alone, and every gradient."""
    made, experts_BSLK = trainer(meshes, config), given_experts(config)
    reference = ReferenceModel(config, weights_of(made.stages[0]),
                               rope_table(config, LENGTH, torch.device("cpu"), torch.float64), config.qk_head_dim**-0.5)
    reference.given = {name: experts_BSLK[:, :, place].long() for place, name in enumerate(layers_to_replay(config))}
    lm_loss, mtp_loss, balance = reference_step(reference, *random_batch(config, ROWS, LENGTH))
    result = made.train_step(given_batch(experts_BSLK, config), learning_rate=0.0)
    assert result.losses.lm_loss == pytest.approx(lm_loss.item(), rel=CLOSE)
    assert result.losses.mtp_loss == pytest.approx((mtp_loss.item(),), rel=CLOSE)
    assert result.losses.balance_loss == pytest.approx(balance.item(), rel=CLOSE)
    expected = reference.gradients()
    errors = {name: relative_error(g, expected[name]) for name, g in gradients_of(made.stages[0]).items()}
    assert max(errors.values()) < CLOSE, errors


NO_BALANCE = LossSettings(mtp_loss_scaling_factor=0.3, balance_type="none")


@pytest.mark.parametrize("options", [{}, {"recompute": RecomputeSettings("full")},
                                     {"recompute": RecomputeSettings("selective", ("moe_act", "layernorm"))}],
                         ids=["kept", "full", "selective"])
def test_a_models_own_choices_replayed_change_nothing(meshes, options):
    """Nor do they in a recomputed forward."""
    free, again = (trainer(meshes, loss=NO_BALANCE, **options) for _ in range(2))
    own = stack_experts(free.score(given_batch(None), experts=True).experts, V3)
    results = free.train_step(given_batch(None), 0.0), again.train_step(given_batch(own), 0.0)
    assert results[1].losses.lm_loss == pytest.approx(results[0].losses.lm_loss, rel=EXACT)
    assert results[1].losses.mtp_loss == pytest.approx(results[0].losses.mtp_loss, rel=EXACT)
    wanted, found = gradients_of(free.stages[0]), gradients_of(again.stages[0])
    errors = {name: relative_error(found[name], gradient) for name, gradient in wanted.items()}
    assert max(errors.values()) < EXACT, errors


def test_a_recomputed_forward_replays(meshes):
    """Experts that no router would choose: if the second forward chose by itself, gradients would be others."""
    made = [trainer(meshes, recompute=recompute) for recompute in (RecomputeSettings(), RecomputeSettings("full"))]
    for each in made:
        each.train_step(given_batch(given_experts()), 0.0)
    wanted, found = (gradients_of(each.stages[0]) for each in made)
    assert max(relative_error(found[name], gradient) for name, gradient in wanted.items()) < EXACT


def test_graphs_replay(meshes):
    """As compiled functions do; with aot_eager, whose graphs are the compiler's."""
    plain, compiled = trainer(meshes), trainer(meshes)
    compile_stages(compiled.stages, "aot_eager", meshes.device)
    for experts in (given_experts(), None, given_experts()):
        results = [each.train_step(given_batch(experts), 0.0) for each in (plain, compiled)]
        assert results[1].losses.lm_loss == pytest.approx(results[0].losses.lm_loss, rel=EXACT)
        assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=CLOSE)


def test_replayed_tokens_count_for_neither_bias_nor_balance(meshes):
    """All given: experts of the main model count nothing, their biases stay; the MTP module's go on."""
    made = trainer(meshes)
    biases = {name: buffer for name, buffer in made.stages[0].named_buffers() if "bias" in name}
    before = {name: bias.clone() for name, bias in biases.items()}
    result = made.train_step(given_batch(given_experts(free=0.0)), 0.0, bias_rate=0.1)
    moved = {name for name, bias in biases.items() if not bias.equal(before[name])}
    assert moved == {"model.layers.4.mlp.gate.e_score_correction_bias"} and len(before) == 4
    assert [int(result.expert_counts[name].sum()) for name in layers_to_replay(V3)] == [0, 0, 0]
    mtp_alone = trainer(meshes, loss=replace(LOSS, moe_aux_loss_coeff=0.0)).train_step(given_batch(None), 0.0)
    assert result.losses.balance_loss > 0 and mtp_alone.losses.balance_loss == 0


def test_counts_are_those_of_free_tokens(meshes):
    made, experts_BSLK = trainer(meshes), given_experts()
    left = int((experts_BSLK[..., 0, 0] < 0).sum())
    result = made.train_step(given_batch(experts_BSLK), 0.0)
    assert {int(result.expert_counts[name].sum()) for name in layers_to_replay(V3)} == {left * 3}


def test_padding_counts_for_nothing_beside_replayed_tokens(meshes):
    """The balance loss is that of free tokens that are there, whatever stands behind a row's end."""
    made, experts_BSLK = trainer(meshes), given_experts()
    real_BS = torch.arange(LENGTH) < torch.tensor([[6], [3], [4], [2]])
    losses = []
    for padding in (1, 2):
        tokens, labels, mask = random_batch(V3, ROWS, LENGTH)
        batch = training_batch(tokens.where(real_BS, padding), labels, mask & real_BS, real_BS=real_BS,
                               per_token={REPLAYED: experts_BSLK.masked_fill(~real_BS[..., None, None], -1)})
        losses.append(made.train_step(batch, 0.0).losses.balance_loss)
    assert losses[0] == pytest.approx(losses[1], rel=EXACT) and losses[0] > 0


def test_dropped_copies_are_a_part_of_all_copies(meshes):
    """One expert gets every token's first copy, and of each sequence's 6 tokens it takes ceil(0.5 * 6 * 3 / 8) = 2."""
    config = replace(V3, num_nextn_predict_layers=0, num_hidden_layers=2)
    loss = LossSettings(balance_type="none", moe_expert_capacity_factor=0.5, moe_token_drop_policy="position")
    experts = torch.tensor([[0, 1 + s, 7 - (s + 3) % 7] for s in range(LENGTH)], dtype=torch.int16)
    experts[experts[:, 1] == experts[:, 2], 2] = 7
    held = {e: min(int((experts == e).sum()), 2) for e in range(8)}
    result = trainer(meshes, config, loss=loss).train_step(
        given_batch(experts.expand(ROWS, LENGTH, 3).unsqueeze(2), config), 0.0)
    assert held[0] == 2 and result.dropped == pytest.approx(1 - sum(held.values()) / (LENGTH * 3), rel=EXACT)


@pytest.mark.parametrize("experts, loss, wanted", [
    (torch.zeros(ROWS, LENGTH, 2, 3, dtype=torch.int16), LOSS, "replayed experts are 2 x 3 for each token, and the "
     "model has 3 MoE layers with 3 experts of a token"),
    (torch.zeros(ROWS, LENGTH, 3, 3), LOSS, "replayed experts are torch.float32: they must be integers"),
    (torch.zeros(ROWS, LENGTH, 3, 3, dtype=torch.int16), replace(LOSS, moe_router_force_load_balancing=True),
     "--moe-router-force-load-balancing chooses all experts, and the batch has experts to replay")])
def test_what_cannot_be_replayed_is_refused(meshes, experts, loss, wanted):
    with pytest.raises(ValueError) as error:
        trainer(meshes, loss=loss).score(given_batch(experts))
    assert str(error.value) == wanted
