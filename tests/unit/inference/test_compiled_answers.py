"""Answers of compiled layers: the tokens of layers that are not, and no graph after the warm-up."""

import pytest
import torch
from small_engines import QWEN, V3_MTP, engine, loaded

from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.model.compiled import compile_stages
from megatron_deepseek.torch_private import compiled_so_far

GREEDY = SamplingParameters(temperature=0, max_tokens=8)
PROMPTS = [[3, 1, 4], [1], list(range(40)), [5, 9, 2, 6, 5, 3, 5]]


@pytest.mark.slow
@pytest.mark.parametrize("config", [V3_MTP, QWEN], ids=["latent", "grouped"])
def test_tokens_are_the_same(meshes, config):
    """Prompts of one token and of many, side by side and in chunks, with drafts."""
    expected = engine(loaded(config, meshes)).generate(PROMPTS, GREEDY)
    model = loaded(config, meshes)
    compile_stages([model.stage], "aot_eager", torch.device("cuda"))  # all functions that are ever graphs
    answering = engine(model, draft_tokens=1, token_budget=16)
    answering.warm_up()
    graphs = compiled_so_far()[0]
    assert [each[0].tokens for each in answering.generate(PROMPTS, GREEDY)] == [each[0].tokens for each in expected]
    assert graphs > 0 and compiled_so_far()[0] == graphs
