"""The directory beside SAVE in which files wait until all are finished, and what a killed run left there.

    SAVE.incomplete/plan.json        what is being made, from which files; another plan starts anew
                   /output/          finished files under their names, unfinished ones as NAME.tmp
                   /finished/NAME.json   fingerprint of a finished file, written after it
                   /finished/rank-R-RUN.json   written when a rank has finished its files

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
    """The directory `root`, SAVE.incomplete, which all ranks share."""

    root: Path

    @property
    def output(self) -> Path:
        return self.root / "output"

    def begin(self, plan: dict) -> bool:
        """Make the directories, or keep the files that an earlier run of the same plan finished.

        Return whether there was such a run.
        """
        found = self._plan()
        if found is not None and found != plan:
            shutil.rmtree(self.root)
        for directory in (self.output, self.root / "finished"):
            directory.mkdir(parents=True, exist_ok=True)
        write_aside(self.root / "plan.json", json.dumps(plan))
        return found == plan

    def join(self, plan: dict) -> None:
        """Wait, on ranks other than 0, until rank 0 has begun."""
        while self._plan() != plan:
            time.sleep(_POLL_SECONDS)

    def published(self, plan: dict, destination: Path) -> bool:
        """Return whether an earlier run of the same plan got as far as the rename to `destination`."""
        return self._plan() == plan and destination.is_dir() and not self.output.exists()

    def _plan(self) -> dict | None:
        try:
            return read_json(self.root / "plan.json")
        except ValueError:
            return None

    def temporary(self, name: str) -> Path:
        return self.output / f"{name}.tmp"

    def finish(self, name: str, fingerprint: Fingerprint) -> None:
        """Give a file that was written under its temporary name its own name, and keep its fingerprint."""
        os.replace(self.temporary(name), self.output / name)
        write_aside(self._note_file(name), json.dumps(fingerprint.to_json()))

    def finished(self, name: str) -> Fingerprint | None:
        """Return the fingerprint of a finished file; None if the file, which is read for it, is not intact."""
        fingerprint = self.fingerprint(name)
        return fingerprint if fingerprint is not None and verify(self.output / name, fingerprint) else None

    def fingerprint(self, name: str) -> Fingerprint | None:
        """Return the fingerprint that was kept of a finished file, None if there is none."""
        try:
            return Fingerprint.from_json(read_json(self._note_file(name), LARGEST_LIST))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def leave(self, rank: int, run: str) -> None:
        """Say that this rank has finished its files, or found all of them published."""
        (self.root / "finished").mkdir(parents=True, exist_ok=True)  # a run may have been killed while it removed it
        write_aside(self._note_file(f"rank-{rank}-{run}"), "{}")

    def wait(self, world_size: int, run: str) -> None:
        """Wait until every rank has left. A rank that fails ends the job, and this wait with it."""
        while not all(self._note_file(f"rank-{rank}-{run}").exists() for rank in range(world_size)):
            time.sleep(_POLL_SECONDS)

    def forget(self, name: str) -> None:
        self._note_file(name).unlink(missing_ok=True)

    def _note_file(self, name: str) -> Path:
        return self.root / "finished" / f"{name}.json"

    def sweep(self) -> None:
        """Remove the unfinished files of a killed run that no rank has written anew."""
        for leftover in self.output.glob("*.tmp"):
            leftover.unlink()

    def publish(self, destination: Path) -> None:
        """Rename the output to `destination`, which must be free or an empty directory."""
        os.rename(self.output, destination)

    def remove(self) -> None:
        shutil.rmtree(self.root)


def write_aside(path: Path, text: str) -> None:
    """Write a text file that is whole from the moment it has its name."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
