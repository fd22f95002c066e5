"""base.json of a checkpoint that holds adapters alone: which base they belong to, and what they are.

    {"directory": "/models/v3", "hash": "9f...", "lora_rank": 8, "lora_alpha": 16.0, "lora_target": ["all"], ...}

The hash is of the base's numbers as they were loaded (checkpoint/job/base_hash.py), whatever files they come from.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_deepseek.foreign_json import read_object
from megatron_deepseek.model.architecture.adapters import LoraSettings

BASE = "base.json"


@dataclass(frozen=True)
class Base:
    """The base of adapters: the directory that it was loaded from, and the hash of its numbers."""

    directory: Path
    hash: str

    def note(self, lora: LoraSettings) -> dict[str, Any]:
        """Return the content of base.json."""
        return {"directory": str(self.directory), "hash": self.hash, **asdict(lora)}


def holds_adapters(directory: Path) -> bool:
    """Return whether a checkpoint holds adapters alone."""
    return (directory / BASE).is_file()


def read_base(directory: Path) -> tuple[Base, LoraSettings]:
    """Read base.json; raise ValueError if it is damaged."""
    found = read_object(directory / BASE)
    targets = found.list("lora_target")
    if not targets or not all(isinstance(target, str) for target in targets):
        raise found.fault("lora_target", "not a list of names")
    lora = LoraSettings(found.integer("lora_rank", 1), found.number("lora_alpha"), tuple(targets),
                        found.boolean("lora_rs"), found.number("lora_dropout", 0.0, 1.0, default=0.0))
    return Base(Path(found.text("directory")), found.text("hash")), lora


def check_adapters(directory: Path, lora: LoraSettings | None) -> None:
    """Raise ValueError unless a run with `lora` can go on from a checkpoint: with a base of its own, or with weights.
    """
    if not holds_adapters(directory):
        return
    base, saved = read_base(directory)
    if lora is None:
        raise ValueError(f"--load {directory} holds adapters of rank {saved.lora_rank} alone, of the base "
                         f"{base.directory}: --lora-rank goes on with them, tools/merge_lora.py merges them into it")
    for option, there, here in (("--lora-rank", saved.lora_rank, lora.lora_rank),
                                ("--lora-alpha", saved.lora_alpha, lora.lora_alpha),
                                ("--lora-rs", saved.lora_rs, lora.lora_rs),
                                ("--lora-target", " ".join(saved.lora_target), " ".join(lora.lora_target))):
        if there != here:
            raise ValueError(f"--load {directory} holds adapters of {option} {there}, this run has {here}")
    if not base.directory.is_dir():
        raise ValueError(f"--load {directory} holds adapters of the base {base.directory}, which is not there")
