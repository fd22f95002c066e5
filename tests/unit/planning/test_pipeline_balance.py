"""The division of layers over stages, by hand-worked cases and against trying every division."""

import dataclasses
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_deepseek.model.architecture.presets import TINY, V3
from megatron_deepseek.parallel.layout_string import parse, to_string
from megatron_deepseek.planning.pipeline_balance import divide, head_cost, layer_cost, mtp_cost, resolve, stages
from megatron_deepseek.settings import PipelineSettings


@pytest.mark.parametrize("costs, parts, expected", [
    ([1, 1, 1, 1], 2, [(0, 2), (2, 4)]),
    ([1, 1, 1, 3], 2, [(0, 3), (3, 4)]),
    ([2, 2, 2, 2, 5], 2, [(0, 3), (3, 5)]),  # 6 | 7 beats 8 | 5
    ([1, 1, 1, 1, 1, 9], 3, [(0, 2), (2, 5), (5, 6)]),  # below the maximum of 9 as even as can be: 2 | 3
    ([4, 2, 1, 6, 2], 3, [(0, 2), (2, 4), (4, 5)]),  # maximum 7, though 4 | 3 | 8 has the lesser sum of squares
    ([3], 1, [(0, 1)]),
])
def test_divisions_by_hand(costs, parts, expected):
    assert divide(costs, parts) == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_no_division_is_better(costs, data):
    parts = data.draw(st.integers(1, len(costs)))
    bounds = divide(costs, parts)

    def value(bounds):
        sums = [sum(costs[first:end]) for first, end in bounds]
        return max(sums), sum(cost * cost for cost in sums)

    every = ([*zip((0, *cut), (*cut, len(costs)))] for cut in combinations(range(1, len(costs)), parts - 1))
    assert value(bounds) == min(map(value, every))
    assert all(first < end for first, end in bounds)


def test_costs_by_hand():
    """Tiny, 256 tokens. Attention: q 128*64 + 64 + 64*4*48, kv 128*48 + 32 + 32*4*64, out 4*32*128; 4*(48+32)*128
    for scores and values; dense MLP 3*128*384; experts 128*16 + 3*128*64*5; two norms of 128."""
    attention = 8192 + 64 + 12288 + 6144 + 32 + 8192 + 16384 + 40960
    assert layer_cost(TINY, 0, 256) == attention + 147456 + 256
    assert layer_cost(TINY, 1, 256) == attention + 2048 + 122880 + 256
    assert head_cost(TINY) == 2 * 8192 * 128
    assert mtp_cost(TINY, 256) == layer_cost(TINY, 1, 256) + 2 * 128 * 128 + 3 * 128


def test_tiny_on_two_stages():
    """Layers 0.24M + 3 x 0.22M, MTP module 0.25M, head 2 x 1.05M: the head outweighs all layers and the module."""
    assert to_string(stages(TINY, 2, 256)) == "Ettttm|L"
    assert to_string(stages(TINY, 4, 256)) == "Ett|tt|m|L"


@pytest.mark.parametrize("model, count", [(TINY, 1), (TINY, 6), (V3, 16), (V3, 32), (V3, 63)])
def test_stages_are_a_whole_model(model, count):
    result = stages(model, count)
    assert len(result) == count
    assert parse(to_string(result), model.num_hidden_layers, model.num_nextn_predict_layers) == result


def test_a_layer_is_heavier_in_longer_sequences():
    """At 128K tokens attention dwarfs the head, so that V3's last stage gets as many layers as the others."""
    short, long = stages(V3, 16, 4096), stages(V3, 16, 131072)
    assert len(short[-1].layers) < len(long[-1].layers)


def test_more_stages_than_parts():
    with pytest.raises(ValueError, match="7 pipeline stages .* 6 parts"):
        stages(TINY, 7)


def test_resolve_prefers_the_layout_string():
    assert to_string(resolve(TINY, PipelineSettings("1F1B", "Et|tttmL", 1), 2, 256)) == "Et|tttmL"
    assert to_string(resolve(TINY, PipelineSettings("DualPipeV", None, 2), 2, 256)) == "Ett|tt|m|L"
    dense = dataclasses.replace(TINY, n_routed_experts=0, num_nextn_predict_layers=0, vocab_size=64)
    assert to_string(resolve(dense, PipelineSettings(), 2, 256)) == "Ett|ttL"
