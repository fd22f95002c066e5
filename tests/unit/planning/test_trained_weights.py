"""What layers keep where not all weights are trained, calculated, against what saved-tensor hooks see: equal."""

from dataclasses import replace
from functools import partial

import pytest
import test_activations
from subsets import all_but
from test_activations import GROUPED, MODELS, calculated, counted, settings_of

from megatron_deepseek.model.architecture.adapters import LoraSettings

SIX = {**MODELS, **GROUPED}
SIX = {name: SIX[name] for name in ("v2", "mtp", "no shared expert", "no query latent", "dense",
                                    "deepseek, as many heads of keys")}
FROZEN = {
    "attention": ["*.self_attn.*"], "MLP and experts": ["*.mlp.*"], "norms": ["*norm*"], "products": ["*_proj*"],
    "routed experts": ["*.mlp.experts.*"], "shared experts": ["*shared_experts*"], "routers": ["*.mlp.gate.weight"],
    "head": ["lm_head.weight"], "second products": ["*q_b_proj*", "*kv_b_proj*", "*down_proj*"],
    "first products": ["*q_a_proj*", "*kv_a_proj*", "*gate_proj*", "*up_proj*"],
    "embedding and layer 0": ["model.embed_tokens.weight", "model.layers.0.*"],
    "up to the norm of the MLP": ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight",
                                  "model.layers.0.self_attn.*"],
    "up to the MLP of layer 1": ["model.embed_tokens.weight", "model.layers.0.*", "model.layers.1.self_attn.*",
                                 "model.layers.1.*norm*"]}
TARGETS = [("attention", "mlp"), ("all",), ("all", "router", "mtp"), ("attention",), ("mlp",), ("q_proj", "q_b_proj")]


def assert_equal(settings, meshes, monkeypatch, **options):
    monkeypatch.setattr(test_activations, "whole_model", partial(test_activations.whole_model, **options))
    saw, said = counted(settings, meshes, monkeypatch), calculated(settings)
    assert said.replayed.kept == saw.device


@pytest.mark.parametrize("precision", ["--bf16", "--bf16 --fp8-format e4m3"], ids=["bf16", "fp8"])
@pytest.mark.parametrize("model", SIX)
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_weights(frozen, model, precision, meshes, monkeypatch):
    assert_frozen(FROZEN[frozen], settings_of(SIX[model], 2, precision), meshes, monkeypatch)


@pytest.mark.parametrize("precision", ["--bf16", "--bf16 --fp8-format e4m3"], ids=["bf16", "fp8"])
@pytest.mark.parametrize("model", SIX)
def test_one_weight_is_trained(model, precision, meshes, monkeypatch):
    patterns = all_but(SIX[model], "model.layers.1.self_attn.o_proj.weight")
    assert_frozen(patterns, settings_of(SIX[model], 2, precision), meshes, monkeypatch)


def assert_frozen(patterns, settings, meshes, monkeypatch):
    settings = replace(settings, run=replace(settings.run, freeze_parameters=tuple(patterns)))
    assert_equal(settings, meshes, monkeypatch, frozen=tuple(patterns))


@pytest.mark.parametrize("model", SIX)
@pytest.mark.parametrize("target", TARGETS, ids="+".join)
def test_adapters(target, model, meshes, monkeypatch):
    lora = LoraSettings(4, 8.0, target)
    assert_equal(replace(settings_of(SIX[model], 2, "--bf16"), lora=lora), meshes, monkeypatch, lora=lora)


@pytest.mark.parametrize("model", ["v2", "mtp", "no query latent"])
def test_adapters_of_experts_alone(model, meshes, monkeypatch):
    """What routers compute then has no gradient."""
    lora = LoraSettings(4, 8.0, ("experts",))
    assert_equal(replace(settings_of(SIX[model], 2, "--bf16"), lora=lora), meshes, monkeypatch, lora=lora)
