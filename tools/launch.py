#!/usr/bin/env python3
"""Start an entry as torchrun does, with torchrun's arguments and one line when it fails: docs/launching.md.

The body is megatron_deepseek/launch/torchrun.py, not a module of cli/: it must start before torch is imported, and
entries import launch/ too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.launch.ending import exit_status
from megatron_deepseek.launch.torchrun import PROGRAM, main

if __name__ == "__main__":
    sys.exit(exit_status(PROGRAM, lambda: main(sys.argv[1:])))
