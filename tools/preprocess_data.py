#!/usr/bin/env python3
"""Turn text into indexed datasets for --data-path, with the arguments of Megatron-LM's tool: docs/data.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.preprocess_data import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
