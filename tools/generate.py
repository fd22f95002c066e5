#!/usr/bin/env python3
"""Continue a prompt with a trained model: tools/generate.py --load DIR --prompt TEXT"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.generate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
