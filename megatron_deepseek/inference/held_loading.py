"""Reads weights that are kept as FP8 or NF4: tensor by tensor, so that memory holds little but the result.

A parameter is taken out of the model while it is still on the meta device, where it has a shape and no memory. Its
numbers are read some rows at a time, quantised, and written to where they stay. Which parameters: those that released
FP8 weights have in FP8, the linear layers of attention, MLPs and experts; embedding, head, norms, routers and the MTP
modules' eh_proj stay plain.

Blocks of FP8 are 128 x 128, those of NF4 64 of a row. Ranks that divide a weight elsewhere than between blocks would
compute other numbers than one process; that is refused, but for rows of FP8 blocks, whose scales are given to each row.

Shapes: E experts of this rank, N rows, K columns.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_deepseek.checkpoint.convert import block_fp8
from megatron_deepseek.checkpoint.convert.names import Place, native_places
from megatron_deepseek.checkpoint.convert.source import TensorSource
from megatron_deepseek.parallel.regions import Region
from megatron_deepseek.inference.model_files import FP8
from megatron_deepseek.inference.quantised import Fp8Weight, HeldWeight, Nf4Weight, exchange
from megatron_deepseek.ops import nf4
from megatron_deepseek.ops.fp8.encoding import num_tiles
from megatron_deepseek.parallel.shards import shard_regions

_NUMBERS_AT_ONCE = 1 << 23


@dataclass(frozen=True)
class Part:
    """Rows start..stop and `columns` of the stored tensor `name`, `rows` in all, which go to `row` of an expert."""

    name: str
    rows: int
    start: int
    stop: int
    columns: slice
    expert: int
    row: int

    def chunks(self) -> Iterator["Part"]:
        """Yield it in parts of some rows, which begin where blocks of 128 do."""
        step = max(1, _NUMBERS_AT_ONCE // self.columns.stop // block_fp8.BLOCK) * block_fp8.BLOCK
        edges = [self.start, *range((self.start // step + 1) * step, self.stop, step), self.stop]
        for start, stop in zip(edges, edges[1:]):
            yield Part(self.name, self.rows, start, stop, self.columns, self.expert, self.row + start - self.start)


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter that is to be held: `name` of `module`, its shape on this rank, and what it is made of."""

    module: nn.Module
    name: str
    full_name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def stacked(self) -> bool:
        return len(self.shape) == 3


def take_out(stage: nn.Module, source: TensorSource) -> list[Target]:
    """Remove the parameters that are to be held from a model on the meta device, and return where each belongs."""
    places = defaultdict(list)
    for place in native_places(source.config):
        places[place.whole].append(place)
    found = []
    for prefix, module in stage.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full_name = f"{prefix}.{name}"
            if block_fp8.is_quantized(places[full_name][0].name):
                shape = tuple(getattr(parameter, "_local_tensor", parameter).shape)
                found.append(Target(module, name, full_name, shape, tuple(_parts(parameter, places[full_name]))))
                delattr(module, name)
    return found


def _parts(parameter: nn.Parameter, places: Sequence[Place]) -> Iterator[Part]:
    """Yield what this rank's shard is made of, in the order of its rows."""
    if isinstance(parameter, DTensor):
        regions = [Region(each.offset, tuple(each.local.shape)) for each in shard_regions(parameter)]
    else:
        regions = [Region((0,) * parameter.ndim, tuple(parameter.shape))]
    before = 0
    for region in regions:
        for place in places:
            inner = Region(place.offset, place.extent).overlap(region)
            if inner is not None:
                start = inner.place[-2] - place.offset[-2]
                columns = slice(inner.place[-1], inner.end[-1])
                expert = inner.place[0] - region.place[0] if len(inner.place) == 3 else 0
                yield Part(place.name, place.shape[0], start, start + inner.shape[-2], columns, expert,
                           before + inner.place[-2] - region.place[-2])
        before += region.shape[-2]


@torch.no_grad()
def fill(targets: Sequence[Target], source: TensorSource, form: str, device: torch.device, double: bool = False
         ) -> None:
    """Read, quantise and put in place each of `targets`. `double`: quantise the scales of NF4 too."""
    for target in targets:
        weight = _read_fp8(target, source, device) if form == FP8 else _read_nf4(target, source, device, double)
        exchange(target.module, target.name, weight)


def _read_fp8(target: Target, source: TensorSource, device: torch.device) -> HeldWeight:
    """Return codes as they are stored; what is not stored in FP8 is quantised as a conversion would."""
    *experts, rows, columns = target.shape
    whole_blocks = all(part.row % block_fp8.BLOCK == part.start % block_fp8.BLOCK == 0 for part in target.parts) and \
        all(part.stop == part.rows or part.stop % block_fp8.BLOCK == 0 for part in target.parts)
    codes = torch.empty(target.shape, dtype=torch.float8_e4m3fn, device=device)
    scale_rows = num_tiles(rows) if whole_blocks else rows
    scales = torch.empty(*experts, scale_rows, num_tiles(columns), device=device)
    for part in (chunk for each in target.parts for chunk in each.chunks()):
        q, scale = _fp8_rows(part, source, target.full_name)
        own, own_scales = (codes[part.expert], scales[part.expert]) if target.stacked else (codes, scales)
        own[part.row:part.row + len(q)] = q
        if whole_blocks:
            first = part.row // block_fp8.BLOCK
            own_scales[first:first + len(scale)] = scale
        else:
            skipped = part.start % block_fp8.BLOCK
            of_rows = scale.repeat_interleave(block_fp8.BLOCK, 0)[skipped:skipped + len(q)]
            own_scales[part.row:part.row + len(q)] = of_rows
    return Fp8Weight(codes, scales)


def _fp8_rows(part: Part, source: TensorSource, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of a part's rows and the scales of the blocks that they lie in."""
    begin = part.start // block_fp8.BLOCK * block_fp8.BLOCK
    end = min(num_tiles(part.stop) * block_fp8.BLOCK, part.rows)
    _refuse_cut(part, block_fp8.BLOCK, source, name)
    if source.dtypes[part.name] == torch.float8_e4m3fn:
        q, scale = source.read_fp8(part.name, begin, end)
    else:
        q, scale = _quantized(part.name, block_fp8.quantize, source.read(part.name, begin, end))
    tiles = slice(part.columns.start // block_fp8.BLOCK, num_tiles(part.columns.stop))
    return q[part.start - begin:part.stop - begin, part.columns], scale[:, tiles]


def _read_nf4(target: Target, source: TensorSource, device: torch.device, double: bool) -> HeldWeight:
    *experts, rows, columns = target.shape
    held = [nf4.empty(rows, columns, double, device) for _ in range(experts[0] if experts else 1)]
    for part in (chunk for each in target.parts for chunk in each.chunks()):
        _refuse_cut(part, nf4.BLOCK, source, target.full_name)
        made = _quantized(part.name, nf4.quantize, source.read(part.name, *_read_rows(part, source)))
        made = made.with_double_scales() if double else made
        skipped = made.shape[0] - (part.stop - part.start)
        own = held[part.expert].rows(part.row, part.row + part.stop - part.start)
        own.copy_(made.rows(skipped, made.shape[0]).cut(part.columns))
    return Nf4Weight(tuple(held), target.stacked)


def _read_rows(part: Part, source: TensorSource) -> tuple[int, int]:
    """Return the rows to read for a part: FP8 is read from the beginning of a block on."""
    stored_in_blocks = source.dtypes[part.name] == torch.float8_e4m3fn
    return part.start // block_fp8.BLOCK * block_fp8.BLOCK if stored_in_blocks else part.start, part.stop


def _quantized(name: str, quantize, numbers: torch.Tensor):
    try:
        return quantize(numbers)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _refuse_cut(part: Part, block: int, source: TensorSource, name: str) -> None:
    """Raise ValueError if ranks divide the columns of a weight inside a block."""
    width = source.shapes[part.name][1]
    if part.columns.start % block or (part.columns.stop % block and part.columns.stop != width):
        raise ValueError(f"{name} has {width} columns, which {width // (part.columns.stop - part.columns.start)} "
                         f"tensor-parallel ranks divide inside a quantised block of {block}")
