"""What a run takes from a checkpoint: all of it, the weights alone, or weights as the start of another run."""

import pytest
import torch
from small_models import V3_SMALL, random_batch, training_batch, weights_of, whole_stage

from megatron_deepseek.checkpoint.tracker import find_iteration
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.model.build import BuildOptions
from megatron_deepseek.runtime.decision import Start
from megatron_deepseek.runtime.report import Report
from megatron_deepseek.runtime.resume import resume
from megatron_deepseek.runtime.saving import Saver
from megatron_deepseek.settings import RunSettings
from megatron_deepseek.training.trainer import TrainingSpec, Trainer

SEQ_LENGTH = 6
SAVED = TrainState(iteration=3, consumed_samples=24, optimizer_steps=2)


def make_trainer(meshes, seed: int) -> Trainer:
    build = BuildOptions(seed=seed)
    return Trainer(TrainingSpec(V3_SMALL, (whole_stage(V3_SMALL),), "1F1B", SEQ_LENGTH, 2, build), meshes)


def moments(trainer: Trainer) -> torch.Tensor:
    return torch.cat([state["exp_avg"].to_local().flatten() for state in trainer.optimizer.state.values()])


@pytest.mark.parametrize("options, expected", [
    ({}, SAVED), ({"weights_only": True}, TrainState(3, 24, 0)),
    ({"finetune": True, "weights_only": True}, TrainState())], ids=["all", "weights", "another run"])
def test_what_is_taken(meshes, tmp_path, options, expected):
    """Moments come with the count of steps that made them; weights, the routers' biases among them, always do."""
    before, fresh = (make_trainer(meshes, seed) for seed in (1, 2))
    before.train_step(training_batch(*random_batch(V3_SMALL, 2, SEQ_LENGTH)), learning_rate=1e-2, bias_rate=0.1)
    saver = Saver(RunSettings(9, save=tmp_path), V3_SMALL, before, Report(), None)
    saver.save(SAVED)
    saver.close()
    assert resume(Start(find_iteration(tmp_path, 3), **options), fresh) == (expected, None)
    weights = weights_of(before.stages[0])
    assert all(torch.equal(weight, weights[name]) for name, weight in weights_of(fresh.stages[0]).items())
    assert torch.equal(moments(fresh), moments(before) if not options else torch.zeros_like(moments(before)))


def test_nothing_is_taken_unasked(meshes):
    assert resume(Start(), None) == (TrainState(), None)
