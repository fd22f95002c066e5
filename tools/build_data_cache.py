#!/usr/bin/env python3
"""Build the indices of a training run ahead of time, from its data arguments: docs/blends.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.build_data_cache import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
