"""A cache of a teacher's predictions on disk: of each label token the K likeliest ids, and what is left for all others.

    DIR/cache.json            of which teacher, tokenizer, K and temperature it is
    DIR/DATASET/ids.npy                 int32 [N, K]            the likeliest first
               /log_probabilities.npy   float16 or 32 [N, K]    of these ids, nats
               /log_rest.npy            float16 or 32 [N]       the log of what all other ids have together
               /done.npy                bool [samples]          whether a sample's rows are all there

DATASET is a hash of a dataset's tokens and loss weights; its N rows are the label tokens of all samples, in order. A
sample is marked as done after its numbers are on the disk, so a killed job leaves a cache that the next one goes on
with. All of it may be deleted at any time.
"""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import xxhash

from megatron_deepseek.checkpoint.integrity import checksum_file
from megatron_deepseek.finetuning.loss_weights import LossWeights
from megatron_deepseek.foreign_json import read_object

FILE = "cache.json"
VERSION = 1
_DTYPES = {"fp16": np.float16, "fp32": np.float32}
_LOWEST = -1e4  # of a logarithm: exp of it is 0, and float16 has it


@dataclass(frozen=True)
class Description:
    """What a cache is of. `teacher` is a hash of its weights and of what they were computed in, `teacher_directory`
    where they were; `vocabulary` a hash of the tokenizer's entries, `vocab_size` the number of ids that were compared.
    """

    teacher: str
    teacher_directory: str
    vocabulary: str
    vocab_size: int
    top_k: int
    kd_temperature: float
    cache_dtype: str
    version: int = VERSION

    @classmethod
    def read(cls, directory: Path) -> "Description":
        """Return that of a cache. Raise ValueError, of one line, for a file that is none."""
        found = read_object(directory / FILE)
        if found.integer("version") != VERSION:
            raise ValueError(f"{directory / FILE} is of another version of this program: make the cache anew")
        texts = ("teacher", "teacher_directory", "vocabulary", "cache_dtype")
        made = cls(**{name: found.text(name) for name in texts}, vocab_size=found.integer("vocab_size"),
                   top_k=found.integer("top_k"), kd_temperature=found.number("kd_temperature"))
        if made.cache_dtype not in _DTYPES:
            raise ValueError(f"{directory / FILE} has the unknown cache_dtype {made.cache_dtype}")
        return made

    def write(self, directory: Path) -> None:
        """Write it whole or not at all. Raise ValueError where the directory holds another cache."""
        if holds_cache(directory):
            there = Description.read(directory)
            other = [f"{each.name} is {getattr(there, each.name)}, not {getattr(self, each.name)}"
                     for each in fields(self) if each.name != "teacher_directory"
                     and getattr(there, each.name) != getattr(self, each.name)]
            if other:
                raise ValueError(f"--output {directory} holds another cache: {'; '.join(other)}")
            return
        directory.mkdir(parents=True, exist_ok=True)
        aside = directory / f"{FILE}.tmp"
        aside.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(aside, directory / FILE)

    @property
    def bytes_of_a_label(self) -> int:
        """Return the bytes that a label token takes."""
        width = _DTYPES[self.cache_dtype]().itemsize
        return self.top_k * (4 + width) + width


def holds_cache(directory: Path) -> bool:
    return (directory / FILE).is_file()


def dataset_key(prefix: str) -> str:
    """Return a hash of the tokens and the loss weights of a tokenised dataset."""
    files = [str(checksum_file(Path(prefix + ending))) for ending in (".bin", ".idx", ".weights")]
    return xxhash.xxh3_128_hexdigest(json.dumps(files).encode())


class CachedDataset:
    """The cached rows of one tokenised dataset. Arrays are mapped: memory holds what is read."""

    def __init__(self, directory: Path, description: Description, prefix: str, key: str):
        self.folder, self.description = directory / key, description
        labels = LossWeights(prefix + ".weights").labels
        self.starts = np.concatenate([[0], np.cumsum(labels)])
        self._arrays: dict[str, np.memmap] = {}

    @property
    def num_samples(self) -> int:
        return len(self.starts) - 1

    @property
    def nbytes(self) -> int:
        """Return the bytes of the whole cache of the dataset, without the files' headers."""
        return int(self.starts[-1]) * self.description.bytes_of_a_label + self.num_samples

    @property
    def _shapes(self) -> dict[str, tuple[type, tuple[int, ...]]]:
        rows, kind = int(self.starts[-1]), _DTYPES[self.description.cache_dtype]
        return {"ids": (np.int32, (rows, self.description.top_k)),
                "log_probabilities": (kind, (rows, self.description.top_k)), "log_rest": (kind, (rows,)),
                "done": (np.bool_, (self.num_samples,))}

    def open(self) -> bool:
        """Map the files for reading, and return whether all are there and whole."""
        self._arrays = {name: found for name in self._shapes if (found := self._mapped(name, "r")) is not None}
        return len(self._arrays) == len(self._shapes)

    def open_to_write(self) -> None:
        """Map the files for writing. Make all of them anew, empty, unless all are there and whole.

        Raise OSError if there is no room for them.
        """
        if not self.open():
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in self._shapes:  # `done` is the last
                self._make(name)
        self._arrays = {name: self._mapped(name, "r+") for name in self._shapes}

    def _make(self, name: str) -> None:
        kind, shape = self._shapes[name]
        path = self.folder / f"{name}.npy"
        aside = path.with_suffix(".tmp")
        with open(aside, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)),
                                                        "fortran_order": False, "shape": shape})
            size = file.tell() + int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
            os.posix_fallocate(file.fileno(), 0, size)  # zeros: a mapped file that meets a full disk ends the process
        os.replace(aside, path)

    def _mapped(self, name: str, mode: str) -> np.memmap | None:
        kind, shape = self._shapes[name]
        path = self.folder / f"{name}.npy"
        try:
            size, found = path.stat().st_size, np.lib.format.open_memmap(path, mode)
        except (OSError, ValueError):
            return None
        whole = size == found.offset + found.nbytes and found.dtype == kind and found.shape == shape
        return found if whole else None

    @property
    def done(self) -> np.ndarray:
        """Return which samples are there, bool [samples]."""
        return self._arrays["done"]

    def of(self, sample: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ids, log-probabilities and the log of the rest of a sample's labels, [n, K], [n, K] and [n]."""
        rows = slice(*self.starts[sample:sample + 2])
        return tuple(self._arrays[name][rows] for name in ("ids", "log_probabilities", "log_rest"))

    def keep(self, sample: int, ids: np.ndarray, log_probabilities: np.ndarray, log_rest: np.ndarray) -> None:
        """Write the rows of a sample; `finish` says afterwards that they are there."""
        rows = slice(*self.starts[sample:sample + 2])
        self._arrays["ids"][rows] = ids
        self._arrays["log_probabilities"][rows] = np.maximum(log_probabilities, _LOWEST)
        self._arrays["log_rest"][rows] = np.maximum(log_rest, _LOWEST)

    def finish(self, samples: list[int]) -> None:
        """Mark samples as done, once their rows are on the disk."""
        for name in ("ids", "log_probabilities", "log_rest"):
            self._arrays[name].flush()
        self.done[samples] = True
        self.done.flush()
