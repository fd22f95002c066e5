"""Where a conversion's output waits until it is whole, and what a killed conversion left there.

    SAVE.incomplete/plan.json        what is being made, from which files; another plan starts anew
                   /output/          finished files under their names, unfinished ones as NAME.tmp
                   /finished/NAME.json   size and checksums of a finished file, written after it

`output` becomes SAVE by one rename.
"""

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_deepseek.checkpoint.fingerprints import Fingerprint, verify
from megatron_deepseek.foreign_json import LARGEST_LIST, read_json

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Workspace:
    root: Path

    @property
    def output(self) -> Path:
        return self.root / "output"

    def begin(self, plan: dict) -> bool:
        """Make the directories, or keep what an earlier run of the same plan finished. True if there was one."""
        found = self._plan()
        if found is not None and found != plan:
            shutil.rmtree(self.root)
        for directory in (self.output, self.root / "finished"):
            directory.mkdir(parents=True, exist_ok=True)
        write_aside(self.root / "plan.json", json.dumps(plan))
        return found == plan

    def join(self, plan: dict) -> None:
        """On the other ranks of a torchrun job: wait until rank 0 has begun."""
        while self._plan() != plan:
            time.sleep(_POLL_SECONDS)

    def published(self, plan: dict, target: Path) -> bool:
        """Whether an earlier run got as far as the rename."""
        return self._plan() == plan and target.is_dir() and not self.output.exists()

    def _plan(self) -> dict | None:
        try:
            return read_json(self.root / "plan.json")
        except ValueError:
            return None

    def temporary(self, name: str) -> Path:
        return self.output / f"{name}.tmp"

    def finish(self, name: str, fingerprint: Fingerprint) -> None:
        os.replace(self.temporary(name), self.output / name)
        write_aside(self._note(name), json.dumps(fingerprint.to_json()))

    def finished(self, name: str) -> Fingerprint | None:
        """The fingerprint of a file that was finished and is intact."""
        fingerprint = self.fingerprint(name)
        return fingerprint if fingerprint is not None and verify(self.output / name, fingerprint) else None

    def fingerprint(self, name: str) -> Fingerprint | None:
        try:
            return Fingerprint.from_json(read_json(self._note(name), LARGEST_LIST))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def leave(self, rank: int, run: str) -> None:
        """Say that this rank has finished its files, or found all of them published."""
        (self.root / "finished").mkdir(parents=True, exist_ok=True)  # a kill may have fallen into the removal
        write_aside(self._note(f"rank-{rank}-{run}"), "{}")

    def wait(self, world_size: int, run: str) -> None:
        """Until every rank has left. A rank that fails ends the job, and this wait."""
        while not all(self._note(f"rank-{rank}-{run}").exists() for rank in range(world_size)):
            time.sleep(_POLL_SECONDS)

    def forget(self, name: str) -> None:
        self._note(name).unlink(missing_ok=True)

    def _note(self, name: str) -> Path:
        return self.root / "finished" / f"{name}.json"

    def sweep(self) -> None:
        """Remove what a killed run left unfinished and nobody took up."""
        for leftover in self.output.glob("*.tmp"):
            leftover.unlink()

    def publish(self, target: Path) -> None:
        """Give the output its name, which must be free or an empty directory."""
        os.rename(self.output, target)

    def remove(self) -> None:
        shutil.rmtree(self.root)


def write_aside(path: Path, text: str) -> None:
    """A text file that is whole under its name from the first moment."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
