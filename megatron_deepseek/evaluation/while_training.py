"""--eval-tasks: tasks of lm-eval on the model that is being trained, in whatever layout it is.

Nothing of the training changes: weights are read alone, and generators of random numbers are put back.
"""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from megatron_deepseek.data.tokenizer import build_tokenizer
from megatron_deepseek.evaluation import harness
from megatron_deepseek.evaluation.questions import EvaluatedModel
from megatron_deepseek.evaluation.trained_model import TrainedModel
from megatron_deepseek.runtime.report import Report
from megatron_deepseek.runtime.task import Periodic
from megatron_deepseek.settings import Settings
from megatron_deepseek.training.trainer import Trainer


class TrainingTasks:
    """The tasks of a run. Rank 0 loads them before anything is built; the other ranks have none."""

    def __init__(self):
        self._loaded: list = []

    def load(self, settings: Settings) -> None:
        """Load the tasks on this rank. Raise ValueError, of one line, for what cannot be loaded or evaluated."""
        if not settings.run.eval_tasks:
            return
        harness.check_installed("--eval-tasks")
        build_tokenizer(settings.data.tokenizer_type, settings.data.tokenizer_model)
        self._loaded = harness.load_tasks(_evaluated(settings))
        sampled = harness.sampled_task(self._loaded)
        if sampled is not None:
            raise ValueError(f"--eval-tasks {sampled} samples its answers, and while training the likeliest tokens "
                             "alone are taken; tools/evaluate.py evaluates it on a checkpoint")

    def periodic(self, settings: Settings) -> tuple[Periodic, ...]:
        """Return what the loop of a run does with the tasks, on all ranks."""
        if not settings.run.eval_tasks:
            return ()
        return (Periodic(settings.run.eval_tasks_interval, TaskEvaluation(settings, self._loaded)),)


class TaskEvaluation:
    """Evaluates the tasks between steps, and reports each task's numbers."""

    def __init__(self, settings: Settings, tasks: list):
        self.wanted, self.tasks = _evaluated(settings), tasks
        self.tokenizer = build_tokenizer(settings.data.tokenizer_type, settings.data.tokenizer_model)

    def __call__(self, trainer: Trainer, report: Report, iteration: int) -> None:
        model = TrainedModel(trainer, self.tokenizer)
        if dist.get_rank():
            model.follow()
            return
        with model.asking():
            for name, numbers in self._scores(model, report, iteration).items():
                report.held_out(iteration, name, numbers)

    def _scores(self, model: TrainedModel, report: Report, iteration: int) -> Mapping[str, Mapping[str, Any]]:
        """Return the numbers of each task; none, with a message, where a task's own code fails: training goes on."""
        try:
            return self._evaluate(model, iteration)
        except Exception as error:
            if model.computing:
                raise
            report.message(f"--eval-tasks at iteration {iteration}: {type(error).__name__}: "
                           f"{' '.join(str(error).split()):.300}. Training goes on")
            return {}

    def _evaluate(self, model: EvaluatedModel, iteration: int) -> Mapping[str, Mapping[str, Any]]:
        results, _ = harness.evaluate(model, self.tasks, self.wanted, {"iteration": iteration}, quiet=True)
        return harness.scores_of(results)


def _evaluated(settings: Settings) -> harness.Evaluated:
    run = settings.run
    return harness.Evaluated(run.eval_tasks, run.eval_tasks_num_fewshot, run.eval_tasks_limit,
                             include_path=run.eval_tasks_include_path)
