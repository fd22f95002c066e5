"""A model in training that is evaluated as it stands, on all ranks of its layout.

Rank 0 asks, and the other ranks follow it: each chunk of questions is told to all, and read by the forward-only
pipeline that validation uses. Answers are written greedily, one evaluation of whole rows for each token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from megatron_deepseek.data.tokenizer import Tokenizer
from megatron_deepseek.evaluation.questions import Answer, Continuation, Generation, Question, Score, cut_to
from megatron_deepseek.training.reading_rows import continue_rows, score_rows
from megatron_deepseek.training.trainer import Trainer

_MICRO_BATCHES = 4  # of a data rank in a chunk


class TrainedModel:
    """A trainer as a model that is evaluated. On rank 0 use it in `asking`, on the other ranks call `follow`."""

    def __init__(self, trainer: Trainer, tokenizer: Tokenizer):
        self.trainer, self.tokenizer, self.max_length = trainer, tokenizer, trainer.spec.seq_length
        self.computing = False  # an error while it is true has left the ranks apart

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Let rank 0 ask in the block, and the other ranks leave `follow` at its end."""
        try:
            yield
        finally:
            if not self.computing:
                _tell([])

    def follow(self) -> None:
        """Answer with rank 0 until it has asked all."""
        while chunk := _tell(None):
            self._answer(chunk)

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Yield the number of each question with its answer, on rank 0."""
        size = _MICRO_BATCHES * self.trainer.spec.micro_batch_size * self.trainer.meshes.layout.dp
        for kind in (Continuation, Generation):
            numbers = [number for number, each in enumerate(questions) if isinstance(each, kind)]
            for begin in range(0, len(numbers), size):
                some = numbers[begin:begin + size]
                self.computing = True
                answers = self._answer(_tell([questions[number] for number in some]))
                self.computing = False
                yield from zip(some, answers)

    def _answer(self, chunk: Sequence[Question]) -> list[Answer]:
        """Return the answers to questions of one kind, on all ranks together."""
        if isinstance(chunk[0], Continuation):
            fitting = [cut_to(each, self.max_length) for each in chunk]
            found = score_rows(self.trainer, [each.tokens for each in fitting])
            return [_score(each, *row) for each, row in zip(fitting, found)]
        most = [each.parameters.max_tokens for each in chunk]
        found = continue_rows(self.trainer, [each.prompt for each in chunk], most,
                              lambda number, tokens: self._ends(chunk[number], tokens))
        return [[tokens[:-1] if tokens[-1:] == [self.tokenizer.eod] else tokens] for tokens in found]

    def _ends(self, question: Generation, tokens: list[int]) -> bool:
        text = self.tokenizer.decode(tokens, special_tokens=False)
        return tokens[-1] == self.tokenizer.eod or any(stop in text for stop in question.parameters.stop)


def _score(question: Continuation, values: list[float], likeliest: list[bool]) -> Score:
    of_text = len(question.text)
    return Score(sum(values[-of_text:]), all(likeliest[-of_text:]))


def _tell(questions: list[Question] | None) -> list[Question]:
    """Return rank 0's questions on every rank."""
    told = [questions]
    dist.broadcast_object_list(told)
    return told[0]
