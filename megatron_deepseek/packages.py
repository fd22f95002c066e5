"""How a user gets a package that only some runs need: a command that works where this program runs.

Not `pip install megatron-deepseek[data]`, for this project is on no index; nor `pip` alone, which may belong to another
Python than the one that missed the package.
"""

import shlex
import sys

# Of setup.py's extras, which a test compares; matplotlib is of its install_requires.
REQUIREMENTS = {"gigatoken": "gigatoken>=0.10", "zstandard": "zstandard>=0.22", "pyarrow": "pyarrow>=15",
                "nltk": "nltk>=3.9", "tensorboard": "tensorboard>=2.15", "matplotlib": "matplotlib>=3.8"}


def how_to_install(package: str) -> str:
    """The command that installs `package` for the Python that runs this."""
    return f"{shlex.quote(sys.executable)} -m pip install {shlex.quote(REQUIREMENTS[package])}"
