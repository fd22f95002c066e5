"""base.json of a checkpoint that holds adapters alone: which base they belong to, and what they are.

    {"directory": "/models/v3", "hash": "9f...", "form": "plain", "lora_rank": 8, "lora_alpha": 16.0, ...}

The hash is of the base's numbers as they were loaded (checkpoint/job/base_hash.py), whatever files they come from.
`form`: in which the run kept them, "plain" or that of --quantization-bit.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_deepseek.foreign_json import read_object
from megatron_deepseek.model.architecture.adapters import LoraSettings
from megatron_deepseek.model.architecture.base_weights import BaseSettings

BASE = "base.json"
PLAIN = "plain"


@dataclass(frozen=True)
class Base:
    """The base of adapters: the directory that it was loaded from, the hash of its numbers, and what they are kept as.
    """

    directory: Path
    hash: str
    form: str = PLAIN

    def note(self, lora: LoraSettings) -> dict[str, Any]:
        """Return the content of base.json."""
        return {"directory": str(self.directory), "hash": self.hash, "form": self.form, **asdict(lora)}


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
    return Base(Path(found.text("directory")), found.text("hash"), found.text("form", default=PLAIN)), lora


def form_of(settings: BaseSettings | None) -> str:
    """Return in a word or two what the weights of a base are kept as."""
    return PLAIN if settings is None else settings.form


def check_adapters(directory: Path, lora: LoraSettings | None, form: str = PLAIN) -> None:
    """Raise ValueError unless a run with `lora`, beside a base that it keeps in `form`, can go on from a checkpoint:
    with a base of its own, or with weights.
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
    if base.form != form:
        raise ValueError(f"--load {directory} holds adapters beside base weights that are {base.form}, in this run "
                         f"they are {form}: see --quantization-bit and --double-quantization")
    if not base.directory.is_dir():
        raise ValueError(f"--load {directory} holds adapters of the base {base.directory}, which is not there")
