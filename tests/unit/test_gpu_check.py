"""tools/gpu_check.sh: parts that can be ended and gone on with, and results that say what happened."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from full_disks import small_disk

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
STUB = """#!/bin/bash
[[ $1 == - ]] && exec {python} "$@"
echo "$*" >> {calls}
[[ $* == *{broken}* ]] && exit 3
if [[ $* == *{slow}* ]]; then
  trap 'echo "ended" >> {calls}; exit 1' TERM
  sleep 60 & wait $!
fi
echo '{said}'
"""


def stand_in(folder: Path, broken: str = "nothing", slow: str = "nothing", said: str = "1 passed in 0.1s") -> Path:
    """Make a stand-in for Python that notes its commands in `calls`."""
    stub, calls = folder / "python", folder / "calls"
    stub.write_text(STUB.format(python=sys.executable, calls=calls, broken=broken, slow=slow, said=said))
    stub.chmod(0o755)
    calls.write_text("")
    return stub


def run(folder: Path, *words: str, **how: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Return how the script ended, and the commands that it gave to a stand-in for Python."""
    stub = stand_in(folder, **how)
    done = subprocess.run([SCRIPT, "--output", str(folder / "out"), *words], capture_output=True, text=True,
                          env=os.environ | {"PYTHON": str(stub)})
    return done, (folder / "calls").read_text().splitlines()


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


def test_what_passed_on_the_emulation_has_not_passed_on_a_gpu(tmp_path):
    """The stand-in is asked for the GPU's name, and gives what it always says."""
    run(tmp_path, "--emulated", "--only", "rope")
    done, calls = run(tmp_path, "--only", "rope", said="1 passed in 2.1s")
    assert "rope: passed, 1 passed, log in" in done.stdout and len(calls) == 2
    assert json.loads((tmp_path / "out" / "rope.json").read_text())["device"] == "1 passed in 2.1s"
    assert "rope: passed before" in run(tmp_path, "--only", "rope", said="1 passed in 2.1s")[0].stdout
    assert "rope: passed, 1 passed, log in" in run(tmp_path, "--only", "rope", said="1 passed in 2.2s")[0].stdout


def test_what_passed_with_other_sources_is_run_again(tmp_path):
    run(tmp_path, "--emulated", "--only", "rope")
    made = tmp_path / "out" / "rope.json"
    kept = json.loads(made.read_text())
    assert re.fullmatch("[0-9a-f]{16}", kept["sources"])
    made.write_text(json.dumps(kept | {"sources": "0" * 16}, indent=1))
    done, calls = run(tmp_path, "--emulated", "--only", "rope")
    assert "rope: passed, 1 passed" in done.stdout and len(calls) == 1
    assert json.loads(made.read_text())["sources"] == kept["sources"]


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ended_by_a_signal(tmp_path, number, status):
    """What it started ends with it, and has no result; the next run begins with that part."""
    words = ("--emulated", "--only", "gemm", "rope")
    stub, calls = stand_in(tmp_path, slow="test_kernels_rope"), tmp_path / "calls"
    script = subprocess.Popen([SCRIPT, "--output", str(tmp_path / "out"), *words], stderr=subprocess.PIPE, text=True,
                              env=os.environ | {"PYTHON": str(stub)}, start_new_session=True)
    while "test_kernels_rope" not in calls.read_text():
        time.sleep(0.05)
    time.sleep(0.3)  # until the stand-in has set its trap
    script.send_signal(number)
    said = script.communicate(timeout=30)[1]
    assert script.returncode == status
    assert said.endswith("gpu_check.sh: ended during rope; run it again to go on from there\n")
    assert calls.read_text().endswith("ended\n")
    assert not (tmp_path / "out" / "rope.json").exists()
    done, _ = run(tmp_path, *words)
    assert "gemm: passed before" in done.stdout and "rope: passed, 1 passed" in done.stdout


def test_a_full_disk(tmp_path):
    """Is said, without a traceback, and nothing has passed; later the part is run again."""
    with small_disk(tmp_path / "out", 16384) as folder:
        filler = folder / "filler"
        filler.write_bytes(bytes(16384 - 4096))
        with contextlib.suppress(OSError):
            (folder / "more").write_bytes(bytes(16384))
        done, _ = run(tmp_path, "--emulated", "--only", "gemm", "rope")
        assert done.returncode == 125 and "Traceback" not in done.stderr
        assert "gpu_check.sh: error: gemm: " in done.stderr
        assert done.stderr.endswith("does not take the result: No space left on device\n")
        assert "gemm: passed" not in done.stdout and not list(folder.glob("*.json"))
        filler.unlink()
        assert "gemm: passed, 1 passed" in run(tmp_path, "--emulated", "--only", "gemm")[0].stdout


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "out").write_text("a file")
    done, calls = run(tmp_path, "--emulated", "--only", "gemm")
    assert done.returncode == 2 and "cannot be made" in done.stderr and not calls


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
