"""The folder of a run's parts, from which the same command continues.

`plan.json` holds the input, the settings and the size of the parts. It is written once, by the rank that comes first; a
run with another plan is refused and told the difference. Each part has its summary; see part.py.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from megatron_deepseek.data.naming import naming
from megatron_deepseek.data.preprocess.files import checksum_of
from megatron_deepseek.data.preprocess.inputs import InputFile
from megatron_deepseek.data.preprocess.part import PartMaker, Summary, read_summary
from megatron_deepseek.data.preprocess.plan import Part
from megatron_deepseek.data.preprocess.settings import PreprocessSettings
from megatron_deepseek.data.tokenizer import find_tokenizer_json
from megatron_deepseek.foreign_json import LARGEST_LIST, read_object

VERSION = 2
SECONDS_FOR_ORPHANS = 3.0


def describe(settings: PreprocessSettings, input_files: list[InputFile]) -> dict:
    """Return all that decides the bytes of the parts, except where they are cut and which library tokenises."""
    content = asdict(settings.content)
    for path in ("tokenizer_model", "nltk_data_dir"):
        content.pop(path)
    inputs = [[input_file.path, input_file.size, input_file.modified] for input_file in input_files]
    records = {"dedup": settings.selection.dedup, "records": settings.selection.needs_records}
    described = {"version": VERSION, **content, **records, "tokenizer": _tokenizer_digest(settings), "inputs": inputs}
    return json.loads(json.dumps(described))


def _tokenizer_digest(settings: PreprocessSettings) -> str:
    content = settings.content
    if content.tokenizer_type != "HuggingFaceTokenizer":
        return str(content.tokenizer_model)
    path, digest = find_tokenizer_json(content.tokenizer_model), hashlib.sha256()
    for each in (path, path.with_name("tokenizer_config.json")):
        digest.update(each.read_bytes() if each.is_file() else b"-")
    return digest.hexdigest()


class Ledger:
    """The parts in `settings.parts_directory`. Use it within `opened`."""

    def __init__(self, settings: PreprocessSettings):
        self.settings = settings
        self.directory = Path(settings.parts_directory)

    @property
    def has_plan(self) -> bool:
        """Return whether there is a run to be continued."""
        return not self.settings.execution.discard_parts and (self.directory / "plan.json").exists()

    @contextlib.contextmanager
    def opened(self) -> Iterator["Ledger"]:
        """Lock the folder for this rank while the block runs. Raise ValueError if another process has it."""
        if self.settings.execution.discard_parts:
            shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._locked(f"rank-{self.settings.execution.rank}.lock"):
            yield self

    @contextlib.contextmanager
    def _locked(self, name: str):
        with open(self.directory / name, "w") as file:
            deadline = time.monotonic() + SECONDS_FOR_ORPHANS
            while not _try_lock(file):
                if time.monotonic() > deadline:
                    raise ValueError(f"--output-prefix {self.settings.output_prefix}: another process is working on "
                                     f"{self.directory} (as rank {self.settings.execution.rank})")
                time.sleep(0.1)
            yield

    @contextlib.contextmanager
    def assembling(self):
        """Yield whether this process may assemble: not while another rank does, nor after one has."""
        try:
            file = open(self.directory / "assembly.lock", "w")
        except FileNotFoundError:  # the folder is gone: another rank has assembled
            yield False
            return
        with file:
            yield _try_lock(file) and (self.directory / "plan.json").exists()

    def read_plan(self, described: dict) -> dict | None:
        """Return the plan that was written, or None. Raise ValueError where it is not for `described`."""
        path = self.directory / "plan.json"
        if not path.exists():
            return None
        try:
            plan = read_object(path, LARGEST_LIST)
            theirs = plan.object("described").fields
        except ValueError as error:
            raise ValueError(f"{error}; --discard-parts starts over") from error
        different = _first_difference(theirs, described)
        if different is not None:
            raise ValueError(f"--output-prefix {self.settings.output_prefix}: {self.directory} holds parts of another "
                             f"run: {different}. Run that one again to finish it, or start over with --discard-parts")
        return dict(plan.fields)

    def write_plan(self, plan: dict) -> dict:
        """Write the plan unless another rank was faster, and return the one that was written."""
        aside = self.directory / f"plan.json.{self.settings.execution.rank}"
        with naming(aside):
            aside.write_text(json.dumps(plan))
        try:
            os.link(aside, self.directory / "plan.json")
        except FileExistsError:
            pass
        aside.unlink()
        return self.read_plan(plan["described"])

    def spool_path(self, part: int) -> str:
        return str(self.directory / f"{part:08d}.spool")

    def has(self, part: int) -> bool:
        return self.summary_path(part).exists()

    def summary_path(self, part: int) -> Path:
        return self.directory / f"{part:08d}.json"

    def summary(self, part: int) -> Summary:
        return read_summary(self.summary_path(part))

    def finished(self, part: Part, maker: PartMaker) -> Summary | None:
        """Return the summary of a part that is whole, else None. Raise ValueError if its input has changed."""
        try:
            summary = self.summary(part.number)
            base = str(self.directory / part.name)
            sound = all(checksum_of(base + ending) == summary.checksums[ending] for ending in maker.endings())
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        if not sound:
            return None
        if summary.input_checksum != part.checksum:
            raise ValueError(f"--input {part.segments[0].input_file.path}: part {part.number} of it is not what it was "
                             f"when the parts in {self.directory} were made: --discard-parts starts over")
        return summary

    def remove(self):
        shutil.rmtree(self.directory, ignore_errors=True)


def _try_lock(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def _first_difference(theirs: dict, ours: dict) -> str | None:
    for name in ours:
        if theirs.get(name) != ours[name]:
            if name == "inputs":
                return _input_difference(theirs[name], ours[name])
            return f"{name} was {theirs.get(name)!r} and is {ours[name]!r}"
    return None


def _input_difference(theirs: list, ours: list) -> str:
    if len(theirs) != len(ours):
        return f"the input was {len(theirs)} files and is {len(ours)}"
    old, new = next((old, new) for old, new in zip(theirs, ours) if old != new)
    return f"{new[0]} was {old[0]}" if old[0] != new[0] else f"{new[0]} has changed since"
