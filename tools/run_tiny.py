#!/usr/bin/env python3
"""From nothing to a sample of a trained model: corpus, tokenizer, dataset, training, loss curve, sample.

`make pretrain` runs this. A step is not repeated while it is valid: its stamp holds a fingerprint of the command, of
the code behind it and of the files that it reads, and one of the files that it made. Training that was interrupted
continues from its last checkpoint as long as its fingerprint is the same. What another run has saved is removed only
with --overwrite.

This is a script over the other tools and examples/, not a command of the package, so its body is here and not in
megatron_deepseek/cli/.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from megatron_deepseek.arguments import values
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status

PACKAGE = REPOSITORY / "megatron_deepseek"
PROMPT = "def read(self, size):"
PROCESSES = (1, 2, 4, 8)
RUN = ("STEPS", "NPROC")  # variables of the example that make its training another run


@dataclass(frozen=True)
class Step:
    """A command, the files that it reads and makes, and the code (files or directories) that it depends on."""

    name: str
    command: tuple[str, ...]
    code: tuple[Path, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]


def run(argv: list[str]) -> int:
    args = parse_arguments(argv)
    run_dir = args.run_dir.resolve()
    (run_dir / "data").mkdir(parents=True, exist_ok=True)
    environ = environment(run_dir, args)
    steps = plan(run_dir, args)
    for number, step in enumerate(steps, start=1):
        run_step(step, f"[{number}/{len(steps)}]", run_dir, environ, args.overwrite)
    show(run_dir)
    return 0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog="run_tiny.py", description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=values.path, default=Path("runs/tiny"),
                        help="where everything goes (runs/tiny)")
    parser.add_argument("--steps", type=values.positive_int, default=120, help="training iterations (120)")
    parser.add_argument("--nproc", type=int, choices=PROCESSES, help="processes (4; with GPUs one for each)")
    parser.add_argument("--overwrite", action="store_true", help="remove the run that is there if it is another one")
    args = parser.parse_args(argv)
    args.nproc = args.nproc or default_processes()
    return args


def default_processes() -> int:
    """Return 4, which share the cores, or with GPUs one process for each, of the numbers that the example can run."""
    import torch

    gpus = torch.cuda.device_count()
    return max(number for number in PROCESSES if number <= gpus) if gpus else 4


def environment(run_dir: Path, args: argparse.Namespace) -> dict[str, str]:
    """Return the environment with all that the example script reads, so that no exports for another script reach it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    own = {"PATH": path, "PYTHON": sys.executable, "RUN_DIR": str(run_dir), "STEPS": str(args.steps),
           "NPROC": str(args.nproc), "NNODES": "1", "DATA_PATH": "", "TOKENIZER": "", "DRY_RUN": ""}
    return os.environ | own


def plan(run_dir: Path, args: argparse.Namespace) -> list[Step]:
    data, checkpoints = run_dir / "data", run_dir / "checkpoints"
    corpus, tokenizer, prefix = data / "corpus.jsonl", data / "tokenizer.json", data / "corpus"
    dataset = (data / "corpus_text_document.bin", data / "corpus_text_document.idx")
    metrics, plot, sample = checkpoints / "metrics.jsonl", run_dir / "loss.png", run_dir / "sample.txt"
    marker = checkpoints / "latest_checkpointed_iteration.txt"
    last = checkpoints / f"iter_{args.steps:07d}"
    python = sys.executable

    def tool(name: str, *arguments) -> tuple[str, ...]:
        return python, str(REPOSITORY / "tools" / name), *map(str, arguments)

    example = REPOSITORY / "examples"
    return [
        Step("corpus", tool("make_corpus.py", "--output", corpus),
             (PACKAGE / "cli" / "make_corpus.py",), (), (corpus,)),
        Step("tokenizer", tool("train_tokenizer.py", "--input", corpus, "--output", tokenizer, "--vocab-size", 8192,
                                "--isolate-punctuation"),
             (PACKAGE / "cli" / "train_tokenizer.py", PACKAGE / "data"), (corpus,), (tokenizer,)),
        Step("dataset", tool("preprocess_data.py", "--input", corpus, "--output-prefix", prefix, "--tokenizer-type",
                             "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--append-eod", "--workers", 2,
                             "--overwrite"),
             (PACKAGE / "cli" / "preprocess_data.py", PACKAGE / "data"), (corpus, tokenizer), dataset),
        Step("training", ("bash", str(example / "pretrain_tiny.sh")),
             (PACKAGE, REPOSITORY / "pretrain_deepseek.py", example / "pretrain_tiny.sh", example / "common.sh"),
             (*dataset, tokenizer), (metrics, marker, last)),
        Step("loss curve", tool("plot_metrics.py", metrics, "--output", plot),
             (PACKAGE / "cli" / "plot.py", PACKAGE / "runtime"), (metrics,), (plot,)),
        Step("sample", tool("generate.py", "--load", checkpoints, "--tokenizer-model", tokenizer,
                            "--prompt", PROMPT, "--max-new-tokens", 64),
             (PACKAGE,), (metrics, last, tokenizer), (sample,)),
    ]


def run_step(step: Step, label: str, run_dir: Path, environ: dict[str, str], overwrite: bool = False) -> None:
    """Run `step`, or print that the files it made before are still valid."""
    stamp = run_dir / "stamps" / f"{step.name.replace(' ', '_')}.json"
    wanted = fingerprint(step, environ)
    found = json.loads(stamp.read_text()) if stamp.exists() else {}
    if found.get("inputs") == wanted and found.get("outputs") == digest_files(step.outputs):
        print(f"{label} {step.name}: still valid, reused", flush=True)
        return
    print(f"{label} {step.name}", flush=True)
    told = " ".join(f"{name}={environ[name]}" for name in RUN) if step.name == "training" else None
    if step.name == "training" and found.get("inputs") != wanted:
        before = found.get("told", "an earlier version") if found else None
        discard_checkpoints(run_dir / "checkpoints", before, told, overwrite)
    write_stamp(stamp, {"inputs": wanted, "outputs": None, "told": told})
    start = time.perf_counter()
    execute(step, environ)
    missing = [str(path) for path in step.outputs if not path.exists()]
    if missing:
        sys.exit(f"run_tiny.py: error: {step.name} did not make {', '.join(missing)}")
    write_stamp(stamp, {"inputs": wanted, "outputs": digest_files(step.outputs), "told": told})
    print(f"      {time.perf_counter() - start:.1f} s", flush=True)


def execute(step: Step, environ: dict[str, str]) -> None:
    """Run the command of a step. That of the sample prints it, and it is written here; the others write their files."""
    capture = step.name == "sample"
    process = subprocess.Popen(step.command, env=environ, cwd=REPOSITORY, text=True,
                               stdout=subprocess.PIPE if capture else None)
    output = finish(process)
    if process.returncode:
        sys.exit(f"run_tiny.py: error: {step.name} ended with status {process.returncode}")
    if capture:
        step.outputs[0].write_text(output, encoding="utf-8")


def finish(process: subprocess.Popen) -> str | None:
    """Wait for `process` and return its output. After Ctrl-C, which reaches it too, raise KeyboardInterrupt at its end.

    Training saves then; subprocess.run would kill it after a quarter of a second.
    """
    interrupted = False
    while True:
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:
            interrupted = True
        else:
            break
    if interrupted:
        raise KeyboardInterrupt
    return output


def discard_checkpoints(checkpoints: Path, told: str | None, now: str, overwrite: bool) -> None:
    """Remove the files of another run in `checkpoints`; a run that has saved a checkpoint only with `overwrite`.

    `told` are the variables that it was given, None if no stamp says that this script started it. Raise ValueError
    where the files have to stay.
    """
    if not checkpoints.exists():
        return
    if told is None:
        raise ValueError(f"{checkpoints} is of another origin; choose another --run-dir (RUN_DIR=)")
    marker = checkpoints / "latest_checkpointed_iteration.txt"
    if marker.exists() and not overwrite:
        differs = f"this one has {now}" if now != told else "this one comes from other code or data"
        raise ValueError(f"{checkpoints} holds a run of {told}, saved at iteration {marker.read_text().strip()}; "
                         f"{differs}: --overwrite (OVERWRITE=1) removes it, --run-dir (RUN_DIR=) goes elsewhere")
    print("      another run was there: it is removed", flush=True)
    shutil.rmtree(checkpoints)


def fingerprint(step: Step, environ: dict[str, str]) -> str:
    code = [file for path in step.code for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    run = [environ[name] for name in RUN] if step.name == "training" else []
    return digest([sys.version, *step.command, *run, digest_files(tuple(code)), digest_files(step.inputs)])


def digest(parts: list) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def digest_files(paths: tuple[Path, ...]) -> list:
    """Return names and digests as lists, comparable with those that a stamp has kept as JSON."""
    return [[path.name, digest_path(path)] for path in paths]


def digest_path(path: Path) -> str | list | None:
    """Return a digest of a file's content; of a directory, as a checkpoint may be large, its files' names and sizes."""
    if path.is_dir():
        return sorted([file.name, file.stat().st_size] for file in path.rglob("*") if file.is_file())
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def write_stamp(stamp: Path, content: dict) -> None:
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(json.dumps(content))


def show(run_dir: Path) -> None:
    print("\n" + (run_dir / "sample.txt").read_text(encoding="utf-8").rstrip() + "\n")
    for name, path in (("checkpoints", "checkpoints"), ("metrics", "checkpoints/metrics.jsonl"),
                       ("loss curve", "loss.png"), ("sample", "sample.txt"), ("dataset", "data")):
        print(f"{name:12s} {run_dir / path}")


def main(argv: list[str]) -> int:
    return exit_status("run_tiny.py", lambda: run(argv), "interrupted; the same command continues")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
