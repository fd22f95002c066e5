"""finetune_deepseek.py as a user runs it: from released weights, in any layout, resumed in mid-epoch, and back."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from workshop import CONFIG, REPOSITORY, Job, run_entry

from megatron_deepseek.cli.convert_checkpoint import main as convert

ENTRY = REPOSITORY / "finetune_deepseek.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
CHATS = {"train": range(24), "held_out": range(100, 106)}


def chat(number: int) -> dict:
    """Of very different lengths; every third one has two turns."""
    turns = [("user", f"{number}?"), ("assistant", "x" * (number % 7) + str(number))]
    turns += [("user", "and?"), ("assistant", "yes")] * (number % 3 == 0)
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


class Bench:
    """Conversations, a model's files, and the command."""

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(exist_ok=True)
        for name, numbers in CHATS.items():
            (directory / f"{name}.jsonl").write_text("".join(json.dumps(chat(n)) + "\n" for n in numbers))
        (directory / "config.json").write_text(json.dumps(CONFIG))

    def arguments(self, save: str | None, *more: str) -> list[str]:
        """Return the options of a fine-tuning on the training conversations."""
        given = ["--model", self.directory / "config.json", "--dataset", self.directory / "train.jsonl",
                 "--tokenizer-type", "ByteTokenizer", "--template", "deepseek-v3", "--seq-length", "32",
                 "--micro-batch-size", "1", "--global-batch-size", "4", "--lr", "1e-3", "--lr-decay-style", "constant",
                 "--neftune-alpha", "5", "--loss-average", "sample", "--data-cache-path", self.directory / "cache",
                 "--num-workers", "1", *(("--save", self.directory / save) if save else ()), *more]
        return list(map(str, given))

    def start(self, num_ranks: int, save: str | None, *more: str, **streams) -> subprocess.Popen:
        """Start the command as users do, with torchrun where there are several ranks."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
        return subprocess.Popen([sys.executable, *(torchrun if num_ranks > 1 else []), str(ENTRY),
                                 *self.arguments(save, *more)], env=ENVIRONMENT, stderr=subprocess.STDOUT, **streams)

    def launch(self, num_ranks: int, save: str | None, *more: str) -> Job:
        process = self.start(num_ranks, save, *more, text=True, stdout=subprocess.PIPE)
        output, _ = process.communicate(timeout=240)
        return Job(process.returncode, output)

    def run(self, num_ranks: int, save: str | None, *more: str) -> Job:
        """Return how it ended in processes that begin with everything imported."""
        return run_entry(ENTRY.name, num_ranks, self.arguments(save, *more))

    def train(self, num_ranks: int, save: str, *more: str) -> list[dict]:
        job = self.run(num_ranks, save, *more)
        assert job.status == 0, job.output
        return self.metrics(save)

    def metrics(self, save: str) -> list[dict]:
        return [json.loads(line) for line in (self.directory / save / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="module")
def alone(bench) -> list[dict]:
    """Two epochs on one rank, from random weights, whose first save is what others begin from."""
    bench.train(1, "start", "--train-iters", "1", "--lr", "0", "--save-hf", str(bench.directory / "released"))
    return bench.train(1, "alone", *from_weights(bench, "released"), *evaluated(bench))


def from_weights(bench: Bench, name: str) -> tuple[str, ...]:
    return "--load", str(bench.directory / name), "--epochs", "2"


def evaluated(bench: Bench) -> tuple[str, ...]:
    return "--eval-dataset", str(bench.directory / "held_out.jsonl"), "--eval-interval", "3"


def steps(metrics: list[dict]) -> list[dict]:
    return [record for record in metrics if "lm_loss" in record]


def assert_same(metrics: list[dict], reference: list[dict]) -> None:
    """Float32 in another order of additions."""
    assert [record["iteration"] for record in steps(metrics)] == [record["iteration"] for record in steps(reference)]
    for ours, theirs in zip(steps(metrics), steps(reference)):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=1e-4)
        assert ours["mtp_loss"] == pytest.approx(theirs["mtp_loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    found, wanted = ([record for record in each if "eval_loss" in record] for each in (metrics, reference))
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours["iteration"], ours["eval_tokens"]) == (theirs["iteration"], theirs["eval_tokens"])
        assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-4)


def test_learns_from_released_weights_and_reports_what_is_held_out(bench, alone):
    """Also as a Hugging Face model in the end, with the MTP module."""
    assert steps(alone)[-1]["lm_loss"] < steps(alone)[0]["lm_loss"] - 0.05
    held_out = [record for record in alone if "eval_loss" in record]
    assert [record["iteration"] for record in held_out][:2] == [0, 3]
    assert held_out[-1]["eval_loss"] < held_out[0]["eval_loss"] and held_out[-1]["eval_set"] == "held_out.jsonl"
    assert held_out[-1]["eval_perplexity"] == pytest.approx(2.718281828459045 ** held_out[-1]["eval_loss"])
    assert 0 <= held_out[-1]["eval_token_accuracy"] <= 1
    assert any("model.layers.4." in name for name in json.loads(
        (bench.directory / "released" / "model.safetensors.index.json").read_text())["weight_map"])


@pytest.mark.slow
def test_resumes_in_mid_epoch_in_another_layout(bench, alone):
    """Three steps on two context ranks, by torchrun, the rest on two tensor ranks: one rank's numbers, with its noise.
    """
    first = bench.launch(2, "moved", *from_weights(bench, "released"), *evaluated(bench), "--exit-interval", "3",
                         "--context-parallel-size", "2")
    assert first.status == 0, first.output
    assert [record["iteration"] for record in steps(bench.metrics("moved"))] == [1, 2, 3]
    assert_same(bench.train(2, "moved", *from_weights(bench, "released"), *evaluated(bench),
                            "--tensor-model-parallel-size", "2", "--sequence-parallel"), alone)


@pytest.mark.slow
def test_answers_are_written_whatever_the_layout(bench, alone):
    """Two pipeline ranks write what one rank does."""
    more = (*from_weights(bench, "alone"), *evaluated(bench), "--train-iters", "1", "--generate-every", "1",
            "--generate-prompts", "3", "--generate-tokens", "4", "--eval-iters", "0", "--lr", "0")
    more = tuple(word for place, word in enumerate(more) if "--epochs" not in more[max(place - 1, 0):place + 1])
    one = bench.train(1, "answered", *more)
    two = bench.train(2, "answered2", *more, "--pipeline-model-parallel-size", "2")
    texts = [(bench.directory / save / "answers" / "iter_0000000.jsonl").read_text() for save in
             ("answered", "answered2")]
    assert texts[0] == texts[1] and texts[0].count("\n") == 3
    assert [record["iteration"] for record in one if "eval_exact_match" in record] == [0, 1]
    assert [record["eval_exact_match"] for record in one if "eval_exact_match" in record] == [
        record["eval_exact_match"] for record in two if "eval_exact_match" in record]


@pytest.mark.slow
def test_killed_at_any_step_it_goes_on_to_the_same_numbers(bench, alone):
    """SIGKILL once the third step is told, with a checkpoint after each step; the same command goes on."""
    more = (*from_weights(bench, "released"), *evaluated(bench), "--save-interval", "1")
    killed = bench.start(1, "killed", *more, stdout=subprocess.DEVNULL)
    told = bench.directory / "killed" / "metrics.jsonl"
    try:
        while not (told.exists() and '"iteration": 3' in told.read_text()):
            assert killed.poll() is None, "it ended by itself"
            time.sleep(0.02)
    finally:
        killed.kill()
        killed.wait()
    assert_same(bench.train(1, "killed", *more), alone)


@pytest.mark.slow
def test_begins_from_fp8_as_released(bench, alone):
    """E4M3 weights with a scale for each block of 128 x 128: the first losses and gradients are those before, nearly.

    Rounding to four bits moves a loss by 3e-4 here and a gradient's norm by 6e-3; scales that are wrong by 30 % move
    the norm by 0.15.
    """
    released, fp8 = bench.directory / "released", bench.directory / "released-fp8"
    assert convert(["--from", "hf", "--to", "hf", "--load", str(released), "--save", str(fp8), "--dtype", "fp8"]) == 0
    config = json.loads((fp8 / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    first = steps(bench.train(1, "from-fp8", "--load", str(fp8), "--train-iters", "2"))
    for ours, theirs in zip(first, steps(alone)):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=1e-3) and ours["lm_loss"] != theirs["lm_loss"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.02)


@pytest.mark.parametrize("load", ["released", "start"])
def test_mtp_of_given_weights_may_stay_behind(bench, alone, load):
    """From either form of weights: the main model's loss is the same, and neither form that is written has a module."""
    save, out = f"no-mtp-{load}", bench.directory / f"no-mtp-{load}-hf"
    job = bench.run(1, save, "--load", str(bench.directory / load), "--mtp-num-layers", "0", "--train-iters", "1",
                    "--save-hf", str(out))
    assert job.status == 0, job.output
    assert "stays behind; what this run saves has none" in job.output and "MTP: none (--mtp-num-layers 0)" in job.output
    (first,) = steps(bench.metrics(save))
    assert first["lm_loss"] == pytest.approx(steps(alone)[0]["lm_loss"], rel=1e-6) and not first["mtp_loss"]
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    weights = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert weights and not any(name.startswith("model.layers.4.") for name in weights)
    native = json.loads((bench.directory / save / "iter_0000001" / "config.json").read_text())
    assert native["num_nextn_predict_layers"] == 0


def test_a_dry_run_shows_what_is_trained_on_and_builds_nothing(bench):
    job = bench.launch(1, None, "--dry-run")
    assert job.status == 0, job.output
    assert "⟦0<｜end▁of▁sentence｜>⟧" in job.output and "24 samples" in job.output and "steps per epoch" in job.output


@pytest.mark.parametrize("more, named", [
    (("--dataset", "nowhere.jsonl"), "--dataset nowhere.jsonl"),
    (("--load", "TRAIN"), "--load"),
    (("--max-length", "3", "--overlong", "error"), "train.jsonl"),
    (("--eval-dataset", "TRAIN"), "the same"),
])
def test_refuses_bad_input_in_one_line(bench, more, named):
    more = [str(bench.directory / "train.jsonl") if word == "TRAIN" else word for word in more]
    job = bench.run(1, "refused", *more)
    lines = [line for line in job.output.splitlines() if "error" in line]
    assert job.status == 2 and len(lines) == 1, job.output
    assert lines[0].startswith("finetune_deepseek.py: error: ") and named in lines[0]
    assert not (bench.directory / "refused").exists()
