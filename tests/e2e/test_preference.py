"""Preference tuning as a user runs it: resumed in another layout without its file of the reference, and reward models.
"""

import json
from pathlib import Path

import pytest
import torch
from preference_data import labelled, pairs, write_rows
from workshop import CONFIG, Job, run_entry

from megatron_deepseek.cli.convert_checkpoint import main as convert
from megatron_deepseek.cli.generate import main as generate
from megatron_deepseek.cli.score_answers import main as score_answers
from megatron_deepseek.data.tokenizer import ASSISTANT, BOS, USER
from megatron_deepseek.rewards.result import RewardResult
from megatron_deepseek.rewards.spec import parse_rewards
from megatron_deepseek.rewards.workers import RewardWorkers

NUM_PAIRS = 24


class Bench:
    """Pairs and labelled answers, random weights in a Hugging Face directory, and the command."""

    def __init__(self, directory: Path):
        self.directory = directory
        write_rows(directory / "pairs.jsonl", pairs(NUM_PAIRS))
        write_rows(directory / "held_out.jsonl", [{**row, "prompt": row["prompt"] + "!"} for row in pairs(7)])
        write_rows(directory / "answers.jsonl", labelled(23))
        (directory / "config.json").write_text(json.dumps(CONFIG))
        job = self.run(1, "start", "dpo", "--train-iters", "1", "--lr", "0", "--save-hf", str(directory / "released"),
                       "--seed", "7")  # other weights than a run begins with that loads none
        assert job.status == 0, job.output

    def run(self, num_ranks: int, save: str, objective: str, *more: str) -> Job:
        """Return how it ended in processes that begin with everything imported."""
        data = "answers.jsonl" if objective == "kto" else "pairs.jsonl"
        given = ["--model", self.directory / "config.json", "--dataset", self.directory / data, "--objective",
                 objective, "--tokenizer-type", "ByteTokenizer", "--template", "deepseek-v3", "--seq-length", "32",
                 "--micro-batch-size", "1", "--global-batch-size", "4", "--lr", "1e-3", "--lr-decay-style", "constant",
                 "--data-cache-path", self.directory / "cache", "--num-workers", "1", "--save", self.directory / save]
        return run_entry("finetune_deepseek.py", num_ranks, [*map(str, given), *more])

    def train(self, num_ranks: int, save: str, objective: str, *more: str) -> tuple[Job, list[dict]]:
        job = self.run(num_ranks, save, objective, *more)
        assert job.status == 0, job.output
        return job, [json.loads(line) for line in (self.directory / save / "metrics.jsonl").read_text().splitlines()]

    @property
    def released(self) -> tuple[str, str]:
        return "--load", str(self.directory / "released")

    def sums(self) -> list[Path]:
        return sorted(self.directory.glob("cache/finetuning/*/reference-*.npy"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("preference"))


def assert_same(found: list[dict], expected: list[dict]) -> None:
    """Float32 in another order of additions; a loss is a difference of sums of some 20 log-probabilities."""
    assert [record["iteration"] for record in found] == [record["iteration"] for record in expected]
    for ours, theirs in zip(found, expected):
        names = [name for name in theirs if name.endswith(("o_loss", "lm_loss")) or "reward" in name or name == "kl"]
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-4), (theirs["iteration"], name)


def test_dpo_learns_and_reports(bench):
    """At first the policy is the reference: a loss of log 2, no reward. The reference is scored once for all runs."""
    job, metrics = bench.train(1, "dpo", "dpo", *bench.released, "--train-iters", "4", "--eval-dataset",
                               str(bench.directory / "held_out.jsonl"), "--eval-interval", "4", "--beta", "0.5")
    steps, held_out = ([record for record in metrics if key in record] for key in ("dpo_loss", "eval_set"))
    assert steps[0]["dpo_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert steps[0]["rewards_margin"] == pytest.approx(0.0, abs=1e-5)
    assert steps[-1]["dpo_loss"] < 0.6 and steps[-1]["rewards_margin"] > 0.2 and steps[-1]["rewards_accuracy"] > 0.5
    assert steps[-1]["logps_chosen"] < 0 and steps[-1]["lm_loss"] > 0
    assert [record["eval_samples"] for record in held_out] == [7, 7]
    assert held_out[-1]["eval_loss"] < held_out[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert "reward margin" in job.output and "rows to score, once" in job.output
    again, _ = bench.train(1, "dpo-again", "dpo", *bench.released, "--train-iters", "1", "--beta", "0.1")
    assert "to score" not in again.output


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_goes_on_in_another_layout_without_its_file_of_the_reference(bench, objective):
    """Three steps, then on two context ranks: the reference's weights are loaded again, not the trained ones."""
    more = (*bench.released, "--train-iters", "5")
    _, expected = bench.train(1, f"{objective}-alone", objective, *more)
    bench.train(1, f"{objective}-moved", objective, *more, "--exit-interval", "3")
    for file in bench.sums():
        file.unlink()
    job, found = bench.train(2, f"{objective}-moved", objective, *more, "--context-parallel-size", "2")
    assert "rows to score, once" in job.output and "continuing at iteration 3" in job.output
    assert_same(found, expected)


@pytest.mark.slow
def test_half_a_file_of_the_reference_is_completed(bench):
    """As a killed job leaves it: rows without a missing number are not scored again, and stay what they are."""
    import numpy as np
    more = (*bench.released, "--train-iters", "3")
    _, expected = bench.train(1, "whole", "dpo", *more)
    whole = {file: np.load(file) for file in bench.sums()}
    for file, numbers in whole.items():
        np.save(file, np.where(np.arange(len(numbers)) < 4, numbers, np.nan))
    _, found = bench.train(1, "completed", "dpo", *more)
    assert_same(found, expected)
    (used,) = [file for file in whole if len(whole[file]) == 2 * NUM_PAIRS and not np.isnan(np.load(file)).any()]
    np.testing.assert_allclose(np.load(used), whole[used], rtol=1e-5)


@pytest.mark.slow
def test_adapters_have_their_base_for_reference(bench):
    """LoRA: log 2 at first, although nothing is scored beforehand."""
    job, metrics = bench.train(1, "lora", "dpo", *bench.released, "--train-iters", "3", "--lora-rank", "4", "--beta",
                               "0.5")
    assert metrics[0]["dpo_loss"] == pytest.approx(0.693147, abs=1e-6) and metrics[-1]["dpo_loss"] < 0.69
    assert "to score" not in job.output and "the model without its adapters" in job.output


def reward_of(directory: Path, rows: list[dict]) -> RewardResult:
    """Return the scores as --reward model:DIR:2 has them; the first row is a chat, and the prompts of others are texts.
    """
    prompts = [f"{BOS}{USER}{row['prompt']}{ASSISTANT}" for row in rows]
    asked = [{"messages": [{"role": "user", "content": rows[0]["prompt"]}]}, *({} for _ in rows[1:])]
    with RewardWorkers(parse_rewards([f"model:{directory}:2"]), seconds=60) as workers:
        return workers.score(prompts, [row["completion"] for row in rows], asked)


def test_a_reward_model_scores_alike_here_and_in_transformers(bench, capsys):
    """Trained from a language model, whose head stays behind; exported; scored by the tool and by transformers."""
    from transformers import AutoModelForSequenceClassification
    out = bench.directory / "reward-hf"
    job, metrics = bench.train(1, "reward", "reward", *bench.released, "--train-iters", "4", "--save-hf", str(out))
    assert "the output head" in job.output and metrics[-1]["reward_loss"] < metrics[0]["reward_loss"]
    assert "lm_loss" not in metrics[0] and metrics[-1]["rewards_accuracy"] > 0.5
    answers, scores = bench.directory / "answers.jsonl", bench.directory / "scores.jsonl"
    scores.write_text('{"line": 1, "score": 7.0}\n{"line": 2, "sco')  # a killed job's
    given = ["--load", str(bench.directory / "reward"), "--input", str(answers), "--output", str(scores), "--template",
             "deepseek-v3"]
    assert score_answers(given) == 0
    found = [json.loads(line) for line in scores.read_text().splitlines()]
    assert [record["line"] for record in found] == [*range(1, 24)] and found[0]["score"] == 7.0
    model = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32)
    for record, row in list(zip(found, labelled(23)))[1:5]:
        ids = [256, 258, *row["prompt"].encode(), 259, *row["completion"].encode(), 257]
        assert model(torch.tensor([ids])).logits.item() == pytest.approx(record["score"], abs=1e-5)
    rewards = reward_of(bench.directory / "reward", labelled(23)[1:5])
    doubled = [2 * record["score"] for record in found[1:5]]
    assert rewards.failures == {} and rewards.total == pytest.approx(doubled, abs=1e-5)
    refused = bench.run(1, "language", "dpo", "--load", str(out), "--train-iters", "1")
    assert refused.status == 2 and "is a reward model" in refused.output
    assert score_answers([*given[:1], str(bench.directory / "released"), *given[2:]]) == 2
    assert "is no reward model" in capsys.readouterr().err
    assert generate(["--load", str(out), "--prompt", "q"]) == 2
    assert "is a reward model, which writes no answers" in capsys.readouterr().err
    for target in ("megatron", "gguf"):
        given = ["--from", "hf", "--to", target, "--load", str(out), "--save", str(bench.directory / target)]
        assert convert(given) == 2
        assert "a reward model" in capsys.readouterr().err
    assert convert(["--from", "hf", "--to", "hf", "--load", str(out), "--save", str(bench.directory / "fp8"), "--dtype",
                    "fp8"]) == 0
    stored = json.loads((bench.directory / "fp8" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "score.weight" in stored and "score.weight_scale_inv" not in stored


@pytest.mark.parametrize("objective, rows, message", [
    ("dpo", [*pairs(1), {"prompt": "q", "chosen": "a"}], "line 2: the row has no rejected answer"),
    ("simpo", [*pairs(1), {"prompt": "q", "chosen": "a", "rejected": "a"}], "line 2: chosen and rejected are the same"),
    ("kto", [{"prompt": "q", "completion": "a", "label": True}] * 2, "has 2 with the label true and 0 with false")])
def test_bad_rows_end_it_with_one_line(bench, objective, rows, message):
    file = write_rows(bench.directory / "bad.jsonl", rows)
    job = bench.run(1, "bad", objective, "--train-iters", "1", "--dataset", str(file))
    assert job.status == 2 and message in job.output.strip().splitlines()[-1]
