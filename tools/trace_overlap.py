#!/usr/bin/env python3
"""Print how much communication was hidden behind computation, from the traces of --profile: docs/parallelism.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.trace_overlap import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
