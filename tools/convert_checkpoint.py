#!/usr/bin/env python3
"""Convert checkpoints between Hugging Face's form and the native one: docs/conversion.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
