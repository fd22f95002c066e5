"""Joining and cutting indexed datasets without reading a token: .bin files are copied by the kernel, .idx by chunks.

A joined dataset has the bytes of megatron-core's IndexedDatasetBuilder.add_index, which holds every length in Python
lists and copies in one thread. This module takes 8 MB of memory for each worker, whatever the sizes.
"""

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_deepseek.data.index_file import HEADER, MAGIC, TOKEN_DTYPES, IndexFile, index_damage, open_index
from megatron_deepseek.data.indexed import discard, publish, written_whole
from megatron_deepseek.data.naming import naming

BYTES_PER_TASK = 1 << 28
BYTES_PER_BLOCK = 1 << 23


def merge_datasets(prefixes, output_prefix: str, workers: int = 1, copied=lambda num_bytes: None) -> IndexFile:
    """Join the datasets of `prefixes`, in order, into `{output_prefix}.bin` and `.idx`; a prefix may come twice.

    `workers` threads copy, and call `copied` with the bytes. The output appears whole or not at all. Raise ValueError
    for a dataset that is missing or damaged, dtypes that differ, modes in some datasets only, or an input that is the
    output.
    """
    if not prefixes:
        raise ValueError(f"nothing to merge into {output_prefix}: no datasets are given")
    indices = [_open_input(prefix, [output_prefix]) for prefix in prefixes]
    first = indices[0]
    for index in indices:
        if index.token_dtype != first.token_dtype:
            raise ValueError(f"dataset {index.prefix} has ids of {index.token_dtype.name}, but {first.prefix} of "
                             f"{first.token_dtype.name}: they cannot be merged")
        if index.has_modes != first.has_modes and index.num_sequences and first.num_sequences:
            raise ValueError(f"of {first.prefix} and {index.prefix} only one has modes: they cannot be merged")
    _write({output_prefix: [cut(index, 0, index.num_document_entries - 1) for index in indices]}, workers, copied)
    return open_index(output_prefix, "merged")


def split_dataset(prefix: str, output_prefix: str, weights, workers: int = 1,
                  copied=lambda num_bytes: None) -> list[IndexFile]:
    """Cut a dataset into runs of documents, in proportion to `weights`: `{output_prefix}_0` and so on.

    The numbers in the names have as many digits as the last. Raise ValueError as `merge_datasets` does, and for weights
    that are not positive or leave a part without documents.
    """
    if not weights or not min(weights) > 0 or not sum(weights) < float("inf"):
        raise ValueError(f"weights {' '.join(f'{weight:g}' for weight in weights)}: all must be greater than 0")
    outputs = part_prefixes(output_prefix, len(weights))
    index = _open_input(prefix, outputs)
    documents = index.num_document_entries - 1
    bounds = [round(total / sum(weights) * documents) for total in itertools.accumulate(weights, initial=0)]
    empty = next((part for part, bound in enumerate(itertools.pairwise(bounds)) if bound[0] == bound[1]), None)
    if empty is not None:
        raise ValueError(f"dataset {prefix} has {documents} documents: part {empty} of {len(weights)} would get none")
    parts = [cut(index, first, end) for first, end in itertools.pairwise(bounds)]
    _write({output: [part] for output, part in zip(outputs, parts)}, workers, copied)
    return [open_index(output, "part") for output in outputs]


def cut_sequences(prefix: str, output_prefix: str, length: int) -> int:
    """Lay the ids of a dataset end to end and write them as documents of `length` ids each. Return how many are left.

    Raise ValueError for a dataset that is damaged or is the output, too.
    """
    index = _open_input(prefix, [output_prefix])
    dtype, documents_at_once = index.token_dtype, max(1, BYTES_PER_BLOCK // (length * index.token_dtype.itemsize))
    with open(prefix + ".bin", "rb") as file, written_whole([output_prefix], dtype) as (writer,):
        while True:
            ids = np.frombuffer(file.read(documents_at_once * length * dtype.itemsize), dtype)
            whole = len(ids) // length
            writer.add(ids[:whole * length], [[length]] * whole)
            if whole < documents_at_once:
                return len(ids) - whole * length


def part_prefixes(output_prefix: str, parts: int) -> list[str]:
    return [f"{output_prefix}_{part:0{len(str(parts - 1))}d}" for part in range(parts)]


def _open_input(prefix: str, outputs: list[str]) -> IndexFile:
    index = open_index(prefix, "dataset")
    if os.path.realpath(prefix) in map(os.path.realpath, outputs):
        raise ValueError(f"dataset {prefix} is an input and an output too")
    damage = next(index_damage(index), None)
    if damage is not None:
        raise ValueError(f"dataset {prefix} is damaged: {damage}")
    return index


@dataclass(frozen=True)
class Slice:
    """Consecutive documents of a sound dataset, as half-open ranges of documents, of their sequences and of bytes."""

    index: IndexFile
    documents: tuple[int, int]
    sequences: tuple[int, int]
    bytes: tuple[int, int]


def cut(index: IndexFile, first_document: int, end_document: int) -> Slice:
    def byte_of(sequence: int) -> int:
        if sequence == index.num_sequences:
            return os.path.getsize(index.prefix + ".bin")
        return index.at(index.pointers, sequence)

    first, end = (index.at(index.documents, document) for document in (first_document, end_document))
    return Slice(index, (first_document, end_document), (first, end), (byte_of(first), byte_of(end)))


def _write(outputs: dict[str, list[Slice]], workers: int, copied):
    """Write the slices of each output end to end; all outputs get their names once all are written."""
    for output in outputs:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
    try:
        for output, slices in outputs.items():
            with naming(output + ".bin.tmp"):
                _write_bin(output + ".bin.tmp", slices, workers, copied)
            with naming(output + ".idx.tmp"):
                _write_index(output + ".idx.tmp", slices)
        for output in outputs:
            publish(output)
    finally:
        for output in outputs:
            discard(output)


@dataclass(frozen=True)
class ByteRange:
    """Bytes [begin, begin + size) of `source`, to be copied to byte `target` of the output."""

    source: str
    begin: int
    target: int
    size: int


def _write_bin(path: str, slices: list[Slice], workers: int, copied):
    with open(path, "wb") as output, ThreadPoolExecutor(max(1, workers), "merge") as pool:
        pending = [pool.submit(_copy, byte_range, output.fileno(), copied) for byte_range in byte_ranges(slices)]
        try:
            for future in pending:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def byte_ranges(slices: list[Slice]) -> Iterator[ByteRange]:
    target = 0
    for part in slices:
        first, end = part.bytes
        for begin in range(first, end, BYTES_PER_TASK):
            size = min(BYTES_PER_TASK, end - begin)
            yield ByteRange(part.index.prefix + ".bin", begin, target, size)
            target += size


def _copy(byte_range: ByteRange, output: int, copied):
    """Copy by copy_file_range, which shares blocks where the file system can, or else by reading and writing.

    Raise ValueError where the input ends before the range does.
    """
    done = 0
    with open(byte_range.source, "rb") as file:
        while done < byte_range.size:
            count = (_copy_in_kernel(file.fileno(), output, byte_range, done)
                     or _copy_block(file.fileno(), output, byte_range, done))
            if not count:
                raise ValueError(f"{byte_range.source} was cut while it was copied: it ends at byte "
                                 f"{byte_range.begin + done}")
            done += count
            copied(count)


def _copy_in_kernel(source: int, output: int, byte_range: ByteRange, done: int) -> int:
    """Return the bytes copied; 0 at the end of the source, and on systems and file systems that cannot."""
    try:
        return os.copy_file_range(source, output, min(byte_range.size - done, BYTES_PER_BLOCK),
                                  byte_range.begin + done, byte_range.target + done)
    except (AttributeError, OSError):  # also of a full disk, which the write that follows reports
        return 0


def _copy_block(source: int, output: int, byte_range: ByteRange, done: int) -> int:
    with naming(byte_range.source):
        block = os.pread(source, min(byte_range.size - done, BYTES_PER_BLOCK), byte_range.begin + done)
    written = 0
    while written < len(block):
        written += os.pwrite(output, block[written:], byte_range.target + done + written)
    return len(block)


def _write_index(path: str, slices: list[Slice]):
    """Write the .idx of `slices` end to end: pointers and document entries of sound datasets, shifted."""
    num_sequences = [end - first for first, end in (part.sequences for part in slices)]
    num_bytes = [end - first for first, end in (part.bytes for part in slices)]
    num_documents = sum(end - first for first, end in (part.documents for part in slices))
    code = next(code for code, dtype in TOKEN_DTYPES.items() if dtype == slices[0].index.token_dtype)
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, sum(num_sequences), num_documents + 1))
        for part in slices:
            _append(file, part.index.read(part.index.lengths, *part.sequences))
        for part, target in zip(slices, itertools.accumulate(num_bytes, initial=0)):
            _append(file, part.index.read(part.index.pointers, *part.sequences), target - part.bytes[0])
        file.write(np.zeros(1, "<i8").data)
        for part, target in zip(slices, itertools.accumulate(num_sequences, initial=0)):
            ends = tuple(document + 1 for document in part.documents)
            _append(file, part.index.read(part.index.documents, *ends), target - part.sequences[0])
        for part in slices:
            if part.index.has_modes:
                _append(file, part.index.read(part.index.modes, *part.sequences))


def _append(file, chunks: Iterator[np.ndarray], shift: int = 0):
    for chunk in chunks:
        file.write((chunk + chunk.dtype.type(shift)).data)
