"""Adapters exchanged with PEFT and transformers, both ways: `make test-engines` installs PEFT and runs this."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_adapters import CPU, AdapterBench
from small_checkpoints import v3_directory

from megatron_deepseek.checkpoint.job.adapters import load_adapter, load_with_base
from megatron_deepseek.inference.loading import LoadSettings, join_ranks, load_model
from megatron_deepseek.inference.model_files import open_model
from megatron_deepseek.model.architecture.adapters import LoraSettings
from megatron_deepseek.model.step import MicroBatch, Rows, StepContext
from megatron_deepseek.parallel.mesh import Meshes

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
TOKENS_BS = torch.randint(300, (1, 8), generator=torch.Generator().manual_seed(0))
CLOSE = 1e-5  # of the largest logit: float32 in another order


class PeftBench(AdapterBench):
    """A base without MTP, which transformers has not, with weights small enough that logits have digits to compare."""

    def release(self, root: Path) -> Path:
        directory = v3_directory(root / "hf", torch.float32, num_nextn_predict_layers=0)
        for file in directory.glob("*.safetensors"):
            save_file({name: tensor * 0.1 if tensor.ndim > 1 else tensor for name, tensor in load_file(file).items()},
                      file, metadata={"format": "pt"})
        (directory / "tokenizer_config.json").unlink()
        return directory

    def logits(self, trainer) -> torch.Tensor:
        labels = TOKENS_BS.unsqueeze(1)
        with torch.no_grad():
            state, *_ = trainer.stages[0].states(TOKENS_BS, MicroBatch(Rows(labels, torch.zeros_like(labels))),
                                                 StepContext(1))
            return trainer.stages[0].logits(state)[0]

    def theirs(self):
        return transformers.AutoModelForCausalLM.from_pretrained(self.released, dtype=torch.float32)


@pytest.fixture(scope="module")
def meshes() -> Meshes:
    return join_ranks()


@pytest.fixture(scope="module", params=["attention mlp", "all router", "experts", "rs"])
def bench(request, tmp_path_factory, meshes) -> PeftBench:
    targets = ("all",) if request.param == "rs" else tuple(request.param.split())
    return PeftBench(tmp_path_factory.mktemp("peft"), meshes, LoraSettings(2, 3.0, targets, request.param == "rs"))


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def test_pefts_model_with_our_adapter_is_ours(bench):
    """Beside the base and merged into it; the adapter changes much."""
    ours, model = bench.logits(bench.trainer), bench.theirs()
    with torch.no_grad():
        assert off(model(TOKENS_BS).logits[0], ours) > 0.01
        model = peft.PeftModel.from_pretrained(model, bench.saved / "adapter")
        assert off(model(TOKENS_BS).logits[0], ours) < CLOSE
        assert off(model.merge_and_unload()(TOKENS_BS).logits[0], ours) < CLOSE


def test_the_engine_with_what_peft_saves_is_pefts_model(bench, tmp_path):
    """PEFT's own file, in which the adapters of all experts are one, beside the base of a model that answers."""
    model = peft.PeftModel.from_pretrained(bench.theirs(), bench.saved / "adapter")
    model.save_pretrained(tmp_path / "adapter")
    labels = TOKENS_BS.unsqueeze(1)
    for adapter in (tmp_path / "adapter", bench.saved / "adapter"):
        loaded = load_model(open_model(bench.released, tokenizer=None), bench.meshes,
                            LoadSettings(dtype=torch.float32, max_length=8, adapter=adapter))
        with torch.no_grad():
            state, *_ = loaded.stage.states(TOKENS_BS, MicroBatch(Rows(labels, torch.zeros_like(labels))),
                                            StepContext(1))
            assert off(loaded.stage.logits(state)[0], model(TOKENS_BS).logits[0]) < CLOSE


def test_what_peft_saves_loads_here(bench, tmp_path):
    """It fuses the adapters of all experts on loading, and saves them so."""
    peft.PeftModel.from_pretrained(bench.theirs(), bench.saved / "adapter").save_pretrained(tmp_path / "adapter")
    other = bench.new()
    load_with_base(bench.released, other.stages, None, CPU)
    load_adapter(tmp_path / "adapter", other.stages, bench.config, bench.lora)
    assert torch.equal(bench.logits(other), bench.logits(bench.trainer))


def test_an_adapter_that_peft_has_trained_loads_here(meshes, tmp_path):
    lora = LoraSettings(2, 3.0, ("q_b_proj", "o_proj"))
    bench = PeftBench(tmp_path, meshes, lora)
    names = list(lora.lora_target)
    model = peft.get_peft_model(bench.theirs(), peft.LoraConfig(r=2, lora_alpha=3, target_modules=names,
                                                                task_type="CAUSAL_LM"))
    optimizer = torch.optim.Adam((each for each in model.parameters() if each.requires_grad), lr=0.1)
    for _ in range(2):
        model(TOKENS_BS, labels=TOKENS_BS).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    load_adapter(tmp_path / "adapter", bench.trainer.stages, bench.config, lora)
    with torch.no_grad():
        assert off(model(TOKENS_BS).logits[0], bench.logits(bench.trainer)) < CLOSE
