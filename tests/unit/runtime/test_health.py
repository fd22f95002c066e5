"""Steps that are not finite: where it began, what follows; and losses that jump."""

import math
import random
from dataclasses import replace

import pytest
import torch
from small_models import V3_SMALL, enliven, random_batch, training_batch, whole_stage

from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.runtime.health import LabelWatch, NotFinite, SpikeWatch, find_origin
from megatron_deepseek.settings import OptimizerSettings
from megatron_deepseek.training.trainer import Losses, TrainingSpec, StepResult, Trainer

SEQ_LENGTH = 6
CONFIG = replace(V3_SMALL, num_nextn_predict_layers=1)


@pytest.fixture
def trainer(meshes) -> Trainer:
    made = Trainer(TrainingSpec(CONFIG, (whole_stage(CONFIG),), "1F1B", SEQ_LENGTH, micro_batch_size=2,
                        build=BuildOptions(precision=Precision(torch.float64)), optimizer=OptimizerSettings()), meshes)
    enliven(made.stages[0])
    return made


def origin(trainer: Trainer) -> str:
    """Of a step that must not be finite."""
    batch = training_batch(*random_batch(CONFIG, 2, SEQ_LENGTH, seed=0))
    assert not trainer.train_step(batch, learning_rate=0.1).updated
    return find_origin(trainer, batch)


def test_a_bad_weight_is_named(trainer):
    with torch.no_grad():
        trainer.stages[0].model.layers["1"].self_attn.o_proj.weight.to_local()[0, 0] = float("inf")
    assert origin(trainer) == "rank 0: the weight model.layers.1.self_attn.o_proj.weight is not finite"


def test_the_first_bad_output_is_named(trainer):
    """Weights whose square is beyond float64: the product of down and up projection is not finite, they are."""
    with torch.no_grad():
        for projection in ("gate_proj", "up_proj"):
            getattr(trainer.stages[0].model.layers["0"].mlp, projection).weight.to_local().fill_(1e200)
    text = origin(trainer)
    assert text.startswith("rank 0: the output of model.layers.0.mlp") and text.endswith("is not finite"), text


def test_the_first_bad_gradient_of_the_backward_is_named(trainer):
    """A hook spoils the gradient of what layer 0 puts out; the layers above it are healthy."""
    def spoil(module, args, output):
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: gradient * float("nan"))

    trainer.stages[0].model.layers["0"].register_forward_hook(spoil)
    text = origin(trainer)
    assert text.startswith("rank 0: the gradient of model.layers.0.") and text.endswith("is not finite"), text


def result(loss: float, updated: bool) -> StepResult:
    return StepResult(Losses({"lm_loss": loss, "mtp_loss_1": loss}), loss, {}, None, updated=updated)


def test_stop_says_step_and_origin():
    with pytest.raises(FloatingPointError, match=r"iteration 7: lm_loss nan.*gradient norm nan; rank 3: the weight x"):
        NotFinite("stop", 10).check(7, result(math.nan, False), lambda: "rank 3: the weight x is not finite")


def test_skips_until_too_many_in_a_row():
    policy = NotFinite("skip", 2)
    bad, good = result(math.inf, False), result(2.0, True)
    for iteration in range(1, 7):  # never more than two in a row
        line = policy.check(iteration, good if iteration % 3 == 0 else bad, lambda: "origin")
        assert (line is None) == (iteration % 3 == 0)
    assert "iteration 8" in policy.check(8, bad, lambda: "origin") and policy.check(9, bad, lambda: "origin")
    with pytest.raises(FloatingPointError, match="3 steps in a row were not finite, --nan-policy skip allows 2"):
        policy.check(10, bad, lambda: "origin")


def wandering(steps: int, seed: int = 0):
    """A loss that falls from 10 to 3 with 1 % of noise."""
    draw = random.Random(seed)
    return [(3 + 7 * math.exp(-4 * step / steps)) * (1 + draw.gauss(0, 0.01)) for step in range(steps)]


def test_a_loss_that_falls_with_noise_has_no_spikes():
    watch = SpikeWatch()
    assert [line for step, loss in enumerate(wandering(2000)) if (line := watch.see(step, loss))] == []


def test_spikes_are_told_and_do_not_hide_each_other():
    watch, losses = SpikeWatch(), wandering(2000)
    for step in (150, 151, 152, 1200):
        losses[step] *= 1.3
    losses[1250] = math.nan
    found = {step: line for step, loss in enumerate(losses) if (line := watch.see(step, loss))}
    assert list(found) == [150, 151, 152, 1200]
    assert found[150].startswith("iteration 150: lm_loss ") and "deviations above the median" in found[150]


def test_a_constant_loss_may_move_a_little():
    watch = SpikeWatch()
    assert all(watch.see(step, 2.0) is None for step in range(50))
    assert watch.see(50, 2.1) is None and watch.see(51, 2.2) is not None


def test_batches_without_labels_are_told_once_and_at_their_end():
    watch = LabelWatch()
    told = [watch.see(iteration, labels) for iteration, labels in enumerate((5, 0, 0, 0, 3, 2, 0), start=1)]
    assert [iteration for iteration, line in enumerate(told, start=1) if line] == [2, 5, 7]
    assert told[1].startswith("iteration 2: all labels of the batch are masked; its loss is 0")
    assert told[4] == "iteration 5: there are labels again, for the first time since iteration 2"
