"""pretrain_deepseek.py in which a rank dies by SIGKILL in the middle of something.

    torchrun ... mortal.py DEATHS.json ARGUMENTS...     the k-th death of the list ends the job's k-th life
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_deepseek.launch.agent import end_with_agent

if __name__ == "__main__":
    end_with_agent()  # before anything that takes time, as pretrain_deepseek.py does

from megatron_deepseek.arguments import parse_or_exit
from megatron_deepseek.checkpoint.dcp import storage_writer as writer
from megatron_deepseek.checkpoint.tracker import TRACKER, SAVING
from megatron_deepseek.pretraining.loop import pretrain
from megatron_deepseek.training.trainer import Trainer

WHAT = {"step": (Trainer, "train_step"), "write": (writer.ChecksummedFile, "write"), "fsync": (os, "fsync"),
        "rename": (os, "rename"), "replace": (os, "replace"), "rmtree": (shutil, "rmtree"),
        # of all renames, the one that gives a checkpoint its name, and the one that makes it the last
        "publish": (os, "rename", lambda source, target: str(source).endswith(SAVING)),
        "tracker": (os, "replace", lambda source, target: Path(target).name == TRACKER),
        # of all replacements, those of the data's cache, which the first life makes, and of the export at the end
        "cache": (os, "replace", lambda source, target: Path(target).parent.name == "cache"),
        "export": (os, "replace", lambda source, target: Path(target).parent.name in ("output", "finished"))}
# What the first rank and another one may be doing when they die, and at which of its calls at most: all within the
# first saves of a life. A clock's are milliseconds from the life's beginning.
MOMENTS = ({"step": 3, "write": 200, "fsync": 16, "rename": 6, "replace": 6, "rmtree": 2, "publish": 2, "tracker": 2,
            "cache": 3, "export": 3, "clock": 2500},
           {"step": 3, "write": 200, "fsync": 2, "export": 2, "clock": 2500})


@dataclass(frozen=True)
class Death:
    """Rank `rank` is about to do `what` for the `count`-th time in this life, and is gone instead.

    `merciful`: the ranks that are left are asked to end (SIGTERM, as torchrun does it) rather than killed.
    """

    rank: int
    what: str
    count: int
    merciful: bool = True

    @classmethod
    def parse(cls, text: str) -> "Death":
        """Of RANK:WHAT:COUNT."""
        rank, what, count = text.split(":")
        if what not in MOMENTS[0]:
            raise ValueError(text)
        return cls(int(rank), what, int(count))

    def __str__(self) -> str:
        when = f"after {self.count} ms" if self.what == "clock" else f"at {self.what} {self.count}"
        return f"rank {self.rank} {when}{'' if self.merciful else ', all others too'}"


def draw_death(draw: random.Random, num_ranks: int) -> Death:
    rank = draw.randrange(num_ranks)
    what = draw.choice(sorted(MOMENTS[min(rank, 1)]))
    return Death(rank, what, draw.randint(1, MOMENTS[min(rank, 1)][what]), draw.random() < 0.5)


def train(arguments: Sequence[str], death: Death | None, obituary: Path) -> None:
    """This rank's life; if it is the one to die, it leaves the file `obituary`."""
    if death is not None and int(os.environ["RANK"]) == death.rank:
        if death.what == "clock":
            threading.Thread(target=_die_after, args=(death.count / 1000, obituary), daemon=True).start()
        else:
            _die_at(death.count, obituary, *WHAT[death.what])
    pretrain(parse_or_exit(arguments, os.environ))


def _die(obituary: Path) -> None:
    obituary.touch()
    os.kill(os.getpid(), signal.SIGKILL)


def _die_after(seconds: float, obituary: Path) -> None:
    time.sleep(seconds)
    _die(obituary)


def _die_at(count: int, obituary: Path, owner, name: str, counts: Callable[..., bool] = lambda *_, **__: True) -> None:
    """`owner.name` works `count - 1` times more; instead of the next call that `counts` this process is gone."""
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.extend([None] * counts(*args, **kwargs))
        if len(calls) == count:
            _die(obituary)
        return real(*args, **kwargs)

    setattr(owner, name, call)


def obituary(path: Path, life: int) -> Path:
    return path.with_name(f"{path.stem}-died-{life}")


def write_plan(path: Path, deaths: Sequence[Death]) -> None:
    path.write_text(json.dumps([asdict(death) for death in deaths]))


def main() -> None:
    path, life = Path(sys.argv[1]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    deaths = [Death(**fields) for fields in json.loads(path.read_text())]
    train(sys.argv[2:], deaths[life] if life < len(deaths) else None, obituary(path, life))


if __name__ == "__main__":
    main()
