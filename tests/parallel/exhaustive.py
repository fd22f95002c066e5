"""Draws layouts and mixes of features at random, without end, and compares each with one process.

    python tests/parallel/exhaustive.py                    until interrupted; stops at the first difference
    python tests/parallel/exhaustive.py --cases 100 --seed 7 --max-ranks 4
    python tests/parallel/exhaustive.py pp=2 schedule=1F1B microbatches=4 tp=2      one case, as a failure prints it
"""

import argparse
import random
import sys
from dataclasses import fields
from itertools import count

from cases import CONSTRAINTS, SMALL, WIDER, Case
from compare import differences
from covering import Space
from job import run_case, run_reference
from ranks import RankFailure, Ranks


def parse_case(words: list[str]) -> Case:
    kinds = {f.name: type(f.default) for f in fields(Case)}
    given = dict(word.split("=", 1) for word in words)
    return Case(**{name: value == "True" if kinds[name] is bool else kinds[name](value)
                   for name, value in given.items()})


def drawn_cases(seed: int, max_ranks: int):
    random_, space = random.Random(seed), Space(WIDER, (*CONSTRAINTS, *SMALL))
    for _ in count():
        case = Case(**space.complete({}, random_))
        if case.layout.world_size <= max_ranks:
            yield case


def check(ranks: Ranks, case: Case) -> list[str]:
    try:
        (reference,) = ranks.run(1, run_reference, case.reference)
        return differences(ranks.run(case.layout.world_size, run_case, case), reference)
    except RankFailure as failure:
        return [str(failure)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", help="option=value of one case instead of random ones")
    parser.add_argument("--seed", type=int, default=None, help="of the draws; printed, random by default")
    parser.add_argument("--cases", type=int, default=None, help="stop after so many")
    parser.add_argument("--max-ranks", type=int, default=8)
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    cases = [parse_case(args.case)] if args.case else drawn_cases(seed, args.max_ranks)
    print(f"seed {seed}", flush=True)
    ranks = Ranks()
    for number, case in enumerate(cases):
        if number == args.cases:
            break
        found = check(ranks, case)
        print(f"{number}: {'differs' if found else 'equal'}: {case}", flush=True)
        if found:
            print("\n".join(found[:20]))
            return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
