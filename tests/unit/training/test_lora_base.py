"""A step of adapters beside a base that is kept in fewer bits, against the same step beside plain numbers."""

import torch
from small_models import gradients_of, load, weights_of
from small_trainers import BF16, batch_of, trainer

from megatron_deepseek.model import build
from megatron_deepseek.model.architecture.adapters import LoraSettings, is_adapter
from megatron_deepseek.model.router import Router

EVERYTHING = LoraSettings(3, 2.0, ("all", "router", "mtp"))


def freeze_masters(stages, dtype):
    """What `freeze_base` would be if a frozen weight had a float32 master."""
    for stage in stages:
        for name, parameter in stage.named_parameters():
            parameter.requires_grad_(is_adapter(name))


def assert_same_step(ours, other) -> None:
    """Losses and gradients, bit for bit."""
    results = [each.train_step(batch_of(4), learning_rate=0.0) for each in (ours, other)]
    assert results[0].losses == results[1].losses and results[0].grad_norm == results[1].grad_norm > 0
    expected = gradients_of(other.stages[0])
    for name, gradient in gradients_of(ours.stages[0]).items():
        assert gradient is None and expected[name] is None or torch.equal(gradient, expected[name]), name


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
