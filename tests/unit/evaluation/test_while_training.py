"""--eval-tasks without lm-eval: what is reported, what goes on when a task fails, and generators that stay the same.

tests/clients/test_evaluate.py evaluates real tasks while training, and compares losses with and without.
"""

import random
from types import SimpleNamespace

import numpy
import pytest
import torch

from megatron_deepseek.evaluation import harness, while_training
from megatron_deepseek.evaluation.generator_states import kept_generators
from megatron_deepseek.evaluation.while_training import TaskEvaluation, TrainingTasks
from megatron_deepseek.settings import DataSettings, RunSettings

RESULTS = {"results": {"arc": {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.1, "sample_len": 4},
                       "math": {"exact_match,strict-match": 1, "exact_match_stderr,strict-match": "N/A"}},
           "groups": {"both": {"acc,none": 0.5, "alias": "both"}}}
SETTINGS = SimpleNamespace(
    run=RunSettings(train_iters=4, eval_tasks=("arc",), eval_tasks_interval=2, eval_tasks_limit=5.0),
    data=DataSettings((), 8, tokenizer_type="ByteTokenizer"))
TRAINER = SimpleNamespace(spec=SimpleNamespace(seq_length=8))


class Notes:
    """A report that notes what it is told."""

    def __init__(self):
        self.results, self.messages = [], []

    def held_out(self, *told) -> None:
        self.results.append(told)

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def evaluation(meshes) -> TaskEvaluation:
    return TaskEvaluation(SETTINGS, ["the tasks"])


def test_each_task_is_reported_by_lm_evals_names(evaluation, monkeypatch):
    asked, notes = [], Notes()
    monkeypatch.setattr(harness, "evaluate", lambda *given, **more: (asked.append(given), (RESULTS, None))[1])
    evaluation(TRAINER, notes, 2)
    assert notes.results == [(2, "arc", {"acc": 0.25, "acc_stderr": 0.1}),
                             (2, "math", {"exact_match/strict-match": 1.0}), (2, "both", {"acc": 0.5})]
    ((model, tasks, wanted, described),) = asked
    assert (model.max_length, tasks, wanted.limit, described) == (8, ["the tasks"], 5.0, {"iteration": 2})


def test_a_task_that_fails_does_not_end_the_training(evaluation, monkeypatch):
    notes = Notes()

    def fails(model, *_, **__):
        raise KeyError("no column\nof this name")

    monkeypatch.setattr(harness, "evaluate", fails)
    evaluation(TRAINER, notes, 2)
    assert notes.results == []
    assert notes.messages == ["--eval-tasks at iteration 2: KeyError: 'no column\\nof this name'. Training goes on"]


def test_an_error_in_the_model_ends_it(evaluation, monkeypatch):
    """The other ranks are in the middle of a forward then, so that nothing could go on."""
    def fails(model, *_, **__):
        model.computing = True
        raise RuntimeError("out of memory")

    monkeypatch.setattr(harness, "evaluate", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluation(TRAINER, Notes(), 2)


def test_the_loop_is_told_how_often():
    (periodic,) = TrainingTasks().periodic(SETTINGS)
    assert periodic.every == 2 and isinstance(periodic.act, TaskEvaluation)
    assert TrainingTasks().periodic(SimpleNamespace(run=RunSettings(train_iters=4))) == ()


def test_without_lm_eval_the_run_ends_before_it_begins(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ValueError, match="--eval-tasks needs lm-eval: .* -m pip install 'lm-eval>="):
        TrainingTasks().load(SETTINGS)


def test_a_task_that_samples_is_refused(monkeypatch):
    task = SimpleNamespace(OUTPUT_TYPE="generate_until", task_name="gsm", get_config=lambda name: {"temperature": 0.7})
    monkeypatch.setattr(harness, "check_installed", lambda option: None)
    monkeypatch.setattr(while_training.harness, "load_tasks", lambda wanted: [task])
    with pytest.raises(ValueError, match="--eval-tasks gsm samples its answers"):
        TrainingTasks().load(SETTINGS)


def test_generators_are_put_back():
    def draws() -> tuple:
        return random.random(), numpy.random.rand(), float(torch.rand(()))

    def seed() -> None:
        random.seed(1)
        numpy.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = draws()
    seed()
    with pytest.raises(ZeroDivisionError), kept_generators():
        torch.manual_seed(2), numpy.random.seed(2), random.seed(2), draws()
        1 / 0
    assert draws() == expected
