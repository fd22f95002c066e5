"""--adapter-for vllm: what vLLM does not apply is left out, or merged into a base of its own, and nothing else."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_adapters import AdapterBench
from small_checkpoints import all_tensors

from megatron_deepseek.checkpoint.adapter.for_vllm import write_for_vllm
from megatron_deepseek.cli.merge_lora import main
from megatron_deepseek.runtime.adapter_export import export_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def bench(tmp_path_factory, meshes) -> AdapterBench:
    return AdapterBench(tmp_path_factory.mktemp("vllm"), meshes)


def merge(*words) -> int:
    return main([str(word) for word in words])


class Told:
    def __init__(self):
        self.lines = []

    def message(self, line: str) -> None:
        self.lines.append(line)


def test_a_run_leaves_out_what_is_not_applied_and_says_so(bench, tmp_path):
    run = SimpleNamespace(save=bench.root / "save", save_adapter=tmp_path / "out", adapter_for="vllm")
    told = Told()
    export_adapter(run, 1, told)
    before, after = load_file(bench.saved / "adapter" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() - after.keys() == {f"base_model.model.model.layers.{layer}.self_attn.kv_b_proj.lora_{factor}."
                                            "weight" for layer in (0, 1) for factor in "AB"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {WEIGHTS, CONFIG}
    names = [json.loads((where / CONFIG).read_text())["target_modules"] for where in (bench.saved / "adapter",
                                                                                      tmp_path / "out")]
    assert sorted(names[0]) == sorted([*names[1], "kv_b_proj"])
    assert "WARNING: vLLM applies no adapter of 24 layers (3 of kv_b_proj, 21 others of MTP modules)" in told.lines[0]
    export_adapter(SimpleNamespace(**{**vars(run), "adapter_for": None}), 1, told)
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == before.keys()


def test_a_base_with_the_rest_merged_loses_nothing(bench, tmp_path):
    """All merged at once, and in two parts; the new base differs from the old one in what was to be merged alone."""
    base, whole = ("--base", bench.released), bench.saved / "adapter"
    assert merge(*base, "--adapter", whole, "--save", tmp_path / "all") == 0
    assert merge(*base, "--adapter", whole, "--save", tmp_path / "base", "--adapter-for", "vllm", "--save-adapter",
                 tmp_path / "rest") == 0
    assert merge("--base", tmp_path / "base", "--adapter", tmp_path / "rest", "--save", tmp_path / "again") == 0
    old, new, once, twice = map(all_tensors, (bench.released, *(tmp_path / name for name in ("base", "all", "again"))))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert {name for name in changed if ".layers.2." not in name} == {
        f"model.layers.{layer}.self_attn.kv_b_proj.weight" for layer in (0, 1)} and len(changed) == 24
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert json.loads((tmp_path / "rest" / CONFIG).read_text())["base_model_name_or_path"] == str(tmp_path / "base")


def test_an_expression_of_targets(bench, tmp_path):
    """The part that names kv_b_proj cannot be cut out; PEFT excludes it then."""
    shutil.copytree(bench.saved / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ".*self_attn.*"}))
    write_for_vllm(tmp_path / "adapter", tmp_path / "out")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["exclude_modules"] == "kv_b_proj"


def only(bench, root, *ends: str):
    """Return the adapter with layers of these names alone."""
    shutil.copytree(bench.saved / "adapter", root)
    (root / "adapter_model_mtp.safetensors").unlink()
    tensors = load_file(root / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if any(f".{end}.lora" in name for end in ends)},
              root / WEIGHTS)
    return root


@pytest.mark.parametrize("ends, more, message", [
    (("kv_b_proj",), (), "adapts kv_b_proj alone"), (("o_proj",), (), "has nothing that vLLM does not apply"),
    (("o_proj", "kv_b_proj"), ("0.5",), "takes one adapter, without a weight")])
def test_mistakes(bench, tmp_path, capsys, ends, more, message):
    adapter = only(bench, tmp_path / "adapter", *ends)
    assert merge("--base", bench.released, "--adapter", *more, adapter, "--save", tmp_path / "out", "--adapter-for",
                 "vllm", "--save-adapter", tmp_path / "rest") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_options_that_need_each_other(bench, tmp_path, capsys):
    assert merge("--base", bench.released, "--adapter", bench.saved / "adapter", "--save", tmp_path / "out",
                 "--adapter-for", "vllm") == 2
    assert "--adapter-for and --save-adapter need each other" in capsys.readouterr().err
