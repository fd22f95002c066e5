#!/usr/bin/env python3
"""Draw the curves of metrics.jsonl files to a PNG: docs/training.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.plot import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
