"""Damaged, incomplete or unexpected checkpoints: one line that names tensor and file, status 2, and no output."""

import json
import os
import shutil

import pytest
import torch
from interruptions import largest_file, stop_after
from safetensors.torch import load_file, save_file
from small_checkpoints import all_tensors, assert_identical, convert, v3_directory

from megatron_deepseek.checkpoint.convert import output_file

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "model.layers.1.input_layernorm.weight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def rewrite(hf, change) -> None:
    """Let `change` edit the tensors of the file that holds NORM; the index follows unless the name stays unknown."""
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    file = hf / index["weight_map"][NORM]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    others = {name: value for name, value in index["weight_map"].items() if value != file.name}
    index["weight_map"] = others | dict.fromkeys(tensors, file.name)
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(hf, file, size):
    os.truncate(hf / file, size)


def corrupt(hf, offset, data):
    with open(hf / FIRST, "r+b") as file:
        file.seek(offset)
        file.write(data)


def duplicate(hf):
    other = SECOND if NORM in load_file(hf / FIRST) else FIRST
    save_file(load_file(hf / other) | {NORM: torch.ones(136)}, hf / other)


def header_of(hf, content: bytes):
    """FIRST with another header."""
    (hf / FIRST).write_bytes(len(content).to_bytes(8, "little") + content)


def edit_header(hf, **changes):
    """Of FIRST's first tensor."""
    data = (hf / FIRST).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    header[next(name for name in header if name != "__metadata__")] |= changes
    header_of(hf, json.dumps(header).encode())


def edit_config(hf, **changes):
    fields = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(fields | changes))


# What is done to the directory, and what the one line must say.
DAMAGE = {
    "missing tensor": (lambda hf: rewrite(hf, lambda t: t.pop(NORM)), [NORM, "lacks 1 tensor"]),
    "unknown tensor": (lambda hf: rewrite(hf, lambda t: t.update({"model.extra": torch.ones(2)})),
                       ["model.extra", ".safetensors"]),
    "wrong shape": (lambda hf: rewrite(hf, lambda t: t.update({NORM: torch.ones(135)})), [NORM, "(135,)", "(136,)"]),
    "wrong type": (lambda hf: rewrite(hf, lambda t: t.update({NORM: torch.ones(136, dtype=torch.int64)})),
                   [NORM, "int64"]),
    "two files": (duplicate, [NORM, FIRST, SECOND]),
    "no scales": (lambda hf: rewrite(hf, lambda t: t.update(
        {name: t[name].to(torch.float8_e4m3fn) for name in list(t) if name.endswith("o_proj.weight")})),
        ["o_proj.weight_scale_inv", "lacks"]),
    "truncated data": (lambda hf: truncate(hf, FIRST, (hf / FIRST).stat().st_size - 5), [FIRST, "truncated"]),
    "truncated header": (lambda hf: truncate(hf, FIRST, 100), [FIRST, "truncated"]),
    "empty file": (lambda hf: truncate(hf, FIRST, 0), [FIRST]),
    "trailing bytes": (lambda hf: (hf / FIRST).write_bytes((hf / FIRST).read_bytes() + b"x"), [FIRST, "1 bytes after"]),
    "corrupt header": (lambda hf: corrupt(hf, 8, b"[[[["), [FIRST]),
    "header of another kind": (lambda hf: corrupt(hf, 0, b"PK\x03\x04"), [FIRST]),
    "missing file": (lambda hf: (hf / SECOND).unlink(), [SECOND, "missing"]),
    "damaged index": (lambda hf: (hf / "model.safetensors.index.json").write_text("{"),
                      ["index.json is malformed JSON"]),
    "index of numbers": (lambda hf: (hf / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}'),
                         ['index.json: in "weight_map": "a" is 1, not a text']),
    "deep header": (lambda hf: header_of(hf, b'{"a":' * 100_000), [FIRST, "nested more than 128 deep"]),
    "header that is a list": (lambda hf: header_of(hf, b"[]"), [FIRST, "its header begins with b'['"]),
    "type that is none": (lambda hf: edit_header(hf, dtype=["F32"]), [FIRST, '"dtype" is a list of 1, not a text']),
    "offsets that are none": (lambda hf: edit_header(hf, data_offsets=[0, 1.5]), ['"data_offsets" has 1.5 in it']),
    "offsets of another kind": (lambda hf: edit_header(hf, data_offsets="0"), ['"data_offsets" is "0", not a list']),
    "three offsets": (lambda hf: edit_header(hf, data_offsets=[0, 1, 2]), ['"data_offsets" is a list of 3']),
    "negative shape": (lambda hf: edit_header(hf, shape=[-1, -136]), ['"shape" has -1 in it']),
    "huge width": (lambda hf: edit_config(hf, hidden_size=2**40), ["config.json: hidden_size is 1099511627776, more"]),
    "endless layers": (lambda hf: edit_config(hf, num_hidden_layers=2**31 - 1), ["num_hidden_layers 2147483647"]),
    "rope of another kind": (lambda hf: edit_config(hf, rope_scaling="yarn"), ["rope_scaling is 'yarn', not an"]),
    "quantisation of another kind": (lambda hf: edit_config(hf, quantization_config=[1]), ["quantization_config"]),
    "deep config": (lambda hf: (hf / "config.json").write_text("[" * 100_000), ["config.json", "nested more than 128"]),
    "no config": (lambda hf: (hf / "config.json").unlink(), ["config.json"]),
    "no weights": (lambda hf: [path.unlink() for path in hf.glob("*.safetensors")], ["no *.safetensors"]),
    "another copy": (lambda hf: rewrite(hf, lambda t: t.update(
        {name: value + 1 for name, value in t.items() if ".layers.2.embed_tokens" in name or ".head." in name})),
        ["differs from"]),
    "another quantisation": (lambda hf: edit_config(hf, quantization_config={"quant_method": "awq"}), ["awq"]),
    "too large for float16": (lambda hf: rewrite(hf, lambda t: t[NORM].fill_(1e6)), [NORM, "float16"]),
    "part of an MTP module": (lambda hf: [rewrite(hf, lambda t: [t.pop(n) for n in list(t) if "enorm" in n])],
                              []),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_in_one_line(tmp_path, capsys, kind):
    hf = v3_directory(tmp_path / "hf")
    change, named = DAMAGE[kind]
    change(hf)
    if kind == "part of an MTP module":
        rewrite_all(hf, lambda name: "enorm" in name)
        named = ["model.layers.2.enorm.weight", "lacks 1 tensor",
                 "only a part of an MTP module is there: tools/convert_checkpoint.py --no-mtp"]
    status = convert("hf", "native", hf, tmp_path / "out", "--dtype", "fp16")
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert status == 2 and len(lines) == 1, lines
    assert lines[0].startswith("convert_checkpoint.py: error: ")
    assert all(word in lines[0] for word in named), lines[0]
    assert not (tmp_path / "out" / "iter_0000000").exists()
    assert not (tmp_path / "out" / "latest_checkpointed_iteration.txt").exists()


def rewrite_all(hf, removed) -> None:
    """Take tensors out of whatever file they are in."""
    tensors = {name: value for name, value in _lenient(hf).items() if not removed(name)}
    for path in [*hf.glob("*.safetensors"), hf / "model.safetensors.index.json"]:
        path.unlink()
    save_file(tensors, hf / "model.safetensors")


def _lenient(hf):
    return {name: value for path in hf.glob("*.safetensors") for name, value in load_file(path).items()}


def test_not_finite_is_refused_for_fp8(tmp_path, capsys):
    hf = v3_directory(tmp_path / "hf")
    tensors = _lenient(hf)
    tensors[EXPERT][3, 4] = float("nan")
    rewrite_all(hf, lambda name: True)
    save_file(tensors, hf / "model.safetensors")
    assert convert("hf", "hf", hf, tmp_path / "out", "--dtype", "fp8") == 2
    assert EXPERT in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage, named", [
    (lambda file: os.truncate(file, file.stat().st_size // 2), "truncated"),
    (lambda file: file.unlink(), "missing"),
    (lambda file: file.write_bytes(b"\0" * file.stat().st_size), "has changed"),
    (lambda file: [(file.parent / "checksums.json").unlink(), file.write_bytes(b"\0" * file.stat().st_size)],
     "cannot be read"),
])
def test_a_damaged_native_checkpoint_is_refused(tmp_path, capsys, damage, named):
    assert convert("hf", "native", v3_directory(tmp_path / "hf"), tmp_path / "native") == 0
    file = tmp_path / "native" / "iter_0000000" / "weights-00000.distcp"
    damage(file)
    assert convert("native", "hf", tmp_path / "native", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert str(file) in error and named in error and "model." in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["native", "hf"])
def test_a_full_disk(tmp_path, capsys, to):
    """An error that names tensor and file, no output; the same command goes on once there is space."""
    hf = v3_directory(tmp_path / "hf")
    with largest_file(500_000):
        assert convert("hf", to, hf, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error and ".incomplete" in error and "model." in error
    assert not (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "latest_checkpointed_iteration.txt").exists()
    assert convert("hf", to, hf, tmp_path / "out") == 0


def test_too_little_space_is_refused_before_writing(tmp_path, capsys, monkeypatch):
    hf = v3_directory(tmp_path / "hf")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert convert("hf", "hf", hf, tmp_path / "out") == 2
    assert "1,000 are free" in capsys.readouterr().err


def test_an_existing_output_is_left_alone(tmp_path, capsys):
    hf = v3_directory(tmp_path / "hf")
    assert convert("hf", "native", hf, tmp_path / "out") == 0
    assert convert("hf", "native", hf, tmp_path / "out") == 2
    assert convert("hf", "hf", hf, tmp_path / "out") == 2
    assert "holds a checkpoint already" in capsys.readouterr().err


def test_no_model_is_written_into_another(tmp_path, capsys):
    """Native or Megatron's files beside those of Hugging Face, anything in an iteration: refused, nothing changes."""
    hf, native = v3_directory(tmp_path / "hf"), tmp_path / "native"
    assert convert("hf", "native", hf, native) == 0
    (other := tmp_path / "other").mkdir()
    (other / "link").symlink_to(hf)
    iteration = native / "iter_0000000"
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    model, full, inside = "is a Hugging Face model", "exists already and is not empty", "lies in a checkpoint"
    for to, load, save, said in (
            ("native", hf, hf, model), ("megatron", hf, hf, model), ("native", hf, other / "link", model),
            ("hf", hf, hf, full), ("hf", native, native, full), ("megatron", native, native, "holds a checkpoint"),
            ("hf", native, iteration, inside), ("hf", native, iteration / "a/b", inside),
            ("native", hf, iteration, inside), ("megatron", native, iteration, inside)):
        assert convert("hf" if load == hf else "native", to, load, save) == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert f"--save {save}" in error and said in error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("arguments, named", [
    (["--dtype", "int4"], "--dtype"), (["--max-shard-size", "many"], "many"), (["--workers", "0"], "--workers"),
    (["--layers", "a"], "--layers"), (["--dtype", "fp8"], "--dtype fp8"), (["--assets", "nowhere"], "nowhere"),
    (["--load", "nowhere"], "nowhere"),
])
def test_bad_arguments_are_refused(tmp_path, capsys, arguments, named):
    hf = v3_directory(tmp_path / "hf")
    assert convert("hf", "native", hf, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and named in error[0]
    assert not (tmp_path / "out").exists()


def test_finished_files_are_kept_and_verified(tmp_path, monkeypatch):
    """After a stop, intact files are not written again; a damaged one is, and the result is the same."""
    hf = v3_directory(tmp_path / "hf")
    arguments = ("hf", "hf", hf, tmp_path / "out", "--max-shard-size", "200KB")
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(RuntimeError):
            convert(*arguments)
    assert not (tmp_path / "out").exists()
    finished = sorted((tmp_path / "out.incomplete" / "output").glob("*.safetensors"))
    assert len(finished) == 3
    with open(finished[1], "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    written, write = [], output_file.write_safetensors
    monkeypatch.setattr("megatron_deepseek.checkpoint.convert.formats.write_safetensors",
                        lambda path, *rest: written.append(path.name.removesuffix(".tmp")) or write(path, *rest))
    assert convert(*arguments) == 0
    assert finished[1].name in written and finished[0].name not in written and finished[2].name not in written
    assert_identical(all_tensors(tmp_path / "out"), all_tensors(hf))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_another_plan_starts_anew(tmp_path, monkeypatch):
    """What is left of a conversion to another type is not mixed in."""
    hf = v3_directory(tmp_path / "hf")
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(RuntimeError):
            convert("hf", "hf", hf, tmp_path / "out", "--max-shard-size", "200KB", "--dtype", "fp32")
    assert convert("hf", "hf", hf, tmp_path / "out", "--max-shard-size", "200KB") == 0
    assert_identical(all_tensors(tmp_path / "out"), all_tensors(hf))


@pytest.mark.parametrize("origin", ("hf", "native"))
def test_a_source_that_shrinks_after_it_was_opened(tmp_path, capsys, monkeypatch, origin):
    """Every header is whole when the conversion begins; then each file loses its second half, checksums are gone."""
    source, target = v3_directory(tmp_path / "hf"), "native"
    if origin == "native":
        assert convert("hf", "native", source, tmp_path / "native") == 0
        source, target = tmp_path / "native", "hf"
        next(source.glob("iter_*/checksums.json")).unlink()
    files = [*source.glob("*.safetensors"), *source.glob("iter_*/*.distcp")]
    usage = shutil.disk_usage

    def shrink(path):  # asked for between opening and writing
        for file in files:
            os.truncate(file, file.stat().st_size // 2)
        return usage(path)

    monkeypatch.setattr("shutil.disk_usage", shrink)
    capsys.readouterr()
    assert convert(origin, target, source, tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot be read" in error and any(str(file) in error for file in files) and "model." in error, error
    assert not list((tmp_path / "out").glob("iter_0000000")) and not list((tmp_path / "out").glob("*.safetensors"))
