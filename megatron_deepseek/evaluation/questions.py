"""What an evaluation asks a model, in token ids, and what it gets: so that an answer can be kept and found again."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from megatron_deepseek.data.tokenizer import Tokenizer
from megatron_deepseek.inference.sampling_parameters import SamplingParameters


@dataclass(frozen=True)
class Continuation:
    """How likely is `text` after `context`? Both are ids, of which there is at least one each."""

    context: tuple[int, ...]
    text: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.context + self.text


@dataclass(frozen=True)
class Generation:
    """What follows `prompt`? There are as many answers as `parameters.n`; they have a seed unless they are greedy."""

    prompt: tuple[int, ...]
    parameters: SamplingParameters

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt


@dataclass(frozen=True)
class Score:
    """The answer to a Continuation: log p of its text in nats, and whether each of its tokens is the likeliest."""

    log_probability: float
    greedy: bool


Question = Continuation | Generation
Answer = Score | list[list[int]]  # ids of each answer to a Generation, without the one that ended it


class EvaluatedModel(Protocol):
    """A model that is evaluated, wherever it runs. `max_length`: the most tokens that go through it at once.

    A Continuation has at most `max_length` + 1 tokens, since nothing is asked after its last one.
    """

    tokenizer: Tokenizer
    max_length: int

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Yield the number of each question with its answer, in any order."""


def digest_of(question: Question, model: str) -> str:
    """Return what tells a question to a model from all others: 32 hexadecimal digits."""
    asked = [type(question).__name__, asdict(question), model]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]


def cut_to(question: Continuation, max_length: int) -> Continuation:
    """Return a Continuation that fits: tokens are left out from its beginning, as lm-eval does.

    Where the text itself is too long for a token of context, raise ValueError.
    """
    excess = len(question.tokens) - (max_length + 1)
    if excess <= 0:
        return question
    if excess >= len(question.context):
        raise ValueError(f"a text of {len(question.text)} tokens is to be scored at once, and the model sees "
                         f"{max_length} at most")
    return Continuation(question.context[excess:], question.text)
