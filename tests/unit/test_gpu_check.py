"""tools/gpu_check.sh: parts that can be ended and gone on with, and results that say what happened."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
STUB = """#!/bin/bash
[[ $1 == - ]] && exec {python} "$@"
echo "$*" >> {calls}
[[ $* == *{broken}* ]] && exit 3
echo '{said}'
"""


def run(folder: Path, *words: str, broken: str = "nothing", said: str = "1 passed in 0.1s"
        ) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Return how the script ended, and the commands that it gave to a stand-in for Python."""
    stub, calls = folder / "python", folder / "calls"
    stub.write_text(STUB.format(python=sys.executable, calls=calls, broken=broken, said=said))
    stub.chmod(0o755)
    calls.write_text("")
    done = subprocess.run([SCRIPT, "--output", str(folder / "out"), *words], capture_output=True, text=True,
                          env=os.environ | {"PYTHON": str(stub)})
    return done, calls.read_text().splitlines()


def test_what_passed_is_not_run_again(tmp_path):
    parts = ("--emulated", "--only", "machine", "rope", "cross_entropy")
    done, calls = run(tmp_path, *parts, broken="cross_entropy")
    assert done.returncode == 1 and len(calls) == 2
    assert "machine: skipped: needs a GPU" in done.stdout and "rope: passed" in done.stdout
    made = json.loads((tmp_path / "out" / "cross_entropy.json").read_text())
    assert (made["outcome"], made["status"]) == ("failed", 3)
    done, calls = run(tmp_path, *parts)
    assert done.returncode == 0 and "rope: passed before" in done.stdout
    assert [call for call in calls if "cross_entropy" in call] == calls != []
    _, calls = run(tmp_path, *parts, "--again")
    assert len(calls) == 2


def test_how_many_tests_were_skipped_is_said(tmp_path):
    done, _ = run(tmp_path, "--emulated", "--only", "alternatives", said="9 passed, 12 skipped in 25.45s")
    assert done.stdout.startswith("alternatives: passed, 9 passed, 12 skipped, log in ")


def test_tests_that_were_skipped_have_not_passed(tmp_path):
    done, _ = run(tmp_path, "--emulated", "--only", "gemm", said="38 skipped in 0.1s")
    assert done.stdout == "gemm: skipped: no test ran\n"


def test_without_a_gpu_the_emulation_is_built_before_its_first_tests(tmp_path):
    """Not within their limits: a hang is what those are short for."""
    done, calls = run(tmp_path, "--emulated", "--only", "first_products", "build")
    assert [re.sub(r"--jobs \d+ ", "", call) for call in calls][0] == "csrc/build.py --emulated"
    assert done.stdout.splitlines()[0].startswith("build: passed") and "first_products: passed" in done.stdout
    listed = run(tmp_path, "--list", "--only", "build")[0].stdout
    assert re.search(r" csrc/build.py --jobs \d+ --or-keep$", listed)


def test_a_row_without_a_time_is_a_failure(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "layer_table.json").write_text('{"rows": [{"problem": "out of memory"}]}')
    done, calls = run(tmp_path, "--emulated", "--only", "layer")
    assert done.returncode == 1 and "layer: failed: rows without a time in layer_table.json" in done.stdout
    assert calls[0].endswith("--only layer --device cpu --small --emulated")


@pytest.mark.parametrize("words, message", [(["--only", "speed"], "there is no part 'speed'"),
                                            (["--fast"], "unknown argument '--fast'")])
def test_mistakes(tmp_path, words, message):
    done, calls = run(tmp_path, *words)
    assert done.returncode == 2 and message in done.stderr and not calls


def test_without_a_gpu_nothing_passes(tmp_path):
    """The tests would run on the emulation."""
    done, calls = run(tmp_path, "--only", "gemm", broken="torch.cuda.is_available")
    assert done.returncode == 2 and "sees no GPU" in done.stderr and len(calls) == 1
    assert not list((tmp_path / "out").glob("*.json"))


def test_parts_fit_and_name_what_exists(tmp_path):
    """Each in less than 8 minutes, every file of tests/gpu among them, and pieces that the benchmark has."""
    lines = run(tmp_path, "--list")[0].stdout.splitlines()
    assert all(0 < int(seconds) < 480 for seconds in re.findall(r"^\w+ \((\d+) s\): ", "\n".join(lines), re.M))
    files = {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert set(re.findall(r"tests/gpu/(test_\w+\.py)", "\n".join(lines))) == files
    pieces = (ROOT / "benchmarks" / "gpu.py").read_text()
    for line in lines:
        asked = line.rpartition("--only ")[2].split() if "--only" in line else []
        assert all(f'"{piece}": ' in pieces for piece in asked)
        assert sum(map(int, re.findall(r"--timeout (\d+)", line))) * len(asked) < 480
