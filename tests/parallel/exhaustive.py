"""Draws layouts and mixes of features at random, without end, and compares each with one process.

    python tests/parallel/exhaustive.py                    until interrupted; stops at the first difference
    python tests/parallel/exhaustive.py --cases 100 --seed 7 --max-ranks 4
    python tests/parallel/exhaustive.py --precision fp8       losses of the first step, and that the second is finite
    python tests/parallel/exhaustive.py --fixed turns=True cp=2      these of every case, the rest at random
    python tests/parallel/exhaustive.py pp=2 schedule=1F1B microbatches=4 tp=2      one case, as a failure prints it
"""

import argparse
import random
import sys
from dataclasses import fields, replace
from itertools import count
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers" / "ranks"))
from cases import CONSTRAINTS, OPTIONS, SMALL, Case
from compare import differences
from covering import Space
from fp8_job import FP8, run_fp8, run_fp8_alone
from job import Record, run_case, run_reference
from ranks import RankFailure, Ranks

from megatron_deepseek.model.build import Precision
from megatron_deepseek.parallel.layout_string import to_string
from megatron_deepseek.parallel.schedule_rules import takes_microbatches

# Besides the values of the covering array: others that differ in size only, cuts by no placement and, in half of the
# cases, another number of micro-batches in the first step.
WIDER = OPTIONS | {
    "pp": (1, 2, 3, 4, 8), "virtual": (1, 2, 3, 4), "tp": (1, 2, 4), "cp": (1, 2, 4), "dp": (1, 2, 3, 4, 5, 6, 7, 8),
    "ep": (1, 2, 4, 8), "etp": (1, 2, 4, 8), "node": (1, 2, 4),
    "microbatches": tuple(range(1, 17)), "micro_batch_size": (1, 2, 3), "mtp": (0, 1, 2, 3),
    "recompute": (*OPTIONS["recompute"], "layernorm,mla_up_proj,moe_act"), "offload_layers": (0, 1, 2, 9),
    "frozen": (*[0] * 8, *range(1, 25)), "cut": tuple(range(150)), "first": (*[0] * 16, *range(1, 17)),
}
WIDER_ONLY = (
    lambda cut, pp, placement: cut == 0 or pp > 1 and placement == "balanced",
    lambda first, microbatches: first != microbatches,
    lambda first, schedule, pp: first == 0 or schedule == "none" or takes_microbatches(schedule, pp, first),
    lambda first, dp, micro_batch_size: dp * first * micro_batch_size <= 16,
)
TILE = 2  # which the shards of every layout drawn are multiples of, with but few slices of experts
FP8_SLICES = 4


def parse_options(words: list[str]) -> dict:
    kinds = {f.name: type(f.default) for f in fields(Case)}
    given = dict(word.split("=", 1) for word in words)
    return {name: value == "True" if kinds[name] is bool else kinds[name](value) for name, value in given.items()}


def drawn_cases(seed: int, max_ranks: int, fixed: dict):
    random_, space = random.Random(seed), Space(WIDER, (*CONSTRAINTS, *SMALL, *WIDER_ONLY))
    if space.complete(fixed, random_) is None:
        raise SystemExit(f"no case has {fixed}")
    for _ in count():
        case = Case(**space.complete(fixed, random_))
        if case.layout.world_size <= max_ranks:
            yield case


def in_float64(ranks: Ranks, case: Case) -> list[str]:
    """Everything that a layout must not change, over three steps."""
    (reference,) = ranks.run(1, run_reference, case.reference)
    return differences(ranks.run(case.layout.world_size, run_case, case), reference)


def in_bf16(ranks: Ranks, case: Case) -> list[str]:
    case, precision = replace(case, objective="next_token"), Precision(torch.float32, torch.bfloat16)
    (reference,) = ranks.run(1, run_reference, case.reference, 2, precision)
    return first_losses(ranks.run(case.layout.world_size, run_case, case, 2, precision), reference, 2e-2)


def in_fp8(ranks: Ranks, case: Case) -> list[str]:
    if case.etp > FP8_SLICES:
        return []
    case = replace(case, objective="next_token")
    (reference,) = ranks.run(1, run_fp8_alone, TILE, case.reference, 2)
    return first_losses(ranks.run(case.layout.world_size, run_fp8, TILE, case, 2, FP8), reference, 1e-7)


def first_losses(records: list[Record], reference: Record, tolerance: float) -> list[str]:
    """Later steps differ where numbers were rounded otherwise, by as much as another choice of experts makes."""
    found = [] if all(step.losses.finite() for record in records for step in record.steps) else ["not finite"]
    expected = reference.steps[0].losses
    for rank, losses in enumerate(record.steps[0].losses for record in records):
        pairs = zip((losses.lm_loss, *losses.mtp_loss), (expected.lm_loss, *expected.mtp_loss), strict=True)
        if any(abs(one - other) > tolerance * abs(other) for one, other in pairs):
            found.append(f"rank {rank}: losses {losses}, expected {expected}")
    return found


CHECKS = {"float64": in_float64, "bf16": in_bf16, "fp8": in_fp8}


def check(ranks: Ranks, case: Case, precision: str) -> list[str]:
    try:
        return CHECKS[precision](ranks, case)
    except RankFailure as failure:
        return [str(failure)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", help="option=value of one case instead of random ones")
    parser.add_argument("--seed", type=int, default=None, help="of the draws; printed, random by default")
    parser.add_argument("--fixed", nargs="+", default=[], metavar="OPTION=VALUE", help="what every case drawn has")
    parser.add_argument("--cases", type=int, default=None, help="stop after so many")
    parser.add_argument("--max-ranks", type=int, default=8)
    parser.add_argument("--precision", choices=CHECKS, default="float64")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    cases = [Case(**parse_options(args.case))] if args.case else \
        drawn_cases(seed, args.max_ranks, parse_options(args.fixed))
    print(f"seed {seed}", flush=True)
    ranks = Ranks()
    for number, case in enumerate(cases):
        if number == args.cases:
            break
        found = check(ranks, case, args.precision)
        print(f"{number}: {'differs' if found else 'equal'}: {case}", flush=True)
        if found:
            print("\n".join([f"stages {to_string(case.stages)}", *found[:20]]))
            return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
