"""What a model says: the tokens of greedy texts and the log-probabilities of the first, by transformers, to compare."""

from dataclasses import dataclass
from pathlib import Path

import torch
from engine_models import VOCABULARY
from transformers import AutoModelForCausalLM

LENGTH = 32
TOP = 3


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, VOCABULARY, (length,), generator=generator).tolist() for length in (6, 11, 17, 24)]


PROMPTS = _prompts()  # ids behind those of the special tokens


@dataclass(frozen=True)
class Answer:
    """A greedy text of LENGTH tokens, and the log-probabilities of the TOP likeliest first tokens by their ids.

    `first` is empty where the engine does not tell of the first token.
    """

    tokens: list[int]
    first: dict[int, float]


def by_transformers(directory: Path) -> list[Answer]:
    """Return the answers to PROMPTS, in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH,
                              do_sample=False, output_logits=True, return_dict_in_generate=True)
        likeliest = said.logits[0][0].log_softmax(-1).topk(TOP)
        answers.append(Answer(said.sequences[0, len(prompt):].tolist(),
                              dict(zip(likeliest.indices.tolist(), likeliest.values.tolist()))))
    return answers


def equal_tokens(answers: list[Answer], expected: list[Answer]) -> int:
    """Count the tokens that are equal up to the first other one of each text."""
    count = 0
    for answer, wanted in zip(answers, expected, strict=True):
        assert len(answer.tokens) == len(wanted.tokens) == LENGTH
        differing = (n for n, pair in enumerate(zip(answer.tokens, wanted.tokens)) if pair[0] != pair[1])
        count += next(differing, LENGTH)
    return count


def furthest_off(answers: list[Answer], expected: list[Answer]) -> float:
    """Return the largest difference of the first tokens' log-probabilities, over those that both tell."""
    pairs = [(answer.first[token], wanted.first[token]) for answer, wanted in zip(answers, expected, strict=True)
             for token in answer.first.keys() & wanted.first.keys()]
    assert len(pairs) > len(expected), "they tell of other tokens"
    return max(abs(one - other) for one, other in pairs)
