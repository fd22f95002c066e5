"""Moments saved in one dtype and loaded into another: a defined conversion, and words that say so."""

import pytest
import torch
from small_models import V3_SMALL, random_batch, training_batch, whole_stage

from megatron_deepseek.checkpoint.job import distributed as checkpoint
from megatron_deepseek.checkpoint.job.state import optimizer_state
from megatron_deepseek.checkpoint.train_state import TrainState
from megatron_deepseek.settings import OptimizerSettings
from megatron_deepseek.training.optimizer import build_optimizer
from megatron_deepseek.training.trainer import TrainingSpec, Trainer

SEQ_LENGTH = 6
WIDE, NARROW, MIXED = (OptimizerSettings(exp_avg_dtype=first, exp_avg_sq_dtype=second)
                       for first, second in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def trainer(meshes, settings: OptimizerSettings) -> Trainer:
    return Trainer(TrainingSpec(V3_SMALL, (whole_stage(V3_SMALL),), "1F1B", SEQ_LENGTH, 2, optimizer=settings), meshes)


def moments(made: Trainer) -> dict[str, torch.Tensor]:
    state = optimizer_state(made.stages, made.optimizer)
    return {name: tensor.to_local().clone() for name, tensor in state.items()}


def step(made: Trainer, seed: int) -> None:
    made.train_step(training_batch(*random_batch(V3_SMALL, 2, SEQ_LENGTH, seed)), learning_rate=1e-2)


@pytest.mark.parametrize("saved, loaded, words", [
    (WIDE, WIDE, []), (NARROW, NARROW, []),
    (NARROW, WIDE, ["exp_avg was saved in bfloat16 and is kept in float32 from here on",
                    "exp_avg_sq was saved in bfloat16 and is kept in float32 from here on"]),
    (WIDE, MIXED, ["exp_avg was saved in float32 and is kept in bfloat16 from here on"]),
], ids=["wide", "narrow", "widened", "narrowed"])
def test_moments_come_back_in_the_dtype_of_the_run(meshes, tmp_path, saved, loaded, words):
    """Bit for bit what `.to` makes of them; in the same dtypes the next step is the same too."""
    first, second = trainer(meshes, saved), trainer(meshes, loaded)
    for seed in range(2):
        step(first, seed)
    directory = checkpoint.save(tmp_path, TrainState(2, 4, 2), V3_SMALL, first.stages, first.optimizer)
    checkpoint.load(directory, second.stages, second.optimizer)
    assert checkpoint.converted_moments(directory, second.optimizer) == words
    assert checkpoint.converted_moments(directory, build_optimizer([], loaded)) == [], "of a rank that holds nothing"
    before, after = moments(first), moments(second)
    for name, moment in after.items():
        wanted = loaded.exp_avg_dtype if ".exp_avg." in name else loaded.exp_avg_sq_dtype
        assert moment.dtype == DTYPES[wanted] and torch.equal(moment, before[name].to(moment.dtype)), name
    if saved == loaded:
        for made in (first, second):
            step(made, seed=2)
        assert all(torch.equal(moment, moments(second)[name]) for name, moment in moments(first).items())
