"""The launcher's checks before torch is imported, its last words, and what an unfit Python is told."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_deepseek.arguments import parse_or_exit
from megatron_deepseek.launch import torchrun

REPOSITORY = Path(__file__).parents[3]
ENTRY = str(REPOSITORY / "pretrain_deepseek.py")
ARGUMENTS = "--model tiny --data-path x --tokenizer-type NullTokenizer --train-iters 3".split()
COMMANDS = [REPOSITORY / "pretrain_deepseek.py", *sorted((REPOSITORY / "tools").glob("*.py"))]


def python(*arguments: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environ})


@pytest.mark.parametrize("options, local, nodes", [
    ("--nproc_per_node 8", "8", "1"), ("--nproc-per-node=4 --nnodes=2 --node_rank 1", "4", "2"),
    ("--rdzv-backend c10d --nnodes 2:4 --nproc-per-node gpu", "gpu", "2:4"), ("", "1", "1")])
def test_reads_torchruns_arguments(options, local, nodes):
    own, theirs, entry = torchrun.split(["--relaunch", "3", *options.split(), ENTRY, "--nnodes", "7", "other.py"])
    assert theirs == options.split() and entry == [ENTRY, "--nnodes", "7", "other.py"] and own.relaunch == "3"
    assert torchrun.value(theirs, "nproc-per-node", "1") == local and torchrun.value(theirs, "nnodes", "1") == nodes


def test_refuses_before_torchrun_starts(capfd):
    """In the entry's words for all ranks of all nodes, alone, with its status; what fits is shown and not started."""
    command = ["--dry-run", "--nproc_per_node", "8", "--nnodes", "2", ENTRY, *ARGUMENTS]
    assert torchrun.main([*command, "--pipeline-model-parallel-size", "3"]) == 2
    out, err = capfd.readouterr()
    assert err == ("pretrain_deepseek.py: error: --tensor-model-parallel-size 1 x --pipeline-model-parallel-size 3 "
                   "does not divide the 16 ranks of the job\n") and out == ""
    assert torchrun.main(command) == 0
    assert capfd.readouterr() == (f"torchrun --nproc_per_node 8 --nnodes 2 {ENTRY} {' '.join(ARGUMENTS)}\n", "")


@pytest.mark.parametrize("options, entry, words", [
    (["--nproc_per_node", "two"], ENTRY, "--nproc_per_node two is neither a number of processes nor one of auto, gpu"),
    ([], "nowhere.py", "no file nowhere.py in "), ([], "elsewhere/pretrain_deepseek.py", f"; there is {ENTRY}")])
def test_what_torchrun_or_python_would_say_in_their_own_words(options, entry, words, capfd):
    assert torchrun.main([*options, entry, *ARGUMENTS]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("launch.py: error: ") and words in err


def test_help_is_the_entrys_own(capfd):
    assert torchrun.main(["--nproc_per_node", "8", ENTRY, "--help"]) == 0
    assert "--expert-model-parallel-size" in capfd.readouterr().out
    assert torchrun.main(["--help"]) == 0 and "torchrun" in capfd.readouterr().out
    assert torchrun.main(["--nproc_per_node", "8"]) == 2


@pytest.mark.parametrize("exitcode, message, status, line", [
    (2, {"extraInfo": {"py_callstack": "pretrain_deepseek.py: error: no file x"}}, 2, ""),
    (1, {"extraInfo": {"py_callstack": "KeyError: 3 (traceback above, after [rank1])"}}, 1,
     "launch.py: rank 1 failed: KeyError: 3 (traceback above, after [rank1])\n"),
    (-9, "Signal 9 (SIGKILL) received by PID 77", 137,
     "launch.py: rank 1 was ended from outside: Signal 9 (SIGKILL) received by PID 77\n"),
    (3, "To enable traceback see: ...", 3, "launch.py: rank 1 failed without a word; what it printed is above\n")])
def test_last_words_are_of_the_rank_that_failed_first(exitcode, message, status, line, capsys):
    stopped = SimpleNamespace(exitcode=-15, timestamp=5, message="Signal 15 (SIGTERM) received by PID 76")
    failure = SimpleNamespace(exitcode=exitcode, timestamp=9, message=message)
    assert torchrun.failed({0: stopped, 1: failure}) == status
    assert capsys.readouterr().err == line


def test_a_refusal_reaches_torchruns_summary(tmp_path, monkeypatch):
    """On a rank that prints nothing itself, too: another node's table may be all that is read."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setattr("megatron_deepseek.arguments.settings.SILENT_SECONDS", 0.0)
    with pytest.raises(SystemExit) as left:
        parse_or_exit([*ARGUMENTS, "--seq-length", "0"], {"RANK": "3", "WORLD_SIZE": "4"})
    assert left.value.code == 2
    assert json.loads(file.read_text())["message"]["message"].startswith("pretrain_deepseek.py: error: --seq-length")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.name)
def test_without_torch_one_line(command):
    """-S: none of the installed packages."""
    done = python("-S", str(command))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "needs torch, which" in done.stderr, done.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.name)
def test_an_old_python_is_told_in_one_line(command):
    """It gets as far as the check: it can read the file, and nothing before the check is new to it."""
    old = f"import runpy, sys; sys.version_info = (3, 8, 1); runpy.run_path({str(command)!r}, run_name='__main__')"
    done = python("-c", old)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "needs Python 3.10 or newer" in done.stderr
    for path in (command, REPOSITORY / "megatron_deepseek" / "__init__.py"):
        ast.parse(path.read_text(), feature_version=(3, 8))
