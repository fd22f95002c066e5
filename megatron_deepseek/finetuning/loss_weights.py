"""The loss weights beside an indexed dataset: runs of tokens with the same weight, a few for each conversation.

    "DSLOSSW1", samples (uint64), runs (uint64), first run of each sample and the end (uint64 [samples + 1]),
    runs (uint32 tokens, float32 weight), all little-endian

A float for each token would double the size of the dataset.
"""

import os
import struct
from array import array
from pathlib import Path

import numpy as np

MAGIC = b"DSLOSSW1"
HEADER = struct.Struct("<8sQQ")
RUN = np.dtype([("tokens", "<u4"), ("weight", "<f4")])


class WeightsWriter:
    """Gathers runs, 8 bytes each, and writes them whole or not at all."""

    def __init__(self):
        self.counts, self.tokens, self.weights = array("I"), array("I"), array("f")

    def add(self, runs):
        """Add the runs of the next sample."""
        self.counts.append(len(runs))
        for tokens, weight in runs:
            self.tokens.append(tokens)
            self.weights.append(weight)

    def write(self, path: str | os.PathLike):
        runs = np.empty(len(self.tokens), RUN)
        runs["tokens"], runs["weight"] = self.tokens, self.weights
        write_weights(path, np.array(self.counts, np.uint32), [runs])


def write_weights(path: str | os.PathLike, counts: np.ndarray, parts) -> None:
    """Write the file of samples with so many runs each; `parts` yields arrays of RUN, all runs in order."""
    pointers = np.zeros(len(counts) + 1, "<u8")
    np.cumsum(counts, out=pointers[1:])
    aside = f"{os.fspath(path)}.tmp"
    with open(aside, "wb") as file:
        file.write(HEADER.pack(MAGIC, len(counts), int(pointers[-1])))
        file.write(pointers.data)
        for runs in parts:
            file.write(np.ascontiguousarray(runs).data)
    os.replace(aside, path)


class LossWeights:
    """A file of loss weights, mapped. Raise ValueError where it is damaged."""

    def __init__(self, path: str | os.PathLike):
        path = Path(path)
        size = path.stat().st_size if path.is_file() else 0
        header = path.read_bytes()[:HEADER.size] if 0 < size < 1 << 12 else b""
        if size >= HEADER.size:
            with open(path, "rb") as file:
                header = file.read(HEADER.size)
        magic, samples, runs = HEADER.unpack(header) if len(header) == HEADER.size else (b"", 0, 0)
        self.pointers_end = HEADER.size + 8 * (samples + 1)
        if magic != MAGIC or size != self.pointers_end + RUN.itemsize * runs:
            raise ValueError(f"{path} is no whole file of loss weights; remove it, and it is made again")
        self.pointers = np.memmap(path, "<u8", "r", HEADER.size, (samples + 1,))
        self.runs = np.memmap(path, RUN, "r", self.pointers_end, (runs,)) if runs else np.empty(0, RUN)

    def __len__(self) -> int:
        return len(self.pointers) - 1

    @property
    def counts(self) -> np.ndarray:
        """Return the number of runs of each sample."""
        return np.diff(self.pointers).astype(np.uint32)

    @property
    def labels(self) -> np.ndarray:
        """Return how many tokens of each sample have a weight, its first, which is no label, left out; int64."""
        weighted = np.where(self.runs["weight"] != 0, self.runs["tokens"], 0)
        ends = np.concatenate([[0], np.cumsum(weighted, dtype=np.int64)])
        first = np.concatenate([weighted, [0]])[self.pointers[:-1].astype(np.int64)] > 0
        return np.diff(ends[self.pointers.astype(np.int64)]) - (first & (self.counts > 0))

    def of(self, sample: int) -> np.ndarray:
        """Return the weight of each token of a sample, float32."""
        own = self.runs[int(self.pointers[sample]):int(self.pointers[sample + 1])]
        return np.repeat(own["weight"], own["tokens"])
