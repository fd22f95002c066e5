"""The choice of documents from the parts and their order, in memory that does not grow with their number.

Whatever needs documents of all parts side by side (equal ones, a random order) is done by scattering rows of 24 bytes
over files by the high bits of a key, so that each file fits in memory and rows that belong together share one.
"""

import errno
import os
from dataclasses import dataclass

import numpy as np

from megatron_deepseek.data.preprocess.part import RECORDS

ROWS = np.dtype([("key", "<u8"), ("key2", "<u8"), ("part", "<u4"), ("document", "<u4")])
ROWS_PER_GROUP = 1 << 18
MOST_GROUPS = 1 << 14


def count_groups(documents: int, workers: int) -> int:
    """Return the number of files to scatter over: small ones, some for every worker. It does not change the outcome."""
    return min(max(-(-documents // ROWS_PER_GROUP), 2 * workers), MOST_GROUPS)


@dataclass(frozen=True)
class Scatter:
    """Rows scattered over files by the high bits of their keys."""

    stem: str
    groups: int

    def path(self, group: int) -> str:
        return f"{self.stem}-{group:05d}"

    def add(self, rows: np.ndarray):
        """Append rows; several processes may at once, as each append is one write."""
        group = ((rows["key"] >> np.uint64(32)) * np.uint64(self.groups)) >> np.uint64(32)
        append_by(group.astype(np.int64), rows, self.path)

    def read(self, group: int) -> np.ndarray:
        """Return the rows of a file, sorted by their keys, then by their place in the input."""
        rows = np.fromfile(self.path(group), ROWS) if os.path.exists(self.path(group)) else np.empty(0, ROWS)
        return rows[np.lexsort((rows["document"], rows["part"], rows["key2"], rows["key"]))]


def append_by(group: np.ndarray, rows: np.ndarray, path_of):
    """Append each row to the file of its group."""
    order = np.argsort(group, kind="stable")
    group, rows = group[order], rows[order]
    starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else []
    for start, end in zip(starts, [*starts[1:], len(group)]):
        with open(path_of(group[start]), "ab", buffering=0) as file:
            content = rows[start:end].tobytes()
            if file.write(content) < len(content):  # unbuffered: a full disk takes a part in silence
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


def hash_rows(part: int, records: np.ndarray) -> np.ndarray:
    return _rows(part, np.arange(len(records)), records["hash"][:, 0], records["hash"][:, 1])


def order_rows(part: int, records: np.ndarray, taken: np.ndarray, seed: int) -> np.ndarray:
    """Return rows with keys drawn from the seed and each document's place in the input, whatever the parts."""
    key = np.full(len(taken), seed, np.uint64)
    for field in ("file", "place"):
        key = _mix(key + records[field][taken].astype(np.uint64))
    return _rows(part, taken, key, 0)


def _rows(part: int, documents: np.ndarray, key, key2) -> np.ndarray:
    rows = np.empty(len(documents), ROWS)
    rows["key"], rows["key2"], rows["part"], rows["document"] = key, key2, part, documents
    return rows


def _mix(value: np.ndarray) -> np.ndarray:
    """Apply splitmix64's step (Steele, Lea and Flood 2014), which turns nearby numbers into independent ones."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)


def repeated_rows(rows: np.ndarray) -> np.ndarray:
    """Return, of sorted rows, those with the same keys as the one before: all but the first of equal documents."""
    same = (rows["key"][1:] == rows["key"][:-1]) & (rows["key2"][1:] == rows["key2"][:-1])
    return rows[1:][same]


def read_records(base: str) -> np.ndarray:
    return np.fromfile(base + ".records", RECORDS)


def read_drops(path: str) -> np.ndarray:
    return np.fromfile(path, "<u4") if os.path.exists(path) else np.empty(0, "<u4")
