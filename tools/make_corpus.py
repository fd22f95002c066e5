#!/usr/bin/env python3
"""Make a JSONL corpus without a download, of the running Python's standard library: docs/data.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.make_corpus import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
