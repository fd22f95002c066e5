#!/usr/bin/env python3
"""Translate a recipe of LLaMA-Factory into the command here: docs/finetuning.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.translate_arguments import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
