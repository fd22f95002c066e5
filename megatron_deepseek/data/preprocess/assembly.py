"""Assembly of the final datasets from finished parts: without duplicates, limited, ordered, as one file or a blend.

The parts themselves stay as they are, so that a run killed here begins its assembly again.
"""

import functools
import itertools
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_deepseek.data.index_file import IndexFile, open_index
from megatron_deepseek.data.indexed import IndexedWriter, written_whole
from megatron_deepseek.data.merge import cut_sequences, merge_datasets
from megatron_deepseek.data.preprocess import selection
from megatron_deepseek.data.preprocess.files import written_aside
from megatron_deepseek.data.preprocess.part import Summary
from megatron_deepseek.data.preprocess.selection import Scatter
from megatron_deepseek.data.preprocess.settings import PreprocessSettings
from megatron_deepseek.data.preprocess.workers import run_tasks

MOST_OPEN_PARTS = 64
BYTES_PER_WRITE = 1 << 22


@dataclass(frozen=True)
class Assembled:
    """The result: the `prefixes` of each key, one if merged, several in a blend, and the documents left out.

    `cut_off` are the ids at the end that are fewer than --seq-length asks for, of all keys together.
    """

    prefixes: dict[str, list[str]]
    duplicates: int
    beyond_limit: int
    cut_off: int = 0


@dataclass(frozen=True)
class Parts:
    """The finished parts with their numbers of documents, how many each may give, and the assembly's folder."""

    settings: PreprocessSettings
    bases: list[str]
    documents: list[int]
    directory: str
    limits: tuple[int, ...] = ()

    def drops_path(self, part: int) -> str:
        return os.path.join(self.directory, f"drops-{part:08d}")

    def taken(self, part: int) -> np.ndarray:
        """Return the documents of a part that are neither duplicates nor beyond the limit, ascending."""
        keep = np.ones(self.documents[part], bool)
        keep[selection.read_drops(self.drops_path(part))] = False
        return np.flatnonzero(keep)[:self.limits[part]]


def assemble(settings: PreprocessSettings, summaries: list[Summary], dtype, tick: Callable[[], None]) -> Assembled:
    """Make the final datasets; `summaries` are those of all parts in order. Raise OSError where there is no room."""
    directory = os.path.join(settings.parts_directory, "assembly")
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    bases = [os.path.join(settings.parts_directory, f"{summary.part:08d}") for summary in summaries]
    parts = Parts(settings, bases, [summary.documents for summary in summaries], directory)
    run = functools.partial(_run_all, workers=settings.execution.workers, tick=tick)
    if settings.selection.dedup is not None:
        _drop_duplicates(parts, run)
    parts = _with_limits(parts)
    taken = sum(parts.limits)
    if settings.selection.shuffle_seed is not None:
        ordered = _shuffle(parts, dtype, run, taken)
    else:
        ordered = _trim(parts, dtype, run)
    duplicates = sum(os.path.getsize(path) // 4 for path in map(parts.drops_path, range(len(bases)))
                     if os.path.exists(path))
    finish = _merge if settings.execution.merge else _name_blend
    left_out = duplicates, sum(parts.documents) - duplicates - taken
    made = {key: [f"{base}_{key}" for base in ordered] for key in settings.content.json_keys}
    if settings.selection.seq_length is not None:
        cut_off = sum(_cut(settings, key, prefixes, directory) for key, prefixes in made.items())
        return Assembled({key: [settings.prefix_of(key)] for key in made}, *left_out, cut_off)
    return Assembled({key: finish(settings, key, prefixes) for key, prefixes in made.items()}, *left_out)


def _run_all(tasks, work, workers, tick):
    for _ in run_tasks(tasks, work, workers, tick):
        pass


def _drop_duplicates(parts: Parts, run):
    """Put all but the first of the documents with equal hashes on the lists of dropped documents of their parts."""
    groups = selection.count_groups(sum(parts.documents), parts.settings.execution.workers)
    scatter = Scatter(os.path.join(parts.directory, "hashes"), groups)

    def scatter_part(part: int):
        scatter.add(selection.hash_rows(part, selection.read_records(parts.bases[part])))

    def drop_repeated(group: int):
        rows = selection.repeated_rows(scatter.read(group))
        selection.append_by(rows["part"], rows["document"], parts.drops_path)

    run(range(len(parts.bases)), scatter_part)
    run(range(groups), drop_repeated)


def _with_limits(parts: Parts) -> Parts:
    limit = parts.settings.selection.max_documents
    left, limits = limit if limit is not None else sum(parts.documents), []
    for part, documents in enumerate(parts.documents):
        path = parts.drops_path(part)
        kept = documents - (os.path.getsize(path) // 4 if os.path.exists(path) else 0)
        limits.append(min(kept, left))
        left -= limits[-1]
    return Parts(parts.settings, parts.bases, parts.documents, parts.directory, tuple(limits))


def _trim(parts: Parts, dtype, run) -> list[str]:
    """Return the parts in order; one of which documents are left out is replaced by a copy without them."""
    whole = [limit == documents for limit, documents in zip(parts.limits, parts.documents)]

    def copy_taken(part: int):
        taken = parts.taken(part)
        gather(parts, _assembled(parts, part), dtype, np.full(len(taken), part), taken)

    run((part for part, all_taken in enumerate(whole) if not all_taken), copy_taken)
    return [base if all_taken else _assembled(parts, part)
            for part, (base, all_taken) in enumerate(zip(parts.bases, whole))]


def _shuffle(parts: Parts, dtype, run, taken: int) -> list[str]:
    """Return groups of documents by random keys, each in the order of its keys: together a random order of all."""
    groups = selection.count_groups(taken, parts.settings.execution.workers)
    scatter = Scatter(os.path.join(parts.directory, "order"), groups)

    def scatter_part(part: int):
        records = selection.read_records(parts.bases[part])
        scatter.add(selection.order_rows(part, records, parts.taken(part), parts.settings.selection.shuffle_seed))

    def gather_group(group: int):
        rows = scatter.read(group)
        gather(parts, _assembled(parts, group), dtype, rows["part"], rows["document"])

    run(range(len(parts.bases)), scatter_part)
    run(range(groups), gather_group)
    return [_assembled(parts, group) for group in range(groups)]


def _assembled(parts: Parts, number: int) -> str:
    return os.path.join(parts.directory, f"{number:08d}")


def gather(parts: Parts, base: str, dtype, part_numbers: np.ndarray, documents: np.ndarray):
    """Write a dataset of each key, at `{base}_{key}`: in turn document documents[i] of part part_numbers[i]."""
    keys = parts.settings.content.json_keys
    with written_whole([f"{base}_{key}" for key in keys], dtype) as writers:
        for key, writer in zip(keys, writers):
            readers = _Readers([f"{part}_{key}" for part in parts.bases])
            with readers:
                _copy_documents(writer, (readers.read(part, document)
                                         for part, document in zip(part_numbers.tolist(), documents.tolist())))


def _copy_documents(writer: IndexedWriter, documents: Iterator[tuple[bytes, list[int]]]):
    contents, lengths, size = [], [], 0
    for content, own in itertools.chain(documents, [(b"", None)]):
        if own is not None:
            contents.append(content)
            lengths.append(own)
            size += len(content)
        if size >= BYTES_PER_WRITE or own is None:  # joining a single piece doesn't copy it
            writer.add(np.frombuffer(b"".join(contents), writer.dtype), lengths)
            contents, lengths, size = [], [], 0


class _Readers:
    """Reads documents of many datasets, of which at most MOST_OPEN_PARTS are open at a time."""

    def __init__(self, prefixes: list[str]):
        self.prefixes = prefixes
        self.open: OrderedDict[int, tuple] = OrderedDict()

    def read(self, number: int, document: int) -> tuple[bytes, list[int]]:
        """Return the bytes of a document's ids, and the lengths of its sequences."""
        file, index, lengths, pointers, documents = self._opened(number)
        first, end = int(documents[document]), int(documents[document + 1])
        if first == end:
            return b"", []
        own = lengths[first:end].tolist()
        file.seek(int(pointers[first]))
        return file.read(sum(own) * index.token_dtype.itemsize), own

    def _opened(self, number: int) -> tuple:
        if number in self.open:
            self.open.move_to_end(number)
            return self.open[number]
        if len(self.open) == MOST_OPEN_PARTS:
            self.open.popitem(last=False)[1][0].close()
        index: IndexFile = open_index(self.prefixes[number], "part")
        self.open[number] = (open(self.prefixes[number] + ".bin", "rb"), index, index.map(index.lengths),
                             index.map(index.pointers), index.map(index.documents))
        return self.open[number]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for opened in self.open.values():
            opened[0].close()


def _merge(settings: PreprocessSettings, key: str, prefixes: list[str]) -> list[str]:
    prefix = settings.prefix_of(key)
    merge_datasets(prefixes, prefix, settings.execution.workers)
    return [prefix]


def _cut(settings: PreprocessSettings, key: str, prefixes: list[str], directory: str) -> int:
    """Write the ids of `prefixes`, end to end, as documents of --seq-length + 1. Return the number of those left."""
    whole, length = os.path.join(directory, f"whole_{key}"), settings.selection.seq_length + 1
    tokens = os.path.getsize(merge_datasets(prefixes, whole, settings.execution.workers).prefix + ".bin")
    tokens //= open_index(whole, "merged").token_dtype.itemsize
    if tokens < length:
        raise ValueError(f"--seq-length {length - 1}: the {tokens} tokens of {key} are too few for a sequence of "
                         f"{length}")
    return cut_sequences(whole, settings.prefix_of(key), length)


def _name_blend(settings: PreprocessSettings, key: str, prefixes: list[str]) -> list[str]:
    """Give each of `prefixes` a name of its own, and write a file of "tokens prefix" lines that names them all."""
    named, lines = [], []
    for made in prefixes:
        index = open_index(made, "part")
        if not index.num_sequences:
            continue
        prefix = f"{settings.prefix_of(key)}_{len(named):05d}"
        for suffix in (".bin", ".idx"):
            Path(prefix + suffix).unlink(missing_ok=True)
            os.link(made + suffix, prefix + suffix)
        named.append(prefix)
        lines.append(f"{os.path.getsize(prefix + '.bin') // index.token_dtype.itemsize} {prefix}\n")
    with written_aside(settings.prefix_of(key) + ".blend") as file:
        file.write("".join(lines))
    return named
