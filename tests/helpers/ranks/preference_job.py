"""What a rank does in a test of preference tuning: steps on rows from a file, with a reference's or KTO's numbers."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from cases import Case
from job import FLOAT64, LEARNING_RATE, Record, Step, named, open_adapters, spec_of, whole
from preference_data import random_sums, rows_of

from megatron_deepseek.data.batches import Sampler
from megatron_deepseek.fine_tuning_settings import PreferenceSettings
from megatron_deepseek.finetuning.preference.completion import Completion
from megatron_deepseek.finetuning.preference.inputs import MismatchedSampler, PreferenceSampler
from megatron_deepseek.finetuning.preference.objectives import preference_objective
from megatron_deepseek.finetuning.rows import Rows
from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.parallel.mesh import build_meshes
from megatron_deepseek.planning.pipeline_balance import stages
from megatron_deepseek.training.scoring import Scores
from megatron_deepseek.training.trainer import Trainer, TrainingSpec

LENGTH = 32


@dataclass(frozen=True)
class PreferenceCase(Case):
    """A layout with an objective of preference tuning; rows are packed, and come from a file of bytes."""

    preference: str = "dpo"

    @property
    def model(self) -> ModelConfig:
        of_reward = dict(reward_head=True) if self.preference == "reward" else {}
        return replace(super().model, vocab_size=512, **of_reward)

    @property
    def settings(self) -> PreferenceSettings:
        alpha, center = 0.3 * (self.preference == "dpo"), 0.2 * (self.preference == "reward")
        return PreferenceSettings(self.preference, 0.7, 0.1 * (self.preference == "dpo"), alpha,
                                  desirable_weight=1.5, center_rewards_coefficient=center)


def run_preference(case: PreferenceCase, file: Path, num_steps: int = 2) -> Record:
    return _train(case, spec_of(case, FLOAT64, LENGTH), case.layout, file, num_steps)


def run_alone(case: PreferenceCase, file: Path, num_steps: int = 2) -> Record:
    """What one process computes, which takes the batch as a whole and recomputes nothing."""
    build = replace(spec_of(case, FLOAT64, LENGTH).build, loss=case.reference.loss, reshard_after_forward=False)
    spec = replace(spec_of(case, FLOAT64, LENGTH), stages=stages(case.model, 1, LENGTH), schedule="none", build=build,
                   micro_batch_size=case.global_batch_size)
    return _train(case, spec, Layout(), file, num_steps)


def _train(case: PreferenceCase, spec: TrainingSpec, layout: Layout, file: Path, num_steps: int) -> Record:
    meshes, settings = build_meshes(layout, torch.device("cpu")), case.settings
    trainer, record = Trainer(spec, meshes, preference_objective(settings)), Record()
    open_adapters(trainer)
    rows = rows_of(file, case.preference)
    sampler, adapts = _sampler(rows, settings, case.lora != "none"), settings.has_reference and case.lora != "none"
    complete = Completion(case.preference == "kto", adapts)

    def batch(step: int):
        own = sampler.batch(step * case.global_batch_size, case.global_batch_size, spec.micro_batch_size,
                            meshes.rank("dp"), layout.dp)
        return complete(trainer, own)

    for step in range(num_steps):
        if step == num_steps - 1:  # an evaluation before it must not show in a step
            record.evaluation = trainer.evaluate(batch(step + 1))
        result = trainer.train_step(batch(step), learning_rate=LEARNING_RATE)
        gradients = {key: whole(parameter.grad) for key, parameter in named(trainer, "named_parameters")}
        record.steps.append(Step(result.losses, result.grad_norm, result.expert_counts, result.dropped, gradients))
    record.weights = {key: whole(value) for how in ("named_parameters", "named_buffers")
                      for key, value in named(trainer, how)}
    record.scores = Scores(torch.zeros(1))  # test_layouts.py compares those of every layout
    return record


def _sampler(rows: Rows, settings: PreferenceSettings, adapts: bool) -> PreferenceSampler | MismatchedSampler:
    sums = random_sums(rows, 1) if settings.has_reference and not adapts else None
    made = PreferenceSampler(Sampler(rows, 512, "--dataset"), rows, sums)
    if settings.objective != "kto":
        return made
    mismatched = None if adapts else tuple(each - 30 for each in random_sums(rows, 2))
    return MismatchedSampler(made, rows, 512, "--dataset", mismatched)
