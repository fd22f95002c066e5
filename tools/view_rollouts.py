#!/usr/bin/env python3
"""Look at what a GRPO run sampled, and what it was worth: tools/view_rollouts.py runs/grpo [--html page.html]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.view_rollouts import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
