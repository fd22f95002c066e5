"""Joining indexed datasets into one without reading a token: .bin files are copied by the kernel, .idx files by chunks.

The result has the bytes of megatron-core's IndexedDatasetBuilder.add_index, which holds every length in Python lists
and copies in one thread. Memory here is 8 MB for each worker, whatever the sizes.
"""

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_deepseek.data.index_file import HEADER, MAGIC, TOKEN_DTYPES, IndexFile, index_damage, open_index
from megatron_deepseek.data.indexed import discard, publish

BYTES_PER_TASK = 1 << 28
BYTES_PER_BLOCK = 1 << 23


def merge_datasets(prefixes, output_prefix: str, workers: int = 1, copied=lambda num_bytes: None) -> IndexFile:
    """Join the datasets of `prefixes`, in order, into `{output_prefix}.bin` and `.idx`; a prefix may come twice.

    `workers` threads copy; `copied` is told of the bytes, from any of them. The output appears whole or not at all.
    ValueError: a dataset that is missing or damaged, dtypes that differ, modes in some datasets only, or an input that
    is the output.
    """
    indices = _open_inputs(prefixes, output_prefix)
    Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
    try:
        _write_bin(output_prefix + ".bin.tmp", [index.prefix + ".bin" for index in indices], workers, copied)
        _write_index(output_prefix + ".idx.tmp", indices)
        publish(output_prefix)
    finally:
        discard(output_prefix)
    return open_index(output_prefix, "merged")


def _open_inputs(prefixes, output_prefix: str) -> list[IndexFile]:
    if not prefixes:
        raise ValueError(f"nothing to merge into {output_prefix}: no datasets are given")
    indices = [open_index(prefix, "dataset") for prefix in prefixes]
    first = indices[0]
    for index in indices:
        if os.path.realpath(index.prefix) == os.path.realpath(output_prefix):
            raise ValueError(f"dataset {index.prefix} is to be merged and is the output too")
        if index.token_dtype != first.token_dtype:
            raise ValueError(f"dataset {index.prefix} has ids of {index.token_dtype.name}, but {first.prefix} of "
                             f"{first.token_dtype.name}: they cannot be merged")
        if index.has_modes != first.has_modes and index.num_sequences and first.num_sequences:
            raise ValueError(f"of {first.prefix} and {index.prefix} only one has modes: they cannot be merged")
        damage = next(index_damage(index), None)
        if damage is not None:
            raise ValueError(f"dataset {index.prefix} is damaged: {damage}")
    return indices


@dataclass(frozen=True)
class _Piece:
    """Bytes [begin, begin + size) of `source`, to be copied to byte `target` of the output."""

    source: str
    begin: int
    target: int
    size: int


def _write_bin(path: str, sources: list[str], workers: int, copied):
    with open(path, "wb") as output, ThreadPoolExecutor(max(1, workers), "merge") as pool:
        pending = [pool.submit(_copy, piece, output.fileno(), copied) for piece in _pieces(sources)]
        try:
            for future in pending:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _pieces(sources: list[str]) -> Iterator[_Piece]:
    target = 0
    for source in sources:
        size = os.path.getsize(source)
        for begin in range(0, size, BYTES_PER_TASK):
            yield _Piece(source, begin, target + begin, min(BYTES_PER_TASK, size - begin))
        target += size


def _copy(piece: _Piece, output: int, copied):
    """By copy_file_range, which shares blocks where the file system can; where it refuses, by reading and writing."""
    done = 0
    with open(piece.source, "rb") as file:
        while done < piece.size:
            count = (_copy_in_kernel(file.fileno(), output, piece, done)
                     or _copy_block(file.fileno(), output, piece, done))
            if not count:
                raise ValueError(f"{piece.source} was cut while it was copied: it ends at byte {piece.begin + done}")
            done += count
            copied(count)


def _copy_in_kernel(source: int, output: int, piece: _Piece, done: int) -> int:
    """Bytes copied; 0 at the end of the source, and on systems and file systems that cannot."""
    try:
        return os.copy_file_range(source, output, min(piece.size - done, BYTES_PER_BLOCK),
                                  piece.begin + done, piece.target + done)
    except (AttributeError, OSError):  # a full disk too: then the write that follows says so
        return 0


def _copy_block(source: int, output: int, piece: _Piece, done: int) -> int:
    block = os.pread(source, min(piece.size - done, BYTES_PER_BLOCK), piece.begin + done)
    written = 0
    while written < len(block):
        written += os.pwrite(output, block[written:], piece.target + done + written)
    return len(block)


def _write_index(path: str, indices: list[IndexFile]):
    """Inputs are sound: shifting their pointers by the bytes before them gives the pointers of the whole."""
    first_sequences = [0, *itertools.accumulate(index.num_sequences for index in indices)]
    first_bytes = [0, *itertools.accumulate(os.path.getsize(index.prefix + ".bin") for index in indices)]
    documents = 1 + sum(index.num_document_entries - 1 for index in indices)
    code = next(code for code, dtype in TOKEN_DTYPES.items() if dtype == indices[0].token_dtype)
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, first_sequences[-1], documents))
        for index in indices:
            _append(file, index.read(index.lengths))
        for index, shift in zip(indices, first_bytes):
            _append(file, (pointers + shift for pointers in index.read(index.pointers)))
        file.write(np.zeros(1, "<i8").data)
        for index, shift in zip(indices, first_sequences):
            entries = (chunk + shift for chunk in index.read(index.documents))
            file.write(next(entries)[1:].data)  # without its 0: the end of the dataset before it
            _append(file, entries)
        for index in indices:
            _append(file, index.read(index.modes))


def _append(file, chunks):
    for chunk in chunks:
        file.write(chunk.data)
