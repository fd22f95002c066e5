"""run.json: what is recorded of a start, and tools/rerun.py, whose words a shell reads as they were."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from megatron_deepseek.arguments import parse
from megatron_deepseek.cli.rerun import main as rerun
from megatron_deepseek.runtime.manifest import FILE, add_start, describe_start, launcher, read_starts

ELASTIC = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1",
           "MASTER_ADDR": "a", "MASTER_PORT": "9", "WORLD_SIZE": "16", "TORCHELASTIC_RESTART_COUNT": "1"}


def settings(tmp_path: Path):
    return parse(f"--model tiny --data-path {tmp_path}/d --tokenizer-type ByteTokenizer --seq-length 16 "
                 "--train-iters 5 --tensor-model-parallel-size 2".split(), 4)


def record(tmp_path: Path, monkeypatch, argv: list[str], environ: dict[str, str]) -> dict:
    (tmp_path / "d.idx").write_bytes(b"index")
    monkeypatch.setattr(sys, "argv", argv)
    files = {str(tmp_path / "d.idx"): 5, str(tmp_path / "d.bin"): 7, "tokenizer.json": "abc"}
    return describe_start(settings(tmp_path), "H800", 12, files, environ)


def test_what_is_recorded(tmp_path, monkeypatch):
    """Of the environment only what changes a run: a key in it is nobody's business."""
    found = record(tmp_path, monkeypatch, ["pretrain.py", "--lr", "1"], ELASTIC | {
        "OMP_NUM_THREADS": "4", "NCCL_DEBUG": "INFO", "WANDB_API_KEY": "secret", "HOME": "/root"})
    assert found["environment"] == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4"}
    assert (found["iteration"], found["device"], found["world_size"], found["restart"]) == (12, "H800", 16, 1)
    assert found["layout"]["tp"] == 2 and found["layout"]["dp"] == 2
    assert found["files"] == {str(tmp_path / "d.idx"): xxhash.xxh3_128_hexdigest(b"index"),
                              str(tmp_path / "d.bin"): 7, "tokenizer.json": "abc"}
    assert found["versions"]["torch"] and found["directory"] == str(Path.cwd())
    json.dumps(found)


def test_the_agents_own_words_or_equal_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--save", "a b"])
    agent = tmp_path / "cmdline"
    agent.write_bytes(b"python\0torchrun\0--standalone\0--nproc_per_node\0002\0pretrain.py\0--save\0a b\0")
    assert launcher(ELASTIC, agent) == ["python", "torchrun", "--standalone", "--nproc_per_node", "2"]
    equal = "torchrun --nnodes 2 --node_rank 1 --master_addr a --master_port 9 --nproc_per_node 8".split()
    assert launcher(ELASTIC, tmp_path / "nothing") == equal
    agent.write_bytes(b"some\0other\0program\0")
    assert launcher(ELASTIC, agent) == equal
    assert launcher({}, agent) == [sys.executable]
    one = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "4"}
    assert launcher(one, tmp_path / "nothing") == ["torchrun", "--nproc_per_node", "4"]


def test_every_start_is_kept_and_printed_for_a_shell(tmp_path, monkeypatch, capsys):
    """A shell, given what is printed, runs the program with the same words in the same directory."""
    words = ["it's", "a b", "$HOME", "*", "--save=ü", ""]
    program = [sys.executable, "-c", "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['OMP_NUM_THREADS'])"]
    place = tmp_path / "an odd place"
    place.mkdir()
    base = record(tmp_path, monkeypatch, ["x"], {}) | {"directory": str(place)}
    add_start(tmp_path, base)
    add_start(tmp_path, base | {"command": [*program, *words], "environment": {"OMP_NUM_THREADS": "3"}})
    assert len(read_starts(tmp_path / FILE)) == 2
    assert rerun([str(tmp_path)]) == 0
    line = capsys.readouterr().out
    assert shlex.split(line)[:2] == ["cd", str(place)]
    said = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
    assert said == f"{words} {place} 3\n"
    assert rerun([str(tmp_path / FILE), "--start", "1"]) == 0
    assert shlex.split(capsys.readouterr().out) == ["cd", str(place), "&&", sys.executable, "x"]
    assert rerun([str(tmp_path), "--list"]) == 0
    assert capsys.readouterr().out.count("from iteration 12, 1 ranks on H800") == 2


@pytest.mark.parametrize("content, says", [
    (None, "run.json is missing"), ("{", "is malformed JSON"), ('{"starts": [{"command": []}]}', "no record of starts"),
    ('{"starts": [{"command": ["a", 1]}]}', "no record of starts"), ("[]", "run.json")])
def test_what_is_no_record_costs_a_line(tmp_path, capsys, content, says):
    if content is not None:
        (tmp_path / FILE).write_text(content)
    assert rerun([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_start_that_is_not_there(tmp_path, monkeypatch, capsys):
    add_start(tmp_path, record(tmp_path, monkeypatch, ["x"], {}))
    assert rerun([str(tmp_path), "--start", "2"]) == 2
    assert "--start 2: " in capsys.readouterr().err
