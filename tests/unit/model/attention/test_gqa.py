"""Grouped-query attention: RoPE on halves, kernels with fewer heads of keys, and the layer against its definition.

The layers of released families are compared whole in test_family_parity.py. float64 sums in another order: EXACT.
Tables are float32 on both sides: 1e-6 is a few roundings.
"""

from dataclasses import replace

import pytest
import torch
from small_models import LLAMA_SMALL, enliven, forward, random_batch, weights_of, whole_model
from torch.autograd import gradcheck
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from megatron_deepseek.model.architecture.config import RopeScaling
from megatron_deepseek.model.rotary import inverse_frequencies, rope_table, softmax_scale
from megatron_deepseek.ops.attention import Scores, attend, attend_backward, attention, plain_backward, plain_forward
from megatron_deepseek.ops.documents import Documents
from megatron_deepseek.ops.rope import apply_rope_to_halves

EXACT = {"rtol": 1e-12, "atol": 1e-13}
CPU = torch.device("cpu")
WIDE = replace(LLAMA_SMALL, head_dim=16, max_position_embeddings=64)
SCALINGS = {
    "llama3": RopeScaling("llama3", 8.0, 32, low_freq_factor=1.0, high_freq_factor=4.0),
    "llama3_all_slow": RopeScaling("llama3", 4.0, 2, low_freq_factor=1.0, high_freq_factor=2.0),
    "yarn": RopeScaling("yarn", 4.0, 16),
    "yarn_attention_factor": RopeScaling("yarn", 4.0, 16, attention_factor=1.3),
    "yarn_mscales": RopeScaling("yarn", 4.0, 16, mscale=0.7, mscale_all_dim=1.2),
    "linear": RopeScaling("linear", 3.0),
    "dynamic": RopeScaling("dynamic", 4.0),
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("seq_length", [32, 200])
def test_frequencies_against_transformers(name, seq_length):
    scaling = SCALINGS[name]
    config = replace(WIDE, rope_theta=100.0, rope_scaling=scaling)
    rope = {key: value for key, value in config.to_hf_dict()["rope_scaling"].items() if key != "type"}
    theirs = LlamaConfig(head_dim=16, max_position_embeddings=64,
                         rope_parameters=rope | {"rope_type": scaling.kind, "rope_theta": 100.0})
    expected, factor = ROPE_INIT_FUNCTIONS[scaling.kind](theirs, CPU, seq_len=seq_length)
    torch.testing.assert_close(inverse_frequencies(config, seq_length), expected, rtol=1e-6, atol=0)
    angles = torch.outer(torch.arange(seq_length), expected)
    torch.testing.assert_close(rope_table(config, seq_length, CPU), factor * torch.stack([angles.cos(), angles.sin()]),
                               rtol=1e-5, atol=1e-5)
    assert softmax_scale(config) == 16**-0.5


def test_halves_against_transformers():
    """In float32, as it computes; and what lies behind the rotary dimensions stays."""
    x, table = random(2, 11, 3, 16).float(), rope_table(WIDE, 11, CPU)
    cos, sin = torch.cat([table, table], -1).unsqueeze(1)
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    torch.testing.assert_close(apply_rope_to_halves(x, table), expected.transpose(1, 2))
    longer = torch.cat([x, random(2, 11, 3, 5, seed=1).float()], -1)
    turned = apply_rope_to_halves(longer, table)
    assert torch.equal(turned[..., 16:], longer[..., 16:])
    torch.testing.assert_close(turned[..., :16], apply_rope_to_halves(x, table))


def test_halves_gradient_and_precision():
    table = rope_table(WIDE, 4, CPU)
    assert gradcheck(lambda x: apply_rope_to_halves(x, table), (random(1, 4, 1, 18).requires_grad_(),))
    x = random(2, 4, 3, 16).bfloat16()
    assert torch.equal(apply_rope_to_halves(x, table), apply_rope_to_halves(x.float(), table).bfloat16())


@pytest.mark.parametrize("causal", [False, True])
def test_kernels_with_fewer_heads_of_keys(causal):
    """Those of the CPU and the plain ones, against keys and values repeated for each head of queries."""
    q, k, v, scores = random(2, 6, 5, 8), random(2, 2, 5, 8, seed=1), random(2, 2, 5, 8, seed=2), Scores(0.3, causal)
    grad = random(2, 6, 5, 8, seed=3)
    wide = [x.repeat_interleave(3, 1) for x in (k, v)]
    expected = plain_forward(q, *wide, scores)
    *of_q, of_k, of_v = plain_backward(grad, q, *wide, *expected, scores)
    wanted = (*of_q, *(x.unflatten(1, (2, 3)).sum(2) for x in (of_k, of_v)))
    for attention_of, gradients in ((plain_forward, plain_backward), (attend, attend_backward)):
        for found, one in zip(attention_of(q, k, v, scores), expected, strict=True):
            torch.testing.assert_close(found, one, **EXACT)
        for found, one in zip(gradients(grad, q, k, v, *expected, scores), wanted, strict=True):
            torch.testing.assert_close(found, one, **EXACT)


@pytest.mark.parametrize("packed", [False, True])
def test_whole_attention_with_fewer_heads_of_keys(packed):
    q, k, v = random(2, 7, 6, 8), random(2, 7, 2, 8, seed=1), random(2, 7, 2, 8, seed=2)
    documents = Documents.find(torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0] * 7])) if packed else None
    found = attention(q, k, v, documents, 0.3, 8)
    expected = attention(q, *(x.repeat_interleave(3, 2) for x in (k, v)), documents, 0.3, 8)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("changes", [{}, {"partial_rotary_factor": 0.5}, {"qk_norm": True, "num_key_value_heads": 1},
                                     {"qkv_bias": True, "sliding_window": 3,
                                      "layer_types": ("sliding_attention", "full_attention")}], ids=str)
def test_the_layer_against_its_definition(meshes, changes):
    """Head by head, with all scores; no class of transformers that is read here turns a part of a head."""
    config = replace(LLAMA_SMALL, head_dim=8, **changes)
    model = whole_model(config, meshes, 9)
    enliven(model)
    prefix, given = "model.layers.0.self_attn.", []
    weights = {name.removeprefix(prefix): weight for name, weight in weights_of(model).items() if prefix in name}
    model.model.layers["0"].self_attn.register_forward_hook(lambda _, args, output: given.append((args[0], output)))
    forward(model, *random_batch(config, 2, 9))
    (x, found), = given
    table = rope_table(config, 9, CPU, torch.float64)

    def heads(name: str) -> torch.Tensor:
        y = x @ weights[f"{name}_proj.weight"].t() + weights.get(f"{name}_proj.bias", 0)
        y = y.unflatten(-1, (-1, 8)).transpose(1, 2)
        if name != "v" and config.qk_norm:
            y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}_norm.weight"]
        return y

    def turned(y: torch.Tensor) -> torch.Tensor:
        half = config.rotary_dim // 2
        pairs = torch.complex(y[..., :half], y[..., half:2 * half]) * torch.complex(*table)
        return torch.cat([pairs.real, pairs.imag, y[..., 2 * half:]], -1)

    group = config.num_attention_heads // config.num_key_value_heads
    q, k, v = turned(heads("q")), *(y.repeat_interleave(group, 1) for y in (turned(heads("k")), heads("v")))
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    if config.sliding_window:
        seen = seen.triu(1 - config.sliding_window)
    scores = (q @ k.mT * 8**-0.5).masked_fill(~seen, float("-inf")).softmax(-1)
    expected = (scores @ v).transpose(1, 2).flatten(-2) @ weights["o_proj.weight"].t()
    torch.testing.assert_close(found, expected, **EXACT)
