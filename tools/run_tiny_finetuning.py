#!/usr/bin/env python3
"""Fine-tune the model of `make pretrain` on puzzles with reasoning: chats, training, loss curve, answers.

`make finetune` runs this after run_tiny.py, in whose manner: a step is not repeated while it is valid, training that
was interrupted continues, and what another run has saved is removed only with --overwrite.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import run_tiny
from run_tiny import PACKAGE, REPOSITORY, Step, run_step

from megatron_deepseek.arguments import values
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status

PROGRAM = "run_tiny_finetuning.py"
SAVED = "latest_checkpointed_iteration.txt"
VARIABLES = ("EPOCHS", "NPROC", "LORA")


def run(argv: list[str]) -> int:
    args = parse_arguments(argv)
    run_dir = args.run_dir.resolve()
    if not (run_dir / "checkpoints" / SAVED).exists():
        raise ValueError(f"{run_dir / 'checkpoints'} holds no model to be fine-tuned: make pretrain trains one")
    environ = run_tiny.environment(run_dir, args) | {"EPOCHS": str(args.epochs), "DATASET": "", "EVAL_DATASET": "",
                                                     "LORA": "1" if args.lora else ""}
    steps = plan(run_dir, args.lora)
    for number, step in enumerate(steps, start=1):
        run_step(step, f"[{number}/{len(steps)}]", run_dir, environ, args.overwrite)
    print("\n".join(results(run_dir, args.lora)))
    return 0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=values.path, default=Path("runs/tiny"),
                        help="the directory of run_tiny.py (runs/tiny)")
    parser.add_argument("--epochs", type=values.positive_int, default=3, help="passes over the chats (3)")
    parser.add_argument("--nproc", type=int, choices=run_tiny.PROCESSES,
                        help="processes (4; with GPUs one for each)")
    parser.add_argument("--lora", action="store_true", help="train adapters beside the model, in a run of its own")
    parser.add_argument("--overwrite", action="store_true", help="remove the run that is there if it is another one")
    args = parser.parse_args(argv)
    args.nproc = args.nproc or run_tiny.default_processes()
    return argparse.Namespace(**vars(args), steps=0)


def save_directory(run_dir: Path, lora: bool) -> Path:
    return run_dir / ("finetuned_lora" if lora else "finetuned")


def plan(run_dir: Path, lora: bool = False) -> list[Step]:
    chats, save, example = run_dir / "chats", save_directory(run_dir, lora), REPOSITORY / "examples"
    train, held_out, metrics = chats / "train.jsonl", chats / "held_out.jsonl", save / "metrics.jsonl"
    name, plot = "LoRA fine-tuning" if lora else "fine-tuning", loss_curve(run_dir, lora)

    def tool(name: str, *arguments) -> tuple[str, ...]:
        return sys.executable, str(REPOSITORY / "tools" / name), *map(str, arguments)

    return [
        Step("chats", tool("make_conversations.py", "--output", train, "--held-out", held_out),
             (PACKAGE / "cli" / "make_conversations.py",), (), (train, held_out)),
        Step(name, ("bash", str(example / "finetune_tiny.sh")),
             (PACKAGE, REPOSITORY / "finetune_deepseek.py", example / "finetune_tiny.sh", example / "common.sh"),
             (train, held_out, run_dir / "checkpoints"), (metrics, save / SAVED), save, VARIABLES),
        Step(f"{name} loss curve", tool("plot_metrics.py", metrics, "--output", plot),
             (PACKAGE / "cli" / "plot.py", PACKAGE / "runtime"), (metrics,), (plot,)),
    ]


def loss_curve(run_dir: Path, lora: bool) -> Path:
    return run_dir / ("finetuning_lora_loss.png" if lora else "finetuning_loss.png")


def results(run_dir: Path, lora: bool = False) -> list[str]:
    """Return the lines for the end: held-out loss and exact match before and after, and one conversation."""
    save = save_directory(run_dir, lora)
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    lines = [""]
    for key, name, form in (("eval_loss", "held-out loss", "{:.3f}"),
                            ("eval_token_accuracy", "token accuracy", "{:.1%}"),
                            ("eval_exact_match", "exact match of held-out answers", "{:.1%}")):
        found = [record[key] for record in records if key in record]
        lines.append(f"{name}: {form.format(found[0])} before, {form.format(found[-1])} after")
    first, last = (sorted((save / "answers").glob("*.jsonl"))[end] for end in (0, -1))
    before, after = ([json.loads(line) for line in path.read_bytes().splitlines()] for path in (first, last))
    shown = next((number for number, each in enumerate(after) if each["matches"]), 0)
    lines += ["", f"the question   {after[shown]['prompt']}", f"before         {before[shown]['text']!r}",
              f"after          {after[shown]['text']!r}", f"expected       {after[shown]['expected']!r}", ""]
    return lines + [f"{name:14s} {path}" for name, path in (
        ("checkpoints", save), ("answers", last), ("loss curve", loss_curve(run_dir, lora)))]


def main(argv: list[str]) -> int:
    return exit_status(PROGRAM, lambda: run(argv), "interrupted; the same command continues")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
