"""The tables of planted mistakes still fit the source; planting them takes hours (`make mutants`)."""

import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parents[1] / "mutants" / "run.py"


def check(*options: str) -> str:
    done = subprocess.run([sys.executable, RUN, "--check", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_mistake_can_be_planted_and_its_tests_exist():
    assert check().endswith(" mistakes can be planted\n")


def test_mistakes_are_chosen_by_file_or_by_definition():
    of_file, of_function = (int(check("--only", part).split()[0]) for part in ("parallel/mesh.py", "build_meshes"))
    assert 0 < of_function <= of_file
