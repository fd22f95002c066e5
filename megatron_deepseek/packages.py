"""The command by which a user installs a package that only some runs need.

It is not `pip install megatron-deepseek[data]`, for this project is on no index; nor `pip` alone, which may belong to
another Python than the one that lacks the package.
"""

import shlex
import sys

# Those of setup.py's extras, which a test compares; matplotlib is in its install_requires.
REQUIREMENTS = {"gigatoken": "gigatoken>=0.10", "zstandard": "zstandard>=0.22", "pyarrow": "pyarrow>=15",
                "nltk": "nltk>=3.9", "tensorboard": "tensorboard>=2.15", "matplotlib": "matplotlib>=3.8",
                "pyyaml": "pyyaml>=6", "wandb": "wandb>=0.19", "starlette": "starlette>=1", "uvicorn": "uvicorn>=0.40",
                "prometheus-client": "prometheus-client>=0.21", "llguidance": "llguidance>=1.9",
                "lm-eval": "lm-eval>=0.4.11", "gguf": "gguf>=0.17", "math-verify": "math-verify>=0.9"}


def how_to_install(package: str) -> str:
    """Return the command that installs `package` for the Python that runs this."""
    return f"{shlex.quote(sys.executable)} -m pip install {shlex.quote(REQUIREMENTS[package])}"
