"""tools/evaluate.py without lm-eval: perplexity and programs on a small checkpoint, and what it refuses in a line."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from served_models import write_served
from small_engines import V3_MTP, uncached_logits

from megatron_deepseek.cli.evaluate import main
from megatron_deepseek.inference.loading import join_ranks, load_model
from megatron_deepseek.inference.model_files import open_model

TEXTS = ["what is it? first one, then two", "Assistant: yes, User: no"]
PROBLEM = {"task_id": "T/0", "prompt": "def one():", "entry_point": "one", "test": "def check(candidate):\n    pass\n"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_served(tmp_path_factory.mktemp("evaluate") / "tiny", replace(V3_MTP, max_position_embeddings=64))


@pytest.fixture
def texts(tmp_path) -> Path:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path / "texts.jsonl"


def expected_loss(checkpoint: Path) -> float:
    """By the training model's forward of each text after the token that begins one."""
    files = open_model(checkpoint)
    stage, total, count = load_model(files, join_ranks()).stage, 0.0, 0
    for text in TEXTS:
        ids = files.tokenizer.encode(text)
        found = uncached_logits(stage, [files.tokenizer.bos, *ids])[:-1].log_softmax(-1)
        total -= float(found.gather(1, torch.tensor(ids)[:, None]).sum())
        count += len(ids)
    dist.destroy_process_group()
    return total / count


def test_perplexity_is_that_of_the_training_model(checkpoint, texts, tmp_path, capsys):
    """And a second run takes every answer from the file of the first."""
    words = ["--load", str(checkpoint), "--perplexity", str(texts), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    found = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert found["loss"] == pytest.approx(expected_loss(checkpoint), abs=1e-5)
    assert found["token_perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert f"written to {tmp_path / 'out' / 'perplexity.json'}" in capsys.readouterr().out
    kept = (tmp_path / "out" / "answers.jsonl").read_text()
    assert len(kept.splitlines()) == 2
    assert main(words) == 0 and (tmp_path / "out" / "answers.jsonl").read_text() == kept
    assert json.loads((tmp_path / "out" / "perplexity.json").read_text()) == found


def test_programs_are_written_and_run(checkpoint, tmp_path, capsys):
    """A model of random weights writes no program that runs; what it wrote, and why it failed, is kept."""
    (tmp_path / "problems.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    words = ["--load", str(checkpoint), "--pass-at-k", str(tmp_path / "problems.jsonl"), "--k", "1", "2",
             "--samples", "2", "--max-new-tokens", "8", "--unisolated", "--output", str(tmp_path / "out.json")]
    assert main(words) == 0
    found = json.loads((tmp_path / "out.pass_at_k.json").read_text())
    assert (found["problems"], found["samples"], found["pass@1"], found["pass@2"]) == (1, 2, 0.0, 0.0)
    programs = [json.loads(line) for line in (tmp_path / "out.programs.jsonl").read_text().splitlines()]
    assert [each["task_id"] for each in programs] == ["T/0"] * 2 and "failed: " in programs[0]["result"]
    assert programs[0]["completion"] != programs[1]["completion"] and "pass@1  0.0000" in capsys.readouterr().out


@pytest.mark.parametrize("words, message", [
    ((), "at least one of --tasks, --perplexity and --pass-at-k is needed"),
    (("--perplexity", "none.txt"), "--perplexity none.txt: there is no such file"),
    (("--tasks", "arc", "--stride", "4"), "--stride 4 needs --perplexity"),
    (("--pass-at-k", __file__, "--k", "5", "--samples", "2"), "--k 5 needs at least as many --samples, and they are 2"),
    (("--pass-at-k", __file__, "--samples", "2", "--temperature", "0"), "with --temperature 0 are all the same"),
    (("--perplexity", __file__, "--tensor-model-parallel-size", "2"), "does not divide the 1 rank of this job")])
def test_refused_at_once_and_in_a_line(words, message, capsys):
    assert main(["--load", "nowhere", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("evaluate.py: error: ") and message in line


def test_without_lm_eval_a_line_says_how_to_install_it(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert main(["--load", str(checkpoint), "--tasks", "hellaswag"]) == 2
    assert "evaluate.py: error: --tasks needs lm-eval: " in capsys.readouterr().err
