"""Rotary embedding against complex numbers and transformers; frequencies against its ROPE_INIT_FUNCTIONS and by hand.

Tables are float32 on both sides: 1e-6 is a few roundings.
"""

import math
from dataclasses import replace

import pytest
import torch
from small_models import V3_SMALL
from torch.autograd import gradcheck
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

from megatron_deepseek.model.architecture.config import RopeScaling
from megatron_deepseek.model.architecture.presets import V2, V3
from megatron_deepseek.model.rotary import inverse_frequencies, rope_table, softmax_scale, yarn_mscale
from megatron_deepseek.ops.rope import apply_rope

CPU = torch.device("cpu")
CONFIG = replace(V3_SMALL, qk_rope_head_dim=16, max_position_embeddings=64)
V3_YARN = RopeScaling("yarn", 40.0, 4096, 32, 1, 1.0, 1.0)


def states(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(2, 11, 3, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_turns_complex_numbers():
    """exact up to float64 rounding, given the same float32 table."""
    x, table = states(), rope_table(CONFIG, 11, CPU)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    turned = pairs * torch.complex(*table.double())[None, :, None]
    torch.testing.assert_close(apply_rope(x, table), torch.view_as_real(turned).flatten(-2), rtol=1e-12, atol=1e-13)


def test_gradient():
    x = states()[:1, :4, :1].clone().requires_grad_()
    assert gradcheck(lambda x: apply_rope(x, rope_table(CONFIG, 4, CPU)), (x,))


def test_scores_depend_on_the_distance_alone():
    x, table = states(), rope_table(CONFIG, 30, CPU).double()
    near = (apply_rope(x, table[:, :11]) * apply_rope(x.flip(1), table[:, 4:15])).sum(-1)
    far = (apply_rope(x, table[:, 15:26]) * apply_rope(x.flip(1), table[:, 19:30])).sum(-1)
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)


def test_position_zero_is_left_alone():
    x = states()
    assert torch.equal(apply_rope(x, rope_table(CONFIG, 11, CPU))[:, 0], x[:, 0])


def test_bfloat16_is_turned_in_float32():
    x, table = states().bfloat16(), rope_table(CONFIG, 11, CPU)
    got = apply_rope(x, table)
    assert got.dtype == torch.bfloat16 and torch.equal(got, apply_rope(x.float(), table).bfloat16())


def test_against_transformers():
    """V2 keeps pairs interleaved, as here; V3 puts even dimensions before odd ones, the same for queries and keys."""
    x, table = states(torch.float32), rope_table(CONFIG, 11, CPU)
    got, heads_first = apply_rope(x, table), x.transpose(1, 2)
    v2, _ = apply_rotary_emb(heads_first, heads_first, torch.complex(*table).unsqueeze(0))
    torch.testing.assert_close(got, v2.transpose(1, 2))
    cos, sin = torch.cat([table, table], -1).unsqueeze(1)
    v3, _ = apply_rotary_pos_emb_interleave(heads_first, heads_first, cos, sin)
    halves = got.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(halves, v3.transpose(1, 2))


SCALINGS = {
    "linear": RopeScaling("linear", 3.0),
    "dynamic": RopeScaling("dynamic", 4.0),
    "dynamic_factor_1": RopeScaling("dynamic", 1.0),
    "v3": V3_YARN,
    "v2": RopeScaling("yarn", 40.0, 4096, 32, 1, 0.707, 0.707),
    "two_mscales": RopeScaling("yarn", 8.0, 256, 16, 2, 0.5, 1.5),
    "yarn_factor_1": RopeScaling("yarn", 1.0, 64, 32, 1, 1.0, 1.0),
    "all_slow": RopeScaling("yarn", 8.0, 3, 32, 1, 1.0, 1.0),
    "all_fast": RopeScaling("yarn", 8.0, 10**9, 32, 1, 1.0, 1.0),
}


@pytest.mark.parametrize("theta", [100.0, 10000.0])
@pytest.mark.parametrize("seq_length", [32, 64, 200])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_against_transformers(name, seq_length, theta):
    scaling = SCALINGS[name]
    config = replace(CONFIG, rope_scaling=scaling, rope_theta=theta)
    fields = {"rope_type": scaling.kind, "rope_theta": theta, "factor": scaling.factor}
    if scaling.kind == "yarn":
        fields |= {name: getattr(scaling, name) for name in
                   ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")}
    theirs = DeepseekV3Config(qk_rope_head_dim=16, max_position_embeddings=64, rope_parameters=fields)
    expected, factor = ROPE_INIT_FUNCTIONS[scaling.kind](theirs, CPU, seq_len=seq_length)
    torch.testing.assert_close(inverse_frequencies(config, seq_length), expected, rtol=1e-6, atol=0)
    table = rope_table(config, seq_length, CPU)
    angles = torch.outer(torch.arange(seq_length), expected)
    torch.testing.assert_close(table, factor * torch.stack([angles.cos(), angles.sin()]), rtol=1e-5, atol=1e-5)


def test_plain_frequencies():
    expected = [10000 ** (-i / 16) for i in range(0, 16, 2)]
    assert inverse_frequencies(CONFIG, 5).tolist() == pytest.approx(expected, rel=1e-6)


def test_v3_yarn_by_hand():
    """64 ln(4096 / (2 pi 32)) / (2 ln 10000) = 10.47 and 64 ln(4096 / (2 pi)) / (2 ln 10000) = 22.51: pairs up to 10
    keep their speed, those from 23 on turn 40 times slower, pair 16 is 6/13 of the way."""
    config = V3
    speeds = inverse_frequencies(config, 4096).double()
    plain = 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    ratio = speeds / plain
    torch.testing.assert_close(ratio[:11], torch.ones(11, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(ratio[23:], torch.full((9,), 1 / 40, dtype=torch.float64), rtol=1e-6, atol=0)
    assert ratio[16].item() == pytest.approx(7 / 13 + 6 / 13 / 40, rel=1e-6)


def test_dynamic_stretches_only_beyond_the_limit():
    config = replace(CONFIG, rope_scaling=RopeScaling("dynamic", 4.0))
    assert torch.equal(inverse_frequencies(config, 64), inverse_frequencies(CONFIG, 64))
    base = 10000 * (4 * 128 / 64 - 3) ** (16 / 14)
    assert inverse_frequencies(config, 128)[1].item() == pytest.approx(base ** (-2 / 16), rel=1e-6)


def test_softmax_scale_by_hand():
    """V3: (0.1 ln 40 + 1)^2 / sqrt(192). V2: (0.0707 ln 40 + 1)^2 / sqrt(192)."""
    assert softmax_scale(V3) == pytest.approx(1.3688879**2 / 192**0.5, rel=1e-7)
    assert softmax_scale(V2) == pytest.approx(1.2608038**2 / 192**0.5, rel=1e-7)
    assert softmax_scale(CONFIG) == pytest.approx((6 + 16) ** -0.5, rel=1e-12)


def test_mscale_as_deepseek_has_it():
    """Without mscale_all_dim the table takes mscale's own temperature; transformers ignores mscale there."""
    scaling = RopeScaling("yarn", 40.0, 4096, 32, 1, mscale=0.5, mscale_all_dim=0.0)
    config = replace(CONFIG, rope_scaling=scaling)
    assert rope_table(config, 1, CPU)[0, 0, 0].item() == pytest.approx(1 + 0.05 * math.log(40), rel=1e-6)
    assert softmax_scale(config) == softmax_scale(CONFIG)
    assert yarn_mscale(1.0, 0.7) == yarn_mscale(0.5, 0.7) == 1.0
