"""The name by which this process tells its user's mistakes. It imports the standard library only."""

import sys
from pathlib import Path

ENTRIES = ("pretrain_deepseek.py", "finetune_deepseek.py", "train_grpo.py", "cache_logits.py")


def program() -> str:
    """Return the entry that this process runs; pre-training's where a test or a notebook runs it."""
    name = Path(sys.argv[0]).name
    return name if name in ENTRIES else ENTRIES[0]
