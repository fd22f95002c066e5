"""Directories of Megatron-LM's `--ckpt-format torch`: the ranks' parts joined, and no code in them run."""

import pickle
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import legacy_megatron
import pytest
import torch
from legacy_megatron import GROUPED, SEQUENTIAL, Job, write_legacy
from pickle_damage import Bomb, mutations
from small_checkpoints import V3_WIDE, all_tensors, assert_identical, convert, random_weights, write_hf
from small_models import LLAMA_SMALL, V3_SMALL

from megatron_deepseek.checkpoint.legacy.opening import open_legacy

V3 = replace(V3_WIDE, num_hidden_layers=5)
QWEN2 = replace(LLAMA_SMALL, qkv_bias=True, tie_word_embeddings=True)
# As many experts for each of a token's groups as megatron-core rates a group by.
LIVE = replace(V3_SMALL, num_hidden_layers=4, num_experts_per_tok=4, num_nextn_predict_layers=1,
               max_position_embeddings=64)
PIPELINE = ((0, 1), (2,), (3,), (4, None))  # uneven, as layout strings make them
WHOLE = ((0, 1, 2, 3, 4, None),)
JOBS = {
    "one rank": Job(WHOLE),
    "everything": Job(PIPELINE, tp=2, pp=2, ep=2),
    "sequential experts": Job(PIPELINE, tp=2, pp=4, ep=4, experts=SEQUENTIAL),
    "experts of one rank": Job(WHOLE, tp=2, ep=4, etp=1),
    "the older grouped GEMM": Job(((0, 1, 2), (3, 4, None)), tp=2, pp=2, ep=2, experts=GROUPED),
    "a stage of MTP alone": Job(((0, 1, 2), (3, 4), (None,)), pp=3),
}
FILE = "model_optim_rng.pt"


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_parts_of_ranks_are_joined(tmp_path, capsys, job):
    """Tensors of layers, experts, MTP and a padded vocabulary, from every way that a job divides them."""
    weights = random_weights(V3, torch.bfloat16)
    hf = write_hf(tmp_path / "hf", weights, V3.to_hf_dict())
    write_legacy(tmp_path / "legacy", V3, weights, job, padded=84)
    assert convert("megatron", "hf", tmp_path / "legacy", tmp_path / "out", "--assets", str(hf)) == 0
    assert "state of the optimizer" in capsys.readouterr().out
    assert_identical(all_tensors(tmp_path / "out"), weights)


def test_grouped_query_attention_and_a_tied_head(tmp_path, capsys):
    """Qwen2 over two stages: the last one holds the embedding once more, as its head."""
    weights = random_weights(QWEN2, torch.float32)
    hf = write_hf(tmp_path / "hf", weights, QWEN2.to_hf_dict())
    legacy = write_legacy(tmp_path / "legacy", QWEN2, weights, Job(((0,), (1,)), tp=2, pp=2))
    assert convert("megatron", "native", legacy, tmp_path / "native", "--assets", str(hf)) == 0
    assert "checked 1 copies against their originals: output_layer.weight" in capsys.readouterr().out
    assert convert("native", "hf", tmp_path / "native", tmp_path / "out") == 0
    assert_identical(all_tensors(tmp_path / "out"), weights)


def test_without_mtp_and_in_another_type(tmp_path):
    """The rows of the older grouped GEMM's experts are cast as others are; modules are left out by request."""
    weights = random_weights(V3, torch.float32)
    hf = write_hf(tmp_path / "hf", weights, V3.to_hf_dict())
    legacy = write_legacy(tmp_path / "legacy", V3, weights, Job(PIPELINE, pp=4, ep=2, experts=GROUPED))
    assert convert("megatron", "hf", legacy, tmp_path / "out", "--assets", str(hf), "--no-mtp", "--dtype", "bf16") == 0
    found = all_tensors(tmp_path / "out")
    expected = {name: tensor if name.endswith("bias") else tensor.bfloat16() for name, tensor in weights.items()
                if not name.startswith("model.layers.5.")}
    assert_identical(found, expected)


def test_an_embedding_that_differs_between_stages_is_an_error(tmp_path, capsys):
    weights = random_weights(V3, torch.float32)
    hf = write_hf(tmp_path / "hf", weights, V3.to_hf_dict())
    legacy = write_legacy(tmp_path / "legacy", V3, weights, Job(PIPELINE, pp=4))
    path = legacy / "iter_0000100" / "mp_rank_00_003" / FILE
    content = torch.load(path, weights_only=False)
    content["model"]["embedding.word_embeddings.weight"][17, 3] += 1
    torch.save(content, path)
    assert convert("megatron", "hf", legacy, tmp_path / "out", "--assets", str(hf)) == 2
    assert "word_embeddings.weight in stage 3 differs from model.embed_tokens.weight" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("config, sizes", [
    (LIVE, (2, 2, 2, 2, 2)),
    (replace(QWEN2, max_position_embeddings=64), (2, 2, 1, 1, 2))], ids=["v3", "qwen2"])
def test_what_megatrons_own_modules_hold(tmp_path, config, sizes):
    """megatron-core's GPTModel as each rank of a job has it, against what it saves whole in torch_dist.

    `sizes`: ranks of tensors and of the pipeline, virtual stages, expert ranks, ranks of an expert.
    """
    pytest.importorskip("megatron.core", minversion="0.16")
    hf = write_hf(tmp_path / "hf", random_weights(config, torch.float32), config.to_hf_dict())
    script = Path(legacy_megatron.__file__).with_name("megatron_ranks.py")
    directories = [tmp_path / "whole", tmp_path / "legacy"]
    done = subprocess.run([sys.executable, script, hf / "config.json", *directories, *map(str, sizes)], text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = []
    for directory in directories:
        assert convert("megatron", "hf", directory, tmp_path / f"hf_{directory.name}", "--assets", str(hf)) == 0
        found.append(all_tensors(tmp_path / f"hf_{directory.name}"))
    assert_identical(*found)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """hf/ and legacy/, of two tensor ranks and two stages."""
    root = tmp_path_factory.mktemp("sound")
    weights = random_weights(V3, torch.bfloat16)
    write_hf(root / "hf", weights, V3.to_hf_dict())
    write_legacy(root / "legacy", V3, weights, Job(((0, 1, 2), (3, 4, None)), tp=2, pp=2))
    return root


def change(path: Path, **values) -> None:
    """Set arguments of the job in a file, or its weights."""
    content = torch.load(path, weights_only=False)
    for name, value in values.items():
        setattr(content["args"], name, value)
    torch.save(content, path)


def without(path: Path, name: str) -> None:
    content = torch.load(path, weights_only=False)
    del content["model"][name]
    torch.save(content, path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def sliced(path: Path) -> None:
    """A weight that is no contiguous tensor."""
    content = torch.load(path, weights_only=False)
    content["model"]["decoder.final_layernorm.weight"] = torch.ones(272)[::2]
    torch.save(content, path)


FIRST, LAST = "mp_rank_00_000", "mp_rank_01_001"
DAMAGE = {
    "a file is missing": (LAST, lambda path: path.unlink(), "mp_rank_01_001/model_optim_rng.pt is missing"),
    "a rank is missing": (LAST, lambda path: shutil.rmtree(path.parent), "no file of tensor rank 1 in pipeline rank 1"),
    "cut off": (LAST, cut, "is no whole file of torch.save"),
    "of before 1.6": (LAST, lambda path: path.write_bytes(pickle.dumps({})), "is no whole file of torch.save"),
    "a tensor is missing": (FIRST, lambda path: without(path, "embedding.word_embeddings.weight"),
                            "the parts of embedding.word_embeddings.weight in its files do not make up the whole"),
    "a view": ("mp_rank_00_001", sliced, "decoder.final_layernorm.weight is no plain contiguous tensor"),
    "other sizes": (FIRST, lambda path: change(path, tensor_model_parallel_size=4),
                    "of different jobs, --tensor-model-parallel-size 4 and 2"),
    "MindSpeed's V": (FIRST, lambda path: change(path, schedules_method="dualpipev"),
                      "--schedules-method dualpipev: stages in the order of a V"),
    "divided otherwise": (FIRST, lambda path: change(path, expert_tensor_parallel_size=4),
                          "of different jobs, --expert-tensor-parallel-size 4 and 2"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_does_not_fit_costs_a_line(sound, tmp_path, capsys, what):
    folder, harm, says = DAMAGE[what]
    shutil.copytree(sound / "legacy", tmp_path / "legacy")
    harm(tmp_path / "legacy" / "iter_0000100" / folder / FILE)
    assert convert("megatron", "hf", tmp_path / "legacy", tmp_path / "out", "--assets", str(sound / "hf")) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1, said


@pytest.mark.parametrize("place", ["args", "optimizer", "model", "decoder.final_layernorm.weight"])
def test_code_in_a_file_is_not_run(sound, tmp_path, capsys, place):
    """Where Megatron-LM has no weights it is read past; torch.load would run it, as the last line shows."""
    shutil.copytree(sound / "legacy", tmp_path / "legacy")
    path = tmp_path / "legacy" / "iter_0000100" / "mp_rank_00_001" / FILE
    content = torch.load(path, weights_only=False)
    (content["model"] if "." in place else content)[place] = Bomb(tmp_path / "exploded")
    torch.save(content, path)
    status = convert("megatron", "hf", tmp_path / "legacy", tmp_path / "out", "--assets", str(sound / "hf"))
    assert status == (0 if place in ("args", "optimizer") else 2), capsys.readouterr().err
    assert not (tmp_path / "exploded").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "exploded").exists()


@pytest.mark.slow
def test_damaged_pickles_are_read_or_refused(tmp_path):
    """Flipped bits, cuts and doubled pieces in data.pkl, whose tensors may then lie anywhere: a ValueError at most."""
    config = replace(V3_WIDE, hidden_size=8, intermediate_size=8, vocab_size=16, q_lora_rank=4, moe_intermediate_size=4)
    weights = random_weights(config, torch.bfloat16)
    iteration = write_legacy(tmp_path, config, weights, Job(((0,), (1, None)), pp=2)) / "iter_0000100"
    path = iteration / "mp_rank_00_001" / FILE
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in contents if name.endswith("/data.pkl"))
    outcomes = set()
    for damaged in mutations(contents[pickled], 400, seed=3):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in (contents | {pickled: damaged}).items():
                archive.writestr(name, content)
        try:
            source = open_legacy(iteration, config, False)
            for name, shape in source.shapes.items():
                source.read(name, 0, shape[0])
            outcomes.add("read")
        except ValueError as error:
            assert len(str(error)) < 2000 and "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
