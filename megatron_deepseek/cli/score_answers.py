"""The command line of tools/score_answers.py. It imports torch only once the arguments are right."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_deepseek.arguments import values
from megatron_deepseek.arguments.finetuning import TEMPLATES
from megatron_deepseek.arguments.parser import TOKENIZER_TYPES
from megatron_deepseek.cli.inference_options import DTYPES
from megatron_deepseek.launch.command_line import OneLineParser
from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.quick_imports import quick_imports

PROGRAM = "score_answers.py"
_ROWS_AT_A_TIME = 256


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog=PROGRAM, description="Score answers with a reward model (--objective reward).",
                           epilog="docs/preference.md has more, and the same as a function.")
    add = parser.add_argument
    add("--load", type=values.path, required=True, metavar="DIR",
        help="checkpoints (--save of a training, of any layout), or a Hugging Face directory")
    add("--ckpt-step", type=values.count, metavar="ITERATION", help="of --load, this checkpoint instead of the last")
    add("--input", type=values.path, required=True, metavar="FILE",
        help="JSONL of conversations, in any form that fine-tuning reads")
    add("--output", type=values.path, required=True, metavar="FILE",
        help='write {"line": N, "score": X} for each; what is there already is not scored again')
    add("--template", choices=TEMPLATES, default="auto", help="(auto: what the tokenizer's tokens say)")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, default=TOKENIZER_TYPES[0], help=f"({TOKENIZER_TYPES[0]})")
    add("--tokenizer-model", metavar="PATH", help="tokenizer.json or its directory (the one that is with the weights)")
    add("--dtype", choices=DTYPES, default="fp32", help="what is computed in (fp32)")
    add("--token-budget", type=values.positive_int, default=8192, metavar="N", help="tokens of one forward (8192)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Score every line that has no score yet; return the exit status."""
    rows, done = list(_rows(args.input)), scored_lines(args.output)
    left = [(line, row) for line, row in rows if line not in done]
    with quick_imports():
        import torch
        import torch.distributed as dist
        from tqdm import tqdm

        from megatron_deepseek.finetuning.preference.reward_model import RewardModel
    model = RewardModel.open(args.load, args.ckpt_step, template=args.template, tokenizer_type=args.tokenizer_type,
                             tokenizer_model=args.tokenizer_model, dtype=getattr(torch, DTYPES[args.dtype]),
                             token_budget=args.token_budget)
    with open(args.output, "a", encoding="utf-8") as output, \
            tqdm(total=len(rows), initial=len(rows) - len(left), unit="answer", disable=None) as bar:
        for start in range(0, len(left), _ROWS_AT_A_TIME):
            part = left[start:start + _ROWS_AT_A_TIME]
            for (line, _), score in zip(part, _scores(model, args.input, part)):
                output.write(json.dumps({"line": line, "score": score}) + "\n")
            output.flush()
            bar.update(len(part))
    dist.destroy_process_group()
    print(f"{len(left)} answers scored, {len(rows) - len(left)} were: {args.output}", file=sys.stderr)
    return 0


def _scores(model, file: Path, part: list[tuple[int, dict]]) -> list[float]:
    """Return the scores of some rows. Raise ValueError with file and line for one that cannot be scored."""
    try:
        return model.scores([row for _, row in part])
    except ValueError:
        for line, row in part:  # one by one, to find the line
            try:
                model.scores([row])
            except ValueError as error:
                reason = str(error).removeprefix("conversation 1: ").removeprefix("conversation 1 ")
                raise ValueError(f"{file} line {line}: {reason}") from error
        raise


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield (line, row) of a JSONL file. Raise ValueError, with the line, for one that is no object."""
    try:
        with open(path, encoding="utf-8") as file:
            for line, text in enumerate(file, 1):
                if not text.strip():
                    continue
                row = _parsed(text)
                if not isinstance(row, dict):
                    raise ValueError(f"{path} line {line}: not a JSON object")
                yield line, row
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--input {path} cannot be read: {error}") from error


def _parsed(text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def scored_lines(path: Path) -> set[int]:
    """Return the lines of the input that have a score; cut a record off that a killed job did not finish."""
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[:content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    records = [_parsed(line) for line in whole.decode(errors="replace").splitlines()]
    if not all(isinstance(each, dict) and "line" in each and "score" in each for each in records):
        raise ValueError(f"--output {path} holds something else than scores: name another file")
    return {each["line"] for each in records}


def main(argv: list[str]) -> int:
    """Run the command and return its exit status: 2 for a user's mistake, with one line that says which."""
    return exit_status(PROGRAM, lambda: run(parse_arguments(argv)), "interrupted; the same command goes on")
