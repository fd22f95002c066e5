#!/usr/bin/env python3
"""Teach a small dense student what the model of `make finetune` has learnt, and another one by labels alone.

`make distill` runs this after run_tiny_finetuning.py, in whose manner: a step is not repeated while it is valid,
training that was interrupted continues, and what another run has saved is removed only with --overwrite. Both students
see the same few conversations, of which the teacher's predictions are kept in a cache first.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import run_tiny
from run_tiny import PACKAGE, REPOSITORY, Step, run_step

from megatron_deepseek.arguments import values
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status

PROGRAM = "run_tiny_distillation.py"
SAVED = "latest_checkpointed_iteration.txt"
ALONE, TAUGHT = "alone", "taught"
ROWS = 400  # conversations, of the 4,000 that the teacher has seen
TOP_K = 64


def run(argv: list[str]) -> int:
    args = parse_arguments(argv)
    run_dir = args.run_dir.resolve()
    if not (run_dir / "finetuned" / SAVED).exists():
        raise ValueError(f"{run_dir / 'finetuned'} holds no teacher: make finetune trains one")
    environ = run_tiny.environment(run_dir, args) | {"EPOCHS": str(args.epochs), "DATASET": "", "EVAL_DATASET": ""}
    steps = plan(run_dir)
    for number, step in enumerate(steps, start=1):
        teacher = str(run_dir / "distill" / "cache") if step.trains == run_dir / "distill" / TAUGHT else ""
        run_step(step, f"[{number}/{len(steps)}]", run_dir, environ | {"TEACHER": teacher}, args.overwrite)
    print("\n".join(results(run_dir)))
    return 0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=values.path, default=Path("runs/tiny"),
                        help="the directory of run_tiny.py (runs/tiny)")
    parser.add_argument("--epochs", type=values.positive_int, default=12, help="passes over the conversations (12)")
    parser.add_argument("--nproc", type=int, choices=run_tiny.PROCESSES,
                        help="processes (4; with GPUs one for each)")
    parser.add_argument("--overwrite", action="store_true", help="remove the runs that are there if they are others")
    args = parser.parse_args(argv)
    args.nproc = args.nproc or run_tiny.default_processes()
    return argparse.Namespace(**vars(args), steps=0)


def tool(name: str, *arguments) -> tuple[str, ...]:
    return sys.executable, str(REPOSITORY / "tools" / name), *map(str, arguments)


def plan(run_dir: Path) -> list[Step]:
    folder, tokenizer = run_dir / "distill", run_dir / "data" / "tokenizer.json"
    rows, held_out, cache = folder / "rows.jsonl", folder / "held_out.jsonl", folder / "cache"
    return [
        Step("conversations", tool("make_conversations.py", "--output", rows, "--held-out", held_out, "--rows", ROWS),
             (PACKAGE / "cli" / "make_conversations.py",), (), (rows, held_out)),
        Step("cache of the teacher", tool(
            "cache_logits.py", "--model", "tiny", "--load", run_dir / "finetuned", "--dataset", rows,
            "--tokenizer-model", tokenizer, "--template", "deepseek-v3", "--seq-length", 128, "--micro-batch-size", 8,
            "--data-cache-path", folder / "tokens", "--output", cache, "--top-k", TOP_K),
             (PACKAGE, REPOSITORY / "tools" / "cache_logits.py"), (rows, run_dir / "finetuned"),
             (cache / "cache.json",), cache),
        *_students(run_dir, rows, held_out),
        Step("loss curves", tool("plot_metrics.py", folder / ALONE, folder / TAUGHT, "--output", loss_curve(run_dir),
                                 "--labels", "labels alone", "with the teacher"),
             (PACKAGE / "cli" / "plot.py", PACKAGE / "runtime"),
             (folder / ALONE / "metrics.jsonl", folder / TAUGHT / "metrics.jsonl"), (loss_curve(run_dir),)),
    ]


def _students(run_dir: Path, rows: Path, held_out: Path) -> Iterator[Step]:
    example = REPOSITORY / "examples"
    code = PACKAGE, REPOSITORY / "finetune_deepseek.py", example / "distill_tiny.sh", example / "common.sh"
    for name, words in ((ALONE, "labels alone"), (TAUGHT, "with the teacher")):
        save = run_dir / "distill" / name
        inputs = (rows, held_out, *((run_dir / "distill" / "cache",) if name == TAUGHT else ()))
        yield Step(f"student, {words}", ("bash", str(example / "distill_tiny.sh")), code, inputs,
                   (save / "metrics.jsonl", save / SAVED), save, ("EPOCHS", "NPROC", "TEACHER"))


def loss_curve(run_dir: Path) -> Path:
    return run_dir / "distillation_loss.png"


def results(run_dir: Path) -> list[str]:
    """Return the lines for the end: held-out loss and accuracy of the teacher and of both students."""
    folder = run_dir / "distill"
    lines = ["", f"{ROWS} conversations; held out:    loss   token accuracy"]
    for name, path in (("the teacher", run_dir / "finetuned"), ("labels alone", folder / ALONE),
                       ("with the teacher", folder / TAUGHT)):
        records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        held_out = [record for record in records if "eval_loss" in record]
        lines += [f"{name:28s} {last['eval_loss']:10.3f} {last['eval_token_accuracy']:12.1%}" for last in held_out[-1:]]
    return [*lines, "", f"{'students':14s} {folder / ALONE}, {folder / TAUGHT}",
            f"{'loss curves':14s} {loss_curve(run_dir)}"]


def main(argv: list[str]) -> int:
    return exit_status(PROGRAM, lambda: run(argv), "interrupted; the same command continues")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
