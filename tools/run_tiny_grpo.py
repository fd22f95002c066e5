#!/usr/bin/env python3
"""Let the model of `make finetune` learn its puzzles by reward alone: training by three seeds, curves, answers.

`make grpo` runs this after run_tiny_finetuning.py, in whose manner: a step is not repeated while it is valid, training
that was interrupted continues, and what another run has saved is removed only with --overwrite.
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

PROGRAM = "run_tiny_grpo.py"
SAVED = "latest_checkpointed_iteration.txt"
VARIABLES = ("STEPS", "NPROC", "SEED")


def run(argv: list[str]) -> int:
    args = parse_arguments(argv)
    run_dir = args.run_dir.resolve()
    if not (run_dir / "finetuned" / SAVED).exists():
        raise ValueError(f"{run_dir / 'finetuned'} holds no model to go on from: make finetune trains one")
    environ = run_tiny.environment(run_dir, args) | {"PROMPTS": "", "EVAL_PROMPTS": ""}
    steps = [(step, seed) for seed in args.seeds for step in plan(run_dir, seed)]
    steps.append((curves(run_dir, args.seeds), args.seeds[0]))
    for number, (step, seed) in enumerate(steps, start=1):
        run_step(step, f"[{number}/{len(steps)}]", run_dir,
                 environ | {"SEED": str(seed), "SAVE": str(save_directory(run_dir, seed))}, args.overwrite)
    print("\n".join(results(run_dir, args.seeds)))
    return 0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=values.path, default=Path("runs/tiny"),
                        help="the directory of run_tiny_finetuning.py (runs/tiny)")
    parser.add_argument("--steps", type=values.positive_int, default=32, help="updates of each run (32)")
    parser.add_argument("--seeds", type=values.count, nargs="+", default=[1, 2, 3], help="a run of each (1 2 3)")
    parser.add_argument("--nproc", type=int, choices=run_tiny.PROCESSES, help="processes (2; with GPUs one for each)")
    parser.add_argument("--overwrite", action="store_true", help="remove the runs that are there if they are others")
    args = parser.parse_args(argv)
    args.nproc = args.nproc or min(2, run_tiny.default_processes())
    return args


def save_directory(run_dir: Path, seed: int) -> Path:
    return run_dir / f"grpo_{seed}"


def plan(run_dir: Path, seed: int) -> list[Step]:
    chats, save, example = run_dir / "chats", save_directory(run_dir, seed), REPOSITORY / "examples"
    return [Step(f"reinforcement learning seed {seed}", ("bash", str(example / "grpo_tiny.sh")),
                 (PACKAGE, REPOSITORY / "train_grpo.py", example / "grpo_tiny.sh", example / "common.sh"),
                 (chats / "train.jsonl", chats / "held_out.jsonl", run_dir / "finetuned" / SAVED),
                 (save / "metrics.jsonl", save / SAVED), save, VARIABLES)]


def curves(run_dir: Path, seeds: list[int]) -> Step:
    metrics = [save_directory(run_dir, seed) / "metrics.jsonl" for seed in seeds]
    tool = (sys.executable, str(REPOSITORY / "tools" / "plot_metrics.py"), *map(str, metrics), "--of", "rewards",
            "--output", str(picture(run_dir)))
    return Step("reward curves", tool, (PACKAGE / "cli" / "plot_rewards.py", PACKAGE / "runtime"), tuple(metrics),
                (picture(run_dir),))


def picture(run_dir: Path) -> Path:
    return run_dir / "grpo_rewards.png"


def results(run_dir: Path, seeds: list[int]) -> list[str]:
    """Return the lines for the end: right answers to held-out puzzles before and after, by seed, and some samples."""
    lines = [""]
    for seed in seeds:
        records = [json.loads(line) for line in (save_directory(run_dir, seed) / "metrics.jsonl").read_text()
                   .splitlines()]
        held_out = [record["eval_reward_exact"] for record in records if "eval_reward_exact" in record]
        rewards = [record["reward"] for record in records if "reward" in record]
        lines.append(f"seed {seed}: right answers to held-out puzzles {held_out[0]:.1%} before, {held_out[-1]:.1%} "
                     f"after; reward of rollouts {rewards[0]:.3f} at first, {rewards[-1]:.3f} at last")
    last = sorted((save_directory(run_dir, seeds[0]) / "rollouts").glob("step_*.jsonl"),
                  key=lambda path: int(path.stem.removeprefix("step_")))[-1]
    sample = json.loads(last.read_bytes().splitlines()[0])
    lines += ["", f"a prompt       {sample['prompt']}", f"a completion   {sample['completion']!r}",
              f"its reward     {sample['reward']:g}, advantage {sample['advantage']:.3f}", ""]
    return lines + [f"{name:14s} {path}" for name, path in (
        ("checkpoints", save_directory(run_dir, seeds[0])), ("samples", last), ("curves", picture(run_dir)))]


def main(argv: list[str]) -> int:
    return exit_status(PROGRAM, lambda: run(argv), "interrupted; the same command continues")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
