"""pretrain_deepseek.py for the fault drill: in its k-th life one rank dies by SIGKILL at its n-th call of something.

    drill.py PLAN.json ARGUMENTS...     PLAN: [[rank, what, n], ...], an entry for each life that ends before its time
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from megatron_deepseek.arguments import parse_or_exit
from megatron_deepseek.checkpoint import writer
from megatron_deepseek.training.loop import pretrain
from megatron_deepseek.training.trainer import Trainer

WHAT = {"step": (Trainer, "train_step"), "write": (writer._ChecksummedFile, "write"), "fsync": (os, "fsync"),
        "rename": (os, "rename"), "replace": (os, "replace"), "rmtree": (shutil, "rmtree")}


def die_at(owner, name: str, count: int, obituary: Path) -> None:
    """`owner.name` works `count - 1` times more; instead of the next call this process is gone."""
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) == count:
            obituary.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, call)


def main() -> None:
    path, life = Path(sys.argv[1]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    plan = json.loads(path.read_text())
    if life < len(plan) and int(os.environ["RANK"]) == plan[life][0]:
        _, what, count = plan[life]
        die_at(*WHAT[what], count, path.with_name(f"{path.stem}-died-{life}"))
    pretrain(parse_or_exit(sys.argv[2:], os.environ))


main()
