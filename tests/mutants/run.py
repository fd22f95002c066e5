"""Plants the mistakes of table.py and agreed.py in a copy of the source, one at a time, and says which no test sees.

    python tests/mutants/run.py                      all of them (hours), or those that --only names
    python tests/mutants/run.py --only blockwise_attention.py TensorParallel.enter --log survivors.txt
    python tests/mutants/run.py --check              only that each mistake can be planted

Exit status 1 if a mistake survived.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from mutant import Mutant
from table import MUTANTS

REPOSITORY = Path(__file__).parents[2]
PACKAGE = "megatron_deepseek"
COPIED = (PACKAGE, "tests", "tools", "csrc", "benchmarks", "pretrain_deepseek.py", "finetune_deepseek.py",
          "train_grpo.py", "pyproject.toml")


def run(mutant: Mutant, tree: Path, timeout: float) -> str:
    """Return the name of the first test that fails, "time-out" or "SURVIVED"."""
    path = tree / PACKAGE / mutant.place.file
    right = path.read_text()
    path.write_text(mutant.planted_in(right))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider",
               *mutant.tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, text=True, capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return "time-out"
    finally:
        path.write_text(right)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert done.returncode in (0, 1, 2, 3, 4), done.stdout + done.stderr
    return failed[0] if failed else "SURVIVED" if done.returncode == 0 else done.stdout[-300:]


def outcomes(mutants: list[Mutant], timeout: float) -> Iterator[tuple[Mutant, str, float]]:
    with TemporaryDirectory(prefix="mutants-") as directory:
        tree = Path(directory)
        for name in COPIED:
            copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
            copy(REPOSITORY / name, tree / name)
        for mutant in mutants:
            begun = time.monotonic()
            yield mutant, run(mutant, tree, timeout), time.monotonic() - begun


def chosen_by(parts: list[str]) -> list[Mutant]:
    """Return those with one of `parts` in their definition's name or file, and all that cannot be planted."""
    return [mutant for mutant in MUTANTS
            if mutant.problem or any(part in text for part in parts for text in (mutant.name, mutant.place.file))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of files or definitions")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first of them")
    parser.add_argument("--every", type=int, nargs=2, default=(0, 1), metavar=("FIRST", "STEP"), help="a share of them")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds of one mistake's tests")
    parser.add_argument("--log", type=Path, help="also written here")
    parser.add_argument("--check", action="store_true", help="do not run tests")
    args = parser.parse_args()
    chosen = chosen_by(args.only)[args.skip:][args.every[0]::args.every[1]]
    problems = [mutant.problem for mutant in chosen if mutant.problem]
    print("\n".join(problems) or f"{len(chosen)} mistakes can be planted", flush=True)
    if args.check or problems:
        return bool(problems)
    survived = 0
    for mutant, outcome, seconds in outcomes(chosen, args.timeout):
        line = f"{outcome} ({seconds:.0f} s): {mutant.name}: {mutant.old.strip()!r} -> {mutant.new.strip()!r}"
        print(line, flush=True)
        if args.log:
            with args.log.open("a") as file:
                file.write(line + "\n")
        survived += outcome == "SURVIVED"
    return bool(survived)


if __name__ == "__main__":
    sys.exit(main())
