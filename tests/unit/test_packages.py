"""Advice to install something names a command that works: this project is on no index."""

import re
import subprocess
import sys
from pathlib import Path

from megatron_deepseek.packages import REQUIREMENTS, how_to_install

ROOT = Path(__file__).parents[2]


def test_requirements_are_those_of_setup():
    stated = re.findall(r'"([\w-]+[><=][^"]*)"', (ROOT / "setup.py").read_text())
    assert set(REQUIREMENTS.values()) <= set(stated)
    assert all(requirement.startswith(package) for package, requirement in REQUIREMENTS.items())


def test_the_advice_installs_for_the_python_that_asks():
    """`--dry-run` would ask an index; that pip takes the words is enough."""
    assert how_to_install("pyarrow") == f"{sys.executable} -m pip install 'pyarrow>=15'"
    words = how_to_install("pyarrow").replace(" install ", " install --help ")
    assert subprocess.run(words, shell=True, capture_output=True).returncode == 0


def test_nobody_is_sent_to_an_index_for_this_project():
    sources = [*ROOT.glob("megatron_deepseek/**/*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("docs/*.md"),
               ROOT / "README.md", *ROOT.glob("examples/*.sh"), ROOT / "pretrain_deepseek.py"]
    advice = re.compile(r"pip install [^`\n]*megatron[-_]deepseek")
    assert not [path for path in sources if path.name != "packages.py" and advice.search(path.read_text())]
