"""A step of adapters beside a base that is kept in fewer bits, against the same step beside plain numbers."""

from dataclasses import replace

import pytest
import torch
from random_base import RandomBase, held_numbers
from small_models import gradients_of, load, tensors, weights_of, whole_stage
from small_trainers import BF16, CONFIG, LOSS, NO_CLIPPING, SEQ_LENGTH, batch_of, trainer
from torch_versions import keeps_bytes

from megatron_deepseek.checkpoint.convert.block_fp8 import is_quantized
from megatron_deepseek.checkpoint.job.base_weights import fill_held
from megatron_deepseek.model import build
from megatron_deepseek.model.architecture.adapters import LoraSettings, is_adapter
from megatron_deepseek.model.architecture.base_weights import SCALES, BaseSettings
from megatron_deepseek.model.architecture.parameters import parameters
from megatron_deepseek.model.base_weights import check_torch
from megatron_deepseek.model.build import BuildOptions, Precision
from megatron_deepseek.model.init import fill_normal
from megatron_deepseek.model.router import Router
from megatron_deepseek.ops import nf4
from megatron_deepseek.training.trainer import Trainer, TrainingSpec

EVERYTHING = LoraSettings(3, 2.0, ("all", "router", "mtp"))
CPU = torch.device("cpu")
FORMS = {"nf4": BaseSettings(4), "nf4, plain scales": BaseSettings(4, False), "fp8": BaseSettings(8)}


def freeze_masters(stages, dtype):
    """What `freeze_base` would be if a frozen weight had a float32 master."""
    for stage in stages:
        for name, parameter in stage.named_parameters():
            parameter.requires_grad_(is_adapter(name))


def assert_same_step(ours, other) -> None:
    """Losses and gradients, bit for bit, of adapters that are open."""
    for each in (ours, other):
        for name, parameter in each.stages[0].named_parameters():
            if is_adapter(name):
                fill_normal(parameter, 0.2, 0, name)
    results = [each.train_step(batch_of(4), learning_rate=0.0) for each in (ours, other)]
    assert results[0].losses == results[1].losses and results[0].grad_norm == results[1].grad_norm > 0
    expected = gradients_of(other.stages[0])
    for name, gradient in gradients_of(ours.stages[0]).items():
        assert gradient is None and expected.get(name) is None or torch.equal(gradient, expected[name]), name


def test_a_base_in_bfloat16_computes_what_float32_masters_of_it_do(meshes, monkeypatch):
    """Only adapters have float32 masters, and routers, which compute in float32; layers see the same numbers."""
    ours = trainer(meshes, lora=EVERYTHING, precision=BF16)
    kept = {name: parameter.dtype for name, parameter in ours.stages[0].named_parameters()}
    routers = {f"{path}.weight" for path, module in ours.stages[0].named_modules() if isinstance(module, Router)}
    for name, dtype in kept.items():
        assert dtype == (torch.float32 if is_adapter(name) or name in routers else torch.bfloat16), name
    monkeypatch.setattr(build, "freeze_base", freeze_masters)
    masters = trainer(meshes, lora=EVERYTHING, precision=BF16)
    assert {parameter.dtype for parameter in masters.stages[0].parameters()} == {torch.float32}
    load(masters.stages[0], weights_of(ours.stages[0]))
    assert_same_step(ours, masters)


def with_base(meshes, form: str, precision: Precision = Precision(torch.float64), released: bool = False, **options):
    """A trainer whose base is kept in fewer bits, read from random weights, and what these bytes stand for."""
    ours = trainer(meshes, lively=False, lora=EVERYTHING, base=FORMS[form], precision=precision, **options)
    fill_held(ours.stages, RandomBase(CONFIG, released=released), CPU)
    return ours, held_numbers(ours.stages[0], precision.activations)


@keeps_bytes
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", [Precision(torch.float64), BF16], ids=["float64", "bf16"])
def test_a_quantised_base_computes_what_its_numbers_do(meshes, form, precision):
    """In the dtype of the layers the numbers are the same, and so are the products: of all kinds of layers at once."""
    ours, numbers = with_base(meshes, form, precision)
    plain = trainer(meshes, lively=False, lora=EVERYTHING, precision=precision)
    quantised = {row.name for row in parameters(CONFIG) if row.layer is not None and row.gemms and (
        row.stacked or is_quantized(row.name))}
    assert numbers.keys() == quantised and len(numbers) > 20
    load_numbers(plain, ours, numbers)
    assert_same_step(ours, plain)


def load_numbers(plain: Trainer, ours: Trainer, numbers: dict[str, torch.Tensor]) -> None:
    rest = {name: tensor for name, tensor in weights_of(ours.stages[0]).items()
            if name in tensors(plain.stages[0]) and name not in numbers}
    load(plain.stages[0], rest | numbers)


@keeps_bytes
def test_released_fp8_is_multiplied_as_it_is(meshes):
    """Under the FP8 recipe: its numbers, quantised again, are the same codes and scales, and so is all else."""
    config = replace(CONFIG, moe_intermediate_size=128, hidden_size=136)
    build = BuildOptions(precision=Precision(torch.float64, fp8=True), loss=LOSS, lora=EVERYTHING)
    spec = TrainingSpec(config, (whole_stage(config),), "1F1B", SEQ_LENGTH, 2, build, NO_CLIPPING)
    ours, plain = Trainer(replace(spec, build=replace(build, base=FORMS["fp8"])), meshes), Trainer(spec, meshes)
    fill_held(ours.stages, RandomBase(config, released=True), CPU)
    load_numbers(plain, ours, held_numbers(ours.stages[0]))
    assert_same_step(ours, plain)


@keeps_bytes
@pytest.mark.parametrize("form", FORMS)
def test_numbers_are_those_of_each_matrix_by_itself(meshes, form):
    """Of experts too: gate, up and down of each; what is stored in FP8 is kept as it is."""
    source = RandomBase(CONFIG, released=form == "fp8")
    numbers = with_base(meshes, form, released=source.released)[1]
    for row in parameters(CONFIG):
        for expert in range(row.shape[0] if row.stacked else 1) if row.name in numbers else ():
            for tensor in row.hf_tensors(expert):
                rows, (*_, start, _) = tensor.shape[0], tensor.offset
                found = numbers[row.name][expert] if row.stacked else numbers[row.name]
                whole = source.read(tensor.name, 0, rows)
                if not source.released:
                    made = nf4.quantize(whole)
                    whole = nf4.dequantize(made.with_double_scales() if form == "nf4" else made)
                assert torch.equal(found[start:start + rows], whole.double()), tensor.name


@keeps_bytes
def test_bytes_that_are_held(meshes):
    """Half a byte a number, of 16 in a row padded to 64, a byte for the scale and 8 for the row."""
    ours, numbers = with_base(meshes, "nf4")
    held = {name: each for name, each in ours.stages[0].named_parameters() if not each.is_floating_point()}
    assert held.keys() == {*numbers, *(name + SCALES for name in numbers)}
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert held[name].shape == (8, 24, 32) and held[name + SCALES].shape == (8, 24, 9)
    assert not any(parameter.requires_grad for parameter in held.values())


@keeps_bytes
def test_numbers_that_are_not_finite_are_refused(meshes):
    ours = trainer(meshes, lively=False, lora=EVERYTHING, base=FORMS["nf4"])
    with pytest.raises(ValueError, match=r"^model.layers.0.self_attn.\w+.weight: it has values that are not finite"):
        fill_held(ours.stages, RandomBase(CONFIG, std=float("inf")), CPU)


@pytest.mark.parametrize("version, fits", [("2.11.0", False), ("2.12.1+cpu", False), ("2.13.0+cpu", True)])
def test_a_torch_that_keeps_no_bytes_is_refused(version, fits):
    if fits:
        check_torch(version)
    else:
        with pytest.raises(ValueError, match=f"--quantization-bit needs torch 2.13 or later.*this is {version[:4]}"):
            check_torch(version)
