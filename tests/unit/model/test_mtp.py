"""Multi-Token Prediction: labels by hand, modules against transformers' MTP layers, losses by their definition.

test_reference.py compares MTP models of depth 1 and 2 with a plain float64 reference, gradients included.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    V3_SMALL,
    enliven,
    forward,
    gradients_of,
    load,
    random_batch,
    relative_error,
    weights_of,
    whole_model,
)
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.model.shifts import shifted_labels

BATCH, SEQ_LENGTH = 2, 8


def test_shifted_labels_by_hand():
    """Tokens 10 11 12 13, next 14; label 12 is not to be trained on."""
    labels = torch.tensor([[11, 12, 13, 14]])
    mask = torch.tensor([[1.0, 0.0, 0.5, 1.0]])
    labels_BMS, mask_BMS = shifted_labels(labels, mask, 2)
    assert labels_BMS.tolist() == [[[11, 12, 13, 14], [12, 13, 14, 0], [13, 14, 0, 0]]]
    assert mask_BMS.tolist() == [[[1.0, 0.0, 0.5, 1.0], [0.0, 0.5, 1.0, 0.0], [0.5, 1.0, 0.0, 0.0]]]


def test_shifted_labels_without_mtp():
    labels, mask = torch.tensor([[1, 2]]), torch.tensor([[1.0, 0.0]])
    labels_BMS, mask_BMS = shifted_labels(labels, mask, 0)
    assert torch.equal(labels_BMS, labels.unsqueeze(1)) and torch.equal(mask_BMS, mask.unsqueeze(1))


def test_shift_longer_than_the_sequence():
    labels_BMS, mask_BMS = shifted_labels(torch.tensor([[5, 6]]), torch.ones(1, 2), 3)
    assert labels_BMS[0, 2:].tolist() == [[0, 0], [0, 0]] and not mask_BMS[0, 2:].any()


def mtp_model(meshes, depth: int, dtype=torch.float64):
    config = replace(V3_SMALL, num_nextn_predict_layers=depth)
    model = whole_model(config, meshes, SEQ_LENGTH, dtype)
    enliven(model)
    return model


class TheirMTP(torch.nn.Module):
    """transformers' model with its MTP layers behind it: the state of each depth is passed on after its norm."""

    def __init__(self, config: DeepseekV3Config, depth: int):
        super().__init__()
        self.main = DeepseekV3ForCausalLM(config)
        mtp_config = config.get_mtp_config()
        self.mtp = torch.nn.ModuleList([MtpLayer(mtp_config, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, k)
                                        for k in range(depth)])

    def forward(self, whole: torch.Tensor, seq_length: int) -> list[torch.Tensor]:
        positions = torch.arange(seq_length).unsqueeze(0)
        states = [self.main.model(whole[:, :seq_length]).last_hidden_state]
        rotary = self.main.model.rotary_emb(states[0], positions)
        for k, layer in enumerate(self.mtp, start=1):
            tokens = F.pad(whole, (0, k))[:, k:k + seq_length]
            states.append(layer(self.main.model.embed_tokens(tokens), states[-1], rotary, None, positions, None))
        return [self.main.lm_head(state) for state in states]

    def our_names(self, num_layers: int) -> dict[str, str]:
        """Our name of each of its parameters, which is the name in released checkpoints."""
        names = {}
        for name, _ in self.named_parameters():
            kind, rest = name.split(".", 1)
            if kind == "mtp":
                k, rest = rest.split(".", 1)
                rest = rest.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
                rest = f"model.layers.{num_layers + int(k)}.{rest}"
            names[name] = rest
        return names


@pytest.mark.parametrize("depth", [1, 2])
def test_against_transformers(meshes, depth):
    """float32, so a few roundings: 1e-5 of the largest logit, 5e-5 of a parameter's largest gradient."""
    config = DeepseekV3Config(
        vocab_size=40, hidden_size=24, intermediate_size=20, moe_intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=3, kv_lora_rank=10, q_lora_rank=14, qk_nope_head_dim=6,
        qk_rope_head_dim=8, v_head_dim=10, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2,
        first_k_dense_replace=1, num_nextn_predict_layers=depth, max_position_embeddings=64, rms_norm_eps=0.1)
    reference = TheirMTP(config, depth)
    enliven(reference)
    ours = ModelConfig.from_hf_dict(config.to_dict())
    model = whole_model(ours, meshes, SEQ_LENGTH, torch.float32)
    names = reference.our_names(ours.num_hidden_layers)
    names |= {name: name.removeprefix("main.") for name in reference.state_dict() if name.startswith("main.")}
    bias = "gate.e_score_correction_bias"
    names |= {f"mtp.{k}.mtp_block.mlp.{bias}": f"model.layers.{2 + k}.mlp.{bias}" for k in range(depth)}
    load(model, {names[name]: weight for name, weight in weights_of(reference, torch.float32).items()})

    tokens, labels, mask = random_batch(ours, BATCH, SEQ_LENGTH)
    outcome = forward(model, tokens, labels, mask, mtp_scale=0.5)
    outcome.loss.backward()
    logits = reference(torch.cat([tokens, labels[:, -1:]], 1), SEQ_LENGTH)
    losses = [F.cross_entropy(logits[k][:, :SEQ_LENGTH - k][mask[:, k:]], labels[:, k:][mask[:, k:]])
              for k in range(depth + 1)]
    (losses[0] + 0.5 / depth * sum(losses[1:])).backward()

    for got, expected in zip(outcome.logits, logits, strict=True):
        assert relative_error(got, expected) < 1e-5
    gradients = gradients_of(model)
    expected = {names[name]: p.grad for name, p in reference.named_parameters()}
    assert gradients.keys() == expected.keys()
    errors = {name: relative_error(gradients[name], expected[name]) for name in expected}
    assert max(errors.values()) < 5e-5, errors


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_losses_by_definition(meshes, depth):
    """Depth k: mean over its own N_k valid labels. The total takes lambda / D of each; 1e-12: only sums differ."""
    model = mtp_model(meshes, depth)
    tokens, labels, mask = random_batch(model.config, BATCH, SEQ_LENGTH)
    outcome = forward(model, tokens, labels, mask, mtp_scale=0.6)
    expected, counts = [], []
    for k, logits in enumerate(outcome.logits):
        valid = mask[:, k:]
        counts.append(valid.sum().item())
        expected.append(F.cross_entropy(logits[:, :SEQ_LENGTH - k][valid], labels[:, k:][valid]).item())
    assert len(set(counts)) == depth + 1, "the batch does not tell the counts apart"
    assert outcome.losses == pytest.approx(expected, rel=1e-12)
    assert outcome.loss.item() == pytest.approx(expected[0] + 0.6 / depth * sum(expected[1:]), rel=1e-12)


@pytest.mark.parametrize("depth", [1, 2])
def test_depth_k_sees_token_i_plus_k_and_none_later(meshes, depth):
    """Another token at place p changes what depth k says at positions p - k and later, and nothing before.

    Rows of another expert move in its product, which may round differently: 1e-9 is far below any change.
    """
    model = mtp_model(meshes, depth)
    place = 5
    tokens, labels, mask = random_batch(model.config, 1, SEQ_LENGTH)
    before = forward(model, tokens, labels, mask).logits
    whole = torch.cat([tokens, labels[:, -1:]], 1)
    whole[0, place] = (whole[0, place] + 1) % model.config.vocab_size
    after = forward(model, whole[:, :-1], whole[:, 1:], mask).logits
    for k in range(depth + 1):
        changed = ((before[k] - after[k])[0].abs().amax(-1) > 1e-9).tolist()
        assert changed[:place - k + 1] == [False] * (place - k) + [True]


def test_masked_labels_take_no_part(meshes):
    """No valid label at all: losses of zero, not of nothing divided by nothing."""
    model = mtp_model(meshes, 1)
    tokens, labels, mask = random_batch(model.config, BATCH, SEQ_LENGTH)
    outcome = forward(model, tokens, labels, torch.zeros_like(mask))
    assert outcome.loss.item() == 0.0 and outcome.losses[1] == 0.0


def test_mtp_scale_zero_trains_nothing_of_the_module(meshes):
    model = mtp_model(meshes, 1)
    forward(model, *random_batch(model.config, BATCH, SEQ_LENGTH), mtp_scale=0.0).loss.backward()
    module = [g for name, g in gradients_of(model).items() if name.startswith("model.layers.2.")]
    assert module and not any(gradient.any() for gradient in module)
