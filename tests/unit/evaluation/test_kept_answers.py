"""Answers on disk: a killed evaluation goes on where it was, and other questions or weights get their own answers."""

import json

import pytest
from evaluated_models import ArithmeticModel

from megatron_deepseek.checkpoint.integrity import checksum_file, write_checksums
from megatron_deepseek.evaluation.kept_answers import ResumedModel, checkpoint_digest
from megatron_deepseek.evaluation.questions import Continuation, Generation, Score
from megatron_deepseek.inference.sampling_parameters import SamplingParameters

QUESTIONS = [Continuation((1, 2), (3, 4)), Continuation((1, 2), (3,)), Continuation((1,), (2, 3)),
             Generation((7, 8, 9), SamplingParameters(max_tokens=5, temperature=0)),
             Generation((7, 8, 9), SamplingParameters(max_tokens=5, n=2, seed=3))]
ANSWERS = {0: Score(-0.25, False), 1: Score(-0.125, False), 2: Score(-0.25, True), 3: [[8, 9]], 4: [[8, 9]] * 2}


def ask(model: ArithmeticModel, path, checkpoint: str = "a", questions=QUESTIONS) -> dict:
    resumed = ResumedModel(model, path, checkpoint, pytest.fail)
    try:
        return dict(resumed.answers(questions))
    finally:
        resumed.close()


def test_what_was_answered_is_not_asked_again(tmp_path):
    path, died = tmp_path / "deep" / "answers.jsonl", ArithmeticModel(most=3)
    with pytest.raises(KeyboardInterrupt):
        ask(died, path)
    assert len(path.read_text().splitlines()) == 3
    with open(path, "a") as file:
        file.write('{"question": "torn by the ki')
    again = ArithmeticModel()
    assert ask(again, path) == ANSWERS
    assert len(again.asked) == 2 and not [each for each in again.asked if each in died.asked]
    assert ask(third := ArithmeticModel(), path) == ANSWERS and not third.asked
    assert [set(json.loads(line)) for line in path.read_text().splitlines()] == [{"question", "answer"}] * 5


@pytest.mark.parametrize("other", [
    ("b", QUESTIONS[0]), ("a", Continuation((1, 2, 3), (4,))), ("a", Generation((1, 2), SamplingParameters())),
    ("a", Generation((7, 8, 9), SamplingParameters(max_tokens=6, temperature=0)))])
def test_other_weights_and_other_questions_are_asked(tmp_path, other):
    checkpoint, question = other
    ask(ArithmeticModel(), tmp_path / "answers.jsonl")
    model = ArithmeticModel()
    ask(model, tmp_path / "answers.jsonl", checkpoint, [question])
    assert model.asked == [question]


def test_a_question_that_is_asked_twice_has_two_answers(tmp_path):
    model = ArithmeticModel()
    assert len(ask(model, tmp_path / "answers.jsonl", questions=[QUESTIONS[4]] * 2)) == 2 and len(model.asked) == 2
    assert ask(again := ArithmeticModel(), tmp_path / "answers.jsonl", questions=[QUESTIONS[4]] * 3)
    assert len(again.asked) == 1


@pytest.mark.parametrize("line", ['{"text": "of something else"}', "[1]", "not JSON"])
def test_a_file_of_something_else_is_refused(tmp_path, line):
    (tmp_path / "answers.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="answers.jsonl, line 1 is (no answer of an evaluation|malformed JSON)"):
        ask(ArithmeticModel(), tmp_path / "answers.jsonl")


def test_a_digest_is_of_the_weights(tmp_path):
    (tmp_path / "weights").write_bytes(b"one")
    first = checkpoint_digest(tmp_path, None)
    assert first == checkpoint_digest(tmp_path, None) != checkpoint_digest(tmp_path, "fp8")
    (tmp_path / "weights").write_bytes(b"other")
    second = checkpoint_digest(tmp_path, None)
    assert second != first
    write_checksums(tmp_path, {"weights": checksum_file(tmp_path / "weights")})
    third = checkpoint_digest(tmp_path, None)
    (tmp_path / "weights").touch()
    assert checkpoint_digest(tmp_path, None) == third != second


def test_a_number_that_is_not_finite_is_asked_again(tmp_path):
    class Broken(ArithmeticModel):
        def answers(self, questions):
            self.asked += questions
            yield from ((number, Score(float("nan"), False)) for number in range(len(questions)))

    for _ in range(2):
        ask(model := Broken(), tmp_path / "answers.jsonl", questions=QUESTIONS[:1])
        assert model.asked == QUESTIONS[:1]
