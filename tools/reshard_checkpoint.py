#!/usr/bin/env python3
"""Inspect, verify, reshard, merge, average and compare checkpoints of training: docs/resharding.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.reshard_checkpoint import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
