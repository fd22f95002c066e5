"""Any subset of the parameters frozen, on one rank: against plain autograd and AdamW; no work for what is frozen."""

import random
from dataclasses import replace

import pytest
import torch
from small_models import weights_of
from small_trainers import BF16, CONFIG, EXACT, LOSS, batch_of, reference_of, step_of_both, trainer

from megatron_deepseek.checkpoint.job import distributed as checkpoint
from megatron_deepseek.checkpoint.job.state import MOMENTS, state_to_save
from megatron_deepseek.checkpoint.train_state import TrainState, read_state
from megatron_deepseek.model.architecture.freezing import describe_frozen, is_frozen, parameter_shapes
from megatron_deepseek.model.build import Precision
from megatron_deepseek.model.frozen import trained_parameters
from megatron_deepseek.ops import grouped_gemm
from megatron_deepseek.ops.fp8 import recipe as fp8_recipe
from megatron_deepseek.ops.fp8.recipe import Fp8Gemm
from megatron_deepseek.parallel import zero_bubble
from megatron_deepseek.parallel.tensor import ParallelLinear
from megatron_deepseek.parallel.zero_bubble import defer_weight_gradients
from megatron_deepseek.runtime.resume import describe_resumed
from megatron_deepseek.settings import OptimizerSettings

NAMES = tuple(parameter_shapes(CONFIG))
GATE = "model.layers.1.mlp.gate.weight"
FP8 = Precision(torch.float32, torch.bfloat16, fp8=True)
DECAY, BETAS, EPS, RATE = 0.1, (0.9, 0.95), 1e-8, 1e-2  # OptimizerSettings' own but for the rate


def subset(seed: int) -> tuple[str, ...]:
    """Names drawn with a probability that is drawn too; neither none nor all."""
    random_ = random.Random(seed)
    part = random_.choice((0.2, 0.5, 0.9))
    drawn = tuple(name for name in NAMES if random_.random() < part)
    return drawn if 0 < len(drawn) < len(NAMES) else subset(seed + 1000)


def gradients(made) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else p.grad.full_tensor().clone()
            for name, p in made.stages[0].named_parameters()}


SUBSETS = {"drawn 1": subset(1), "drawn 2": subset(2), "drawn 3": subset(3),
           "all but the router": tuple(name for name in NAMES if name != GATE),
           "all but a norm of the MTP module": tuple(name for name in NAMES if name != "model.layers.2.hnorm.weight"),
           "the first layers": tuple(name for name in NAMES if "layers.2" not in name),
           "all behind the embedding": tuple(name for name in NAMES if name != "model.embed_tokens.weight")}


@pytest.mark.parametrize("name", SUBSETS)
def test_two_steps_against_plain_autograd_and_adamw(meshes, name):
    """Losses, every gradient, the norm, and every weight; frozen ones are the same bits, though matrices decay."""
    frozen = SUBSETS[name]
    ours = trainer(meshes, frozen=frozen)
    reference = reference_of(ours.stages[0])
    before, trained = weights_of(ours.stages[0]), set(NAMES) - set(frozen)
    for each in reference.weights.keys() - trained:
        reference.weights[each].requires_grad_(False)
    groups = [{"params": [reference.weights[each] for each in sorted(trained) if (before[each].ndim > 1) == matrices],
               "weight_decay": DECAY * matrices} for matrices in (True, False)]
    plain = torch.optim.AdamW([group for group in groups if group["params"]], lr=RATE, betas=BETAS, eps=EPS)
    for seed in range(2):
        result = step_of_both(ours, reference, plain, seed, RATE)
        for each, gradient in gradients(ours).items():
            wanted = reference.weights[each].grad
            assert (gradient is None) == (wanted is None) == (each in frozen), each
            if gradient is not None:
                torch.testing.assert_close(gradient, wanted, rtol=0, atol=EXACT * wanted.abs().max().item() + 1e-15)
        norm = torch.cat([reference.weights[each].grad.flatten() for each in trained]).norm().item()
        assert result.grad_norm == pytest.approx(norm, rel=EXACT)
    after = weights_of(ours.stages[0])
    assert all(torch.equal(after[each], before[each]) for each in frozen)
    for each in trained:  # Adam divides by the root of small second moments
        torch.testing.assert_close(after[each], reference.weights[each].detach(), rtol=1e-7, atol=1e-8)
        assert not torch.equal(after[each], before[each])


@pytest.mark.parametrize("precision", [Precision(torch.float64), BF16, FP8], ids=["float64", "bf16", "fp8"])
@pytest.mark.parametrize("seed", [4, 5])
def test_what_is_trained_has_the_gradient_that_it_has_when_all_is(meshes, precision, seed):
    """To the bit: the same operators make it, on the same numbers."""
    frozen = subset(seed)
    everything, ours = trainer(meshes, precision=precision), trainer(meshes, precision=precision, frozen=frozen)
    results = [made.train_step(batch_of(4), learning_rate=0.0).losses for made in (everything, ours)]
    assert results[0] == results[1]
    whole = gradients(everything)
    for name, gradient in gradients(ours).items():
        assert gradient is None if name in frozen else torch.equal(gradient, whole[name]), name


def test_patterns_name_parameters_whole():
    assert is_frozen("model.layers.3.mlp.experts.down_proj", ("model.layers.*.mlp.experts.*",))
    assert is_frozen("model.norm.weight", ("lm_head.weight", "model.norm.*"))
    assert not is_frozen("model.layers.3.mlp.shared_experts.down_proj.weight", ("mlp.experts.*", "model.layers.3"))
    assert not is_frozen("model.norm.weight", ())


def test_the_optimizer_knows_nothing_of_what_is_frozen(meshes):
    """No moments, no group, no name in a checkpoint; a rank may be left without any."""
    frozen = SUBSETS["drawn 2"]
    ours = trainer(meshes, frozen=frozen)
    left = [p for group in ours.optimizer.param_groups for p in group["params"]]
    trained = [p for _, p in trained_parameters(ours.stages[0])]
    assert {*map(id, left)} == {*map(id, trained)} and len(ours.optimizer.state) == len(left) < len(NAMES)
    saved = state_to_save(ours.stages, ours.optimizer)
    assert {f"model.{name}" for name in NAMES} < saved.keys()
    assert {name for name in saved if name.startswith("optimizer.")} == {
        f"optimizer.{moment}.{name}" for name in set(NAMES) - set(frozen) for moment in MOMENTS}
    nothing = trainer(meshes, frozen=("*",))
    assert nothing.parameters == [] and all(not group["params"] for group in nothing.optimizer.param_groups)
    assert nothing.evaluate(batch_of(2)) == ours.evaluate(batch_of(2))


@pytest.mark.parametrize("frozen", [(), (GATE,)])
def test_the_bias_of_a_frozen_router_stays(meshes, frozen):
    ours = trainer(meshes, frozen=frozen)
    before = weights_of(ours.stages[0])
    ours.train_step(batch_of(4), learning_rate=0.0, bias_rate=0.125)
    after, bias = weights_of(ours.stages[0]), "model.layers.{}.mlp.gate.e_score_correction_bias"
    assert torch.equal(after[bias.format(1)], before[bias.format(1)]) == bool(frozen)
    assert not torch.equal(after[bias.format(2)], before[bias.format(2)])


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("name", ["drawn 1", "drawn 3", "the first layers"])
def test_weight_gradients_of_frozen_weights_are_neither_deferred_nor_made(meshes, monkeypatch, name, fp8):
    """Of large products: what waits for a W step is of the trained weights, and each is multiplied out once."""
    frozen, made = SUBSETS[name], []
    for module, function in ((zero_bubble, "grouped_wgrad"), (grouped_gemm, "grouped_wgrad"), (fp8_recipe, "_wgrad")):
        original = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *args, original=original: made.append(1) or original(*args))
    ours = trainer(meshes, frozen=frozen, precision=FP8 if fp8 else Precision(torch.float64))
    (stage,) = ours.stages
    deferred = defer_weight_gradients(stage)
    waiting = []
    monkeypatch.setattr(deferred, "defer", lambda weight, gradient: waiting.append((weight, gradient)))
    ours.train_step(batch_of(2), learning_rate=0.0)
    assert not made
    products = {f"{name}.weight" for name, module in stage.named_modules() if isinstance(module, ParallelLinear)}
    products |= {name for name in NAMES if ".mlp.experts." in name}
    expected = [name for name in products - set(frozen) for _ in range(2 if name == "lm_head.weight" else 1)]
    assert sorted(tuple(weight.shape) for weight, _ in waiting) == sorted(
        parameter_shapes(CONFIG)[name] for name in expected)
    with torch.no_grad():
        values = [gradient() for _, gradient in waiting]
    assert [value.shape for value in values] == [weight.shape for weight, _ in waiting]


@pytest.mark.parametrize("frozen", [False, True])
def test_an_fp8_product_keeps_its_input_for_a_trained_weight_alone(frozen):
    x, weight = torch.randn(4, 256, requires_grad=True), torch.randn(128, 256, requires_grad=not frozen)
    y = Fp8Gemm()(x, weight)
    assert len(y.grad_fn.saved_tensors) == (0 if frozen else 2)
    hidden = torch.randn(4, 512)  # needs no gradient itself
    down = Fp8Gemm().after_swiglu((hidden,), torch.randn(128, 256, requires_grad=not frozen))
    assert down.requires_grad != frozen
    if not frozen:
        down.sum().backward()


def test_a_step_of_a_model_whose_balance_loss_is_all_a_router_gets(meshes):
    """A trained router of frozen experts under frozen layers: its gradient is of the balance loss and of the choice."""
    frozen, loss = SUBSETS["all but the router"], replace(LOSS, moe_aux_loss_coeff=0.0, balance_type="none")
    both, one = trainer(meshes, frozen=frozen), trainer(meshes, frozen=frozen, loss=loss)
    for made in (both, one):
        made.train_step(batch_of(4), learning_rate=0.0)
    assert not torch.equal(gradients(both)[GATE], gradients(one)[GATE])


class Shadow:
    """AdamW written out, of one parameter from when it is first trained."""

    def __init__(self, weight: torch.Tensor):
        self.weight, self.step = weight.clone(), 0
        self.first, self.second = torch.zeros_like(weight), torch.zeros_like(weight)

    def update(self, gradient: torch.Tensor) -> None:
        self.step += 1
        self.weight *= 1 - RATE * (DECAY if self.weight.ndim > 1 else 0.0)
        self.first = BETAS[0] * self.first + (1 - BETAS[0]) * gradient
        self.second = BETAS[1] * self.second + (1 - BETAS[1]) * gradient.square()
        root = (self.second / (1 - BETAS[1]**self.step)).sqrt() + EPS
        self.weight -= RATE * (self.first / (1 - BETAS[0]**self.step)) / root


def test_resumed_with_another_subset(meshes, tmp_path):
    """Four lives of two steps: a parameter that is newly trained begins at step 0 and with moments of zero, also in the
    lives after; one that is frozen keeps its weight, and begins anew when it is trained again.
    """
    lives = [subset(6), subset(7), subset(7), subset(8)]
    shadows: dict[str, Shadow] = {}
    state, number = TrainState(), 0
    for life, frozen in enumerate(lives):
        ours = trainer(meshes, lively=life == 0, frozen=frozen)
        if life:
            state = checkpoint.load(tmp_path / f"iter_{number:07d}", ours.stages, ours.optimizer)
        start = weights_of(ours.stages[0])
        shadows = {name: shadows.get(name) or Shadow(start[name]) for name in NAMES if name not in frozen}
        for name, shadow in shadows.items():
            torch.testing.assert_close(start[name], shadow.weight, rtol=1e-12, atol=1e-12)
        for _ in range(2):
            result = ours.train_step(batch_of(4, seed=number), learning_rate=RATE)
            state, number = state.after(4, result.updated), number + 1
            for name, gradient in gradients(ours).items():
                if name in shadows:
                    shadows[name].update(gradient)
        now = weights_of(ours.stages[0])
        for name in NAMES:
            wanted = shadows[name].weight if name in shadows else start[name]
            torch.testing.assert_close(now[name], wanted, rtol=1e-12, atol=0 if name in frozen else 1e-12)
            steps = {float(ours.optimizer.state[p]["step"]) for each, p in trained_parameters(ours.stages[0])
                     if each == name}
            assert steps == ({float(shadows[name].step)} if name in shadows else set())
        directory = checkpoint.save(tmp_path, state, CONFIG, ours.stages, ours.optimizer)
        assert read_state(directory) == state and checkpoint.with_moments(directory) == set(shadows)
        assert dict(state.late) == {name: number - each.step for name, each in shadows.items() if each.step < number}
    assert state.late and any(each.step == number for each in shadows.values())


def test_moments_of_one_kind_alone_are_still_refused(meshes, tmp_path):
    """That is no other subset. Nor is a checkpoint without any moments."""
    ours = trainer(meshes, frozen=(GATE,))
    ours.train_step(batch_of(2), learning_rate=RATE)
    state = TrainState(1, 2, 1)
    directory = checkpoint.save(tmp_path / "weights", state, CONFIG, ours.stages, None)
    with pytest.raises(ValueError, match="lacks .* tensors of the optimizer"):
        checkpoint.load(directory, ours.stages, ours.optimizer)
    half = {name: tensor for name, tensor in state_to_save(ours.stages, ours.optimizer).items()
            if name != "optimizer.exp_avg.model.norm.weight"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "state_to_save", lambda *_: half)
        directory = checkpoint.save(tmp_path / "half", state, CONFIG, ours.stages, ours.optimizer)
    with pytest.raises(ValueError, match="lacks 1 tensors of the optimizer, first optimizer.exp_avg.model.norm.weight"):
        checkpoint.load(directory, ours.stages, ours.optimizer)


def test_a_run_says_what_is_frozen_and_what_has_changed():
    total, gate = CONFIG.num_parameters(), CONFIG.n_routed_experts * CONFIG.hidden_size
    assert describe_frozen(CONFIG, (GATE,)) == (
        f"--freeze-parameters: {total - gate:,} parameters in {len(NAMES) - 1} tensors are trained, {gate:,} in 1 are "
        "frozen")
    assert describe_resumed({"a", "b"}, {"a", "b"}, 5) == []
    new, left = describe_resumed({"a", "b"}, {"b", "c", "d"}, 5)
    assert new == ("a is trained from here on and had no moments in the checkpoint: these begin at zero and step 0, "
                   "while those of others have 5 steps behind them")
    assert left.startswith("2 parameters, first c, are frozen from here on")


def test_moments_in_bfloat16_too(meshes):
    """The other optimizer has no state of what is frozen either."""
    settings = OptimizerSettings(exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16")
    ours = trainer(meshes, frozen=SUBSETS["drawn 1"], optimizer=settings, precision=Precision())
    ours.train_step(batch_of(2), learning_rate=RATE)
    assert len(ours.optimizer.state) == len(NAMES) - len(SUBSETS["drawn 1"])
