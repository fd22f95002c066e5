"""Models to evaluate: one that is known by arithmetic, and a small one with its tokenizer."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_deepseek.data.tokenizer import ByteTokenizer
from megatron_deepseek.evaluation.questions import Answer, Continuation, Question, Score


@dataclass
class ArithmeticModel:
    """Says -1/8 for each token of a text, and of a prompt's bytes the last two again; it notes what it is asked.

    After `most` answers it dies.
    """

    max_length: int = 16
    most: int = 10**9
    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)
    asked: list[Question] = field(default_factory=list)

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        for number in sorted(range(len(questions)), key=lambda each: hashlib.sha256(bytes([each % 256])).digest()):
            if len(self.asked) >= self.most:
                raise KeyboardInterrupt
            question = questions[number]
            self.asked.append(question)
            if isinstance(question, Continuation):
                assert len(question.tokens) <= self.max_length + 1
                yield number, Score(-len(question.text) / 8, question.text[0] % 2 == 0)
            else:
                yield number, [list(question.prompt[-2:])] * question.parameters.n
