"""generation_kwargs of tasks, by the rules of lm-eval's normalize_gen_kwargs and its models."""

import pytest

from megatron_deepseek.evaluation.generation_options import cut_at, sampling_of
from megatron_deepseek.inference.sampling_parameters import SamplingParameters


@pytest.mark.parametrize("given, expected", [
    ({}, SamplingParameters(max_tokens=256, temperature=0)),
    ({"until": "\n", "max_gen_toks": 5}, SamplingParameters(max_tokens=5, temperature=0, stop=("\n",))),
    ({"until": ["a", ""], "do_sample": False, "temperature": 0.7, "top_p": 0.5, "top_k": 3},
     SamplingParameters(max_tokens=256, temperature=0, stop=("a",))),
    ({"temperature": 0.7, "top_p": 0.9}, SamplingParameters(max_tokens=256, temperature=0.7, top_p=0.9, seed=3)),
    ({"do_sample": True}, SamplingParameters(max_tokens=256, temperature=1.0, seed=3)),
    ({"do_sample": True, "temperature": 0.2, "max_new_tokens": 7, "max_tokens": 9, "num_beams": 1},
     SamplingParameters(max_tokens=7, temperature=0.2, seed=3)),
    ({"repetition_penalty": 1.1}, SamplingParameters(max_tokens=256, temperature=0, repetition_penalty=1.1))])
def test_sampling(given, expected):
    assert sampling_of(given, seed=3) == expected


@pytest.mark.parametrize("given, message", [
    ({"num_beams": 4}, "generation_kwargs has num_beams: 4, which this engine does not have"),
    ({"penalty_alpha": 0.6}, "generation_kwargs has penalty_alpha: 0.6"),
    ({"top_p": 2, "do_sample": True}, "top_p is 2")])
def test_what_cannot_be_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        sampling_of(given, seed=0)


def test_a_text_ends_at_the_first_stop_in_it():
    assert cut_at("one two three", ("three", "two")) == "one " and cut_at("one", ("two",)) == "one"
