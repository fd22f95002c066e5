"""A step of adapters alone against autograd of W + scale * B A, in float64, and what becomes of everything else."""

from dataclasses import replace

import pytest
import torch
from reference_dropout import DroppingModel, token_key
from small_models import gradients_of, relative_error, weights_of
from small_trainers import CONFIG, EXACT, NO_CLIPPING, batch_of, parts_of, reference_step, trainer
from reference_model import ReferenceModel

from megatron_deepseek.data.batches import sample_indices
from megatron_deepseek.model.architecture.adapters import LoraSettings, adapted_rows, factor_name, is_adapter
from megatron_deepseek.model.positions import TOKEN_KEYS
from megatron_deepseek.model.rotary import rope_table
from megatron_deepseek.settings import OptimizerSettings
from megatron_deepseek.training.token_keys import KeyedRows, keys_of

EVERYTHING = LoraSettings(3, 2.0, ("all", "router", "mtp"))


def merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """By the definition; of experts each alone, with gate and up one behind the other."""
    if weight.ndim == 2:
        return weight + scale * b @ a
    matrices = a.shape[1] // b.shape[2]
    delta = [torch.cat([own_b @ own_a for own_a, own_b in zip(a_e.chunk(matrices), b_e.chunk(matrices))])
             for a_e, b_e in zip(a, b)]
    return weight + scale * torch.stack(delta)


def reference_with(ours, lora: LoraSettings) -> tuple[ReferenceModel, dict[str, torch.Tensor]]:
    """A reference of merged weights, and the A and B that they are made of, which get its gradients."""
    weights = weights_of(ours.stages[0])
    factors = {name: weights.pop(name).requires_grad_() for name in list(weights) if is_adapter(name)}
    for row in adapted_rows(CONFIG, lora):
        a, b = (factors[factor_name(row.name, which)] for which in ("lora_A", "lora_B"))
        weights[row.name] = merged(weights[row.name], a, b, lora.scale)
    length = ours.spec.seq_length
    rope = rope_table(CONFIG, length, torch.device("cpu"), torch.float64)
    return ReferenceModel(CONFIG, weights, rope, CONFIG.qk_head_dim**-0.5), factors


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_gradients_are_those_of_the_merged_weights(meshes, rank_stabilised):
    """Of every A and B, all kinds of layers at once; nothing else has a gradient."""
    lora = LoraSettings(3, 2.0, EVERYTHING.lora_target, rank_stabilised)
    ours = trainer(meshes, lora=lora)
    reference, factors = reference_with(ours, lora)
    lm_loss, *_ = reference_step(reference, *parts_of(4))
    result = ours.train_step(batch_of(4), learning_rate=0.0)
    assert result.losses.lm_loss == pytest.approx(lm_loss.item(), rel=EXACT)
    gradients = {name: gradient for name, gradient in gradients_of(ours.stages[0]).items() if gradient is not None}
    assert gradients.keys() == factors.keys() and len(factors) == 2 * len(list(adapted_rows(CONFIG, lora)))
    for name, factor in factors.items():
        assert relative_error(gradients[name], factor.grad) < EXACT, name


def test_dropout_is_that_of_its_definition(meshes):
    """All kinds of layers at once, expert by expert; what is evaluated loses nothing."""
    lora = replace(EVERYTHING, lora_dropout=0.25)
    ours, plain = trainer(meshes, lora=lora), trainer(meshes, lora=EVERYTHING)
    weights = weights_of(ours.stages[0])
    factors = {name: weights.pop(name).requires_grad_() for name in list(weights) if is_adapter(name)}
    samples, length = torch.tensor([7, 8, 9, 10]), ours.spec.seq_length
    keys = [[token_key(5, sample, position) for position in range(length)] for sample in samples.tolist()]
    rope = rope_table(CONFIG, length, torch.device("cpu"), torch.float64)
    reference = DroppingModel(CONFIG, weights, rope, CONFIG.qk_head_dim**-0.5, lora, factors, keys)
    lm_loss, *_ = reference_step(reference, *parts_of(4))
    batch = batch_of(4)
    result = ours.train_step(replace(batch, per_token={TOKEN_KEYS: keys_of(5, samples, length)}), learning_rate=0.0)
    assert result.losses.lm_loss == pytest.approx(lm_loss.item(), rel=EXACT)
    gradients = gradients_of(ours.stages[0])
    for name, factor in factors.items():
        assert relative_error(gradients[name], factor.grad) < EXACT, name
    assert ours.evaluate(batch).lm_loss == plain.evaluate(batch).lm_loss != pytest.approx(lm_loss.item(), rel=1e-3)


def test_keys_are_of_the_seed_and_the_consumed_samples_alone():
    """Two data ranks with micro-batches of two, the later half of a ramp: rows 16 and on, whoever reads them."""
    class Given:
        source_names = ()

        def batch(self, consumed, size, micro_batch_size, dp_rank, dp_size):
            return batch_of(len(sample_indices(consumed, size, micro_batch_size, dp_rank, dp_size)))

    rows, length = KeyedRows(Given(), 5), parts_of(1)[0].shape[1]
    (whole,) = (rows.batch(16, 8, 1, 0, 1).per_token[TOKEN_KEYS],)
    assert torch.equal(whole, keys_of(5, torch.arange(16, 24), length))
    assert whole[3, 2].item() % 2**64 == token_key(5, 19, 2)
    ranks = [rows.batch(16, 8, 2, rank, 2).per_token[TOKEN_KEYS] for rank in range(2)]
    assert torch.equal(torch.cat([ranks[0][:2], ranks[1][:2], ranks[0][2:], ranks[1][2:]]), whole)
    other = KeyedRows(Given(), 6).batch(16, 8, 1, 0, 1).per_token[TOKEN_KEYS]
    later = rows.batch(24, 8, 1, 0, 1).per_token[TOKEN_KEYS]
    assert len({*whole.flatten().tolist(), *other.flatten().tolist(), *later.flatten().tolist()}) == 3 * whole.numel()


def test_only_adapters_move_and_b_by_its_own_rate(meshes):
    """The first step of AdamW moves every number by about the learning rate: that of B is LoRA+'s multiple."""
    optimizer = OptimizerSettings(clip_grad=0.0, weight_decay=0.0, lora_plus_ratio=4.0)
    ours = trainer(meshes, lora=EVERYTHING, optimizer=optimizer)
    before = weights_of(ours.stages[0])
    ours.train_step(batch_of(4), learning_rate=1e-3, bias_rate=0.0)
    moved = {name: (tensor - before[name]).abs().max().item() for name, tensor in weights_of(ours.stages[0]).items()}
    for name, size in moved.items():
        expected = (4e-3 if "lora_B" in name else 1e-3) if is_adapter(name) else 0.0
        assert size == pytest.approx(expected, rel=1e-2), name


def test_new_adapters_change_nothing_and_a_is_kaiming_uniform(meshes):
    plain, adapted = (trainer(meshes, lively=False, lora=lora) for lora in (None, EVERYTHING))
    assert adapted.evaluate(batch_of(4)).lm_loss == plain.evaluate(batch_of(4)).lm_loss
    weights = weights_of(adapted.stages[0])
    for row in adapted_rows(CONFIG, EVERYTHING):
        a, b = (weights[factor_name(row.name, which)] for which in ("lora_A", "lora_B"))
        bound = row.shape[-1]**-0.5
        assert not b.any() and a.abs().max() <= bound and a.abs().mean().item() == pytest.approx(bound / 2, rel=0.3)


@pytest.mark.parametrize("target, moves", [("router", True), ("attention", False)])
def test_the_bias_of_a_router_moves_only_with_its_adapter(meshes, target, moves):
    ours = trainer(meshes, lora=LoraSettings(2, 2.0, (target,)), optimizer=NO_CLIPPING)
    bias = ours.stages[0].model.layers["1"].mlp.gate.e_score_correction_bias
    before = bias.clone()
    ours.train_step(batch_of(4), learning_rate=0.0, bias_rate=1e-2)
    assert torch.equal(bias, before) != moves
