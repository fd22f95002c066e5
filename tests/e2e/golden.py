#!/usr/bin/env python3
"""Golden runs: what a handful of short trainings record, kept from before a refactoring and compared after it.

    python tests/e2e/golden.py record DIR      train all of them, 20 steps each, and keep their records in DIR
    python tests/e2e/golden.py compare DIR     train them again and list every number that has another bit

The corpus is made at the first `record` and kept in DIR: it is Python's own library, which differs between versions of
Python. Bits depend on the machine and on torch's build, so records are of use on the machine that made them only.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "helpers" / part) for part in ("commands", "ranks")]
from workshop import Workshop, make_workshop

STEPS = 20
TIMES = ("step_seconds", "tokens_per_second", "checkpoint_stall_seconds")
PP2 = ("--pipeline-model-parallel-size", "2")
# Name: ranks, then the arguments of each life; a second life continues the first in another layout.
RUNS: dict[str, tuple[int, tuple[tuple[str, ...], ...]]] = {
    "one-rank": (1, ((),)),
    "dp2": (2, ((),)),
    "tp2-sp": (2, (("--tensor-model-parallel-size", "2", "--sequence-parallel"),)),
    "pp2-1f1b": (2, (PP2,)),
    "pp2-zero-bubble": (2, ((*PP2, "--pipeline-schedule", "InterleavedZeroBubble",
                             "--num-virtual-stages-per-pipeline-rank", "2"),)),
    "pp2-dualpipev": (2, ((*PP2, "--pipeline-schedule", "DualPipeV"),)),
    "ep2-grouped": (2, (("--expert-model-parallel-size", "2", "--moe-token-dispatcher-type", "grouped",
                         "--moe-ranks-per-node", "1"),)),
    "cp2": (2, (("--context-parallel-size", "2"),)),
    "blend-ramp": (2, (("--data-path", "0.7", "PREFIX", "0.3", "PREFIX", "--rampup-batch-size", "8", "8", "80"),)),
    "resumed": (2, (("--exit-interval", "10"), ("--tensor-model-parallel-size", "2", "--sequence-parallel"))),
    "packed-mtp2": (2, (("--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss", "--mtp-num-layers", "2",
                         "--context-parallel-size", "2"),)),
    "bf16": (2, (("--bf16",),)),
    "fp8": (1, (("--bf16", "--fp8-format", "e4m3", "--fp8-recipe", "blockwise"),)),
}


def train(workshop: Workshop, name: str, directory: Path) -> dict:
    """The records of run `name` without its times, and the digest of each file of its export."""
    ranks, lives = RUNS[name]
    root, export = directory / name, directory / f"{name}-hf"
    for number, more in enumerate(lives):
        last = number == len(lives) - 1
        more = [str(workshop.prefix) if word == "PREFIX" else word for word in more]
        job = workshop.run(ranks, workshop.arguments(
            str(root), "--train-iters", str(STEPS), "--eval-interval", "10", *(("--load", str(root)) if number else ()),
            *(("--save-hf", str(export)) if last and name == "one-rank" else ()), *more))
        if job.status:
            sys.exit(f"{name} failed:\n{job.output}")
    records = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    return {"metrics": [{key: value for key, value in record.items() if key not in TIMES} for record in records],
            "export": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                       for path in sorted(export.glob("*.safetensors"))}}


def differences(old: dict, new: dict) -> Iterator[str]:
    """Every number of the runs' records that is not the same to the bit, in a line each."""
    if len(old["metrics"]) != len(new["metrics"]):
        yield f"{len(new['metrics'])} records instead of {len(old['metrics'])}"
    for before, after in zip(old["metrics"], new["metrics"]):
        for key in before.keys() | after.keys():
            if before.get(key) != after.get(key):
                yield f"iteration {before['iteration']}: {key} is {after.get(key)} instead of {before.get(key)}"
    if old["export"] != new["export"]:
        yield "the export has other bytes"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help=", ".join(RUNS))
    args = parser.parse_args()
    workshop, different = make_workshop(args.directory.resolve() / "workshop"), 0
    runs = args.directory.resolve() / args.what
    if runs.exists():
        parser.error(f"{runs} exists already: remove it to run again")
    for name in args.only:
        result, kept = train(workshop, name, runs), args.directory / f"{name}.json"
        if args.what == "record":
            kept.write_text(json.dumps(result, indent=1))
            print(f"{name}: {len(result['metrics'])} records kept", flush=True)
            continue
        found = list(differences(json.loads(kept.read_text()), result))
        different += bool(found)
        print(f"{name}: {'the same to the bit' if not found else f'{len(found)} differences'}", flush=True)
        print("".join(f"  {line}\n" for line in found[:5]), end="", flush=True)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
