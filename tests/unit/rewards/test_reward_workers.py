"""Reward functions in processes: those that throw, hang, exit or say nonsense cost the others nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hostile_rewards
import pytest

from megatron_deepseek.rewards.result import RewardResult
from megatron_deepseek.rewards.spec import parse_rewards
from megatron_deepseek.rewards.workers import RewardWorkers

FILE = hostile_rewards.__file__
NAMES = ("good", "throws", "hangs", "exits", "leaves", "eats", "not_numbers", "too_few", "no_list", "copies_itself")
COMPLETIONS = ["fine", "bad", "none", "worse", "text"]
SECONDS = 4.0


def specs_of(*names: str):
    return parse_rewards([f"{FILE}:{name}" for name in names])


def score(workers: RewardWorkers, completions=COMPLETIONS) -> RewardResult:
    count = len(completions)
    return workers.score(["q"] * count, completions, [{"number": number} for number in range(count)])


@pytest.fixture(scope="module")
def result() -> RewardResult:
    with RewardWorkers(specs_of(*NAMES), SECONDS, processes=2) as workers:
        return score(workers)


@pytest.mark.parametrize("name, values", [
    ("good", [0.4, 0.3, 0.4, 0.5, 0.4]), ("throws", [1, None, 1, 1, 1]), ("hangs", [2, None, 2, 2, 2]),
    ("exits", [3, None, 3, 3, 3]), ("leaves", [1, None, 1, 1, 1]), ("eats", [0, None, 0, 0, 0]),
    ("not_numbers", [1, None, None, None, None]), ("too_few", [None] * 5), ("no_list", [None] * 5),
    ("copies_itself", [0.5] * 5)])
def test_a_bad_completion_costs_no_other_its_value(result, name, values):
    assert result.values[name] == values and all(type(each) in (float, type(None)) for each in result.values[name])


def test_what_failed_is_counted_by_its_kind(result):
    assert result.failures == {
        "throws": {"raised": 1}, "hangs": {"timed out": 1}, "exits": {"died": 1}, "leaves": {"raised": 1},
        "eats": {"raised": 1}, "not_numbers": {"not finite": 2, "wrong type": 1}, "too_few": {"wrong number": 5},
        "no_list": {"wrong type": 5}}


def test_one_message_of_each_kind_names_the_cause(result):
    assert result.examples["throws"]["raised"].startswith(f"KeyError: 'two\\nlines' ({FILE}:")
    assert result.examples["hangs"]["timed out"] == "no answer within 4 s"
    assert result.examples["exits"]["died"] == "its process ended with status 0"
    assert result.examples["not_numbers"]["not finite"] == "it returned nan"
    assert "reward too_few: 5 wrong number, such as: it returned 1 values for 5 completions" in result.notes


def test_the_total_is_of_what_is_there():
    specs = parse_rewards([f"{FILE}:good:10", f"{FILE}:not_numbers:-2", f"{FILE}:throws:0"])
    with RewardWorkers(specs, SECONDS, processes=1) as workers:
        found = score(workers, ["fine", "bad", "none"])
        assert found.total == [4 - 2, 3, 4]
        only = RewardWorkers(specs[1:2], SECONDS, processes=1)
        with only:
            assert score(only, ["bad", "fine"]).total == [None, -2]
        assert score(workers, []).total == [] and score(workers, []).failures == {}


def test_nothing_rewards_nothing():
    with RewardWorkers((), SECONDS) as workers:
        assert score(workers).total == [None] * 5


def test_a_function_gets_the_whole_batch_and_its_process_stays():
    with RewardWorkers(specs_of("counts", "sees_rows"), SECONDS, processes=1) as workers:
        assert score(workers).values == {"counts": [105] * 5, "sees_rows": [1, 2, 3, 4, 5]}
        assert score(workers).values["counts"] == [205] * 5


def test_a_function_that_always_hangs_is_given_up(tmp_path):
    """After the batch and eight completions, not after all."""
    with RewardWorkers(specs_of("always_hangs"), 1.0, processes=4) as workers:
        found = workers.score(["q"] * 40, ["x"] * 40, [{"calls": str(tmp_path / "calls")}] * 40)
    assert found.failures == {"always_hangs": {"timed out": 40}} and found.total == [None] * 40
    calls = (tmp_path / "calls").read_text().split()
    assert 2 <= len(calls) <= 9 and set(calls) == {"40", "1"}, "a busy machine may be too slow for a call"


@pytest.mark.parametrize("text, message", [
    ("import nothing_like_this\ndef f(p, c, r): ...", r"ModuleNotFoundError: No module named 'nothing_like_this'"),
    ("f = 3", "has no function f"),
    ("import os\nos._exit(3)\ndef f(): ...", "its process ended with status 3")])
def test_a_file_that_cannot_be_loaded_is_a_mistake_in_a_line(tmp_path, text, message):
    (tmp_path / "broken.py").write_text(text)
    specs = parse_rewards([f"{FILE}:good", f"{tmp_path}/broken.py:f"])
    with pytest.raises(ValueError, match=f"^--reward .*broken.py:f.* cannot be loaded: .*{message}"):
        RewardWorkers(specs, SECONDS, processes=1).__enter__()


def test_a_file_may_import_its_neighbour_and_none_of_the_job(tmp_path, monkeypatch):
    (tmp_path / "neighbour.py").write_text("VALUE = 0.25\n")
    (tmp_path / "mine.py").write_text(
        "import os, sys\nfrom neighbour import VALUE\n"
        "def f(p, c, r): return [VALUE if 'RANK' not in os.environ and 'torch' not in sys.modules else -1]\n")
    monkeypatch.setenv("RANK", "0")
    with RewardWorkers(parse_rewards([f"{tmp_path}/mine.py:f"]), 20, processes=1) as workers:
        assert score(workers, ["x"]).values == {"f": [0.25]}


def test_workers_end_with_their_parent(tmp_path):
    """Even a parent that is killed, while the function hangs in C."""
    (tmp_path / "mine.py").write_text(
        f"import ctypes, os\ndef f(p, c, r):\n    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()) + '.')\n"
        "    ctypes.PyDLL(None).sleep(600)\n")
    parent = subprocess.Popen([sys.executable, "-c", (
        "from megatron_deepseek.rewards.workers import RewardWorkers\n"
        "from megatron_deepseek.rewards.spec import parse_rewards\n"
        f"with RewardWorkers(parse_rewards([{str(tmp_path / 'mine.py:f')!r}]), 600) as workers:\n"
        "    workers.score(['q'], ['a'], [{}])")])
    worker = int(_awaited(tmp_path / "pid").rstrip("."))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 30
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(worker)


def _awaited(path: Path) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and path.read_text().endswith("."):
            return path.read_text()
        time.sleep(0.05)
    raise TimeoutError(path)


def _runs(process: int) -> bool:
    """Whether a process runs; one that ended and that nobody has waited for does not."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
