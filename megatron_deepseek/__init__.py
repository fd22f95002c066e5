"""Megatron-style training of DeepSeek models on PyTorch's distributed engine.

Every command imports this first, so what none of them can do without is asked for here, in a line. Python 3.8 can
read this file.
"""

import importlib.util
import sys

__version__ = "0.1.0"


def _refuse(problem):
    sys.stderr.write("error: megatron_deepseek needs %s\n" % problem)
    raise SystemExit(2)


if sys.version_info < (3, 10):
    _refuse("Python 3.10 or newer, and %s is %s" % (sys.executable, sys.version.split()[0]))
for _name in ("torch", "numpy", "tokenizers", "tqdm", "xxhash"):
    if importlib.util.find_spec(_name) is None:
        _refuse("%s, which %s does not have: `make venv` and `source .venv/bin/activate`, or pip install -e ."
                % (_name, sys.executable))
