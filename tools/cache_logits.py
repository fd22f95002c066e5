#!/usr/bin/env python3
"""Keep what a teacher predicts: torchrun ... tools/cache_logits.py --load DIR --dataset FILE --output DIR

The command line is that of finetune_deepseek.py, with the teacher for --model and --load.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_deepseek.launch.agent import end_with_agent

if __name__ == "__main__":
    end_with_agent()  # before anything that takes time

from megatron_deepseek.cli.cache_logits import main
from megatron_deepseek.launch.entry import run

if __name__ == "__main__":
    run("cache_logits.py", lambda: main(sys.argv[1:]))
