"""An adapter of all layers beside a model that answers, routed experts and routers too, against the trained one."""

import json

import pytest
import torch
from safetensors.torch import save_file
from small_adapters import AdapterBench
from small_checkpoints import V3_WIDE

from megatron_deepseek.inference.engine import Engine
from megatron_deepseek.inference.loading import LoadSettings, load_model
from megatron_deepseek.inference.model_files import open_model
from megatron_deepseek.inference.sampling_parameters import SamplingParameters
from megatron_deepseek.inference.settings import EngineSettings
from megatron_deepseek.model.step import MicroBatch, Rows, StepContext

TOKENS = [3, 14, 15, 92, 65, 35, 89, 79]
EXPERTS = "model.layers.1.mlp.experts"
INNER, HIDDEN = V3_WIDE.moe_intermediate_size, V3_WIDE.hidden_size


@pytest.fixture(scope="module")
def bench(tmp_path_factory, meshes) -> AdapterBench:
    return AdapterBench(tmp_path_factory.mktemp("adapted"), meshes)


def load(bench, meshes, adapter=None, form="plain"):
    files = open_model(bench.released, mtp=True, tokenizer=None)
    return load_model(files, meshes, LoadSettings(dtype=torch.float32, form=form, max_length=8, adapter=adapter))


@torch.no_grad()
def logits_of(stage) -> list[torch.Tensor]:
    """Of the main model and the MTP module, by the training model's own forward, [S, V] each."""
    tokens = torch.tensor([TOKENS])
    labels = torch.stack([tokens.roll(-1, 1), tokens.roll(-2, 1)], 1)
    states = stage.states(tokens, MicroBatch(Rows(labels, torch.zeros_like(labels))), StepContext(1))
    return [stage.logits(state)[0] for state in states]


def assert_close(found, expected):
    """To 1e-5 of the largest: float32 in another order."""
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


def test_the_engine_computes_what_was_trained(bench, meshes):
    """Every layer of the main model and the MTP module, the logits and what the engine says of the prompt."""
    model = load(bench, meshes, bench.saved / "adapter")
    trained = logits_of(bench.trainer.stages[0])
    assert_close(logits_of(model.stage), trained)
    plain = logits_of(load(bench, meshes).stage)
    assert all((one - other).abs().max() > 1e-2 * one.abs().max() for one, other in zip(plain, trained))
    (output,) = Engine(model, EngineSettings(max_length=8)).generate(
        [TOKENS[:-1]], SamplingParameters(max_tokens=1, prompt_logprobs=0, ignore_eos=True))[0]
    expected = trained[0].log_softmax(-1)[torch.arange(6), TOKENS[1:7]]
    assert output.prompt_log_probabilities[1:] == pytest.approx(expected.tolist(), abs=1e-4)


def factors(layers: dict[str, tuple[int, int, int]]) -> dict[str, torch.Tensor]:
    """A and B of layers with (outputs, inputs, rank)."""
    generator, found = torch.Generator().manual_seed(3), {}
    for name, (outputs, inputs, rank) in layers.items():
        found[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        found[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    return found


def write(directory, layers, **config):
    directory.mkdir()
    save_file(factors(layers), directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 6, "r": 3} | config))
    return directory


@pytest.mark.parametrize("form", ["plain", "fp8", "nf4"])
def test_some_experts_of_other_ranks_beside_weights_of_every_form(bench, meshes, tmp_path, form):
    """Expert 0 has rank 3 and scale 2 for up, expert 2 rank 1 and scale 6 for gate; others have none."""
    layers = {f"{EXPERTS}.0.up_proj": (INNER, HIDDEN, 3), f"{EXPERTS}.2.gate_proj": (INNER, HIDDEN, 1),
              f"{EXPERTS}.3.down_proj": (HIDDEN, INNER, 3)}
    adapter = write(tmp_path / "adapter", layers, rank_pattern={"2.gate_proj": 1})
    plain, model = load(bench, meshes, form=form), load(bench, meshes, adapter, form)
    base, found = (each.stage.get_submodule(EXPERTS) for each in (plain, model))
    a, b = ({name.split(".lora_")[0].partition("experts.")[2]: tensor for name, tensor in factors(layers).items()
             if f"lora_{which}" in name} for which in "AB")
    gate_up, down = (getattr(base, name).dense(torch.float32) for name in ("gate_up_proj", "down_proj"))
    gate_up[0, INNER:] += 2 * b["0.up_proj"] @ a["0.up_proj"]
    gate_up[2, :INNER] += 6 * b["2.gate_proj"] @ a["2.gate_proj"]
    down[3] += 2 * b["3.down_proj"] @ a["3.down_proj"]
    torch.testing.assert_close(found.gate_up_proj.dense(torch.float32), gate_up)
    torch.testing.assert_close(found.down_proj.dense(torch.float32), down)
    rows, counts = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(1)), [4, 0, 5, 0]
    delta = found.gate_up_proj.multiply_grouped(rows, counts) - base.gate_up_proj.multiply_grouped(rows, counts)
    expected = torch.zeros(9, 2 * INNER)
    expected[:4, INNER:] = 2 * rows[:4] @ a["0.up_proj"].T @ b["0.up_proj"].T
    expected[4:, :INNER] = 6 * rows[4:] @ a["2.gate_proj"].T @ b["2.gate_proj"].T
    torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-3)
    assert found.gate_up_proj.shape == (4, 2 * INNER, HIDDEN)
    assert found.gate_up_proj.nbytes == base.gate_up_proj.nbytes + 4 * 4 * 3 * (2 * HIDDEN + 2 * INNER)


@pytest.mark.parametrize("name, shape, message", [
    (f"{EXPERTS}.4.up_proj", (INNER, HIDDEN), "adapts model.layers.1.mlp.experts.4, the model has 4 experts"),
    (f"{EXPERTS}.1.up_proj", (INNER, 7), "experts.1.up_proj has 7 inputs there, the model's has 136"),
    (f"{EXPERTS}.1.down_proj", (7, INNER), "experts.1.down_proj has 7 outputs there, the model's has 136"),
    ("model.layers.1.mlp.gate", (5, HIDDEN), "mlp.gate has 5 outputs there, the model's has 4"),
    ("model.layers.0.mlp.experts.0.up_proj", (INNER, HIDDEN), "experts.0.up_proj, which is no linear layer"),
    ("model.norm", (1, HIDDEN), "adapts model.norm, which is no linear layer")])
def test_adapters_that_do_not_fit(bench, meshes, tmp_path, name, shape, message):
    adapter = write(tmp_path / "adapter", {name: (*shape, 3)})
    with pytest.raises(ValueError, match=message) as caught:
        load(bench, meshes, adapter)
    assert "\n" not in str(caught.value)
