#!/usr/bin/env python3
"""Look into indexed datasets (.bin, .idx), check, join and cut them: docs/data.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.indexed_dataset import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
