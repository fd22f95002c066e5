"""Parameters of sampling check themselves: what cannot be meant is refused with its name and value."""

import math
import pickle

import pytest

from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.inference.settings import EngineSettings


@pytest.mark.parametrize("field, value, message", [
    ("temperature", -0.1, "temperature is -0.1; it must be at least 0"),
    ("temperature", math.nan, "temperature nan is not a finite number"),
    ("temperature", "1", "temperature '1' is not a finite number"),
    ("top_p", 0, "top_p is 0; it must be greater than 0"),
    ("top_p", 1.5, "top_p is 1.5; it must be at most 1"),
    ("top_k", -1, "top_k is -1; it must be at least 0"),
    ("top_k", 1.0, "top_k 1.0 is not an integer"),
    ("min_p", 2, "min_p is 2; it must be at most 1"),
    ("repetition_penalty", 0, "repetition_penalty is 0; it must be greater than 0"),
    ("presence_penalty", 3, "presence_penalty is 3; it must be at most 2"),
    ("max_tokens", 0, "max_tokens is 0; it must be at least 1"),
    ("max_tokens", None, "max_tokens None is not an integer"),
    ("min_tokens", 17, "min_tokens 17 is greater than max_tokens 16"),
    ("n", 0, "n is 0; it must be at least 1"),
    ("seed", 1.5, "seed 1.5 is not an integer"),
    ("stop", ("a", 3), "stop has 3, which is no string"),
    ("stop_token_ids", (-1,), "stop_token_ids has -1, which is no token id"),
    ("logit_bias", {"x": 1}, "logit_bias has 'x': 1, which is no token id with a number"),
    ("logit_bias", {3: math.inf}, "logit_bias has 3: inf; a bias must be finite, or -inf to ban the token")])
def test_what_cannot_be_is_refused(field, value, message):
    with pytest.raises(ValueError) as refused:
        SamplingParameters(**{field: value})
    assert str(refused.value).startswith(message)


def test_lists_strings_and_jsons_keys_are_read():
    parameters = SamplingParameters(stop="\n", stop_token_ids=[3], logit_bias={"5": -math.inf}, seed=-3)
    assert (parameters.stop, parameters.stop_token_ids, parameters.logit_bias) == (("\n",), (3,), {5: -math.inf})
    assert SamplingParameters(stop=["", "a", ""]).stop == ("a",)
    assert pickle.loads(pickle.dumps(parameters)) == parameters  # ranks send them to each other


def test_sizes_of_an_engine_are_checked():
    with pytest.raises(ValueError, match="token_budget is 0; it must be at least 1"):
        EngineSettings(max_length=8, token_budget=0)
    with pytest.raises(ValueError, match="num_blocks 1 of 16 tokens do not hold one request of max_length 17"):
        EngineSettings(max_length=17, num_blocks=1)
