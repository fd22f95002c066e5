"""The settings of tools/preprocess_data.py. Fields are named like its arguments, and these as in Megatron-LM's tool.

There are three objects, by what a change of them means: `Content` decides the bytes of every part, so parts of another
content are never used; `Selection` decides only which documents of the parts are taken, and in which order; `Execution`
changes no byte.
"""

import os
from dataclasses import dataclass

from megatron_deepseek.data.index_file import check_output_prefix

INPUT_FORMATS = ("auto", "jsonl", "text", "parquet", "wikitext")
TEXT_UNITS = ("file", "line")
WIKITEXT_UNITS = ("article", "section")
BACKENDS = ("auto", "gigatoken", "tokenizers")


def _argument(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_range(settings, name: str, least, most=None):
    value = getattr(settings, name)
    if value is not None and (value < least or most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{_argument(name)} {value}: it must be {bounds}")


def _check_choice(settings, name: str, choices):
    if getattr(settings, name) not in choices:
        raise ValueError(f"{_argument(name)} {getattr(settings, name)} is not one of {', '.join(map(str, choices))}")


@dataclass(frozen=True)
class Content:
    """The treatment of each document by itself.

    Whether a document is rearranged (FIM), and where it is cut, is drawn from `seed` and from where it begins:
    its file's place in the input and its byte (or row) there. It does not depend on the number of documents before it.
    """

    json_keys: tuple[str, ...] = ("text",)
    input_format: str = "auto"
    text_unit: str = "file"
    split_sentences: bool = False
    keep_newlines: bool = False
    lang: str = "english"
    nltk_data_dir: str | None = None
    tokenizer_type: str = "HuggingFaceTokenizer"
    tokenizer_model: str | None = None
    append_bos: bool = False
    append_eod: bool = False
    min_chars: int = 0
    max_chars: int | None = None
    fim_rate: float = 0.0
    fim_spm_rate: float = 0.0
    seed: int = 1234

    def __post_init__(self):
        repeated = next((key for key in self.json_keys if self.json_keys.count(key) > 1), None)
        if repeated is not None:
            raise ValueError(f"--json-keys {' '.join(self.json_keys)}: {repeated} is given twice")
        separated = next((key for key in self.json_keys if os.sep in key or not key), None)
        if separated is not None:
            raise ValueError(f"--json-keys {separated}: names a file of the output, so it cannot be empty or hold "
                             f"{os.sep!r}; a nested key is written with dots")
        _check_choice(self, "input_format", INPUT_FORMATS)
        _check_choice(self, "text_unit", WIKITEXT_UNITS if self.input_format == "wikitext" else TEXT_UNITS)
        _check_range(self, "min_chars", 0)
        _check_range(self, "max_chars", max(1, self.min_chars))
        _check_range(self, "fim_rate", 0, 1)
        _check_range(self, "fim_spm_rate", 0, 1)
        if self.fim_rate and self.split_sentences:
            raise ValueError(f"--fim-rate {self.fim_rate} and --split-sentences cannot be combined: a document filled "
                             f"in the middle is one sequence")

    @property
    def level(self) -> str:
        return "sentence" if self.split_sentences else "document"


@dataclass(frozen=True)
class Selection:
    """The documents to keep: the first of equal ones, then the first `max_documents` of these, then shuffled.

    With a `seq_length` their ids are laid end to end and cut into documents of seq_length + 1; what is left is dropped.
    """

    dedup: str | None = None
    max_documents: int | None = None
    shuffle_seed: int | None = None
    seq_length: int | None = None

    def __post_init__(self):
        _check_choice(self, "dedup", (None, "exact"))
        _check_range(self, "max_documents", 1)
        _check_range(self, "shuffle_seed", 0)
        _check_range(self, "seq_length", 1)

    @property
    def needs_records(self) -> bool:
        return self.dedup is not None or self.shuffle_seed is not None


@dataclass(frozen=True)
class Execution:
    """How the work is done and what is tolerated; `part_bytes` None lets the size of the input decide."""

    workers: int = 1
    rank: int = 0
    world_size: int = 1
    part_bytes: int | None = None
    tokenizer_backend: str = "auto"
    merge: bool = True
    on_error: str = "skip"
    max_errors: int = 1000
    allow_damaged_files: int = 0
    log_interval: int = 1000
    discard_parts: bool = False
    overwrite: bool = False

    def __post_init__(self):
        for name in ("workers", "world_size", "part_bytes", "log_interval"):
            _check_range(self, name, 1)
        _check_range(self, "max_errors", 0)
        _check_range(self, "allow_damaged_files", 0)
        _check_choice(self, "tokenizer_backend", BACKENDS)
        _check_choice(self, "on_error", ("skip", "fail"))
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"--rank {self.rank} is not in [0, --world-size {self.world_size})")


@dataclass(frozen=True)
class PreprocessSettings:
    """All settings of a run. `input` are the patterns of its files."""

    input: tuple[str, ...]
    output_prefix: str
    content: Content = Content()
    selection: Selection = Selection()
    execution: Execution = Execution()

    def __post_init__(self):
        check_output_prefix(self.output_prefix)
        for option, given in (("--split-sentences", self.content.split_sentences),
                              ("--no-merge", not self.execution.merge)):
            if given and self.selection.seq_length is not None:
                raise ValueError(f"--seq-length {self.selection.seq_length} and {option} cannot be combined: the ids "
                                 f"of all documents are cut anew")
        if "-" in self.input and self.content.input_format == "wikitext":
            raise ValueError("--input -: WikiText's articles are found in files, not in standard input")
        if "-" in self.input and (len(self.input) > 1 or self.execution.world_size > 1):
            raise ValueError(f"--input {' '.join(self.input)}: standard input goes alone, and to one machine "
                             f"(--world-size {self.execution.world_size})")

    def prefix_of(self, key: str) -> str:
        """Return the prefix of a key's dataset, which `--data-path` takes afterwards."""
        return f"{self.output_prefix}_{key}_{self.content.level}"

    @property
    def prefixes(self) -> tuple[str, ...]:
        return tuple(map(self.prefix_of, self.content.json_keys))

    @property
    def parts_directory(self) -> str:
        return f"{self.output_prefix}.parts"
