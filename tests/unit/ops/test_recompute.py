"""Recomputation: the same numbers bit for bit, and really less memory held between forward and backward.

What is held is measured, not believed: every storage that an operator makes in the forward is watched by a weak
reference, and those still alive at its end are what the backward keeps.
"""

from dataclasses import replace

import pytest
import torch
from kept_memory import Watch, kept_by
from small_models import V2_SMALL, V3_SMALL, enliven, forward, gradients_of, random_batch, whole_model

from megatron_deepseek.model.architecture.config import ModelConfig
from megatron_deepseek.ops.recompute import kept, recomputed
from megatron_deepseek.settings import RecomputeSettings

MODULES = ("layernorm", "mla_up_proj", "moe_act")
SEQ_LENGTH = 16


def joined(run, producer, inputs: tuple[torch.Tensor, ...], consumer):
    """consumer(producer(*inputs)), the producer's output kept or not as `run` does."""
    with run(producer, *inputs) as made:
        return consumer(*made) if isinstance(made, tuple) else consumer(made)


def square_and_cube(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x * x, x * x * x


@pytest.mark.parametrize("run", [kept, recomputed])
def test_gradient_of_a_pair(run):
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    y = joined(run, square_and_cube, (x,), lambda a, b: (a * b).sum())
    y.backward()
    torch.testing.assert_close(x.grad, 5 * x.detach() ** 4, rtol=1e-12, atol=0)


def test_tensors_without_elements_are_not_taken_for_each_other():
    """Of a rank that no token was sent to: all such storages have one pointer, whatever their dtype."""
    class KeepsNumbers(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, numbers):
            ctx.save_for_backward(numbers)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            assert ctx.saved_tensors[0].dtype == torch.int64
            return grad, None

    x = torch.empty(0, 3, requires_grad=True)
    with recomputed(lambda x: 2 * x, x) as made:
        y = KeepsNumbers.apply(made, torch.empty(0, dtype=torch.int64))
    y.sum().backward()
    assert x.grad.shape == (0, 3)


def test_views_of_outputs_are_restored():
    """A consumer that saves a transposed slice gets the same slice of the second run."""
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    gradients = []
    for run in (kept, recomputed):
        y = joined(run, lambda x: x.exp(), (x,), lambda e: e[:, 1:3].t() @ weight).square().sum()
        gradients.append(torch.autograd.grad(y, (x, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_producer_runs_once_more_for_all_readers():
    runs = []

    def producer(x):
        runs.append(torch.is_grad_enabled())
        return x.exp()

    x = torch.randn(5, requires_grad=True)
    y = joined(recomputed, producer, (x,), lambda e: (e * e.sin() * e.cos()).sum())
    y.backward(retain_graph=True)
    assert runs == [True, False]
    y.backward()
    assert runs == [True, False, False]


def test_backward_leaves_nothing_behind():
    x = torch.randn(1000, requires_grad=True)
    with Watch() as watch:
        y = joined(recomputed, lambda x: x.exp(), (x,), lambda e: (e * e).sum())
        y.backward()
        del y
    assert watch.kept_bytes() == x.grad.untyped_storage().nbytes()


def test_the_producers_output_is_not_kept():
    """exp keeps its own output for its backward, so a sum's output (kept by the consumer alone) is what must go."""
    x = torch.randn(1000, requires_grad=True)
    sizes = [kept_by(lambda run=run: joined(run, lambda x: x + 1, (x,), lambda a: (a * a).sum()))[1]
            for run in (kept, recomputed)]
    assert sizes[0] - sizes[1] == 4000


def test_one_inside_another_keeps_the_outer_input_alone():
    """As MLA without q-LoRA: the input of its up-projection is the output of the norm before it."""
    x = torch.randn(1000, requires_grad=True)

    def inner(run):
        return lambda a: joined(run, lambda a: a + 2, (a,), lambda b: (b * b).sum())

    outcomes = [kept_by(lambda run=run: joined(run, lambda x: x + 1, (x,), inner(run))) for run in (kept, recomputed)]
    gradients = [torch.autograd.grad(y, x)[0] for y, _ in outcomes]
    assert torch.equal(*gradients)
    assert outcomes[0][1] - outcomes[1][1] == 4000 and outcomes[1][1] < 100


@pytest.mark.parametrize("trained", ["x", "weight"])
def test_with_frozen_inputs(trained):
    """Fine-tuning a part: only the consumer's weight, or only what comes before, has a gradient."""
    x, weight = torch.randn(3, 4, requires_grad=trained == "x"), torch.randn(4, 2, requires_grad=trained == "weight")
    wanted = x if trained == "x" else weight
    losses = [joined(run, lambda x: x.sin(), (x,), lambda a: (a @ weight).square().sum())
              for run in (kept, recomputed)]
    assert torch.equal(*(torch.autograd.grad(loss, wanted)[0] for loss in losses))


def test_nothing_is_noted_without_gradients():
    with torch.no_grad():
        y, size = kept_by(lambda: joined(recomputed, square_and_cube, (torch.ones(50),), lambda a, b: a * b))
    assert size == y.untyped_storage().nbytes()


def test_empty_outputs():
    """A rank that received no token: empty storages have no address to be told apart by."""
    x = torch.empty(0, 4, requires_grad=True)
    weight = torch.randn(3, 4, requires_grad=True)
    joined(recomputed, lambda x: x * 2, (x,), lambda a: (a @ weight.t()).sum()).backward()
    assert x.grad.shape == (0, 4) and not weight.grad.any()


def model_with(meshes, config: ModelConfig, settings: RecomputeSettings):
    model = whole_model(config, meshes, SEQ_LENGTH, torch.float32, recompute=settings)
    enliven(model)
    return model


SETTINGS = {"none": RecomputeSettings(), "full": RecomputeSettings("full"),
            "selective": RecomputeSettings("selective", MODULES),
            **{module: RecomputeSettings("selective", (module,)) for module in MODULES}}


def held(meshes, config: ModelConfig, settings: RecomputeSettings) -> int:
    model, batch = model_with(meshes, config, settings), random_batch(config, 4, SEQ_LENGTH)
    return kept_by(lambda: forward(model, *batch).loss)[1]


@pytest.mark.parametrize("config", [V2_SMALL, V3_SMALL], ids=["v2", "v3"])
def test_every_mode_holds_less(meshes, config):
    """Each module's recomputation frees something of its own, all three more, whole layers most."""
    bytes_held = {name: held(meshes, config, settings) for name, settings in SETTINGS.items()}
    for module in MODULES:
        assert bytes_held["selective"] < bytes_held[module] < bytes_held["none"], bytes_held
    saved = sum(bytes_held["none"] - bytes_held[module] for module in MODULES)
    assert bytes_held["none"] - bytes_held["selective"] == saved, bytes_held
    assert bytes_held["full"] < bytes_held["selective"]


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "none"])
def test_same_bits(meshes, name):
    """The second run is the first one's arithmetic, so nothing may differ at all."""
    config = replace(V3_SMALL, num_nextn_predict_layers=1)
    outcomes = []
    for settings in (SETTINGS["none"], SETTINGS[name]):
        model = model_with(meshes, config, settings)
        outcome = forward(model, *random_batch(config, 2, SEQ_LENGTH))
        outcome.loss.backward()
        outcomes.append((outcome, gradients_of(model)))
    (kept, kept_gradients), (recomputed, gradients) = outcomes
    assert torch.equal(kept.loss, recomputed.loss)
    assert all(torch.equal(gradients[name], kept_gradients[name]) for name in kept_gradients)
    counts = kept.statistics.expert_counts
    assert all(torch.equal(recomputed.statistics.expert_counts[layer], counts[layer]) for layer in counts)
