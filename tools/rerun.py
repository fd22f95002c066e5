#!/usr/bin/env python3
"""Print the command that started a run: docs/training.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.rerun import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
