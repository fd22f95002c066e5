"""A request for answers, and each of its answers on the way."""

import time
from dataclasses import dataclass, field

import torch

from megatron_deepseek.inference.constraint import Constraint
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.inference.stop_strings import StopStrings
from megatron_deepseek.inference.text import AnswerText

_MADE_AHEAD = 32  # random numbers at a time


@dataclass(frozen=True, eq=False)
class PromptReading:
    """The log-probabilities of a prompt's tokens, as far as they are known, and of the likeliest by id."""

    log_probabilities: list[float | None]
    tops: list[dict[int, float] | None]

    @classmethod
    def begin(cls, first: int) -> "PromptReading":
        """Return the reading of a prompt whose tokens before place `first` are not read."""
        return cls([None] * first, [None] * first)

    @property
    def place(self) -> int:
        """Return the place of the token whose logits are read next."""
        return len(self.log_probabilities) - 1


@dataclass(frozen=True, eq=False)
class Request:
    """What was asked for. `arrival` counts requests; `seed` is that of the first answer."""

    request_id: str
    arrival: int
    prompt: tuple[int, ...]
    parameters: SamplingParameters
    ends: frozenset[int]
    stop_strings: StopStrings | None
    seed: int
    prompt_reading: PromptReading = field(default_factory=lambda: PromptReading.begin(1))


class Numbers:
    """The random numbers of one answer, uniform in [0, 1): its i-th token takes the i-th that its generator gives.

    Some are made ahead, so that those of drafts that turn out wrong are there for the tokens in their place.
    """

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)
        self._made: list[float] = []

    def __getitem__(self, place: int) -> float:
        while place >= len(self._made):
            self._made += torch.rand(_MADE_AHEAD, dtype=torch.float64, generator=self._generator).tolist()
        return self._made[place]


@dataclass(eq=False)
class Sequence:
    """One answer: its prompt and the tokens so far, and where it stands.

    `tokens` of a request that nothing is answered to leave out the last one, after which nothing is to be known.
    `num_computed`: of how many tokens the cache has what layers keep. `num_filled`: the same for MTP modules.
    `blocks`: where in the cache. `hashes`: of its full blocks, as far as they are known. `drafts`: tokens that may come
    next, to be verified in the next step. `constraint`: what its grammar allows. `finish_reason`, `stop_reason` and
    what is read of its tokens are those of its Output. `added_at`, `admitted_at`: seconds of a clock, when it began to
    wait and when it first ran.
    """

    request: Request
    index: int
    tokens: list[int]
    numbers: Numbers
    text: AnswerText | None
    constraint: Constraint | None = None
    num_computed: int = 0
    num_filled: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    drafts: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    counts: dict[int, int] = field(default_factory=dict)
    log_probabilities: list[float] = field(default_factory=list)
    top_log_probabilities: list[dict[int, float]] = field(default_factory=list)
    drawn_log_probabilities: list[float] = field(default_factory=list)
    kept_ids: list[torch.Tensor | None] = field(default_factory=list)
    experts: dict[str, torch.Tensor] | None = None
    added_at: float = field(default_factory=time.monotonic)
    admitted_at: float | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Return what sequences are sorted by: arrival, then number of the answer."""
        return self.request.arrival, self.index

    @property
    def parameters(self) -> SamplingParameters:
        return self.request.parameters

    @property
    def num_answered(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.request.prompt):]

    @property
    def decoding(self) -> bool:
        """Return whether the cache has all tokens but the last."""
        return self.num_computed == len(self.tokens) - 1

    @property
    def pending(self) -> int:
        """Return how many tokens are to be computed, drafts with them."""
        return len(self.tokens) + len(self.drafts) - self.num_computed

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.counts[token] = self.counts.get(token, 0) + 1
        if self.constraint is not None:
            self.constraint.add(token)
