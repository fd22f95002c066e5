"""One step of training on one rank: its gradient and update against a plain float64 reference, and its promises."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import gradients_of, relative_error, training_batch, weights_of
from small_trainers import BF16, CONFIG, EXACT, batch_of, parts_of, reference_of, step_of_both, trainer
from torch.distributed.tensor import DTensor

from megatron_deepseek.model.build import Precision
from megatron_deepseek.parallel.layout import Layout
from megatron_deepseek.settings import LossSettings, OptimizerSettings, RecomputeSettings
from megatron_deepseek.training.trainer import StopFlags, travel_between_stages


def test_losses_by_source_are_those_of_its_rows_alone(meshes):
    """Over two micro-batches, in training and in evaluation; a source without rows, and a row without labels."""
    ours = trainer(meshes)
    tokens, labels, mask = parts_of(4)
    mask[3] = False
    sources = torch.tensor([[1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 1]]).bool()
    expected = []
    for rows in ([0, 2], None, [1, 3]):
        alone = 0.0 if rows is None else ours.evaluate(training_batch(tokens[rows], labels[rows], mask[rows])).lm_loss
        count = 0 if rows is None else int(mask[rows].sum())
        expected.append((pytest.approx(alone * count, rel=EXACT), count, count))
    batch = training_batch(tokens, labels, mask, sources_BK=sources)
    assert ours.evaluate(batch).sources == tuple(expected)
    losses = ours.train_step(batch, learning_rate=0.0).losses
    assert losses.sources == tuple(expected)
    assert sum(source.loss for source in losses.sources) == pytest.approx(losses.lm_loss * int(mask.sum()), rel=EXACT)
    assert ours.evaluate(training_batch(tokens, labels, mask)).sources == ()


def test_two_steps_against_plain_autograd_and_adamw(meshes):
    """Losses, every gradient, the gradient norm and every updated weight, over two micro-batches a step."""
    ours = trainer(meshes)
    reference = reference_of(ours.stages[0])
    trained = {name: w for name, w in reference.weights.items() if not name.endswith("correction_bias")}
    decayed = [w for w in trained.values() if w.ndim > 1]
    plain = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1},
                               {"params": [w for w in trained.values() if w.ndim == 1], "weight_decay": 0.0}],
                              lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for step in range(2):
        result = step_of_both(ours, reference, plain, seed=step, learning_rate=1e-2)
        expected = reference.gradients()
        errors = {name: relative_error(g, expected[name]) for name, g in gradients_of(ours.stages[0]).items()}
        assert max(errors.values()) < EXACT, errors
        norm = torch.cat([g.flatten() for g in expected.values()]).norm().item()
        assert result.grad_norm == pytest.approx(norm, rel=EXACT)
    weights = weights_of(ours.stages[0])
    errors = {name: relative_error(weights[name], weight) for name, weight in reference.weights.items()}
    assert max(errors.values()) < 1e-8, errors  # Adam divides by the root of small second moments


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_division_into_micro_batches_does_not_show(meshes, micro_batch_size):
    """Though their valid labels differ in number."""
    outcomes = []
    for size in (2, micro_batch_size):
        ours = trainer(meshes, micro_batch_size=size)
        outcomes.append((ours.train_step(batch_of(4), learning_rate=0.0), gradients_of(ours.stages[0])))
    (one, one_gradients), (other, other_gradients) = outcomes
    assert one.losses.lm_loss == pytest.approx(other.losses.lm_loss, rel=EXACT)
    assert one.losses.mtp_loss == pytest.approx(other.losses.mtp_loss, rel=EXACT)
    assert one.losses.balance_loss == pytest.approx(other.losses.balance_loss, rel=EXACT)
    assert max(relative_error(other_gradients[name], g) for name, g in one_gradients.items()) < EXACT
    assert all(torch.equal(one.expert_counts[layer], other.expert_counts[layer]) for layer in one.expert_counts)


@pytest.mark.parametrize("kind", ["seq_aux_loss", "aux_loss"])
def test_blank_rows_change_nothing(meshes, kind):
    """Balance losses are means over the rows that are there, also where a micro-batch's rows are pooled."""
    loss = LossSettings(mtp_loss_scaling_factor=0.3, balance_type=kind, moe_aux_loss_coeff=0.2)
    found = []
    for blank in (0, 1, 3):
        ours = trainer(meshes, micro_batch_size=1 + blank, loss=loss)
        tokens, labels, mask = (torch.cat([each[:1], torch.zeros_like(each[:1]).expand(blank, -1)])
                                for each in parts_of(1))
        real = (torch.arange(1 + blank) == 0)[:, None].expand_as(mask)
        result = ours.train_step(training_batch(tokens, labels, mask & real, real_BS=real), learning_rate=0.0)
        found.append((result.losses, gradients_of(ours.stages[0])))
    for losses, gradients in found[1:]:
        assert losses.balance_loss == pytest.approx(found[0][0].balance_loss, rel=EXACT) and losses.balance_loss > 0
        for name, gradient in gradients.items():
            assert relative_error(gradient, found[0][1][name]) < EXACT, name


def test_clipping(meshes):
    """The reported norm is the one before; the gradient keeps its direction. 1e-6 is Megatron's epsilon."""
    free, clipped = trainer(meshes), trainer(meshes, optimizer=OptimizerSettings(clip_grad=0.01))
    norms = [each.train_step(batch_of(4), learning_rate=0.0).grad_norm for each in (free, clipped)]
    assert norms[0] == norms[1] > 0.01
    small, large = gradients_of(clipped.stages[0]), gradients_of(free.stages[0])
    assert torch.cat([g.flatten() for g in small.values()]).norm().item() == pytest.approx(0.01, rel=1e-4)
    factor = 0.01 / (norms[0] + 1e-6)
    assert max(relative_error(small[name], large[name] * factor) for name in large) < EXACT


def test_clipping_leaves_a_small_gradient_alone(meshes):
    free, clipped = trainer(meshes), trainer(meshes, optimizer=OptimizerSettings(clip_grad=1e6))
    for each in (free, clipped):
        each.train_step(batch_of(2), learning_rate=0.0)
    small, large = gradients_of(clipped.stages[0]), gradients_of(free.stages[0])
    assert all(torch.equal(small[name], large[name]) for name in large)


def test_weight_decay_takes_matrices_only(meshes):
    """A step whose labels are all masked has no gradient, so only decay moves weights: by 1 - lr * decay."""
    settings = OptimizerSettings(weight_decay=0.5, clip_grad=0.0)
    ours = trainer(meshes, optimizer=settings, loss=LossSettings())
    before = weights_of(ours.stages[0])
    tokens, labels, mask = parts_of(2)
    ours.train_step(training_batch(tokens, labels, torch.zeros_like(mask)), learning_rate=0.1)
    for name, weight in weights_of(ours.stages[0]).items():
        factor = 1.0 if weight.ndim == 1 else 1 - 0.1 * 0.5
        torch.testing.assert_close(weight, before[name] * factor, rtol=1e-12, atol=0, msg=name)


def test_expert_bias_moves_after_the_step(meshes):
    """By the counts of the step, in every MoE layer, MTP's included."""
    ours = trainer(meshes)
    before = weights_of(ours.stages[0])
    counts = ours.train_step(batch_of(4), learning_rate=0.0, bias_rate=0.125).expert_counts
    assert counts.keys() == {"model.layers.1.mlp", "model.layers.2.mlp"}
    after = weights_of(ours.stages[0])
    for layer, counts_E in counts.items():
        name = f"{layer}.gate.e_score_correction_bias"
        expected = before[name] + 0.125 * torch.sign(counts_E.sum() / 8 - counts_E)
        torch.testing.assert_close(after[name], expected, rtol=1e-12, atol=1e-12)


def test_evaluation_leaves_everything_as_it_was(meshes):
    """Weights, gradients, biases and the next step; its losses are those that training would see."""
    ours, undisturbed = trainer(meshes), trainer(meshes)
    for each in (ours, undisturbed):
        each.train_step(batch_of(2), learning_rate=0.01)
    before, gradients = weights_of(ours.stages[0]), gradients_of(ours.stages[0])
    kept = []
    handle = ours.stages[0].register_forward_hook(lambda module, args, loss: kept.append(loss.requires_grad))
    losses = ours.evaluate(batch_of(4, seed=5))
    handle.remove()
    assert kept == [False] * 2, "a forward alone keeps nothing for a backward"
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(ours.stages[0]).items())
    assert all(torch.equal(g, gradients[name]) for name, g in gradients_of(ours.stages[0]).items())
    trained = [each.train_step(batch_of(4, seed=5), learning_rate=0.01).losses for each in (ours, undisturbed)]
    assert trained[0] == trained[1]
    assert (losses.lm_loss, losses.mtp_loss) == (trained[0].lm_loss, trained[0].mtp_loss)
    assert losses.balance_loss == 0.0


@pytest.mark.parametrize("changes", [{}, {"precision": BF16, "recompute": RecomputeSettings("full")}],
                         ids=["plain", "bfloat16 recomputed"])
def test_training_draws_no_random_numbers(meshes, changes):
    """So a checkpoint needs no generator's state: every generator stays where it was, and a step does not ask them."""
    steps = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = generator_states()
        ours = trainer(meshes, lively=False, **changes)
        result = ours.train_step(batch_of(4), learning_rate=0.01, bias_rate=0.1)
        ours.evaluate(batch_of(4))
        assert generator_states() == before
        steps.append((result.losses, weights_of(ours.stages[0])))
    assert steps[0][0] == steps[1][0]
    assert all(torch.equal(weight, steps[1][1][name]) for name, weight in steps[0][1].items())


def generator_states() -> tuple:
    return bytes(torch.get_rng_state()), random.getstate(), np.random.get_state()[1].tobytes()


def test_bfloat16_keeps_float32_masters(meshes):
    """Weights, gradients and moments are float32; the loss is bfloat16's 8 bits from float32's, averaged: 1 %."""
    wide, narrow = trainer(meshes, precision=Precision()), trainer(meshes, precision=BF16)
    results = [each.train_step(batch_of(4), learning_rate=1e-3) for each in (wide, narrow)]
    assert results[1].losses.lm_loss == pytest.approx(results[0].losses.lm_loss, rel=1e-2)
    assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=5e-2)
    assert results[1].losses != results[0].losses, "it did not compute in bfloat16"
    tensors = [t for item in narrow.parameters for t in (item.parameter, item.parameter.grad)]
    moments = [m for state in narrow.optimizer.state.values() for key, m in state.items() if key != "step"]
    assert len(moments) == 2 * len(narrow.parameters)
    assert {tensor.dtype for tensor in (*tensors, *moments)} == {torch.float32}


def test_bfloat16_accumulates_in_float32(meshes):
    """32 equal micro-batches of 1/32 each add up to the gradient of one, bit for bit: in float32 such sums of
    bfloat16 numbers are exact, in bfloat16 they would stop growing. The routers' are float32 numbers: 1e-6."""
    gradients = []
    for copies in (1, 32):
        ours = trainer(meshes, precision=BF16, micro_batch_size=1, loss=LossSettings())
        ours.train_step(training_batch(*(x.expand(copies, -1) for x in parts_of(1))), learning_rate=0.0)
        gradients.append(gradients_of(ours.stages[0]))
    errors = {name: relative_error(gradients[1][name], gradient) for name, gradient in gradients[0].items()}
    assert not {name: e for name, e in errors.items() if e > (1e-6 if name.endswith("gate.weight") else 0.0)}


def test_routers_compute_with_their_master_weights_under_bfloat16(meshes):
    """And experts beside them with weights in bfloat16."""
    ours, seen = trainer(meshes, precision=BF16), []
    moe = ours.stages[0].model.layers[str(CONFIG.first_k_dense_replace)].mlp
    for module, name in ((moe.gate, "weight"), (moe.experts, "down_proj")):
        module.register_forward_pre_hook(lambda module, _, name=name: seen.append(getattr(module, name).dtype))
    ours.train_step(batch_of(2), learning_rate=0.0)
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("freed", [False, True], ids=["kept", "freed"])
def test_gathered_weights_are_kept_for_the_next_micro_batch_unless_a_forward_frees_them(meshes, freed):
    """Whether a layer's weight is a shard before and after each forward, and behind the step."""
    ours = trainer(meshes, reshard_after_forward=freed)
    (stage,), sharded = ours.stages, []

    def look(*_) -> None:
        sharded.append(isinstance(stage.model.layers["0"].self_attn.o_proj.weight, DTensor))

    stage.register_forward_pre_hook(look)
    stage.register_forward_hook(look)
    ours.train_step(batch_of(4), learning_rate=0.0)
    look()
    assert sharded == [True, freed, freed, freed, True]


@pytest.mark.parametrize("precision", [Precision(), BF16], ids=["float32", "bfloat16"])
def test_memorises_a_batch(meshes, precision):
    """20 steps on 4 sequences from the ordinary start, both losses to less than half."""
    ours = trainer(meshes, lively=False, precision=precision, micro_batch_size=4, optimizer=OptimizerSettings())
    batch = batch_of(4)
    first, *_, last = [ours.train_step(batch, learning_rate=0.02, bias_rate=1e-3).losses for _ in range(20)]
    assert first.lm_loss == pytest.approx(torch.tensor(float(CONFIG.vocab_size)).log().item(), rel=0.01)
    assert last.lm_loss < 0.5 * first.lm_loss and last.mtp_loss[0] < 0.5 * first.mtp_loss[0]


def test_what_is_not_finite_changes_nothing(meshes):
    """No weight, no moment, no bias; the step says so, and the next one, healthy again, is as if it had not been."""
    ours, undisturbed = trainer(meshes), trainer(meshes)
    for each in (ours, undisturbed):
        each.train_step(batch_of(2), learning_rate=0.1)
    weight = ours.stages[0].model.layers["0"].self_attn.o_proj.weight.to_local()
    kept = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = float("inf")
    before = weights_of(ours.stages[0])
    result = ours.train_step(batch_of(2), learning_rate=0.1, bias_rate=0.1)
    assert not result.updated and result.losses.lm_loss != result.losses.lm_loss
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(ours.stages[0]).items())
    with torch.no_grad():
        weight[0, 0] = kept
    for each in (ours, undisturbed):
        assert each.train_step(batch_of(2), learning_rate=0.1).updated
    after = weights_of(undisturbed.stages[0])
    assert all(torch.equal(weight, after[name]) for name, weight in weights_of(ours.stages[0]).items())


def test_the_number_of_labels_is_told(meshes):
    """Of the main prediction, in a step and in an evaluation; none where all are masked, which changes no weight."""
    made = trainer(meshes)
    tokens, labels, mask = parts_of(2)
    assert made.train_step(training_batch(tokens, labels, mask), learning_rate=0.0).losses.num_labels == int(mask.sum())
    nothing = training_batch(tokens, labels, torch.zeros_like(mask))
    assert made.evaluate(nothing).num_labels == 0
    before = weights_of(made.stages[0])
    result = made.train_step(nothing, learning_rate=0.0)
    assert (result.losses.num_labels, result.losses.lm_loss) == (0, 0.0)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(made.stages[0]).items())


def test_votes_travel_with_the_losses(meshes):
    ours = trainer(meshes)
    for stop_flags in (StopFlags(), StopFlags(leave=True), StopFlags(save=True)):
        assert ours.train_step(batch_of(2), learning_rate=0.1, stop_flags=lambda: stop_flags).stop_flags == stop_flags


def test_a_sequence_that_ranks_cannot_share_evenly_is_refused(meshes):
    """Before anything is sent: 4 ranks would take 2, 2, 2 and no tokens of 6."""
    spec, over_4 = trainer(meshes, lively=False).spec, replace(meshes, layout=Layout(tp=4))
    with pytest.raises(ValueError, match="sequences of 6 tokens do not divide over cp 1 x tp 4 ranks"):
        travel_between_stages(spec, over_4)
    dense = replace(spec, model=replace(CONFIG, n_routed_experts=0))
    assert travel_between_stages(dense, over_4)
    with pytest.raises(ValueError, match="do not divide"):
        travel_between_stages(dense, replace(meshes, layout=Layout(tp=4, sequence_parallel=True)))
