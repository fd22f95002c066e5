"""Reading a base as NF4 or FP8: the same numbers from every format of files, one hash for all, and runs that go on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from random_base import RandomBase, held_numbers
from safetensors.torch import load_file, save_file
from small_adapters import CPU, LORA, AdapterBench
from small_checkpoints import V3_WIDE, convert, v3_directory
from small_models import weights_of, whole_stage
from torch_versions import keeps_bytes

from megatron_deepseek.checkpoint.adapter.base import BASE, check_adapters
from megatron_deepseek.checkpoint.convert.names import hf_shapes
from megatron_deepseek.checkpoint.dcp.files import open_dcp
from megatron_deepseek.checkpoint.job import base_weights
from megatron_deepseek.checkpoint.job.adapters import load_with_base
from megatron_deepseek.inference.loading import LoadSettings, load_model
from megatron_deepseek.inference.model_files import open_model
from megatron_deepseek.model.architecture.adapters import adapter_rows
from megatron_deepseek.model.architecture.base_weights import BaseSettings
from megatron_deepseek.model.build import BuildOptions, Precision, build_stages

NF4, FP8 = BaseSettings(4), BaseSettings(8)
PRECISION = Precision(torch.float32)

pytestmark = keeps_bytes


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    """A model in bfloat16, the same in a checkpoint of training, and one whose linear layers are FP8."""
    root = tmp_path_factory.mktemp("bases")
    found = {"bf16": v3_directory(root / "bf16", torch.bfloat16), "native": root / "native", "fp8": root / "fp8"}
    assert convert("hf", "native", found["bf16"], found["native"], "--dtype", "fp32") == 0
    assert convert("hf", "hf", found["bf16"], found["fp8"], "--dtype", "fp8") == 0
    return found | {"native": next(found["native"].glob("iter_*"))}


def read(directory: Path, meshes, held: BaseSettings | None, precision: Precision = PRECISION):
    """A model beside whose adapters the base of `directory` is, and the hash of that."""
    stages = build_stages(V3_WIDE, [whole_stage(V3_WIDE)], meshes, 8, BuildOptions(precision=precision, lora=LORA,
                                                                                 base=held))
    return stages[0], load_with_base(directory, stages, None, CPU)[1]


def test_the_hash_is_that_of_the_stored_numbers_in_whatever_form(directories, meshes):
    """FP8 files hold other numbers than those that they were made from."""
    plain = {name: read(directories[name], meshes, None)[1].hash for name in ("bf16", "fp8")}
    assert plain["bf16"] != plain["fp8"]
    for name, held in (("native", NF4), ("bf16", FP8), ("fp8", NF4), ("fp8", FP8)):
        base = read(directories[name], meshes, held)[1]
        assert (base.hash, base.form) == (plain["bf16" if name == "native" else name], held.form)
    bf16 = Precision(torch.float32, torch.bfloat16)
    assert read(directories["bf16"], meshes, None, bf16)[1].hash == plain["bf16"]


@pytest.mark.parametrize("held, form", [(NF4, LoadSettings(form="nf4", double_quantization=True)),
                                        (BaseSettings(4, False), LoadSettings(form="nf4")),
                                        (FP8, LoadSettings(form="fp8"))], ids=lambda each: getattr(each, "form", None))
@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_training_and_answering_keep_the_same_numbers(directories, meshes, held, form, name):
    trained = held_numbers(read(directories[name], meshes, held)[0], torch.float32)
    answers = load_model(open_model(directories[name], mtp=True, tokenizer=None), meshes, form).stage
    for weight, numbers in trained.items():
        path, _, parameter = weight.rpartition(".")
        assert torch.equal(getattr(answers.get_submodule(path), parameter).dense(torch.float32), numbers), weight


@pytest.fixture(scope="module")
def bench(tmp_path_factory, meshes) -> AdapterBench:
    return AdapterBench(tmp_path_factory.mktemp("adapters"), meshes, held=NF4)


def test_a_run_goes_on_beside_the_same_bytes(bench):
    """Its checkpoint holds adapters alone, and PEFT's files of them."""
    saved = {name.split(".", 1)[1] for name in open_dcp(bench.saved).shapes if name.startswith("model.")}
    assert {name for name in saved if not name.endswith("correction_bias")} == {
        row.name for row in adapter_rows(bench.config, LORA)}
    assert (bench.saved / "adapter" / "adapter_model.safetensors").is_file()
    other = bench.new()
    _, base = load_with_base(bench.saved, other.stages, other.optimizer, CPU)
    assert base == bench.base and base.form == "nf4, scales quantised"
    ours, theirs = weights_of(other.stages[0]), weights_of(bench.trainer.stages[0])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("held, message", [(None, "plain"), (BaseSettings(4, False), "nf4"), (FP8, "fp8")])
def test_another_form_is_refused(bench, held, message):
    expected = f"that are nf4, scales quantised, in this run they are {message}: see --quantization-bit"
    with pytest.raises(ValueError, match=expected):
        check_adapters(bench.saved, LORA, held.form if held else "plain")
    check_adapters(bench.saved, LORA, NF4.form)


def test_another_base_is_noticed(bench, tmp_path):
    """One number of an expert is another one, which NF4 need not show."""
    saved, moved = tmp_path / "save", tmp_path / "hf"
    shutil.copytree(bench.saved, saved)
    shutil.copytree(bench.released, moved)
    name = "model.layers.1.mlp.experts.1.down_proj.weight"
    file = moved / json.loads((moved / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][3, 5] += 1e-6
    save_file(tensors, file, metadata={"format": "pt"})
    (saved / BASE).write_text(json.dumps(json.loads((saved / BASE).read_text()) | {"directory": str(moved)}))
    with pytest.raises(ValueError, match="of another base"):
        load_with_base(saved, bench.new().stages, None, CPU)


@pytest.mark.parametrize("held", [NF4, FP8], ids=lambda held: held.form)
def test_rows_are_read_a_few_at_a_time(meshes, held, monkeypatch):
    """Each once, from a multiple of 128 on, and 128 rows at once where more are not allowed."""
    asked, source = [], RandomBase(V3_WIDE)

    class Counted(RandomBase):
        def read(self, name, start, stop):
            asked.append((name, start, stop))
            return source.read(name, start, stop)

    stages = build_stages(V3_WIDE, [whole_stage(V3_WIDE)], meshes, 8, BuildOptions(lora=LORA, base=held))
    base_weights.fill_held(stages, source, CPU)
    at_once = held_numbers(stages[0])
    monkeypatch.setattr(base_weights, "NUMBERS_AT_ONCE", 128 * 136 + 1)
    base_weights.fill_held(stages, Counted(V3_WIDE), CPU)
    assert all(torch.equal(numbers, at_once[name]) for name, numbers in held_numbers(stages[0]).items())
    assert len({*asked}) == len(asked) and all(start % 128 == 0 for _, start, _ in asked)
    assert max((stop - start) * hf_shapes(V3_WIDE)[name][1] for name, start, stop in asked) == 128 * 264
    assert sum(stop - start for _, start, stop in asked) == sum(
        tensor.shape[0] for held in stages[0].held for expert in range(held.row.shape[0] if held.row.stacked else 1)
        for tensor in held.row.hf_tensors(expert))
