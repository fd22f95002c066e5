#!/usr/bin/env python3
"""Plan a cluster on a laptop: memory of every rank (docs/planning.md)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.plan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
