"""Resharding: new files for an old checkpoint, one for each rank of a layout, one for all, or the mean of several.

Every result is an ordinary DCP checkpoint, which any layout loads. Numbers pass from the old files to the new ones in
blocks, as the stored bytes wherever their dtype stays.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from xxhash import xxh3_128

from megatron_deepseek.checkpoint.building import Advance, DirectoryBuild
from megatron_deepseek.checkpoint.convert.assets import DIRECTORY
from megatron_deepseek.checkpoint.convert.blocks import cast
from megatron_deepseek.checkpoint.convert.conversion import output_dtype
from megatron_deepseek.checkpoint.convert.output_file import divide
from megatron_deepseek.checkpoint.dcp.item_file import ItemFile, ItemRegion, split, write_items
from megatron_deepseek.checkpoint.dcp.item_reader import ItemReader
from megatron_deepseek.checkpoint.dcp.metadata_writer import write_metadata
from megatron_deepseek.checkpoint.destination import new_iteration
from megatron_deepseek.checkpoint.fingerprints import Fingerprint
from megatron_deepseek.checkpoint.inspection import checksum_checks
from megatron_deepseek.checkpoint.integrity import checksum_directory
from megatron_deepseek.checkpoint.native import ARGUMENTS, CONFIG, LAYOUT, WEIGHTS, Checkpoint
from megatron_deepseek.parallel.regions import Region
from megatron_deepseek.checkpoint.safetensors_file import as_bytes
from megatron_deepseek.checkpoint.tracker import TRACKER
from megatron_deepseek.checkpoint.train_state import STATE, TrainState
from megatron_deepseek.checkpoint.workspace import write_aside
from megatron_deepseek.model.architecture.matching import differences

if TYPE_CHECKING:
    from megatron_deepseek.checkpoint.reshard.rank_shards import HoldersByTensor

Numbers = Callable[[ItemRegion], Iterator[memoryview]]
_GATHER_BYTES = 1 << 20


def tensors_to_write(checkpoint: Checkpoint, dtype: torch.dtype | None, with_optimizer: bool) -> dict[str, torch.dtype]:
    """Return the dtypes of the tensors to write, in the order of the layers; moments keep theirs, whatever `dtype`."""
    stored = checkpoint.stored.dtypes
    return {name: output_dtype(name, stored[name], dtype) if name.startswith(WEIGHTS) else stored[name]
            for name in stored if with_optimizer or name.startswith(WEIGHTS)}


def files_of_ranks(holders: "HoldersByTensor", tensors: dict[str, torch.dtype], checkpoint: Checkpoint
                   ) -> list[ItemFile]:
    """Plan a file for each rank, and one for each set of ranks that hold the same regions.

    Such are tensor-parallel copies, routers' biases and an embedding on several stages. Raise ValueError unless layout
    and checkpoint have the same tensors.
    """
    _check_same(checkpoint, {name: holders[name] for name in holders if name in tensors or name.startswith(WEIGHTS)},
                tensors)
    items: dict[tuple[int, ...], list[ItemRegion]] = {}
    for name in (name for name in holders if name in tensors):
        for region, ranks in sorted(holders[name].items()):
            items.setdefault(ranks, []).extend(split(ItemRegion(name, region, tensors[name])))
    files, shared = [], 0
    for ranks in sorted(items):
        files.append(ItemFile(f"rank-{ranks[0]:05d}.distcp" if len(ranks) == 1 else f"shared-{shared:05d}.distcp",
                              tuple(items[ranks])))
        shared += len(ranks) > 1
    return files


def _check_same(checkpoint: Checkpoint, of_layout: "HoldersByTensor", tensors: dict[str, torch.dtype]) -> None:
    where = checkpoint.directory
    for names, what in ((sorted(set(of_layout) - set(tensors)), "lacks"),
                        (sorted(set(tensors) - set(of_layout)), "has, unknown to its architecture,")):
        if names:
            raise ValueError(f"{where} {what} {len(names)} tensor{'s' * (len(names) > 1)}, first {names[0]}")
    for name in tensors:
        shape = tuple(max(ends) for ends in zip(*(region.end for region in of_layout[name])))
        if checkpoint.stored.shapes[name] != shape:
            raise ValueError(f"{where}: {name} has shape {checkpoint.stored.shapes[name]}, config.json says {shape}")


def files_of_size(tensors: dict[str, torch.dtype], checkpoint: Checkpoint, largest: int | None) -> list[ItemFile]:
    """Plan one file of everything, or files of at most `largest` bytes (or one item)."""
    items = [item for name, dtype in tensors.items()
             for item in split(ItemRegion(name, _whole(checkpoint, name), dtype))]
    groups = divide(items, largest) if largest is not None else [tuple(items)]
    return [ItemFile(f"part-{number:05d}.distcp", group) for number, group in enumerate(groups)]


def _whole(checkpoint: Checkpoint, name: str) -> Region:
    shape = checkpoint.stored.shapes[name]
    return Region((0,) * len(shape), shape)


def reshard_build(checkpoint: Checkpoint, files: Sequence[ItemFile], save: Path, layout: dict[str, Any] | None,
                  with_optimizer: bool, verify: bool = True) -> DirectoryBuild:
    """Return the build, under `save`, of the same iteration in other files.

    `layout` becomes its layout.json, None makes none. `verify` asks to compare the old files with their checksums.
    """
    state = checkpoint.state if with_optimizer else checkpoint.state.without_optimizer()
    return _iteration_build("resharding", [checkpoint], files, save, layout, state, verify,
                            lambda readers: partial(_stored, readers[0]))


def average_build(checkpoints: Sequence[Checkpoint], weights: Sequence[float], files: Sequence[ItemFile], save: Path,
                  state: TrainState, verify: bool = True) -> DirectoryBuild:
    """Return the build, under `save`, of the weighted mean of several checkpoints of one architecture."""
    _check_comparable(checkpoints)
    return _iteration_build("averaging", checkpoints, files, save, None, state, verify,
                            lambda readers: partial(_mean, readers, weights), list(weights))


def _check_comparable(checkpoints: Sequence[Checkpoint]) -> None:
    first, *others = checkpoints
    weights = {name: shape for name, shape in first.stored.shapes.items() if name.startswith(WEIGHTS)}
    for other in others:
        different = differences(other.config, first.config)
        theirs = {name: shape for name, shape in other.stored.shapes.items() if name.startswith(WEIGHTS)}
        different += [f"{name} has shape {theirs.get(name)} there, {weights.get(name)} here"
                      for name in sorted(weights.keys() | theirs.keys()) if weights.get(name) != theirs.get(name)][:1]
        if different:
            raise ValueError(f"{other.directory} is of another architecture than {first.directory}: "
                             f"{'; '.join(different)}")


def _iteration_build(what: str, sources: Sequence[Checkpoint], files: Sequence[ItemFile], save: Path,
                     layout: dict[str, Any] | None, state: TrainState, verify: bool,
                     numbers_of: Callable[[list[ItemReader]], Numbers], more: Any = None) -> DirectoryBuild:
    """Return the build of an iteration under `save`; `numbers_of(readers of sources)` yields the bytes of its items.

    `more` is what, beside the arguments here, decides the numbers.
    """
    first = sources[0]
    destination = new_iteration(save, state.iteration)

    def write(path: Path, file: ItemFile, advance: Advance) -> Fingerprint:
        with ExitStack() as stack:
            readers = [stack.enter_context(ItemReader(source.stored)) for source in sources]
            return write_items(path, file.name, file.items, numbers_of(readers), advance)

    def complete(directory: Path, fingerprints: dict[str, Fingerprint]) -> None:
        items = [item for fingerprint in fingerprints.values() for item in fingerprint.items]
        write_metadata(directory, first.stored.shapes, items)
        shutil.copyfile(first.directory / CONFIG, directory / CONFIG)
        (directory / STATE).write_text(json.dumps(state.to_json(), indent=2))
        if layout is not None:
            (directory / LAYOUT).write_text(json.dumps(layout, indent=2))
        if len(sources) == 1 and (first.directory / ARGUMENTS).exists():  # an average was made by no single run
            shutil.copyfile(first.directory / ARGUMENTS, directory / ARGUMENTS)
        checksum_directory(directory, {name: fingerprint.checksum for name, fingerprint in fingerprints.items()})

    def publish() -> None:
        assets = first.directory.parent / DIRECTORY
        if assets.is_dir():
            shutil.copytree(assets, save / DIRECTORY, dirs_exist_ok=True)
        write_aside(save / TRACKER, f"{state.iteration}\n")

    contents = [[[file.name, _digest(file)] for file in files], state.to_json(), layout, more]
    inputs = [path for source in sources for path in source.inputs()]
    checks = [check for source in sources for check in checksum_checks(source.directory)] if verify else []
    return DirectoryBuild(what, destination, files, inputs, contents, write, complete, publish, checks,
                          sum(path.stat().st_size for path in inputs) if checks else 0)


def _digest(file: ItemFile) -> str:
    """Return a digest of what is in a file; for a large model the names and places would take hundreds of megabytes."""
    digest = xxh3_128()
    for item in file.items:
        digest.update(repr(item).encode())
    return digest.hexdigest()


def _stored(reader: ItemReader, item: ItemRegion) -> Iterator[memoryview]:
    """Yield the bytes of an item as they are stored, or cast if it has another dtype."""
    stored = reader.directory.dtypes[item.name]
    if stored == item.dtype:
        yield from reader.numbers(item.name, item.region)
        return
    for region in item.region.contiguous_parts(_GATHER_BYTES // stored.itemsize):
        yield as_bytes(cast(item.name, reader.read(item.name, region), item.dtype))


def _mean(readers: Sequence[ItemReader], weights: Sequence[float], item: ItemRegion) -> Iterator[memoryview]:
    """Yield the bytes of the weighted mean of an item, summed in float64, or in float32 for weights of 16 bits."""
    wide = torch.float64 if item.dtype.itemsize >= 4 else torch.float32
    for region in item.region.contiguous_parts(_GATHER_BYTES // 4):
        total = torch.zeros(region.shape, dtype=wide)
        for reader, weight in zip(readers, weights):
            total += reader.read(item.name, region).to(wide) * weight
        yield as_bytes(cast(item.name, total / sum(weights), item.dtype))
