"""A checkpoint that is evaluated through the engines of inference/, in process.

Questions are asked in the order of their tokens, so that those with the same beginning (the choices of one question,
questions with the same examples before them) come together, and the engine computes what they share once.
"""

from collections.abc import Iterator, Sequence

from megatron_deepseek.data.tokenizer import Tokenizer
from megatron_deepseek.evaluation.questions import Answer, Continuation, Question, Score, cut_to
from megatron_deepseek.inference.asking import AHEAD, Asked, answer_all
from megatron_deepseek.inference.output import Output
from megatron_deepseek.inference.replicas import Replicas
from megatron_deepseek.inference.sampling_parameters import SamplingParameters


class EngineModel:
    """The model of all replicas, asked by rank 0 while the other ranks `follow`."""

    def __init__(self, replicas: Replicas):
        engine = replicas.engine
        self.replicas, self.max_length = replicas, engine.settings.max_length
        self.tokenizer: Tokenizer = engine.loaded.tokenizer
        self._ends = frozenset(engine.loaded.eos_ids)
        self._at_a_time = AHEAD * engine.settings.max_running

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Yield the number of each question with its answer, as they are ready."""
        order = sorted(range(len(questions)), key=lambda number: questions[number].tokens)
        before = [None, *order]
        asked = (_asked(number, questions, previous, self.max_length) for previous, number in zip(before, order))
        for number, outputs in answer_all(self.replicas, asked, self._at_a_time):
            yield number, _answer(questions[number], outputs, self._ends)


def _asked(number: int, questions: Sequence[Question], previous: int | None, max_length: int) -> Asked:
    question = questions[number]
    if not isinstance(question, Continuation):
        return Asked(number, question.prompt, question.parameters)
    follows = previous is not None and getattr(questions[previous], "context", None) == question.context
    question = cut_to(question, max_length)
    parameters = SamplingParameters(max_tokens=0, prompt_logprobs=1, prompt_logprobs_from=len(question.context))
    return Asked(number, question.tokens, parameters, follows)


def _answer(question: Question, outputs: list[Output], ends: frozenset[int]) -> Answer:
    """Return the answer of an engine; the tokens in `ends` end a text and are no part of it."""
    if not isinstance(question, Continuation):
        return [output.tokens[:-1] if output.tokens and output.tokens[-1] in ends else output.tokens
                for output in outputs]
    (output,) = outputs
    begin = len(output.prompt) - len(question.text)
    found, tops = output.prompt_log_probabilities[begin:], output.prompt_top_log_probabilities[begin:]
    return Score(sum(found), all(value >= max(top.values()) for value, top in zip(found, tops)))
