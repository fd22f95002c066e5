"""How a request is sampled: the fields of vLLM's and OpenAI's requests, checked when they are made."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import NoneType

from megatron_deepseek.inference.grammar import Grammar

GREEDY_TEMPERATURE = 1e-5  # below it the likeliest token is taken, as in vLLM

# Least and greatest value of each number, both allowed; None for no bound.
_BOUNDS = {
    "max_tokens": (0, None), "min_tokens": (0, None), "temperature": (0, None), "top_p": (0, 1), "top_k": (0, None),
    "min_p": (0, 1), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "n": (1, None),
    "logprobs": (0, None), "prompt_logprobs": (0, None), "prompt_logprobs_from": (1, None),
    "repetition_penalty": (0, None)}
_INTEGERS = ("max_tokens", "min_tokens", "top_k", "n", "logprobs", "prompt_logprobs", "prompt_logprobs_from", "seed")
_MAY_BE_NONE = ("logprobs", "prompt_logprobs", "seed")


@dataclass(frozen=True)
class SamplingParameters:
    """What a request asks for. A value out of its bounds raises ValueError with its name.

    Logits pass, in this order: repetition, presence and frequency penalty, `logit_bias`, the ban of ends before
    `min_tokens`, temperature, `top_k` (0 keeps all), `top_p`, `min_p`. A temperature of 0 takes the likeliest token.

    `stop`: strings that end the answer and are cut off it; empty ones are ignored. `stop_token_ids` end it too, and
    like the end of text they stay in the answer's tokens but not in its text. `n`: how many answers. `seed`: of the
    first answer, the i-th has its own; None draws a seed.

    `grammar`: what the answer keeps to; where it leaves nothing else, biases and `min_tokens` do not count.

    `logprobs`: log-probabilities of output tokens, of the one chosen and this many likeliest, of raw logits, before
    penalties and temperature; `prompt_logprobs`: the same for the prompt, whose first token has none; None for neither.
    `prompt_logprobs_from`: the place of the first token of the prompt that they are read for; what comes before may be
    taken from the cache. `max_tokens` 0 with `prompt_logprobs`: the prompt is read and nothing is answered.
    `chosen_experts`: return the experts that each token chose. `drawn_logprobs`: return the log-probability of each
    token under the distribution that it was drawn from, `kept_ids`: which ids `top_k`, `top_p` and `min_p` left.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 1
    chosen_experts: bool = False
    drawn_logprobs: bool = False
    kept_ids: bool = False
    grammar: Grammar | None = None

    def __post_init__(self):
        for name in {**_BOUNDS, "seed": None}:
            _check_number(name, getattr(self, name))
        if self.repetition_penalty == 0:
            raise ValueError("repetition_penalty is 0; it must be greater than 0, and 1 changes nothing")
        if self.top_p == 0:
            raise ValueError("top_p is 0; it must be greater than 0, and temperature 0 takes the likeliest token")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos {self.ignore_eos!r} is neither true nor false")
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise ValueError("max_tokens is 0; it must be at least 1, unless prompt_logprobs are asked for")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is greater than max_tokens {self.max_tokens}")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise ValueError(f"grammar {self.grammar!r:.80} is no Grammar")
        object.__setattr__(self, "stop", _strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    @property
    def greedy(self) -> bool:
        """Return whether the likeliest token is taken, without a draw."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def cuts(self) -> bool:
        """Return whether ids may be cut off before a draw."""
        return bool(self.top_k or self.top_p < 1 or self.min_p) and not self.greedy

    @property
    def penalised(self) -> bool:
        """Return whether a token's logit depends on the tokens before it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _check_number(name: str, value: object) -> None:
    """Raise ValueError, naming the parameter, for a value that is no number or out of its bounds."""
    if value is None and name in _MAY_BE_NONE:
        return
    kinds = (int,) if name in _INTEGERS else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        raise ValueError(f"{name} {value!r} is not {'an integer' if name in _INTEGERS else 'a finite number'}")
    least, greatest = _BOUNDS.get(name, (None, None))
    if least is not None and value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
    if greatest is not None and value > greatest:
        raise ValueError(f"{name} is {value}; it must be at most {greatest}")


def _strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the stop strings without empty ones; a single string and None are as good as a list."""
    strings = (stop,) if isinstance(stop, str) else _listed("stop", stop)
    for each in strings:
        if not isinstance(each, str):
            raise ValueError(f"stop has {each!r}, which is no string")
    return tuple(each for each in strings if each)


def _listed(name: str, values: Iterable | None) -> tuple:
    """Return a list's values; raise ValueError, naming the parameter, for what is no list."""
    if values is not None and (isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable)):
        raise ValueError(f"{name} {values!r} is no list")
    return tuple(values or ())


def _ids(name: str, ids: Iterable[int] | None) -> tuple[int, ...]:
    """Return token ids as a tuple; raise ValueError, naming the parameter, for what is none."""
    ids = _listed(name, ids)
    for each in ids:
        if isinstance(each, bool) or not isinstance(each, int) or each < 0:
            raise ValueError(f"{name} has {each!r}, which is no token id")
    return ids


def _biases(biases: Mapping[int, float] | None) -> dict[int, float]:
    """Return the biases by integer id: JSON's keys are strings. They may be -inf, which bans a token."""
    if not isinstance(biases, (Mapping, NoneType)):
        raise ValueError(f"logit_bias {biases!r} is no object of token ids and numbers")
    checked = {}
    for token, bias in (biases or {}).items():
        try:
            checked[int(token)] = float(bias)
        except (TypeError, ValueError) as error:
            raise ValueError(f"logit_bias has {token!r}: {bias!r}, which is no token id with a number") from error
        if math.isnan(checked[int(token)]) or checked[int(token)] == math.inf:
            raise ValueError(f"logit_bias has {token!r}: {bias!r}; a bias must be finite, or -inf to ban the token")
    _ids("logit_bias", list(checked))
    return checked
