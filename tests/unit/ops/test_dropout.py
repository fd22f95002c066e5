"""The masks of dropout: against Python's integers, their statistics, and a part of the features like the whole."""

import itertools

import pytest
import torch
from reference_dropout import is_kept, stream
from torch.autograd import gradcheck

from megatron_deepseek.ops.dropout import Dropout
from megatron_deepseek.ops.hashing import split_mix, stream_key

NAME = "model.layers.1.self_attn.q_a_proj.weight"
DROPOUT = Dropout(0.25, stream_key(f"dropout:{NAME}"))
KEYS = split_mix(torch.arange(512), 1)


def test_each_bit_of_a_mask_by_pythons_integers():
    mask = DROPOUT.mask(KEYS[:6], 11)
    assert stream(f"dropout:{NAME}") == DROPOUT.stream % 2**64
    for row, feature in itertools.product(range(6), range(11)):
        assert mask[row, feature].item() == is_kept(int(KEYS[row]) % 2**64, NAME, feature, 0.25), (row, feature)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_the_rate(rate):
    """Of 2^20 features within 5 standard errors, and 1/65536 of rounding; what is left makes up for what is lost."""
    dropout = Dropout(rate, 3)
    dropped = 1 - dropout.mask(KEYS, 2048).double().mean().item()
    assert abs(dropped - rate) < 5 * (rate * (1 - rate) / 2**20)**0.5 + 2**-16
    assert dropout.factor * (1 - rate) == pytest.approx(1, rel=2e-4)
    assert dropout(torch.ones(512, 2048), KEYS).mean().item() == pytest.approx(1, abs=0.01)


def test_a_rate_of_almost_everything_leaves_finite_numbers():
    assert torch.isfinite(Dropout(1 - 1e-9, 3)(torch.ones(512, 64), KEYS)).all()


def test_masks_are_independent():
    """Correlations within 5 standard errors: of features beside each other, of tokens, of names, of experts."""
    dropped = (~DROPOUT.mask(KEYS, 2048)).double() - 0.25
    others = {"name": Dropout(0.25, stream_key("dropout:other")).mask(KEYS, 2048),
              "expert": DROPOUT.mask(split_mix(torch.tensor(1), KEYS), 2048)}
    pairs = {name: (dropped, (~mask).double() - 0.25) for name, mask in others.items()}
    pairs |= {f"feature {lag}": (dropped[:, :-lag], dropped[:, lag:]) for lag in (1, 2, 3, 4, 8)}
    pairs |= {f"token {lag}": (dropped[:-lag], dropped[lag:]) for lag in (1, 2, 64)}
    for name, (one, other) in pairs.items():
        assert abs((one * other).mean().item()) / 0.1875 < 5 / one.numel()**0.5, name


@pytest.mark.parametrize("first, width", [(0, 12), (4, 8), (5, 3), (7, 13)])
def test_a_part_of_the_features_has_its_part_of_the_mask(first, width):
    part = Dropout(0.25, DROPOUT.stream, first).mask(KEYS, width)
    assert torch.equal(part, DROPOUT.mask(KEYS, 20)[:, first:first + width])


def test_gradients_are_those_of_what_is_left():
    x = torch.randn(4, 3, 10, dtype=torch.float64, requires_grad=True)
    keys = KEYS[:12].view(4, 3)
    assert gradcheck(lambda x: DROPOUT(x, keys), (x,))
    assert torch.equal(DROPOUT(x, keys) != 0, DROPOUT.mask(keys, 10))
