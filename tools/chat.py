#!/usr/bin/env python3
"""Chat with a trained model: tools/chat.py --load DIR"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.chat import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
