"""Whole models against the plain reference, in float64: losses, logits, the gradient of every parameter.

Both compute in float64 throughout, so what is left is a different order of additions: 1e-10 of the largest number,
orders above what float64 gives and below any mistake.
"""

from dataclasses import replace

import pytest
import torch
from reference_model import ReferenceModel
from small_models import (
    V2_SMALL,
    V3_SMALL,
    enliven,
    forward,
    gradients_of,
    random_batch,
    relative_error,
    weights_of,
    whole_model,
)

from megatron_deepseek.model.architecture.config import RopeScaling
from megatron_deepseek.model.rotary import rope_table
from megatron_deepseek.settings import LossSettings

EXACT = 1e-10
BATCH, SEQ_LENGTH = 2, 5
YARN = RopeScaling("yarn", factor=16.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=0.9)

CASES = {
    "v2": V2_SMALL,
    "v2_lite": replace(V2_SMALL, topk_method="greedy", n_group=1, topk_group=1, n_shared_experts=2),
    "v2_normalised": replace(V2_SMALL, norm_topk_prob=True),
    "v2_top1_normalised": replace(V2_SMALL, norm_topk_prob=True, num_experts_per_tok=1),
    "v2_every_other_layer": replace(V2_SMALL, num_hidden_layers=4, first_k_dense_replace=0, moe_layer_freq=2),
    "v2_no_shared": replace(V2_SMALL, n_shared_experts=0),
    "v3": V3_SMALL,
    "v3_yarn": replace(V3_SMALL, rope_scaling=YARN, rms_norm_eps=1e-2),
    "v3_softmax": replace(V3_SMALL, scoring_func="softmax"),
    "v3_tied_mtp": replace(V3_SMALL, tie_word_embeddings=True, num_nextn_predict_layers=1),
    "v3_mtp2": replace(V3_SMALL, num_nextn_predict_layers=2, attention_bias=True),
    "dense": replace(V3_SMALL, n_routed_experts=0),
}


def reference_of(model) -> ReferenceModel:
    config, scale = model.config, model.config.qk_head_dim**-0.5
    if config.rope_scaling is not None:
        scale *= (1 + 0.1 * 0.9 * torch.tensor(16.0, dtype=torch.float64).log().item()) ** 2  # YARN's, by hand
    table_2SD = rope_table(config, SEQ_LENGTH, torch.device("cpu"), torch.float64)
    return ReferenceModel(config, weights_of(model), table_2SD, scale)


@pytest.mark.parametrize("name", CASES)
def test_losses_logits_gradients(meshes, name):
    config = CASES[name]
    mtp_scale = 0.4
    model = whole_model(config, meshes, SEQ_LENGTH)
    enliven(model)
    reference = reference_of(model)

    tokens, labels, mask = random_batch(config, BATCH, SEQ_LENGTH)
    outcome = forward(model, tokens, labels, mask, mtp_scale)
    outcome.loss.backward()
    whole = torch.cat([tokens, labels[:, -1:]], 1)
    lm_loss, *mtp_losses = reference.losses(whole, mask)
    total = lm_loss + sum(mtp_losses) * (mtp_scale / max(len(mtp_losses), 1))
    total.backward()

    assert outcome.loss.item() == pytest.approx(total.item(), rel=EXACT)
    assert outcome.losses == pytest.approx([loss.item() for loss in (lm_loss, *mtp_losses)], rel=EXACT)
    compare(gradients_of(model), reference.gradients())


def compare(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    wrong = {name: relative_error(gradients[name], expected[name]) for name in expected
             if relative_error(gradients[name], expected[name]) > EXACT}
    assert not wrong, wrong


@pytest.mark.parametrize("config", [V2_SMALL, V3_SMALL], ids=["v2", "v3"])
def test_balance_loss_reaches_the_gradient(meshes, config):
    """The attached loss, which is no part of the returned one, adds exactly its gradient."""
    loss = LossSettings(balance_type="seq_aux_loss", moe_aux_loss_coeff=0.3, moe_device_aux_loss_coeff=0.2,
                        moe_communication_aux_loss_coeff=0.1)
    model = whole_model(config, meshes, SEQ_LENGTH, loss=loss)
    enliven(model)
    reference = reference_of(model)
    tokens, labels, mask = random_batch(config, BATCH, SEQ_LENGTH)
    outcome = forward(model, tokens, labels, mask)
    outcome.loss.backward()

    (lm_loss,) = reference.losses(torch.cat([tokens, labels[:, -1:]], 1), mask)
    balance = reference.balance_loss(expert=0.3, device=0.2, communication=0.1)
    (lm_loss + balance).backward()
    assert outcome.loss.item() == pytest.approx(lm_loss.item(), rel=EXACT)
    assert outcome.statistics.balance_loss.item() == pytest.approx(balance.item(), rel=EXACT)
    compare(gradients_of(model), reference.gradients())
