"""Questions through the engine: what the training model's own forward says, each context computed once."""

from dataclasses import replace

import pytest
import torch
from small_engines import V3_MTP, loaded, uncached_logits

from megatron_deepseek.data.tokenizer import ByteTokenizer
from megatron_deepseek.evaluation.engine_model import EngineModel
from megatron_deepseek.evaluation.questions import Continuation, Generation, Score
from megatron_deepseek.inference.asking import Asked, answer_all
from megatron_deepseek.inference.replicas import Replicas
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.inference.settings import EngineSettings
from megatron_deepseek.parallel.layout import Layout

CONTEXTS = [(5, 9, 2, 33, 14), (7,), (5, 9, 2, 8, 8, 8, 1)]
TEXTS = [(4, 17, 30), (4,), (11, 6)]


@pytest.fixture(scope="module")
def model(meshes):
    return loaded(V3_MTP, meshes, tokenizer=ByteTokenizer(), eos_ids=(3,))


def evaluated(model, **settings) -> EngineModel:
    return EngineModel(Replicas(model, EngineSettings(**{"max_length": 16, "block_size": 2} | settings)))


def expected_score(stage, question: Continuation) -> Score:
    logits = uncached_logits(stage, list(question.tokens))[len(question.context) - 1:-1].log_softmax(-1)
    value = float(logits.gather(1, torch.tensor(question.text)[:, None]).sum())
    return Score(value, logits.argmax(-1).tolist() == list(question.text))


def likely(stage, context: tuple[int, ...], number: int) -> tuple[int, ...]:
    tokens = list(context)
    for _ in range(number):
        tokens.append(int(uncached_logits(stage, tokens)[-1].argmax()))
    return tuple(tokens[len(context):])


def test_scores_are_those_of_the_training_model(model):
    """In the order of the questions, whatever order they are asked in; likeliest texts are known as such."""
    questions = [Continuation(context, text) for text in TEXTS for context in CONTEXTS]
    questions += [Continuation(context, likely(model.stage, context, 2)) for context in CONTEXTS]
    asked = evaluated(model)
    found = dict(asked.answers(questions))
    assert sorted(found) == [*range(len(questions))]
    for number, question in enumerate(questions):
        expected = expected_score(model.stage, question)
        assert found[number].log_probability == pytest.approx(expected.log_probability, abs=1e-5)
        assert found[number].greedy == expected.greedy
    assert [found[number].greedy for number in (9, 10, 11)] == [True] * 3 and not found[0].greedy
    assert asked.replicas.engine.statistics.shared_tokens >= 3 * (4 + 6)


def test_what_is_too_long_loses_its_beginning(model):
    context, text = tuple(range(20)), (4, 17, 30)
    (_, found), = evaluated(model).answers([Continuation(context, text)])
    expected = expected_score(model.stage, Continuation(context[-14:], text))
    assert found.log_probability == pytest.approx(expected.log_probability, abs=1e-5)


def test_answers_leave_out_what_ends_them(model):
    """The likeliest token is made the end of text."""
    first, second = likely(model.stage, CONTEXTS[0], 2)
    parameters = SamplingParameters(max_tokens=2, temperature=0)
    (_, plain), = evaluated(model).answers([Generation(CONTEXTS[0], parameters)])
    assert plain == [[first, second]]
    (_, ended), = evaluated(replace(model, eos_ids=(second,))).answers([Generation(CONTEXTS[0], parameters)])
    assert ended == [[first]]


class TwoReplicas:
    """The meshes of rank 0 of two replicas, as far as Replicas asks them."""

    layout = Layout(dp=2)

    @staticmethod
    def rank(axis: str) -> int:
        return 0


class Handed(Replicas):
    """Replicas that tell which of them gets each request, instead of computing."""

    def step(self):
        raise StopIteration([each.replica for each in self._commands])


def test_requests_with_the_same_beginning_go_to_the_same_replica(model):
    replicas = Handed(replace(model, meshes=TwoReplicas()), EngineSettings(16))
    asked = [Asked(number, (1, 2, number), SamplingParameters(), follows=number in (1, 2, 4)) for number in range(5)]
    with pytest.raises(RuntimeError) as handed:  # what becomes of a StopIteration in a generator
        next(answer_all(replicas, asked, at_a_time=5))
    assert handed.value.__cause__.value == [0, 0, 0, 1, 1]
