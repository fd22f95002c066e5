"""From the generation_kwargs of an lm-eval task to this engine's sampling, by the rules of lm-eval's own models."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_deepseek.inference.sampling_parameters import SamplingParameters

USUAL_TOKENS = 256  # of an answer, where a task says nothing, as in lm-eval
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
_SAMPLED = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "skip_special_tokens": True}


def sampling_of(given: Mapping[str, Any], seed: int) -> SamplingParameters:
    """Return how a question is answered; `seed` is used where answers are sampled.

    Without `do_sample` a temperature above 0 asks for it; with `do_sample: false` the likeliest tokens are taken.

    Raise ValueError for an option that the engine does not have.
    """
    known = (*_LENGTHS, *_SAMPLED, *_WITHOUT_EFFECT, "until", "do_sample", "temperature")
    for name, value in given.items():
        if name not in known or (name in _WITHOUT_EFFECT and value != _WITHOUT_EFFECT[name]):
            raise ValueError(f"generation_kwargs has {name}: {value!r:.60}, which this engine does not have")
    length = next((given[name] for name in _LENGTHS if given.get(name) is not None), USUAL_TOKENS)
    temperature = float(given.get("temperature") or 0.0)
    samples = temperature > 0 if given.get("do_sample") is None else given["do_sample"]
    more = {name: given[name] for name in _SAMPLED if given.get(name) is not None}
    if samples:
        temperature = temperature if "temperature" in given else 1.0
        return SamplingParameters(max_tokens=int(length), temperature=temperature, stop=stops_of(given), seed=seed,
                                  **more)
    more.pop("top_p", None), more.pop("top_k", None), more.pop("min_p", None)
    return SamplingParameters(max_tokens=int(length), temperature=0.0, stop=stops_of(given), **more)


def stops_of(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the texts that end an answer, without empty ones."""
    until = given.get("until") or ()
    return tuple(each for each in ((until,) if isinstance(until, str) else until) if each)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of `stops` in it."""
    for each in stops:
        text = text.partition(each)[0]
    return text
