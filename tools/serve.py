#!/usr/bin/env python3
"""Serve a trained model to OpenAI's clients and to a browser: tools/serve.py --load DIR --port P"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.serve import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
