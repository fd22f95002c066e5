#!/usr/bin/env python3
"""Merge LoRA adapters into their base: docs/lora.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.merge_lora import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
