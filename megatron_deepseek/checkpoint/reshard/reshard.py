"""New files for an old checkpoint: one for each rank of a layout, one for all, or the mean of several checkpoints.

Every result is an ordinary DCP checkpoint, which any layout loads. Numbers pass from the old files to the new ones in
blocks; where they follow each other in both and keep their type, as the bytes that they are.
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
from megatron_deepseek.checkpoint.dcp.item_reader import Reader
from megatron_deepseek.checkpoint.dcp.metadata_writer import write_metadata
from megatron_deepseek.checkpoint.destination import new_iteration
from megatron_deepseek.checkpoint.fingerprints import Fingerprint
from megatron_deepseek.checkpoint.inspection import checks_of
from megatron_deepseek.checkpoint.integrity import checksum_directory
from megatron_deepseek.checkpoint.native import ARGUMENTS, CONFIG, LAYOUT, WEIGHTS, Checkpoint
from megatron_deepseek.checkpoint.regions import Region
from megatron_deepseek.checkpoint.safetensors_file import as_bytes
from megatron_deepseek.checkpoint.tracker import TRACKER
from megatron_deepseek.checkpoint.train_state import STATE, TrainState
from megatron_deepseek.checkpoint.workspace import write_aside
from megatron_deepseek.model.architecture.matching import differences

if TYPE_CHECKING:
    from megatron_deepseek.checkpoint.reshard.rank_shards import Readers

Numbers = Callable[[ItemRegion], Iterator[memoryview]]
_GATHER_BYTES = 1 << 20


def wanted(checkpoint: Checkpoint, dtype: torch.dtype | None, with_optimizer: bool) -> dict[str, torch.dtype]:
    """Tensors to write, in the order of the layers, and their types. `dtype` is for weights; moments keep theirs."""
    stored = checkpoint.stored.dtypes
    return {name: output_dtype(name, stored[name], dtype) if name.startswith(WEIGHTS) else stored[name]
            for name in stored if with_optimizer or name.startswith(WEIGHTS)}


def files_of_ranks(readers: "Readers", tensors: dict[str, torch.dtype], checkpoint: Checkpoint) -> list[ItemFile]:
    """A file for each rank, and one for each set of ranks that hold the same parts (tensor-parallel copies, routers'
    biases, an embedding on several stages). ValueError unless layout and checkpoint have the same tensors.
    """
    _check_same(checkpoint, {name: readers[name] for name in readers if name in tensors or name.startswith(WEIGHTS)},
                tensors)
    parts: dict[tuple[int, ...], list[ItemRegion]] = {}
    for name in (name for name in readers if name in tensors):
        for region, ranks in sorted(readers[name].items()):
            parts.setdefault(ranks, []).extend(split(ItemRegion(name, region, tensors[name])))
    files, shared = [], 0
    for ranks in sorted(parts):
        files.append(ItemFile(f"rank-{ranks[0]:05d}.distcp" if len(ranks) == 1 else f"shared-{shared:05d}.distcp",
                              tuple(parts[ranks])))
        shared += len(ranks) > 1
    return files


def _check_same(checkpoint: Checkpoint, of_layout: "Readers", tensors: dict[str, torch.dtype]) -> None:
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
    """One file of everything, or files of at most `largest` bytes (or one item)."""
    parts = [region for name, dtype in tensors.items()
             for region in split(ItemRegion(name, _whole(checkpoint, name), dtype))]
    groups = divide(parts, largest) if largest is not None else [tuple(parts)]
    return [ItemFile(f"part-{number:05d}.distcp", group) for number, group in enumerate(groups)]


def _whole(checkpoint: Checkpoint, name: str) -> Region:
    shape = checkpoint.stored.shapes[name]
    return Region((0,) * len(shape), shape)


def resharded(checkpoint: Checkpoint, files: Sequence[ItemFile], save: Path, layout: dict[str, Any] | None,
              with_optimizer: bool, verify: bool = True) -> DirectoryBuild:
    """The same iteration in other files, under `save`. `verify`: check the old ones first."""
    state = checkpoint.state if with_optimizer else checkpoint.state.without_optimizer()
    return _product("resharding", [checkpoint], files, save, layout, state, verify,
                    lambda readers: partial(_stored, readers[0]))


def averaged(checkpoints: Sequence[Checkpoint], weights: Sequence[float], files: Sequence[ItemFile], save: Path,
             state: TrainState, verify: bool = True) -> DirectoryBuild:
    """The weighted mean of equal tensors of several checkpoints."""
    _check_comparable(checkpoints)
    return _product("averaging", checkpoints, files, save, None, state, verify,
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


def _product(what: str, sources: Sequence[Checkpoint], files: Sequence[ItemFile], save: Path,
             layout: dict[str, Any] | None, state: TrainState, verify: bool,
             numbers_of: Callable[[list[Reader]], Numbers], more: Any = None) -> DirectoryBuild:
    """An iteration under `save`, whose parts' bytes come from `numbers_of` readers of `sources`."""
    first = sources[0]
    destination = new_iteration(save, state.iteration)

    def write(path: Path, file: ItemFile, advance: Advance) -> Fingerprint:
        with ExitStack() as stack:
            readers = [stack.enter_context(Reader(source.stored)) for source in sources]
            return write_items(path, file.name, file.parts, numbers_of(readers), advance)

    def complete(directory: Path, fingerprints: dict[str, Fingerprint]) -> None:
        items = [item for fingerprint in fingerprints.values() for item in fingerprint.items]
        write_metadata(directory, first.stored.shapes, items)
        shutil.copyfile(first.directory / CONFIG, directory / CONFIG)
        (directory / STATE).write_text(json.dumps(state.to_json(), indent=2))
        if layout is not None:
            (directory / LAYOUT).write_text(json.dumps(layout, indent=2))
        if len(sources) == 1 and (first.directory / ARGUMENTS).exists():  # an average is no run's
            shutil.copyfile(first.directory / ARGUMENTS, directory / ARGUMENTS)
        checksum_directory(directory, {name: fingerprint.checksum for name, fingerprint in fingerprints.items()})

    def publish() -> None:
        assets = first.directory.parent / DIRECTORY
        if assets.is_dir():
            shutil.copytree(assets, save / DIRECTORY, dirs_exist_ok=True)
        write_aside(save / TRACKER, f"{state.iteration}\n")

    contents = [[[file.name, _digest(file)] for file in files], state.to_json(), layout, more]
    inputs = [path for source in sources for path in source.inputs()]
    checks = [check for source in sources for check in checks_of(source.directory)] if verify else []
    return DirectoryBuild(what, destination, files, inputs, contents, write, complete,
                   publish, checks, sum(path.stat().st_size for path in inputs) if checks else 0)


def _digest(file: ItemFile) -> str:
    """Of what is in a file: all the names and places of a large model would take hundreds of megabytes."""
    digest = xxh3_128()
    for part in file.parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()


def _stored(reader: Reader, part: ItemRegion) -> Iterator[memoryview]:
    """The bytes of a part, cast where its type is another."""
    stored = reader.directory.dtypes[part.name]
    if stored == part.dtype:
        yield from reader.numbers(part.name, part.region)
        return
    for region in part.region.runs(_GATHER_BYTES // stored.itemsize):
        yield as_bytes(cast(part.name, _gather(reader, part.name, region), part.dtype))


def _mean(readers: Sequence[Reader], weights: Sequence[float], part: ItemRegion) -> Iterator[memoryview]:
    """Added up in float64 for weights of 32 bits or more, in float32 for those of 16."""
    wide = torch.float64 if part.dtype.itemsize >= 4 else torch.float32
    for region in part.region.runs(_GATHER_BYTES // 4):
        total = torch.zeros(region.shape, dtype=wide)
        for reader, weight in zip(readers, weights):
            total += _gather(reader, part.name, region).to(wide) * weight
        yield as_bytes(cast(part.name, total / sum(weights), part.dtype))


def _gather(reader: Reader, name: str, region: Region) -> torch.Tensor:
    out = torch.empty(region.shape, dtype=reader.directory.dtypes[name])
    reader.gather(region, reader.directory.covering(name, region), out)
    return out
