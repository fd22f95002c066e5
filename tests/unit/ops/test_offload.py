"""Activations and optimizer in the host's memory: what travels, and that no bit changes.

On the CPU device and host are one memory, but the same code copies there and back; nothing here has run on CUDA.
"""

from dataclasses import replace

import pytest
import torch
from kept_memory import Watch
from small_models import (V3_SMALL, enliven, forward, gradients_of, random_batch, training_batch, weights_of,
                          whole_model, whole_stage)

from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.ops import offload as offload_module
from megatron_deepseek.ops.offload import saved_on_host
from megatron_deepseek.settings import OffloadSettings, OptimizerSettings, RecomputeSettings
from megatron_deepseek.torch_private import fsdp_parameter_group
from megatron_deepseek.training.trainer import TrainingSpec, Trainer

CONFIG = replace(V3_SMALL, num_nextn_predict_layers=1)
SEQ_LENGTH = 16
ALL = OffloadSettings(cpu_offloading_num_layers=3)
EMBEDDING = "model.embed_tokens.weight"
RECOMPUTED = {"kept": RecomputeSettings(), "full": RecomputeSettings("full"),
              "selective": RecomputeSettings("selective", ("layernorm", "mla_up_proj", "moe_act"))}


@pytest.fixture
def travelled(monkeypatch) -> list[torch.Tensor]:
    """Copies on the host, in the order in which they were made."""
    hosts, to_host = [], offload_module.to_host

    def spy(tensor):
        notes = to_host(tensor)
        hosts.append(notes.make.args[0])
        return notes

    monkeypatch.setattr(offload_module, "to_host", spy)
    return hosts


def nothing(tensor: torch.Tensor) -> bool:
    return False


def test_views_come_back_as_they_were(travelled):
    """A transposed slice and an expanded row of one storage: it travels once, and strides are restored."""
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    seen = []

    class Saves(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x.detach() * 2
            views = y[:, 1:3].t(), y[2].expand(3, 4)
            ctx.save_for_backward(*views)
            seen.append([(v.clone(), v.stride()) for v in views])
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            seen.append([(v, v.stride()) for v in ctx.saved_tensors])
            return grad.expand(6, 4)

    with saved_on_host(nothing):
        y = Saves.apply(x)
    y.backward()
    assert len(travelled) == 1
    for (saved, stride), (found, found_stride) in zip(*seen, strict=True):
        assert torch.equal(saved, found) and stride == found_stride


def test_an_address_that_is_used_again_is_another_storage(travelled):
    """Freed after it was saved, its memory goes to the next tensor of that size."""
    x, addresses = torch.ones(1000, requires_grad=True), set()
    with saved_on_host(nothing):
        total = 0
        for factor in range(20):
            factors = torch.full((1000,), float(factor))
            addresses.add(factors.data_ptr())
            total = total + (x * factors).sum()
            del factors
    total.backward()
    assert len(addresses) < 20, "the allocator used no address again: nothing was tested"
    assert torch.equal(x.grad, torch.full((1000,), 190.0))


def test_changed_in_between_it_travels_again(travelled):
    x = torch.ones(5, requires_grad=True)
    buffer = torch.full((5,), 2.0)
    with saved_on_host(nothing):
        y = (x * buffer).sum()
        buffer.add_(1)
        y = y + (x * buffer).sum()
    y.backward()
    assert torch.equal(x.grad, torch.full((5,), 5.0))


def test_what_stays_and_integers_do_not_travel(travelled):
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    with saved_on_host(lambda tensor: tensor.data_ptr() == weight.data_ptr()):
        y = (x.exp() @ weight).index_select(0, torch.tensor([0, 0])).sum()
    y.backward()
    assert [host.numel() for host in travelled] == [12]


def model_with(meshes, recompute: RecomputeSettings, offload: OffloadSettings, precision: Precision = Precision(),
               **options):
    model = whole_model(CONFIG, meshes, SEQ_LENGTH, recompute=recompute, offload=offload, precision=precision,
                        **options)
    enliven(model)
    return model


def kept_on_device(model, travelled: list[torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Bytes that a forward keeps beyond what one without gradients does (gathered weights), and the loss."""
    batch, kept = random_batch(CONFIG, 2, SEQ_LENGTH), []
    for wants_gradient in (False, True):
        with torch.set_grad_enabled(wants_gradient), Watch() as watch:
            loss = forward(model, *batch).loss
        kept.append(watch.kept_bytes() - sum(host.nbytes for host in travelled))
    return kept[1] - kept[0], loss


@pytest.mark.parametrize("name", RECOMPUTED)
def test_same_bits_and_nothing_stays_behind(meshes, travelled, name):
    """Of three layers' activations integers alone are left on the device, and what the norm, the head and the losses
    keep, which is what is left after recomputing whole layers too. No weight is among what travels.
    """
    outcomes = []
    for offload in (OffloadSettings(), ALL):
        model = model_with(meshes, RECOMPUTED[name], offload)
        weights = {tuple(w.float().flatten()[:8].tolist()) for w in weights_of(model).values() if w.numel() > 64}
        kept, loss = kept_on_device(model, travelled)
        assert not weights & {tuple(host[:8].tolist()) for host in travelled}
        loss.backward()
        outcomes.append((loss.detach(), gradients_of(model), kept))
    (kept_loss, kept, before), (loss, gradients, after) = outcomes
    assert torch.equal(kept_loss, loss)
    assert all(torch.equal(gradients[name], kept[name]) for name in kept)
    recomputed, _ = kept_on_device(model_with(meshes, RECOMPUTED["full"], OffloadSettings()), [])
    assert travelled and after < before and after < 1.2 * recomputed, (before, after, recomputed)


@pytest.mark.parametrize("name", RECOMPUTED)
def test_same_bits_in_fp8(meshes, travelled, name):
    """What products keep are codes and scales."""
    outcomes, precision = [], Precision(torch.float32, torch.bfloat16, fp8=True)
    for offload in (OffloadSettings(), ALL):
        model = model_with(meshes, RECOMPUTED[name], offload, precision)
        loss = forward(model, *random_batch(CONFIG, 2, SEQ_LENGTH)).loss
        loss.backward()
        outcomes.append((loss.detach(), gradients_of(model)))
    (kept_loss, kept), (loss, gradients) = outcomes
    assert travelled and torch.equal(kept_loss, loss)
    assert all(torch.equal(gradients[name], kept[name]) for name in kept)


def test_the_first_layers_of_a_stage(meshes, travelled):
    sizes = []
    for layers in (0, 1, 2, 3, 9):
        travelled.clear()
        forward(model_with(meshes, RECOMPUTED["kept"], OffloadSettings(layers)), *random_batch(CONFIG, 2, SEQ_LENGTH))
        sizes.append(sum(host.nbytes for host in travelled))
    assert sizes[0] == 0 and sizes[1] < sizes[2] < sizes[3] == sizes[4]


@pytest.mark.parametrize("precision", [Precision(), Precision(torch.float32, torch.bfloat16)], ids=["fp32", "bf16"])
def test_optimizer_on_the_cpu_changes_no_bit(meshes, precision):
    """Two steps: losses and weights; shards, gradients and moments are on the CPU."""
    outcomes = []
    for offload in (OffloadSettings(), OffloadSettings(optimizer_cpu_offload=True)):
        spec = TrainingSpec(CONFIG, (whole_stage(CONFIG),), "1F1B", SEQ_LENGTH, 2,
                    build=BuildOptions(precision=precision, offload=offload),
                    optimizer=OptimizerSettings(exp_avg_dtype="bf16"))
        made = Trainer(spec, meshes)
        losses = [made.train_step(training_batch(*random_batch(CONFIG, 4, SEQ_LENGTH, seed)), learning_rate=1e-2).losses
                  for seed in range(2)]
        outcomes.append((losses, weights_of(made.stages[0])))
    (kept_losses, kept), (losses, weights) = outcomes
    assert losses == kept_losses
    assert all(torch.equal(weights[name], kept[name]) for name in kept)
    tensors = [t for state in made.optimizer.state.values() for t in state.values()]
    tensors += [t for p in made.stages[0].parameters() for t in (p, p.grad)]
    assert {t.device.type for t in tensors} == {"cpu"}
    groups = [group for module in made.stages[0].modules() if (group := fsdp_parameter_group(module))]
    policies = {type(group.offload_policy).__name__ for group in groups}
    assert policies == {"CPUOffloadPolicy"}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_a_layers_input_travels_though_it_needs_no_gradient(meshes, travelled, name):
    """Above a frozen embedding it is kept for the layer's weights alone. Gradients are the same bits as ever."""
    outcomes = []
    for frozen in ((), (EMBEDDING,)):
        model = model_with(meshes, RECOMPUTED[name], ALL, frozen=frozen)
        travelled.clear()
        forward(model, *random_batch(CONFIG, 2, SEQ_LENGTH)).loss.backward()
        outcomes.append({name: p.grad for name, p in model.named_parameters()})
        first = weights_of(model)[EMBEDDING][random_batch(CONFIG, 2, SEQ_LENGTH)[0][0, 0]]
        assert any(torch.equal(host[:len(first)].double(), first) for host in travelled)
    everything, gradients = outcomes
    assert gradients.pop(EMBEDDING) is None and everything.pop(EMBEDDING) is not None
    assert all(torch.equal(gradients[name].full_tensor(), everything[name].full_tensor()) for name in everything)


@pytest.mark.parametrize("name", RECOMPUTED)
def test_layers_that_have_no_backward_send_nothing(meshes, travelled, name):
    """Frozen ones above a frozen embedding."""
    frozen = (EMBEDDING, "model.layers.0.*", "model.layers.1.*")
    loss = forward(model_with(meshes, RECOMPUTED[name], OffloadSettings(2), frozen=frozen),
                   *random_batch(CONFIG, 2, SEQ_LENGTH)).loss
    assert loss.requires_grad and not travelled
