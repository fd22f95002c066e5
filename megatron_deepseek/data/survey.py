"""A survey of a dataset before it is indexed: its counts, checked by reading it once and remembered in the cache.

A survey reads the whole .idx and up to MOST_TOKENS_SCANNED ids of a blend. Its record holds sizes and times of change
of both files: as long as they stay, the next start reads the record and nothing else. A digest of the record and its
name reveals whether the record is as it was written.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from megatron_deepseek.data.cache import replacing
from megatron_deepseek.data.index_file import open_index
from megatron_deepseek.data.indexed import MOST_TOKENS_SCANNED, TOKENS_PER_CHUNK, open_indexed, token_range
from megatron_deepseek.foreign_json import read_json

THREADS = 16
VERSION = 2


@dataclass(frozen=True)
class Survey:
    """The counts of a dataset. It is `contiguous` where its sequences lie end to end.

    `least` and `greatest` are the extremes of the `scanned` ids, which are spread over the file. `digest` is that of
    the lengths, on which the indices depend: data made anew under an old name has other indices.
    """

    prefix: str
    token_dtype: str
    sequences: int
    tokens: int
    contiguous: bool
    digest: str
    least: int
    greatest: int
    scanned: int

    def tokens_between(self, first: int, end: int) -> int:
        """Return the number of tokens in the sequences [first, end)."""
        index = open_index(self.prefix, "dataset")
        if not self.contiguous:
            return sum(int(chunk.sum(dtype=np.int64)) for chunk in index.read(index.lengths, first, end))
        if first >= end:
            return 0
        last = index.at(index.pointers, end - 1) + index.at(index.lengths, end - 1) * index.token_dtype.itemsize
        return (last - index.at(index.pointers, first)) // index.token_dtype.itemsize


def survey_all(prefixes, argument: str, folder: Path) -> list[Survey]:
    """Return a survey of each prefix, made by threads or taken from its record in `folder` where that still holds.

    Raise the ValueError of `open_indexed` for the first prefix that has one.
    """
    most_tokens = max(TOKENS_PER_CHUNK, MOST_TOKENS_SCANNED // len(prefixes))
    with ThreadPoolExecutor(min(THREADS, len(prefixes)), "survey") as pool:
        try:
            return list(pool.map(lambda prefix: _survey(prefix, argument, folder, most_tokens), prefixes))
        finally:
            pool.shutdown(cancel_futures=True)


def _survey(prefix: str, argument: str, folder: Path, most_tokens: int) -> Survey:
    name = hashlib.blake2b(os.path.abspath(prefix).encode(), digest_size=16).hexdigest()
    record = folder / f"{name}.survey.json"
    stamps = _stamps(prefix)
    known = _read(record, stamps)
    if known is not None and known.scanned >= min(most_tokens, known.tokens):
        return dataclasses.replace(known, prefix=prefix)
    survey = _look(prefix, argument, most_tokens)
    written = {"version": VERSION, "stamps": stamps, "survey": dataclasses.asdict(survey)}
    with contextlib.suppress(ValueError), replacing(record) as file:  # it only saves time: a cache may be read-only
        file.write(json.dumps(written | {"digest": _digest(record.name, written)}).encode())
    return survey


def _digest(name: str, written: dict) -> str:
    return xxhash.xxh3_128_hexdigest((name + json.dumps(written, sort_keys=True)).encode())


def _stamps(prefix: str) -> list[list[int]] | None:
    """Return size and time of change (ns) of both files, None where one is missing."""
    try:
        stats = [os.stat(prefix + suffix) for suffix in (".idx", ".bin")]
    except OSError:
        return None
    return [[stat.st_size, stat.st_mtime_ns] for stat in stats]


def _read(record: Path, stamps) -> Survey | None:
    try:
        written = read_json(record)
        if written.pop("digest") != _digest(record.name, written) or written["version"] != VERSION \
                or written["stamps"] != stamps:
            return None
        return Survey(**written["survey"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _look(prefix: str, argument: str, most_tokens: int) -> Survey:
    file = open_indexed(prefix, argument)
    index = open_index(prefix, argument)
    itemsize, end, contiguous = index.token_dtype.itemsize, 0, True
    digest = hashlib.blake2b(digest_size=16)
    for lengths, pointers in zip(index.read(index.lengths), index.read(index.pointers)):
        digest.update(lengths.data)
        ends = pointers + lengths.astype(np.int64) * itemsize
        contiguous &= pointers[0] == end and bool((pointers[1:] == ends[:-1]).all())
        end = int(ends[-1])
    least, greatest = token_range(file, most_tokens)
    return Survey(prefix, index.token_dtype.name, index.num_sequences, len(file.ids), bool(contiguous),
                  digest.hexdigest(), least, greatest, min(most_tokens, len(file.ids)))
