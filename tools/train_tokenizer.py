#!/usr/bin/env python3
"""Train a byte-level BPE tokenizer on JSONL text: docs/data.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
