#!/usr/bin/env python3
"""Sample answers, keep those that rewards accept: tools/sample_answers.py --load DIR --input FILE --output FILE"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.cli.sample_answers import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
