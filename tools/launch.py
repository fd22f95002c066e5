#!/usr/bin/env python3
"""Start an entry as torchrun does, with torchrun's arguments and one line when it fails: docs/training.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.launch.torchrun import PROGRAM, main

if __name__ == "__main__":
    sys.exit(exit_status(PROGRAM, lambda: main(sys.argv[1:])))
