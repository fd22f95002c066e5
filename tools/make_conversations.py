#!/usr/bin/env python3
"""Make chats without a download, puzzles with reasoning: docs/finetuning.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.make_conversations import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
