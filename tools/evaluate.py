#!/usr/bin/env python3
"""Evaluate a trained model by tasks, perplexity or programs: tools/evaluate.py --load DIR --tasks NAME ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
