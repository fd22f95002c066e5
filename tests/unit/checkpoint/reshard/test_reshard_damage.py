"""reshard_checkpoint.py with damaged files, full disks, stops, wrong arguments: one line, status 2, no output."""

import json
import os
import shutil

import pytest
import torch
from interruptions import largest_file, stop_after
from native_checkpoints import random_state, read_native, tool, write_native
from small_checkpoints import assert_identical

from megatron_deepseek.checkpoint.dcp import item_file
from megatron_deepseek.checkpoint.reshard import reshard

FOUR_RANKS = ("--tensor-model-parallel-size", "2", "--data-parallel-size", "2")
HEAD = "model.lm_head.weight"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return random_state()


@pytest.fixture(scope="module")
def four_files(tmp_path_factory, state):
    """Resharded, so that damage hits some tensors and not others."""
    directory = tmp_path_factory.mktemp("four")
    assert tool("reshard", "--load", write_native(directory / "a", state), "--save", directory / "b", *FOUR_RANKS) == 0
    return directory / "b"


@pytest.fixture
def copy(tmp_path, four_files):
    return shutil.copytree(four_files, tmp_path / "copy")


def flip(path, offset: int, bit: int = 0x10) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ bit]))


def write_state(path, **changes) -> None:
    path.write_text(json.dumps({"iteration": 100, "consumed_samples": 1, "optimizer_steps": 1} | changes))


def error_of(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("reshard_checkpoint.py: error: ")
    return lines[0]


# What is done to a file, and what verify says of it.
DAMAGE = {"flipped": (lambda file: flip(file, file.stat().st_size // 2), "has changed"),
          "truncated": (lambda file: os.truncate(file, file.stat().st_size - 1), "is truncated"),
          "missing": (lambda file: file.unlink(), "is missing"),
          "longer": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "is longer")}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("workers", [1, 3])
def test_verify_names_the_file_and_its_tensors(copy, capsys, kind, workers):
    change, said = DAMAGE[kind]
    change(copy / "iter_0000100" / "rank-00001.distcp")
    assert tool("verify", copy, "--workers", workers) == 2
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    assert line.startswith("rank-00001.distcp") and said in line and "it holds model.model.embed_tokens.weight" in line
    assert "1 file" in err.splitlines()[-1]


@pytest.mark.parametrize("name", ["config.json", "state.json", ".metadata"])
def test_verify_covers_the_small_files(copy, capsys, name):
    flip(copy / "iter_0000100" / name, 30)
    assert tool("verify", copy) == 2
    assert capsys.readouterr().out.startswith(name)


def test_verify_without_checksums_says_so(copy, capsys):
    (copy / "iter_0000100" / "checksums.json").unlink()
    assert tool("verify", copy) == 2
    assert "checksums.json" in error_of(capsys)


@pytest.mark.parametrize("file, change, named", [
    ("rank-00001.distcp", lambda path: os.truncate(path, path.stat().st_size // 2), "truncated"),
    ("rank-00001.distcp", lambda path: path.unlink(), "missing"),
    ("rank-00001.distcp", lambda path: flip(path, path.stat().st_size // 2), "has changed"),
    (".metadata", lambda path: path.write_bytes(b"nothing"), "is truncated: 7 of"),
    ("config.json", lambda path: path.unlink(), "missing"),
    ("state.json", lambda path: path.write_text("{"), "state.json is malformed JSON"),
    ("state.json", lambda path: write_state(path, optimizer_steps=None), '"optimizer_steps" is null, not an integer'),
    ("state.json", lambda path: path.write_text('{"iteration": 1, "consumed_samples": 0}'), 'no "optimizer_steps"'),
    ("state.json", lambda path: write_state(path, iteration=1.5), '"iteration" is 1.5, not an integer'),
    ("state.json", lambda path: write_state(path, consumed_samples=-4), '"consumed_samples" is -4, less than 0'),
    ("state.json", lambda path: write_state(path, rng=5), 'has "rng", which is not one of iteration, consumed'),
    ("state.json", lambda path: write_state(path, optimizer_steps=101), "more than the 100 of iteration"),
    ("state.json", lambda path: write_state(path, batches=[[100, 0]]), "not pairs of updates and sequences"),
    ("state.json", lambda path: write_state(path, batches=[[99, 2], [2, 1]]), "come to 101 updates and 200 samples"),
    ("state.json", lambda path: path.write_text("[" * 100_000), "nested more than 128 deep"),
    ("layout.json", lambda path: path.write_text('{"seq_length": "long"}'), '"seq_length" is "long", not an integer'),
])
def test_damaged_inputs_are_refused(tmp_path, copy, capsys, file, change, named):
    change(copy / "iter_0000100" / file)
    for command in (["merge"], ["reshard"], ["average", copy]):
        load = [] if command[0] == "average" else ["--load", copy]
        assert tool(*command, *load, "--save", tmp_path / "out") == 2
        error = error_of(capsys)
        assert file in error and named in error
        assert not (tmp_path / "out" / "iter_0000100").exists()


def test_damage_that_no_checksum_tells(tmp_path, copy, capsys):
    """Of a checkpoint from before there were any, or by request: what cannot be read is still one line."""
    file = copy / "iter_0000100" / "rank-00001.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert tool("merge", "--load", copy, "--save", tmp_path / "out", "--no-verify") == 2
    error = error_of(capsys)
    assert "rank-00001.distcp: model.model.embed_tokens.weight cannot be read" in error
    (copy / "iter_0000100" / "checksums.json").unlink()
    assert tool("merge", "--load", copy, "--save", tmp_path / "out") == 2
    assert error_of(capsys) == error


def test_a_tensor_that_the_architecture_lacks(tmp_path, state, capsys):
    name = "model.model.layers.1.mlp.gate.weight"
    write_native(tmp_path / "more", state | {"model.extra.weight": torch.ones(3)})
    write_native(tmp_path / "less", {key: value for key, value in state.items() if key != name})
    write_native(tmp_path / "other", state | {name: torch.ones(8, 5)})
    for which, named in (("more", "model.extra.weight"), ("less", name), ("other", "(8, 5)")):
        assert tool("reshard", "--load", tmp_path / which, "--save", tmp_path / "out", *FOUR_RANKS) == 2
        assert named in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_a_full_disk(tmp_path, four_files, state, capsys):
    """The error names tensor and file; the same command goes on once there is space."""
    command = ("merge", "--load", four_files, "--save", tmp_path / "out")
    with largest_file(500_000):
        assert tool(*command) == 2
    error = error_of(capsys)
    assert "cannot be written" in error and "part-00000.distcp" in error and "model." in error
    assert not (tmp_path / "out" / "iter_0000100").exists() and not list((tmp_path / "out").glob("latest*"))
    assert tool(*command) == 0
    assert_identical(read_native(tmp_path / "out", state), state)


def test_finished_files_are_kept_and_verified(tmp_path, four_files, state, monkeypatch, capsys):
    """After a stop, intact files are not written again; a damaged one is, and the result is the same."""
    command = ("reshard", "--load", four_files, "--save", tmp_path / "out", "--data-parallel-size", "5")
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(RuntimeError):
            tool(*command)
    finished = sorted((tmp_path / "out" / "iter_0000100.incomplete" / "output").glob("*.distcp"))
    assert len(finished) == 3
    flip(finished[1], 5000)
    written, write = [], item_file.write_items
    monkeypatch.setattr(reshard, "write_items", lambda path, name, *rest: written.append(name) or
                        write(path, name, *rest))
    assert tool(*command) == 0
    assert "continuing the resharding" in capsys.readouterr().err
    assert finished[1].name in written and finished[0].name not in written and finished[2].name not in written
    assert_identical(read_native(tmp_path / "out", state), state)
    assert tool("verify", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "iter_0000100", "latest_checkpointed_iteration.txt"]


def test_a_changed_source_starts_anew(tmp_path, four_files, copy, monkeypatch, state):
    """Files of before the change are not mixed with files of after it."""
    command = ("reshard", "--load", copy, "--save", tmp_path / "out", "--data-parallel-size", "5")
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(RuntimeError):
            tool(*command)
    shutil.rmtree(copy)
    changed = {name: tensor + 1 for name, tensor in state.items()}
    write_native(copy, changed)
    assert tool(*command) == 0
    assert_identical(read_native(tmp_path / "out", changed), changed)


def test_an_existing_output_is_left_alone(tmp_path, four_files, capsys):
    command = ("merge", "--load", four_files, "--save", four_files)
    before = sorted(four_files.rglob("*"))
    assert tool(*command) == 2
    assert "holds a checkpoint already" in error_of(capsys)
    assert sorted(four_files.rglob("*")) == before


def test_no_checkpoint_is_written_into_a_model(tmp_path, copy, capsys):
    """Into its source, a Hugging Face model, an iteration, or beside another iteration that no marker names."""
    (hf := tmp_path / "hf").mkdir()
    (hf / "config.json").write_text("{}")
    (hf / "model.safetensors").write_text("")
    (copy / "latest_checkpointed_iteration.txt").unlink()
    iteration = copy / "iter_0000100"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for save, said in ((hf, "is a Hugging Face model"), (iteration, "lies in a checkpoint"),
                       (iteration / "new", "lies in a checkpoint")):
        for command in (["merge", "--load"], ["average"], ["reshard", "--load"]):
            assert tool(*command, iteration, "--save", save) == 2
            assert said in error_of(capsys)
    assert tool("average", iteration, "--save", copy) == 2  # makes an iteration 0
    assert "holds a checkpoint already" in error_of(capsys)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("arguments, named", [
    (["--tensor-model-parallel-size", "3"], "--tensor-model-parallel-size 3"),
    (["--expert-model-parallel-size", "16", "--data-parallel-size", "16"], "--expert-model-parallel-size 16"),
    (["--expert-model-parallel-size", "4"], "--expert-model-parallel-size 4"),
    (["--world-size", "6", "--tensor-model-parallel-size", "4"], "--world-size 6"),
    (["--pipeline-model-parallel-layout", "Et|L", "--pipeline-model-parallel-size", "2"], "layout"),
    (["--ckpt-step", "7"], "iteration 7"), (["--load", "nowhere"], "nowhere"), (["--workers", "0"], "--workers"),
    (["--dtype", "fp8"], "--dtype"),
])
def test_bad_arguments_are_refused(tmp_path, four_files, capsys, arguments, named):
    """A layout that training would refuse, in training's words."""
    assert tool("reshard", "--load", four_files, "--save", tmp_path / "out", *arguments) == 2
    assert named in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_directories_of_other_kinds(tmp_path, four_files, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({}))
    (tmp_path / "hf" / "model.safetensors").write_text("")
    shutil.copytree(four_files / "iter_0000100", tmp_path / "iter_0000100.saving")
    for name, said in (("empty", "no finished checkpoint"), ("hf", "convert_checkpoint.py"), ("nowhere", "nowhere"),
                       ("iter_0000100.saving", "never finished")):
        for command in ("inspect", "verify"):
            assert tool(command, tmp_path / name) == 2
            assert said in error_of(capsys)
