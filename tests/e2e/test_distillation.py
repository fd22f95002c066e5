"""Distillation as a user runs it: a dense student from a teacher with experts, live and from a killed cache."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from preference_data import write_rows
from small_checkpoints import random_weights, write_hf
from workshop import CONFIG, REPOSITORY, Job, run_entry

from megatron_deepseek.data.tokenizer import ByteTokenizer
from megatron_deepseek.model.architecture.config import ModelConfig

QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 512, "hidden_size": 16,
        "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "max_window_layers": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "hidden_act": "silu", "initializer_range": 0.3, "bos_token_id": 256,
        "eos_token_id": 257, "attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": None}
NUM_CHATS = 23


def chats(number: int) -> list[dict]:
    return [{"messages": [{"role": "user", "content": "q" * (1 + n % 3) + str(n)},
                          {"role": "assistant", "content": "answer " + "x" * (n % 7)}]} for n in range(number)]


class Bench:
    """Conversations, a teacher and a student as Hugging Face directories, and the commands."""

    def __init__(self, directory: Path):
        self.directory = directory
        write_rows(directory / "chats.jsonl", chats(NUM_CHATS))
        for name, fields in (("teacher", CONFIG), ("student", QWEN)):
            config = ModelConfig.from_hf_dict(fields)
            weights = random_weights(config, torch.float32)
            weights = {name: torch.ones_like(each) if "norm" in name else each * 0.3 for name, each in weights.items()}
            write_hf(directory / name, weights, fields)

    def data(self, file: str = "chats.jsonl") -> list[str]:
        return ["--dataset", str(self.directory / file), "--tokenizer-type", "ByteTokenizer", "--template",
                "deepseek-v3", "--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "4",
                "--data-cache-path", str(self.directory / "cache"), "--num-workers", "1"]

    def run(self, num_ranks: int, save: str, *more: str) -> Job:
        student = str(self.directory / "student")
        return run_entry("finetune_deepseek.py", num_ranks, [
            "--model", student, "--load", student, *self.data(), "--lr", "1e-3", "--lr-decay-style", "constant",
            "--save", str(self.directory / save), *more])

    def train(self, num_ranks: int, save: str, *more: str) -> list[dict]:
        job = self.run(num_ranks, save, *more)
        assert job.status == 0, job.output
        return [json.loads(line) for line in (self.directory / save / "metrics.jsonl").read_text().splitlines()]

    def caching(self, output: str, *more: str) -> list[str]:
        teacher = str(self.directory / "teacher")
        return ["--model", teacher, "--load", teacher, *self.data(), "--output", str(self.directory / output), *more]

    def cache(self, num_ranks: int, output: str, *more: str) -> Job:
        return run_entry("tools/cache_logits.py", num_ranks, self.caching(output, *more))

    def files(self, output: str) -> dict[str, np.ndarray]:
        return {file.name: np.load(file) for file in sorted((self.directory / output).glob("*/*.npy"))}

    @property
    def teacher(self) -> tuple[str, str]:
        return "--teacher", str(self.directory / "teacher")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("distillation"))


def expected_losses(directory: Path, temperature: float) -> tuple[float, float]:
    """The forward divergence and the labels' loss over all answers, by transformers, one conversation at a time."""
    from transformers import AutoModelForCausalLM
    teacher, student = (AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float32).eval()
                        for name in ("teacher", "student"))
    tokenizer, divergences, losses = ByteTokenizer(), [], []
    for row in chats(NUM_CHATS):
        question, answer = (each["content"].encode() for each in row["messages"])
        prompt = [256, 258, *question, 259]
        ids = torch.tensor([[*prompt, *answer, tokenizer.eod]])
        with torch.no_grad():
            logits = [model(ids).logits[0, len(prompt) - 1:-1].double() for model in (student, teacher)]
        log_p, log_q = (F.log_softmax(each / temperature, -1) for each in logits)
        divergences.append(F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1))
        losses.append(F.cross_entropy(logits[0], ids[0, len(prompt):], reduction="none"))
    return torch.cat(divergences).mean().item(), torch.cat(losses).mean().item()


def test_losses_are_transformers(bench):
    """Of all answers in one step, with a Qwen2 student and a teacher whose layers mix experts; float32."""
    pytest.importorskip("transformers")
    (step,) = bench.train(1, "whole", *bench.teacher, "--kd-temperature", "2", "--kd-ratio", "0.25", "--epochs", "1",
                          "--global-batch-size", "16", "--kd-temperature-squared")
    kd_loss, lm_loss = expected_losses(bench.directory, 2.0)
    assert step["kd_loss"] == pytest.approx(kd_loss, rel=1e-4) and kd_loss > 0.1
    assert step["lm_loss"] == pytest.approx(lm_loss, rel=1e-5)
    assert step["distill_loss"] == pytest.approx(0.25 * 4 * kd_loss + 0.75 * lm_loss, rel=1e-4)


def test_a_cache_of_all_ids_is_the_live_teacher(bench):
    """Two steps, in another layout: the student learns the same. Fewer ids, in float16, give a lower divergence."""
    warm = ("--kd-temperature", "1.5")
    more = (*warm, "--train-iters", "2", "--kd-loss", "jsd")
    live = bench.train(2, "live", *bench.teacher, *more, "--context-parallel-size", "2")
    job = bench.cache(2, "all-ids", *warm, "--top-k", "512", "--cache-dtype", "fp32", "--tensor-model-parallel-size",
                      "2")
    assert job.status == 0 and "label tokens, the 512 likeliest ids of each, in fp32: " in job.output, job.output
    cached = bench.train(1, "cached", "--teacher", str(bench.directory / "all-ids"), *more)
    for name in ("kd_loss", "lm_loss", "grad_norm"):
        assert [step[name] for step in cached] == pytest.approx([step[name] for step in live], rel=1e-4)
    assert bench.cache(1, "some-ids", *warm, "--top-k", "8").status == 0
    few = bench.train(1, "few", "--teacher", str(bench.directory / "some-ids"), *more)
    assert 0.2 * live[0]["kd_loss"] < few[0]["kd_loss"] < live[0]["kd_loss"]


def test_stated_bytes_and_a_second_start(bench):
    """The files have as many bytes as was said, and headers; nothing is read twice, and another cache is refused."""
    job = bench.cache(1, "stated", "--top-k", "8")
    stated = int(job.output.split(" in fp16: ")[1].split(" bytes")[0].replace(",", ""))
    files = bench.files("stated")
    assert stated == sum(each.nbytes for each in files.values())
    labels = len(files["log_rest.npy"])
    assert stated == labels * (8 * (4 + 2) + 2) + NUM_CHATS and files["done.npy"].all()
    assert "0 batches read, 2 were" in bench.cache(1, "stated", "--top-k", "8").output
    refused = bench.cache(1, "stated", "--top-k", "4")
    assert refused.status == 2 and "holds another cache: top_k is 8, not 4" in refused.output.splitlines()[-1]


def test_a_killed_cache_is_completed_byte_by_byte(bench):
    """Batches that are done stay untouched; one that was begun is made again."""
    assert bench.cache(1, "whole-cache", "--top-k", "8").status == 0
    expected = bench.files("whole-cache")
    assert bench.cache(1, "torn", "--top-k", "8").status == 0
    (folder,) = [each for each in (bench.directory / "torn").iterdir() if each.is_dir()]
    done = np.lib.format.open_memmap(folder / "done.npy", "r+")
    first = np.flatnonzero(done)[:4]
    done[first] = False
    done.flush()
    rest = np.lib.format.open_memmap(folder / "log_rest.npy", "r+")
    rest[:5] = 7
    rest.flush()
    assert "batches read" in bench.cache(1, "torn", "--top-k", "8").output
    for name, array in bench.files("torn").items():
        assert array.tobytes() == expected[name].tobytes(), name
    (folder / "ids.npy").write_bytes((folder / "ids.npy").read_bytes()[:-1])
    lacking = bench.run(1, "lacking", "--teacher", str(bench.directory / "torn"), "--train-iters", "1")
    assert lacking.status == 2 and "has nothing of --dataset" in lacking.output.splitlines()[-1]
    assert "2 batches read, 0 were" in bench.cache(1, "torn", "--top-k", "8").output
    assert bench.files("torn")["ids.npy"].tobytes() == expected["ids.npy"].tobytes()


@pytest.mark.slow
def test_kill_9_while_it_is_made(bench):
    """A real kill, at different moments, until one process gets through: the bytes of an undisturbed one."""
    more = ("--top-k", "8", "--global-batch-size", "1")
    assert bench.cache(1, "quiet", *more).status == 0
    command = [sys.executable, str(REPOSITORY / "tools" / "cache_logits.py"), *bench.caching("killed", *more)]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for batches in (1, 3):
        process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (bench.files("killed") or {}).get("done.npy", np.zeros(0)).sum() < batches:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert bench.cache(1, "killed", *more).status == 0
    expected = bench.files("quiet")
    assert {name: each.tobytes() for name, each in bench.files("killed").items()} == {
        name: each.tobytes() for name, each in expected.items()}


def test_what_cannot_be_learnt_from_is_refused_in_a_line(bench):
    """Another vocabulary, another tokenizer's cache, another temperature, other data, no checkpoint, a layout."""
    directory = bench.directory
    small = {**CONFIG, "vocab_size": 300}
    write_hf(directory / "small", random_weights(ModelConfig.from_hf_dict(small), torch.float32), small)
    assert bench.cache(1, "cold", "--top-k", "4", "--kd-temperature", "2").status == 0
    write_rows(directory / "other.jsonl", chats(3))
    found = json.loads((directory / "cold" / "cache.json").read_text())
    (directory / "foreign").mkdir()
    (directory / "foreign" / "cache.json").write_text(json.dumps({**found, "vocabulary": "0"}))
    wide = replace(ModelConfig.from_hf_dict(CONFIG), num_attention_heads=3, hidden_size=24)
    write_hf(directory / "odd", random_weights(wide, torch.float32), wide.to_hf_dict())
    refused = {
        "has a vocabulary of 300 ids, the student of 512": ("--teacher", directory / "small"),
        "is a cache of another tokenizer than the ByteTokenizer": ("--teacher", directory / "foreign"),
        "is a cache at --kd-temperature 2, and --kd-temperature 1": ("--teacher", directory / "cold"),
        "has nothing of --dataset": ("--teacher", directory / "cold", "--kd-temperature", "2", "--dataset",
                                     directory / "other.jsonl"),
        "there is no such directory": ("--teacher", directory / "nowhere"),
        "neither *.safetensors nor a finished checkpoint": ("--teacher", directory / "bare"),
    }
    (directory / "bare").mkdir()
    (directory / "bare" / "config.json").write_text(json.dumps(CONFIG))
    for message, more in refused.items():
        job = bench.run(1, "refused", "--train-iters", "1", *map(str, more))
        last = job.output.strip().splitlines()[-1]
        assert job.status == 2 and message in last and "--teacher" in last, job.output
    job = bench.run(2, "refused", "--train-iters", "1", "--teacher", str(directory / "odd"),
                    "--tensor-model-parallel-size", "2")
    assert job.status == 2 and "its 3 heads do not divide over 2 tensor-parallel ranks" in job.output
