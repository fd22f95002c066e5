"""Initial weights: the generator's known numbers, the distribution, and that nothing but (seed, name, index) counts."""

import itertools
from dataclasses import replace

import pytest
import torch
from small_models import V3_SMALL, weights_of, whole_model, whole_stage

from megatron_deepseek.model.build import BuildOptions, Precision, build_stages
from megatron_deepseek.model.init import global_index, normal
from megatron_deepseek.ops.hashing import split_mix
from megatron_deepseek.parallel.layout_string import Stage

CPU = torch.device("cpu")
CONFIG = replace(V3_SMALL, num_nextn_predict_layers=1, attention_bias=True)


@pytest.mark.parametrize("seed, expected", [
    (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
               16408922859458223821]),
    (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B])])
def test_split_mix_known_numbers(seed, expected):
    """The published outputs of SplitMix64, whose n-th number is that of counter n."""
    bits = split_mix(torch.arange(1, 6), seed)
    assert [int(b) % 2**64 for b in bits] == expected


def test_normal_distribution():
    """2^20 draws: mean, variance, skewness, kurtosis and the tail within 5 of their standard errors."""
    n = 1 << 20
    x = normal(torch.arange(n), 1, "w")
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean().item() - moment) < 5 * (variance / n) ** 0.5, power
    tail = 0.0026997960632601866  # P(|x| > 3)
    assert abs((x.abs() > 3).double().mean().item() - tail) < 5 * (tail / n) ** 0.5


def test_no_repeats_and_no_correlation():
    """Neither along a parameter nor between names or seeds; 5 standard errors of a correlation of 2^18 pairs."""
    index = torch.arange(1 << 18)
    draws = [normal(index, seed, name) for seed, name in ((1, "a"), (1, "b"), (2, "a"))]
    together = torch.cat(draws)
    assert together.unique().numel() == together.numel()
    pairs = [*itertools.combinations(draws, 2), *((draws[0], draws[0].roll(lag)) for lag in (1, 2, 64, 4096))]
    for a, b in pairs:
        assert abs((a * b).mean().item()) < 5 / (1 << 9)


@pytest.mark.parametrize("shape, parts", [
    ((6,), (3,)), ((8, 6), (4, 1)), ((8, 6), (1, 3)), ((8, 6), (2, 2)), ((4, 6, 5), (2, 3, 1)), ((3, 4, 5), (3, 2, 5))])
def test_global_index_is_a_slice_of_the_whole(shape, parts):
    """For every shard of every division: the places of its elements in the flattened parameter."""
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    local = torch.Size(s // p for s, p in zip(shape, parts))
    for place in itertools.product(*map(range, parts)):
        offset = torch.Size(p * size for p, size in zip(place, local))
        expected = whole[tuple(slice(o, o + size) for o, size in zip(offset, local))].flatten()
        got = global_index(0, local.numel(), torch.Size(shape), local, offset, CPU)
        assert torch.equal(got, expected)
        middle = local.numel() // 2
        halves = [global_index(a, b, torch.Size(shape), local, offset, CPU)
                  for a, b in ((0, middle), (middle, local.numel()))]
        assert torch.equal(torch.cat(halves), expected)


def test_values_are_the_named_draws(meshes):
    """Norm weights one, biases and router biases zero, every other weight its own normal draws times the std."""
    for name, weight in weights_of(whole_model(CONFIG, meshes, 4, seed=3)).items():
        if name.endswith("norm.weight"):
            expected = torch.ones_like(weight)
        elif name.endswith("bias"):
            expected = torch.zeros_like(weight)
        else:
            expected = (normal(torch.arange(weight.numel()), 3, name) * CONFIG.initializer_range).view_as(weight)
        assert torch.equal(weight, expected), name


def test_a_stage_starts_as_its_part_of_the_whole(meshes):
    whole = weights_of(whole_model(CONFIG, meshes, 4))
    parts = [Stage(True, (0,), (), False), Stage(False, (1,), (), False), Stage(False, (), (0,), True)]
    stages = build_stages(CONFIG, parts, meshes, 4, BuildOptions(seed=1, precision=Precision(torch.float64)))
    names = [name for stage in stages for name in weights_of(stage)]
    assert set(names) == whole.keys() and names.count("model.embed_tokens.weight") == 2
    for stage in stages:
        for name, weight in weights_of(stage).items():
            assert torch.equal(weight, whole[name]), name


def test_seed_changes_every_drawn_weight(meshes):
    one, two = (weights_of(whole_model(CONFIG, meshes, 4, seed=seed)) for seed in (1, 2))
    same = {name for name in one if torch.equal(one[name], two[name])}
    assert same == {name for name in one if name.endswith(("norm.weight", "bias"))}


def test_precision_rounds_the_same_draws(meshes):
    """A bfloat16 run starts from the float32 run's masters, which are the float64 draws rounded once."""
    wide = weights_of(whole_model(CONFIG, meshes, 4))
    for precision in (Precision(), Precision(torch.float32, torch.bfloat16)):
        narrow = whole_model(CONFIG, meshes, 4, precision=precision)
        assert {parameter.dtype for parameter in narrow.parameters()} == {torch.float32}
        for name, weight in weights_of(narrow, torch.float32).items():
            assert torch.equal(weight, wide[name].float()), name


def test_blocks_do_not_show(meshes, monkeypatch):
    """Drawing a few elements at a time changes nothing."""
    whole = weights_of(whole_model(CONFIG, meshes, 4))
    monkeypatch.setattr("megatron_deepseek.model.init.ELEMENTS_AT_A_TIME", 7)
    for name, weight in weights_of(whole_model(CONFIG, meshes, 4)).items():
        assert torch.equal(weight, whole[name]), name


def test_default_dtype_is_put_back(meshes):
    before = torch.get_default_dtype()
    with pytest.raises(ValueError):
        build_stages(replace(CONFIG, hidden_size=0), [whole_stage(CONFIG)], meshes, 4)
    whole_model(CONFIG, meshes, 4)
    assert torch.get_default_dtype() == before
