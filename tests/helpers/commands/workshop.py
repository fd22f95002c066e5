"""A corpus of a few documents, a model that trains in seconds on it, and the commands as a user gives them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from forked import run_script

REPOSITORY = Path(__file__).parents[3]
CONFIG = {
    "model_type": "deepseek_v3", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1, "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "initializer_range": 0.05,
}


@dataclass(frozen=True)
class Job:
    """A finished command: exit status, and all that it printed."""

    status: int
    output: str


def run_entry(entry: str, num_ranks: int, arguments: Sequence[str]) -> Job:
    """Return how one of the repository's entries ended, and what it printed, errors in between."""
    with TemporaryDirectory(prefix="job-") as directory:
        output = Path(directory) / "output"
        status = run_script([str(REPOSITORY / entry), *arguments], output, output, num_ranks)
        return Job(status, output.read_text())


@dataclass(frozen=True)
class Workshop:
    """A dataset, a config.json, and the way to start a training on them."""

    directory: Path
    config: Path
    prefix: Path

    def arguments(self, save: str, *more: str) -> list[str]:
        return ["--model", str(self.config), "--data-path", str(self.prefix), "--tokenizer-type", "ByteTokenizer",
                "--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "16", "--train-iters", "6",
                "--lr", "1e-3", "--split", "90,10,0", "--eval-iters", "1", "--eval-interval", "3",
                "--data-cache-path", str(self.directory / "cache"), "--save", str(self.directory / save), *more]

    def start(self, num_ranks: int, arguments: list[str],
              torchrun: tuple[str, ...] = ("-m", "torch.distributed.run"), **more) -> subprocess.Popen:
        """`torchrun`: what Python is told to run in its place. `more` goes to Popen."""
        script = str(REPOSITORY / "pretrain_deepseek.py")
        launcher = [sys.executable] if num_ranks == 1 else [
            sys.executable, *torchrun, "--standalone", "--nproc_per_node", str(num_ranks)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        streams = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen([*launcher, script, *arguments], env=environment, **(streams | more))

    def run(self, num_ranks: int, arguments: list[str]) -> Job:
        """Return how a job ended whose processes begin with everything imported, without torchrun."""
        return run_entry("pretrain_deepseek.py", num_ranks, arguments)

    def train(self, num_ranks: int, save: str, *more: str) -> list[dict]:
        """The records of metrics.jsonl after a run that must succeed."""
        job = self.run(num_ranks, self.arguments(save, *more))
        assert job.status == 0, job.output
        return self.metrics(save)

    def metrics(self, save: str) -> list[dict]:
        return [json.loads(line) for line in (self.directory / save / "metrics.jsonl").read_text().splitlines()]


def make_workshop(directory: Path) -> Workshop:
    """Python's standard library, ready for training; what an earlier call made in `directory` is kept.

    This repository's own sources would be another corpus after every change to any of them.
    """
    workshop = Workshop(directory, directory / "config.json", directory / "corpus_text_document")
    if workshop.config.exists():
        return workshop
    directory.mkdir(parents=True, exist_ok=True)
    corpus = directory / "corpus.jsonl"
    _run_tool("make_corpus.py", "--output", str(corpus), "--max-bytes", "2_000_000")
    _run_tool("preprocess_data.py", "--input", str(corpus), "--output-prefix", str(directory / "corpus"),
              "--tokenizer-type", "ByteTokenizer", "--append-eod")
    workshop.config.write_text(json.dumps(CONFIG))
    return workshop


def _run_tool(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(REPOSITORY / "tools" / name), *arguments], check=True, capture_output=True,
                   text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
