"""tools/sample_answers.py as a user runs it: killed and started again, on several ranks, its rows into fine-tuning."""

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from forked import run_script, running_script
from served_models import write_served
from small_engines import V3_MTP
from workshop import CONFIG, REPOSITORY, run_entry

from megatron_deepseek.cli.make_conversations import main as make_conversations

TOOL = str(REPOSITORY / "tools" / "sample_answers.py")


class Bench:
    """Puzzles, a small model of random weights, whose answers end at a letter, and the command."""

    def __init__(self, folder: Path):
        self.folder = folder
        write_served(folder / "tiny", replace(V3_MTP, max_position_embeddings=128))
        assert make_conversations(["--output", str(folder / "puzzles.jsonl"), "--rows", "12", "--held-out",
                                   str(folder / "held_out.jsonl"), "--held-out-rows", "5"]) == 0

    def words(self, name: str, *more: str) -> list[str]:
        """Few requests run at a time, so that a run takes a while."""
        return [TOOL, "--load", str(self.folder / "tiny"), "--input", str(self.folder / "puzzles.jsonl"), "--output",
                str(self.folder / name / "rows.jsonl"), "--template", "deepseek-r1", "--no-thinking", "--n", "3",
                "--max-new-tokens", "24", "--temperature", "1", "--stop", "e", " ", "--max-running", "4", "--language",
                "any", "--reward", "regex(pattern=[a-z])", "--reward", "exact:0", *more]

    def run(self, name: str, *more: str, num_ranks: int = 1) -> str:
        (self.folder / name).mkdir(exist_ok=True)
        log = self.folder / name / "log"
        status = run_script(self.words(name, *more), log, log, num_ranks)
        assert status == 0, log.read_text()
        return log.read_text()

    def rows(self, name: str) -> list[bytes]:
        return [(self.folder / name / each).read_bytes() for each in ("rows.jsonl", "rows.statistics.json")]

    def kill_at(self, name: str, answers: int) -> None:
        """Kill a run as soon as so many prompts are answered."""
        (self.folder / name).mkdir(exist_ok=True)
        log, file = self.folder / name / "log", self.folder / name / "rows.answers.jsonl"
        with running_script(self.words(name), log, log) as (process,):
            deadline = time.monotonic() + 120
            while not (file.exists() and file.read_bytes().count(b"\n") >= answers):
                assert process.exitcode is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL, "it was over already"


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("sampled"))


@pytest.fixture(scope="module")
def whole(bench) -> list[bytes]:
    """What a run gives that was never interrupted."""
    log = bench.run("whole")
    assert "36 answers to 12 prompts" in log and "written to" in log
    return bench.rows("whole")


def test_killed_twice_it_gives_the_same_bytes(bench, whole):
    for answers in (2, 7):
        bench.kill_at("killed", answers)
        assert not (bench.folder / "killed" / "rows.jsonl").exists()
    bench.run("killed")
    assert bench.rows("killed") == whole
    kept = (bench.folder / "killed" / "rows.answers.jsonl").read_text().splitlines()
    assert len(kept) == 12 == len({json.loads(line)["number"] for line in kept}), "no prompt is answered twice"


def test_its_rows_go_into_fine_tuning(bench, whole):
    """A dry run reads every row, and trains on the answer alone."""
    (bench.folder / "config.json").write_text(json.dumps(CONFIG))
    rows = [json.loads(line) for line in whole[0].splitlines()]
    job = run_entry("finetune_deepseek.py", 1, fine_tuning(bench.folder))
    assert job.status == 0 and 5 < len(rows), job.output
    assert f"{len(rows)} samples" in job.output, job.output
    assert json.loads(whole[1])["kept"] == len(rows)


def fine_tuning(folder: Path) -> Sequence[str]:
    return [*map(str, (
        "--model", folder / "config.json", "--dataset", folder / "whole" / "rows.jsonl", "--tokenizer-type",
        "ByteTokenizer", "--template", "deepseek-v3", "--seq-length", 256, "--max-position-embeddings", 256,
        "--micro-batch-size", 1, "--global-batch-size", 4, "--epochs", 1, "--data-cache-path",
        folder / "cache", "--num-workers", 1, "--dry-run"))]


@pytest.mark.parametrize("options", [
    pytest.param((), marks=pytest.mark.long),
    pytest.param(("--expert-model-parallel-size", "2"), marks=pytest.mark.slow),
    pytest.param(("--tensor-model-parallel-size", "2"), marks=pytest.mark.long)])
def test_two_ranks_give_the_same_bytes(bench, whole, options):
    name = "ranks" + "-".join(options)
    bench.run(name, *options, num_ranks=2)
    assert bench.rows(name) == whole
