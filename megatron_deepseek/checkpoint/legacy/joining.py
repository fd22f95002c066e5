"""Megatron-LM's ranks' parts put together: the tensors of a whole model, in items that lie in the ranks' files.

A part's name in its file is that of the rank's module: layers are counted from the first of the virtual stage, experts
from the rank's first. Here each gets the name that megatron-core gives the whole in `torch_dist` checkpoints. Along
which dimension ranks divide a tensor follows from the shapes of part and whole; a part of the whole's shape is a copy.
Two things are no plain slices: the rows of linear_fc1, of which each rank has its part of gate's, then its part of
up's; and the older grouped GEMM's experts, which lie side by side and transposed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from megatron_deepseek.checkpoint.convert.megatron import PADDED
from megatron_deepseek.checkpoint.convert.names import Place
from megatron_deepseek.checkpoint.dcp.files import Item, StoredTensors
from megatron_deepseek.checkpoint.legacy.rank_files import LegacyIteration, RankFile
from megatron_deepseek.checkpoint.legacy.torch_file import StoredTensor
from megatron_deepseek.parallel.regions import Region, fill_once

_COPY = re.compile(r"(.+) in stage (\d+)")  # the name of a tensor that an earlier stage holds already
_LAYER = re.compile(r"(decoder|mtp)\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.*mlp\.experts\.)"
                     r"(?:local_experts\.(\d+)\.(linear_fc[12])\.weight|(linear_fc[12])\.weight(\d+))")
_GROUPED = re.compile(r".*mlp\.experts\.weight[12]")
_FIRST = "linear_fc1.weight"


@dataclass(frozen=True, eq=False)
class Part:
    """A rank's part of the tensor `whole`: of expert number `expert` of a stack, if it is one's."""

    whole: str
    file: RankFile
    tensor: StoredTensor
    expert: int | None = None


def parts_of(iteration: LegacyIteration, experts: int) -> list[Part]:
    """Return all parts, of each one of the files that hold equal ones; `experts` is the number of a layer's.

    Raise ValueError for a weight that is no plain tensor, such as Transformer Engine's FP8 weights.
    """
    local = experts // iteration.expert_ranks
    chosen: dict[tuple, Part] = {}
    holders: dict[str, int] = {}
    for stage, file, chunk, before in _stages(iteration):
        for name, value in chunk.items():
            part = _part(name, value, file, before, local) if isinstance(name, str) else None
            if part is None:
                continue
            if holders.setdefault(part.whole, stage) != stage:
                part = replace(part, whole=f"{part.whole} in stage {stage}")
            of_expert = part.expert is not None or _GROUPED.fullmatch(part.whole)
            rank = (file.expert, file.tensor % iteration.expert_tensor_ranks) if of_expert else (0, file.tensor)
            chosen.setdefault((part.whole, part.expert, rank), part)
    return list(chosen.values())


def _stages(iteration: LegacyIteration) -> Iterator[tuple[int, RankFile, dict[str, Any], dict[str, int]]]:
    """Yield (stage, file, its tensors, layers before them by their kind), stages in the order of the model.

    Stage s is the virtual stage s // p of pipeline rank s % p.
    """
    ranks, before = iteration.pipeline_ranks, {"decoder": 0, "mtp": 0}
    for stage in range(ranks * len(iteration.files[0].chunks)):
        counts = dict.fromkeys(before, 0)
        for file in iteration.files:
            if file.pipeline != stage % ranks:
                continue
            chunk = file.chunks[stage // ranks]
            yield stage, file, chunk, before
            for match in filter(None, map(_LAYER.match, filter(lambda name: isinstance(name, str), chunk))):
                counts[match[1]] = max(counts[match[1]], int(match[2]) + 1)
        before = {kind: before[kind] + counts[kind] for kind in before}


def _part(name: str, value: Any, file: RankFile, before: dict[str, int], local: int) -> Part | None:
    """Return what a name stands for; None for what is no weight: Transformer Engine's and Megatron's extra states."""
    if name.endswith("_extra_state") or value is None:
        return None
    if not isinstance(value, StoredTensor):
        raise ValueError(f"{file.path}: {name} is no plain contiguous tensor, as weights that are kept in FP8 are not")
    layer = _LAYER.fullmatch(name)
    if layer is not None:
        rest = layer[3].replace("mtp_model_layer.", "transformer_layer.") if layer[1] == "mtp" else layer[3]
        name = f"{layer[1]}.layers.{int(layer[2]) + before[layer[1]]}.{rest}"
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        return Part(name, file, value)
    number = int(expert[2] or expert[5])
    if number >= local:
        raise ValueError(f"{file.path}: {name} is one of more than {local} experts of its rank")
    whole = f"{expert[1]}experts.{expert[3] or expert[4]}.weight"
    return Part(whole, file, value, file.expert * local + number)


def transposed_experts(places: list[Place], stored: frozenset[str], divided: int) -> list[Place]:
    """Return `places` with those of experts of the older grouped GEMM, where these are `stored`.

    There weight1 is [E, H, 2 I] with gate's and up's columns in turns, I / `divided` each, and weight2 is [E, I, H].
    """
    result = []
    for place in places:
        experts = place.whole.removesuffix("experts.linear_fc1.weight").removesuffix("experts.linear_fc2.weight")
        if experts == place.whole or f"{experts}weight1" not in stored:
            result.append(place)
            continue
        count, rows, columns = place.whole_shape
        first, (expert, row, _) = place.whole.endswith(_FIRST), place.offset
        run = rows // 2 // divided if first else None
        result.append(replace(place, whole=f"{experts}weight{1 if first else 2}", whole_shape=(count, columns, rows),
                              offset=(expert, 0, run if row else 0), run=run, step=2 * (run or 0), transposed=True))
    return result


def join(iteration: LegacyIteration, parts: list[Part], wholes: dict[str, tuple[int, ...]]) -> StoredTensors:
    """Return the whole tensors; `wholes` are their shapes as the architecture has them.

    A tensor that the architecture has not keeps its part's shape, and has no items. Raise ValueError, naming file and
    tensor, for parts that do not make up the whole.
    """
    shapes, dtypes, items = {}, {}, {part.whole: [] for part in parts}
    together: dict[str, list[Part]] = {}
    for part in parts:
        together.setdefault(part.whole, []).append(part)
    for name, mine in together.items():
        original, local = copied(name) or name, mine[0].tensor.shape
        shape = wholes.get(original, local)
        if original in PADDED:
            shape = (max(shape[0], iteration.tensor_ranks * local[0]), *shape[1:])
        if any(part.tensor.dtype != mine[0].tensor.dtype for part in mine):
            raise ValueError(f"{iteration.directory}: {name} is of another type in one file than in another")
        dtypes[name], shapes[name] = mine[0].tensor.dtype, shape
        if original in wholes:
            items[name] = sorted((item for part in mine for item in _items(iteration, part, shape)), key=_place)
            if not fill_once(Region((0,) * len(shape), shape), (item.region for item in items[name])):
                raise ValueError(f"{iteration.directory}: the parts of {name} in its files do not make up the whole of "
                                 f"shape {shape}")
    stored = StoredTensors(iteration.directory, [], shapes, dtypes, items)
    stored.check_files()
    return stored


def copied(name: str) -> str | None:
    """Return the tensor of which `name` is another stage's copy, None if it is the first."""
    match = _COPY.fullmatch(name)
    return match and match[1]


def _place(item: Item) -> tuple[int, ...]:
    return item.place


def _items(iteration: LegacyIteration, part: Part, shape: tuple[int, ...]) -> list[Item]:
    """Return the items of a part in a whole of `shape`; none for a copy of rank 0's."""
    if _GROUPED.fullmatch(part.whole):
        return _grouped_items(iteration, part, shape)
    of_expert = part.expert is not None
    ranks = iteration.expert_tensor_ranks if of_expert else iteration.tensor_ranks
    rank, local, own = part.file.tensor % ranks, part.tensor.shape, shape[1:] if of_expert else shape
    leading = () if part.expert is None else (part.expert,)
    if local == own:
        return [] if rank else [_item(iteration, part, (*leading, *(0 for _ in own)), (1,) * len(leading) + own)]
    axis = _divided(local, own, ranks)
    if axis is None:
        raise ValueError(f"{part.file.path}: {part.whole} has shape {local} on rank {rank} of {ranks}, which makes up "
                         f"no tensor of shape {own}")
    halves = 2 if axis == 0 and part.whole.endswith(_FIRST) else 1
    rows, items = local[0] // halves, []
    for half in range(halves):
        begin = [half * own[0] // halves, *(0 for _ in own[1:])]
        begin[axis] += rank * (local[axis] // halves)
        items.append(_item(iteration, part, (*leading, *begin), (1,) * len(leading) + (rows, *local[1:]),
                           half * rows * prod(local[1:])))
    return items


def _divided(local: tuple[int, ...], own: tuple[int, ...], ranks: int) -> int | None:
    """Return along which dimension `ranks` parts of shape `local` make up a tensor of shape `own`, None if they do not.
    """
    return next((dim for dim in range(len(local)) if own == (*local[:dim], local[dim] * ranks, *local[dim + 1:])), None)


def _grouped_items(iteration: LegacyIteration, part: Part, shape: tuple[int, ...]) -> list[Item]:
    """Return an item for each expert of a rank of the older grouped GEMM; see `transposed_experts` for `shape`."""
    ranks, count = iteration.expert_tensor_ranks, shape[0] // iteration.expert_ranks
    first, rank = part.whole.endswith("weight1"), part.file.tensor % ranks
    size = (1, shape[1], shape[2] // ranks) if first else (1, shape[1] // ranks, shape[2])
    if len(shape) != 3 or prod(part.tensor.shape) != count * prod(size):
        raise ValueError(f"{part.file.path}: {part.whole} has shape {part.tensor.shape}, not {prod(size):,} numbers of "
                         f"each of {count} experts")
    place = (0, rank * size[2]) if first else (rank * size[1], 0)
    return [_item(iteration, part, (part.file.expert * count + number, *place), size, number * prod(size))
            for number in range(count)]


def _item(iteration: LegacyIteration, part: Part, place: tuple[int, ...], shape: tuple[int, ...], before: int = 0
          ) -> Item:
    """Return the item of bare numbers at `place`, before which the part has `before` others."""
    size, file = part.tensor.dtype.itemsize, str(part.file.path.relative_to(iteration.directory))
    begin = part.tensor.begin + before * size
    return Item(part.whole, place, shape, part.tensor.dtype, file, begin, prod(shape) * size)
